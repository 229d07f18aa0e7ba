"""Writes videos and strips of frames. What reads them is [`reading`].

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

# Visually lossless for photographs (x264's own scale, 0 to 51); flat coloured shapes come back within a few levels.
CRF = 15
# Threads of the encoder take longer to start than frames of fewer pixels take to encode.
THREADS_FROM = 256 * 256

# Beyond any player.
MAX_FRAME_RATE, MAX_SCALE = 1000, 256

TILE_SIZE = 192
MARGIN, GAP, BORDER = 28, 14, 4
BACKGROUND, INK, FAINT, EDGE, ACCENT = "#ffffff", "#1b1f24", "#6a737d", "#d0d7de", "#d9480f"


def frames_to_uint8(frames: Frames) -> np.ndarray:
    """Any of the forms in which frames travel, as one array.

    Args:
        frames (`np.ndarray` of shape `(F, H, W, 3)`, uint8 or float in [0, 1]; `torch.Tensor` of shape `(F, 3, H, W)`,
            float in [0, 1]; or `list[PIL.Image.Image]` of one size): at least one frame.

    Returns:
        `np.ndarray` of shape `(F, H, W, 3)`, uint8.

    Raises:
        `ValueError`: another shape, values outside the range, pictures of different sizes.
    """
    if isinstance(frames, torch.Tensor):
        if not frames.is_floating_point() or frames.ndim != 4:
            raise ValueError(
                f"a tensor of frames is float of shape (F, 3, H, W), not {frames.dtype} of shape {tuple(frames.shape)}"
            )
        frames = frames.detach().cpu().float().permute(0, 2, 3, 1).numpy()
    elif not isinstance(frames, np.ndarray):
        if not isinstance(frames, Sequence) or not all(isinstance(image, Image.Image) for image in frames):
            raise ValueError(f"frames are an array, a tensor or a list of pictures, not a {type(frames).__name__}")
        sizes = sorted({image.size for image in frames})
        if len(sizes) != 1:
            raise ValueError(f"frames are one size and at least one, got the sizes {sizes}: resize them first")
        frames = np.stack([np.asarray(image.convert("RGB")) for image in frames])
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames have the shape (F, H, W, 3) with no side 0 (a tensor (F, 3, H, W)): {frames.shape}")
    if frames.dtype == np.uint8:
        return frames
    if not np.issubdtype(frames.dtype, np.floating):
        raise ValueError(f"frames are uint8, or float in [0, 1], not {frames.dtype}")
    low, high = float(frames.min()), float(frames.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"float frames are in [0, 1], these are in [{low:.4g}, {high:.4g}]: rescale or clamp them")
    return np.round(frames * 255).astype(np.uint8)


def viewing_scale(height: int) -> int:
    """The `scale` for [`write_video`] by which a video of few pixels is no stamp in a player: whole factors keep edges sharp."""
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

    The file appears whole or not at all; missing folders are made. It says nothing of the programs that wrote it and of this
    machine: what it tells beside the picture is `metadata`.

    Args:
        path (`str` or `Path`): the file, ending in `.mp4`.
        frames (see [`frames_to_uint8`], or an iterator of `np.ndarray` of shape `(H, W, 3)`): what to show. An iterator, such
            as [`~animate.decoding.decode_frames`], is asked for the next frame when the one before is written.
        frame_rate (`float`): frames per second.
        metadata (`dict`, *optional*): anything JSON holds, kept as the file's comment, such as a video's record
            (`out.records[0]`); its `"prompt"` is also the title.
            [`~media.reading.read_video_metadata`] gives it back.
        scale (`int`, *optional*): each pixel becomes a square of `scale` x `scale`, as players blur tiny videos.
        audio (`np.ndarray` or `torch.Tensor` of shape `(1 or 2, samples)`, *optional*): the sound track, float in [-1, 1],
            written as AAC.
        audio_sampling_rate (`int`, *optional*): samples per second; goes with `audio`.

    Raises:
        `ValueError`: bad frames or sound, an odd height or width, another file type, a frame rate or scale that is not positive.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"videos are written as .mp4, not {path.name!r}: use {path.with_suffix('.mp4').name!r}")
    is_rate = isinstance(frame_rate, numbers.Real) and not isinstance(frame_rate, bool)
    if not is_rate or not 0 < frame_rate <= MAX_FRAME_RATE:
        raise ValueError(
            f"frame_rate={frame_rate!r} is not positive and at most {MAX_FRAME_RATE}: pass frames per second, for example 24"
        )
    if isinstance(scale, bool) or not isinstance(scale, numbers.Integral) or not 1 <= scale <= MAX_SCALE:
        raise ValueError(f"scale={scale!r} is not a whole number from 1 to {MAX_SCALE}")
    frames = _one_size(frames) if isinstance(frames, Iterator) else iter(frames_to_uint8(frames))
    first = next(frames)
    height, width = first.shape[0] * scale, first.shape[1] * scale
    if height % 2 or width % 2:
        raise ValueError(
            f"H.264 needs an even height and width, not {height}x{width}: "
            f"crop to {height - height % 2}x{width - width % 2} or pass scale={2 * scale}"
        )

    sound = None if audio is None else _sound(audio, audio_sampling_rate)
    tags = {} if metadata is None else {"comment": json.dumps(metadata, ensure_ascii=False)}
    if metadata and metadata.get("prompt") is not None:
        tags["title"] = str(metadata["prompt"])
    with (
        replacing(path) as draft,
        # Bit-exact: without the muxer's name and version.
        av.open(str(draft), "w", format="mp4", options={"movflags": "faststart", "fflags": "+bitexact"}) as container,
    ):
        container.metadata.update(tags)
        stream = container.add_stream("libx264", rate=Fraction(frame_rate).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": str(CRF)}
        # Without these players guess the colour space from the height, and reds and greens shift.
        context = stream.codec_context
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        if sound is not None:
            # A stream is there before the first packet; the container puts packets in the order of time.
            # Bit-exact here too: the encoder writes its name and version into the first packet.
            options = {"flags": "+bitexact"}
            track = container.add_stream("aac", rate=sound.sample_rate, layout=sound.layout.name, options=options)
            container.mux(track.encode(sound))
            container.mux(track.encode())
        # x264 writes its version, its settings and the machine's number of threads into the stream, as a unit of type 6.
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
        raise ValueError(f"`audio` has the shape (1 or 2, samples) and finite values, not {samples.shape}")
    if not isinstance(sampling_rate, int) or sampling_rate <= 0:
        raise ValueError(
            f"`audio_sampling_rate={sampling_rate!r}` is no number of samples per second: pass the vocoder's"
        )
    layout = "mono" if len(samples) == 1 else "stereo"
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
    frame.sample_rate = sampling_rate
    return frame


def _one_size(frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Frames as uint8, each checked when it comes."""
    size = None
    for frame in frames:
        (frame,) = frames_to_uint8(np.asarray(frame)[None])
        size = size or frame.shape
        if frame.shape != size:
            raise ValueError(f"frames are one size, got {frame.shape} after {size}: resize them first")
        yield frame
    if size is None:
        raise ValueError("frames are at least one, and the iterator had none")


