"""Reads and writes video files, animations and contact strips."""

from .animations import preview_webp, write_animation, write_frames
from .reading import Video, read_video, read_video_metadata
from .writing import Frames, frames_to_uint8, lossless_video, viewing_scale, write_strip, write_video


__all__ = [
    "Frames",
    "Video",
    "frames_to_uint8",
    "lossless_video",
    "preview_webp",
    "read_video",
    "read_video_metadata",
    "viewing_scale",
    "write_animation",
    "write_frames",
    "write_strip",
    "write_video",
]
