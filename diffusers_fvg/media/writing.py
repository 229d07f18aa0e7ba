"""Writes videos and contact strips; [`reading`] reads them.

Shape legend: F frames, H and W height and width in pixels, C colour channels.
"""

import io
import itertools
import json
import math
import numbers
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias

import av
import numpy as np
import torch
from av.bitstream import BitStreamFilterContext
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image, ImageDraw, ImageFont

from ..atomic import replacing


Frames: TypeAlias = np.ndarray | torch.Tensor | list[Image.Image]

# Quality on x264's scale from 0 to 51: visually lossless for photographs, and within a few levels for flat coloured shapes.
CRF = 15
# Pixels per frame from which the encoder uses threads; for smaller frames, starting threads takes longer than encoding.
THREADS_FROM = 256 * 256

# More than any player supports.
MAX_FRAME_RATE, MAX_SCALE = 1000, 256

TILE_SIZE = 192
MARGIN, GAP, BORDER = 28, 14, 4
BACKGROUND, INK, FAINT, EDGE, ACCENT = "#ffffff", "#1b1f24", "#6a737d", "#d0d7de", "#d9480f"


def frames_to_uint8(frames: Frames) -> np.ndarray:
    """Converts frames in any supported form to one array.

    Args:
        frames (`np.ndarray` of shape `(F, H, W, 3)`, uint8 or float in [0, 1]; `torch.Tensor` of shape `(F, 3, H, W)`,
            float in [0, 1]; or `list[PIL.Image.Image]` of one size): at least one frame.

    Returns:
        `np.ndarray` of shape `(F, H, W, 3)`, uint8.

    Raises:
        `ValueError`: the shape is another, values are out of range, or pictures differ in size.
    """
    if isinstance(frames, torch.Tensor):
        if not frames.is_floating_point() or frames.ndim != 4:
            raise ValueError(
                f"a tensor of frames must be float of shape (F, 3, H, W), but is {frames.dtype} of shape {tuple(frames.shape)}"
            )
        frames = frames.detach().cpu().float().permute(0, 2, 3, 1).numpy()
    elif not isinstance(frames, np.ndarray):
        if not isinstance(frames, Sequence) or not all(isinstance(image, Image.Image) for image in frames):
            raise ValueError(
                f"frames must be an array, a tensor or a list of pictures, but are a {type(frames).__name__}"
            )
        sizes = sorted({image.size for image in frames})
        if len(sizes) != 1:
            raise ValueError(
                f"frames must be at least one and have one size, but have the sizes {sizes}: resize them first"
            )
        frames = np.stack([np.asarray(image.convert("RGB")) for image in frames])
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(
            f"frames must have the shape (F, H, W, 3), or (F, 3, H, W) for a tensor, with no side 0, but have {frames.shape}"
        )
    if frames.dtype == np.uint8:
        return frames
    if not np.issubdtype(frames.dtype, np.floating):
        raise ValueError(f"frames must be uint8, or float in [0, 1], but are {frames.dtype}")
    low, high = float(frames.min()), float(frames.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"float frames must be in [0, 1], but are in [{low:.4g}, {high:.4g}]: rescale or clamp them")
    return np.round(frames * 255).astype(np.uint8)


