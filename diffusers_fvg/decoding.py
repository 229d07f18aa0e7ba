# Kept for one release: this module is now `animate.decoding`.
from .animate.decoding import decode_chunks, decode_frames, decode_video, to_uint8  # noqa: F401
