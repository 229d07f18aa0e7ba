"""Kinds of values of the command line's flags, and checks of files that are to be written. Light to import."""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)\n")


@dataclass(frozen=True)
class Whole:
    """A whole number from `low` to `high`."""

    low: int
    high: int

    def __call__(self, text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not self.low <= value <= self.high:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {self.low} to {self.high}")
        return value


@dataclass(frozen=True)
class Number:
    """A number from `low` to `high`; `above`: more than `low`."""

    low: float
    high: float
    above: bool = False

    def __call__(self, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not self.low <= value <= self.high or self.above and value == self.low:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no number {'above' if self.above else 'from'} {self.low:g} to {self.high:g}"
            )
        return value


def file_name(text: str) -> Path:
    """The name of a file; an empty one would be the folder that the command runs in."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name of the file is empty: give one, or leave the flag out")
    return Path(text)


def local_folder(text: str) -> Path:
    """A folder of this machine; the address of another storage would become a folder of that name."""
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no folder of this machine, and only fvg batch and fvg bench check work on another storage"
        )
    return Path(text)


def folder_or_url(text: str) -> Path | str:
    """A folder of this machine, or the address of one on another storage; `file://` is of this machine."""
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return text if "://" in text else Path(text)


# Beyond any model: a slip of the finger is told from a large video.
PIXELS, FRAMES, STEPS = Whole(8, 16384), Whole(1, 100_000), Whole(1, 1000)
SEED = Whole(0, 2**63 - 1)


def check_file(flag: str, path: Path | None, suffix: str, overwrite: bool) -> None:
    """A file can be written there, and none would be lost.

    Raises:
        `ValueError`: naming the flag and the way out.
    """
    if path is None:
        return
    _check_name(flag, path)
    if path.suffix.lower() != suffix:
        raise ValueError(f"{flag} {path} must end in {suffix}.")
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder; name a file in it.")
    if path.exists() and not overwrite:
        raise ValueError(f"{flag} {path} is there already; choose another name, or give --overwrite.")
    check_folder(flag, path.parent)


def check_folder(flag: str, path: Path) -> None:
    """A folder is there or can be made, and can be written into.

    Raises:
        `ValueError`: naming the flag.
    """
    _check_name(flag, path)
    try:
        place = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be written to: {error.strerror or error}.") from error


def _check_name(flag: str, path: Path) -> None:
    if "\0" in str(path):
        raise ValueError(f"{flag} {str(path)!r} is no name of a file: it holds a null character.")


def free_name(path: Path) -> Path:
    """`video.mp4`, or where that is there `video-2.mp4`, and so on."""
    names = [path, *(path.with_stem(f"{path.stem}-{number}") for number in range(2, 10_000))]
    return next(name for name in names if not name.exists())
