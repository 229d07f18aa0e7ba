"""The shapes model as a stock image-to-video pipeline in stage 3: what the native pipeline scores, it scores. Synthetic."""

import pytest
import torch
from diffusers import WanImageToVideoPipeline

from diffusers_fvg import FactorizedImageToVideoPipeline, load_embedded
from diffusers_fvg.shapes.held_out import held_out_scenes
from diffusers_fvg.shapes.scorer import score_video


# Scenes of each category.
PER_CATEGORY = 3


def wrapped(native) -> FactorizedImageToVideoPipeline:
    """The embedded models in the stock class of a first frame with a time of its own; the anchor LoRA stays on."""
    stock = WanImageToVideoPipeline(
        native.tokenizer,
        native.text_encoder,
        native.vae,
        native.scheduler,
        transformer=native.transformer,
        expand_timesteps=True,
    )
    parts = {name: getattr(native, name) for name in ("rewriter", "composer", "anchor_judge", "schedulers")}
    pipe = FactorizedImageToVideoPipeline.from_pipe(stock, **parts, call_defaults=native.config.call_defaults)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.slow
def test_the_shapes_model_as_a_stock_pipeline_scores_as_the_native_one():
    native = load_embedded()
    native.set_progress_bar_config(disable=True)
    pipe = wrapped(native)
    scores: dict[str, list[float]] = {"native": [], "wrapped": []}
    for number, scene in enumerate(held_out_scenes(PER_CATEGORY)):
        call = {"preset": "anchored-15", "generator": torch.Generator().manual_seed(number), "output_type": "uint8"}
        first = native(scene.prompt, **call)
        second = pipe(scene.prompt, **call | {"generator": torch.Generator().manual_seed(number)})
        assert second.first_frame_prompts == first.first_frame_prompts and second.seeds == first.seeds
        for name, output in (("native", first), ("wrapped", second)):
            scores[name].append(score_video(output.frames[0], scene.category, scene.meta))
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    print(f"synthetic scores of {len(scores['native'])} videos: {means}")
    assert abs(means["wrapped"] - means["native"]) <= 0.01
    assert means["native"] > 0.5
