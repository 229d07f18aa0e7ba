"""From a file to clips at a size that is trained at: which bucket, which frames, and their pixels.

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


# A frame that is chosen more than so many times in a row stands still.
MOST_REPEATS = 2

Bucket = tuple[int, int, int]


def choose_bucket(num_frames: int, height: int, width: int, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket for a video: of those it has the frames for, the nearest in aspect ratio, then the longest, then the
    largest that needs no enlarging.

    Args:
        num_frames (`int`): frames at the training frame rate.
        height, width (`int`): pixels of the video.
        buckets (`list` of `(num_frames, height, width)`): to choose from.

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
    """Which frames of a video make up its clips: as many as fit without overlap, up to `most`, evenly spread from its first
    frame to its last; a single one is its beginning.

    Args:
        times (`np.ndarray` of shape `(F,)`): seconds of its frames.
        length (`int`): frames of a clip.
        step (`float`): seconds between two of them.
        most (`int`): clips.

    Raises:
        `ValueError`: a clip in which the video stands still for want of frames.
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
            raise ValueError(f"lacks frames behind second {at:.3g}: there are less than {1 / step:.4g} per second")
    return clips


@dataclass(frozen=True)
class ClipPlan:
    """What becomes of a file.

    Args:
        frames (`Video` or `Pictures`): of the file.
        bucket (`tuple[int, int, int]`): number of frames, height and width of its clips.
        clips (`list[list[int]]`): numbers of the frames that make up each.
    """

    frames: Video | Pictures
    bucket: Bucket
    clips: list[list[int]]


def plan_clips(path: Path, config: TomlConfig, buckets: Sequence[Bucket] = ()) -> ClipPlan:
    """Bucket and frames of a file's clips. Of a video nothing but its first frame is decoded.

    A picture is a clip of one frame, and goes into the buckets of one frame alone.

    Args:
        path (`Path`): of a video or a picture.
        config ([`TomlConfig`]): frame rate, buckets and number of clips.
        buckets (`list` of `(num_frames, height, width)`, *optional*): in place of those of the config.

    Raises:
        `ValueError`, `OSError`: missing, damaged, too slow, or shorter than every bucket.
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
    """The clips of a file at the size of its bucket, one after the other: see [`plan_clips`].

    Nothing behind the last clip is decoded, and frames are scaled as they come: memory is that of one clip.

    Yields:
        How many clips the video has, and one of them, `(3, F, H, W)` in [-1, 1], as the pipeline treats an anchor.

    Raises:
        `ValueError`, `OSError`: as in [`plan_clips`]; a damaged frame.
    """
    plan = plan_clips(path, config, buckets)
    length, height, width = plan.bucket
    frames = plan.frames.frames([frame for clip in plan.clips for frame in clip])
    for _ in plan.clips:
        pictures = [crop_and_resize(frame, height, width) for frame in itertools.islice(frames, length)]
        yield len(plan.clips), torch.stack(pictures, dim=1)
