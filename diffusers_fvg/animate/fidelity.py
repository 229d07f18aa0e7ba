"""Measures how well a decoded video keeps its anchors (colour difference, low-frequency drift), and corrects its colours.

A video VAE does not reconstruct an image exactly: frame 0, or the frames after it, may have a colour cast.
`anchor_decode="match"` corrects the frames to the colours of the anchor; `"replace"` also replaces anchored frames by the
anchor images.

Frames are sRGB, `(F, H, W, 3)`, in [0, 1] or uint8: F frames, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import PIL.Image
import torch

from .anchor import Anchor, fit_picture, pictures_of


ANCHOR_DECODES = ("raw", "match", "replace")
# Low-frequency means averages over cells, this many along the shorter side. They hide texture and the blur of a VAE.
CELLS = 16
# Contrasts below two of 255 levels do not determine the gain of a colour cast.
FLAT = 2 / 255
# A frame still shows the anchor's scene, after a frame or two of motion, if their low frequencies correlate better than this.
SAME_PICTURE = 0.9

Frames: TypeAlias = np.ndarray | torch.Tensor


# -- measures ---------------------------------------------------------------------------------------------------------

# sRGB to XYZ under D65 (IEC 61966-2-1).
_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def srgb_to_lab(pixels: np.ndarray) -> np.ndarray:
    """Converts sRGB pixels `(..., 3)` in [0, 1] to CIELAB (D65); white is exactly (100, 0, 0)."""
    pixels = np.asarray(pixels, dtype=np.float64)
    linear = np.where(pixels <= 0.04045, pixels / 12.92, ((pixels + 0.055) / 1.055) ** 2.4)
    ratio = linear @ (_TO_XYZ / _TO_XYZ.sum(axis=1, keepdims=True)).T
    x, y, z = np.moveaxis(np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio * (29 / 6) ** 2 / 3 + 4 / 29), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def delta_e_2000(lab_1: np.ndarray, lab_2: np.ndarray) -> np.ndarray:
    """Returns the CIEDE2000 colour difference with all weights 1; a difference of 1 is just noticeable.

    Source: Sharma, Wu, Dalal: The CIEDE2000 color-difference formula, Color Research and Application 30(1), 2005,
    equations 2 to 22.

    Args:
        lab_1, lab_2 (`np.ndarray` of shape `(..., 3)`): CIELAB, broadcast against each other.

    Returns:
        `np.ndarray` of shape `(...)`.
    """
    (l_1, a_1, b_1), (l_2, a_2, b_2) = (
        np.moveaxis(np.asarray(lab, dtype=np.float64), -1, 0) for lab in (lab_1, lab_2)
    )

    def chroma_share(chroma):
        return np.sqrt(chroma**7 / (chroma**7 + 25.0**7))

    stretch = 1.5 - 0.5 * chroma_share((np.hypot(a_1, b_1) + np.hypot(a_2, b_2)) / 2)
    c_1, c_2 = np.hypot(stretch * a_1, b_1), np.hypot(stretch * a_2, b_2)
    h_1, h_2 = (np.degrees(np.arctan2(b, stretch * a)) % 360 for a, b in ((a_1, b_1), (a_2, b_2)))

    # Grey has no hue (0 here), so the mean is the hue of the other colour.
    grey = c_1 * c_2 == 0
    turn, total = h_2 - h_1, h_1 + h_2
    apart = np.abs(turn) > 180
    turn = turn - np.where(apart, 360 * np.sign(turn), 0)
    hue = np.where(grey, total, (total + np.where(apart, np.where(total < 360, 360, -360), 0)) / 2)
    # Grey has chroma 0, so `d_h` is 0.
    d_l, d_c, d_h = l_2 - l_1, c_2 - c_1, 2 * np.sqrt(c_1 * c_2) * np.sin(np.radians(turn / 2))
    light, chroma = (l_1 + l_2) / 2, (c_1 + c_2) / 2

    weight = (
        1
        - 0.17 * np.cos(np.radians(hue - 30))
        + 0.24 * np.cos(np.radians(2 * hue))
        + 0.32 * np.cos(np.radians(3 * hue + 6))
        - 0.20 * np.cos(np.radians(4 * hue - 63))
    )
    s_l = 1 + 0.015 * (light - 50) ** 2 / np.sqrt(20 + (light - 50) ** 2)
    s_c, s_h = 1 + 0.045 * chroma, 1 + 0.015 * chroma * weight
    rotation = np.radians(60 * np.exp(-(((hue - 275) / 25) ** 2)))
    cross = -np.sin(rotation) * 2 * chroma_share(chroma) * (d_c / s_c) * (d_h / s_h)
    return np.sqrt((d_l / s_l) ** 2 + (d_c / s_c) ** 2 + (d_h / s_h) ** 2 + cross)


def colour_shift(frames: Frames, picture: Frames) -> np.ndarray:
    """Returns the mean CIEDE2000 difference of each frame from the anchor image `(H, W, 3)`: shape `(F,)`."""
    wanted = srgb_to_lab(_tensor(picture).cpu().numpy())
    return np.array([delta_e_2000(srgb_to_lab(_tensor(frame).cpu().numpy()), wanted).mean() for frame in frames])


def low_frequency_drift(frames: Frames, picture: Frames) -> np.ndarray:
    """Returns the RMS difference of each frame from the anchor image, both averaged over cells: shape `(F,)`, in [0, 1]."""
    wanted = _cells(_tensor(picture))
    return np.array([float((_cells(_tensor(frame)) - wanted).square().mean().sqrt()) for frame in frames])


# -- corrections ------------------------------------------------------------------------------------------------------


def colour_corrections(frames: Frames, anchored: Mapping[int, Frames]) -> torch.Tensor:
    """Returns gain and offset, for each frame and channel, that correct the video to the colours of its anchors.

    An anchored frame gets the mean and contrast of its anchor image, per channel. The correction of the other frames is
    measured on the frame next to the anchor, because a cast may affect only the anchored frame or only the frames after it.
    If that frame no longer shows the anchor's scene, the correction of the anchored frame is used. Between two anchors, the
    correction changes linearly; before the first and after the last anchor it is constant.

    Args:
        frames (`np.ndarray` or `torch.Tensor` of shape `(F, H, W, 3)`): in [0, 1].
        anchored (`Mapping[int, Frames]`): frame index -> anchor image `(H, W, 3)` in [0, 1]; at least one.

    Returns:
        `torch.Tensor` of shape `(F, 2, 3)`, float32.
    """
    count, given = len(frames), sorted(anchored)
    result = torch.empty(count, 2, 3)
    for index in given:
        result[index] = _match(frames[index], anchored[index])[0]
    for left, right in zip([None, *given], [*given, None]):
        free = range(0 if left is None else left + 1, count if right is None else right)
        if not free:
            continue
        ends = []
        for anchor, beside in ((left, free[0]), (right, free[-1])):
            if anchor is not None:
                found, correlation = _match(frames[beside], anchored[anchor])
                ends.append(found if correlation > SAME_PICTURE else result[anchor])
        share = torch.linspace(0, 1, len(free)) if len(free) > 1 else torch.tensor([0.5])
        result[free.start : free.stop] = ends[0] + share[:, None, None] * (ends[-1] - ends[0])
    return result


def correct_frames(frames: Frames, anchored: Mapping[int, Frames], anchor_decode: str) -> None:
    """Corrects decoded frames towards their anchors in place, one at a time.

    Args:
        frames (`np.ndarray` or `torch.Tensor` of shape `(F, H, W, 3)`): float in [0, 1], or uint8.
        anchored (`Mapping[int, Frames]`): frame index -> anchor image `(H, W, 3)` in [0, 1]; at least one.
        anchor_decode (`str`): `"match"` corrects colours by [`colour_corrections`]. `"replace"` also replaces the anchored
            frames by the anchor images; without the correction, colours would jump there.
    """
    frames = torch.from_numpy(frames) if isinstance(frames, np.ndarray) else frames
    for index, (gain, offset) in enumerate(colour_corrections(frames, anchored).to(frames.device)):
        if anchor_decode == "replace" and index in anchored:
            frame = _tensor(anchored[index])
        else:
            frame = (_tensor(frames[index]) * gain + offset).clamp(0, 1)
        frames[index] = frame.to(frames) if frames.is_floating_point() else (frame * 255).round().to(frames)


def check_anchor_decode(anchor_decode: str, output_type: str) -> None:
    """Raises `ValueError` for an unknown `anchor_decode`, or one that has no effect on the output type."""
    if anchor_decode not in ANCHOR_DECODES:
        raise ValueError(f"Unknown `anchor_decode={anchor_decode!r}`; use one of {ANCHOR_DECODES}.")
    if anchor_decode != "raw" and output_type == "latent":
        raise ValueError(
            f'`anchor_decode={anchor_decode!r}` corrects decoded frames, but `output_type="latent"` decodes none; use '
            '`anchor_decode="raw"`.'
        )


def check_has_anchors(anchor_decode: str, is_anchored: bool) -> None:
    """Raises `ValueError` for a correction without anchors."""
    if anchor_decode != "raw" and not is_anchored:
        raise ValueError(
            f"`anchor_decode={anchor_decode!r}` corrects frames towards their anchors, but there is no anchor; give one or use "
            '`anchor_decode="raw"`.'
        )


def decode_anchored(
    decode: Callable[[str], Frames | list],
    anchors: Sequence[Sequence[Anchor]] | None,
    anchor_decode: str,
    output_type: str,
) -> Frames | list:
    """Decodes videos and corrects them as `anchor_decode` says: the frames that a pipeline returns.

    Args:
        decode (`Callable`): `decode(output_type)` returns the frames of all videos.
        anchors (`list[list[Anchor]]`): anchors of each video, already checked.
        anchor_decode (`str`): one of `ANCHOR_DECODES`.
        output_type (`str`): an output type that `decode` supports; it must also support `"uint8"`.
    """
    if anchor_decode == "raw" or anchors is None:
        return decode(output_type)
    videos = decode("uint8" if output_type == "pil" else output_type)
    for video, video_anchors in zip(videos, anchors):
        frames = video.permute(0, 2, 3, 1) if isinstance(video, torch.Tensor) else video
        if video_anchors:
            correct_frames(frames, anchored_pictures(video_anchors, *frames.shape[:3]), anchor_decode)
    return [[PIL.Image.fromarray(frame) for frame in video] for video in videos] if output_type == "pil" else videos


def anchored_pictures(anchors: Sequence[Anchor], num_frames: int, height: int, width: int) -> dict[int, torch.Tensor]:
    """Maps frame index to anchor image `(H, W, 3)` in [0, 1], scaled and cropped as it was for encoding."""
    return {
        anchor.frame_index % num_frames + offset: fit_picture(image, height, width).permute(1, 2, 0)
        for anchor in anchors
        for offset, image in enumerate(pictures_of(anchor.image))
    }


def _match(frame: Frames, picture: Frames) -> tuple[torch.Tensor, float]:
    """Returns gain and offset `(2, 3)` that give a frame the mean and contrast of an image, and their correlation."""
    seen, wanted = (_cells(_tensor(image)).flatten(1).cpu() for image in (frame, picture))
    seen_mean, wanted_mean = seen.mean(1), wanted.mean(1)
    contrasts = [values.var(1, correction=0) + FLAT**2 for values in (seen, wanted)]
    gain = (contrasts[1] / contrasts[0]).sqrt()
    together = ((seen - seen_mean[:, None]) * (wanted - wanted_mean[:, None])).mean(1) + FLAT**2
    correlation = together.sum() / (contrasts[0].sum() * contrasts[1].sum()).sqrt()
    return torch.stack([gain, wanted_mean - gain * seen_mean]), float(correlation)


def _cells(frame: torch.Tensor) -> torch.Tensor:
    """Averages `(H, W, 3)` over about `CELLS` by `CELLS` cells, to `(3, h, w)`."""
    height, width = frame.shape[:2]
    cell = max(1, min(height, width) // CELLS)
    return torch.nn.functional.adaptive_avg_pool2d(frame.permute(2, 0, 1), (height // cell, width // cell))


def _tensor(frame: Frames) -> torch.Tensor:
    """Returns a frame as floats in [0, 1]; integers are divided by 255."""
    frame = torch.as_tensor(frame)
    return frame.float() if frame.is_floating_point() else frame.float() / 255
