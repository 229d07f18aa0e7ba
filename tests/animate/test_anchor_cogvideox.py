import pytest
import torch
from diffusers import CogVideoXDDIMScheduler
from tiny_cogvideox import tiny_cogvideox_transformer, tiny_cogvideox_vae

from diffusers_fvg.animate.anchor import Anchor
from diffusers_fvg.animate.anchor_cogvideox import (
    anchored_model_input,
    channels_first,
    encode_anchor,
    impose,
    pad_to_patches,
    patch_frames,
    resolve_patch_anchors,
)
from diffusers_fvg.animate.conditioning import AnchorLatents
from diffusers_fvg.schedules.cogvideox import COGVIDEOX_1_5_SCHEDULE, training_sigmas


SIGMAS = training_sigmas(CogVideoXDDIMScheduler(**COGVIDEOX_1_5_SCHEDULE))


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slots(anchors, num_frames=17, patch_size_t=2):
    return [
        (list(latents), anchor.image) for latents, anchor in resolve_patch_anchors(anchors, num_frames, patch_size_t)
    ]


def test_padding_and_patches():
    latents = gaussian(2, 4, 5, 3, 3)
    padded = pad_to_patches(latents, 2)
    assert torch.equal(padded[:, :, 0], latents[:, :, 0]) and torch.equal(padded[:, :, 1:], latents)
    assert torch.equal(pad_to_patches(latents, 1), latents)
    assert torch.equal(pad_to_patches(latents[:, :, :4], 2), latents[:, :, :4])
    # 5 latents: (padding, 0) (1, 2) (3, 4); 4 latents: (0, 1) (2, 3).
    assert [list(patch_frames(index, 5, 2)) for index in range(5)] == [[0, 1], [2, 3], [2, 3], [4, 5], [4, 5]]
    assert [list(patch_frames(index, 4, 2)) for index in range(4)] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert list(patch_frames(3, 4, 1)) == [3]


def test_anchors_fill_whole_patches():
    # 17 frames are 5 latents: frame 0 | 1-4 5-8 | 9-12 13-16.
    assert slots([Anchor("a")]) == [([0], "a")]
    assert slots([Anchor("c", -1), Anchor("b", 9), Anchor("a")]) == [([0], "a"), ([3], "b"), ([4], "c")]
    assert slots([Anchor("a", 6)], patch_size_t=1) == [([2], "a")]
    # An even number of latents has no padding: the first frame shares its patch with frames 1 to 4.
    assert slots([Anchor("a"), Anchor("b", 4)], num_frames=13) == [([0], "a"), ([1], "b")]
    # Runs: 8k + 1 frames from the first on, 8k later, or less with another anchor in the rest of the patch.
    nine, eight, four = ["a"] * 9, ["b"] * 8, ["c"] * 4
    assert slots([Anchor(eight, -8), Anchor(nine)]) == [([0, 1, 2], nine), ([3, 4], eight)]
    assert slots([Anchor(four, 9), Anchor("d", 13)]) == [([3], four), ([4], "d")]
    assert slots([Anchor(["a"] * 5)], patch_size_t=1) == [([0, 1], ["a"] * 5)]


@pytest.mark.parametrize(
    ("anchors", "num_frames", "message"),
    [
        ([Anchor("a", -1)], 17, "at frame -1 shares a patch of the model with frames 9 to 12,.*anchor at frame 12"),
        ([Anchor("a", 2)], 17, "at frame 2 shares .* frames 5 to 8,.*anchor at frame 8"),
        ([Anchor("a")], 13, "at frame 0 shares .* frames 1 to 4,.*anchor at frame 4"),
        ([Anchor("a", 4)], 13, "at frame 4 shares .* frames 0 to 0,.*anchor at frame 0"),
        ([Anchor("a", 12), Anchor("b", 16, 0.5)], 17, "frames 12 and 16 share .* strengths 1.0 and 0.5"),
        ([Anchor("a", 17)], 17, "outside the video of 17 frames"),
        ([Anchor(["a"] * 5)], 17, r"at frame 0 shares .* frames 5 to 8.*8k \+ 1 frames starting at frame 0, or 8k"),
        ([Anchor(["a"] * 8, 5)], 17, "at frame 5 shares .* frames 1 to 4"),
        ([Anchor(["a"] * 7)], 17, "nearest: 5 and 9"),
    ],
)
def test_anchors_that_split_a_patch(anchors, num_frames, message):
    with pytest.raises(ValueError, match=message):
        slots(anchors, num_frames)


