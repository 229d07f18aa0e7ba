"""Anchors behind the clip, at their exact frame: what the video model is given, and who takes them."""

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny import tiny_pipeline, tiny_transformer
from tiny_cogvideox import tiny_cogvideox_pipeline

from diffusers_fvg import Anchor, AnchorLora, FactorizedVideoPipeline
from diffusers_fvg.animate.anchor import crop_and_resize
from diffusers_fvg.animate.conditioning import encode_anchor
from diffusers_fvg.lora.anchor_lora import WEIGHT_NAME


SIZE = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16, "output_type": "latent"}
KEY = "transformer.blocks.0.attn1.to_q.lora_{}.weight"
WEIGHTS = {KEY.format("A"): torch.ones(2, 24), KEY.format("B"): torch.ones(24, 2)}


def picture(seed):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def make_pipe(form):
    pipe = tiny_pipeline(
        anchor_lora=AnchorLora(WEIGHTS, {"anchor_form": form}), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return make_pipe("appended")


def animate(pipe, anchors, **options):
    """Latents, and what the video model was called with in each forward."""
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(anchors))]
    options = SIZE | {"num_inference_steps": 2, "guidance_scale": 3.0, "generator": generators} | options
    with hook:
        return pipe.animate(["a red circle", "a blue square"][: len(anchors)], anchors, **options), calls


def alone(pipe, seed):
    return encode_anchor(pipe.vae, crop_and_resize(picture(seed), 32, 32)[None], 0)[0]


ANCHORS = [
    # Frames 6 and 8 fall into one latent frame; frame 0 and the run of frames 1 to 4 are exact in the clip.
    [Anchor(picture(1), 8), Anchor(picture(0)), Anchor(picture(2), 6)],
    [Anchor([picture(seed) for seed in range(4)], 1), Anchor(picture(3), -2, 0.6)],
]


def test_what_the_model_is_given(pipe):
    latents, calls = animate(pipe, ANCHORS)
    noises = []
    assert latents.shape == (2, 16, 3, 4, 4) and latents.isfinite().all() and len(calls) == 4
    for call, next_call in zip(calls[::2], calls[1::2]):
        # The unconditional branch is given the same.
        for name in ("hidden_states", "timestep", "anchor_positions"):
            assert torch.equal(call[name], next_call[name])
        assert call["anchor_positions"].tolist() == [[1.875, 2.375], [2.125, -1.0]]
        hidden_states, times = call["hidden_states"], call["timestep"]
        clip = times.max()
        torch.testing.assert_close(
            times / clip, torch.tensor([[0, 1, 1, 0, 0], [1, 0, 1, 0.4, 1.0]]), rtol=0, atol=1e-6
        )
        # Each picture as the VAE encodes it alone.
        for place, seed in ((0, 0), (3, 2), (4, 1)):
            assert torch.equal(hidden_states[0, :, place : place + 1], alone(pipe, seed))
        # A soft anchor has two fifths of the clip's noise, the same in every step.
        share = 0.4 * clip / 1000
        noise = (hidden_states[1, :, 3] - (1 - share) * alone(pipe, 3)[:, 0]) / share
        assert abs(noise.std() - 1) < 0.2 and abs(noise.mean()) < 0.2
        noises.append(noise)
    torch.testing.assert_close(*noises, rtol=1e-3, atol=1e-4)


def test_a_video_of_a_batch_is_that_made_alone(pipe):
    both, _ = animate(pipe, ANCHORS[:1] + [[Anchor(picture(3), 5)]])
    first, _ = animate(pipe, ANCHORS[:1])
    torch.testing.assert_close(both[:1], first, rtol=0, atol=1e-4)
    # The frame matters, and to a slot it would not.
    others = [[Anchor(picture(3), frame)] for frame in (5, 6)]
    moved, slots = ([animate(each, [anchors])[0] for anchors in others] for each in (pipe, make_pipe("slot")))
    assert (moved[0] - moved[1]).abs().max() > 1e-3 and torch.equal(*slots)


def test_in_the_clip_it_is_the_slot_form_to_the_bit(pipe):
    for anchors in ([[Anchor(picture(0))]], [ANCHORS[1][:1]]):
        (found, calls), (expected, _) = animate(pipe, anchors), animate(make_pipe("slot"), anchors)
        assert torch.equal(found, expected) and "anchor_positions" not in calls[0]


