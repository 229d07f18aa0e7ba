"""Atomic writes of files and folders: each is written under a temporary name beside its target, synced, then renamed.

If the process is killed, the old or the new content is complete. At most a draft (the temporary file or folder) remains,
and the next writer removes it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import platform
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil


try:
    import fcntl
except ImportError:  # Windows has no such locks.
    fcntl = None  # type: ignore[assignment]  # mypy has no type for an absent module.

# `_DRAFT` is the name of a draft: ".fvg-<machine>-<pid>-<random>.tmp". `COMPLETE` holds a complete set of entries that still
# has to be moved into place.
_DRAFT = re.compile(r"\.fvg-(?P<machine>.*)-(?P<pid>\d+)-[0-9a-f]{8}\.tmp")
COMPLETE, _PLAN = ".fvg-complete", ".plan.json"
_MACHINE = re.sub(r"[^\w.]", "_", platform.node())[:64]
_FULL = {
    errno.ENOSPC,
    errno.EFBIG,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENAMETOOLONG,
}


@contextlib.contextmanager
def naming(path: str | os.PathLike, hint: str = "") -> Iterator[None]:
    """Adds the path to errors of full disks and missing permissions that are raised in the block.

    Args:
        path (`str` or `os.PathLike`): file or folder that is written.
        hint (`str`): another sentence for the message.

    Raises:
        `OSError`: with the path, the cause and its `errno`.
    """
    try:
        yield
    except Exception as error:
        # Libraries in Rust may give the number only in their message: "I/O error: File too large (os error 27)".
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = int(found[1]) if found else getattr(error, "errno", None)
        if number not in _FULL:
            raise
        told = OSError(f"{path} cannot be written: {os.strerror(number)}.{f' {hint}' if hint else ''}")
        told.errno = number
        raise told from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike, hint: str = "") -> Iterator[Path]:
    """Yields a temporary path to write to. It replaces `path` at the end of the block, and is removed after an error.

    Args:
        path (`str` or `os.PathLike`): the file to write; missing parent folders are created.
        hint (`str`): as in [`naming`].

    Raises:
        `OSError`: as in [`naming`].
    """
    path = Path(path)
    with naming(path, hint):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_drafts_once(path.parent.absolute())
        draft = _draft(path.parent)
        try:
            yield draft
            _to_disk(draft)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_entries(
    folder: str | os.PathLike, index: str, owned: re.Pattern | None = None, wait: bool = True
) -> Iterator[Path]:
    """Yields a temporary folder. At the end of the block its entries replace those of the same names in `folder`.

    Readers ignore a folder without the file `index`, which lists the other files. `index` is removed first and moved into
    place last, so that a mixture of old and new files is never read.

    Args:
        folder (`str` or `os.PathLike`): created if it is missing. Its other entries stay.
        index (`str`): name of the index file.
        owned (`re.Pattern`, *optional*): entries with matching names are removed unless the block writes them again.
        wait (`bool`): whether to wait for another writer of the folder; if `False`, another writer is an error.

    Raises:
        `BlockingIOError`: `wait` is `False` and another process or thread writes to the folder.
        `OSError`: as in [`naming`], except for errors inside the block.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _only_writer(folder, wait):
        with naming(folder):
            finish(folder)
            remove_drafts(folder)
            draft = _draft(folder)
            draft.mkdir()
        try:
            yield draft
            with naming(folder):
                _put_in_place(draft, folder, index, owned)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
            if is_new and not any(folder.iterdir()):
                folder.rmdir()


def _put_in_place(draft: Path, folder: Path, index: str, owned: re.Pattern | None) -> None:
    for path in draft.rglob("*"):
        if path.is_file():
            _to_disk(path)
    there = (entry.name for entry in folder.iterdir() if owned is not None and owned.fullmatch(entry.name))
    obsolete = [name for name in there if not (draft / name).exists()]
    (draft / _PLAN).write_text(json.dumps({"index": index, "obsolete": obsolete}), encoding="utf-8")
    _to_disk(draft / _PLAN)
    draft.replace(folder / COMPLETE)
    finish(folder)


def finish(folder: str | os.PathLike) -> None:
    """Moves the entries of a [`replacing_entries`] block into place that was killed before it had moved them all.

    Does nothing if there are none.
    """
    folder = Path(folder)
    complete = folder / COMPLETE
    if complete.is_symlink() or not (complete / _PLAN).is_file():
        return
    plan = json.loads((complete / _PLAN).read_text(encoding="utf-8"))
    index = Path(plan["index"]).name
    names = [entry.name for entry in complete.iterdir() if entry.name not in (_PLAN, index)]
    if (complete / index).exists():
        _remove(folder / index)
        names.append(index)
    for name in plan["obsolete"]:
        _remove(folder / Path(name).name)
    for name in names:
        _remove(folder / name)
        (complete / name).rename(folder / name)
    shutil.rmtree(complete)


def check_finished(folder: str | os.PathLike, index: str) -> None:
    """Raises `OSError` for a folder whose writer was killed while [`replacing_entries`] moved entries into place."""
    if Path(folder, COMPLETE).is_dir() and not Path(folder, index).exists():
        raise OSError(
            f"{folder} is incomplete: the program that wrote it was killed while it moved files into place. No data is lost: "
            f"`diffusers_fvg.atomic.finish({str(folder)!r})` completes the folder, and so does saving to it again."
        )


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yields a temporary folder, as `tempfile.TemporaryDirectory` does; also removes those that killed processes left."""
    place = Path(tempfile.gettempdir())
    _remove_drafts_once(place)
    folder = _draft(place)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_empty(folder: str | os.PathLike) -> bool:
    """Returns whether a folder is missing or holds nothing but drafts."""
    folder = Path(folder)
    return not folder.is_dir() or all(_DRAFT.fullmatch(entry.name) for entry in folder.iterdir())


def remove_drafts(folder: Path) -> None:
    """Removes the drafts that processes of this machine left in a folder when they were killed."""
    for entry in list(folder.iterdir()):
        found = _DRAFT.fullmatch(entry.name)
        if found and found["machine"] == _MACHINE and not psutil.pid_exists(int(found["pid"])):
            _remove(entry)


# Listing a cache folder with many files takes time, so each folder is searched once per process.
_remove_drafts_once = functools.lru_cache(maxsize=1024)(remove_drafts)


def _draft(folder: Path) -> Path:
    return folder / f".fvg-{_MACHINE}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"


def _to_disk(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _only_writer(folder: Path, wait: bool) -> Iterator[None]:
    """Holds a lock on the folder, which ends with the process. Does not lock on file systems without locks."""
    if fcntl is None:
        yield
        return
    place = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise BlockingIOError(
                f"Another process writes to {folder}: wait for it, or choose another folder."
            ) from error
        except OSError:
            pass
        yield
    finally:
        os.close(place)
