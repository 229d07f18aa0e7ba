"""What a server grants, and what it refuses before a model runs."""

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
        pixels (`int`, *optional*): of a frame, height times width; four times the model's own when left out.
        frames (`int`, *optional*): of a video; four times the model's own when left out.
        steps (`int`): of the video model.
        pictures (`int`): drawn for a caption to choose among.
        anchors (`int`): pictures of one video that are uploaded.
        queue (`int`): jobs that wait.
        waiting (`int`): of one person's jobs those that wait or run.
        kept (`int`): of one person's finished jobs those that are kept, with their videos.
        people (`int`): whose jobs are kept; who has been away longest makes room.
        upload_bytes (`int`): of a file, or of a request.
        upload_pixels (`int`): of an uploaded picture.
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
        """With the model's own size in place of what was left out."""
        pixels, frames = defaults["height"] * defaults["width"], defaults["num_frames"]
        own = {"pixels": self.pixels or 4 * pixels, "frames": self.frames or 4 * (frames - 1) + 1}
        return Limits(**{**self.__dict__, **own})

    def check_size(self, height: int, width: int, num_frames: int, steps: int) -> None:
        """Raises `ValueError` for a video that is too large, too long or of too many steps for this server."""
        if self.pixels is not None and height * width > self.pixels:
            raise ValueError(
                f"{height} x {width} pixels are {height * width}, and this server makes videos of up to {self.pixels}: choose a "
                "smaller height or width."
            )
        if self.frames is not None and num_frames > self.frames:
            raise ValueError(f"`num_frames={num_frames}`: this server makes videos of up to {self.frames} frames.")
        if steps > self.steps:
            raise ValueError(f"`num_inference_steps={steps}`: this server takes up to {self.steps} steps.")

    def check_count(self, num_candidates: int, num_anchors: int) -> None:
        """Raises `ValueError` for more pictures than are drawn or taken."""
        if not 1 <= num_candidates <= self.pictures:
            raise ValueError(
                f"`num_candidates={num_candidates}` must be a number from 1 to {self.pictures}, the most on this server."
            )
        if num_anchors > self.anchors:
            raise ValueError(
                f"{num_anchors} anchors were given, and this server takes up to {self.anchors} for a video."
            )


def open_upload(path: str | Path, limits: Limits) -> PIL.Image.Image:
    """The picture in an uploaded file, or the first frame of the video in it, upright and opaque, RGB.

    Raises:
        `ValueError`: a file that is too large, or that is no picture and no video.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > limits.upload_bytes:
            raise ValueError(f"is of {size / 2**20:.0f} MiB, more than {limits.upload_bytes / 2**20:.0f}")
        pixels = _pixels(path)
        if pixels > limits.upload_pixels:
            raise ValueError(f"has {pixels / 1e6:.0f} million pixels, more than {limits.upload_pixels / 1e6:.0f}")
        return first_frame(path)
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        # Of a place on the server nobody needs to know more than the name.
        reason = str(error).replace(str(path), "it").removeprefix("it ")
        # Nor of what a library's function said to another.
        reason = reason.partition(": [Errno")[0]
        raise ValueError(
            f"The file {path.name!r:.80} cannot be used ({reason:.300}): give a PNG or JPEG file."
        ) from error


def _pixels(path: Path) -> int:
    """Of a picture, before any of it is decoded."""
    try:
        with PIL.Image.open(path) as image:
            return image.width * image.height
    except (PIL.UnidentifiedImageError, SyntaxError):
        video = Video(path)
        return video.width * video.height
