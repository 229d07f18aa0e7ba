"""From an anchor image to what the video model sees: pure functions between stage 2 and stage 3.

Shapes: B batch, C latent channels, F/H/W pixel frames/height/width, f/h/w latent ones. Wan's causal VAE turns frame 0 into
latent 0 and every further four frames into one latent, so f = 1 + (F - 1) / 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch

from .schedules import add_noise


# A causal VAE's latent depends on frames before it. A still picture held over this many latents has all but reached the
# steady state of a resting scene: with the embedded VAE 1.3 % (rms) is left after 5, and half of it after each further one.
STILL_LATENTS = 5


@dataclass(frozen=True)
class Anchor:
    """A frame that is given.

    Args:
        image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): the picture; `uint8` (H, W, 3), float (H, W, 3) or tensor
            (3, H, W) in [0, 1]. Another size is scaled and centre-cropped, never stretched.
        frame_index (`int`, *optional*): pixel frame, negative from the end.
        strength (`float`, *optional*): in (0, 1]. At 1 the frame is a fixed constraint with time 0. Below 1 the model
            sees it with `1 - strength` of the clip's noise and of its time, so that it may move away from it.
    """

    image: PIL.Image.Image | np.ndarray | torch.Tensor
    frame_index: int = 0
    strength: float = 1.0


@dataclass(frozen=True)
class AnchorLatents:
    """Anchors in latent form, the same for training and sampling.

    Args:
        latents (`torch.Tensor` of shape `(B, C, f, h, w)`): normalised clean latents, zero where nothing is anchored.
        strength (`torch.Tensor` of shape `(B, f)`): in [0, 1]; 0 where nothing is anchored.
        noise (`torch.Tensor` of shape `(B, C, f, h, w)`): what anchors of a strength below 1 are mixed with.
    """

    latents: torch.Tensor
    strength: torch.Tensor
    noise: torch.Tensor

    def impose(self, latents: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        """Puts the anchors into `latents` `(B, C, f, h, w)` at noise level `sigma`, a number or of shape `(B,)`."""
        sigma = torch.as_tensor(sigma, dtype=self.strength.dtype, device=self.strength.device)
        frame_sigma = ((1 - self.strength) * sigma.reshape(-1, 1))[:, None, :, None, None]
        anchored = (self.strength > 0)[:, None, :, None, None]
        return torch.where(anchored, add_noise(self.latents, self.noise, frame_sigma).to(latents.dtype), latents)

    def hold(self, velocity: torch.Tensor, latents: torch.Tensor, sigma: float) -> torch.Tensor:
        """Replaces the predicted velocity of anchored frames by the one whose clean estimate is the anchor itself.

        `clean = noisy - sigma * velocity`, so what a multistep solver keeps of such a frame is the anchor, not a guess.
        """
        anchored = (self.strength > 0)[:, None, :, None, None]
        return torch.where(anchored, ((latents - self.latents) / sigma).to(velocity.dtype), velocity)


def anchored_model_input(
    latents: torch.Tensor, sigma: torch.Tensor | float, timestep: torch.Tensor, anchors: AnchorLatents | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `(hidden_states, timestep)` of one forward, for the trainer and the pipeline alike.

    A fixed anchor is clean and has time 0, the other frames share the clip's time (Factorized Video Generation, arXiv
    2512.16371, Figure 2; the per-frame time is that of Wan2.2-TI2V-5B).

    Args:
        latents (`torch.Tensor` of shape `(B, C, f, h, w)`): noisy latents of the clip.
        sigma (`float` or `torch.Tensor` of shape `(B,)`): noise level in [0, 1].
        timestep (`torch.Tensor` of shape `(B,)`): model time, `sigma * num_train_timesteps`.
        anchors (`AnchorLatents`, *optional*): `None` for plain text-to-video.

    Returns:
        `hidden_states` of shape `(B, C, f, h, w)`, and `timestep` of shape `(B, f)`, or `(B,)` without anchors.
    """
    if anchors is None:
        return latents, timestep
    return anchors.impose(latents, sigma), (1 - anchors.strength) * timestep.to(anchors.strength.dtype)[:, None]


def latent_index(frame_index: int, temporal: int = 4) -> int:
    """Latent that holds a pixel frame: 0 for frame 0, then one for every `temporal` frames."""
    return 0 if frame_index == 0 else 1 + (frame_index - 1) // temporal


