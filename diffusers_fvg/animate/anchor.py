"""Anchors: images and their positions in the video, checked, resized and encoded between stage 2 and stage 3.
[`animate.conditioning`] makes the input of the video model from them.

Shapes: B batch, C latent channels, F/H/W frames, height and width in pixels, f/h/w in latents. Wan's causal VAE encodes frame
0 as latent frame 0 and every further four frames as one latent frame, so f = 1 + (F - 1) / 4.

An image becomes an anchor in one of two forms, which the training of the anchor LoRA determines. `"slot"`: the image replaces
the latent frame that contains its frame, held still over the four frames of that latent frame (Factorized Video Generation).
`"appended"`: the image is an additional latent frame after those of the video, one frame long and with its exact position in
time (LTX-2). Frame 0 and runs of whole latent frames are exact in the video's own latent frames, and use them in both forms.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps
import torch
from diffusers.utils import logging

from ..checks import check_number
from ..devices import get_module_execution_device
from .conditioning import (
    AnchorLatents,
    anchor_noise,
    appended_anchors,
    encode_anchor,
    frame_position,
    latent_index,
)


logger = logging.get_logger(__name__)

FORMS = ("slot", "appended")

Picture: TypeAlias = PIL.Image.Image | np.ndarray | torch.Tensor

# Largest number of pixels of an image: where Pillow warns of a decompression bomb. As float32 RGB they take 1 GiB.
MAX_PICTURE = 1024 * 1024 * 1024 // 4 // 3
# A crop of more than this fraction of the image logs a warning: it may remove an object at the edge.
CROP_TOLD = 0.1


@dataclass(frozen=True)
class Anchor:
    """An image, or a short run of frames, at a given position in the video.

    Args:
        image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): the image: PIL, a `uint8` array (H, W, 3), a float array
            (H, W, 3) or tensor (3, H, W) in [0, 1]; read by [`picture_tensor`]. An image of another size than the video is
            scaled and centre-cropped, never stretched. A list of images, an array (F, H, W, 3) or a tensor (F, 3, H, W) is a
            run of frames, to continue an existing video. A run must cover whole latent frames: 4k + 1 frames starting at
            frame 0, or 4k frames starting at a frame 4j + 1.
        frame_index (`int`, *optional*): frame of the image, or of the first image of a run. 0 is the first frame of the
            decoded video, -1 the last.
        strength (`float`, *optional*): in (0, 1]. At 1 the frame is fixed: it is clean, with timestep 0. Below 1 it gets
            `1 - strength` of the video's noise level and timestep, so that the video may deviate from it.

    Raises:
        `ValueError`: `frame_index` is not a whole number, or `strength` is not a finite number. The call checks whether they
            fit the video.
    """

    image: Picture | Sequence[Picture]
    frame_index: int = 0
    strength: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.frame_index, bool) or not isinstance(self.frame_index, numbers.Integral):
            raise ValueError(f"An anchor's `frame_index={self.frame_index!r}` must be a whole number.")
        check_number("strength", self.strength)
        if self.strength is None:
            raise ValueError("An anchor's `strength=None` must be a number in (0, 1].")
        object.__setattr__(self, "strength", float(self.strength))


def pictures_of(image: Picture | Sequence[Picture]) -> list[Picture]:
    """Returns the images of an anchor in time order: one, or those of a run."""
    several = isinstance(image, (list, tuple)) or (isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim == 4)
    pictures: Any = image
    return list(pictures) if several else [pictures]


def pair_anchors(anchors, num_prompts: int, num_videos_per_prompt: int) -> list[list[Anchor]]:
    """Returns one list of anchors for each video, from an anchor or a list for all, or from lists per prompt or per video.

    If some videos have anchors, the lists of others may be empty.

    Raises:
        `ValueError`: there is no anchor at all, the number of lists does not fit, or an item is not an [`Anchor`].
    """
    if not isinstance(anchors, (Anchor, Iterable)):
        raise ValueError(f"`anchors` must be an `Anchor` or a list of them, but is a {type(anchors).__name__}.")
    anchors = [anchors] if isinstance(anchors, Anchor) else list(anchors)
    if not any(isinstance(item, Anchor) or item for item in anchors):
        raise ValueError(
            f"`anchors={anchors!r}` holds no anchor; leave it out to have the composer draw one, or for plain text-to-video."
        )
    for item in anchors:
        members = item if isinstance(item, (list, tuple)) else [item]
        wrong = [type(member).__name__ for member in members if not isinstance(member, Anchor)]
        if wrong:
            raise ValueError(
                f"`anchors` must hold `Anchor`s or lists of them, but holds {wrong[0]}; use `Anchor(image)`."
            )
    num_videos = num_prompts * num_videos_per_prompt
    if all(isinstance(item, Anchor) for item in anchors):
        return [anchors] * num_videos
    if len(anchors) == num_videos:
        return [list(item) for item in anchors]
    if len(anchors) == num_prompts:
        return [list(item) for item in anchors for _ in range(num_videos_per_prompt)]
    raise ValueError(
        f"`anchors` has {len(anchors)} lists for {num_prompts} prompts and {num_videos} videos; give one list for all, one "
        "per prompt or one per video."
    )


def decoded_anchors(anchors: list[list[Anchor]]) -> list[list[Anchor]]:
    """Returns the anchors of each video with images as tensors; anchors that share an image share its tensor.

    Raises:
        `ValueError`: as in [`picture_tensor`].
    """
    decoded: dict[int, Any] = {}
    for anchor in (anchor for video in anchors for anchor in video):
        if id(anchor.image) not in decoded:
            tensors = [picture_tensor(picture) for picture in pictures_of(anchor.image)]
            decoded[id(anchor.image)] = tensors if len(tensors) > 1 else tensors[0]
    return [[replace(anchor, image=decoded[id(anchor.image)]) for anchor in video] for video in anchors]


# -- images of any format and size to tensors of the video's size -----------------------------------------------------


def picture_tensor(image: Picture) -> torch.Tensor:
    """Returns an image as a tensor `(3, H, W)`, float32 in [0, 1].

    PIL images are rotated by their EXIF orientation, and 16-bit grey images keep their precision. Transparent pixels are
    blended with white, with a warning.

    Raises:
        `ValueError`: the image cannot be decoded, is animated, has another layout, or has values outside its range.
    """
    _check_picture_size(image)
    if isinstance(image, PIL.Image.Image):
        image = _pixels(image)
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(f"An anchor array must have shape (H, W, 3) or (F, H, W, 3), but has {image.shape}.")
        image = torch.tensor(_floats(image)).permute(2, 0, 1)
    if not isinstance(image, torch.Tensor):
        raise ValueError(f"An anchor image must be a PIL image, an array or a tensor, but is {type(image).__name__}.")
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"An anchor tensor must have shape (3, H, W) or (F, 3, H, W), but has {tuple(image.shape)}.")
    if 0 in image.shape:
        raise ValueError(f"An anchor image has no pixels: its shape is {tuple(image.shape)}.")
    if image.dtype == torch.uint8:
        return image.float() / 255
    if not image.is_floating_point():
        raise ValueError(f"Anchor values must be uint8, or float in [0, 1], but are {image.dtype}; convert them.")
    if not torch.isfinite(image).all() or image.min() < 0 or image.max() > 1:
        raise ValueError(
            f"Anchor values must be finite and lie in [0, 1], but range from {image.min():.3g} to {image.max():.3g}; scale "
            "them, or give whole numbers from 0 to 255 as uint8."
        )
    return image.float()


def _check_picture_size(image: Any) -> None:
    """Refuses an image that is too large, before it is decoded or copied."""
    sides = image.size if isinstance(image, PIL.Image.Image) else getattr(image, "shape", ())
    if isinstance(image, torch.Tensor) and (image.is_meta or image.layout != torch.strided):
        raise ValueError(
            f"An anchor tensor must be dense and hold values, but is on {image.device} with layout {image.layout}."
        )
    if math.prod(sides) > (MAX_PICTURE if isinstance(image, PIL.Image.Image) else 3 * MAX_PICTURE):
        raise ValueError(
            f"The anchor image has {' x '.join(map(str, sides))} values, more than {MAX_PICTURE:,} pixels: scale it down, as with "
            "`image.thumbnail((4096, 4096))`."
        )


def picture_image(image: Picture) -> PIL.Image.Image:
    """Returns an image, read by [`picture_tensor`], as an 8-bit RGB PIL image."""
    if isinstance(image, PIL.Image.Image):
        _check_picture_size(image)
        image = _pixels(image)
        if image.dtype == np.uint8:
            # An 8-bit image needs no conversion to [0, 1] and back, which takes seconds for a photograph.
            return PIL.Image.fromarray(image)
    return PIL.Image.fromarray((picture_tensor(image) * 255).round().byte().permute(1, 2, 0).numpy(force=True))


def fit_picture(image: Picture, height: int, width: int) -> torch.Tensor:
    """Scales an image until it covers `height` x `width`, crops the centre, and returns `(3, H, W)` in [0, 1].

    A crop of more than a tenth of the image logs a warning, once for each pair of sizes.

    Raises:
        `ValueError`: as in `picture_tensor`.
    """
    image = picture_tensor(image)
    _tell_of_crop(tuple(image.shape[1:]), (height, width))
    return cover(image, height, width)


def cover(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resizes the largest centred crop of `(3, H, W)` in [0, 1] to `height` x `width`: bicubic, with antialiasing."""
    if image.shape[1:] == (height, width):
        return image
    # Single float channels: the crop may have fractional pixels, and nothing is rounded between the two directions.
    fitted = (PIL.ImageOps.fit(PIL.Image.fromarray(plane), (width, height)) for plane in image.numpy(force=True))
    planes = [np.asarray(plane) for plane in fitted]
    return torch.from_numpy(np.stack(planes)).clamp(0, 1).to(image.device)


