"""Decoding in pieces against diffusers' whole decode, on the same VAE and latents."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.video_processor import VideoProcessor
from tiny import tiny_vae
from tiny_cogvideox import tiny_cogvideox_vae

from diffusers_fvg.animate.conditioning import denormalize_latents
from diffusers_fvg.animate.decoding import decode_chunks, decode_frames, decode_video, to_uint8
from diffusers_fvg.media import frames_to_uint8, read_video, write_video


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))
from harness import LiveBytes  # noqa: E402


def residual_vae() -> AutoencoderKLWan:
    """The shape of Wan 2.2's: residual blocks, and patches of 2 x 2 pixels below the decoder."""
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=6,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1] * 6,
        latents_std=[1.5] * 6,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=16,
    ).eval()


VAES = {"Wan 2.1": tiny_vae, "Wan 2.2": residual_vae}


def draw_latents(vae, *shape: int, seed: int = 0) -> torch.Tensor:
    channels = vae.config.get("z_dim") or vae.config.latent_channels
    return torch.randn(shape[0], channels, *shape[1:], generator=torch.Generator().manual_seed(seed))


def with_tiles(vae):
    """Tiles of 4 x 4 latents that overlap by 1, at each of these VAEs' strides."""
    ratio = vae.spatial_compression_ratio
    vae.enable_tiling(4 * ratio, 4 * ratio, 3 * ratio, 3 * ratio)
    return vae


@torch.no_grad()
def stock(vae, latents: torch.Tensor) -> torch.Tensor:
    return vae.decode(latents, return_dict=False)[0]


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("num_latents", [1, 3])
def test_every_output_type_is_that_of_the_whole_decode(name, tiled, num_latents):
    vae = VAES[name]()
    # So that the clamp to [-1, 1] has something to do.
    vae.decoder.conv_out.weight.data *= 20
    if tiled:
        with_tiles(vae)
    # 6 and 7 latents: the last tiles of rows and columns are smaller than the others, one of them all overlap.
    latents = draw_latents(vae, 2, num_latents, 6 if tiled else 3, 7 if tiled else 2)
    whole = stock(vae, latents)
    assert (whole.abs() == 1).any() and (whole.abs() < 1).any()
    processor = VideoProcessor()
    for output_type in ("np", "pt"):
        expected = processor.postprocess_video(whole, output_type)
        np.testing.assert_array_equal(decode_video(vae, latents, output_type), expected)
    expected = [np.stack(video) for video in processor.postprocess_video(whole, "pil")]
    for video in (decode_video(vae, latents, "uint8"), decode_video(vae, latents, "pil")):
        np.testing.assert_array_equal(np.stack([np.stack(frames) for frames in video]), np.stack(expected))


@pytest.mark.parametrize("num_latents", [1, 2, 5])
def test_cogvideox(num_latents):
    vae = tiny_cogvideox_vae()
    latents = draw_latents(vae, 1, num_latents, 4, 4)
    expected = VideoProcessor().postprocess_video(stock(vae, latents), "np")
    np.testing.assert_array_equal(decode_video(vae, latents, "np"), expected)


def test_slicing_decodes_one_video_at_a_time():
    vae = tiny_vae()
    vae.enable_slicing()
    latents = draw_latents(vae, 3, 2, 2, 2)
    batches = []
    vae.decoder.register_forward_pre_hook(lambda module, args: batches.append(args[0].shape[0]))
    whole = np.concatenate([decode_video(vae, video, "np") for video in latents.split(1)])
    np.testing.assert_array_equal(decode_video(vae, latents, "np"), whole)
    assert set(batches) == {1}


def test_bfloat16_rounds_as_diffusers_does():
    vae = tiny_vae().to(torch.bfloat16)
    latents = draw_latents(vae, 1, 2, 3, 2).bfloat16()
    expected = frames_to_uint8(VideoProcessor().postprocess_video(stock(vae, latents), "np")[0])
    np.testing.assert_array_equal(decode_video(vae, latents, "uint8")[0], expected)


