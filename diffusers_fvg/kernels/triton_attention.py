"""Triton implementation of [`attention.frame_attention`], which never reads unseen frames, forward or backward.

B batch, L tokens, N heads, H channels of a head, F frames of T = L / F tokens. A program owns BLOCK_Q tokens of one frame
and head. It passes over the runs of consecutive frames that its frame sees, BLOCK_K tokens at a time. The tokens of a run are
consecutive in memory, so T can have any value and only the last block of a run is masked.

The forward pass uses the online softmax (arXiv 1805.02867). The backward pass computes the softmax again from the saved
logarithm of its sum (FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2). Matrix products have the dtype of the inputs
and sums are in float32; float32 inputs are multiplied without TF32.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from . import triton_modulation
from .attention import once_for_tensor


# Triton's interpreter would multiply the bit patterns of bfloat16 values, so `_dot` converts them first.
INTERPRETED = tl.constexpr(triton_modulation.INTERPRETED)
# The kernels compute powers of 2, so their `scale` includes the factor log2(e). Gradients need the scale without this factor.
LN_2 = tl.constexpr(math.log(2))
_LOG2_E = math.log2(math.e)
# Largest blocks of 16-bit tokens: (owned by a program, read in one iteration). The backward kernels hold twice as many
# tensors in registers as the forward kernel.
_FORWARD_BLOCKS, _QUERY_BLOCKS, _KEY_VALUE_BLOCKS = (128, 64), (128, 32), (128, 32)


@triton.jit
def _owner(T, N, BLOCK: tl.constexpr):
    """Returns a program's frame, the first token of its block in the frame, its sample, and its head.

    Grid: (F * blocks of a frame, B * N).
    """
    pieces = tl.cdiv(T, BLOCK)
    pid, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    return pid // pieces, pid % pieces * BLOCK, sample // N, sample % N


@triton.jit
def _load(ptr, base, t, t_stride, h, h_stride, T, H: tl.constexpr):
    """Loads the tokens `t` of the frame at `base`, `[BLOCK, BLOCK_H]`; values outside the frame are 0."""
    return tl.load(
        ptr + base + t[:, None] * t_stride + h[None, :] * h_stride, (t[:, None] < T) & (h[None, :] < H), 0.0
    )


@triton.jit
def _dot(a, b, out, PRECISION: tl.constexpr):
    """Returns `out + a @ b`, or `a @ b` if `out` is `None`."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, out, input_precision=PRECISION)


