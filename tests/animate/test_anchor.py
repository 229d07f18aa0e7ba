import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from tiny import tiny_vae

from diffusers_fvg.animate.anchor import Anchor, anchor_pixels, covered_latents, resolve_anchors
from diffusers_fvg.animate.conditioning import (
    AnchorLatents,
    anchored_model_input,
    denormalize_latents,
    encode_anchor,
    latent_index,
    normalize_latents,
)
from diffusers_fvg.embedded import EMBEDDED_FOLDER
from diffusers_fvg.shapes.world import Change, ShapeObject, render


@pytest.fixture
def vae():
    return tiny_vae()


PICTURE = PIL.Image.new("RGB", (32, 32))


@pytest.mark.parametrize(("frame", "latent"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3), (80, 20), (120, 30)])
def test_latent_index_is_one_frame_then_four(frame, latent):
    assert latent_index(frame) == latent


def test_latent_index_covers_every_frame_of_a_clip():
    counts = np.bincount([latent_index(frame) for frame in range(17)])
    assert counts.tolist() == [1, 4, 4, 4, 4]


def test_resolve_anchors_counts_from_the_end_and_sorts():
    last, first = Anchor(PICTURE, -1), Anchor(PICTURE, 0)
    assert resolve_anchors([last, first], 17) == [(range(0, 1), first), (range(4, 5), last)]


def run(count, frame_index=0, strength=1.0):
    return Anchor([PICTURE] * count, frame_index, strength)


@pytest.mark.parametrize(
    ("frame", "count"), [(0, 1), (0, 5), (0, 17), (1, 4), (5, 12), (9, 4), (13, 4), (6, 1), (-8, 8), (-4, 4), (-17, 9)]
)
def test_a_run_covers_the_latents_of_its_frames_and_no_others(frame, count):
    latent_of = np.repeat(np.arange(5), [1, 4, 4, 4, 4])
    latents = covered_latents(run(count, frame), 17)
    own = np.arange(17)[frame:][:count]
    assert set(latents) == set(latent_of[own])
    if count > 1:
        assert np.isin(latent_of, latents).sum() == count


@pytest.mark.parametrize(
    ("anchor", "message"),
    [
        (run(3), r"run of 3 frames at `frame_index=0`.*4k \+ 1.*nearest: 1 and 5\.$"),
        (run(16), r"16 frames.*nearest: 13 and 17\.$"),
        (run(21), r"21 frames.*in a video of 17.*end within the video; nearest: 17\.$"),
        (run(0), r"run of 0 frames.*nearest: 1\.$"),
        (run(6, 5), r"6 frames at `frame_index=5`.*4k frames.*nearest: 4 and 8\.$"),
        (run(2, 9), r"2 frames.*nearest: 4\.$"),
        (run(8, 13), r"8 frames at `frame_index=13`.*nearest: 4\.$"),
        (run(4, 3), r"4 frames at `frame_index=3`.*begins within.*nearest `frame_index`: 1 and 5\.$"),
        (run(4, -2), r"`frame_index=-2`.*nearest `frame_index`: -4\.$"),
    ],
)
def test_a_run_that_covers_a_part_of_a_latent_is_refused(anchor, message):
    with pytest.raises(ValueError, match=message):
        resolve_anchors([anchor], 17)


def test_runs_and_pictures_share_no_latent():
    first, last = run(5), Anchor(PICTURE, -1)
    assert resolve_anchors([last, first], 17) == [(range(0, 2), first), (range(4, 5), last)]
    with pytest.raises(ValueError, match="frames 0 and 2 fall on the same latent frame 1"):
        resolve_anchors([Anchor(PICTURE, 2), first], 17)


@pytest.mark.parametrize(
    ("anchors", "message"),
    [
        ([Anchor(PICTURE, 17)], "frame_index=17.*-17 to 16"),
        ([Anchor(PICTURE, -18)], "frame_index=-18"),
        ([Anchor(PICTURE, 0, 0.0)], r"strength=0.0.*\(0, 1\]"),
        ([Anchor(PICTURE, 0, 1.5)], "strength=1.5"),
        ([Anchor(PICTURE, 13), Anchor(PICTURE, -1)], "frames 13 and 16.*latent frame 4"),
    ],
)
def test_resolve_anchors_refuses(anchors, message):
    with pytest.raises(ValueError, match=message):
        resolve_anchors(anchors, 17)


def test_normalize_latents_is_inverted(vae):
    vae.register_to_config(latents_mean=[0.5] * 16, latents_std=[2.0] * 16)
    latents = torch.randn(2, 16, 3, 4, 4)
    torch.testing.assert_close(normalize_latents(latents, vae), (latents - 0.5) / 2)
    torch.testing.assert_close(denormalize_latents(normalize_latents(latents, vae), vae), latents)


def test_encode_anchor_is_in_the_phase_of_its_position(vae):
    picture = torch.rand(1, 3, 32, 32) * 2 - 1
    still = picture[:, :, None].expand(-1, -1, 21, -1, -1)
    with torch.no_grad():
        truth = normalize_latents(vae.encode(still).latent_dist.mode(), vae)
        for index in range(6):
            latents = encode_anchor(vae, picture, index)
            torch.testing.assert_close(latents, truth[:, :, index : index + 1], atol=1e-5, rtol=0)
    # A single-image latent is another thing at a later place.
    assert (encode_anchor(vae, picture, 0) - truth[:, :, 5:]).abs().max() > 0.1


