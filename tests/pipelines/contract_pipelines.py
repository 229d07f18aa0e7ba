"""The four pipelines at tiny size, each with a call of stage 3 alone that takes a moment."""

import copy
from functools import cache
from typing import Any

import numpy as np
import PIL.Image
import torch
from tiny import tiny_composer, tiny_pipeline, tiny_rewriter
from tiny_animators import ANIMATORS, tiny_animator
from tiny_cogvideox import tiny_cogvideox_pipeline
from tiny_dreamer import tiny_dreamer_pipeline

from diffusers_fvg import FactorizedImageToVideoPipeline


PICTURE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
WAN = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 8, "num_inference_steps": 2}


def _image_to_video() -> FactorizedImageToVideoPipeline:
    parts = {"rewriter": tiny_rewriter(), "composer": tiny_composer()}
    return FactorizedImageToVideoPipeline(animator=tiny_animator(next(iter(ANIMATORS))), **parts)


# Name -> what makes the pipeline, and a call of it.
PIPELINES = {
    "wan": (tiny_pipeline, WAN),
    "cogvideox": (tiny_cogvideox_pipeline, WAN | {"num_frames": 9}),
    "dreamer": (tiny_dreamer_pipeline, WAN | {"num_frames": 3}),
    "image_to_video": (_image_to_video, WAN),
}


def fresh(name: str) -> Any:
    """A pipeline that a test may change; the same weights each time."""
    # Some of the tiny parts are made once for all tests.
    pipe = copy.deepcopy(PIPELINES[name][0]())
    pipe.set_progress_bar_config(disable=True)
    return pipe


shared = cache(fresh)


def call_of(name: str, **changes: Any) -> dict[str, Any]:
    """Arguments of the call: a prompt, a picture, a seed, tensors for an answer."""
    base = {"prompt": "a red circle", "image": PICTURE, "generator": 0, "output_type": "pt"}
    return base | PIPELINES[name][1] | changes


@cache
def expected(name: str) -> torch.Tensor:
    """Frames of the call as it is, `(1, F, 3, H, W)`."""
    return shared(name)(**call_of(name)).frames
