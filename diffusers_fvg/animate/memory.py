"""What decoding needs and what there is: decides whether the VAE works in tiles."""

from __future__ import annotations

import os
from typing import Any

import torch


# Live copies of the decoder's activation at its full resolution, at the peak of a chunk of four frames: what counting the
# live tensors of Wan 2.1's and of Wan 2.2's decoder (residual blocks) on shapes gives, 13.2 and 21.1, rounded up. The features
# that the causal convolutions keep are among them.
_ACTIVATION_COPIES, _CHUNK_FRAMES = {False: 14, True: 22}, 4
# The same of CogVideoX's, whose first chunk may be of nine frames: 19.9.
_COGVIDEOX_COPIES, _COGVIDEOX_CHUNK_FRAMES = 20, 9


def decode_bytes(
    config: Any, latents_shape: tuple[int, ...], element_size: int, tile_pixels: int | None = None
) -> int:
    """Peak of decoding latents `(B, C, f, h, w)` in chunks, above the weights of the VAE: an estimate on the safe side.

    Args:
        config: of an [`AutoencoderKLWan`] or an [`AutoencoderKLCogVideoX`].
        latents_shape (`tuple`): of the latents.
        element_size (`int`): bytes of a number.
        tile_pixels (`int`, *optional*): pixels of a tile, where the VAE works in tiles. A column of tiles' edges and a tile
            are then held for all frames, less than the float video; CogVideoX's holds all tiles and joins them.
    """
    batch_size, _, num_latent_frames, height, width = latents_shape
    if "temporal_compression_ratio" in config:
        pixels = height * width * 4 ** (len(config.block_out_channels) - 1)
        per_pixel = config.block_out_channels[0] * _COGVIDEOX_CHUNK_FRAMES * _COGVIDEOX_COPIES
        elements = pixels * per_pixel
        if tile_pixels is not None:
            video = 3 * pixels * ((num_latent_frames - 1) * config.temporal_compression_ratio + 1)
            elements = min(tile_pixels, pixels) * per_pixel + 2 * video
        return batch_size * int(elements) * element_size
    pixels = height * width * config.scale_factor_spatial**2
    channels = config.decoder_base_dim or config.base_dim
    per_pixel = channels * _CHUNK_FRAMES * _ACTIVATION_COPIES[config.is_residual] // (config.patch_size or 1) ** 2
    if tile_pixels is None:
        elements = pixels * per_pixel
    else:
        video = 3 * pixels * ((num_latent_frames - 1) * config.scale_factor_temporal + 1)
        elements = min(tile_pixels, pixels) * per_pixel + video
    return batch_size * elements * element_size


def decoder_bytes(vae, latents: torch.Tensor) -> int:
    """[`decode_bytes`] of whole frames of latents `(B, C, f, h, w)`."""
    return decode_bytes(vae.config, tuple(latents.shape), latents.element_size())


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # Not known on this platform: decode whole, as stock pipelines do.
    return 1 << 62
