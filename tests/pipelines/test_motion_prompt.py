"""What the video model reads in place of the prompt: given, or written by stage 1."""

import numpy as np
import pytest
import torch
from tiny import tiny_composer, tiny_pipeline, tiny_rewriter
from tiny_animators import tiny_animator
from tiny_cogvideox import tiny_cogvideox_pipeline

from diffusers_fvg import Anchor, FactorizedImageToVideoPipeline
from diffusers_fvg.pipelines.replay import replay
from diffusers_fvg.rewrite.rewriter import FirstFrameRewriter


PROMPT, MOTION = "a red circle moves right", "two blue cat"
SIZE = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 1}


def tiny_animated_pipeline() -> FactorizedImageToVideoPipeline:
    animator = tiny_animator("wan22_i2v")
    return FactorizedImageToVideoPipeline(animator=animator, rewriter=tiny_rewriter(), composer=tiny_composer())


PIPELINES = {"wan": tiny_pipeline, "cogvideox": tiny_cogvideox_pipeline, "animator": tiny_animated_pipeline}


@pytest.fixture(scope="module", params=PIPELINES)
def pipe(request):
    pipe = PIPELINES[request.param]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def asked(monkeypatch):
    """Stage 1 writes `MOTION`; what it was asked."""
    found = []

    def write(self, prompts, max_new_tokens=None, on_progress=None, should_stop=None, captions=None):
        found.append((prompts, captions, max_new_tokens))
        return [MOTION] * len(prompts)

    monkeypatch.setattr(FirstFrameRewriter, "describe_motion", write)
    return found


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_video_model_reads_the_motion_that_stage_1_writes(pipe, asked):
    call = SIZE | {"composer_num_inference_steps": 1, "rewriter_max_new_tokens": 7}
    out = pipe(PROMPT, rewriter_motion=True, generator=seeded(), **call)
    assert asked == [([PROMPT], out.first_frame_prompts, 7)]
    assert out.motion_prompts == [MOTION] == [out.records[0]["motion_prompt"]]
    assert out.records[0]["prompt"] == PROMPT and "describe_motion" in out.timings
    anchor = Anchor(out.anchor_images[0])
    np.testing.assert_array_equal(pipe.animate(MOTION, anchor, generator=seeded(), **SIZE), out.frames)
    # Off by default, and given in place of the written one.
    plain = pipe(PROMPT, generator=seeded(), **call)
    assert plain.motion_prompts is None and not np.array_equal(plain.frames, out.frames)
    given = pipe(PROMPT, image=out.anchor_images[0], motion_prompt=MOTION, generator=seeded(), **SIZE)
    np.testing.assert_array_equal(given.frames, out.frames)
    # A record has the text, so that no rewriter is needed.
    np.testing.assert_array_equal(replay(pipe, out.records[0]).frames, out.frames)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"rewriter_motion": True, "motion_prompt": MOTION}, "`motion_prompt` and `rewriter_motion`"),
        ({"rewriter_motion": True, "mode": "direct"}, "`rewriter_motion=True` has no effect: `mode='direct'`"),
        ({"rewriter_motion": True, "first_frame_prompt": "a cat"}, "`rewriter_motion=True` has no effect"),
        ({"rewriter_motion": 1}, "`rewriter_motion=1` must be True or False"),
        ({"motion_prompt": [MOTION] * 2}, "`motion_prompt` has 2 texts for 1 prompts"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused(pipe, asked, call, message):
    with pytest.raises(ValueError, match=message):
        pipe(PROMPT, **SIZE | call)
    assert asked == []
