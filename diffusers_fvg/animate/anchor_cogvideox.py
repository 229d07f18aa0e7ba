"""Anchors for CogVideoX: pure functions that check and encode them, and make the model input of training and sampling.

Shapes as in [`animate.anchor`]: B batch, C latent channels, f/h/w latent frames, height and width. The causal VAE groups
frames as Wan's: frame 0 is latent frame 0, and every further four frames are one latent frame. CogVideoX 1.5 puts two latent
frames into one patch and pads the video at the front; [`animate.transformer_anchor_cogvideox`] explains the rule for patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..schedules.cogvideox import add_noise, times_of
from .anchor import Anchor, resolve_anchors
from .conditioning import AnchorLatents


def num_padding_frames(num_latent_frames: int, patch_size_t: int) -> int:
    """Returns how many latent frames are added before the first so that patches divide the video."""
    return -num_latent_frames % patch_size_t


def pad_to_patches(latents: torch.Tensor, patch_size_t: int) -> torch.Tensor:
    """Pads clean latents `(B, C, f, h, w)` at the front with copies of the first frame, as in the model's training.

    Source: THUDM/CogVideo, finetune/models/cogvideox_t2v/lora_trainer.py.
    """
    padding = num_padding_frames(latents.shape[2], patch_size_t)
    return torch.cat([latents[:, :, :1].expand(-1, -1, padding, -1, -1), latents], dim=2)


def patch_frames(index: int, num_latent_frames: int, patch_size_t: int) -> range:
    """Returns the latent frames, in the padded video, of the patch with latent frame `index` of the unpadded video."""
    start = (index + num_padding_frames(num_latent_frames, patch_size_t)) // patch_size_t * patch_size_t
    return range(start, start + patch_size_t)


def resolve_patch_anchors(
    anchors: Sequence[Anchor], num_frames: int, patch_size_t: int, temporal: int = 4
) -> list[tuple[range, Anchor]]:
    """Checks the anchors of one video and returns pairs of covered latent frames (unpadded) and anchor, in time order.

    Raises:
        `ValueError`: as in [`resolve_anchors`], or anchors fill a patch only partly or differ in strength within a patch.
    """
    pairs = resolve_anchors(anchors, num_frames, temporal)
    placed = {index: anchor for latents, anchor in pairs for index in latents}
    num_latent_frames = 1 + (num_frames - 1) // temporal
    padding = num_padding_frames(num_latent_frames, patch_size_t)
    for index, anchor in placed.items():
        # Padding copies frame 0, and is anchored with it.
        others = [max(0, padded - padding) for padded in patch_frames(index, num_latent_frames, patch_size_t)]
        for other in others:
            if other not in placed:
                first, last = (0, 0) if other == 0 else (temporal * (other - 1) + 1, temporal * other)
                count = temporal * patch_size_t
                raise ValueError(
                    f"The anchor at frame {anchor.frame_index} shares a patch of the model with frames {first} to {last}, "
                    f"which are not anchored, and a patch has one timestep; add an anchor at frame {last}, if need be with "
                    f"the same picture. A run of frames fills its patches with {count}k + 1 frames starting at frame 0, or "
                    f"{count}k starting at a frame {count}j + 1."
                )
            if placed[other].strength != anchor.strength:
                raise ValueError(
                    f"Anchors at frames {anchor.frame_index} and {placed[other].frame_index} share a patch of the model but "
                    f"have strengths {anchor.strength} and {placed[other].strength}; give them the same."
                )
    return pairs


def encode_anchor(vae, pixels: torch.Tensor, index: int = 0, device: torch.device | None = None) -> torch.Tensor:
    """Encodes an image, or a run of images, for the latent frames starting at `index`.

    CogVideoX's VAE pads a video in time by repeating its first frame, so a still image has the same latent at every
    position, which is the latent of the image alone. (Wan's VAE pads with zeros: see [`animate.conditioning.encode_anchor`].)
    The first image of a run is held still before the run.

    Args:
        vae (`AutoencoderKLCogVideoX`): a causal video VAE.
        pixels (`torch.Tensor` of shape `(B, 3, H, W)` or `(B, 3, F, H, W)`): in [-1, 1]; a run has 4k + 1 frames at position
            0 and 4k frames at a later one.
        index (`int`, *optional*): latent frame of the first image, from `latent_index`.
        device (`torch.device`, *optional*): device on which the VAE runs.

    Returns:
        `torch.Tensor` of shape `(B, C, k, h, w)`, float32, scaled as the video's latents; the mode of the posterior, not a
        sample. (The image channels of CogVideoX1.5-5B-I2V have the inverse scale, `invert_scale_latents`; an anchor is a
        frame of the video instead.)
    """
    clip = pixels if pixels.ndim == 5 else pixels[:, :, None]
    before = 0
    if index > 0 and clip.shape[2] > 1:
        # The VAE encodes chunks of two latent frames (the first chunk may have three) and normalises over each chunk. A run
        # gets its own chunks, as at its position in the video.
        before = min(index, 3 + (index - 1) % 2)
        held_frames = 1 + (before - 1) * int(vae.config.temporal_compression_ratio)
        held = clip[:, :, :1].expand(-1, -1, held_frames, -1, -1)
        clip = torch.cat([held, clip], dim=2)
    latents = vae.encode(clip.to(device=device, dtype=vae.dtype)).latent_dist.mode()[:, :, before:]
    return latents.float() * vae.config.scaling_factor


def impose(anchors: AnchorLatents, latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Puts the anchors into `latents` `(B, C, f, h, w)` at noise level `sigma`, a number or `(B,)`, float64.

    A frame with strength `s` has `1 - s` of the video's noise level.
    """
    anchored = (anchors.strength > 0)[:, None, :, None, None]
    noisy = add_noise(anchors.latents, anchors.noise, _frame_sigmas(anchors, sigma)[:, None, :, None, None])
    return torch.where(anchored, noisy.to(latents.dtype), latents)


def anchored_model_input(
    latents: torch.Tensor,
    sigma: torch.Tensor,
    timestep: torch.Tensor,
    anchors: AnchorLatents | None,
    sigmas: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `hidden_states` and `timestep` of one forward, in training and in sampling.

    A fixed anchor is clean and has timestep 0; the other frames share the video's timestep. With a strength below 1, a frame
    has its own noise level, and the timestep of that level in the model's table.

    Args:
        latents (`torch.Tensor` of shape `(B, C, f, h, w)`): noisy latents of the video, padded to patches.
        sigma (`torch.Tensor` of shape `()` or `(B,)`, float64): noise level in (0, 1].
        timestep (`torch.Tensor` of shape `(B,)`): the video's timestep, `times_of(sigma, sigmas)`.
        anchors (`AnchorLatents`, *optional*): `None` for plain text-to-video.
        sigmas (`torch.Tensor` of shape `(T,)`): noise level of each timestep, from [`training_sigmas`].

    Returns:
        `hidden_states` of shape `(B, C, f, h, w)`, and `timestep` of shape `(B, f)`, or `(B,)` without anchors.
    """
    if anchors is None:
        return latents, timestep
    times = times_of(_frame_sigmas(anchors, sigma), sigmas)
    return impose(anchors, latents, sigma), torch.where(anchors.strength > 0, times, timestep[:, None].to(times))


def _frame_sigmas(anchors: AnchorLatents, sigma: torch.Tensor) -> torch.Tensor:
    return (1 - anchors.strength.double()) * sigma.to(anchors.strength.device).double().reshape(-1, 1)


def channels_first(model: Callable, rotary_embedding: Callable) -> Callable:
    """Wraps a CogVideoX transformer in the call of Wan's: latents are `(B, C, f, h, w)`, the rotary embedding is added.

    Args:
        model (`Callable`): [`AnchorConditionedCogVideoXTransformer3D`], or a wrapper of it.
        rotary_embedding (`Callable`): the method `rotary_embedding` of that model.

    Returns:
        `Callable`: `call(hidden_states=, timestep=, encoder_hidden_states=, return_dict=False)`, which returns a tuple with
        the velocity.
    """

    def call(hidden_states, timestep, encoder_hidden_states, return_dict):
        rotary = rotary_embedding(*hidden_states.shape[2:], device=hidden_states.device)
        sample = model(
            hidden_states=hidden_states.transpose(1, 2),
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            image_rotary_emb=rotary,
            return_dict=return_dict,
        )[0]
        return (sample.transpose(1, 2),)

    return call
