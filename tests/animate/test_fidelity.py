"""Colour difference, drift, and the corrections of decoded frames."""

import numpy as np
import pytest
import torch

from diffusers_fvg import Anchor, load_embedded
from diffusers_fvg.animate.fidelity import (
    colour_corrections,
    colour_shift,
    correct_frames,
    decode_anchored,
    delta_e_2000,
    low_frequency_drift,
    srgb_to_lab,
)
from diffusers_fvg.shapes.world import Change, ShapeObject, render


# L, a, b of two colours and their difference. Sharma, Wu, Dalal: The CIEDE2000 color-difference formula: implementation notes,
# supplementary test data, and mathematical observations, Color Research and Application 30(1), 21-30, 2005, Table 1
# (www.ece.rochester.edu/~gsharma/ciede2000).
SHARMA = np.array(
    """
    50.0000   2.6772 -79.7751  50.0000   0.0000 -82.7485   2.0425
    50.0000   3.1571 -77.2803  50.0000   0.0000 -82.7485   2.8615
    50.0000   2.8361 -74.0200  50.0000   0.0000 -82.7485   3.4412
    50.0000  -1.3802 -84.2814  50.0000   0.0000 -82.7485   1.0000
    50.0000  -1.1848 -84.8006  50.0000   0.0000 -82.7485   1.0000
    50.0000  -0.9009 -85.5211  50.0000   0.0000 -82.7485   1.0000
    50.0000   0.0000   0.0000  50.0000  -1.0000   2.0000   2.3669
    50.0000  -1.0000   2.0000  50.0000   0.0000   0.0000   2.3669
    50.0000   2.4900  -0.0010  50.0000  -2.4900   0.0009   7.1792
    50.0000   2.4900  -0.0010  50.0000  -2.4900   0.0010   7.1792
    50.0000   2.4900  -0.0010  50.0000  -2.4900   0.0011   7.2195
    50.0000   2.4900  -0.0010  50.0000  -2.4900   0.0012   7.2195
    50.0000  -0.0010   2.4900  50.0000   0.0009  -2.4900   4.8045
    50.0000  -0.0010   2.4900  50.0000   0.0010  -2.4900   4.8045
    50.0000  -0.0010   2.4900  50.0000   0.0011  -2.4900   4.7461
    50.0000   2.5000   0.0000  50.0000   0.0000  -2.5000   4.3065
    50.0000   2.5000   0.0000  73.0000  25.0000 -18.0000  27.1492
    50.0000   2.5000   0.0000  61.0000  -5.0000  29.0000  22.8977
    50.0000   2.5000   0.0000  56.0000 -27.0000  -3.0000  31.9030
    50.0000   2.5000   0.0000  58.0000  24.0000  15.0000  19.4535
    50.0000   2.5000   0.0000  50.0000   3.1736   0.5854   1.0000
    50.0000   2.5000   0.0000  50.0000   3.2972   0.0000   1.0000
    50.0000   2.5000   0.0000  50.0000   1.8634   0.5757   1.0000
    50.0000   2.5000   0.0000  50.0000   3.2592   0.3350   1.0000
    60.2574 -34.0099  36.2677  60.4626 -34.1751  39.4387   1.2644
    63.0109 -31.0961  -5.8663  62.8187 -29.7946  -4.0864   1.2630
    61.2901   3.7196  -5.3901  61.4292   2.2480  -4.9620   1.8731
    35.0831 -44.1164   3.7933  35.0232 -40.0716   1.5901   1.8645
    22.7233  20.0904 -46.6940  23.0331  14.9730 -42.5619   2.0373
    36.4612  47.8580  18.3852  36.2715  50.5065  21.2231   1.4146
    90.8027  -2.0831   1.4410  91.1528  -1.6435   0.0447   1.4441
    90.9257  -0.5406  -0.9208  88.6381  -0.8985  -0.7239   1.5381
     6.7747  -0.2908  -2.4247   5.8714  -0.0985  -2.2286   0.6377
     2.0776   0.0795  -1.1350   0.9033  -0.0636  -0.5514   0.9082
    """.split(),
    dtype=float,
).reshape(34, 7)
GAIN, OFFSET = np.array([1.06, 1.0, 0.92], np.float32), np.array([0.02, -0.02, 0.08], np.float32)


