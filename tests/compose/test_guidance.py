"""Guidance and negative prompt of a composer change its pictures in every family, or are refused."""

import re

import numpy as np
import pytest
import tiny_composers
import torch
from diffusers import DiffusionPipeline
from tiny import tiny_pipeline

from diffusers_fvg.compose.composer import AnchorComposer


CAPTION = ["a red circle at the top"]
NO_ARGUMENT = "has no argument negative_prompt"
NO_GUIDANCE = "`guidance_scale=9.0` has no effect"
NO_TRUE_CFG = r"`negative_prompt` has no effect: with `true_cfg_scale=1.0`.*`call_defaults`"
OFF = "`negative_prompt` has no effect: with `{}`.*raise `guidance_scale`"
# The negative prompt of models that take guidance as an input is nowhere computed.
NEVER = r"`negative_prompt` has no effect: with `guidance_scale={}`.* Leave it out\.$"

# Guidance of 9, a negative prompt, and one with the value that switches guidance off: pictures change (`None`), or the error.
FAMILIES = {
    "flux": (None, NO_TRUE_CFG, NO_TRUE_CFG),
    "flux_schnell": (NO_GUIDANCE, NO_TRUE_CFG, NO_TRUE_CFG),
    "flux2_klein": (NO_GUIDANCE, NO_ARGUMENT, NO_ARGUMENT),
    "flux2_klein_base": (None, NO_ARGUMENT, NO_ARGUMENT),
    "stable_diffusion_3": (None, None, OFF.format("guidance_scale=1.0")),
    "stable_diffusion_xl": (None, None, OFF.format("guidance_scale=1.0")),
    "stable_diffusion_xl_lcm": (None, NEVER.format("5.0"), NEVER.format("1.0")),
    "qwen_image": (None, None, OFF.format("true_cfg_scale=1.0")),
    "z_image": (None, None, OFF.format("guidance_scale=0.0")),
}


def composer_of(family: str) -> AnchorComposer:
    return tiny_composers.tiny_guided_composer(getattr(tiny_composers, family))


def draw(composer: AnchorComposer, **arguments) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return np.asarray(composer.compose(CAPTION, 32, 32, generator=generator, **arguments)[0], dtype=int)


def draw_stock(pipeline: DiffusionPipeline, **arguments) -> np.ndarray:
    size = {"height": 32, "width": 32, "num_inference_steps": 2}
    generator = torch.Generator().manual_seed(0)
    return np.asarray(pipeline(CAPTION, **size, generator=generator, **arguments).images[0], dtype=int)


@pytest.mark.parametrize("family", FAMILIES)
def test_guidance_and_negative_prompt_change_pictures_or_are_refused(family):
    composer = composer_of(family)
    plain, off = draw(composer), 0.0 if family == "z_image" else 1.0
    calls = [{"guidance_scale": 9.0}, {"negative_prompt": "low quality"}]
    calls.append({"negative_prompt": "low quality", "guidance_scale": off})
    for arguments, error in zip(calls, FAMILIES[family]):
        if error is None:
            composer.check_call(1, **arguments)
            assert np.abs(draw(composer, **arguments) - plain).max() >= 3, arguments
            continue
        for refuse in (lambda: composer.check_call(1, **arguments), lambda: draw(composer, **arguments)):  # noqa: B023
            with pytest.raises(ValueError, match=error):
                refuse()
    # No guidance may be asked of any family.
    draw(composer, guidance_scale=off)


# What the family's own argument is called, and what it needs beside it.
STOCK = {
    "flux": {"guidance_scale": 9.0},
    "stable_diffusion_xl": {"guidance_scale": 9.0},
    "qwen_image": {"true_cfg_scale": 9.0, "negative_prompt": " "},
    "z_image": {"guidance_scale": 9.0},
}


@pytest.mark.parametrize("family", STOCK)
def test_guidance_is_the_family_s_own(family):
    composer = composer_of(family)
    expected = draw_stock(composer.pipeline, **STOCK[family])
    assert np.array_equal(draw(composer, guidance_scale=9.0), expected)
    defaults = composer.call_defaults | {"guidance_scale": 9.0}
    assert np.array_equal(draw(AnchorComposer(composer.pipeline, defaults)), expected)
    # A call's value stands above that of the defaults.
    assert np.array_equal(
        draw(AnchorComposer(composer.pipeline, defaults | {"guidance_scale": 2.0}), guidance_scale=9.0), expected
    )


def test_true_cfg_of_the_defaults_lets_flux_take_negative_prompts():
    for family in ("flux", "flux_schnell"):
        pipeline = composer_of(family).pipeline
        composer = AnchorComposer(pipeline, {"num_inference_steps": 2, "true_cfg_scale": 4.0})
        expected = draw_stock(pipeline, true_cfg_scale=4.0, negative_prompt="low quality")
        assert np.array_equal(draw(composer, negative_prompt="low quality"), expected)
        assert np.abs(draw(composer) - expected).max() >= 3


def test_defaults_are_held_to_it_as_calls_are():
    for family, defaults, message in (
        ("flux", {"negative_prompt": "low quality"}, NO_TRUE_CFG),
        ("flux_schnell", {"guidance_scale": 9.0}, NO_GUIDANCE),
        ("flux2_klein", {"guidance_scale": 9.0}, NO_GUIDANCE),
        ("qwen_image", {"guidance_scale": 4.0, "true_cfg_scale": 4.0}, "the same setting in QwenImagePipeline"),
        ("stable_diffusion_xl", {"guidance_scale": "9"}, "`guidance_scale='9'` must be a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            AnchorComposer(composer_of(family).pipeline, defaults)
    # A call may do without the guidance that the defaults' negative prompt is for.
    pipeline = composer_of("stable_diffusion_xl").pipeline
    composer = AnchorComposer(pipeline, {"num_inference_steps": 2, "negative_prompt": "low quality"})
    assert np.array_equal(draw(composer, guidance_scale=1.0), draw_stock(pipeline, guidance_scale=1.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"composer_negative_prompt": "low quality"}, NO_TRUE_CFG),
        ({"composer_negative_prompt": "low quality", "mode": "storyboard"}, NO_TRUE_CFG),
        ({"composer_negative_prompt": ["low", "low", "low"]}, "`composer_negative_prompt` has 3 texts for 2 prompts"),
        ({"composer_negative_prompt": 3}, "must be a text or a list of texts, but is 3"),
        (
            {"composer_negative_prompt": [None, "low"]},
            re.escape("must be a text or a list of texts, but is [None, 'low']"),
        ),
        ({"composer_guidance_scale": float("nan")}, "composer_guidance_scale=nan"),
    ],
)
def test_a_call_refuses_composer_arguments_before_stage_1(arguments, message, monkeypatch):
    pipe = tiny_pipeline(composer=composer_of("flux"))
    monkeypatch.setattr(pipe.rewriter, "forward", lambda *_, **__: pytest.fail("stage 1 ran"))
    with pytest.raises(ValueError, match=message):
        pipe(["a red circle", "a dog"], height=32, width=32, num_frames=5, **arguments)
