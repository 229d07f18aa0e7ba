"""Decodes latents one latent frame at a time, so that the whole float video is never in memory.

Wan's VAE is causal and caches the features that its convolutions need of earlier frames; its own `decode` also works frame by
frame inside. Here each chunk of frames is converted as soon as it is final. With tiling, the memory is that of one tile.

Shape legend: B videos, C latent channels, f latent frames, h and w latent rows and columns; F, H, W the same in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanDecoder3d,
    WanResidualBlock,
    WanRMS_norm,
    unpatchify,
)
from torch import nn

from ..checks import check_latents, stop_unless_finite
from ..devices import get_module_execution_device
from ..kernels import fuses_norm, rms_norm_silu
from .conditioning import denormalize_latents
from .light_decoder import LightDecoder


# Converts final pixels `(B, 3, n, H, W)` in [-1, 1] to a tensor of the same shape, which is kept.
Convert = Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def decode_frames(vae: AutoencoderKLWan | LightDecoder, latents: torch.Tensor) -> Iterator[np.ndarray]:
    """Yields the frames of one video, each as soon as it is decoded, for example to [`~media.write_video`].

    The frames equal those of a whole decode, rounded to uint8. With tiling (`vae.enable_tiling()`), all frames come after the
    last tile and are held as uint8 until then. An offloaded VAE stays on the device: `pipe.maybe_free_model_hooks()` offloads
    it again.

    Args:
        vae (`AutoencoderKLWan` or [`LightDecoder`]): VAE of the pipeline, or a decoder of the same latents.
        latents (`torch.Tensor` of shape `(1, C, f, h, w)`): latents that the pipeline returns with `output_type="latent"`.

    Yields:
        `np.ndarray` of shape `(H, W, 3)`, uint8: 4 (f - 1) + 1 frames.

    Raises:
        `ValueError`: `latents` are not those of exactly one video of this VAE, or not finite.
        `FloatingPointError`: the decoder gave values that are not finite.
    """
    if latents.ndim != 5 or latents.shape[0] != 1:
        raise ValueError(
            f"`latents` has shape {tuple(latents.shape)}, but one video has (1, C, f, h, w): pass `latents[i : i + 1]`."
        )
    check_latents(latents, (1, vae.config.z_dim, None, None, None))
    latents = denormalize_latents(latents.to(get_module_execution_device(vae), dtype=vae.dtype), vae)
    for chunk in decode_chunks(vae, latents, to_uint8):
        yield from chunk[0].permute(1, 2, 3, 0).numpy()


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Converts [-1, 1] to uint8 on the CPU, with the same rounding as diffusers' video processor and
    [`~media.frames_to_uint8`]."""
    return (pixels * 0.5 + 0.5).clamp(0, 1).float().mul(255).round().to("cpu", torch.uint8)


def check_output_type(output_type: str) -> None:
    if output_type not in ("np", "uint8", "pt", "pil"):
        raise ValueError(f'Unknown `output_type` {output_type!r}: use "np", "uint8", "pt", "pil" or "latent".')


def decode_video(
    vae: AutoencoderKLWan | AutoencoderKLCogVideoX | LightDecoder,
    latents: torch.Tensor,
    output_type: str,
    tile: bool = False,
) -> np.ndarray | torch.Tensor | list[list[PIL.Image.Image]]:
    """Decodes latents to frames, with at most one chunk of the float video on the VAE's device, except for `"pt"`.

    Args:
        vae, latents, tile: as in [`decode_chunks`].
        output_type (`str`): `"np"` float32 in [0, 1] and `"uint8"`, both `np.ndarray` of shape `(B, F, H, W, 3)`; `"pt"`
            `torch.Tensor` of shape `(B, F, 3, H, W)` on the VAE's device and in its dtype; `"pil"` a list for each video.

    Raises:
        `ValueError`: `output_type` is another one.
        `FloatingPointError`: the decoder gave values that are not finite.
    """
    check_output_type(output_type)
    if output_type == "pt":
        chunks = decode_chunks(vae, latents, tile=tile, convert=lambda pixels: (pixels * 0.5 + 0.5).clamp(0, 1))
        return torch.cat(list(chunks), dim=2).transpose(1, 2)
    if output_type == "np":
        chunks = decode_chunks(
            vae, latents, tile=tile, convert=lambda pixels: (pixels * 0.5 + 0.5).clamp(0, 1).cpu().float()
        )
    else:
        chunks = decode_chunks(vae, latents, to_uint8, tile)
    video = np.concatenate([chunk.permute(0, 2, 3, 4, 1).numpy() for chunk in chunks], axis=1)
    if output_type == "pil":
        return [[PIL.Image.fromarray(frame) for frame in frames] for frames in video]
    return video


