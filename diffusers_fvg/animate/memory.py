"""Estimates the memory that decoding needs and the memory that is free, to decide whether the VAE decodes in tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch


# Copies of the decoder's full-resolution activation that are in memory at the peak of a chunk of four frames. Counting the
# tensors of Wan 2.1's and Wan 2.2's decoder (residual blocks) by their shapes gives 13.2 and 21.1, rounded up here. This
# includes the cached features of the causal convolutions.
_ACTIVATION_COPIES, _CHUNK_FRAMES = {False: 14, True: 22}, 4
# The same for CogVideoX's decoder, whose first chunk may have nine frames: 19.9.
_COGVIDEOX_COPIES, _COGVIDEOX_CHUNK_FRAMES = 20, 9

# Linux' control groups, by which containers and clusters limit memory: versions 2 and 1.
_CGROUPS, _OF_PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_CGROUP_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def decode_bytes(
    config: Any, latents_shape: tuple[int, ...], element_size: int, tile_pixels: int | None = None
) -> int:
    """Estimates, on the safe side, the peak memory in bytes of decoding latents in chunks, without the VAE's weights.

    Args:
        config: config of an [`AutoencoderKLWan`] or an [`AutoencoderKLCogVideoX`].
        latents_shape (`tuple`): shape of the latents, `(B, C, f, h, w)`.
        element_size (`int`): bytes of one value.
        tile_pixels (`int`, *optional*): pixels of a tile, if the VAE decodes in tiles. The edges of a row of tiles and one
            tile are then held for all frames, which is less than the float video; CogVideoX's VAE holds all tiles.
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
    """Returns [`decode_bytes`] of latents `(B, C, f, h, w)` without tiling."""
    return decode_bytes(vae.config, tuple(latents.shape), latents.element_size())


def free_bytes(device: torch.device) -> int:
    """Returns the memory of a device that can be used, in bytes.

    On a CPU this includes the system's cache of files, and the limit of a container or of a cluster's job counts.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([psutil.virtual_memory().available, *_free_in_groups()])


def _free_in_groups() -> list[int]:
    """Returns the bytes that the limit of each control group of this process leaves; nothing for groups without a limit.

    Of the cache of files, what was not used lately counts as free, as for the memory that Kubernetes says a container uses.
    """
    try:
        lines = [line.split(":", 2) for line in _OF_PROCESS.read_text().splitlines()]
    except OSError:
        return []
    free = []
    for _, controllers, place in lines:
        version = "memory" if "memory" in controllers.split(",") else controllers
        if version not in _CGROUP_FILES:
            continue
        limit, usage, cache = _CGROUP_FILES[version]
        # In a container, the path may be that of the host, of which only the root is there.
        for group in (Path(place), *Path(place).parents):
            folder = _CGROUPS / version / group.relative_to("/")
            try:
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / usage).read_text()) - int(stat[cache])
                free.append(max(int((folder / limit).read_text()) - used, 0))
            except (OSError, KeyError, ValueError):
                # No such group here, or its limit is "max".
                continue
    return free
