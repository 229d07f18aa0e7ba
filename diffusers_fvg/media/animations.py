"""Writes videos in formats that need no player: animated GIF and WebP, and frames as PNG files.

Shape legend: F frames, H and W height and width in pixels.
"""

import io
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from ..atomic import replacing
from .writing import Frames, frames_to_uint8


# Largest longer side in pixels: a larger animation has too many bytes for a web page, for which an mp4 is better.
MAX_SIDE = 720
# A GIF's palette comes from this many frames at this size. One palette for all frames avoids flicker in still parts.
PALETTE_FRAMES, PALETTE_SIDE = 16, 160
WEBP = {"quality": 90, "method": 4}
FAST_WEBP = {"quality": 80, "method": 0}


def write_animation(path: str | Path, frames: Frames, frame_rate: float, scale: int = 1) -> None:
    """Writes an animated GIF or WebP that repeats forever. The file is written completely or not at all; missing folders are created.

    Args:
        path (`str` or `Path`): file to write, ending in `.gif` (256 colours, dithered) or `.webp`.
        frames (see [`frames_to_uint8`]): frames to show; reduced if the longer side is above `MAX_SIDE` pixels.
        frame_rate (`float`): frames per second. Times are rounded to the unit of the format, 1/100 s (GIF) or 1/1000 s (WebP);
            the errors do not add up. A GIF has at most 50 frames per second, because browsers slow down faster ones.
        scale (`int`, *optional*): factor by which pixels are enlarged to squares.

    Raises:
        `ValueError`: the frames are not valid, the file type is another, or the frame rate is not positive.
    """
    path = Path(path)
    form = path.suffix.lower().removeprefix(".")
    if form not in ("gif", "webp"):
        raise ValueError(f"`path` must end in .gif or .webp for an animation, but is {path.name!r}")
    if not frame_rate > 0:
        raise ValueError(f"`frame_rate={frame_rate}` must be positive: pass frames per second, for example 24")
    pictures = [_sized(Image.fromarray(frame), scale) for frame in frames_to_uint8(frames)]
    with replacing(path) as draft:
        if form == "webp":
            _save(draft, "WEBP", pictures, _durations(len(pictures), frame_rate, 1), **WEBP)
            return
        palette = _palette(pictures)
        indexed = [picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for picture in pictures]
        _save(draft, "GIF", indexed, _durations(len(pictures), min(frame_rate, 50), 10), disposal=1)


def preview_webp(frames: np.ndarray, frame_rate: float) -> bytes:
    """Returns frames `(F, H, W, 3)`, uint8, as the bytes of an animated WebP that is fast to encode."""
    file = io.BytesIO()
    pictures = [Image.fromarray(frame) for frame in frames]
    _save(file, "WEBP", pictures, _durations(len(pictures), frame_rate, 1), **FAST_WEBP)
    return file.getvalue()


def write_frames(path: str | Path, frames: Frames) -> None:
    """Writes a ZIP of the unchanged frames as PNG files, `frame_0000.png` and so on.

    Raises:
        `ValueError`: the frames are not valid, or the file type is another.
    """
    path = Path(path)
    if path.suffix.lower() != ".zip":
        raise ValueError(f"`path` must end in .zip for frames, but is {path.name!r}")
    # PNG files are already compressed.
    with replacing(path) as draft, zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as archive:
        for number, frame in enumerate(frames_to_uint8(frames)):
            file = io.BytesIO()
            Image.fromarray(frame).save(file, "PNG")
            archive.writestr(f"frame_{number:04d}.png", file.getvalue())


def _save(file: Path | BinaryIO, form: str, pictures: list[Image.Image], durations: list[int], **options) -> None:
    first, *others = pictures
    first.save(file, form, save_all=True, append_images=others, duration=durations, loop=0, **options)


def _sized(picture: Image.Image, scale: int) -> Image.Image:
    if scale > 1:
        picture = picture.resize([side * scale for side in picture.size], Image.Resampling.NEAREST)
    picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return picture


def _durations(count: int, frame_rate: float, unit: int) -> list[int]:
    """Returns the milliseconds of each frame, in whole units that add up to the length of the video."""
    ends = [unit * round(1000 * number / frame_rate / unit) for number in range(count + 1)]
    return [max(unit, end - begin) for begin, end in zip(ends, ends[1:])]


def _palette(pictures: list[Image.Image]) -> Image.Image:
    chosen = np.linspace(0, len(pictures) - 1, min(PALETTE_FRAMES, len(pictures))).round().astype(int)
    small = []
    for index in chosen:
        picture = pictures[index].copy()
        # Averaging would add colours, which would take entries of the palette.
        picture.thumbnail((PALETTE_SIDE, PALETTE_SIDE), Image.Resampling.NEAREST)
        small.append(np.asarray(picture))
    return Image.fromarray(np.concatenate(small)).quantize(256, Image.Quantize.MEDIANCUT)
