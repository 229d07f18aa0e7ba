from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from training_runs import OPTIONS, moving_square
from video_files import corners, damage, write_file

from diffusers_fvg.animate.anchor import crop_and_resize
from diffusers_fvg.media import read_video, write_video
from diffusers_fvg.shapes.dataset import lossless_video
from diffusers_fvg.training.config import TrainConfig
from diffusers_fvg.training.videos import choose_bucket, clip_frames, read_clips


BUCKETS = [(81, 480, 832), (49, 480, 832), (49, 832, 480), (49, 704, 1280)]


@pytest.mark.parametrize(
    ("video", "bucket"),
    [
        ((200, 480, 832), (81, 480, 832)),
        ((80, 480, 832), (49, 480, 832)),
        ((49, 1280, 720), (49, 832, 480)),
        ((200, 704, 1280), (49, 704, 1280)),
        ((49, 480, 480), (49, 480, 832)),
    ],
    ids=["longest", "frames first", "upright", "aspect before length", "square"],
)
def test_choose_bucket(video, bucket):
    assert choose_bucket(*video, BUCKETS) == bucket


def test_choose_bucket_enlarges_only_where_it_must():
    buckets = [(9, 32, 32), (9, 64, 64), (9, 96, 96)]
    assert choose_bucket(9, 70, 70, buckets) == (9, 64, 64)
    assert choose_bucket(9, 16, 16, buckets) == (9, 32, 32)


def test_choose_bucket_refuses_a_short_video():
    with pytest.raises(ValueError, match="has 48 frames at the training frame rate; the shortest bucket needs 49"):
        choose_bucket(48, 480, 832, BUCKETS)


def config(**options) -> TrainConfig:
    return TrainConfig(model="m", data="d", cache_dir="c", output_dir="o", **OPTIONS | options)


def clips_of(path: Path, **options) -> list[torch.Tensor]:
    return [clip for _, clip in read_clips(path, config(**options))]


def every(seconds: float, count: int) -> np.ndarray:
    return np.arange(count) * seconds


def test_clip_frames_by_hand():
    assert clip_frames(every(1, 20), length=3, step=1.0, most=1) == [[0, 1, 2]]
    assert clip_frames(every(1, 20), length=3, step=2.0, most=2) == [[0, 2, 4], [15, 17, 19]]
    # Ten frames hold two clips of four without overlap, not three.
    assert clip_frames(every(1, 10), length=4, step=1.0, most=3) == [[0, 1, 2, 3], [6, 7, 8, 9]]
    # 24 to 16 frames per second: every one and a half frames.
    assert clip_frames(every(1 / 24, 7), length=5, step=1 / 16, most=4) == [[0, 2, 3, 4, 6]]


@pytest.mark.parametrize("num_frames", range(25, 60, 3))
def test_clip_frames_stay_inside_and_apart(num_frames):
    for rate in (8, 10, 12, 23.976):
        plan = clip_frames(every(1 / rate, num_frames), length=9, step=1 / 8, most=4)
        flat = [frame for clip in plan for frame in clip]
        assert flat == sorted(set(flat)) and flat[0] == 0 and flat[-1] < num_frames
        # Evenly spread up to the end: what is left behind the last clip is less than one step.
        assert len(plan) == 1 or (num_frames - 1 - flat[-1]) / rate < 1 / 8


def test_clips_of_uneven_times_are_even():
    """Frames at 16 per second, then at 32: every one of the first, every second one of the others."""
    times = np.concatenate([every(1 / 16, 16), 1 + every(1 / 32, 33)])
    assert clip_frames(times, length=24, step=1 / 16, most=1) == [[*range(16), *range(16, 32, 2)]]


def test_a_clip_that_stands_still_is_refused(tmp_path):
    ticks = [*range(0, 16000, 2000), *range(16000, 48000, 8000)]
    frames = np.stack([corners()] * len(ticks))
    path = write_file(tmp_path / "a.mp4", frames, times=ticks)
    assert len(clips_of(path, buckets=[[9, 32, 32]])) == 1
    with pytest.raises(ValueError, match="lacks frames after second 1: there are less than 8 per second"):
        clips_of(path, buckets=[[12, 32, 32]])