@pytest.mark.parametrize("tiled", [False, True])
def test_frames_come_one_by_one_from_the_pipelines_latents(tiled):
    vae = residual_vae()
    if tiled:
        with_tiles(vae)
    latents = draw_latents(vae, 1, 3, 7, 5)
    whole = stock(vae, denormalize_latents(latents, vae))
    expected = frames_to_uint8(VideoProcessor().postprocess_video(whole, "np")[0])
    frames = list(decode_frames(vae, latents))
    assert len(frames) == 9 and frames[0].shape == (112, 80, 3) and frames[0].dtype == np.uint8
    np.testing.assert_array_equal(np.stack(frames), expected)


def test_the_vae_keeps_nothing_and_two_decodes_do_not_mix():
    vae = tiny_vae()
    one, other = (draw_latents(vae, 1, 2, 2, 2, seed=seed) for seed in (0, 1))
    alone = list(decode_frames(vae, one)), list(decode_frames(vae, other))
    state = dict(vars(vae))
    mixed = list(zip(decode_frames(vae, one), decode_frames(vae, other), strict=True))
    for frames, expected in zip(zip(*mixed, strict=True), alone, strict=True):
        np.testing.assert_array_equal(np.stack(frames), np.stack(expected))
    assert vars(vae) == state


def peak(vae, latents, consume) -> int:
    with LiveBytes([*vae.parameters(), latents]) as counter, torch.no_grad():
        consume(vae, latents)
    return counter.peak


def stream(vae, latents) -> None:
    for _ in decode_frames(vae, latents):
        pass


def test_streaming_takes_memory_that_does_not_grow_with_the_video():
    vae = tiny_vae()
    short, long = (draw_latents(vae, 1, num_latents, 2, 2) for num_latents in (3, 24))
    float_video = 93 * 3 * 16 * 16 * 4
    assert peak(vae, long, stock) > float_video
    streamed = peak(vae, long, stream)
    # What grows is the latents themselves, 16 channels of 1/64 of the pixels.
    assert streamed - peak(vae, short, stream) < 0.1 * float_video
    assert streamed < 0.5 * float_video


def test_tiles_hold_one_float_tile_and_no_float_video():
    vae = with_tiles(tiny_vae())
    # 9 tiles. Stock holds all of them, twice for a moment; here it is one, twice, and edges of a third of it.
    latents = draw_latents(vae, 1, 4, 7, 7)
    assert peak(vae, latents, stream) < 0.4 * peak(vae, latents, stock)


def test_a_video_is_written_while_it_is_decoded(tmp_path):
    vae = tiny_vae()
    latents = draw_latents(vae, 1, 3, 4, 4)
    write_video(tmp_path / "streamed.mp4", decode_frames(vae, latents), 24, {"prompt": "noise"}, scale=2)
    write_video(tmp_path / "whole.mp4", np.stack(list(decode_frames(vae, latents))), 24, {"prompt": "noise"}, scale=2)
    streamed, whole = (read_video(tmp_path / f"{name}.mp4")[0] for name in ("streamed", "whole"))
    assert streamed.shape == (9, 64, 64, 3)
    # x264's threads do not always choose alike.
    assert np.abs(streamed.astype(float) - whole).mean() < 0.5


def test_bad_input():
    vae = tiny_vae()
    latents = draw_latents(vae, 2, 1, 2, 2)
    with pytest.raises(ValueError, match=r"\(2, 16, 1, 2, 2\).*latents\[i : i \+ 1\]"):
        next(decode_frames(vae, latents))
    with pytest.raises(ValueError, match="'mp4'.*uint8"):
        decode_video(vae, latents, "mp4")


def test_chunks_are_those_of_the_latent_frames():
    vae = tiny_vae()
    chunks = [chunk.shape for chunk in decode_chunks(vae, draw_latents(vae, 2, 3, 2, 2), to_uint8)]
    assert chunks == [(2, 3, 1, 16, 16), (2, 3, 4, 16, 16), (2, 3, 4, 16, 16)]