def crop_and_resize(image: Picture, height: int, width: int) -> torch.Tensor:
    """Returns [`fit_picture`] scaled for models: `(3, H, W)` in [-1, 1]."""
    return 2 * fit_picture(image, height, width) - 1


def _pixels(image: PIL.Image.Image) -> np.ndarray:
    """Decodes an image, upright and opaque, to an array `(H, W, 3)`."""
    try:
        # The further images that phones add to a JPEG (MPO) are previews or depth maps.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        if frames == 1:
            if image.format == "TIFF" and isinstance(image, PIL.ImageFile.ImageFile):
                # With a file name, Pillow maps uncompressed TIFFs into memory, with wrong sides for rotated ones.
                name, image.filename = image.filename, ""
                image.load()
                image.filename = name
            image.load()
            image = PIL.ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception as error:  # Decoders raise many classes of errors for damaged files.
        raise ValueError(f"The anchor image cannot be decoded ({error}); save it again as PNG or JPEG.") from error
    if frames > 1:
        raise ValueError(
            f"The anchor image is animated or has several pages, {frames} in all: choose one, with `image.seek(index)` and "
            "`image.copy()`, or pass several as a list, which is a run of frames."
        )
    if image.mode in ("I", "LAB", "La") or (image.mode.startswith("I;16") and image.has_transparency_data):
        raise ValueError(
            f"The anchor image has mode {image.mode}, whose value range or transparency is ambiguous; convert it to RGB or RGBA."
        )
    if image.mode == "F" or image.mode.startswith("I;16"):
        return np.repeat(np.asarray(image)[..., None], 3, axis=2)
    return np.asarray(_opaque(image).convert("RGB"))


