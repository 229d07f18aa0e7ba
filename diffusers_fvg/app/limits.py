"""Limits of a server, checked before a model runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import PIL.Image

from ..animate.frames import first_frame
from ..media import Video


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Args:
        pixels (`int`, *optional*): maximum number of pixels of a frame, height times width; defaults to four times the model's own.
        frames (`int`, *optional*): maximum number of frames of a video; defaults to four times the model's own.
        steps (`int`): maximum number of steps of the video model.
        pictures (`int`): maximum number of pictures drawn for a caption.
        anchors (`int`): maximum number of uploaded pictures of one video.
        queue (`int`): maximum number of waiting jobs.
        waiting (`int`): maximum number of unfinished jobs of one user.
        kept (`int`): number of finished jobs of one user that are kept with their videos.
        people (`int`): number of users whose jobs are kept; the user who was inactive for longest is dropped first.
        upload_bytes (`int`): largest uploaded file, in bytes.
        upload_pixels (`int`): maximum number of pixels of an uploaded picture.
    """

    pixels: int | None = None
    frames: int | None = None
    steps: int = 100
    pictures: int = 8
    anchors: int = 8
    queue: int = 32
    waiting: int = 4
    kept: int = 20
    people: int = 200
    upload_bytes: int = 32 * 2**20
    upload_pixels: int = 50_000_000

    def of_model(self, defaults: dict) -> Limits:
        """Returns these limits with `pixels` and `frames` filled in from the model's own size."""
        pixels, frames = defaults["height"] * defaults["width"], defaults["num_frames"]
        own = {"pixels": self.pixels or 4 * pixels, "frames": self.frames or 4 * (frames - 1) + 1}
        return Limits(**{**self.__dict__, **own})

    def check_size(self, height: int, width: int, num_frames: int, steps: int) -> None:
        """Raises `ValueError` for a video with too many pixels, frames or steps for this server."""
        if self.pixels is not None and height * width > self.pixels:
            raise ValueError(
                f"`height={height}` and `width={width}` are {height * width} pixels; this server allows at most {self.pixels}. "
                "Choose a smaller height or width."
            )
        if self.frames is not None and num_frames > self.frames:
            raise ValueError(f"`num_frames={num_frames}` must be at most {self.frames} on this server.")
        if steps > self.steps:
            raise ValueError(f"`num_inference_steps={steps}` must be at most {self.steps} on this server.")

    def check_count(self, num_candidates: int, num_anchors: int) -> None:
        """Raises `ValueError` for too many pictures to draw, or too many anchors."""
        if not 1 <= num_candidates <= self.pictures:
            raise ValueError(
                f"`num_candidates={num_candidates}` must be a number from 1 to {self.pictures} on this server."
            )
        if num_anchors > self.anchors:
            raise ValueError(
                f"`anchors` has {num_anchors} pictures; this server allows at most {self.anchors} for a video."
            )


def open_upload(path: str | Path, limits: Limits) -> PIL.Image.Image:
    """Opens an uploaded picture, or the first frame of an uploaded video, as an upright and opaque RGB image.

    Raises:
        `ValueError`: the file is too large, or is neither a picture nor a video.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > limits.upload_bytes:
            raise ValueError(f"has {size / 2**20:.0f} MiB, more than {limits.upload_bytes / 2**20:.0f}")
        pixels = _pixels(path)
        if pixels > limits.upload_pixels:
            raise ValueError(f"has {pixels / 1e6:.0f} million pixels, more than {limits.upload_pixels / 1e6:.0f}")
        return first_frame(path)
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        # Users see the file's name, and not its path on the server.
        reason = str(error).replace(str(path), "it").removeprefix("it ")
        # Nor do they see internal messages of a library.
        reason = reason.partition(": [Errno")[0]
        raise ValueError(
            f"The file {path.name!r:.80} cannot be used ({reason:.300}): give a PNG or JPEG file."
        ) from error


def _pixels(path: Path) -> int:
    """Returns the number of pixels of a picture, or of a video's frame, without decoding it."""
    try:
        with PIL.Image.open(path) as image:
            return image.width * image.height
    except (PIL.UnidentifiedImageError, SyntaxError):
        video = Video(path)
        return video.width * video.height