def moving_clip():
    """A red circle that moves to the right and a blue square that rests, in [0, 1]."""
    circle = ShapeObject("red", "circle", 0.25, 0.3, 0.14, (Change("move", (0.4, 0.0)),))
    return render((circle, ShapeObject("blue", "square", 0.6, 0.7, 0.14))).astype(np.float32) / 255


def cast(frames):
    return np.clip(frames * GAIN + OFFSET, 0, 1)


# -- measures


def test_delta_e_is_that_of_the_published_pairs():
    for first, second in ((SHARMA[:, :3], SHARMA[:, 3:6]), (SHARMA[:, 3:6], SHARMA[:, :3])):
        np.testing.assert_allclose(delta_e_2000(first, second), SHARMA[:, 6], atol=1e-4, rtol=0)


def test_lab_of_srgb():
    # brucelindbloom.com, CIE color calculator: sRGB, D65, no adaptation.
    colours = {
        (1, 1, 1): (100, 0, 0),
        (0, 0, 0): (0, 0, 0),
        (1, 0, 0): (53.2408, 80.0925, 67.2032),
        (0, 1, 0): (87.7347, -86.1827, 83.1793),
        (0, 0, 1): (32.2970, 79.1875, -107.8602),
    }
    np.testing.assert_allclose(srgb_to_lab(np.array(list(colours))), list(colours.values()), atol=0.05)
    assert abs(srgb_to_lab(np.array([0.003, 0.003, 0.003]))[0] - 903.3 * 0.003 / 12.92) < 1e-3


def test_measures_of_frames():
    picture = np.full((32, 48, 3), 0.5, np.float32)
    checkered = picture + 0.2 * np.where(np.indices((32, 48)).sum(0) % 2, 1, -1)[..., None]
    frames = np.stack([picture, picture + 0.1, checkered]).astype(np.float32)
    np.testing.assert_allclose(low_frequency_drift(frames, picture), [0, 0.1, 0], atol=1e-6)
    shift = colour_shift(torch.from_numpy(frames), torch.from_numpy(picture))
    # Greys differ by lightness alone, weighed by S_L of the mean lightness.
    lightness = srgb_to_lab(np.array([[0.5] * 3, [0.6] * 3]))[:, 0]
    off = (lightness.mean() - 50) ** 2
    expected = (lightness[1] - lightness[0]) / (1 + 0.015 * off / np.sqrt(20 + off))
    np.testing.assert_allclose(shift[:2], [0, expected], atol=1e-3)
    assert shift[2] > 5


# -- corrections


@pytest.mark.parametrize("where", [slice(0, 17), slice(0, 1), slice(1, 17)], ids=["all", "first", "after"])
def test_match_takes_a_cast_away_where_it_is(where):
    clean = moving_clip()
    frames = clean.copy()
    frames[where] = cast(clean[where])
    raw = frames.copy()
    correct_frames(frames, {0: clean[0]}, "match")
    assert np.abs(raw - clean)[where].mean() > 0.03
    assert np.abs(frames - clean).mean() < 0.006
    # No jump that the clip does not have.
    jumps = [np.abs(video[1].mean((0, 1)) - video[0].mean((0, 1))).max() for video in (raw, frames)]
    assert jumps[1] < 0.003 and (jumps[0] > 0.01) == (where != slice(0, 17))


def test_between_two_anchors_one_correction_fades_into_the_other():
    picture = moving_clip()[0]
    ramp = np.linspace(0.1, -0.1, 9, dtype=np.float32)
    frames = picture + ramp[:, None, None, None]
    given = colour_corrections(frames, {0: picture, 8: picture})
    torch.testing.assert_close(given[:, 0], torch.ones(9, 3), atol=1e-3, rtol=0)
    torch.testing.assert_close(given[:, 1], torch.from_numpy(-ramp)[:, None].expand(9, 3), atol=1e-3, rtol=0)
    # Before the first and after the last anchor a correction stays as it is beside it.
    alone = colour_corrections(frames, {4: picture})[:, 1, 0]
    expected = [-ramp[3]] * 4 + [0.0] + [-ramp[5]] * 4
    np.testing.assert_allclose(alone, expected, atol=1e-3)
    # A single frame between two takes the mean of both.
    torch.testing.assert_close(
        colour_corrections(frames[:3], {0: picture, 2: picture + 0.2})[1, 1, 0].item(), 0.025, atol=2e-3, rtol=0
    )


