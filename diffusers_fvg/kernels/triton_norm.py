"""Triton implementation of [`reference.rms_norm_silu`], the norm of Wan's VAE with its SiLU, in one pass over the features.

B batch, C channels, P pixels of all frames. A tile, `[BLOCK_C, BLOCK_P]`, holds all channels of some neighbouring pixels. Its
reads are contiguous along pixels in torch's default layout, and along channels in `channels_last_3d`. Arithmetic is in
float32. The kernel has no backward pass: training the VAE uses the reference.
"""

import torch
import triton
import triton.language as tl


# Float32 values of a tile: 32 registers per thread with 16 warps. With 8 warps, the 64 registers per thread spill.
_TILE_ELEMENTS, _NUM_WARPS = 16384, 16
# Default of torch.nn.functional.normalize, which the VAE calls.
_EPS = 1e-12


@triton.jit
def _rms_norm_silu_kernel(
    x_ptr, weight_ptr, out_ptr,
    C, P, root, eps,
    x_b, x_c, x_p,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Computes `n = x / max(norm_c(x), eps) * root * weight`, `out = n * sigmoid(n)`.

    Grid: (B * blocks of BLOCK_P pixels,).
    """
    pieces = tl.cdiv(P, BLOCK_P)
    pid = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)[:, None]  # [BLOCK_C, 1]
    p = pid % pieces * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]  # [1, BLOCK_P]
    mask = (c < C) & (p < P)
    # The features of a long clip can have more than 2^31 elements, so the offsets are int64.
    offset = pid // pieces * x_b + c.to(tl.int64) * x_c + p * x_p
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(x * x, axis=0, keep_dims=True)), eps)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    normed = x / norm * root * weight
    out = normed / (1.0 + tl.exp(-normed))
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)


def _tile(channels: int) -> dict[str, int]:
    block_c = triton.next_power_of_2(channels)
    return {"BLOCK_C": block_c, "BLOCK_P": max(1, _TILE_ELEMENTS // block_c), "num_warps": _NUM_WARPS}


def _flat(x: torch.Tensor) -> torch.Tensor:
    """Reshapes (B, C, F, H, W) to (B, C, P); copies features that are not contiguous in either layout."""
    is_packed = x.is_contiguous() or (x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d))
    return (x if is_packed else x.contiguous()).flatten(2)


def rms_norm_silu(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Computes [`reference.rms_norm_silu`] for float32, float16 and bfloat16; the result has the layout of `hidden_states`."""
    x = _flat(hidden_states)
    batch_size, channels, pixels = x.shape
    # The kernel has one set of strides, so the output has the layout of `x`.
    shape, is_channels_last = (batch_size, pixels, channels), x.stride(1) == 1
    out = torch.empty(shape if is_channels_last else x.shape, dtype=x.dtype, device=x.device)
    out = out.transpose(1, 2) if is_channels_last else out
    tile = _tile(channels)
    with torch.cuda.device_of(x):
        _rms_norm_silu_kernel[(batch_size * triton.cdiv(pixels, tile["BLOCK_P"]),)](
            x, weight.contiguous(), out,
            channels, pixels, channels**0.5, _EPS,
            *x.stride(),
            **tile,
        )  # fmt: skip
    return out.view(hidden_states.shape)
