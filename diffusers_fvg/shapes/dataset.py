"""Clips of the shapes world as a folder of videos with captions, as `fvg train` reads them."""

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


# What the embedded model is trained on: 17 frames of 64 x 64 pixels at 8 per second.
FRAME_RATE = 8


def write_dataset(folder: str | Path, num_clips: int, seed: int = 7) -> None:
    """Renders scenes of the training mix, never a held-out prompt, to lossless videos and a `metadata.jsonl`.

    A clip depends on `seed` and its number alone, so that a longer data set begins with the shorter one.

    Args:
        folder (`str` or `Path`): gets `clips/*.mp4` and `metadata.jsonl` (`file_name`, `text`: the prompt).
        num_clips (`int`): 10,000 take some 80 seconds of one core and 65 MB.
        seed (`int`, *optional*): of the scenes.

    Raises:
        `ValueError`: no clip is asked for.
    """
    if num_clips < 1:
        raise ValueError(f"`num_clips={num_clips}` must be at least 1.")
    write_scenes(folder, [training_scene(np.random.default_rng((seed, index))) for index in range(num_clips)])


def write_scenes(folder: str | Path, scenes: Sequence[Scene]) -> None:
    """Renders these scenes, in the form of [`write_dataset`].

    A clip is named by its scene. Files appear whole or not at all, and what is there is not drawn again, so that an interrupted
    call continues.
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