def viewing_scale(height: int) -> int:
    """Returns the `scale` for [`write_video`] that enlarges a small video for players; a whole factor keeps edges sharp."""
    return max(1, 384 // height)


def write_video(
    path: str | Path,
    frames: Frames | Iterator[np.ndarray],
    frame_rate: float,
    metadata: dict[str, Any] | None = None,
    scale: int = 1,
    audio: np.ndarray | torch.Tensor | None = None,
    audio_sampling_rate: int | None = None,
) -> None:
    """Writes an mp4 that plays everywhere: H.264, 4:2:0, BT.709, constant frame rate, index at the front.

    The file is written completely or not at all; missing folders are created. Apart from `metadata`, the file contains no
    information about the programs or the machine that wrote it.

    Args:
        path (`str` or `Path`): file to write, ending in `.mp4`.
        frames (see [`frames_to_uint8`], or an iterator of `np.ndarray` of shape `(H, W, 3)`): frames of the video. From an
            iterator, such as [`~animate.decoding.decode_frames`], the next frame is taken when the one before is written.
        frame_rate (`float`): frames per second, in (0, 1000].
        metadata (`dict`, *optional*): values that JSON can hold, stored as the file's comment, such as a video's record
            (`out.records[0]`); its `"prompt"` also becomes the title. [`~media.reading.read_video_metadata`] reads it.
        scale (`int`, *optional*): factor by which pixels are enlarged to squares, because players blur small videos; 1 to 256.
        audio (`np.ndarray` or `torch.Tensor` of shape `(1 or 2, samples)`, *optional*): sound track, float in [-1, 1],
            written as AAC.
        audio_sampling_rate (`int`, *optional*): samples per second of `audio`.

    Raises:
        `ValueError`: the frames or the sound are not valid, the height or width is odd, the file type is another, or the frame
            rate or scale is out of range.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise ValueError(
            f"`path` must end in .mp4 for a video, but is {path.name!r}: use {path.with_suffix('.mp4').name!r}"
        )
    is_rate = isinstance(frame_rate, numbers.Real) and not isinstance(frame_rate, bool)
    if not is_rate or not 0 < frame_rate <= MAX_FRAME_RATE:
        raise ValueError(
            f"`frame_rate={frame_rate!r}` must be above 0 and at most {MAX_FRAME_RATE}: pass frames per second, for example 24"
        )
    if isinstance(scale, bool) or not isinstance(scale, numbers.Integral) or not 1 <= scale <= MAX_SCALE:
        raise ValueError(f"`scale={scale!r}` must be a whole number from 1 to {MAX_SCALE}")
    frames = _one_size(frames) if isinstance(frames, Iterator) else iter(frames_to_uint8(frames))
    first = next(frames)
    height, width = first.shape[0] * scale, first.shape[1] * scale
    if height % 2 or width % 2:
        raise ValueError(
            f"H.264 needs an even height and width, but the frames are {height}x{width}: "
            f"crop to {height - height % 2}x{width - width % 2} or pass scale={2 * scale}"
        )

    sound = None if audio is None else _sound(audio, audio_sampling_rate)
    tags = {} if metadata is None else {"comment": json.dumps(metadata, ensure_ascii=False)}
    if metadata and metadata.get("prompt") is not None:
        tags["title"] = str(metadata["prompt"])
    with (
        replacing(path) as draft,
        # Bit-exact mode omits the muxer's name and version.
        av.open(str(draft), "w", format="mp4", options={"movflags": "faststart", "fflags": "+bitexact"}) as container,
    ):
        container.metadata.update(tags)
        stream = container.add_stream("libx264", rate=Fraction(frame_rate).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": str(CRF)}
        # Without these tags, players guess the colour space from the height, and reds and greens shift.
        context = stream.codec_context
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        if sound is not None:
            # All streams must exist before the first packet; the container sorts packets by time. Bit-exact mode keeps the
            # encoder's name and version out of the first packet.
            options = {"flags": "+bitexact"}
            track = container.add_stream("aac", rate=sound.sample_rate, layout=sound.layout.name, options=options)
            container.mux(track.encode(sound))
            container.mux(track.encode())
        # Removes units of type 6, in which x264 writes its version, its settings and the machine's number of threads.
        plain = BitStreamFilterContext("filter_units=remove_types=6", stream)
        for frame in itertools.chain([first], frames):
            enlarged = frame.repeat(scale, axis=0).repeat(scale, axis=1)
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(enlarged), format="rgb24")
            picture = picture.reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            for packet in stream.encode(picture):
                container.mux(plain.filter(packet))
        for packet in stream.encode():
            container.mux(plain.filter(packet))
        container.mux(plain.filter(None))


def _sound(audio: np.ndarray | torch.Tensor, sampling_rate: int | None) -> av.AudioFrame:
    samples = np.asarray(audio.detach().cpu().float() if isinstance(audio, torch.Tensor) else audio, dtype=np.float32)
    if samples.ndim != 2 or len(samples) not in (1, 2) or not np.isfinite(samples).all():
        raise ValueError(f"`audio` must have the shape (1 or 2, samples) and finite values, but has {samples.shape}")
    if not isinstance(sampling_rate, int) or sampling_rate <= 0:
        raise ValueError(
            f"`audio_sampling_rate={sampling_rate!r}` must be a number of samples per second: pass that of the vocoder"
        )
    layout = "mono" if len(samples) == 1 else "stereo"
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
    frame.sample_rate = sampling_rate
    return frame


def _one_size(frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Yields frames as uint8, each checked when it is taken from the iterator."""
    size = None
    for frame in frames:
        (frame,) = frames_to_uint8(np.asarray(frame)[None])
        size = size or frame.shape
        if frame.shape != size:
            raise ValueError(f"frames must have one size, but {frame.shape} comes after {size}: resize them first")
        yield frame
    if size is None:
        raise ValueError("frames must be at least one, but the iterator had none")


def lossless_video(frames: np.ndarray, frame_rate: float) -> bytes:
    """Returns frames `(F, H, W, 3)`, uint8, as the bytes of a lossless mp4: H.264 in RGB with quantiser 0.

    Few players support it: it is meant for training and for conversion to other formats. [`write_video`] writes for players.
    """
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264rgb", rate=Fraction(frame_rate).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.options = "rgb24", {"qp": "0", "preset": "ultrafast"}
        if frames.shape[1] * frames.shape[2] < THREADS_FROM:
            stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def write_strip(
    path: str | Path,
    prompt: str,
    first_frame_prompt: str | Sequence[str] | None,
    anchor: Image.Image | Sequence[Image.Image] | None,
    frames: Frames,
    num_frames_shown: int = 6,
) -> None:
    """Writes a PNG with the prompt, the first-frame prompt, the anchor, and frames of one video with their indices.

    Args:
        path (`str` or `Path`): file to write, ending in `.png`.
        prompt (`str`): prompt of the video.
        first_frame_prompt (`str` or `Sequence[str]`, *optional*): caption of the first frame, or captions of several moments in
            order.
        anchor (`PIL.Image.Image` or `Sequence[PIL.Image.Image]`, *optional*): anchors, drawn at the left with a border and an
            arrow to the frames.
        frames (see [`frames_to_uint8`]): frames of the video.
        num_frames_shown (`int`, *optional*): number of evenly spaced frames to show, with the first and the last; a shorter
            video is shown completely.

    Raises:
        `ValueError`: the frames are not valid, the file type is another, or `num_frames_shown` is below 1.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"`path={path.name!r}` must end in .png for a strip: use {path.with_suffix('.png').name!r}")
    if num_frames_shown < 1:
        raise ValueError(f"`num_frames_shown={num_frames_shown}` must be at least 1")
    frames = frames_to_uint8(frames)
    shown = np.linspace(0, len(frames) - 1, min(num_frames_shown, len(frames))).round().astype(int)
    tiles = [_tile(Image.fromarray(frames[index])) for index in shown]
    anchors = [] if anchor is None else [anchor] if isinstance(anchor, Image.Image) else anchor
    anchor_tiles = [_tile(image.convert("RGB")) for image in anchors]

    # The arrow between anchors and video is as wide as two gaps.
    left = MARGIN + sum(tile.width + GAP for tile in anchor_tiles) + (3 * GAP if anchor_tiles else 0)
    width = max(left + sum(tile.width + GAP for tile in tiles) - GAP + MARGIN, 4 * TILE_SIZE)
    # Pages show strips about 900 pixels wide, where text of 1/60 of the width has 15 pixels.
    font, small = (_font(max(minimum, width // part)) for minimum, part in ((16, 60), (14, 72)))
    line_height = round(font.size * 1.4)
    texts = [("prompt", prompt)]
    if first_frame_prompt is not None:
        moments = [first_frame_prompt] if isinstance(first_frame_prompt, str) else first_frame_prompt
        labels = ["first frame", *(f"moment {number}" for number in range(2, len(moments) + 1))]
        texts += zip(labels, moments, strict=True)
    indent = MARGIN + math.ceil(max(font.getlength(label) for label, _ in texts)) + 2 * GAP
    captions = [(label, _wrapped(text, font, width - indent - MARGIN)) for label, text in texts]

    text_height = sum(len(lines) * line_height + GAP for _, lines in captions)
    row_top = MARGIN + text_height + GAP
    row_height = max(tile.height for tile in [*tiles, *anchor_tiles])
    height = row_top + row_height + GAP + line_height + MARGIN // 2
    strip = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(strip)

    y = MARGIN
    for label, lines in captions:
        draw.text((MARGIN, y), label, fill=FAINT, font=font)
        draw.multiline_text((indent, y), "\n".join(lines), fill=INK, font=font, spacing=line_height - font.size)
        y += len(lines) * line_height + GAP

    def place(tile: Image.Image, x: int, label: str, colour: str, border: int) -> None:
        y = row_top + (row_height - tile.height) // 2
        frame = (x - border, y - border, x + tile.width + border - 1, y + tile.height + border - 1)
        draw.rectangle(frame, outline=colour, width=border)
        strip.paste(tile, (x, y))
        middle = (x + tile.width / 2, row_top + row_height + GAP)
        draw.text(middle, label, fill=colour if colour == ACCENT else FAINT, font=small, anchor="ma")

    x = MARGIN
    for tile in anchor_tiles:
        place(tile, x, "anchor", ACCENT, BORDER)
        x += tile.width + GAP
    if anchor_tiles:
        tip, middle = left - GAP - GAP // 2, row_top + row_height // 2
        draw.polygon([(tip - GAP, middle - GAP // 2), (tip - GAP, middle + GAP // 2), (tip, middle)], fill=ACCENT)
    x = left
    for index, tile in zip(shown, tiles, strict=True):
        place(tile, x, f"frame {index}", EDGE, 1)
        x += tile.width + GAP
    with replacing(path) as draft:
        strip.save(draft, format="PNG")


def _tile(image: Image.Image) -> Image.Image:
    """Returns a picture whose longer side is `TILE_SIZE` or just above: enlarged by a whole factor, or reduced smoothly."""
    longer = max(image.size)
    if longer > TILE_SIZE:
        size = [max(1, round(side * TILE_SIZE / longer)) for side in image.size]
        return image.resize(size, Image.Resampling.LANCZOS)
    factor = math.ceil(TILE_SIZE / longer)
    return image.resize([side * factor for side in image.size], Image.Resampling.NEAREST)


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's wheels contain FreeType.
    return font


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Breaks text into lines of at most `width` pixels; a word wider than a line is broken, too."""
    lines = [""]
    for word in text.split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
