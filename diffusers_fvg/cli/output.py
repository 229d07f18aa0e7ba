"""What is written of a run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .. import __version__


def _versions() -> dict[str, str]:
    import diffusers
    import torch
    import transformers

    modules = {"diffusers": diffusers, "torch": torch, "transformers": transformers}
    return {"diffusers-fvg": __version__} | {name: module.__version__ for name, module in modules.items()}


def write(arguments: argparse.Namespace, pipe, request, frames, record: dict, captions, anchors) -> None:
    """Video and strip; `record` tells how the video was made, pictures and their captions are those of the strip."""
    from ..media import write_strip, write_video
    from ..pipelines.record import hub_revisions

    frame_rate, preset = pipe.call_defaults["frame_rate"], request.sampling(pipe)
    model = arguments.model or "embedded"
    metadata = {
        **record,
        # Of a folder nothing but its name: paths are those of this machine.
        "model": Path(model).resolve().name if Path(model).is_dir() else model,
        "hub_revisions": hub_revisions(pipe),
        "preset": None if preset is None else preset.name,
        "versions": _versions(),
    }
    # A player shows the embedded model's 64 pixels as a stamp: enlarged by whole factors, which keeps edges sharp.
    scale = max(1, 384 // frames.shape[1])
    write_video(arguments.output, frames, frame_rate, metadata=metadata, scale=scale)
    print(f"video:              {arguments.output}")
    if arguments.strip:
        write_strip(arguments.strip, record["prompt"], captions, anchors, frames)
        print(f"strip:              {arguments.strip}")


def save_stages(folder: Path, record: dict, anchor, frames) -> None:
    import numpy as np
    import PIL.Image

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stages.json").write_text(json.dumps(record, indent=2) + "\n")
    if anchor is not None:
        anchors = [anchor] if isinstance(anchor, PIL.Image.Image) else anchor
        for number, image in enumerate(anchors):
            image.save(folder / ("anchor.png" if number == 0 else f"anchor_{number + 1}.png"))
    for index, frame in enumerate(frames):
        PIL.Image.fromarray(np.round(frame * 255).astype(np.uint8)).save(folder / f"frame_{index:04d}.png")
