"""Types of command-line flags, and checks of output files. Imports neither torch nor diffusers."""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that prints each error on one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)\n")


@dataclass(frozen=True)
class Whole:
    """Parses a whole number from `low` to `high`."""

    low: int
    high: int

    def __call__(self, text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not self.low <= value <= self.high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {self.low} to {self.high}")
        return value


@dataclass(frozen=True)
class Number:
    """Parses a number from `low` to `high`; with `above`, `low` itself is excluded."""

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
                f"{text!r} is not a number {'above' if self.above else 'from'} {self.low:g} to {self.high:g}"
            )
        return value


def file_name(text: str) -> Path:
    """Parses a file name and refuses an empty one, which would mean the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the file name is empty: give one, or omit the flag")
    return Path(text)


def local_folder(text: str) -> Path:
    """Parses a local folder and refuses a URL, from which a folder of that name would be made."""
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a local folder; only fvg batch and fvg bench check accept the URL of other storage"
        )
    return Path(text)


def folder_or_url(text: str) -> Path | str:
    """Parses a local folder, also given as `file://`, or the URL of a folder on other storage."""
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return text if "://" in text else Path(text)


# The upper limits exceed every model, so that only typing errors are refused.
PIXELS, FRAMES, STEPS = Whole(8, 16384), Whole(1, 100_000), Whole(1, 1000)
SEED = Whole(0, 2**63 - 1)


def check_file(flag: str, path: Path | None, suffix: str, overwrite: bool) -> None:
    """Checks that a file can be written to `path` and that no existing file would be lost.

    Raises:
        `ValueError`: names the flag and the fix.
    """
    if path is None:
        return
    _check_name(flag, path)
    if path.suffix.lower() != suffix:
        raise ValueError(f"{flag} {path} must end in {suffix}.")
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder; name a file in it.")
    if path.exists() and not overwrite:
        raise ValueError(f"{flag} {path} already exists; choose another name, or give --overwrite.")
    check_folder(flag, path.parent)


def check_folder(flag: str, path: Path) -> None:
    """Checks that a folder exists or can be created, and is writable.

    Raises:
        `ValueError`: names the flag.
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
        raise ValueError(f"{flag} {str(path)!r} is not a file name: it holds a null character.")


def free_name(path: Path) -> Path:
    """Returns `path`, or if it exists the first free one of `video-2.mp4`, `video-3.mp4` and so on."""
    names = (path if number == 1 else path.with_stem(f"{path.stem}-{number}") for number in range(1, 10_000))
    return next(name for name in names if not name.exists())
