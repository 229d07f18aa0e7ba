"""Output folders on another storage, such as `s3://bucket/folder`, through fsspec.

A run works in a folder on this machine, which holds locks, temporary files and the manifest. Finished files are copied from
there to the storage, each completely or not at all; of a copied video an empty file stays in the folder. A video is finished
when the storage lists it, so that any machine can continue where another stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from fsspec.core import url_to_fs
from huggingface_hub import constants

from .manifest import MANIFEST, path_key, read_manifest
from .plan import PLAN, PLAN_FACTS, RESERVED, RUN_FACTS
from .worker import CAPTIONS, STAGES


# Seconds between two copies of the manifest and the captions, which grow with every video.
RECORD_SECONDS = 30.0
# Files written up to this many seconds before the last copy are copied again, because some file systems round the time.
CLOCK_SECONDS = 2.0


class Storage:
    """Output folder on another storage: a context manager that locks its folder on this machine for one run.

    Args:
        url (`str`): an fsspec URL. Some storages need a package, such as s3fs for `s3://`.

    Attributes:
        folder (`Path`): folder on this machine, in the cache of huggingface_hub. It is removed once everything is copied.

    Raises:
        `ValueError`: the URL's protocol is unknown, its package is missing, or the URL names no folder.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        try:
            self._files, root = url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ValueError(f"{url} cannot be reached: {error}") from error
        self._root = root.rstrip("/")
        if not self._root:
            raise ValueError(f"{url} names no folder; append the name of one.")
        name = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self.folder = Path(constants.HF_HOME) / "diffusers_fvg" / name
        self._lock = FileLock(f"{self.folder}.lock")
        self._is_spent, self._next_records, self._records_until = True, 0.0, 0.0

    def __enter__(self) -> Storage:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"another run of this machine works in {self.url}; wait for it to end, or stop it."
            ) from None
        try:
            self._bring_records()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        # A folder with files that are not copied yet stays for the next run.
        if self._is_spent:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()

    # -- what is there ------------------------------------------------------------------------------------------------

    def listed(self) -> Iterator[tuple[str, int]]:
        """Yields path in the output folder and size in bytes of each file in the storage, except the run's own files."""
        with self._told("it cannot be listed"):
            self._files.invalidate_cache()
            for entry in self._entries(self._root):
                if self._name(entry) in RESERVED:
                    continue
                is_folder = entry["type"] == "directory"
                for each in self._files.find(entry["name"], detail=True).values() if is_folder else (entry,):
                    yield self._name(each), each["size"]

    def sizes(self) -> dict[bytes, int]:
        """Returns the sizes of [`listed`] in bytes, under [`path_key`]."""
        return {path_key(name): size for name, size in self.listed()}

    @contextlib.contextmanager
    def borrowed(self, name: str) -> Iterator[Path]:
        """Downloads a file of the storage for the time of a `with` block."""
        path = self.folder / f"borrowed{Path(name).suffix}"
        try:
            self._bring(name, path)
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _bring_records(self) -> None:
        """Downloads plan, facts and manifest; removes the local folder if it belongs to another plan or model."""
        facts = {name: self._read(name) for name in (PLAN_FACTS, RUN_FACTS)}
        here = {name: (self.folder / name).read_bytes() for name in facts if (self.folder / name).is_file()}
        if any(facts[name] != data for name, data in here.items()):
            shutil.rmtree(self.folder)
        self._is_spent = not self.folder.exists()
        (self.folder / MANIFEST).mkdir(parents=True, exist_ok=True)
        for name, data in facts.items():
            if data is not None:
                (self.folder / name).write_bytes(data)
        if facts[PLAN_FACTS] is not None:
            self._bring(PLAN, self.folder / PLAN)
        with self._told(f"{MANIFEST} cannot be listed"):
            lines = [self._name(entry) for entry in self._entries(f"{self._root}/{MANIFEST}")]
        for name in lines:
            # Local manifest files may have lines that are not copied yet.
            if not (self.folder / name).exists():
                self._bring(name, self.folder / name)

    def _read(self, name: str) -> bytes | None:
        with self._told(f"{name} cannot be read"):
            self._files.invalidate_cache()
            target = f"{self._root}/{name}"
            return self._files.cat_file(target) if self._files.exists(target) else None

    def _bring(self, name: str, path: Path) -> None:
        with self._told(f"{name} cannot be read"):
            draft = path.with_name(f"{path.name}.part")
            self._files.get_file(f"{self._root}/{name}", str(draft))
            os.replace(draft, path)

    def _entries(self, folder: str) -> list[dict[str, Any]]:
        try:
            return self._files.ls(folder, detail=True)
        except FileNotFoundError:
            return []

    def _name(self, entry: Mapping[str, Any]) -> str:
        return entry["name"].strip("/").removeprefix(self._root.strip("/")).strip("/")

    # -- what goes there ----------------------------------------------------------------------------------------------

    def add_facts(self) -> None:
        """Copies the plan and the facts to the storage, unless they are there already."""
        for name in (PLAN, PLAN_FACTS, RUN_FACTS):
            if (self.folder / name).is_file() and self._read(name) is None:
                self._copy(self.folder / name)

    def add_finished(self) -> None:
        """Copies finished videos that are only on this machine, because an earlier run was stopped before it copied them."""
        self._is_spent = False
        for line in read_manifest(self.folder):
            self.add(line)

    def add(self, line: Mapping[str, Any]) -> None:
        """Copies the video of a manifest's line, and every `RECORD_SECONDS` the manifest and the captions."""
        path = self.folder / line["path"]
        if line["status"] != "failed" and path.is_file() and path.stat().st_size:
            stages = self.folder / STAGES / line["path"]
            for file in sorted(stages.iterdir()) if stages.is_dir() else ():
                self._copy(file)
            self._copy(path)
            # The empty file tells a worker that gets the video again that it is finished.
            os.truncate(path, 0)
            shutil.rmtree(stages, ignore_errors=True)
        if time.monotonic() >= self._next_records:
            self._add_records()

    def finish(self) -> None:
        """Copies what is left and marks the folder on this machine for removal."""
        self.add_finished()
        self._add_records()
        self._is_spent = True

    def _add_records(self) -> None:
        since, self._records_until = self._records_until - CLOCK_SECONDS, time.time()
        for pattern in (f"{MANIFEST}/*.jsonl", f"{CAPTIONS}/*.json"):
            for path in sorted(self.folder.glob(pattern)):
                if path.stat().st_mtime >= since:
                    self._copy(path)
        self._next_records = time.monotonic() + RECORD_SECONDS

    def _copy(self, path: Path) -> None:
        """Copies a file to the same path in the storage, completely or not at all, in a transaction of fsspec."""
        name = path.relative_to(self.folder).as_posix()
        target = f"{self._root}/{name}"
        with self._told(f"{name} cannot be written"):
            self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
            with self._files.transaction, self._files.open(target, "wb") as there, open(path, "rb") as here:
                shutil.copyfileobj(here, there, 2**20)

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Each storage's package raises its own types of error.
            raise OSError(
                f"{self.url}: {what}: {type(error).__name__}: {error}. Finished videos stay, and the same command continues "
                "from there."
            ) from error


@contextlib.contextmanager
def opened(place: str | Path) -> Iterator[tuple[Path, Storage | None]]:
    """Opens an output folder: yields the folder on this machine, and the [`Storage`] for a URL (a `str`) or `None` for a `Path`."""
    if isinstance(place, Path):
        yield place, None
        return
    with Storage(place) as storage:
        try:
            yield storage.folder, storage
        except ValueError as error:
            # The user knows the URL, not the folder on this machine.
            raise ValueError(str(error).replace(str(storage.folder), storage.url)) from error
