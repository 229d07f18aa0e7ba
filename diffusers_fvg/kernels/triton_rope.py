"""Triton implementation of [`reference.rms_norm_rope`], which reads and writes query and key once, forward and backward.

B batch, L tokens, N heads, H channels of a head. One program holds a whole token, `[BLOCK_N, BLOCK_H]`, because the norm
is over all heads. The two channels of each rotated pair are split into two tensors, `[BLOCK_N, BLOCK_H / 2]`. Arithmetic is
in float32 for all input dtypes.
"""

import torch
import triton
import triton.language as tl


# Tokens over which a backward program sums the gradients of the norm weights: the partial sums have 1/16 of the size of
# query and key.
_TOKENS_PER_SUM = 16


@triton.jit
def _norm(x, N, H, eps):
    """Returns the inverse root mean square of a token; channels outside the mask are 0 and add nothing."""
    return tl.rsqrt(tl.sum(x * x) / (N * H) + eps)


@triton.jit
def _rotate(x, cos, sin, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr):
    """Rotates each pair of neighbouring channels: `(x0 * cos - x1 * sin, x0 * sin + x1 * cos)`."""
    x0, x1 = tl.split(tl.reshape(x, (BLOCK_N, BLOCK_H // 2, 2)))
    return tl.reshape(tl.join(x0 * cos - x1 * sin, x0 * sin + x1 * cos), (BLOCK_N, BLOCK_H))


@triton.jit
def _norm_grad(dnormed, normed, rstd, weight, N, H):
    """Returns the gradient of `x` from that of `normed * weight`, with `normed = x * rstd`."""
    dnormed = dnormed * weight
    return rstd * (dnormed - normed * (tl.sum(dnormed * normed) / (N * H)))


@triton.jit
def _rms_norm_rope_fwd_kernel(
    query_ptr, key_ptr, query_weight_ptr, key_weight_ptr, cos_ptr, sin_ptr,
    query_out_ptr, key_out_ptr, query_rstd_ptr, key_rstd_ptr,
    L, N, H, eps,
    query_b, query_l, query_d, key_b, key_l, key_d, cos_b, cos_l, cos_h, sin_b, sin_l, sin_h,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Computes `out = rotate(x * rstd * weight)` for query and key; saves `rstd` (B, L) for backward. Grid: (B * L,)."""
    token = tl.program_id(0).to(tl.int64)
    b, l = token // L, token % L
    n, h = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_H)[None, :]
    mask, d = (n < N) & (h < H), n * H + h  # [BLOCK_N, BLOCK_H]
    pair = 2 * tl.arange(0, BLOCK_H // 2)[None, :]  # [1, BLOCK_H / 2]

    # All loads come before the first sum, so that no load waits for a sum.
    query = tl.load(query_ptr + b * query_b + l * query_l + d * query_d, mask=mask, other=0.0).to(tl.float32)
    key = tl.load(key_ptr + b * key_b + l * key_l + d * key_d, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + b * cos_b + l * cos_l + pair * cos_h, mask=pair < H, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + b * sin_b + l * sin_l + (pair + 1) * sin_h, mask=pair < H, other=0.0).to(tl.float32)
    query_weight = tl.load(query_weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
    key_weight = tl.load(key_weight_ptr + d, mask=mask, other=0.0).to(tl.float32)

    query_rstd, key_rstd = _norm(query, N, H, eps), _norm(key, N, H, eps)
    query = _rotate(query * query_rstd * query_weight, cos, sin, BLOCK_N, BLOCK_H)
    key = _rotate(key * key_rstd * key_weight, cos, sin, BLOCK_N, BLOCK_H)
    tl.store(query_out_ptr + token * N * H + d, query.to(query_out_ptr.dtype.element_ty), mask=mask)
    tl.store(key_out_ptr + token * N * H + d, key.to(key_out_ptr.dtype.element_ty), mask=mask)
    tl.store(query_rstd_ptr + token, query_rstd)
    tl.store(key_rstd_ptr + token, key_rstd)


@triton.jit
def _rms_norm_rope_bwd_kernel(
    grad_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, rstd_ptr, dx_ptr, dweight_ptr,
    num_tokens, L, N, H,
    grad_b, grad_l, grad_n, grad_h, x_b, x_l, x_d, cos_b, cos_l, cos_h, sin_b, sin_l, sin_h,
    WEIGHT_GRAD: tl.constexpr, TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Computes, with `n = x * rstd` and `g = rotate_back(grad)`:

    `dx = rstd * (g * weight - n * mean(g * weight * n))`, `dweight = sum_t(g * n)`.

    Grid: (pieces of TOKENS tokens,). `dweight` has the shape (pieces, N * H).
    """
    pid = tl.program_id(0).to(tl.int64)
    n, h = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_H)[None, :]
    mask, d = (n < N) & (h < H), n * H + h  # [BLOCK_N, BLOCK_H]
    pair = 2 * tl.arange(0, BLOCK_H // 2)[None, :]  # [1, BLOCK_H / 2]
    weight = tl.load(weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_N, BLOCK_H], dtype=tl.float32)
    for token in range(pid * TOKENS, tl.minimum(pid * TOKENS + TOKENS, num_tokens)):
        b, l = token // L, token % L
        grad_ptrs = grad_ptr + b * grad_b + l * grad_l + n * grad_n + h * grad_h
        grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + b * x_b + l * x_l + d * x_d, mask=mask, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + b * cos_b + l * cos_l + pair * cos_h, mask=pair < H, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + b * sin_b + l * sin_l + (pair + 1) * sin_h, mask=pair < H, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + token)
        # The inverse of a rotation is the rotation by the negative angle.
        grad = _rotate(grad, cos, -sin, BLOCK_N, BLOCK_H)
        normed = x * rstd
        dx = _norm_grad(grad, normed, rstd, weight, N, H)
        tl.store(dx_ptr + token * N * H + d, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if WEIGHT_GRAD:
            dweight += grad * normed
    if WEIGHT_GRAD:
        tl.store(dweight_ptr + pid * N * H + d, dweight, mask=mask)


def _block(dim: int, head_dim: int) -> dict[str, int]:
    block_n, block_h = triton.next_power_of_2(dim // head_dim), triton.next_power_of_2(head_dim)
    # Each tensor in registers takes 16 float32 values per thread.
    return {"BLOCK_N": block_n, "BLOCK_H": block_h, "num_warps": max(1, min(16, block_n * block_h // 512))}


def _angle_strides(angles: torch.Tensor) -> tuple[int, int, int]:
    """Returns the strides of sample, token and channel; the sample stride is 0 if all samples share the angles."""
    sample, token, _, channel = angles.stride()
    return sample if angles.shape[0] > 1 else 0, token, channel


@torch.library.custom_op(
    "diffusers_fvg::rms_norm_rope",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor query_weight, Tensor key_weight, Tensor cos, Tensor sin, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _rms_norm_rope_op(query, key, query_weight, key_weight, cos, sin, eps):
    outputs = _rms_norm_rope_outputs(query, key, query_weight, key_weight, cos, sin, eps)
    (batch_size, length, dim), head_dim = query.shape, cos.shape[3]
    # Triton launches on the current device, which may not be the tensors' device if a model is spread over several GPUs.
    with torch.cuda.device_of(query):
        _rms_norm_rope_fwd_kernel[(batch_size * length,)](
            query, key, query_weight, key_weight, cos, sin, *outputs,
            length, dim // head_dim, head_dim, eps,
            *query.stride(), *key.stride(), *_angle_strides(cos), *_angle_strides(sin),
            **_block(dim, head_dim),
        )  # fmt: skip
    return outputs


@_rms_norm_rope_op.register_fake
def _rms_norm_rope_outputs(query, key, query_weight, key_weight, cos, sin, eps):
    batch_size, length, dim = query.shape
    shape = (batch_size, length, dim // cos.shape[3], cos.shape[3])
    query_out, key_out = (torch.empty(shape, dtype=x.dtype, device=x.device) for x in (query, key))
    query_rstd, key_rstd = (torch.empty(shape[:2], dtype=torch.float32, device=x.device) for x in (query, key))
    return query_out, key_out, query_rstd, key_rstd


@torch.library.custom_op(
    "diffusers_fvg::rms_norm_rope_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor cos, Tensor sin, Tensor rstd, bool weight_grad)"
    " -> (Tensor, Tensor)",
)
def _rms_norm_rope_backward_op(grad, x, weight, cos, sin, rstd, weight_grad):
    (batch_size, length, dim), head_dim = x.shape, cos.shape[3]
    pieces = triton.cdiv(batch_size * length, _TOKENS_PER_SUM)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight = torch.empty((pieces, dim) if weight_grad else (0, dim), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _rms_norm_rope_bwd_kernel[(pieces,)](
            grad, x, weight, cos, sin, rstd, dx, dweight,
            batch_size * length, length, dim // head_dim, head_dim,
            *grad.stride(), *x.stride(), *_angle_strides(cos), *_angle_strides(sin),
            WEIGHT_GRAD=weight_grad, TOKENS=_TOKENS_PER_SUM, **_block(dim, head_dim),
        )  # fmt: skip
    return dx, dweight.sum(0)


@_rms_norm_rope_backward_op.register_fake
def _(grad, x, weight, cos, sin, rstd, weight_grad):
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, torch.empty(weight.shape, dtype=torch.float32, device=x.device)


def _rms_norm_rope_setup(ctx, inputs, output):
    _, _, query_rstd, key_rstd = output
    ctx.save_for_backward(*inputs[:6], query_rstd, key_rstd)


def _rms_norm_rope_backward(ctx, query_grad, key_grad, _query_rstd_grad, _key_rstd_grad):
    query, key, query_weight, key_weight, cos, sin, query_rstd, key_rstd = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dquery, dquery_weight = _rms_norm_rope_backward_op(query_grad, query, query_weight, cos, sin, query_rstd, needs[2])
    dkey, dkey_weight = _rms_norm_rope_backward_op(key_grad, key, key_weight, cos, sin, key_rstd, needs[3])
    dweights = dquery_weight.to(query_weight.dtype), dkey_weight.to(key_weight.dtype)
    return dquery, dkey, *dweights, None, None, None


_rms_norm_rope_op.register_autograd(_rms_norm_rope_backward, setup_context=_rms_norm_rope_setup)


def rms_norm_rope(
    query: torch.Tensor,
    key: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes [`reference.rms_norm_rope`] for float32, float16 and bfloat16. The angles get no gradient.

    `query`, `key`, and the inverse root mean square of each of their tokens are saved for the backward pass.
    """
    # The kernels read the weights as contiguous.
    query_weight, key_weight = query_weight.contiguous(), key_weight.contiguous()
    return _rms_norm_rope_op(query, key, query_weight, key_weight, cos, sin, eps)[:2]