def test_what_is_refused(pipe):
    with pytest.raises(ValueError, match="Anchors at frames 5 and 5 both set frame 5; keep one"):
        animate(pipe, [[Anchor(picture(1), 5), Anchor(picture(2), -4)]])
    with pytest.raises(ValueError, match="Anchors at frames 1 and 3 both set frame 3"):
        animate(pipe, [[ANCHORS[1][0], Anchor(picture(2), 3)]])
    with pytest.raises(ValueError, match="frames 6 and 8 fall on the same latent frame 2"):
        animate(make_pipe("slot"), ANCHORS[:1])
    with pytest.raises(
        ValueError, match="anchor_form='sideways'`, but a FactorizedVideoPipeline supports only 'slot' or 'appended'"
    ):
        make_pipe("sideways")
    with pytest.raises(
        ValueError, match="anchor_form='appended'`, but a FactorizedCogVideoXPipeline supports only 'slot'"
    ):
        tiny_cogvideox_pipeline(anchor_lora=AnchorLora(WEIGHTS, {"anchor_form": "appended"}))


def test_the_form_is_saved_with_the_lora(pipe, tmp_path):
    pipe.anchor_lora.save_pretrained(tmp_path)
    assert AnchorLora.from_pretrained(tmp_path).form == pipe.anchor_form == "appended"
    assert AnchorLora(WEIGHTS).form == tiny_pipeline().anchor_form == "slot"


def latents(pipe):
    return animate(pipe, [[Anchor(picture(1)), Anchor(picture(2), -4)]])[0]


def test_a_lora_of_another_form_is_not_loaded_beside(pipe, tmp_path):
    pipe.anchor_lora.save_pretrained(tmp_path)
    file, metadata = tmp_path / WEIGHT_NAME, {"anchor_form": "appended"}
    plain = tiny_pipeline()
    for given, options in ((file, {}), (WEIGHTS, {"metadata": metadata}), ((file, None), {})):
        with pytest.raises(ValueError, match="with `anchor_form='appended'`, but this pipeline uses .*'slot'"):
            plain.load_lora_weights(given, **options)
    assert not getattr(plain.transformer, "peft_config", None)
    make_pipe("appended").load_lora_weights(file, adapter_name="more")
    plain.load_lora_weights(WEIGHTS, metadata={"anchor_form": "slot"})


def test_an_anchor_lora_that_is_assigned_is_loaded(pipe):
    changed, expected = make_pipe("slot"), latents(pipe)
    slot = latents(changed)
    changed.anchor_lora = pipe.anchor_lora
    assert changed.anchor_form == "appended" and torch.equal(latents(changed), expected)
    changed.anchor_lora = None
    assert changed.anchor_form == "slot" and not getattr(changed.transformer, "peft_config", None)
    bare = tiny_pipeline(scheduler=changed.scheduler)
    assert torch.equal(latents(changed), latents(bare)) and not torch.equal(slot, latents(bare))
    bare.register_modules(anchor_lora=AnchorLora(WEIGHTS))
    assert torch.equal(latents(bare), slot)
    # One that does not fit leaves the one that was there.
    with pytest.raises(ValueError, match="no weights for `transformer`"):
        bare.anchor_lora = AnchorLora({"unet.lora_A.weight": torch.zeros(1)})
    assert torch.equal(latents(bare), slot)
    bare.fuse_lora()
    with pytest.raises(ValueError, match="The anchor LoRA is fused: call `unfuse_lora"):
        bare.anchor_lora = AnchorLora(dict(WEIGHTS))
    with pytest.raises(ValueError, match="which both pipelines would share"):
        FactorizedVideoPipeline.from_pipe(pipe, anchor_lora=AnchorLora(WEIGHTS))
    assert FactorizedVideoPipeline.from_pipe(pipe).anchor_form == "appended"


def test_a_video_model_that_is_assigned_gets_the_anchor_lora(pipe):
    changed, expected = make_pipe("appended"), latents(pipe)
    own = changed.transformer
    changed.transformer = tiny_transformer()
    assert changed.transformer is not own and torch.equal(latents(changed), expected)
    # What was taken out on purpose stays out where the same model comes back.
    changed.unload_lora_weights()
    changed.transformer = torch.compile(changed.transformer, backend="eager")
    assert not getattr(changed.transformer, "peft_config", None)
