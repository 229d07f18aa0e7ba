"""The manifest: a record of what a run has finished, with one file per worker and one line per video.

Each file has one writer, so that no worker waits for another, on one machine or on several that share the folder. If a worker
is killed while it writes, the incomplete line is the last of its file and is ignored. A worker holds a lock beside its file
while it lives. A line is written after its video is on the disk, so even after a power cut a video without a line is complete.
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
# Error numbers of a full disk, a used-up disk quota, and a file above the size limit.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Seconds between two checks of other processes.
PATIENCE = 0.2
# Seconds between two `fsync` calls of a worker. A kill loses no line. A power cut loses the lines since the last call, but the
# next run finds their videos.
SYNC_SECONDS = 1.0


class Manifest:
    """Manifest file of one worker, created with its first line.

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
        """Writes a line, and flushes the file to the disk if the last flush is at least `SYNC_SECONDS` ago."""
        if self._file is None:
            # Unbuffered: if the disk is full, no part of the line is left to be written later.
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
    """Yields the lines of all workers.

    Each has `path`, `status`, `worker` and `time` (seconds since 1970). The status is `"made"`, `"found"` (a complete video
    that had no line) or `"failed"` (with an `error`). Lines of videos also have `seed` and `bytes`, and those of made ones
    `frames`, `seconds` of each stage, `memory_bytes`, `caption` and `motion`.
    """
    for path in sorted((Path(folder) / MANIFEST).glob("*.jsonl")):
        with open(path, encoding="utf-8", newline="\n") as file:
            for line in file:
                if line.endswith("\n"):
                    yield json.loads(line)


def finished_sizes(folder: str | os.PathLike) -> dict[bytes, int]:
    """Returns the size in bytes of each finished video by its latest line, under its [`path_key`].

    This takes about 300 bytes of memory per video.
    """
    found: dict[bytes, tuple[float, int]] = {}
    for line in read_manifest(folder):
        if line["status"] != "failed":
            key, told = path_key(line["path"]), (line["time"], line["bytes"])
            # The files come in any order, and a video that was lost and made again has lines in two of them.
            found[key] = max(found.get(key, told), told)
    return {key: size for key, (_, size) in found.items()}


def path_key(path: str) -> bytes:
    return hashlib.blake2b(path.encode(), digest_size=16).digest()


def is_finished(folder: Path, row: PlannedVideo, sizes: dict[bytes, int], listed: Mapping[bytes, int]) -> bool:
    """Returns whether a video has a line and the same size in the folder or in another storage.

    Args:
        folder (`Path`): the output folder.
        row ([`~plan.PlannedVideo`]): the video.
        sizes (`dict[bytes, int]`): output of [`finished_sizes`].
        listed (`Mapping[bytes, int]`): sizes of the files in another storage, under the same keys.
    """
    size = sizes.get(path_key(row.path))
    try:
        return size is not None and (
            listed.get(path_key(row.path)) == size or (folder / row.path).stat().st_size == size
        )
    except OSError:
        return False


class Turn:
    """Context manager that gives a run exclusive use of an output folder, and removes what a killed run left unfinished.

    Args:
        folder (`Path`): the output folder.

    Raises:
        `ValueError`: another run uses the folder.
    """

    def __init__(self, folder: Path):
        self.folder, self.id = folder, secrets.token_hex(8)
        self._lock = FileLock(folder / MANIFEST / RUN_LOCK)

    def __enter__(self) -> Turn:
        manifest = self.folder / MANIFEST
        manifest.mkdir(parents=True, exist_ok=True)
        try:
            # Workers of a killed run acquire the lock for a moment, to find out that the run was killed.
            self._lock.acquire(timeout=2)
        except Timeout:
            raise ValueError(f"another run works in {self.folder}; wait for it to end, or stop it.") from None
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
        """Waits until the workers of a killed run have ended; each first finishes its current video."""
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
    """Returns whether a worker's run goes on: its driver lives, no other run has begun, and no worker has stopped it."""
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
    """Tells the other workers and the driver why the run must stop. This works on a full disk, too: the file's space was
    reserved at the start."""
    text = json.dumps(
        {"error": str(error)[:1000], "kind": type(error).__name__, "errno": getattr(error, "errno", None)}
    )
    try:
        with open(folder / TEMPORARY / ROOM, "r+", encoding="ascii") as file:
            file.write(text[:ROOM_BYTES].ljust(ROOM_BYTES))
        os.replace(folder / TEMPORARY / ROOM, folder / TEMPORARY / STOPPED)
    except FileNotFoundError:
        return  # Another worker has already stopped the run, or it has ended.


def stopped_by(folder: Path) -> dict[str, Any] | None:
    """Returns the error that a worker recorded by [`stop_run`], or `None`."""
    path = folder / TEMPORARY / STOPPED
    return json.loads(path.read_text(encoding="ascii")) if path.exists() else None
