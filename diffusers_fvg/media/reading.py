"""Reads videos as a player shows them: upright and with square pixels, with a time for each frame.

Shape legend: F frames, H and W height and width in pixels.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorTrc, Interpolation, VideoReformatter


# Longest comment that is read, in characters; a record has a few thousand.
MAX_COMMENT = 1_000_000
# Pixels per frame from which the decoder uses threads; for smaller frames, starting threads takes longer than decoding.
THREADS_FROM = 256 * 256
# Transfer functions of high dynamic range (ITU-R BT.2100); read as standard range, such a video is grey and dim.
HDR: dict[int, str] = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}
# Largest pixel aspect ratio; a larger number in a file is a mistake.
LARGEST_PIXEL_ASPECT = 16


class Video:
    """A video file with its size and the times of its frames; [`frames`] decodes selected frames.

    The size and the times come from the file's packets and its first frame; nothing else is decoded before [`frames`].

    Args:
        path (`str` or `Path`): the file.

    Attributes:
        height, width (`int`): size of the upright video in square pixels; pixels that are not square are enlarged.
        times (`np.ndarray` of shape `(F,)`): seconds from the first frame, ascending.
        frame_rate (`float`): mean number of frames per second; 0 for a single frame.

    Raises:
        `ValueError`: the file is not a video, is damaged, has high dynamic range, is rotated by an angle that is not a multiple of
            90 degrees, or is an animated WebP or AVIF, which [`~animate.frames.open_frames`] reads. The message continues a
            sentence that begins with the file's name.
        `OSError`: the file does not exist.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        _refuse_animated(self.path)
        with _opened(self.path) as (container, stream):
            stream.thread_count = 1
            ticks: list[int | None] = []
            first: av.VideoFrame | None = None
            for packet in container.demux(stream):
                # The last packet, which is empty, flushes the decoder.
                if first is None:
                    first = next(iter(packet.decode()), None)
                # Packets are counted without decoding, except for those that an edit list discards.
                if packet.size and not packet.is_discard:
                    ticks.append(packet.pts)
            if first is None:
                raise ValueError(f"contains {len(ticks)} frames, none of which can be decoded")
            _refuse_hdr(first, stream)
            rate = float(stream.average_rate or 0)
            self._size, self._square = (first.width, first.height), _square_size(first, stream)
            time_base = float(stream.time_base or 0)
        self._turn = _turn(first)
        self.width, self.height = self._square[::-1] if self._turn[0] else self._square
        # Some containers have no times, or duplicate ones: the frames then follow each other at the mean rate.
        self._index: dict[int | None, int] | None = None
        known = sorted(tick for tick in ticks if tick is not None)
        if len(set(known)) == len(ticks):
            self._index = {tick: index for index, tick in enumerate(known)}
            self.times = (np.array(known) - known[0]) * time_base
        elif rate or len(ticks) == 1:
            self.times = np.arange(len(ticks)) / (rate or 1)
        else:
            raise ValueError(f"has {len(ticks)} frames without times")
        self.frame_rate = (rate or 1 / float(np.diff(self.times).mean())) if len(self.times) > 1 else 0.0

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Yields frames `(H, W, 3)`, uint8, in order; frames after the last requested one are not decoded.

        The last frame is yielded only after all frames that it depends on have been decoded without damage.

        Args:
            indices (`Sequence[int]`): indices in ascending order; an index may occur several times.

        Raises:
            `ValueError`: a frame is damaged or missing.
        """
        wanted = iter(indices)
        want, held, missing = next(wanted, None), None, len(self.times)
        if want is None:
            return
        for index, frame in self._decoded(max(indices)):
            # After the last requested frame, the frames on which it depends are only checked.
            if want is not None and index > want:
                missing = want
                break
            while index == want:
                if held is not None:
                    yield held
                held, want = self._upright(frame, index), next(wanted, None)
        if want is not None:
            raise ValueError(f"can be decoded only up to frame {min(missing, want)} of {len(self.times)}")
        if held is not None:
            yield held

    def _decoded(self, last: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yields all frames up to index `last` and those on which it depends, with their indices."""
        with _opened(self.path) as (container, stream):
            if stream.width * stream.height < THREADS_FROM:
                stream.thread_count = 1
            else:
                stream.thread_type = "AUTO"
            count, given, awaited = -1, set(), None
            for packet in container.demux(stream):
                if awaited is None and packet.pts is not None and packet.size and not packet.is_discard:
                    given.add(packet.pts)
                for frame in packet.decode():
                    count += 1
                    index = count if self._index is None else self._index.get(frame.pts, count)
                    if frame.is_corrupt:
                        raise ValueError(
                            f"is damaged: frame {index} of {len(self.times)} cannot be decoded completely"
                        )
                    yield index, frame
                    given.discard(frame.pts)
                    if index >= last and awaited is None:
                        # A frame may depend on later ones, which the decoder has already received.
                        awaited = set(given)
                    if awaited is not None:
                        awaited.discard(frame.pts)
                if awaited is not None and not awaited:
                    return

    def _upright(self, frame: av.VideoFrame, index: int) -> np.ndarray:
        if (frame.width, frame.height) != self._size:
            before, now = "{}x{}".format(*self._size), f"{frame.width}x{frame.height}"
            raise ValueError(f"changes its size from {before} to {now} at frame {index}")
        width, height = self._square
        # One reformatter for all frames, instead of one per frame.
        if not hasattr(self, "_reformatter"):
            self._reformatter = VideoReformatter()
        options = {} if self._square == self._size else {"interpolation": Interpolation.BICUBIC}
        picture = self._reformatter.reformat(frame, width, height, format="rgb24", **options).to_ndarray()
        swapped, rows, columns = self._turn
        if swapped:
            picture = picture.swapaxes(0, 1)
        return np.ascontiguousarray(picture[::rows, ::columns])


