"""Files and folders that are whole or not there: written beside their place, to disk, and put into it by a rename.

A kill at any instant leaves what was there before or what was written, and beside it at most a draft, which the next writer
removes.
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
    fcntl = None  # type: ignore[assignment]  # A module has no type of its own.

# What is on its way: ".fvg-<machine>-<pid>-<random>.tmp". What is complete and only has to be put in its place: `COMPLETE`.
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
    """What fails within it for want of room or of rights is told in one line with the name of what was to be written.

    Args:
        path (`str` or `os.PathLike`): of the file or folder.
        hint (`str`): a sentence more.

    Raises:
        `OSError`: with the number of the cause.
    """
    try:
        yield
    except Exception as error:
        # Of libraries in Rust, some of which have no class of error for this: "I/O error: File too large (os error 27)".
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = int(found[1]) if found else getattr(error, "errno", None)
        if number not in _FULL:
            raise
        told = OSError(f"{path} cannot be written: {os.strerror(number)}.{f' {hint}' if hint else ''}")
        told.errno = number
        raise told from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike, hint: str = "") -> Iterator[Path]:
    """A name beside a file to write to; at the end it becomes the file, and nothing stays of it where something fails.

    Args:
        path (`str` or `os.PathLike`): of the file; missing folders are made.
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
    """A folder to write into; at the end what is in it takes the place of what has the same names in `folder`.

    Readers take a folder without the file `index`, which says what the others are, for none. It is removed first and comes
    last, so that old and new together are never taken for one.

    Args:
        folder (`str` or `os.PathLike`): made if it is not there. What else is in it stays.
        index (`str`): name of that file.
        owned (`re.Pattern`, *optional*): names of entries that go if they are not among the new ones.
        wait (`bool`): for another writer of the folder; otherwise it is an error.

    Raises:
        `BlockingIOError`: another process, or thread, writes the folder.
        `OSError`: as in [`naming`], of all but what its user writes into it.
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
    """Puts in its place what [`replacing_entries`] had complete when it was killed; where that is nothing, does nothing."""
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
    """Raises `OSError` for a folder whose writer was killed while [`replacing_entries`] put things in their places."""
    if Path(folder, COMPLETE).is_dir() and not Path(folder, index).exists():
        raise OSError(
            f"{folder} was written to, and the program was killed at the very end. All is there: "
            f"`diffusers_fvg.atomic.finish({str(folder)!r})` puts it in its place, and so does the next that is saved there."
        )


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for temporary files, as `tempfile.TemporaryDirectory`; one that a killed process left is removed."""
    place = Path(tempfile.gettempdir())
    _remove_drafts_once(place)
    folder = _draft(place)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_empty(folder: str | os.PathLike) -> bool:
    """Whether nothing is in a folder, or there is none; drafts do not count."""
    folder = Path(folder)
    return not folder.is_dir() or all(_DRAFT.fullmatch(entry.name) for entry in folder.iterdir())


def remove_drafts(folder: Path) -> None:
    """Removes the drafts that processes of this machine left in a folder when they were killed."""
    for entry in list(folder.iterdir()):
        found = _DRAFT.fullmatch(entry.name)
        if found and found["machine"] == _MACHINE and not psutil.pid_exists(int(found["pid"])):
            _remove(entry)


# A folder may hold the many files of a cache, and is looked through once.
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
    """Holds a lock of the folder itself, which ends with the process; without one where the file system has none."""
    if fcntl is None:
        yield
        return
    place = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise BlockingIOError(
                f"{folder} is written to by another process: wait for it, or choose another folder."
            ) from error
        except OSError:
            pass
        yield
    finally:
        os.close(place)
