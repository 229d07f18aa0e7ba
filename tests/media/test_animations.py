import io
import zipfile

import numpy as np
import pytest
from PIL import Image, ImageSequence

from diffusers_fvg.media import lossless_video, preview_webp, read_video, write_animation, write_frames


GREY, RED, BLUE = (128, 128, 128), (220, 40, 40), (40, 60, 200)


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    """Nine frames of a red square that moves over grey, with a blue one that stays where it is."""
    frames = np.full((9, 48, 64, 3), GREY, dtype=np.uint8)
    for index, frame in enumerate(frames):
        frame[32:48, :16] = BLUE
        frame[8:24, 4 + 4 * index : 20 + 4 * index] = RED
    return frames


def shown(file) -> tuple[list[np.ndarray], list[int], int]:
    with Image.open(file) as image:
        frames, durations = [], []
        for frame in ImageSequence.Iterator(image):
            frames.append(np.asarray(frame.convert("RGB")))
            # Known once the frame is loaded.
            durations.append(frame.info["duration"])
        return frames, durations, image.info["loop"]


@pytest.mark.parametrize("name, error, unit", [("clip.gif", 3, 10), ("clip.webp", 12, 1)])
@pytest.mark.parametrize("frame_rate", [8, 24, 30000 / 1001])
def test_an_animation_shows_all_frames_for_their_time_and_again(tmp_path, clip, name, error, unit, frame_rate):
    write_animation(tmp_path / "new folder" / name, clip, frame_rate, scale=2)
    frames, durations, loop = shown(tmp_path / "new folder" / name)
    assert loop == 0 and len(frames) == 9
    expected = np.kron(clip, np.ones((1, 2, 2, 1), np.uint8))
    assert np.abs(np.stack(frames).astype(int) - expected).mean() < error
    # Each ends at the millisecond or hundredth of a second that is the nearest.
    assert np.abs(np.cumsum(durations) - 1000 * np.arange(1, 10) / frame_rate).max() <= unit / 2


def test_still_parts_of_a_gif_stand_still(tmp_path):
    random = np.random.default_rng(0)
    frames = np.broadcast_to(random.integers(0, 256, (32, 32, 3), dtype=np.uint8), (6, 32, 32, 3)).copy()
    frames[:, :8] = random.integers(0, 256, (6, 8, 32, 3), dtype=np.uint8)
    write_animation(tmp_path / "a.gif", frames, 8)
    # Each row is dithered from the one above it: the lower half no longer feels the first rows' noise much.
    seen = np.stack(shown(tmp_path / "a.gif")[0]).astype(int)[:, 16:]
    assert np.abs(seen - seen[:1]).mean() < 12
    assert np.abs(seen - frames[:, 16:]).mean() < 25


def test_a_large_video_is_made_smaller_and_a_fast_one_slower(tmp_path):
    write_animation(tmp_path / "a.webp", np.zeros((2, 720, 1280, 3), np.uint8), 24)
    assert Image.open(tmp_path / "a.webp").size == (720, 405)
    frames = np.zeros((3, 16, 16, 3), np.uint8)
    frames[1:, 8:], frames[2, :8] = 255, 128
    write_animation(tmp_path / "a.gif", frames, 100)
    assert shown(tmp_path / "a.gif")[1] == [20, 20, 20]


def test_frames_in_a_zip_and_a_lossless_video_are_the_same_numbers(tmp_path, clip):
    noise = np.random.default_rng(0).integers(0, 256, (5, 18, 26, 3), dtype=np.uint8)
    for frames in (clip, noise):
        write_frames(tmp_path / "frames.zip", frames)
        with zipfile.ZipFile(tmp_path / "frames.zip") as archive:
            names = archive.namelist()
            read = np.stack([np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in names])
        assert names[:2] == ["frame_0000.png", "frame_0001.png"] and np.array_equal(read, frames)
        (tmp_path / "frames.mp4").write_bytes(lossless_video(frames, 23.976))
        again, frame_rate = read_video(tmp_path / "frames.mp4")
        assert np.array_equal(again, frames) and frame_rate == pytest.approx(23.976, abs=1e-3)


def test_a_preview_is_small_and_shows_the_frames(clip):
    content = preview_webp(clip, 2)
    frames, durations, _ = shown(io.BytesIO(content))
    assert durations == [500] * 9 and np.abs(np.stack(frames).astype(int) - clip).mean() < 12
    assert len(content) < 20_000


@pytest.mark.parametrize(
    "write, name, frame_rate, told",
    [
        (write_animation, "clip.mp4", 8, ".gif or .webp"),
        (write_animation, "clip.gif", 0, "frame_rate=0"),
        (lambda path, frames, _: write_frames(path, frames), "clip.tar", 8, "must end in .zip"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, clip, write, name, frame_rate, told):
    with pytest.raises(ValueError, match=told):
        write(tmp_path / name, clip, frame_rate)
    assert list(tmp_path.iterdir()) == []