@triton.jit
def _whole(pointers, h, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Loads a block whose tokens all lie inside the run, so that only the channels may need a mask."""
    if H == BLOCK_H:
        return tl.load(pointers)
    return tl.load(pointers, h[None, :] < H, 0.0)


@triton.jit
def _attend(query, key, value, top, total, out, scale, keep, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Adds a block of keys to the online softmax; returns the largest score, the sum of the weights and the weighted sum."""
    scores = _dot(query, tl.trans(key), None, PRECISION)
    if MASKED:
        scores = tl.where(keep[None, :], scores, float("-inf"))
    # Scaling inside the exponent costs one fused multiply-add for each score.
    new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
    weights = tl.exp2(scores * scale - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, axis=1)
    return new_top, total, _dot(weights.to(value.dtype), value, out * shrink[:, None], PRECISION)


@triton.jit
def _fwd_kernel(
    query_ptr, key_ptr, value_ptr, count_ptr, runs_ptr, out_ptr, lse_ptr,
    F, T, N, scale,
    query_b, query_l, query_n, query_h, key_b, key_l, key_n, key_h, value_b, value_l, value_n, value_h,
    H: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes `out = softmax2(scale * query @ key^T) @ value` over the seen frames.

    `softmax2` is the softmax with powers of 2; `scale` includes log2(e). `lse` (B, N, L), the base-2 logarithm of the sum of
    the powers, is saved for the backward pass.
    """
    frame, start, b, n = _owner(T, N, BLOCK_Q)
    L = F * T
    t, h = start + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_H)
    first = frame.to(tl.int64) * T
    query = _load(query_ptr, b * query_b + n * query_n + first * query_l, t, query_l, h, query_h, T, H)

    top = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_Q], dtype=tl.float32)
    out = tl.zeros([BLOCK_Q, BLOCK_H], dtype=tl.float32)
    s = tl.arange(0, BLOCK_K)
    row = b * F + frame
    for run in range(0, tl.load(count_ptr + row)):
        begin = tl.load(runs_ptr + (row * F + run) * 2).to(tl.int64) * T
        size = tl.load(runs_ptr + (row * F + run) * 2 + 1) * T
        whole = size // BLOCK_K * BLOCK_K
        keys = key_ptr + b * key_b + n * key_n + begin * key_l + s[:, None] * key_l + h[None, :] * key_h
        values = value_ptr + b * value_b + n * value_n + begin * value_l + s[:, None] * value_l + h[None, :] * value_h
        for _ in range(0, whole, BLOCK_K):
            key, value = _whole(keys, h, H, BLOCK_H), _whole(values, h, H, BLOCK_H)
            top, total, out = _attend(query, key, value, top, total, out, scale, s, False, PRECISION)
            keys += BLOCK_K * key_l
            values += BLOCK_K * value_l
        if whole < size:
            keep = whole + s < size
            mask = keep[:, None] & (h[None, :] < H)
            key, value = tl.load(keys, mask, 0.0), tl.load(values, mask, 0.0)
            top, total, out = _attend(query, key, value, top, total, out, scale, keep, True, PRECISION)

    token = (b * L + first + t)[:, None]
    mask = (t[:, None] < T) & (h[None, :] < H)
    out = out / total[:, None]
    tl.store(out_ptr + (token * N + n) * H + h[None, :], out.to(out_ptr.dtype.element_ty), mask)
    tl.store(lse_ptr + (b * N + n) * L + first + t, top + tl.log2(total), t < T)


@triton.jit
def _query_step(
    query, grad, key, value, lse, delta, dquery, scale, keep, MASKED: tl.constexpr, PRECISION: tl.constexpr
):
    """Adds the contribution of a block of keys to the gradient of the queries."""
    weights = tl.exp2(_dot(query, tl.trans(key), None, PRECISION) * scale - lse[:, None])
    if MASKED:
        # A key beyond the run is loaded as 0. Its score of 0 could have an infinite weight, and infinity times 0 is NaN.
        weights = tl.where(keep[None, :], weights, 0.0)
    dscores = weights * (_dot(grad, tl.trans(value), None, PRECISION) - delta[:, None])
    return _dot(dscores.to(key.dtype), key, dquery, PRECISION)


@triton.jit
def _bwd_query_kernel(
    grad_ptr, query_ptr, key_ptr, value_ptr, count_ptr, runs_ptr, out_ptr, lse_ptr, delta_ptr, dquery_ptr,
    F, T, N, scale,
    grad_b, grad_l, grad_n, grad_h,
    query_b, query_l, query_n, query_h, key_b, key_l, key_n, key_h, value_b, value_l, value_n, value_h,
    H: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes `dquery = ds @ key / sqrt(H)` with `ds = p * (grad @ value^T - delta)` and `p` the softmax.

    `delta = sum_h(grad * out)` (B, N, L) is saved for `_bwd_key_value_kernel`.
    """
    frame, start, b, n = _owner(T, N, BLOCK_Q)
    L = F * T
    t, h = start + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_H)
    first = frame.to(tl.int64) * T
    token = (b * L + first + t)[:, None]
    mask = (t[:, None] < T) & (h[None, :] < H)
    query = _load(query_ptr, b * query_b + n * query_n + first * query_l, t, query_l, h, query_h, T, H)
    grad = _load(grad_ptr, b * grad_b + n * grad_n + first * grad_l, t, grad_l, h, grad_h, T, H)
    out = tl.load(out_ptr + (token * N + n) * H + h[None, :], mask, 0.0)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    row = (b * N + n) * L + first + t
    tl.store(delta_ptr + row, delta, t < T)
    lse = tl.load(lse_ptr + row, t < T, 0.0)

    dquery = tl.zeros([BLOCK_Q, BLOCK_H], dtype=tl.float32)
    s = tl.arange(0, BLOCK_K)
    line = b * F + frame
    for run in range(0, tl.load(count_ptr + line)):
        begin = tl.load(runs_ptr + (line * F + run) * 2).to(tl.int64) * T
        size = tl.load(runs_ptr + (line * F + run) * 2 + 1) * T
        whole = size // BLOCK_K * BLOCK_K
        keys = key_ptr + b * key_b + n * key_n + begin * key_l + s[:, None] * key_l + h[None, :] * key_h
        values = value_ptr + b * value_b + n * value_n + begin * value_l + s[:, None] * value_l + h[None, :] * value_h
        for _ in range(0, whole, BLOCK_K):
            key, value = _whole(keys, h, H, BLOCK_H), _whole(values, h, H, BLOCK_H)
            dquery = _query_step(query, grad, key, value, lse, delta, dquery, scale, s, False, PRECISION)
            keys += BLOCK_K * key_l
            values += BLOCK_K * value_l
        if whole < size:
            keep = whole + s < size
            mask_k = keep[:, None] & (h[None, :] < H)
            key, value = tl.load(keys, mask_k, 0.0), tl.load(values, mask_k, 0.0)
            dquery = _query_step(query, grad, key, value, lse, delta, dquery, scale, keep, True, PRECISION)

    dquery = dquery * (scale * LN_2)
    tl.store(dquery_ptr + (token * N + n) * H + h[None, :], dquery.to(dquery_ptr.dtype.element_ty), mask)


@triton.jit
def _key_value_step(query, grad, key, value, lse, delta, dkey, dvalue, scale, PRECISION: tl.constexpr):
    """Adds the contribution of a block of queries to the gradients of keys and values.

    Queries beyond the run need no mask: query, gradient and delta are loaded as 0 there, so they add 0.
    """
    weights = tl.exp2(_dot(key, tl.trans(query), None, PRECISION) * scale - lse[None, :])  # [BLOCK_K, BLOCK_Q]
    dvalue = _dot(weights.to(grad.dtype), grad, dvalue, PRECISION)
    dscores = weights * (_dot(value, tl.trans(grad), None, PRECISION) - delta[None, :])
    return _dot(dscores.to(query.dtype), query, dkey, PRECISION), dvalue


@triton.jit
def _bwd_key_value_kernel(
    grad_ptr, query_ptr, key_ptr, value_ptr, count_ptr, runs_ptr, lse_ptr, delta_ptr, dkey_ptr, dvalue_ptr,
    F, T, N, scale,
    grad_b, grad_l, grad_n, grad_h,
    query_b, query_l, query_n, query_h, key_b, key_l, key_n, key_h, value_b, value_l, value_n, value_h,
    H: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes `dvalue = p^T @ grad` and `dkey = ds^T @ query / sqrt(H)`.

    A program owns BLOCK_K tokens of a key frame. `count` and `runs` list the frames that see the key frame; the list may be
    empty.
    """
    frame, start, b, n = _owner(T, N, BLOCK_K)
    L = F * T
    s, h = start + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_H)
    first = frame.to(tl.int64) * T
    key = _load(key_ptr, b * key_b + n * key_n + first * key_l, s, key_l, h, key_h, T, H)
    value = _load(value_ptr, b * value_b + n * value_n + first * value_l, s, value_l, h, value_h, T, H)

    dkey = tl.zeros([BLOCK_K, BLOCK_H], dtype=tl.float32)
    dvalue = tl.zeros([BLOCK_K, BLOCK_H], dtype=tl.float32)
    t = tl.arange(0, BLOCK_Q)
    line = b * F + frame
    for run in range(0, tl.load(count_ptr + line)):
        begin = tl.load(runs_ptr + (line * F + run) * 2).to(tl.int64) * T
        size = tl.load(runs_ptr + (line * F + run) * 2 + 1) * T
        whole = size // BLOCK_Q * BLOCK_Q
        queries = query_ptr + b * query_b + n * query_n + begin * query_l + t[:, None] * query_l + h[None, :] * query_h
        grads = grad_ptr + b * grad_b + n * grad_n + begin * grad_l + t[:, None] * grad_l + h[None, :] * grad_h
        row = (b * N + n) * L + begin + t
        for done in range(0, whole, BLOCK_Q):
            query, grad = _whole(queries, h, H, BLOCK_H), _whole(grads, h, H, BLOCK_H)
            lse, delta = tl.load(lse_ptr + row + done), tl.load(delta_ptr + row + done)
            dkey, dvalue = _key_value_step(query, grad, key, value, lse, delta, dkey, dvalue, scale, PRECISION)
            queries += BLOCK_Q * query_l
            grads += BLOCK_Q * grad_l
        if whole < size:
            keep = whole + t < size
            mask_q = keep[:, None] & (h[None, :] < H)
            query, grad = tl.load(queries, mask_q, 0.0), tl.load(grads, mask_q, 0.0)
            lse, delta = tl.load(lse_ptr + row + whole, keep, 0.0), tl.load(delta_ptr + row + whole, keep, 0.0)
            dkey, dvalue = _key_value_step(query, grad, key, value, lse, delta, dkey, dvalue, scale, PRECISION)

    out = ((b * L + first + s)[:, None] * N + n) * H + h[None, :]
    mask = (s[:, None] < T) & (h[None, :] < H)
    dkey = dkey * (scale * LN_2)
    tl.store(dkey_ptr + out, dkey.to(dkey_ptr.dtype.element_ty), mask)
    tl.store(dvalue_ptr + out, dvalue.to(dvalue_ptr.dtype.element_ty), mask)


def _tile(tokens: int, head_dim: int, dtype: torch.dtype, own: str, limits: tuple[int, int]) -> dict[str, Any]:
    """Returns the launch settings; `limits` are the largest blocks of owned and of read tokens, reduced for small frames."""
    is_wide = dtype == torch.float32
    owned, passing = (min(limit // (2 if is_wide else 1), max(16, triton.next_power_of_2(tokens))) for limit in limits)
    block_h = max(16, triton.next_power_of_2(head_dim))
    blocks = {"BLOCK_Q": owned, "BLOCK_K": passing} if own == "query" else {"BLOCK_Q": passing, "BLOCK_K": owned}
    return {
        **blocks,
        "H": head_dim,
        "BLOCK_H": block_h,
        "PRECISION": "ieee" if is_wide else "tf32",
        "num_warps": 8 if owned * block_h >= 128 * 64 else 4,
        "num_stages": 3,
    }


def _listed(seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the number of set frames of each row, and the frames with the set ones first, in order."""
    # The result of argsort has the memory layout of its input; the kernels read it as contiguous.
    seen = seen.contiguous()
    frames = seen.to(torch.int8).argsort(dim=2, descending=True, stable=True)
    return seen.sum(dim=2, dtype=torch.int32), frames.to(torch.int32)


@once_for_tensor
def _runs(seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the number of runs of consecutive seen frames of each row, `(B, F)`, and each run's first frame and length,
    `(B, F, F, 2)`."""
    edge = torch.zeros_like(seen[..., :1])
    starts, ends = seen & ~torch.cat([edge, seen[..., :-1]], 2), seen & ~torch.cat([seen[..., 1:], edge], 2)
    count, first = _listed(starts)
    return count, torch.stack([first, _listed(ends)[1] - first + 1], dim=3)


@once_for_tensor
def _runs_that_see(seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the [`_runs`] of the frames that see each frame."""
    return _runs(seen.transpose(1, 2))


def _sizes(query: torch.Tensor, seen: torch.Tensor) -> tuple[int, int, int, float]:
    return seen.shape[1], query.shape[1] // seen.shape[1], query.shape[2], _LOG2_E / math.sqrt(query.shape[3])


def _grid(query: torch.Tensor, seen: torch.Tensor, block: int) -> tuple[int, int]:
    frames, tokens, heads, _ = _sizes(query, seen)
    return frames * triton.cdiv(tokens, block), query.shape[0] * heads


@torch.library.custom_op(
    "diffusers_fvg::frame_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor seen) -> (Tensor, Tensor)",
)
def _frame_attention_op(query, key, value, seen):
    out, lse = _frame_attention_outputs(query, key, value, seen)
    tile = _tile(query.shape[1] // seen.shape[1], query.shape[3], query.dtype, "query", _FORWARD_BLOCKS)
    # Triton launches on the current device, which may not be the tensors' device if a model is spread over several GPUs.
    with torch.cuda.device_of(query):
        _fwd_kernel[_grid(query, seen, tile["BLOCK_Q"])](
            query, key, value, *_runs(seen), out, lse,
            *_sizes(query, seen), *query.stride(), *key.stride(), *value.stride(), **tile,
        )  # fmt: skip
    return out, lse


@_frame_attention_op.register_fake
def _frame_attention_outputs(query, key, value, seen):
    batch_size, length, heads, _ = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return out, torch.empty((batch_size, heads, length), dtype=torch.float32, device=query.device)


@torch.library.custom_op(
    "diffusers_fvg::frame_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor seen, Tensor out, Tensor lse)"
    " -> (Tensor, Tensor, Tensor)",
)
def _frame_attention_backward_op(grad, query, key, value, seen, out, lse):
    dquery, dkey, dvalue = _frame_attention_grads(grad, query, key, value, seen, out, lse)
    delta = torch.empty(lse.shape, dtype=lse.dtype, device=lse.device)
    tokens, head_dim = query.shape[1] // seen.shape[1], query.shape[3]
    sizes = (*_sizes(query, seen), *grad.stride(), *query.stride(), *key.stride(), *value.stride())
    with torch.cuda.device_of(query):
        tile = _tile(tokens, head_dim, query.dtype, "query", _QUERY_BLOCKS)
        _bwd_query_kernel[_grid(query, seen, tile["BLOCK_Q"])](
            grad, query, key, value, *_runs(seen), out, lse, delta, dquery, *sizes, **tile
        )
        tile = _tile(tokens, head_dim, query.dtype, "key", _KEY_VALUE_BLOCKS)
        _bwd_key_value_kernel[_grid(query, seen, tile["BLOCK_K"])](
            grad, query, key, value, *_runs_that_see(seen), lse, delta, dkey, dvalue, *sizes, **tile
        )
    return dquery, dkey, dvalue


@_frame_attention_backward_op.register_fake
def _frame_attention_grads(grad, query, key, value, seen, out, lse):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))


def _frame_attention_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def _frame_attention_backward(ctx, grad, _lse_grad):
    return *_frame_attention_backward_op(grad, *ctx.saved_tensors), None


_frame_attention_op.register_autograd(_frame_attention_backward, setup_context=_frame_attention_setup)


def frame_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Computes [`attention.frame_attention`] for float32, float16 and bfloat16 and heads of at most 128 channels.

    The inputs, the output, and one float32 value per token and head are saved for the backward pass.
    """
    return _frame_attention_op(query, key, value, seen)[0]
