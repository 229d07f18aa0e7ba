"""One request for a call: its fields are the arguments that users see, and what it holds is checked and decoded once."""

import inspect
from dataclasses import FrozenInstanceError, fields

import numpy as np
import PIL.Image
import pytest
import torch
from tiny import tiny_pipeline

from diffusers_fvg import (
    Anchor,
    FactorizedCogVideoXPipeline,
    FactorizedDreamerPipeline,
    FactorizedImageToVideoPipeline,
    FactorizedVideoPipeline,
)
from diffusers_fvg.animate import anchor as anchors
from diffusers_fvg.pipelines import request as module
from diffusers_fvg.pipelines.request import VideoRequest
from diffusers_fvg.pipelines.stages import FactorizedStages


PIPELINES = [FactorizedVideoPipeline, FactorizedCogVideoXPipeline, FactorizedDreamerPipeline]
PIPELINES += [FactorizedImageToVideoPipeline]
FIELDS = {field.name: field for field in fields(VideoRequest)}
SIZE = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16, "num_inference_steps": 1}
# Of stages 1 and 2, and of all.
NOT_STAGE_3 = {
    "mode",
    "first_frame_prompt",
    "motion_prompt",
    "image",
    "storyboard",
    "num_moments",
    "rewriter_max_new_tokens",
    "rewriter_motion",
    "composer_num_inference_steps",
    "composer_guidance_scale",
    "composer_negative_prompt",
    "composer_num_candidates",
    "motion_retries",
    "callback_on_stage_step",
    "return_dict",
}


def parameters(function):
    named = dict(inspect.signature(function).parameters)
    return {"prompt" if name == "prompts" else name: value for name, value in named.items() if name != "self"}


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_call_stage_3_and_request_have_the_same_arguments(pipeline):
    call, animate = parameters(pipeline.__call__), parameters(pipeline.animate)
    assert call.keys() <= FIELDS.keys()
    assert call.keys() - animate.keys() == call.keys() & NOT_STAGE_3
    assert animate.keys() <= call.keys()
    for name, parameter in {**call, **animate}.items():
        # Without a mode it is stage 3 alone.
        if name != "mode":
            assert parameter.default == FIELDS[name].default, name
    for name, parameter in animate.items():
        assert parameter.default == call[name].default, name


def test_every_field_is_an_argument_of_a_pipeline():
    assert FIELDS.keys() == set().union(*(parameters(pipeline.__call__) for pipeline in PIPELINES))


def test_a_request_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        VideoRequest().prompt = "a"


def test_a_pipeline_defines_what_the_stages_ask_of_it():
    class Half(FactorizedStages):
        def _frame_step(self):
            return 4

    with pytest.raises(TypeError, match="_anchor_resolver.*_animate.*_check_size.*_latents_shape"):
        Half()


@pytest.fixture
def pipe():
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("anchor_decode", ["raw", "match"])
def test_a_picture_is_decoded_once_and_an_anchor_is_checked_once(pipe, monkeypatch, anchor_decode):
    decoded, paired = [], []
    convert, pair = PIL.Image.Image.convert, anchors.pair_anchors
    monkeypatch.setattr(
        PIL.Image.Image, "convert", lambda self, *args, **more: decoded.append(self) or convert(self, *args, **more)
    )
    monkeypatch.setattr(module, "pair_anchors", lambda *args: paired.append(args) or pair(*args))
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8))
    shown = []
    pipe.safety_checker = shown.append
    pipe("a red circle", anchors=[Anchor(picture), Anchor(picture, -1)], anchor_decode=anchor_decode, **SIZE)
    assert decoded == [picture] and len(paired) == 1 and len(shown) == 1


def test_a_storyboard_of_one_moment_is_the_factorized_mode(pipe):
    # The tiny rewriter's answers are never valid: the prompt is the only moment.
    call = {**SIZE, "output_type": "pt"}
    frames = [
        pipe("a red circle", mode=mode, generator=torch.Generator().manual_seed(0), **call).frames
        for mode in ("factorized", "storyboard")
    ]
    assert torch.equal(*frames)