def lossless_video(frames: np.ndarray, frame_rate: float) -> bytes:
    """Frames `(F, H, W, 3)`, uint8, as an mp4 that decodes to the same numbers: H.264 in RGB at quantiser 0.

    Few players know it: it is for training, and for what is made of the frames later. [`write_video`] is for people.
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
    """Writes a PNG that tells the story of one video: prompt, first-frame prompt, anchor, frames with their index.

    Args:
        path (`str` or `Path`): the file, ending in `.png`.
        prompt (`str`): what was asked for.
        first_frame_prompt (`str` or `Sequence[str]`, *optional*): what the rewriter made of it, of several moments in order;
            left out where there was none.
        anchor (`PIL.Image.Image` or `Sequence[PIL.Image.Image]`, *optional*): drawn at the left, with a border and an arrow
            to the frames.
        frames (see [`frames_to_uint8`]): the video.
        num_frames_shown (`int`, *optional*): evenly spaced, the first and the last among them; all of a shorter video.

    Raises:
        `ValueError`: bad frames, another file type, no frame to show.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"strips are written as .png, not {path.name!r}: use {path.with_suffix('.png').name!r}")
    if num_frames_shown < 1:
        raise ValueError(f"num_frames_shown={num_frames_shown} leaves nothing to show: pass 1 or more")
    frames = frames_to_uint8(frames)
    shown = np.linspace(0, len(frames) - 1, min(num_frames_shown, len(frames))).round().astype(int)
    tiles = [_tile(Image.fromarray(frames[index])) for index in shown]
    anchors = [] if anchor is None else [anchor] if isinstance(anchor, Image.Image) else anchor
    anchor_tiles = [_tile(image.convert("RGB")) for image in anchors]

    # The arrow between anchors and video is as wide as two gaps.
    left = MARGIN + sum(tile.width + GAP for tile in anchor_tiles) + (3 * GAP if anchor_tiles else 0)
    width = max(left + sum(tile.width + GAP for tile in tiles) - GAP + MARGIN, 4 * TILE_SIZE)
    # Strips are shown some 900 pixels wide: text of 1/60 of the width is 15 pixels there.
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
    """The picture with its longer side at or just above `TILE_SIZE`: enlarged in whole steps, or reduced smoothly."""
    longer = max(image.size)
    if longer > TILE_SIZE:
        size = [max(1, round(side * TILE_SIZE / longer)) for side in image.size]
        return image.resize(size, Image.Resampling.LANCZOS)
    factor = math.ceil(TILE_SIZE / longer)
    return image.resize([side * factor for side in image.size], Image.Resampling.NEAREST)


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # With a size, and with FreeType, which Pillow's wheels have.
    return font


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines no wider than `width` pixels; a word wider than a line is broken."""
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