def test_match_leaves_a_scene_that_changes_alone():
    clean = moving_clip()
    gone = clean.copy()
    gone[1:] = 128 / 255
    frames = gone.copy()
    correct_frames(frames, {0: clean[0]}, "match")
    np.testing.assert_allclose(frames, gone, atol=1e-5)
    # A picture without contrast says nothing of a gain.
    flat = np.full((3, 32, 32, 3), 0.4, np.float32)
    correction = colour_corrections(flat, {0: flat[0] + 0.1})
    torch.testing.assert_close(correction, torch.tensor([[1.0] * 3, [0.1] * 3]).expand(3, 2, 3), atol=1e-4, rtol=0)


def test_replace_gives_the_pictures_themselves_and_the_colours_of_match_around():
    clean = moving_clip()
    matched, replaced = cast(clean), torch.from_numpy(cast(clean))
    correct_frames(matched, {0: clean[0], 16: clean[16]}, "match")
    correct_frames(replaced, {0: clean[0], 16: clean[16]}, "replace")
    for frame in (0, 16):
        assert np.array_equal(replaced[frame], clean[frame]) and not np.array_equal(matched[frame], clean[frame])
    np.testing.assert_array_equal(replaced[1:16], matched[1:16])


def test_only_videos_with_anchors_are_corrected_in_every_output_type():
    clean = moving_clip()
    videos = np.stack([cast(clean)] * 2)
    decoded = {
        "np": lambda: videos.copy(),
        "pt": lambda: torch.from_numpy(videos).permute(0, 1, 4, 2, 3).clone(),
        "uint8": lambda: np.round(videos * 255).astype(np.uint8),
    }
    anchors = [[], [Anchor(clean[:5]), Anchor(clean[16], -1)]]
    frames, as_tensor, as_uint8, as_images = (
        decode_anchored(lambda wanted: decoded[wanted](), anchors, "replace", kind)
        for kind in ("np", "pt", "uint8", "pil")
    )
    np.testing.assert_array_equal(frames[0], videos[0])
    for frame in (0, 1, 2, 3, 4, 16):
        np.testing.assert_array_equal(frames[1, frame], clean[frame])
    assert not np.array_equal(frames[1, 5], videos[1, 5])
    np.testing.assert_array_equal(as_tensor.permute(0, 1, 3, 4, 2), frames)
    assert np.abs(as_uint8 / 255 - frames).max() < 1.1 / 255
    np.testing.assert_array_equal(as_uint8[1, 4], np.round(clean[4] * 255))
    np.testing.assert_array_equal([[np.asarray(image) for image in video] for video in as_images], as_uint8)


def test_a_vae_with_a_colour_cast():
    """The embedded model, its VAE's last layer changed so that every decoded frame has the cast."""
    pipe = load_embedded()
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        last = pipe.vae.decoder.conv_out
        # In [-1, 1]; the layer gives each channel of two by two pixels.
        gain, offset = (torch.from_numpy(values).repeat_interleave(4) for values in (GAIN, GAIN - 1 + 2 * OFFSET))
        last.weight.mul_(gain[:, None, None, None, None])
        last.bias.mul_(gain).add_(offset)
    picture = moving_clip()[0]
    shifts = {}
    for choice in ("raw", "match", "replace"):
        frames = pipe.animate(
            "A red circle moves to the right",
            Anchor(picture),
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(0),
            anchor_decode=choice,
        )[0]
        shifts[choice] = colour_shift(frames[:9], picture)
        if choice == "replace":
            assert np.array_equal(frames[0], picture)
    assert shifts["raw"].min() > 6, shifts
    assert shifts["match"][0] < 1 and (shifts["match"] < 0.5 * shifts["raw"]).all(), shifts
    assert shifts["replace"][0] == 0 and np.array_equal(shifts["replace"][1:], shifts["match"][1:])
