"""From an anchor image to what the video model sees: pure functions between stage 2 and stage 3.

Shapes: B batch, C latent channels, F/H/W pixel frames/height/width, f/h/w latent ones. Wan's causal VAE turns frame 0 into
latent 0 and every further four frames into one latent, so f = 1 + (F - 1) / 4.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from diffusers.utils import logging

from ..checks import check_number
from ..locks import exclusive
from ..schedules.flow import add_noise


logger = logging.get_logger(__name__)

# A causal VAE's latent depends on frames before it. A still picture held over this many latents has all but reached the
# steady state of a resting scene: with the embedded VAE 1.3 % (rms) is left after 5, and half of it after each further one.
STILL_LATENTS = 5


Picture = PIL.Image.Image | np.ndarray | torch.Tensor

# A crop is told of from this share of the picture on: a thing at the edge may be gone with it.
CROP_TOLD = 0.1


@dataclass(frozen=True)
class Anchor:
    """A frame that is given, or a short run of frames.

    Args:
        image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): the picture; `uint8` (H, W, 3), float (H, W, 3) or tensor
            (3, H, W) in [0, 1], read by [`picture_tensor`]. Another size is scaled and centre-cropped, never
            stretched. A list of pictures, an array (F, H, W, 3) or a tensor (F, 3, H, W) is a run of frames, with which an
            existing clip is continued. A run covers whole latent frames: 4k + 1 frames from frame 0 on, or 4k frames from a
            frame 4j + 1 on.
        frame_index (`int`, *optional*): pixel frame of the picture, or of the run's first; negative from the end.
        strength (`float`, *optional*): in (0, 1]. At 1 the frame is a fixed constraint with time 0. Below 1 the model
            sees it with `1 - strength` of the clip's noise and of its time, so that the frames around may move away from it.
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


@dataclass(frozen=True)
class AppendedAnchors:
    """Anchors that are latent frames of their own behind those of the clip, each of one picture.

    Args:
        latents (`torch.Tensor` of shape `(B, C, A, h, w)`): normalised clean latents of single pictures.
        strength (`torch.Tensor` of shape `(B, A)`): in (0, 1]; 0 where a clip has fewer anchors than others.
        noise (`torch.Tensor` of shape `(B, C, A, h, w)`): what anchors of a strength below 1 are mixed with.
        positions (`torch.Tensor` of shape `(B, A)`): from [`placing.frame_position`]; below 0 where the strength is 0. They stay on the
            host, where the model reads them.
    """

    latents: torch.Tensor
    strength: torch.Tensor
    noise: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True)
