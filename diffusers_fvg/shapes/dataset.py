"""Writes clips of the shapes world as a folder of videos with captions, which `fvg train` reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..atomic import replacing
from ..media import lossless_video
from .train_models import training_scene
from .world import Scene, render


# Frame rate of the embedded model's clips, which have 17 frames of 64 x 64 pixels.
FRAME_RATE = 8


def write_dataset(folder: str | Path, num_clips: int, seed: int = 7) -> None:
    """Renders random training scenes, never with a held-out prompt, to lossless videos and a `metadata.jsonl`.

    A clip depends on `seed` and its index only, so a longer dataset begins with the shorter one.

    Args:
        folder (`str` or `Path`): folder for `clips/*.mp4` and `metadata.jsonl` (`file_name`, and the prompt as `text`).
        num_clips (`int`): number of clips; 10,000 take about 80 seconds of one core and 65 MB.
        seed (`int`, *optional*): seed of the scenes.

    Raises:
        `ValueError`: `num_clips` is below 1.
    """
    if num_clips < 1:
        raise ValueError(f"`num_clips={num_clips}` must be at least 1.")
    write_scenes(folder, [training_scene(np.random.default_rng((seed, index))) for index in range(num_clips)])


def write_scenes(folder: str | Path, scenes: Sequence[Scene]) -> None:
    """Renders the given scenes, in the format of [`write_dataset`].

    A clip's file name is a digest of its scene. Files are written completely or not at all, and existing ones are kept, so that
    a further call continues an interrupted one.
    """
    folder, rows = Path(folder), []
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    for scene in tqdm(scenes, desc="rendering clips"):
        name = f"clips/{hashlib.sha256(repr(scene.objects).encode()).hexdigest()[:24]}.mp4"
        if not (folder / name).exists():
            _write(folder / name, lossless_video(render(scene.objects), FRAME_RATE))
        rows.append(json.dumps({"file_name": name, "text": scene.prompt}) + "\n")
    _write(folder / "metadata.jsonl", "".join(rows).encode())


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as draft:
        draft.write_bytes(content)