@torch.no_grad()
def decode_chunks(
    vae: AutoencoderKLWan | AutoencoderKLCogVideoX | LightDecoder,
    latents: torch.Tensor,
    convert: Convert,
    tile: bool = False,
) -> Iterator[torch.Tensor]:
    """Yields the frames of `vae.decode(latents)` in chunks of consecutive frames.

    Args:
        vae (`AutoencoderKLWan` or `AutoencoderKLCogVideoX`): the VAE; its settings of slicing and tiling apply. A
            [`LightDecoder`] decodes one frame at a time, without tiles.
        latents (`torch.Tensor` of shape `(B, C, f, h, w)`): input of `vae.decode`, on its device and in its dtype.
        convert (`Callable`): converts final pixels, of each chunk or tile; only its result is kept.
        tile (`bool`): whether to decode in tiles even if `vae.use_tiling` is `False`. The VAE is not changed.

    Yields:
        `torch.Tensor` of shape `(B, 3, n, H, W)`: results of `convert`, in the order of the frames.

    Raises:
        `FloatingPointError`: the decoder gave values that are not finite.
    """
    if isinstance(vae, LightDecoder):
        yield from map(convert, vae.frames(latents))
        return
    if hasattr(vae, "_hf_hook"):
        # Offloading moves a model when its `forward` is called. Here only its decoder is, so the hook is called directly.
        vae._hf_hook.pre_forward(vae)
    if vae.use_slicing and latents.shape[0] > 1:
        videos = [list(decode_chunks(vae, video, convert, tile)) for video in latents.split(1)]
        yield from (torch.cat(chunks) for chunks in zip(*videos, strict=True))
        return
    if isinstance(vae, AutoencoderKLCogVideoX):
        yield from _cogvideox_chunks(vae, latents, convert)
        return
    tile_height = vae.tile_sample_min_height // vae.spatial_compression_ratio
    tile_width = vae.tile_sample_min_width // vae.spatial_compression_ratio
    if (vae.use_tiling or tile) and (latents.shape[3] > tile_height or latents.shape[4] > tile_width):
        yield from _tiled_chunks(vae, latents, convert)
        return
    for decoded in _decoded(vae, vae.post_quant_conv(latents)):
        yield convert(_pixels(vae, decoded))


