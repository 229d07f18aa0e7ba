"""The embedded models with less work: for tests to which it does not matter what their pictures show."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from diffusers_fvg.embedded import EMBEDDED_FOLDER
from diffusers_fvg.schedules.flow import shifted_sigmas


COMPOSER_STEPS = 2
NUM_CANDIDATES = 2
VIDEO_STEPS = 3


def quick(pipe):
    """The pipeline itself: a first frame takes two steps, and two of them at most are drawn for the judge. It is quiet, too."""
    pipe.set_progress_bar_config(disable=True)
    pipe.composer.call_defaults["num_inference_steps"] = COMPOSER_STEPS
    if pipe.anchor_judge is not None:
        pipe.register_to_config(call_defaults=pipe.call_defaults | {"composer_num_candidates": NUM_CANDIDATES})
    return pipe


def write_quick(folder: Path) -> None:
    """Writes the embedded repository to `folder`; it does as [`quick`] says, and each preset has three steps."""
    shutil.copytree(EMBEDDED_FOLDER, folder)
    _change(folder / "composer" / "composer_config.json", _shorten_composer)
    _change(folder / "model_index.json", _limit_candidates)
    for path in (folder / "schedulers").glob("*/scheduler_config.json"):
        _change(path, _shorten_preset)


@contextlib.contextmanager
def embedded_at(folder: Path) -> Iterator[None]:
    """Who asks for the embedded model gets the repository in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("diffusers_fvg.embedded", "diffusers_fvg.planning"):
            patch.setattr(f"{module}.EMBEDDED_FOLDER", folder)
        yield


def _shorten_composer(config: dict) -> None:
    config["call_defaults"]["num_inference_steps"] = COMPOSER_STEPS


def _limit_candidates(index: dict) -> None:
    index["call_defaults"]["composer_num_candidates"] = NUM_CANDIDATES


def _shorten_preset(config: dict) -> None:
    config["_preset"]["sigmas"] = list(shifted_sigmas(VIDEO_STEPS, config["_preset"]["flow_shift"]))


def _change(path: Path, change: Callable[[dict], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