def _opaque(image: PIL.Image.Image) -> PIL.Image.Image:
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    transparent = 1 - np.asarray(image.getchannel("A")).mean() / 255
    if transparent:
        logger.warning(f"The anchor image is transparent ({transparent:.1%} of it) and is blended with white.")
    return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)


def _floats(pixels: np.ndarray) -> np.ndarray:
    """Scales integer values of an array to [0, 1]; floats are not changed."""
    if pixels.dtype == np.uint8:
        return pixels / np.float32(255)
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2:
        if pixels.size and pixels.max() <= 255:
            raise ValueError(
                f"A 16-bit anchor has values up to 65535, but this one only up to {pixels.max()}, which would be black; if its "
                "values are 8-bit, convert it to uint8."
            )
        return pixels.astype(np.float32) / 65535
    if pixels.dtype.kind != "f":
        raise ValueError(
            f"Anchor values must be uint8 or uint16, or float in [0, 1], but are {pixels.dtype}; convert them."
        )
    return pixels.astype(np.float32)


@functools.cache
def _tell_of_crop(source: tuple[int, int], target: tuple[int, int]) -> None:
    """Warns of a large crop, once for each pair of sizes, as a run has many frames of one size."""
    across = (target[1] * source[0]) / (target[0] * source[1])
    lost = 1 - min(across, 1 / across)
    if lost > CROP_TOLD:
        where = "top and bottom" if across > 1 else "left and right"
        logger.warning(
            f"A picture of {source[0]} x {source[1]} (height x width) is cropped to the aspect ratio of {target[0]} x {target[1]}: "
            f"{lost:.0%} of it is lost at {where}."
        )


