import json

import numpy as np
import pytest
import torch
from quick import embedded_at

from diffusers_fvg import load_embedded, load_embedded_dreamer
from diffusers_fvg.compose.judge import Judgement
from diffusers_fvg.pipelines.staged import Writing, animate, draw, write
from diffusers_fvg.recipes.outline import outline
from diffusers_fvg.recipes.sources import find_source


PROMPT = "A red circle gradually turns into a square"


@pytest.fixture(scope="module")
def pipe(quick_folder):
    with embedded_at(quick_folder):
        yield load_embedded()


class Greenness:
    """Prefers the greener picture."""

    threshold = None

    def judge(self, images, captions, plans=None):
        return [Judgement(float(np.asarray(image)[..., 1].mean())) for image in images]


SHORT = {"num_inference_steps": 1, "composer_num_inference_steps": 2, "composer_num_candidates": 1}
CALLS = {
    "factorized": {**SHORT, "composer_negative_prompt": "blue"},
    "direct": {"num_inference_steps": 1, "mode": "direct"},
    "captioned": {**SHORT, "first_frame_prompt": "a red circle at the left"},
    "storyboard": {**SHORT, "mode": "storyboard", "num_moments": 2},
    "motion written": {**SHORT, "rewriter_motion": True},
}


def staged(rewriting, composing, animating, call, seed):
    """The stages, with what goes from one to the next as files would hold it."""
    writing = drawing = None
    if call.get("mode") != "direct":
        if "first_frame_prompt" not in call:
            writing = Writing.from_json(json.loads(json.dumps(write(rewriting, call).to_json())))
        drawing = draw(composing, call, seed, writing)
    return animate(animating, call, seed, writing, drawing)


@pytest.mark.parametrize("kind", CALLS)
def test_stages_one_by_one_are_the_call(pipe, kind):
    call = {"prompt": PROMPT, **CALLS[kind]}
    output = staged(pipe, pipe, pipe, call, 5)
    expected = pipe(**call, generator=torch.Generator().manual_seed(5))
    assert np.array_equal(output.frames, expected.frames) and output.seeds == expected.seeds
    # In the same order, too: files are the same bytes.
    assert json.dumps(output.records) == json.dumps(expected.records)


def test_each_stage_needs_the_models_of_its_own_alone(pipe, quick_folder):
    # The judge chooses, which is stage 2.
    call = {"prompt": PROMPT, **SHORT, "composer_num_candidates": 2}
    alone = [outline(find_source(quick_folder, None, {}), torch.float32) for _ in range(2)]
    alone[0].rewriter, alone[1].composer, alone[1].anchor_judge = pipe.rewriter, pipe.composer, pipe.anchor_judge
    last = type(pipe).from_pretrained(
        quick_folder, rewriter=None, composer=None, anchor_judge=None, dtype=torch.float32
    )
    last.register_to_config(_name_or_path="embedded")
    last.origin = pipe.origin
    output = staged(*alone, last, call, 5)
    expected = pipe(**call, generator=torch.Generator().manual_seed(5))
    assert np.array_equal(output.frames, expected.frames)
    assert json.dumps(output.records, sort_keys=True) == json.dumps(expected.records, sort_keys=True)


def test_a_judge_chooses_as_in_the_call(pipe, monkeypatch):
    call = {"prompt": PROMPT, **SHORT, "composer_num_candidates": 3}
    writing = write(pipe, call)
    with monkeypatch.context() as patch:
        patch.setattr(pipe, "anchor_judge", Greenness())
        drawing = draw(pipe, call, 6, writing)
        expected = pipe(**call, generator=torch.Generator().manual_seed(6))
    output = animate(pipe, call, 6, writing, drawing)
    assert np.array_equal(output.frames, expected.frames) and output.seeds == expected.seeds
    scores = [candidate.score for candidate in expected.candidates[0]]
    assert [candidate.score for candidate in drawing.candidates] == scores and drawing.seed == expected.seeds[0][
        "anchor"
    ]


def test_the_dreamer_is_told_the_motion_as_in_its_call():
    dreamer = load_embedded_dreamer()
    call = {"prompt": "A red circle moves to the right", **SHORT}
    output = staged(dreamer, dreamer, dreamer, call, 7)
    expected = dreamer(**call, generator=torch.Generator().manual_seed(7))
    assert output.motion_prompts == expected.motion_prompts and np.array_equal(output.frames, expected.frames)
    assert json.dumps(output.records, sort_keys=True) == json.dumps(expected.records, sort_keys=True)
