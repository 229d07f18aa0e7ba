"""Pictures as people have them, to tensors of the size of a clip: the one way in, of anchors and of training frames.

A picture comes out as it is meant to be seen, or is refused with what to do. Shapes: H/W pixel height/width.
"""

from __future__ import annotations

import functools

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from diffusers.utils import logging


logger = logging.get_logger(__name__)

Picture = PIL.Image.Image | np.ndarray | torch.Tensor

# A crop is told of from this share of the picture on: a thing at the edge may be gone with it.
CROP_TOLD = 0.1


def picture_tensor(image: Picture) -> torch.Tensor:
    """A picture as `(3, H, W)`, float32 in [0, 1].

    PIL pictures are turned upright by their EXIF orientation; greys of 16 bits keep them; what is transparent becomes white,
    with a warning.

    Raises:
        `ValueError`: a picture that cannot be decoded, is animated, is of another layout, or has values outside its range.
    """
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


def picture_image(image: Picture) -> PIL.Image.Image:
    """[`picture_tensor`] as an RGB picture of 8 bits."""
    return PIL.Image.fromarray((picture_tensor(image) * 255).round().byte().permute(1, 2, 0).numpy(force=True))


def fit_picture(image: Picture, height: int, width: int) -> torch.Tensor:
    """Scales a picture until it covers `height` x `width`, crops the centre, and returns `(3, H, W)` in [0, 1].

    A crop of more than a tenth of the picture logs a warning, once for each pair of sizes.

    Raises:
        `ValueError`: as in `picture_tensor`.
    """
    image = picture_tensor(image)
    _tell_of_crop(tuple(image.shape[1:]), (height, width))
    return cover(image, height, width)


def cover(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """`(3, H, W)` in [0, 1] to `height` x `width`: bicubic with antialiasing, of the largest box of that shape about the centre."""
    if image.shape[1:] == (height, width):
        return image
    # Planes of floats: their box has fractions of a pixel, and nothing is rounded between the two directions.
    planes = [PIL.ImageOps.fit(PIL.Image.fromarray(plane), (width, height)) for plane in image.numpy(force=True)]
    return torch.from_numpy(np.stack(planes)).clamp(0, 1).to(image.device)


def crop_and_resize(image: Picture, height: int, width: int) -> torch.Tensor:
    """[`fit_picture`] as models take it: `(3, H, W)` in [-1, 1]."""
    return 2 * fit_picture(image, height, width) - 1


def _pixels(image: PIL.Image.Image) -> np.ndarray:
    """Decodes a picture, upright and opaque, to `(H, W, 3)`."""
    try:
        # What phones add to a JPEG as further pictures (MPO) is a preview or a depth map.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        if frames > 1:
            raise ValueError(
                f"The anchor image is animated or has several pages, {frames} in all: choose one, with `image.seek(index)` "
                "and `image.copy()`, or give several as the list of a run."
            )
        if image.format == "TIFF":
            # By its name Pillow maps an uncompressed file into memory, with the sides of a turned one exchanged.
            name, image.filename = image.filename, ""
            image.load()
            image.filename = name
        image = PIL.ImageOps.exif_transpose(image)
        if image.mode in ("I", "LAB", "La") or (image.mode.startswith("I;16") and image.has_transparency_data):
            raise ValueError(
                f"The anchor image of mode {image.mode} has no certain range or transparency; convert it to RGB or RGBA."
            )
        if image.mode == "F" or image.mode.startswith("I;16"):
            return np.repeat(np.asarray(image)[..., None], 3, axis=2)
        return np.asarray(_opaque(image).convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"The anchor image cannot be decoded ({error}); save it again as PNG or JPEG.") from error


def _opaque(image: PIL.Image.Image) -> PIL.Image.Image:
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    transparent = 1 - np.asarray(image.getchannel("A")).mean() / 255
    if transparent:
        logger.warning(f"The anchor image is transparent ({transparent:.1%} of it) and is laid on white.")
    return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)


def _floats(pixels: np.ndarray) -> np.ndarray:
    """Values of an array in [0, 1]; floats as they are."""
    if pixels.dtype == np.uint8:
        return pixels / np.float32(255)
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2:
        if pixels.size and pixels.max() <= 255:
            raise ValueError(
                f"An anchor of 16 bits has values up to 65535, and this one up to {pixels.max()}, which would be black; give it "
                "as uint8 if those are 8 bits."
            )
        return pixels.astype(np.float32) / 65535
    if pixels.dtype.kind != "f":
        raise ValueError(
            f"Anchor values must be uint8 or uint16, or float in [0, 1], but are {pixels.dtype}; convert them."
        )
    return pixels.astype(np.float32)


@functools.cache
def _tell_of_crop(source: tuple[int, int], target: tuple[int, int]) -> None:
    """Once for each pair: a clip has many frames of one size."""
    across = (target[1] * source[0]) / (target[0] * source[1])
    lost = 1 - min(across, 1 / across)
    if lost > CROP_TOLD:
        where = "top and bottom" if across > 1 else "left and right"
        logger.warning(
            f"A picture of {source[0]} x {source[1]} (height x width) is cropped to the shape of {target[0]} x {target[1]}: "
            f"{lost:.0%} of it is lost at {where}."
        )