class AnchorLatents:
    """Anchors in latent form, the same for training and sampling.

    Args:
        latents (`torch.Tensor` of shape `(B, C, f, h, w)`): normalised clean latents, zero where nothing is anchored.
        strength (`torch.Tensor` of shape `(B, f)`): in [0, 1]; 0 where nothing is anchored.
        noise (`torch.Tensor` of shape `(B, C, f, h, w)`): what anchors of a strength below 1 are mixed with.
        appended (`AppendedAnchors`, *optional*): those behind the clip.
    """

    latents: torch.Tensor
    strength: torch.Tensor
    noise: torch.Tensor
    appended: AppendedAnchors | None = None

    def to(self, device: torch.device) -> AnchorLatents:
        moved = [tensor.to(device) for tensor in (self.latents, self.strength, self.noise)]
        if self.appended is None:
            return AnchorLatents(*moved)
        more = self.appended
        tensors = [tensor.to(device) for tensor in (more.latents, more.strength, more.noise)]
        return AnchorLatents(*moved, AppendedAnchors(*tensors, more.positions))

    def impose(self, latents: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        """Puts the anchors into `latents` `(B, C, f, h, w)` at noise level `sigma`, a number or of shape `(B,)`."""
        anchored = (self.strength > 0)[:, None, :, None, None]
        return torch.where(anchored, _noised(self, sigma).to(latents.dtype), latents)

    def hold(self, velocity: torch.Tensor, latents: torch.Tensor, sigma: float) -> torch.Tensor:
        """Replaces the predicted velocity of anchored frames by the one whose clean estimate is the anchor itself.

        `clean = noisy - sigma * velocity`, so what a multistep solver keeps of such a frame is the anchor, not a guess.
        """
        anchored = (self.strength > 0)[:, None, :, None, None]
        return torch.where(anchored, ((latents - self.latents) / sigma).to(velocity.dtype), velocity)


def _noised(anchors: AnchorLatents | AppendedAnchors, sigma: torch.Tensor | float) -> torch.Tensor:
    """The latents with the noise that is left to each at the clip's noise level, a number or of shape `(B,)`."""
    sigma = torch.as_tensor(sigma, dtype=anchors.strength.dtype, device=anchors.strength.device)
    frame_sigma = ((1 - anchors.strength) * sigma.reshape(-1, 1))[:, None, :, None, None]
    return add_noise(anchors.latents, anchors.noise, frame_sigma)


def anchored_model_input(
    latents: torch.Tensor, sigma: torch.Tensor | float, timestep: torch.Tensor, anchors: AnchorLatents | None
) -> dict[str, torch.Tensor]:
    """What the transformer is called with in one forward, beside the text, for the trainer and the pipeline alike.

    A fixed anchor is clean and has time 0, the other frames share the clip's time (Factorized Video Generation, arXiv
    2512.16371, Figure 2; the per-frame time is that of Wan2.2-TI2V-5B). Appended anchors follow the clip, as the keyframes of
    diffusers' `LTX2ConditionPipeline`.

    Args:
        latents (`torch.Tensor` of shape `(B, C, f, h, w)`): noisy latents of the clip.
        sigma (`float` or `torch.Tensor` of shape `(B,)`): noise level in [0, 1].
        timestep (`torch.Tensor` of shape `(B,)`): model time, `sigma * num_train_timesteps`.
        anchors (`AnchorLatents`, *optional*): `None` for plain text-to-video.

    Returns:
        `dict`: `hidden_states` of shape `(B, C, f, h, w)`, and `timestep` of shape `(B, f)`, or `(B,)` without anchors. With
        appended ones both have `f + A` frames, and there is `anchor_positions` of shape `(B, A)`.
    """
    if anchors is None:
        return {"hidden_states": latents, "timestep": timestep}
    hidden_states, strength, more = anchors.impose(latents, sigma), anchors.strength, {}
    if anchors.appended is not None:
        behind = _noised(anchors.appended, sigma).to(hidden_states.dtype)
        hidden_states = torch.cat([hidden_states, behind], dim=2)
        strength = torch.cat([strength, anchors.appended.strength], dim=1)
        more["anchor_positions"] = anchors.appended.positions
    timestep = (1 - strength) * timestep.to(strength.dtype)[:, None]
    return {"hidden_states": hidden_states, "timestep": timestep} | more


def pictures_of(image: Picture | Sequence[Picture]) -> list[Picture]:
    """The pictures of an anchor in time order: one, or those of a run."""
    several = isinstance(image, (list, tuple)) or (isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim == 4)
    return list(image) if several else [image]


def pair_anchors(anchors, num_prompts: int, num_videos_per_prompt: int) -> list[list[Anchor]]:
    """One list of anchors for each video, from an anchor or a list for all, or lists per prompt or per video.

    A list may be empty where others are not: that video has no anchor.

    Raises:
        `ValueError`: no anchor at all, another number of lists, or something else than anchors.
    """
    anchors = [anchors] if isinstance(anchors, Anchor) else list(anchors)
    if not any(isinstance(item, Anchor) or item for item in anchors):
        raise ValueError(
            f"`anchors={anchors!r}` holds no anchor; leave it out for anchors that are drawn or, without any, for plain "
            "text-to-video."
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
    """The anchors of each video with tensors for pictures; those that share a picture share its tensor.

    Raises:
        `ValueError`: as in [`picture_tensor`].
    """
    decoded: dict[int, Any] = {}
    for anchor in (anchor for video in anchors for anchor in video):
        if id(anchor.image) not in decoded:
            tensors = [picture_tensor(picture) for picture in pictures_of(anchor.image)]
            decoded[id(anchor.image)] = tensors if len(tensors) > 1 else tensors[0]
    return [[replace(anchor, image=decoded[id(anchor.image)]) for anchor in video] for video in anchors]


# -- pictures as people have them, to tensors of the size of a clip ---------------------------------------------------


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


# -- latents ----------------------------------------------------------------------------------------------------------


def anchor_pixels(anchor: Anchor, height: int, width: int) -> torch.Tensor:
    """The pictures of an anchor as a clip `(3, F, H, W)` in [-1, 1]."""
    return torch.stack([crop_and_resize(image, height, width) for image in pictures_of(anchor.image)], dim=1)


def _statistics(vae, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (
        torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


def normalize_latents(latents: torch.Tensor, vae) -> torch.Tensor:
    """`(latents - latents_mean) / latents_std`, per channel, as the video model wants them."""
    mean, std = _statistics(vae, latents)
    # Multiplied by the inverse, not divided: bit-equal to the stock pipelines.
    return (latents - mean) * (1.0 / std)


def denormalize_latents(latents: torch.Tensor, vae) -> torch.Tensor:
    """Inverse of `normalize_latents`, as the VAE wants them."""
    mean, std = _statistics(vae, latents)
    return latents / (1.0 / std) + mean


def encode_anchor(vae, pixels: torch.Tensor, index: int, device: torch.device | None = None) -> torch.Tensor:
    """Encodes a picture, or a run of them, for the latent positions from `index` on.

    A latent at position 0 is a single frame. A later one stands for four frames and was made with the frames before them in
    view, so a single-image latent pasted there is out of phase: a single picture stands still for its four frames, and the
    first picture is held still before them, over `min(index, STILL_LATENTS)` latents.

    Args:
        vae (`AutoencoderKLWan`): a causal video VAE.
        pixels (`torch.Tensor` of shape `(B, 3, H, W)` or `(B, 3, F, H, W)`): in [-1, 1]; a run has 4k + 1 frames at position
            0 and 4k frames at a later one.
        index (`int`): latent position of the first, from `latent_index`.
        device (`torch.device`, *optional*): where the VAE runs.

    Returns:
        `torch.Tensor` of shape `(B, C, k, h, w)`, float32, normalised; the mode of the posterior, not a sample.
    """
    temporal = vae.config.scale_factor_temporal
    clip = pixels if pixels.ndim == 5 else pixels[:, :, None]
    before = min(index, STILL_LATENTS)
    if before:
        held = clip[:, :, :1].expand(-1, -1, 1 + (before - 1) * temporal, -1, -1)
        own = clip.expand(-1, -1, temporal, -1, -1) if clip.shape[2] == 1 else clip
        clip = torch.cat([held, own], dim=2)
    # It keeps what its convolutions need of earlier frames in attributes of the VAE.
    with exclusive(vae):
        latents = vae.encode(clip.to(device=device, dtype=vae.dtype)).latent_dist.mode()[:, :, before:]
    return normalize_latents(latents.float(), vae)
