"""Checks the videos of a plan before a benchmark scores them: missing, damaged, black, frozen or stray files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from ..animate.motion import motion_amounts
from ..media import read_video, read_video_metadata
from .manifest import finished_sizes, path_key
from .plan import RESERVED, PlannedVideo, read_plan
from .storage import Storage


# Threshold for the 99th percentile of a video's values, of 255; below it the video counts as black. TV-range black decodes to
# 0.
BLACK = 16
# Threshold for the share of the picture that changes ([`~animate.motion.motion_amounts`]); below it a video counts as frozen.
# Noise and drift of a decoder stay below 0.03.
STILL = 0.01


@dataclass(frozen=True)
class Finding:
    """Something wrong with one file.

    Args:
        kind (`str`): `"missing"`, `"truncated"`, `"unreadable"`, `"too short"`, `"duplicate seed"`, `"black"`, `"frozen"` or
            `"stray"`.
        path (`str`): path of the file, relative to the output folder.
        reason (`str`): what the check found.
        is_fault (`bool`): `False` for a frozen video, which is right for a prompt without motion.
    """

    kind: str
    path: str
    reason: str
    is_fault: bool = True


def check_folder(folder: str | os.PathLike, min_frames: int = 1, storage: Storage | None = None) -> Iterator[Finding]:
    """Yields what is wrong in an output folder, in the order of the plan; stray files come last.

    Every video is decoded completely.

    Args:
        folder (`str` or `os.PathLike`): output folder with a plan.
        min_frames (`int`): least number of frames that an evaluator needs.
        storage ([`Storage`], *optional*): opened storage that holds the videos; `folder` is then its folder on this machine.
            Each video is downloaded while it is checked.

    Raises:
        `ValueError`: the folder has no plan.
    """
    folder = Path(folder)
    sizes, planned, seeds, folders = finished_sizes(folder), set(), set(), set()
    listed = None if storage is None else storage.sizes()
    for row in read_plan(folder):
        planned.add(path_key(row.path))
        folders.add(PurePosixPath(row.path).parent.as_posix())
        asked = json.dumps([row.prompt, row.seed, row.arguments], sort_keys=True).encode()
        key = hashlib.blake2b(asked, digest_size=16).digest()
        if key in seeds:
            yield Finding("duplicate seed", row.path, f"prompt, arguments and seed {row.seed} of an earlier video")
        seeds.add(key)
        size, path = sizes.get(path_key(row.path)), folder / row.path
        is_file = path.is_file() if listed is None else path_key(row.path) in listed
        if not is_file:
            yield Finding("missing", row.path, "not there" if size is None else "was made, and is not there any more")
            continue
        found = path.stat().st_size if listed is None else listed[path_key(row.path)]
        if size is not None and found < size:
            yield Finding("truncated", row.path, f"{found} bytes of {size}")
            continue
        with contextlib.nullcontext(path) if storage is None else storage.borrowed(row.path) as path:
            yield from _check_video(path, row, min_frames)
    if storage is None:
        yield from _strays(folder, folders, planned)
    else:
        names = (name for name, _ in storage.listed() if PurePosixPath(name).parent.as_posix() in folders)
        yield from (_stray(name) for name in sorted(names) if path_key(name) not in planned)


def _check_video(path: Path, row: PlannedVideo, min_frames: int) -> Iterator[Finding]:
    try:
        record, (frames, _) = read_video_metadata(path), read_video(path)
    except (ValueError, OSError) as error:
        yield Finding("unreadable", row.path, str(error).removeprefix(f"{path} "))
        return
    expected = max(row.arguments.get("num_frames") or record.get("num_frames") or 1, min_frames)
    if len(frames) < expected:
        yield Finding("too short", row.path, f"{len(frames)} frames of {expected}")
    if record.get("prompt") != row.prompt:
        yield Finding("stray", row.path, f"is of another prompt, {record.get('prompt')!r}")
    if np.percentile(frames, 99) < BLACK:
        yield Finding(
            "black", row.path, f"no value but the brightest hundredth is above {int(np.percentile(frames, 99))} of 255"
        )
        return
    amounts = motion_amounts(frames[None])
    if amounts is not None and amounts[0] < STILL:
        yield Finding("frozen", row.path, f"{amounts[0]:.1%} of the picture changes", is_fault=False)


def _strays(folder: Path, folders: set[str], planned: set[bytes]) -> Iterator[Finding]:
    """Yields files that are not in the plan but in its videos' folders, where evaluators open every file."""
    for name in sorted(folders):
        for path in sorted((folder / name).glob("*")) if (folder / name).is_dir() else ():
            relative = path.relative_to(folder).as_posix()
            is_own = (
                relative in RESERVED or relative in folders or any(each.startswith(f"{relative}/") for each in folders)
            )
            if not is_own and path_key(relative) not in planned:
                yield _stray(relative)


def _stray(path: str) -> Finding:
    return Finding("stray", path, "is not of the plan")