def _decoded(vae: AutoencoderKLWan, features: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields the decoder's output for each latent frame: one frame for the first, then four."""
    cache = [None] * sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
    for index in range(features.shape[2]):
        frame = features[:, :, index : index + 1]
        with _fused_norms(vae.decoder, frame):
            decoded = vae.decoder(frame, feat_cache=cache, feat_idx=[0], first_chunk=index == 0)
        yield decoded


@contextmanager
def _fused_norms(decoder: WanDecoder3d, features: torch.Tensor) -> Iterator[None]:
    """Fuses each norm of the decoder with the SiLU after it within the block, if the Triton kernel is active. A decoder that
    is compiled, hooked or has other layers is not changed."""
    if not fuses_norm(features):
        yield
        return
    pairs = [
        (getattr(block, name), block.nonlinearity)
        for block in decoder.modules()
        if isinstance(block, (WanResidualBlock, WanDecoder3d))
        for name in ("norm1", "norm2", "norm_out")
        if hasattr(block, name)
    ]
    parts = {part for pair in pairs for part in pair}
    is_own = all(
        type(norm) is WanRMS_norm and norm.channel_first and isinstance(norm.bias, float) and type(silu) is nn.SiLU
        for norm, silu in pairs
    )
    is_hooked = any("forward" in part.__dict__ or part._forward_hooks or part._forward_pre_hooks for part in parts)
    is_compiled = any(module._compiled_call_impl is not None for module in decoder.modules())
    with ExitStack() as undo:
        if is_own and not is_hooked and not is_compiled:
            for norm, silu in pairs:
                norm.forward = partial(rms_norm_silu, weight=norm.gamma.flatten())
                silu.forward = _same
            for part in parts:
                undo.callback(delattr, part, "forward")
        yield


def _same(hidden_states: torch.Tensor) -> torch.Tensor:
    return hidden_states


def _pixels(vae: AutoencoderKLWan, decoded: torch.Tensor) -> torch.Tensor:
    stop_unless_finite("decode", decoded)
    if vae.config.patch_size is not None:
        decoded = unpatchify(decoded, patch_size=vae.config.patch_size)
    return decoded.clamp(-1, 1)


def _tiled_chunks(vae: AutoencoderKLWan, latents: torch.Tensor, convert: Convert) -> Iterator[torch.Tensor]:
    """Decodes as `vae.tiled_decode`, but keeps only the edges of tiles that are blended, not their float videos."""
    _, _, num_latents, height, width = latents.shape
    ratio, patch = vae.spatial_compression_ratio, vae.config.patch_size or 1
    tile_height, tile_width = vae.tile_sample_min_height // ratio, vae.tile_sample_min_width // ratio
    step_height, step_width = vae.tile_sample_stride_height // ratio, vae.tile_sample_stride_width // ratio
    # Tiles are blended before patches are unfolded, so these sizes are in pixels of the decoder's output.
    kept_height, kept_width = vae.tile_sample_stride_height // patch, vae.tile_sample_stride_width // patch
    blend_height = vae.tile_sample_min_height // patch - kept_height
    blend_width = vae.tile_sample_min_width // patch - kept_width

    video: Any = None
    above: list[torch.Tensor] = []
    for row, top in enumerate(range(0, height, step_height)):
        edges, left = [], None
        for column, begin in enumerate(range(0, width, step_width)):
            tile = latents[..., top : top + tile_height, begin : begin + tile_width]
            # Frame by frame, as in diffusers: one convolution over all frames may round differently.
            features = torch.cat([vae.post_quant_conv(frame) for frame in tile.split(1, dim=2)], dim=2)
            tile = torch.cat(list(_decoded(vae, features)), dim=2)
            if row > 0:
                tile = vae.blend_v(above[column], tile, blend_height)
            if column > 0:
                tile = vae.blend_h(left, tile, blend_width)
            edges.append(tile[..., -blend_height:, :].clone())
            left = tile[..., -blend_width:].clone()
            piece = convert(_pixels(vae, tile[..., :kept_height, :kept_width]))
            if video is None:
                video = piece.new_empty(*piece.shape[:3], height * ratio, width * ratio)
            y, x = row * kept_height * patch, column * kept_width * patch
            video[..., y : y + piece.shape[3], x : x + piece.shape[4]] = piece
        above = edges
    lengths = [1] + [(video.shape[2] - 1) // max(num_latents - 1, 1)] * (num_latents - 1)
    yield from video.split(lengths, dim=2)


def _cogvideox_chunks(vae: AutoencoderKLCogVideoX, latents: torch.Tensor, convert: Convert) -> Iterator[torch.Tensor]:
    """Decodes CogVideoX latents in chunks: two latent frames at a time, the first three if their number is odd."""
    height, width = latents.shape[3:]
    if vae.use_tiling and (height > vae.tile_latent_min_height or width > vae.tile_latent_min_width):
        decoded = vae.tiled_decode(latents, return_dict=False)[0]
        stop_unless_finite("decode", decoded)
        yield convert(decoded)
        return
    step, cache = vae.num_latent_frames_batch_size, None
    rest = latents.shape[2] % step
    begin = 0
    for end in range(min(step + rest, latents.shape[2]), latents.shape[2] + 1, step):
        frames = latents[:, :, begin:end]
        if vae.post_quant_conv is not None:
            frames = vae.post_quant_conv(frames)
        decoded, cache = vae.decoder(frames, conv_cache=cache)
        stop_unless_finite("decode", decoded)
        yield convert(decoded)
        begin = end
