"""From the anchors of a batch of videos to latents, by the VAE. The other way is [`animate.decoding`]."""

from __future__ import annotations

import torch
from diffusers.utils.torch_utils import randn_tensor

from ..devices import get_module_execution_device
from .anchor import Anchor, AnchorLatents, AppendedAnchors, anchor_pixels, encode_anchor
from .placing import frame_position, is_appended, resolve_anchors


Generators = torch.Generator | list[torch.Generator] | None


def encode_anchors(
    vae,
    anchors: list[list[Anchor]],
    latents: torch.Tensor,
    height: int,
    width: int,
    num_frames: int,
    generator: Generators = None,
    form: str = "slot",
) -> AnchorLatents:
    """Encodes the anchors of each video.

    Args:
        vae (`AutoencoderKLWan`): a causal video VAE.
        anchors (`list[list[Anchor]]`): one list per video.
        latents (`torch.Tensor` of shape `(B, C, f, h, w)`): gives shape, device and dtype.
        height, width, num_frames (`int`): of the video, in pixels and frames.
        generator (*optional*): draws the noise of anchors whose strength is below 1.
        form (`str`, *optional*): `"slot"` or `"appended"`, see [`animate.placing`].

    Raises:
        `ValueError`: as in [`~animate.placing.resolve_anchors`].
    """
    # Videos of one prompt share their picture: each is encoded once for each position.
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
    noise, appended = _noise(clean, strength, generator), None
    if any(behind):
        # A picture alone is what the VAE makes of a first frame.
        appended = _appended(
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


def _appended(
    rows: list[list[tuple[torch.Tensor, float, float]]], like: torch.Tensor, generator: Generators
) -> AppendedAnchors:
    """Latents `(C, 1, h, w)`, strength and position of each anchor of each video, side by side."""
    count = max(map(len, rows))
    batch_size, channels, _, *size = like.shape
    clean, strength = like.new_zeros(batch_size, channels, count, *size), like.new_zeros(batch_size, count)
    positions = torch.full((batch_size, count), -1.0, dtype=torch.float64)
    for video, row in enumerate(rows):
        for place, (latent, share, position) in enumerate(row):
            clean[video, :, place : place + 1] = latent
            strength[video, place], positions[video, place] = share, position
    return AppendedAnchors(clean, strength, _noise(clean, strength, generator), positions)


def _noise(clean: torch.Tensor, strength: torch.Tensor, generator: Generators) -> torch.Tensor:
    if not ((strength > 0) & (strength < 1)).any():
        return torch.zeros_like(clean)
    return randn_tensor(clean.shape, generator=generator, device=clean.device, dtype=clean.dtype)
