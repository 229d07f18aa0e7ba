"""What decoding needs and what there is: decides whether the VAE works in tiles."""

from __future__ import annotations

import os

import torch


# Live copies of the decoder's widest activation at the peak of a chunk, and the frames of a chunk of Wan's VAE. An estimate
# from its source, on the safe side: it only decides about tiles.
_ACTIVATION_COPIES, _CHUNK_FRAMES = 6, 4


def decoder_bytes(vae, latents: torch.Tensor) -> int:
    """Rough peak of decoding latents `(B, C, f, h, w)`: one chunk's widest activation, the latents' video and its copy."""
    batch_size, _, num_latent_frames, height, width = latents.shape
    pixels = batch_size * height * width * vae.config.scale_factor_spatial**2
    channels = vae.config.decoder_base_dim or vae.config.base_dim
    activation = pixels // (vae.config.patch_size or 1) ** 2 * channels * _CHUNK_FRAMES * _ACTIVATION_COPIES
    video = 2 * 3 * pixels * ((num_latent_frames - 1) * vae.config.scale_factor_temporal + 1)
    return (activation + video) * latents.element_size()


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # Not known on this platform: decode whole, as stock pipelines do.
    return 1 << 62
