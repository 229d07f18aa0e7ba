"""Makes the model input from anchors: clean latents among noisy ones, with their positions in time. Pure functions of tensors,
used in training and in sampling.

Shapes: B batch, C latent channels, H/W pixel height and width, f/h/w latent frames, height and width. Wan's causal VAE
encodes frame 0 as latent frame 0 and every further four frames as one latent frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor

from ..locks import exclusive
from ..schedules.flow import add_noise


# A causal VAE's latent depends on earlier frames. An image held still over this many latent frames nearly reaches the latent
# of a still scene: with the embedded VAE, the error is 1.3 % (rms) after 5 latent frames, and halves with each further one.
STILL_LATENTS = 5


# -- positions in time ------------------------------------------------------------------------------------------------


def latent_index(frame_index: int, temporal: int = 4) -> int:
    """Returns the latent frame that contains a frame: 0 for frame 0, then one for every `temporal` frames."""
    return 0 if frame_index == 0 else 1 + (frame_index - 1) // temporal


def frame_position(frame_index: int, temporal: int = 4) -> float:
    """Returns the position of a frame in time, in latent frames: 0 for frame 0, which is latent frame 0.

    Latent frame k > 0 contains `temporal` frames, of which frame `temporal * k` is the last. Its position in the rotary
    embedding, k, is their centre. Frames are `1 / temporal` apart, so with `temporal=4` those of latent frame 1 are at 0.625,
    0.875, 1.125 and 1.375. (LTX also uses centres as positions.)
    """
    return 0.0 if frame_index == 0 else (frame_index + (temporal - 1) / 2) / temporal


# -- the model input --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AppendedAnchors:
    """Anchors that are additional latent frames after those of the video, each of one image.

    Args:
        latents (`torch.Tensor` of shape `(B, C, A, h, w)`): normalised clean latents of the images.
        strength (`torch.Tensor` of shape `(B, A)`): in (0, 1]; 0 for padding, if a video has fewer anchors than others.
        noise (`torch.Tensor` of shape `(B, C, A, h, w)`): noise that is mixed into anchors with a strength below 1.
        positions (`torch.Tensor` of shape `(B, A)`): from [`frame_position`]; below 0 for padding. They stay on the CPU,
            where the model reads them.
    """

    latents: torch.Tensor
    strength: torch.Tensor
    noise: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True)
class AnchorLatents:
    """Anchors as latents, for training and sampling.

    Args:
        latents (`torch.Tensor` of shape `(B, C, f, h, w)`): normalised clean latents; zero in frames without anchor.
        strength (`torch.Tensor` of shape `(B, f)`): in [0, 1]; 0 for frames without anchor.
        noise (`torch.Tensor` of shape `(B, C, f, h, w)`): noise that is mixed into anchors with a strength below 1.
        appended (`AppendedAnchors`, *optional*): anchors after the latent frames of the video.
    """

    latents: torch.Tensor
    strength: torch.Tensor
    noise: torch.Tensor
    appended: AppendedAnchors | None = None

    def to(self, device: torch.device) -> AnchorLatents:
        more = self.appended
        if more is not None:
            latents, strength, noise = (tensor.to(device) for tensor in (more.latents, more.strength, more.noise))
            more = AppendedAnchors(latents, strength, noise, more.positions)
        latents, strength, noise = (tensor.to(device) for tensor in (self.latents, self.strength, self.noise))
        return AnchorLatents(latents, strength, noise, more)

    def impose(self, latents: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        """Puts the anchors into `latents` `(B, C, f, h, w)` at noise level `sigma`, a number or of shape `(B,)`."""
        anchored = (self.strength > 0)[:, None, :, None, None]
        return torch.where(anchored, _noised(self, sigma).to(latents.dtype), latents)

    def hold(self, velocity: torch.Tensor, latents: torch.Tensor, sigma: float) -> torch.Tensor:
        """Replaces the predicted velocity of anchored frames by the velocity that leads to the anchor.

        As `clean = noisy - sigma * velocity`, a multistep solver then stores the anchor as the clean estimate of the frame.
        """
        anchored = (self.strength > 0)[:, None, :, None, None]
        return torch.where(anchored, ((latents - self.latents) / sigma).to(velocity.dtype), velocity)


def _noised(anchors: AnchorLatents | AppendedAnchors, sigma: torch.Tensor | float) -> torch.Tensor:
    """Adds noise to the anchors' latents by their strengths, at the video's noise level `sigma` (a number or `(B,)`)."""
    sigma = torch.as_tensor(sigma, dtype=anchors.strength.dtype, device=anchors.strength.device)
    frame_sigma = ((1 - anchors.strength) * sigma.reshape(-1, 1))[:, None, :, None, None]
    return add_noise(anchors.latents, anchors.noise, frame_sigma)


def anchored_model_input(
    latents: torch.Tensor, sigma: torch.Tensor | float, timestep: torch.Tensor, anchors: AnchorLatents | None
) -> dict[str, torch.Tensor]:
    """Returns the transformer's arguments for one forward, except the text, in training and in sampling.

    A fixed anchor is clean and has timestep 0; the other frames share the video's timestep (Factorized Video Generation,
    arXiv 2512.16371, Figure 2; Wan2.2-TI2V-5B introduced timesteps per frame). Appended anchors follow the latent frames of
    the video, as the keyframes of diffusers' `LTX2ConditionPipeline` do.

    Args:
        latents (`torch.Tensor` of shape `(B, C, f, h, w)`): noisy latents of the video.
        sigma (`float` or `torch.Tensor` of shape `(B,)`): noise level in [0, 1].
        timestep (`torch.Tensor` of shape `(B,)`): timestep of the video, `sigma * num_train_timesteps`.
        anchors (`AnchorLatents`, *optional*): `None` for plain text-to-video.

    Returns:
        `dict`: `hidden_states` of shape `(B, C, f, h, w)`, and `timestep` of shape `(B, f)`, or `(B,)` without anchors. With
        appended anchors, both have `f + A` frames, and there is `anchor_positions` of shape `(B, A)`.
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


