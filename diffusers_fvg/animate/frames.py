"""From a file to frames: videos, animations and single pictures, upright, with square pixels, chosen evenly in time.

Training, validation and whoever makes an anchor of a file read it here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from ..media import Video
from .anchor import picture_image


# Formats of Pillow whose further pictures follow in time; those of others are pages, previews or depth maps.
ANIMATED = {"GIF", "WEBP", "PNG", "AVIF"}
# Browsers show what is given less than two hundredths of a second for a tenth, as FFmpeg's GIF demuxer does by default.
SHORTEST_DELAY, DEFAULT_DELAY = 0.02, 0.1
# Videos slower than this share of the frame rate would be padded with copies, which teach stuttering.
SLOWEST = 0.9


class Pictures:
    """A picture file, one frame, or an animated one, with the attributes and methods of [`~media.reading.Video`]."""

    def __init__(self, path: Path):
        self.path, delays = path, []
        with PIL.Image.open(path) as image:
            first = picture_image(self._single(image, 0))
            for index in range(self._count(image)):
                # Only a loaded frame knows how long it is shown.
                image.seek(index)
                image.load()
                delays.append(float(image.info.get("duration") or 0) / 1000)
        self.width, self.height = first.size
        delays = [delay if delay >= SHORTEST_DELAY else DEFAULT_DELAY for delay in delays]
        self.times = np.cumsum([0.0, *delays[:-1]])
        self.frame_rate = (len(delays) - 1) / float(self.times[-1]) if len(delays) > 1 else 0.0

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Frames `(H, W, 3)`, uint8; `indices` do not descend.

        Raises:
            `ValueError`: a picture that cannot be decoded.
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
    """The frames of a file, of whatever kind it is.

    Args:
        path (`str` or `Path`): of a video, an animated GIF, WebP, PNG or AVIF, or a single picture.

    Returns:
        `Video` or `Pictures`: with `height`, `width`, `times` in seconds, `frame_rate` and `frames(indices)`.

    Raises:
        `ValueError`: a file that is none of these, is damaged, or of high dynamic range. The message goes on after the
            file's name.
        `OSError`: no such file.
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
    """The picture in a file, or the first frame of the video in it, RGB: an anchor.

    Raises:
        `ValueError`, `OSError`: as in [`open_frames`]; an animated picture, as in [`~animate.anchor.picture_tensor`].
    """
    try:
        source = open_frames(path)
        if isinstance(source, Pictures) and len(source.times) > 1:
            raise ValueError(f"is animated, {len(source.times)} frames in all: save the one that is meant")
        (frame,) = source.frames([0])
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    return PIL.Image.fromarray(frame)


def spacing(times: np.ndarray, frame_rate: float) -> float:
    """Seconds between the chosen frames of a file: those of `frame_rate`, or its own where it is up to a tenth slower.

    Args:
        times (`np.ndarray` of shape `(F,)`): seconds of its frames.
        frame_rate (`float`): frames per second that are wanted.

    Raises:
        `ValueError`: a slower file.
    """
    if len(times) < 2:
        return 1 / frame_rate
    usual = float(np.median(np.diff(times)))
    if usual * frame_rate * SLOWEST > 1 + 1e-6:
        raise ValueError(f"has {1 / usual:.4g} frames per second; {frame_rate:.4g} are needed")
    return max(usual, 1 / frame_rate)


def nearest_frames(times: np.ndarray, start: float, length: int, step: float) -> list[int]:
    """For each of the times `start + k * step` the frame that is nearest to it, as far as the file reaches.

    Args:
        times (`np.ndarray` of shape `(F,)`): seconds of its frames.
        start, step (`float`): seconds.
        length (`int`): times, at most.
    """
    wanted = start + step * np.arange(length)
    numbers = np.interp(wanted[wanted < end_of(times, step)], times, np.arange(len(times)))
    # Halves are rounded from the first frame on: the pattern of a thinned out clip does not depend on where it begins.
    first = round(numbers[0])
    return [first + int(number) for number in np.round(numbers - first, 6).round()]


def end_of(times: np.ndarray, step: float) -> float:
    """Seconds up to which the last frame is nearer than one that would follow it at the last distance; `step` for a single."""
    return times[-1] + (0.5 - 1e-6) * (times[-1] - times[-2] if len(times) > 1 else step)
