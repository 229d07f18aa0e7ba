"""Cuts video files into training clips: chooses bucket and frames, and reads the pixels.

Shapes: F/H/W pixel frames/height/width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..animate.anchor import crop_and_resize
from ..animate.frames import SLOWEST, Pictures, end_of, nearest_frames, open_frames, spacing
from ..media import Video
from .config import TomlConfig


# Most times that a clip may repeat a frame in a row.
MOST_REPEATS = 2

Bucket = tuple[int, int, int]


def choose_bucket(num_frames: int, height: int, width: int, buckets: Sequence[Bucket]) -> Bucket:
    """Returns the bucket for a video: of those that are not longer, the nearest in aspect ratio, then the longest, then the
    largest that needs no upscaling.

    Args:
        num_frames (`int`): number of the video's frames at the training frame rate.
        height, width (`int`): size of the video in pixels.
        buckets (`list` of `(num_frames, height, width)`): buckets to choose from.

    Raises:
        `ValueError`: the video is shorter than every bucket.
    """

    def order(bucket: Bucket) -> tuple[float, int, bool, int]:
        length, bucket_height, bucket_width = bucket
        distance = abs(math.log(width * bucket_height / (height * bucket_width)))
        enlarged = bucket_height > height or bucket_width > width
        area = bucket_height * bucket_width
        return round(distance, 6), -length, enlarged, area if enlarged else -area

    fitting = [bucket for bucket in buckets if bucket[0] <= num_frames]
    if not fitting:
        shortest = min((bucket[0] for bucket in buckets), default="more than one")
        raise ValueError(f"has {num_frames} frames at the training frame rate; the shortest bucket needs {shortest}")
    return min(fitting, key=order)


def clip_frames(times: np.ndarray, length: int, step: float, most: int) -> list[list[int]]:
    """Returns the frame indices of a video's clips: as many clips as fit without overlap, up to `most`, evenly spread from the
    first frame to the last. A single clip is the beginning of the video.

    Args:
        times (`np.ndarray` of shape `(F,)`): times of the video's frames in seconds.
        length (`int`): number of frames of a clip.
        step (`float`): seconds between two frames of a clip.
        most (`int`): most clips.

    Raises:
        `ValueError`: a clip would repeat frames, because the video has too few.
    """
    latest = times[times + (length - 1) * step < end_of(times, step)][-1]
    for count in range(min(most, int(times[-1] / (length * step)) + 1), 0, -1):
        even = np.linspace(0, latest if count > 1 else 0, count)
        starts = np.interp(even, times, np.arange(len(times))).round(6).round().astype(int)
        clips = [nearest_frames(times, times[start], length, step) for start in starts]
        if all(before[-1] < after[0] for before, after in itertools.pairwise(clips)):
            break
    for clip in clips:
        longest = max(len(list(run)) for _, run in itertools.groupby(clip))
        if longest > MOST_REPEATS or len(set(clip)) < SLOWEST * length:
            at = times[next(frame for frame, run in itertools.groupby(clip) if len(list(run)) == longest)]
            raise ValueError(f"lacks frames after second {at:.3g}: there are less than {1 / step:.4g} per second")
    return clips


@dataclass(frozen=True)
class ClipPlan:
    """Bucket and frames of the clips that are cut from a file.

    Args:
        frames (`Video` or `Pictures`): the opened file.
        bucket (`tuple[int, int, int]`): number of frames, height and width of its clips.
        clips (`list[list[int]]`): frame indices of each clip.
    """

    frames: Video | Pictures
    bucket: Bucket
    clips: list[list[int]]


def plan_clips(path: Path, config: TomlConfig, buckets: Sequence[Bucket] = ()) -> ClipPlan:
    """Chooses bucket and frames of a file's clips. Only the first frame of a video is decoded.

    An image is a clip of one frame, for buckets of one frame only.

    Args:
        path (`Path`): path of a video or an image.
        config ([`TomlConfig`]): frame rate, buckets and number of clips.
        buckets (`list` of `(num_frames, height, width)`, *optional*): replace those of the config.

    Raises:
        `ValueError`, `OSError`: the file is missing or damaged, its frame rate is too low, or it is shorter than every bucket.
    """
    video = open_frames(path)
    single = len(video.times) == 1
    fitting = [bucket for bucket in buckets or config.buckets if (bucket[0] == 1) == single]
    if single and not fitting:
        raise ValueError(
            "is a single picture, and no bucket has one frame: add one, [1, height, width], or leave it out"
        )
    step = spacing(video.times, config.frame_rate)
    available = len(nearest_frames(video.times, 0, len(video.times), step))
    bucket = choose_bucket(available, video.height, video.width, fitting)
    return ClipPlan(video, bucket, clip_frames(video.times, bucket[0], step, config.clips_per_video))


def read_clips(path: Path, config: TomlConfig, buckets: Sequence[Bucket] = ()) -> Iterator[tuple[int, torch.Tensor]]:
    """Reads the clips of a file at the size of its bucket; see [`plan_clips`].

    Frames after the last clip are not decoded, and each frame is scaled when it is decoded, so that one clip is in memory.

    Yields:
        The number of clips of the file, and a clip `(3, F, H, W)` in [-1, 1], scaled and cropped like an anchor.

    Raises:
        `ValueError`, `OSError`: as in [`plan_clips`], or a frame is damaged.
    """
    plan = plan_clips(path, config, buckets)
    length, height, width = plan.bucket
    frames = plan.frames.frames([frame for clip in plan.clips for frame in clip])
    for _ in plan.clips:
        pictures = [crop_and_resize(frame, height, width) for frame in itertools.islice(frames, length)]
        yield len(plan.clips), torch.stack(pictures, dim=1)