# -- latents ----------------------------------------------------------------------------------------------------------


def appended_anchors(
    rows: list[list[tuple[torch.Tensor, float, float]]],
    like: torch.Tensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> AppendedAnchors:
    """Batches the appended anchors of each video.

    Args:
        rows (`list[list[tuple]]`): latents of shape `(C, 1, h, w)`, strength and [`frame_position`] of each anchor of each
            video.
        like (`torch.Tensor` of shape `(B, C, f, h, w)`): gives shape, device and dtype.
        generator (*optional*): generator for [`anchor_noise`].
    """
    count = max(map(len, rows))
    batch_size, channels, _, *size = like.shape
    clean, strength = like.new_zeros(batch_size, channels, count, *size), like.new_zeros(batch_size, count)
    positions = torch.full((batch_size, count), -1.0, dtype=torch.float64)
    for video, row in enumerate(rows):
        for place, (latent, share, position) in enumerate(row):
            clean[video, :, place : place + 1] = latent
            strength[video, place], positions[video, place] = share, position
    return AppendedAnchors(clean, strength, anchor_noise(clean, strength, generator), positions)


def anchor_noise(
    clean: torch.Tensor, strength: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
) -> torch.Tensor:
    """Returns noise for latents `(B, C, n, h, w)`, or zeros unless one of the strengths `(B, n)` lies between 0 and 1."""
    if not ((strength > 0) & (strength < 1)).any():
        return torch.zeros_like(clean)
    return randn_tensor(clean.shape, generator=generator, device=clean.device, dtype=clean.dtype)


def _statistics(vae, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (
        torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


def normalize_latents(latents: torch.Tensor, vae) -> torch.Tensor:
    """Returns `(latents - latents_mean) / latents_std`, per channel: the input of the video model."""
    mean, std = _statistics(vae, latents)
    # Multiplying by the inverse, rather than dividing, gives the same bits as the stock pipelines.
    return (latents - mean) * (1.0 / std)


def denormalize_latents(latents: torch.Tensor, vae) -> torch.Tensor:
    """Inverse of [`normalize_latents`]: the input of the VAE's decoder."""
    mean, std = _statistics(vae, latents)
    return latents / (1.0 / std) + mean


def encode_anchor(vae, pixels: torch.Tensor, index: int, device: torch.device | None = None) -> torch.Tensor:
    """Encodes an image, or a run of images, for the latent frames starting at `index`.

    Latent frame 0 contains one frame. A later latent frame contains four frames and also depends on the frames before them, so
    the latent of a single image does not fit there. A single image is therefore held still for its four frames, and the first
    image is held still before them, over `min(index, STILL_LATENTS)` latent frames.

    Args:
        vae (`AutoencoderKLWan`): a causal video VAE.
        pixels (`torch.Tensor` of shape `(B, 3, H, W)` or `(B, 3, F, H, W)`): in [-1, 1]; a run has 4k + 1 frames at position
            0 and 4k frames at a later one.
        index (`int`): latent frame of the first image, from [`latent_index`].
        device (`torch.device`, *optional*): device on which the VAE runs.

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
    # The VAE caches features of earlier frames in its attributes while it encodes.
    with exclusive(vae):
        latents = vae.encode(clip.to(device=device, dtype=vae.dtype)).latent_dist.mode()[:, :, before:]
    return normalize_latents(latents.float(), vae)
