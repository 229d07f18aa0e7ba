"""Writes the files of a run: video, strip, and the results of its stages."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from ..atomic import is_empty, replacing_entries
from ..flags import free_name


STAGES_FILE = "stages.json"
# Files of `save_stages`, which replace those of an earlier run.
_OWNED = re.compile(r"stages\.json|(anchor|candidate)(_\d+)?\.png|frame_\d{4,}\.png")


def write(arguments: argparse.Namespace, pipe, output, captions, anchors) -> None:
    """Writes the first video of an output with its sound, and a strip with the given captions and anchor pictures.

    If another process has written `--output` meanwhile, the video gets the next free name.
    """
    from ..media import viewing_scale, write_strip, write_video

    frames, record = output.frames[0], output.records[0]
    frame_rate, metadata = pipe.call_defaults["frame_rate"], None if arguments.no_metadata else record
    scale = viewing_scale(frames.shape[1])
    audio = getattr(output, "audio", None)
    sound = {"audio": audio[0], "audio_sampling_rate": output.audio_sampling_rate} if audio else {}
    path = arguments.output if arguments.overwrite else free_name(arguments.output)
    write_video(path, frames, frame_rate, metadata=metadata, scale=scale, **sound)
    print(f"video:              {path}{', with sound' * bool(sound)}")
    if arguments.strip:
        write_strip(arguments.strip, record["prompt"], captions, anchors, frames)
        print(f"strip:              {arguments.strip}")


def check_stages(folder: Path, overwrite: bool) -> None:
    """Raises `ValueError` for a folder that is not empty, unless `overwrite` is set."""
    if not overwrite and not is_empty(folder):
        raise ValueError(f"--save-stages {folder} is not empty; choose another folder, or give --overwrite.")


@contextlib.contextmanager
def stages_draft(folder: Path | None, overwrite: bool) -> Iterator[Path | None]:
    """Yields a draft folder for [`save_stages`]; its files move to `folder` at the end and replace those of earlier runs.

    The run locks `folder` from the beginning.

    Raises:
        `BlockingIOError`: another process writes to the folder.
        `ValueError`: as in [`check_stages`], if another process has written to the folder meanwhile.
    """
    if folder is None:
        yield None
        return
    with replacing_entries(folder, STAGES_FILE, _OWNED, wait=False) as draft:
        check_stages(folder, overwrite)
        yield draft


def save_stages(folder: Path, record: dict, anchor, frames, candidates=None) -> None:
    import numpy as np
    import PIL.Image

    if candidates:
        record = record | {"candidates": []}
        for number, candidate in enumerate(candidates, start=1):
            name = f"candidate_{number}.png"
            candidate.image.save(folder / name)
            facts = {"seed": candidate.seed, "score": candidate.score, "answers": candidate.answers}
            record["candidates"].append({"file": name} | facts)
    (folder / STAGES_FILE).write_text(json.dumps(record, indent=2) + "\n")
    if anchor is not None:
        anchors = [anchor] if isinstance(anchor, PIL.Image.Image) else anchor
        for number, image in enumerate(anchors):
            image.save(folder / ("anchor.png" if number == 0 else f"anchor_{number + 1}.png"))
    for index, frame in enumerate(frames):
        PIL.Image.fromarray(np.round(frame * 255).astype(np.uint8)).save(folder / f"frame_{index:04d}.png")