@pytest.mark.parametrize("ticks", [999, 1000, 1001])
def test_a_video_of_exactly_the_length_is_a_clip(tmp_path, ticks):
    """81 frames at 15.98 to 16.02 per second are the 81 that a bucket asks for, each once."""
    frames = moving_square(0, num_frames=81)
    path = write_file(tmp_path / "a.mp4", frames, times=[ticks * index for index in range(81)])
    (clip,) = clips_of(path, buckets=[[81, 32, 32]], frame_rate=16.0)
    assert torch.equal(clip, torch.stack([crop_and_resize(frame, 32, 32) for frame in frames], dim=1))


def test_buckets_are_chosen_by_what_is_seen(tmp_path):
    """A film that is stored lying and shown upright goes into the upright bucket, its pixels with it."""
    path = write_file(
        tmp_path / "a.mp4", np.stack([corners()] * 9), times=[2000 * k for k in range(9)], turn="clockwise"
    )
    (clip,) = clips_of(path, buckets=[[9, 32, 48], [9, 48, 32]])
    expected = crop_and_resize(np.rot90(corners(), -1).copy(), 48, 32)
    assert clip.shape == (3, 9, 48, 32) and torch.equal(clip[:, 4], expected)


def test_an_animation_is_a_video(tmp_path):
    pictures = [PIL.Image.fromarray(frame) for frame in moving_square(0)]
    options = {"duration": 125, "save_all": True, "append_images": pictures[1:], "lossless": True}
    pictures[0].save(tmp_path / "a.webp", **options)
    (clip,) = clips_of(tmp_path / "a.webp")
    assert torch.equal(clip, torch.stack([crop_and_resize(frame, 32, 32) for frame in moving_square(0)], dim=1))


def test_a_damaged_frame_refuses_the_clip(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3)).astype(np.uint8)
    path = write_file(tmp_path / "a.mp4", frames, times=[2000 * k for k in range(20)], g="40", coder="0")
    damage(path, 6)
    with pytest.raises(ValueError, match="is damaged: frame 6 of 20"):
        clips_of(path)


def test_faster_videos_are_thinned_out(tmp_path):
    write_video(tmp_path / "fast.mp4", moving_square(0, num_frames=25), 24)
    (clip,) = clips_of(tmp_path / "fast.mp4")
    frames, _ = read_video(tmp_path / "fast.mp4")
    assert torch.equal(clip, torch.stack([crop_and_resize(frame, 32, 32) for frame in frames[::3]], dim=1))
    write_video(tmp_path / "slow.mp4", moving_square(0), 6)
    with pytest.raises(ValueError, match="has 6 frames per second; 8 are needed"):
        clips_of(tmp_path / "slow.mp4")


@pytest.mark.parametrize("size", [(32, 32), (288, 256)], ids=["one thread", "threads"])
def test_every_clip_of_a_video(tmp_path, size):
    frames = moving_square(0, 21, *size)
    (tmp_path / "a.mp4").write_bytes(lossless_video(frames, 8))
    clips = clips_of(tmp_path / "a.mp4", clips_per_video=5)
    expected = [torch.stack([crop_and_resize(f, 32, 32) for f in frames[k : k + 9]], dim=1) for k in (0, 12)]
    assert len(clips) == 2 and all(torch.equal(*pair) for pair in zip(clips, expected))


def test_what_is_behind_the_clip_is_not_decoded(tmp_path, monkeypatch):
    """A video whose second half is damaged still has a beginning; the clips behind it are named as damaged."""
    frames = torch.randint(0, 256, (40, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    content = bytearray(lossless_video(frames.numpy(), 8))
    start, end = content.index(b"mdat") + 4, content.index(b"moov")
    (tmp_path / "whole.mp4").write_bytes(content)
    content[start + (end - start) // 2 : end] = bytes(end - start - (end - start) // 2)
    (tmp_path / "damaged.mp4").write_bytes(content)
    assert torch.equal(clips_of(tmp_path / "damaged.mp4")[0], clips_of(tmp_path / "whole.mp4")[0])
    with pytest.raises(ValueError, match="can be decoded only up to frame|cannot be decoded"):
        clips_of(tmp_path / "damaged.mp4", clips_per_video=4)


def test_no_video(tmp_path):
    (tmp_path / "text.mp4").write_text("no video at all")
    with pytest.raises(ValueError, match="cannot be decoded: .*Invalid data"):
        clips_of(tmp_path / "text.mp4")