@torch.no_grad()
def test_encoding_is_in_the_phase_and_scale_of_the_video():
    vae = tiny_cogvideox_vae()
    pictures = gaussian(2, 3, 16, 16).clamp(-1, 1)
    still = 0.7 * vae.encode(pictures[:, :, None].expand(-1, -1, 13, -1, -1)).latent_dist.mean
    latent = encode_anchor(vae, pictures)
    assert still.shape[2] == 4 and still.abs().max() > 0.1
    torch.testing.assert_close(latent.expand_as(still), still, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("index", [1, 2, 3, 4, 5])
def test_encoding_of_a_run_is_in_phase(index):
    vae = tiny_cogvideox_vae()
    frames = gaussian(1, 3, 9, 16, 16).clamp(-1, 1)
    whole = 0.7 * vae.encode(frames).latent_dist.mean
    torch.testing.assert_close(encode_anchor(vae, frames), whole, rtol=0, atol=1e-5)
    # At its place in a video whose frames before it are its first picture, held still. The VAE normalises over chunks of
    # 8 frames: what is compared ends with one.
    count = 4 if index % 2 == 0 else 8
    held = frames[:, :, :1].expand(-1, -1, 4 * index - 3, -1, -1)
    video = 0.7 * vae.encode(torch.cat([held, frames[:, :, :count]], dim=2)).latent_dist.mean
    latents = encode_anchor(vae, frames[:, :, :count], index)
    torch.testing.assert_close(latents, video[:, :, index:], rtol=0, atol=1e-5)
    assert count == 4 or (latents - latents[:, :, :1]).abs().max() > 0.02


def make_anchors():
    """Sample 0 has a fixed first patch, sample 1 its last patch at strength 0.6."""
    strength = torch.tensor([[1.0, 1.0, 0, 0, 0, 0], [0, 0, 0, 0, 0.6, 0.6]])
    return AnchorLatents(gaussian(2, 4, 6, 2, 2, seed=1), strength, gaussian(2, 4, 6, 2, 2, seed=2))


def test_model_input():
    anchors, latents, times = make_anchors(), gaussian(2, 4, 6, 2, 2), torch.tensor([700, 999])
    sigma = SIGMAS[times]
    hidden_states, timestep = anchored_model_input(latents, sigma, times, anchors, SIGMAS)
    assert torch.equal(hidden_states[0, :, :2], anchors.latents[0, :, :2])
    assert torch.equal(hidden_states[0, :, 2:], latents[0, :, 2:])
    assert torch.equal(hidden_states[1, :, :4], latents[1, :, :4])
    assert timestep[0].tolist() == [0, 0, 700, 700, 700, 700] and timestep[1, :4].tolist() == [999] * 4

    # Strength 0.6 of pure noise is noise level 0.4, and the time where the table passes 0.4.
    expected = 0.84**0.5 * anchors.latents[1, :, 4:] + 0.4 * anchors.noise[1, :, 4:]
    torch.testing.assert_close(hidden_states[1, :, 4:], expected, rtol=0, atol=1e-5)
    index = int((SIGMAS < 0.4).sum())
    assert index - 1 < timestep[1, 4] == timestep[1, 5] < index

    assert torch.equal(impose(anchors, latents, sigma), hidden_states)
    clean = impose(anchors, latents, torch.tensor(0.0))
    assert torch.equal(clean[1, :, 4:], anchors.latents[1, :, 4:])
    assert anchored_model_input(latents, sigma, times, None, SIGMAS) == (latents, times)


@torch.no_grad()
def test_channels_first_is_the_transformer_with_rotary_embedding():
    model = tiny_cogvideox_transformer(anchored=True)
    hidden_states, text, timestep = gaussian(1, 4, 6, 4, 4), gaussian(1, 5, 32, seed=1), torch.full((1, 6), 500)
    call = channels_first(model, model.rotary_embedding)
    (actual,) = call(hidden_states=hidden_states, timestep=timestep, encoder_hidden_states=text, return_dict=False)
    expected = model(
        hidden_states.transpose(1, 2), text, timestep, image_rotary_emb=model.rotary_embedding(6, 4, 4)
    ).sample
    torch.testing.assert_close(actual, expected.transpose(1, 2), rtol=0, atol=0)
