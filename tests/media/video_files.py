"""Video files as people have them: turned, of flat pixels, of uneven times, of high dynamic range, damaged."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


# Display matrices (ISO 14496-12, 8.3.2.3) as `a, b, c, d`, and what they make of `(H, W, 3)`.
TURNS = {
    "none": ((1, 0, 0, 1), lambda picture: picture),
    "clockwise": ((0, 1, -1, 0), lambda picture: np.rot90(picture, -1)),
    "counterclockwise": ((0, -1, 1, 0), lambda picture: np.rot90(picture)),
    "upside down": ((-1, 0, 0, -1), lambda picture: np.rot90(picture, 2)),
    "mirrored": ((-1, 0, 0, 1), lambda picture: picture[:, ::-1]),
    "mirrored and turned": ((0, 1, 1, 0), lambda picture: picture.swapaxes(0, 1)),
}


def corners(height: int = 32, width: int = 48) -> np.ndarray:
    """`(H, W, 3)` uint8 without symmetry: a bright block in one corner and a half-bright one beside it."""
    picture = np.full((height, width, 3), 30, np.uint8)
    picture[:8, :16] = 250
    picture[-8:, :16] = 140
    return picture


def write_file(
    path: Path,
    frames: np.ndarray,
    times: list[int] | None = None,
    time_base: Fraction = Fraction(1, 16000),
    aspect: Fraction | None = None,
    turn: str = "none",
    transfer: int | None = None,
    **options: str,
) -> Path:
    """Frames `(F, H, W, 3)`, uint8, in H.264 RGB without loss, at the given times."""
    options = {"qp": "0", "preset": "ultrafast"} | options
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=16)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "rgb24"
        context = stream.codec_context
        context.thread_count, context.options, context.time_base = 1, options, time_base
        if aspect is not None:
            context.sample_aspect_ratio = aspect
        if transfer is not None:
            context.color_trc = transfer
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = (1000 * index if times is None else times[index]), time_base
            if transfer is not None:
                frame.color_trc = transfer
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    content = bytearray(path.read_bytes())
    # Of a track header of version 0 the matrix comes 40 bytes after the type.
    start = content.index(b"tkhd") + 44
    a, b, c, d = TURNS[turn][0]
    content[start : start + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


def damage(path: str | Path, frame: int, share: tuple[float, float] = (0.3, 0.6)) -> Path:
    """Zeroes a part of the packet of a frame, by its place in the file."""
    path = Path(path)
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        start, size = packets[frame].pos, packets[frame].size
    content = bytearray(path.read_bytes())
    first, last = (start + int(part * size) for part in share)
    content[first:last] = bytes(last - first)
    path.write_bytes(content)
    return path