def anchor_pixels(anchor: Anchor, height: int, width: int) -> torch.Tensor:
    """Returns the images of an anchor as a tensor `(3, F, H, W)` in [-1, 1]."""
    return torch.stack([crop_and_resize(image, height, width) for image in pictures_of(anchor.image)], dim=1)


# -- positions in a video ---------------------------------------------------------------------------------------------


def is_appended(anchor: Anchor, num_frames: int) -> bool:
    """Returns whether the form `"appended"` appends this anchor: it is a single image and not at frame 0."""
    return anchor.frame_index % num_frames != 0 and len(pictures_of(anchor.image)) == 1


def covered_latents(anchor: Anchor, num_frames: int, temporal: int = 4) -> range:
    """Returns the latent frames that an anchor covers in a video of `num_frames` frames.

    Raises:
        `ValueError`: the anchor lies outside the video, or is a run that covers a latent frame only partly.
    """
    if not -num_frames <= anchor.frame_index < num_frames:
        raise ValueError(
            f"Anchor at `frame_index={anchor.frame_index}` lies outside the video of {num_frames} frames; use "
            f"{-num_frames} to {num_frames - 1}."
        )
    count, frame = len(pictures_of(anchor.image)), anchor.frame_index % num_frames
    first = latent_index(frame, temporal)
    if count == 1:
        return range(first, first + 1)
    run = f"A run of {count} frames at `frame_index={anchor.frame_index}` in a video of {num_frames} frames"
    alone = int(frame == 0)
    if not alone and (frame - 1) % temporal:
        starts = [1 + (first - 1) * temporal, 1 + first * temporal]
        # Negative if the caller's index is negative.
        starts = [start + anchor.frame_index - frame for start in starts if start < num_frames]
        raise ValueError(
            f"{run} begins within a latent frame, which covers {temporal} frames; nearest `frame_index`: "
            f"{' and '.join(map(str, starts))}."
        )
    longest = num_frames - frame
    if not 0 < count <= longest or (count - alone) % temporal:
        below = alone + (min(count, longest) - alone) // temporal * temporal
        counts = [fitting for fitting in (below, below + temporal) if 0 < fitting <= longest]
        raise ValueError(
            f"{run} must cover whole latent frames, {temporal}k{' + 1' * alone} frames that end within the video; nearest: "
            f"{' and '.join(map(str, counts))}."
        )
    return range(first, first + (count - alone) // temporal + alone)


def resolve_anchors(
    anchors: Sequence[Anchor], num_frames: int, temporal: int = 4, form: str = "slot"
) -> list[tuple[range, Anchor]]:
    """Checks the anchors of one video and returns pairs of covered latent frames and anchor, in time order.

    Args:
        anchors (`Sequence[Anchor]`): anchors of the video.
        num_frames (`int`): frames of the video.
        temporal (`int`, *optional*): frames per latent frame.
        form (`str`, *optional*): `"slot"` or `"appended"`; see the docstring of this module.

    Raises:
        `ValueError`: as in [`covered_latents`]; a strength is outside (0, 1]; or two anchors share a latent frame (`"slot"`)
            or a frame (`"appended"`).
    """
    placed: dict[int, Anchor] = {}
    pairs = []
    for anchor in anchors:
        latents = covered_latents(anchor, num_frames, temporal)
        if not 0 < anchor.strength <= 1:
            raise ValueError(f"Anchor `strength={anchor.strength}` must lie in (0, 1]; leave the anchor out for 0.")
        first = anchor.frame_index % num_frames
        for place in latents if form == "slot" else range(first, first + len(pictures_of(anchor.image))):
            if place in placed:
                frames = sorted(item.frame_index % num_frames for item in (placed[place], anchor))
                _refuse_shared(place, frames, temporal, form)
            placed[place] = anchor
        pairs.append((latents, anchor))
    return sorted(pairs, key=lambda pair: (pair[0].start, pair[1].frame_index % num_frames))


def _refuse_shared(place: int, frames: list[int], temporal: int, form: str) -> None:
    if form == "appended":
        raise ValueError(f"Anchors at frames {frames[0]} and {frames[1]} both set frame {place}; keep one of them.")
    raise ValueError(
        f"Anchors at frames {frames[0]} and {frames[1]} fall on the same latent frame {place}; keep one of them or move one "
        f"away. The first latent frame is frame 0, each further one covers {temporal} frames."
    )


# -- latents ----------------------------------------------------------------------------------------------------------


def encode_anchors(
    vae,
    anchors: list[list[Anchor]],
    latents: torch.Tensor,
    height: int,
    width: int,
    num_frames: int,
    generator: torch.Generator | list[torch.Generator] | None = None,
    form: str = "slot",
) -> AnchorLatents:
    """Encodes the anchors of each video.

    Args:
        vae (`AutoencoderKLWan`): a causal video VAE.
        anchors (`list[list[Anchor]]`): one list per video.
        latents (`torch.Tensor` of shape `(B, C, f, h, w)`): gives shape, device and dtype.
        height, width, num_frames (`int`): size of the video in pixels, and its frames.
        generator (*optional*): generator for the noise of anchors with a strength below 1.
        form (`str`, *optional*): `"slot"` or `"appended"`; see the docstring of this module.

    Raises:
        `ValueError`: as in [`resolve_anchors`].
    """
    # Videos of one prompt share their image, so each image is encoded once per position.
    encoded: dict[tuple[int, int], torch.Tensor] = {}

    def encode(anchor: Anchor, index: int) -> torch.Tensor:
        key = (id(anchor.image), index)
        if key not in encoded:
            pixels = anchor_pixels(anchor, height, width)[None]
            encoded[key] = encode_anchor(vae, pixels, index, get_module_execution_device(vae))[0]
        return encoded[key].to(latents)

    temporal = vae.config.scale_factor_temporal
    clean, strength = torch.zeros_like(latents), latents.new_zeros(latents.shape[0], latents.shape[2])
    behind: list[list[Anchor]] = [[] for _ in anchors]
    for video, video_anchors in enumerate(anchors):
        for covered, anchor in resolve_anchors(video_anchors, num_frames, temporal, form):
            if form == "appended" and is_appended(anchor, num_frames):
                behind[video].append(anchor)
                continue
            clean[video, :, covered.start : covered.stop] = encode(anchor, covered.start)
            strength[video, covered.start : covered.stop] = anchor.strength
    noise, appended = anchor_noise(clean, strength, generator), None
    if any(behind):
        # An appended image is encoded as a first frame, alone.
        appended = appended_anchors(
            [
                [
                    (encode(anchor, 0), anchor.strength, frame_position(anchor.frame_index % num_frames, temporal))
                    for anchor in row
                ]
                for row in behind
            ],
            latents,
            generator,
        )
    return AnchorLatents(clean, strength, noise, appended)
