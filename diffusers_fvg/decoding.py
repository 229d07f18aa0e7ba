# For one release: this is `animate.decoding` now.
from .animate.decoding import decode_chunks, decode_frames, decode_video, to_uint8  # noqa: F401
