"""Reads frames from files of videos, animations and images: upright, with square pixels, evenly spaced in time.

Training, validation and anchors from files use this module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from ..media import Video
from .anchor import picture_image


# Formats of Pillow with several images that are frames in time; those of other formats are pages, previews or depth maps.
ANIMATED = {"GIF", "WEBP", "PNG", "AVIF"}
# Frames with a delay below 0.02 s are shown for 0.1 s, as in browsers and, by default, in FFmpeg's GIF demuxer.
SHORTEST_DELAY, DEFAULT_DELAY = 0.02, 0.1
# Videos below this fraction of the frame rate are refused: they would need repeated frames, which teach a model to stutter.
SLOWEST = 0.9


class Pictures:
    """An image file with one frame, or an animated one, with the attributes and methods of [`~media.reading.Video`]."""

    def __init__(self, path: Path):
        self.path, delays = path, []
        with PIL.Image.open(path) as image:
            first = picture_image(self._single(image, 0))
            for index in range(self._count(image)):
                # Pillow sets the duration of a frame when it is loaded.
                image.seek(index)
                image.load()
                delays.append(float(image.info.get("duration") or 0) / 1000)
        self.width, self.height = first.size
        delays = [delay if delay >= SHORTEST_DELAY else DEFAULT_DELAY for delay in delays]
        self.times = np.cumsum([0.0, *delays[:-1]])
        self.frame_rate = (len(delays) - 1) / float(self.times[-1]) if len(delays) > 1 else 0.0

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Yields frames `(H, W, 3)`, uint8; `indices` must not decrease.

        Raises:
            `ValueError`: an image cannot be decoded.
        """
        with PIL.Image.open(self.path) as image:
            for index in indices:
                yield np.asarray(picture_image(self._single(image, index)))

    @staticmethod
    def _count(image: PIL.Image.Image) -> int:
        return getattr(image, "n_frames", 1) if image.format in ANIMATED else 1

    def _single(self, image: PIL.Image.Image, index: int) -> PIL.Image.Image:
        if self._count(image) == 1:
            return image
        image.seek(index)
        return image.copy()


def open_frames(path: str | Path) -> Video | Pictures:
    """Opens a file with frames: a video, an animation or an image.

    Args:
        path (`str` or `Path`): file of a video, an animated GIF, WebP, PNG or AVIF, or a single image.

    Returns:
        `Video` or `Pictures`: has `height`, `width`, `times` in seconds, `frame_rate` and `frames(indices)`.

    Raises:
        `ValueError`: the file is of another kind, is damaged, or has high dynamic range. The message is meant to follow the
            file's name.
        `OSError`: the file does not exist.
    """
    path = Path(path)
    try:
        with PIL.Image.open(path) as image:
            is_picture = image.format != "MPEG"
    except (PIL.UnidentifiedImageError, SyntaxError):
        is_picture = False
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(f"is too large for a picture: {error}") from error
    if not is_picture:
        return Video(path)
    try:
        return Pictures(path)
    except (OSError, EOFError, SyntaxError) as error:
        raise ValueError(f"cannot be decoded: {error}") from error


def first_frame(path: str | Path) -> PIL.Image.Image:
    """Returns the image in a file, or the first frame of a video, as RGB, for use as an anchor.

    Raises:
        `ValueError`, `OSError`: as in [`open_frames`]; an animated image also raises `ValueError`.
    """
    try:
        source = open_frames(path)
        if isinstance(source, Pictures) and len(source.times) > 1:
            raise ValueError(
                f"is animated, {len(source.times)} frames in all: save the one that you want as its own file"
            )
        (frame,) = source.frames([0])
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    return PIL.Image.fromarray(frame)


def spacing(times: np.ndarray, frame_rate: float) -> float:
    """Returns the seconds between frames to choose from a file: by `frame_rate`, or the file's own if it is at most 10 %
    slower.

    Args:
        times (`np.ndarray` of shape `(F,)`): times of the file's frames, in seconds.
        frame_rate (`float`): requested frames per second.

    Raises:
        `ValueError`: the file is slower.
    """
    if len(times) < 2:
        return 1 / frame_rate
    usual = float(np.median(np.diff(times)))
    if usual * frame_rate * SLOWEST > 1 + 1e-6:
        raise ValueError(f"has {1 / usual:.4g} frames per second; {frame_rate:.4g} are needed")
    return max(usual, 1 / frame_rate)


def nearest_frames(times: np.ndarray, start: float, length: int, step: float) -> list[int]:
    """Returns the index of the frame that is nearest to each of the times `start + k * step`, up to the end of the file.

    Args:
        times (`np.ndarray` of shape `(F,)`): times of the file's frames, in seconds.
        start, step (`float`): in seconds.
        length (`int`): largest number of indices.
    """
    wanted = start + step * np.arange(length)
    numbers = np.interp(wanted[wanted < end_of(times, step)], times, np.arange(len(times)))
    # Rounded relative to the first frame, so that the pattern of a clip with skipped frames does not depend on its start.
    first = round(numbers[0])
    return [first + int(number) for number in np.round(numbers - first, 6).round()]


def end_of(times: np.ndarray, step: float) -> float:
    """Returns the end of a file in seconds: half a frame's distance after the last frame (half of `step` for one frame)."""
    return times[-1] + (0.5 - 1e-6) * (times[-1] - times[-2] if len(times) > 1 else step)
