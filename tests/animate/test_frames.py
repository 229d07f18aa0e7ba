import numpy as np
import PIL.Image
import pytest
from video_files import corners, write_file

from diffusers_fvg.animate.frames import first_frame, nearest_frames, open_frames, spacing


def coloured(count: int) -> list[PIL.Image.Image]:
    return [PIL.Image.new("RGB", (48, 32), (40 * index, 0, 90)) for index in range(count)]


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_an_animation_has_all_its_frames_and_their_times(tmp_path, name):
    pictures = coloured(4)
    options = {"lossless": True} if name == "a.webp" else {}
    durations = [50, 100, 200, 50]
    pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], duration=durations, **options)
    source = open_frames(tmp_path / name)
    assert (source.height, source.width) == (32, 48)
    assert source.times == pytest.approx([0, 0.05, 0.15, 0.35])
    frames = list(source.frames([0, 2, 2, 3]))
    for frame, index in zip(frames, (0, 2, 2, 3), strict=True):
        assert np.abs(frame.astype(int) - np.asarray(pictures[index])).max() <= 2
    with pytest.raises(ValueError, match=f"{name} is animated, 4 frames in all"):
        first_frame(tmp_path / name)


def test_an_animation_without_times_is_shown_as_in_a_browser(tmp_path):
    pictures = coloured(3)
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=0)
    assert open_frames(tmp_path / "a.gif").times == pytest.approx([0, 0.1, 0.2])


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_picture_is_one_upright_frame(tmp_path, orientation):
    # EXIF 2.3: 6 is shown turned clockwise, 8 counterclockwise.
    quarters = {1: 0, 3: 2, 6: -1, 8: 1}[orientation]
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    PIL.Image.fromarray(corners()).save(tmp_path / "a.png", exif=exif)
    source, expected = open_frames(tmp_path / "a.png"), np.rot90(corners(), quarters)
    assert (source.height, source.width) == expected.shape[:2] and list(source.times) == [0]
    assert np.array_equal(next(source.frames([0])), expected)
    assert np.array_equal(np.asarray(first_frame(tmp_path / "a.png")), expected)


def test_the_first_frame_of_a_video_is_upright(tmp_path):
    path = write_file(tmp_path / "a.mp4", np.stack([corners()] * 2), turn="clockwise")
    assert np.array_equal(np.asarray(first_frame(path)), np.rot90(corners(), -1))


def test_a_cut_picture_is_refused(tmp_path):
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot be decoded"):
        open_frames(tmp_path / "a.png")


@pytest.mark.parametrize("ticks", [999, 1000, 1001])
def test_a_clip_of_exactly_the_length_has_all_frames(ticks):
    """81 frames at 15.98 to 16.02 per second are the 81 of a clip at 16."""
    times = np.arange(81) * ticks / 16000
    assert nearest_frames(times, 0, 200, spacing(times, 16)) == list(range(81))


def test_frames_are_chosen_by_their_times():
    # Four frames a second, then sixteen: every fourth of the fast ones, at 4 per second.
    times = np.concatenate([np.arange(4) / 4, 1 + np.arange(17) / 16])
    assert nearest_frames(times, 0, 100, 1 / 4) == [0, 1, 2, 3, 4, 8, 12, 16, 20]


def test_frames_of_a_file_that_is_too_slow():
    assert spacing(np.arange(9) / 15, 16) == pytest.approx(1 / 15)
    assert spacing(np.arange(9) / 30, 16) == 1 / 16
    with pytest.raises(ValueError, match="has 12 frames per second; 16 are needed"):
        spacing(np.arange(9) / 12, 16)