def test_encode_anchor_of_a_run_is_in_the_phase_of_its_frames(vae):
    frames = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    held = torch.cat([frames[:, :, :1].expand(-1, -1, 9, -1, -1), frames[:, :, :8]], dim=2)
    with torch.no_grad():
        whole = normalize_latents(vae.encode(frames).latent_dist.mode(), vae)
        torch.testing.assert_close(encode_anchor(vae, frames, 0), whole, atol=1e-5, rtol=0)
        # Frames 9 to 16 are latents 3 and 4, and before them the first picture stands still.
        truth = normalize_latents(vae.encode(held).latent_dist.mode(), vae)[:, :, 3:]
        torch.testing.assert_close(encode_anchor(vae, frames[:, :, :8], 3), truth, atol=1e-5, rtol=0)
    assert (truth - whole[:, :, 1:]).abs().max() > 0.1


@torch.no_grad()
def test_a_run_later_in_a_clip_is_nearer_to_the_clip_than_its_last_picture():
    vae = AutoencoderKLWan.from_pretrained(EMBEDDED_FOLDER / "vae")
    clip = render((ShapeObject("red", "circle", 0.25, 0.5, 0.15, (Change("move", (0.5, 0.0)),)),))
    pixels = anchor_pixels(Anchor(clip), 64, 64)[None]
    truth = normalize_latents(vae.encode(pixels).latent_dist.mode(), vae)[:, :, 3:]
    as_run = encode_anchor(vae, pixels[:, :, 9:], 3)
    as_still = torch.cat(
        [encode_anchor(vae, pixels[:, :, frame], index) for index, frame in ((3, 12), (4, 16))], dim=2
    )
    errors = [(latents - truth).square().mean().sqrt() for latents in (as_run, as_still)]
    assert errors[0] < 0.6 * errors[1], errors


def test_pixels_of_a_run_in_any_form():
    video = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)
    expected = torch.from_numpy(video).permute(3, 0, 1, 2) / 255 * 2 - 1
    as_tensor = torch.from_numpy(video).permute(0, 3, 1, 2) / 255
    for image in (video, video / 255, as_tensor, list(video), tuple(PIL.Image.fromarray(frame) for frame in video)):
        torch.testing.assert_close(anchor_pixels(Anchor(image), 32, 48), expected, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"\(F, H, W, 3\), but has \(1, 5, 32, 48, 3\)"):
        anchor_pixels(Anchor(video[None]), 32, 48)


def test_encode_anchor_far_into_a_clip_is_the_steady_state():
    vae = AutoencoderKLWan.from_pretrained(EMBEDDED_FOLDER / "vae")
    pixels = torch.full((1, 3, 64, 64), 0.0)
    pixels[:, :, 20:44, 16:40] = torch.tensor([0.8, -0.8, -0.8]).view(1, 3, 1, 1)
    with torch.no_grad():
        truth = normalize_latents(vae.encode(pixels[:, :, None].expand(-1, -1, 41, -1, -1)).latent_dist.mode(), vae)
        steady, pasted = encode_anchor(vae, pixels, 10), encode_anchor(vae, pixels, 0)
    error = (steady - truth[:, :, 10:]).square().mean().sqrt()
    assert error < 0.03
    assert (pasted - truth[:, :, 10:]).square().mean().sqrt() > 10 * error


def test_model_input_without_anchors_is_untouched():
    latents, timestep = torch.randn(2, 4, 3, 2, 2), torch.tensor([900.0, 100.0])
    inputs = anchored_model_input(latents, 0.9, timestep, None)
    assert inputs["hidden_states"] is latents and inputs["timestep"] is timestep and len(inputs) == 2


def test_model_input_holds_clean_frames_at_time_zero():
    clean, noise = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2)
    strength = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.75]])
    anchors = AnchorLatents(clean, strength, noise)
    latents, sigma = torch.randn_like(clean), torch.tensor([0.8, 0.4])
    hidden_states, timestep = anchored_model_input(latents, sigma, sigma * 1000, anchors).values()
    torch.testing.assert_close(timestep, torch.tensor([[0.0, 800.0, 800.0], [400.0, 400.0, 100.0]]))
    assert torch.equal(hidden_states[0, :, 0], clean[0, :, 0])
    torch.testing.assert_close(hidden_states[1, :, 2], 0.9 * clean[1, :, 2] + 0.1 * noise[1, :, 2])
    free = strength[:, None, :, None, None].expand_as(latents) == 0
    assert torch.equal(hidden_states[free], latents[free])


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_multistep_history_of_an_anchored_frame_is_the_anchor(strength):
    torch.manual_seed(0)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(5)
    clean = torch.randn(1, 4, 3, 2, 2)
    anchors = AnchorLatents(clean, torch.tensor([[strength, 0.0, 0.0]]), torch.randn_like(clean))
    latents = anchors.impose(torch.randn_like(clean), float(scheduler.sigmas[0]))
    for index, t in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[index])
        noise_pred = anchors.hold(torch.randn_like(latents), latents, sigma)
        latents = scheduler.step(noise_pred, t, latents, return_dict=False)[0]
        latents = anchors.impose(latents, float(scheduler.sigmas[index + 1]))
        for output in scheduler.model_outputs:
            if output is not None:
                torch.testing.assert_close(output[:, :, 0], clean[:, :, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(latents[:, :, 0], clean[:, :, 0], atol=1e-6, rtol=0)
    assert (latents[:, :, 1:] - clean[:, :, 1:]).abs().max() > 0.1
