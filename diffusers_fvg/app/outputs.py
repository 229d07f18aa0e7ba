"""Converts a finished video to other formats, each when it is first requested."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..media import read_video, viewing_scale, write_animation, write_frames, write_strip
from .orders import FRAMES_FILE
from .worker import Job


# Format -> name of the file and its media type.
FORMS = {
    "mp4": ("video.mp4", "video/mp4"),
    "gif": ("video.gif", "image/gif"),
    "webp": ("video.webp", "image/webp"),
    "frames": ("frames.zip", "application/zip"),
    "strip": ("strip.png", "image/png"),
}

if TYPE_CHECKING:
    # For type checkers; the values come from this table.
    Form = str
else:
    Form = Literal[tuple(FORMS)]


def video_file(job: Job, form: str) -> Path:
    """Returns a file of a job with a video: the mp4, an animation, a ZIP of PNG frames, or a contact strip.

    Raises:
        `OSError`: the job's files have been deleted meanwhile.
    """
    name, _ = FORMS[form]
    result = job.result
    assert result is not None and result.video is not None
    file = result.video.with_name(name)
    if file.is_file() or form == "mp4":
        return file
    frames, frame_rate = read_video(result.video.with_name(FRAMES_FILE))
    if form == "frames":
        write_frames(file, frames)
    elif form == "strip":
        captions = [moment.caption for moment in result.moments] or result.caption
        write_strip(file, job.order.prompt, captions, [each.open() for each in result.anchors] or None, frames)
    else:
        write_animation(file, frames, frame_rate, scale=viewing_scale(frames.shape[1]))
    return file
