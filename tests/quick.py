"""The embedded model with fewer steps and layers, for tests that do not depend on what its pictures show."""

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from diffusers_fvg.embedded import EMBEDDED_FOLDER
from diffusers_fvg.schedules.flow import shifted_sigmas


COMPOSER_STEPS = 2
NUM_CANDIDATES = 2
VIDEO_STEPS = 3
NUM_LAYERS = 2


def quick(pipe, **size: int):
    """Changes and returns the pipeline: two steps for a picture, at most two pictures for the judge, and no progress bars.

    `size` replaces values of its `num_frames`, `height` and `width`.
    """
    pipe.set_progress_bar_config(disable=True)
    pipe.composer.call_defaults["num_inference_steps"] = COMPOSER_STEPS
    pipe.register_to_config(call_defaults=pipe.call_defaults | size)
    if pipe.anchor_judge is not None:
        pipe.register_to_config(call_defaults=pipe.call_defaults | {"composer_num_candidates": NUM_CANDIDATES})
    return pipe


def write_quick(folder: Path, video_steps: int = VIDEO_STEPS, num_frames: int = 17) -> None:
    """Writes the embedded repository to `folder`, changed as in [`quick`], with fewer steps in each preset and fewer layers.

    The transformers of stages 2 and 3, and their LoRAs, keep the first two layers.
    """

    def shorten_composer(config: dict) -> None:
        config["call_defaults"]["num_inference_steps"] = COMPOSER_STEPS

    def shorten_video(index: dict) -> None:
        index["call_defaults"] |= {"composer_num_candidates": NUM_CANDIDATES, "num_frames": num_frames}

    def shorten_preset(config: dict) -> None:
        config["_preset"]["sigmas"] = list(shifted_sigmas(video_steps, config["_preset"]["flow_shift"]))

    shutil.copytree(EMBEDDED_FOLDER, folder)
    _change(folder / "composer" / "composer_config.json", shorten_composer)
    _change(folder / "model_index.json", shorten_video)
    for path in (folder / "schedulers").glob("*/scheduler_config.json"):
        _change(path, shorten_preset)
    for path in (folder / "transformer", folder / "composer" / "transformer"):
        _change(path / "config.json", lambda config: config.update(num_layers=NUM_LAYERS))
    for path in folder.rglob("*.safetensors"):
        if path.parent.name in ("transformer", "distilled_lora", "weights"):
            tensors = load_file(path)
            kept = {
                key: value
                for key, value in tensors.items()
                if int((re.findall(r"\bblocks\.(\d+)", key) or [0])[0]) < NUM_LAYERS
            }
            save_file(kept, path, {"format": "pt"})


@contextlib.contextmanager
def embedded_at(folder: Path) -> Iterator[None]:
    """Makes the repository in `folder` the embedded model."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("diffusers_fvg.embedded", "diffusers_fvg.planning"):
            patch.setattr(f"{module}.EMBEDDED_FOLDER", folder)
        yield


def _change(path: Path, change: Callable[[dict], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
