"""What the video model sees of anchors: clean latents among noisy ones, at places in time. Pure functions of tensors, the same for
training and sampling.

Shapes: B batch, C latent channels, H/W pixel height and width, f/h/w latent frames, height and width. Wan's causal VAE turns
frame 0 into latent 0 and every further four frames into one latent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor

from ..locks import exclusive
from ..schedules.flow import add_noise


# A causal VAE's latent depends on frames before it. A still picture held over this many latents has all but reached the
# steady state of a resting scene: with the embedded VAE 1.3 % (rms) is left after 5, and half of it after each further one.
STILL_LATENTS = 5


# -- places in time ---------------------------------------------------------------------------------------------------


def latent_index(frame_index: int, temporal: int = 4) -> int:
    """Latent that holds a pixel frame: 0 for frame 0, then one for every `temporal` frames."""
    return 0 if frame_index == 0 else 1 + (frame_index - 1) // temporal


def frame_position(frame_index: int, temporal: int = 4) -> float:
    """Where a pixel frame lies among the latent frames in time: 0 for frame 0, which is latent 0.

    Latent k > 0 holds `temporal` frames, the last of them frame `temporal * k`, and is at k in the rotary embedding: their
    middle. Frames are `1 / temporal` apart, so those of latent 1 are at 0.625, 0.875, 1.125 and 1.375. (LTX's positions are
    middles as well.)
    """
    return 0.0 if frame_index == 0 else (frame_index + (temporal - 1) / 2) / temporal


# -- the model input --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AppendedAnchors:
    """Anchors that are latent frames of their own behind those of the clip, each of one picture.

    Args:
        latents (`torch.Tensor` of shape `(B, C, A, h, w)`): normalised clean latents of single pictures.
        strength (`torch.Tensor` of shape `(B, A)`): in (0, 1]; 0 where a clip has fewer anchors than others.
        noise (`torch.Tensor` of shape `(B, C, A, h, w)`): what anchors of a strength below 1 are mixed with.
        positions (`torch.Tensor` of shape `(B, A)`): from [`frame_position`]; below 0 where the strength is 0. They stay on the
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


# -- latents ----------------------------------------------------------------------------------------------------------


def appended_anchors(
    rows: list[list[tuple[torch.Tensor, float, float]]],
    like: torch.Tensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> AppendedAnchors:
    """Anchors behind each video, side by side.

    Args:
        rows (`list[list[tuple]]`): latents of shape `(C, 1, h, w)`, strength and [`frame_position`] of each anchor of each video.
        like (`torch.Tensor` of shape `(B, C, f, h, w)`): gives shape, device and dtype.
        generator (*optional*): of [`anchor_noise`].
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
    """Noise for latents `(B, C, n, h, w)`, drawn only if one of their strengths `(B, n)` is below 1."""
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
