"""From a video file to clips at a size that is trained at: which bucket, which frames, and their pixels.

Shapes: F/H/W pixel frames/height/width.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import torch
from av.video.reformatter import VideoReformatter

from ..animate.anchor import crop_and_resize
from .config import TrainConfig


# Slower videos than this share of the frame rate would be padded with copies, which teach stuttering.
SLOWEST = 0.9
# Threads of the decoder take longer to start than frames of fewer pixels take to decode.
THREADS_FROM = 256 * 256

Bucket = tuple[int, int, int]


def frames_available(num_frames: int, source_rate: float, frame_rate: float) -> int:
    """Frames that are left of a video when it is thinned out to `frame_rate`."""
    return int((num_frames - 1) * min(1.0, frame_rate / source_rate) + 1e-6) + 1


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
        shortest = min(bucket[0] for bucket in buckets)
        raise ValueError(f"has {num_frames} frames at the training frame rate; the shortest bucket needs {shortest}")
    return min(fitting, key=order)


def clip_frames(num_frames: int, length: int, step: float, most: int) -> list[list[int]]:
    """Which frames of a video make up its clips: as many as fit without overlap, up to `most`, evenly spread from its first
    frame to its last; a single one is its beginning.

    Args:
        num_frames (`int`): of the video.
        length (`int`): frames of a clip.
        step (`float`): frames of the video for one of the clip, at least 1.
        most (`int`): clips.
    """
    offsets = [round(index * step) for index in range(length)]
    span = offsets[-1] + 1
    count = min(most, num_frames // span)
    starts = [round(clip * (num_frames - span) / max(1, count - 1)) for clip in range(count)]
    return [[start + offset for offset in offsets] for start in starts]


def read_clips(path: Path, config: TrainConfig) -> Iterator[tuple[int, torch.Tensor]]:
    """The clips of a video at the size of its bucket, one after the other.

    Nothing behind the last clip is decoded, and frames are scaled as they come: memory is that of one clip.

    Yields:
        How many clips the video has, and one of them, `(3, F, H, W)` in [-1, 1], as the pipeline treats an anchor.

    Raises:
        `ValueError`, `OSError`: missing, damaged, too slow, or shorter than every bucket.
    """
    with _opened(path) as (container, stream):
        # Packets are counted, not decoded; what a cut in the file hides is marked.
        num_frames = sum(bool(packet.size) and not packet.is_discard for packet in container.demux(stream))
        source_rate, source_height, source_width = float(stream.average_rate or 0), stream.height, stream.width
    if not num_frames or not source_rate:
        raise ValueError(f"has {num_frames} frames at {source_rate:.4g} per second")
    if source_rate < SLOWEST * config.frame_rate:
        raise ValueError(f"has {source_rate:.4g} frames per second; training is at {config.frame_rate:.4g}")
    available = frames_available(num_frames, source_rate, config.frame_rate)
    length, height, width = choose_bucket(available, source_height, source_width, config.buckets)
    plan = clip_frames(num_frames, length, max(1.0, source_rate / config.frame_rate), config.clips_per_video)

    with _opened(path) as (container, stream):
        if source_height * source_width < THREADS_FROM:
            stream.thread_count = 1
        else:
            stream.thread_type = "AUTO"
        # One for all frames: each would make one of its own.
        reformatter, frames, index = VideoReformatter(), container.decode(stream), -1
        for wanted in plan:
            clip = []
            for frame in frames:
                index += 1
                if index in wanted:
                    picture = reformatter.reformat(frame, format="rgb24").to_ndarray()
                    clip.append(crop_and_resize(picture, height, width))
                if index == wanted[-1]:
                    break
            if len(clip) < length:
                raise ValueError(f"can be decoded up to frame {index + 1} of {num_frames}")
            yield len(plan), torch.stack(clip, dim=1)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("holds no video")
            yield container, container.streams.video[0]
    except av.error.FFmpegError as error:
        # Some of them are neither a `ValueError` nor an `OSError`.
        raise ValueError(f"cannot be decoded: {error}") from error
