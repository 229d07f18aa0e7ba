"""Videos and strips of frames on disk: reading and writing."""

from .reading import Video, read_video, read_video_metadata
from .writing import Frames, frames_to_uint8, viewing_scale, write_strip, write_video


__all__ = [
    "Frames",
    "Video",
    "frames_to_uint8",
    "read_video",
    "read_video_metadata",
    "viewing_scale",
    "write_strip",
    "write_video",
]
