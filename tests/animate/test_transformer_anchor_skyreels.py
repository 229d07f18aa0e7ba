"""AnchorConditionedSkyReelsV2Transformer3D against diffusers' SkyReels-V2 on the same weights, inputs and noise."""

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
)
from tiny import TRANSFORMER_CONFIG
from tiny_animators import tiny_animator

from diffusers_fvg import Anchor, FactorizedVideoPipeline
from diffusers_fvg.animate.transformer_anchor_skyreels import AnchorConditionedSkyReelsV2Transformer3D
from diffusers_fvg.models import MODELS, match_model


FRAMES = 5
TOLERANCE = {"rtol": 0, "atol": 1e-5}
PROMPT = "a red circle"
CALL = {"height": 32, "width": 32, "num_frames": 13, "num_inference_steps": 3}
# huggingface/diffusers, scripts/convert_skyreelsv2_to_diffusers.py: DF-14B.
PUBLISHED = {
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "ffn_dim": 13824,
    "freq_dim": 256,
    "in_channels": 16,
    "num_attention_heads": 40,
    "inject_sample_info": False,
    "num_layers": 40,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "text_dim": 4096,
}


def make_pair(**config):
    torch.manual_seed(0)
    stock = SkyReelsV2Transformer3DModel(**TRANSFORMER_CONFIG | config).eval()
    ours = AnchorConditionedSkyReelsV2Transformer3D(**TRANSFORMER_CONFIG | config).eval()
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def make_inputs():
    generator = torch.Generator().manual_seed(2)
    # The stock class adds the frame rate to the times of one sample alone.
    times = torch.rand(1, FRAMES, generator=generator) * 1000
    times[0, 1] = 0
    latents = torch.randn(1, 16, FRAMES, 4, 6, generator=generator)
    return {
        "hidden_states": latents,
        "encoder_hidden_states": torch.randn(1, 7, 32, generator=generator),
        "timestep": times,
    }


@torch.no_grad()
def run(model, inputs, **more):
    return model(**inputs, **more).sample


@pytest.mark.parametrize("inject_sample_info", [True, False])
def test_equals_the_stock_class(inject_sample_info):
    stock, ours = make_pair(inject_sample_info=inject_sample_info)
    inputs = make_inputs()
    expected = run(stock, inputs, enable_diffusion_forcing=True, fps=[1])
    torch.testing.assert_close(run(ours, inputs), expected, **TOLERANCE)
    wrong = inputs | {"timestep": inputs["timestep"].roll(1, dims=1)}
    assert (run(ours, wrong) - expected).abs().max() > 1e-3
    if inject_sample_info:
        assert (run(stock, inputs, enable_diffusion_forcing=True, fps=[0]) - expected).abs().max() > 1e-3
    inputs["timestep"] = torch.tensor([700.0])
    torch.testing.assert_close(run(ours, inputs), run(stock, inputs, fps=[1]), **TOLERANCE)


def test_gradients_with_checkpointing():
    stock, ours = make_pair(inject_sample_info=True)
    ours.train().enable_gradient_checkpointing()
    for model, more in ((ours, {}), (stock, {"enable_diffusion_forcing": True, "fps": [1]})):
        model(**make_inputs(), **more).sample.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-4, msg=name)
    assert stock.fps_embedding.weight.grad.abs().max() > 1e-4


def test_a_published_model_on_the_meta_device_is_no_wan_model():
    with torch.device("meta"):
        ours = AnchorConditionedSkyReelsV2Transformer3D(**PUBLISHED)
        stock = SkyReelsV2Transformer3DModel(**PUBLISHED)
    assert ours.num_parameters() == stock.num_parameters() == MODELS["Wan2.1-T2V-14B"].parameters
    assert match_model(ours.config) is None


def test_causal_blocks_are_refused():
    with pytest.raises(ValueError, match="`num_frame_per_block=5`, but anchors need frames that attend to all others"):
        AnchorConditionedSkyReelsV2Transformer3D(**TRANSFORMER_CONFIG, num_frame_per_block=5)


# -- in the pipeline --------------------------------------------------------------------------------------------------


def picture(seed: int = 0) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def stock():
    """With a solver that keeps no sample: the stock loop writes into the one that UniPC's corrector keeps."""
    pipe = tiny_animator("skyreels_v2_df")
    pipe.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=4.0,
        solver_order=1,
        disable_corrector=[0, 1, 2],
    )
    return pipe


@pytest.fixture(scope="module")
def pipe(stock):
    pipe = FactorizedVideoPipeline.from_pipe(stock)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_pipeline_of_it_equals_the_stock_pipelines(stock, pipe):
    texts = {"prompt": PROMPT, "negative_prompt": ""}
    expected = stock(picture(), generator=seeded(), output_type="np", **texts, **CALL).frames
    frames = pipe(image=picture(), generator=seeded(), **texts, **CALL).frames
    np.testing.assert_allclose(frames, expected, rtol=0, atol=1e-5)
    text_alone = SkyReelsV2DiffusionForcingPipeline(**stock.components)
    text_alone.set_progress_bar_config(disable=True)
    expected = text_alone(generator=seeded(), guidance_scale=5.0, output_type="np", **texts, **CALL).frames
    direct = pipe(mode="direct", generator=seeded(), **texts, **CALL).frames
    np.testing.assert_allclose(direct, expected, rtol=0, atol=1e-5)
    assert np.abs(direct - frames).max() > 1e-2


def test_an_anchor_at_any_frame_is_kept(pipe, tmp_path):
    """What the stock pipeline does not take."""
    call = CALL | {
        "generator": seeded(),
        "output_type": "latent",
        "anchors": [Anchor(picture()), Anchor(picture(1), 6)],
    }
    latents = pipe(PROMPT, **call).frames
    for seed, frame in ((0, 0), (1, 2)):
        encoded = pipe.encode_anchors([[Anchor(picture(seed), 0 if frame == 0 else 6)]], latents, 32, 32, 13)
        torch.testing.assert_close(latents[:, :, frame], encoded.latents[:, :, frame], rtol=0, atol=1e-6)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.transformer) is AnchorConditionedSkyReelsV2Transformer3D
    torch.testing.assert_close(loaded(PROMPT, **call | {"generator": seeded()}).frames, latents, rtol=0, atol=1e-5)
