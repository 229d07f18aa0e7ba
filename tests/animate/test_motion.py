import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_fvg.animate.motion import motion_amounts


def still(num_frames: int = 9, size: int = 64) -> np.ndarray:
    """A photograph-like picture, held: smooth, with an edge."""
    y, x = np.mgrid[0:size, 0:size] / size
    picture = np.stack([0.3 + 0.4 * x, 0.5 + 0.3 * y * x, np.where(x + y > 1, 0.7, 0.2)], axis=-1)
    return np.repeat(picture[None], num_frames, axis=0)


def with_square(side: int, step: float) -> np.ndarray:
    """A square of `side` pixels that moves by `step` pixels a frame."""
    frames = np.full((9, 64, 64, 3), 0.5)
    for index, frame in enumerate(frames):
        left = round(8 + index * step)
        frame[16 : 16 + side, left : left + side] = (0.9, 0.1, 0.1)
    return frames


def amount(frames: np.ndarray) -> float:
    (found,) = motion_amounts(frames[None])
    return found


def test_the_share_is_that_of_the_cells_that_change():
    # 16 cells of 4 pixels along a side: the square leaves 2 x 2 cells and comes to 2 x 2 others.
    assert amount(with_square(8, 4)) == pytest.approx((2 * (8 + 4 * 8) / 4) / 256, abs=1e-4)
    assert amount(with_square(8, 0)) == 0.0


@pytest.mark.parametrize("kind", ["held", "grain", "drift", "cast"])
def test_what_decoders_do_to_a_still_picture_is_no_motion(kind):
    frames, rng = still(), np.random.default_rng(0)
    ramp = np.linspace(0, 1, 9)[:, None, None, None]
    frames = (
        frames
        + {
            "held": 0,
            "grain": rng.normal(0, 0.02, frames.shape),
            "drift": 0.1 * ramp,
            "cast": ramp * np.array([0.08, 0.0, -0.08]),
        }[kind]
    )
    assert amount(np.clip(frames, 0, 1)) == 0.0


def test_a_change_of_colour_and_a_vanishing_are_motion():
    frames = with_square(16, 0)
    turned, gone = frames.copy(), frames.copy()
    turned[5:, 16:32, 8:24] = (0.1, 0.9, 0.1)
    gone[5:, 16:32, 8:24] = 0.5
    assert amount(turned) == amount(gone) == 16 / 256


def test_a_clip_that_comes_back_has_moved():
    frames = with_square(8, 4)
    assert amount(np.concatenate([frames, frames[::-1]])) == amount(frames)


def test_every_form_of_frames_gives_the_same():
    frames = np.stack([with_square(8, 3), still()])
    expected = motion_amounts(frames)
    levels = np.round(frames * 255).astype(np.uint8)
    assert (
        motion_amounts(levels)
        == motion_amounts([[PIL.Image.fromarray(f) for f in video] for video in levels])
        == expected
    )
    assert motion_amounts(torch.from_numpy(frames).permute(0, 1, 4, 2, 3)) == expected
    assert motion_amounts(frames[:, :1]) is None and motion_amounts([]) is None


def test_the_size_of_the_picture_does_not_matter():
    frames = with_square(16, 3)
    large = frames.repeat(3, axis=1).repeat(3, axis=2)
    assert amount(large) == pytest.approx(amount(frames), abs=0.01)