def read_video(path: str | Path) -> tuple[np.ndarray, float]:
    """Returns all frames of a video, `(F, H, W, 3)` uint8, upright and with square pixels, and its mean frame rate.

    Raises:
        `ValueError`: the file is not a video, or as in [`Video`].
    """
    try:
        video = Video(path)
        return np.stack(list(video.frames(range(len(video.times))))), video.frame_rate
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


def read_video_metadata(path: str | Path) -> dict[str, Any]:
    """Returns the `metadata` with which [`~media.writing.write_video`] wrote an mp4.

    Raises:
        `ValueError`: the file is not an mp4, or another program wrote it.
    """
    try:
        # Only mp4: a playlist with this name would make FFmpeg read other files.
        with _opened(path, "mp4") as (container, _):
            comment = container.metadata.get("comment", "")
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    try:
        metadata = json.loads(comment) if len(comment) <= MAX_COMMENT else None
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise ValueError(f"{path} contains no generation metadata: its comment is {comment[:80]!r}")
    return metadata


def _refuse_animated(path: Path) -> None:
    """Raises `ValueError` for an animated WebP, which FFmpeg cannot decode, or AVIF, of which it decodes one frame."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        head = file.read(21)
    # The animation bit of the extended header: developers.google.com/speed/webp/docs/riff_container.
    is_webp = head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and head[20:] and head[20] & 2
    kind = "WebP" if is_webp else "AVIF" if head[4:12] == b"ftypavis" else None
    if kind is not None:
        raise ValueError(
            f"is an animated {kind}, which is a picture file and not a video: save its frames as an mp4 file"
        )


def _refuse_hdr(frame: av.VideoFrame, stream: av.VideoStream) -> None:
    for transfer in (frame.color_trc, stream.codec_context.color_trc):
        if transfer in HDR:
            raise ValueError(
                f"has high dynamic range ({HDR[transfer]}), and its colours would become grey; convert it to standard range, for "
                "example with FFmpeg's filters zscale and tonemap"
            )


def _square_size(frame: av.VideoFrame, stream: av.VideoStream) -> tuple[int, int]:
    """Returns the stored width and height in square pixels, enlarging the shorter side of a pixel."""
    aspect = stream.sample_aspect_ratio or 1
    if not 1 / LARGEST_PIXEL_ASPECT <= aspect <= LARGEST_PIXEL_ASPECT:
        raise ValueError(f"has pixels whose width is {aspect} times their height, which is a mistake in the file")
    if aspect >= 1:
        return round(frame.width * aspect), frame.height
    return frame.width, round(frame.height / aspect)


def _turn(frame: av.VideoFrame) -> tuple[bool, int, int]:
    """Returns how to make a stored frame upright: whether to swap rows and columns, then the steps (1 or -1) through both.

    The display matrix maps a stored pixel `(p, q)` to `(a p + c q + x, b p + d q + y)` (FFmpeg, `libavutil/display.h`).
    """
    matrix: Any
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # The frame also has side data that PyAV does not know.
        matrix = None
    if matrix is None:
        a, b, c, d = {0: (1, 0, 0, 1), 90: (0, -1, 1, 0), -90: (0, 1, -1, 0)}.get(frame.rotation, (-1, 0, 0, -1))
        if frame.rotation not in (0, 90, -90, 180, -180):
            raise ValueError(
                f"is rotated by {frame.rotation} degrees, which is not a multiple of 90: rotate its pixels"
            )
    else:
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5] / (1 << 16)
    if b == c == 0 and a and d:
        return False, int(np.sign(d)), int(np.sign(a))
    if a == d == 0 and b and c:
        return True, int(np.sign(b)), int(np.sign(c))
    raise ValueError(f"is rotated by {frame.rotation} degrees, which is not a multiple of 90: rotate its pixels")


@contextlib.contextmanager
def _opened(
    path: str | Path, file_format: str | None = None
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    try:
        with av.open(str(path), format=file_format) as container:
            if not container.streams.video:
                raise ValueError("contains no video")
            yield container, container.streams.video[0]
    except av.error.FileNotFoundError:
        raise
    except av.error.FFmpegError as error:
        # Some FFmpeg errors are neither a `ValueError` nor an `OSError`.
        raise ValueError(f"is not a video, or is damaged; it cannot be decoded: {error}") from error
