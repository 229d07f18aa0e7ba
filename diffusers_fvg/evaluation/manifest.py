"""What a run has finished: one line for each video, in a file of each worker.

A file has one writer, so that no worker waits for another or writes into its line, on one machine or on several that share
the folder; a line that a kill cuts short is the last of its file, and is left out. A worker keeps a lock beside its file while
it lives. Lines follow the videos they tell of, which are on the disk by then: of a video without a line the file itself is
whole, after a power cut too.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .plan import PlannedVideo


MANIFEST, TEMPORARY = "manifest", "temporary"
RUN_LOCK, RUN_ID, STOPPED, ROOM = "run.lock", "run.id", "stopped.json", "room"
ROOM_BYTES = 4096
# Errors of a disk without room, of a user without any on it, and of a file that may not grow.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Seconds between two looks at what other processes do.
PATIENCE = 0.2
# Seconds between two waits of a worker for the disk to have its lines. A kill takes no line with it; a power cut those of so
# long, whose videos the next run finds.
SYNC_SECONDS = 1.0


class Manifest:
    """The file of one worker, made with its first line.

    Args:
        folder (`Path`): the output folder.
    """

    def __init__(self, folder: Path):
        self.worker = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._path = folder / MANIFEST / f"{self.worker}.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self._path.with_suffix(".lock"))
        self._lock.acquire()
        self._file: FileIO | None = None
        self._synced = 0.0

    def add(self, line: dict[str, Any]) -> None:
        """Writes a line, and where the last time is `SYNC_SECONDS` ago all of them to the disk itself."""
        if self._file is None:
            # Unbuffered: of a line that finds no room nothing is left to be written later.
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 (as long as the worker)
        data = (
            json.dumps({**line, "worker": self.worker, "time": round(time.time(), 3)}, ensure_ascii=False) + "\n"
        ).encode()
        if self._file.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
        self._lock.release()
        self._path.with_suffix(".lock").unlink(missing_ok=True)


def read_manifest(folder: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """The lines of all workers: of each the `path` and `status` (`"made"`; `"found"`, a whole video without a line; `"failed"`,
    with an `error`), `worker` and `time` (seconds since 1970), and of a video `seed`, `bytes`, `frames`, `seconds` of each stage,
    `memory_bytes`, `caption` and `motion`.
    """
    for path in sorted((Path(folder) / MANIFEST).glob("*.jsonl")):
        with open(path, encoding="utf-8", newline="\n") as file:
            for line in file:
                if line.endswith("\n"):
                    yield json.loads(line)


def finished_sizes(folder: str | os.PathLike) -> dict[bytes, int]:
    """Bytes of the videos that have a line, by [`path_key`], as the latest says: some 300 bytes of memory each."""
    found: dict[bytes, tuple[float, int]] = {}
    for line in read_manifest(folder):
        if line["status"] != "failed":
            key, told = path_key(line["path"]), (line["time"], line["bytes"])
            # Files of workers come in any order; a video that was lost has a line in two of them.
            found[key] = max(found.get(key, told), told)
    return {key: size for key, (_, size) in found.items()}


def path_key(path: str) -> bytes:
    return hashlib.blake2b(path.encode(), digest_size=16).digest()


def is_finished(folder: Path, row: PlannedVideo, sizes: dict[bytes, int], listed: Mapping[bytes, int]) -> bool:
    """Whether a video has a line, of its bytes in `sizes`, and is as long in the folder or as another storage has it `listed`."""
    size = sizes.get(path_key(row.path))
    try:
        return size is not None and (
            listed.get(path_key(row.path)) == size or (folder / row.path).stat().st_size == size
        )
    except OSError:
        return False


class Turn:
    """A run's turn at an output folder: within it no other run works there, and what a killed one left half done is gone.

    Args:
        folder (`Path`): the output folder.

    Raises:
        `ValueError`: another run works there.
    """

    def __init__(self, folder: Path):
        self.folder, self.id = folder, secrets.token_hex(8)
        self._lock = FileLock(folder / MANIFEST / RUN_LOCK)

    def __enter__(self) -> Turn:
        manifest = self.folder / MANIFEST
        manifest.mkdir(parents=True, exist_ok=True)
        try:
            # Workers of a killed run hold it for an instant, to find out that it was killed.
            self._lock.acquire(timeout=2)
        except Timeout:
            raise ValueError(f"another run works in {self.folder}; wait for it, or stop it.") from None
        try:
            (manifest / RUN_ID).write_text(self.id)
            self._await_workers()
            shutil.rmtree(self.folder / TEMPORARY, ignore_errors=True)
            (self.folder / TEMPORARY).mkdir()
            (self.folder / TEMPORARY / ROOM).write_text(" " * ROOM_BYTES)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.folder / TEMPORARY, ignore_errors=True)
        (self.folder / MANIFEST / RUN_ID).unlink(missing_ok=True)
        self._lock.release()

    def _await_workers(self) -> None:
        """Until the workers of a killed run have seen that it is over: they finish their videos first."""
        for path in (self.folder / MANIFEST).glob("*.lock"):
            if path.name == RUN_LOCK:
                continue
            lock, told = FileLock(path), False
            while True:
                try:
                    lock.acquire(timeout=0)
                    break
                except Timeout:
                    if not told:
                        print(f"waiting for worker {path.stem} of a run that was killed to finish its video")
                    told = True
                    time.sleep(PATIENCE)
            lock.release()
            path.unlink(missing_ok=True)


def is_turn(folder: Path, run_id: str) -> bool:
    """Whether the run that a worker belongs to goes on: its driver lives, no other began, and no worker stopped it."""
    if (folder / TEMPORARY / STOPPED).exists():
        return False
    try:
        if (folder / MANIFEST / RUN_ID).read_text() != run_id:
            return False
        with FileLock(folder / MANIFEST / RUN_LOCK).acquire(timeout=0):
            return False
    except Timeout:
        return True
    except FileNotFoundError:
        return False


def stop_run(folder: Path, error: BaseException) -> None:
    """Tells the other workers and the driver why the run cannot go on; on a full disk too, in room that was kept for it."""
    text = json.dumps(
        {"error": str(error)[:1000], "kind": type(error).__name__, "errno": getattr(error, "errno", None)}
    )
    try:
        with open(folder / TEMPORARY / ROOM, "r+", encoding="ascii") as file:
            file.write(text[:ROOM_BYTES].ljust(ROOM_BYTES))
        os.replace(folder / TEMPORARY / ROOM, folder / TEMPORARY / STOPPED)
    except FileNotFoundError:
        return  # Another worker was faster, or the run is over.


def stopped_by(folder: Path) -> dict[str, Any] | None:
    """What a worker told by [`stop_run`]."""
    path = folder / TEMPORARY / STOPPED
    return json.loads(path.read_text(encoding="ascii")) if path.exists() else None