def resolve_anchors(anchors: Sequence[Anchor], num_frames: int, temporal: int = 4) -> list[tuple[int, Anchor]]:
    """Checks the anchors of one clip and returns `(latent index, anchor)` pairs in time order.

    Raises:
        `ValueError`: an anchor outside the clip, a strength outside (0, 1], or two anchors on one latent frame.
    """
    placed: dict[int, tuple[int, Anchor]] = {}
    for anchor in anchors:
        if not -num_frames <= anchor.frame_index < num_frames:
            raise ValueError(
                f"Anchor at `frame_index={anchor.frame_index}` lies outside the clip of {num_frames} frames; use "
                f"{-num_frames} to {num_frames - 1}."
            )
        if not 0 < anchor.strength <= 1:
            raise ValueError(f"Anchor `strength={anchor.strength}` must lie in (0, 1]; leave the anchor out for 0.")
        frame = anchor.frame_index % num_frames
        index = latent_index(frame, temporal)
        if index in placed:
            raise ValueError(
                f"Anchors at frames {placed[index][0]} and {frame} fall on the same latent frame {index}, which stands for "
                f"{temporal} frames; keep one of them or move one {temporal} frames away."
            )
        placed[index] = (frame, anchor)
    return [(index, placed[index][1]) for index in sorted(placed)]


def picture_tensor(image: PIL.Image.Image | np.ndarray | torch.Tensor) -> torch.Tensor:
    """A picture as `(3, H, W)`, float32 in [0, 1].

    Raises:
        `ValueError`: a picture that cannot be decoded, of another layout, or with values outside its range.
    """
    if isinstance(image, PIL.Image.Image):
        try:
            pixels = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError) as error:
            raise ValueError(f"The anchor image cannot be decoded ({error}); save it again as PNG or JPEG.") from error
        image = pixels
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(f"An anchor array must have shape (H, W, 3), but has {image.shape}.")
        scale = 255.0 if image.dtype == np.uint8 else 1.0
        image = torch.tensor(image).permute(2, 0, 1).float() / scale
    if not isinstance(image, torch.Tensor):
        raise ValueError(f"An anchor image must be a PIL image, an array or a tensor, but is {type(image).__name__}.")
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"An anchor tensor must have shape (3, H, W), but has {tuple(image.shape)}.")
    if not torch.isfinite(image).all() or image.min() < 0 or image.max() > 1:
        raise ValueError(
            f"Anchor values must be finite and lie in [0, 1], but range from {image.min():.3g} to {image.max():.3g}."
        )
    return image.float()


def crop_and_resize(image: PIL.Image.Image | np.ndarray | torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Scales a picture until it covers `height` x `width`, crops the centre, and returns `(3, H, W)` in [-1, 1].

    Raises:
        `ValueError`: as in `picture_tensor`.
    """
    image = picture_tensor(image)
    source_height, source_width = image.shape[1:]
    if (source_height, source_width) != (height, width):
        factor = max(height / source_height, width / source_width)
        size = (max(height, round(source_height * factor)), max(width, round(source_width * factor)))
        image = torch.nn.functional.interpolate(image[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        image = image[:, top : top + height, left : left + width]
    return 2 * image - 1


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
    """Encodes pictures for latent position `index`.

    A latent at position 0 is a single frame. A later one stands for four frames and was made with the frames before them in
    view, so a single-image latent pasted there is out of phase: the picture is held still over the frames of
    `min(index, STILL_LATENTS)` latents after the first, and the last latent is kept.

    Args:
        vae (`AutoencoderKLWan`): a causal video VAE.
        pixels (`torch.Tensor` of shape `(B, 3, H, W)`): in [-1, 1].
        index (`int`): latent position, from `latent_index`.
        device (`torch.device`, *optional*): where the VAE runs.

    Returns:
        `torch.Tensor` of shape `(B, C, 1, h, w)`, float32, normalised; the mode of the posterior, not a sample.
    """
    num_frames = 1 + min(index, STILL_LATENTS) * vae.config.scale_factor_temporal
    clip = pixels[:, :, None].expand(-1, -1, num_frames, -1, -1).to(device=device, dtype=vae.dtype)
    latents = vae.encode(clip).latent_dist.mode()[:, :, -1:]
    return normalize_latents(latents.float(), vae)
