"""Triton implementation of the row-modulated operations of [`reference`]: one pass over the tokens forward, one backward.

B batch, L tokens, D width, R rows; a *run* is the consecutive tokens of one row. A tile, `[T, BLOCK_D]`, holds T tokens of
one run, so its rows are read once and stay in registers. Arithmetic is in float32 for all input dtypes.

With `row_index` the whole sequence is one run. The forward kernels then read the row of every token. In the backward kernels
every row has its own programs, which skip the tokens of other rows; atomics add up the gradients of the rows, so the last bit
may differ between two calls. Without `row_index` the order of the sums is fixed.
"""

import torch
import triton
import triton.language as tl


# Float32 values of a tile and of a thread: every tensor in registers takes 32 of a thread. The backward kernels hold twice
# as many tensors.
_TILE_ELEMENTS, _THREAD_ELEMENTS = 8192, 32
_BACKWARD_TILE_ELEMENTS, _BACKWARD_THREAD_ELEMENTS = 4096, 16
# Tokens over which a backward program sums the gradients of its row: the partial sums have 1/32 of the size of the tokens.
_TOKENS_PER_SUM = 32
# The elementwise kernels also split the width: 512 divides the width of every Wan model (1536, 3072, 5120).
_ELEMENTWISE_BLOCK_D = 512


@triton.jit
def _tile(pid, num_runs, run, TOKENS: tl.constexpr):
    """Returns the batch index, the run, and the first token inside the run of program `pid`, which owns `TOKENS` tokens."""
    pieces = tl.cdiv(run, TOKENS)
    return pid // (pieces * num_runs), pid // pieces % num_runs, pid % pieces * TOKENS


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr, scale_ptr, shift_ptr, index_ptr, out_ptr, mean_ptr, rstd_ptr,
    num_runs, run, D, eps,
    x_b, x_l, x_d, scale_b, scale_r, scale_d, shift_b, shift_r, shift_d,
    HAS_INDEX: tl.constexpr, T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Computes `out = (x - mean) * rstd * (1 + scale[row]) + shift[row]`; saves `mean` and `rstd` (B, L) for backward.

    Grid: (B * runs * blocks of T tokens,).
    """
    b, r, start = _tile(tl.program_id(0).to(tl.int64), num_runs, run, T)
    t = start + tl.arange(0, T)[:, None]  # [T, 1]
    d = tl.arange(0, BLOCK_D)[None, :]  # [1, BLOCK_D]
    token_mask, d_mask = t < run, d < D
    mask = token_mask & d_mask
    token = r * run + t
    flat_token = b * num_runs * run + token

    x = tl.load(x_ptr + b * x_b + token * x_l + d * x_d, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1, keep_dims=True) / D
    centred = tl.where(d_mask, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / D + eps)

    if HAS_INDEX:
        row = tl.load(index_ptr + token, mask=token_mask, other=0).to(tl.int64)  # [T, 1]
        row_mask = mask
    else:
        row = r
        row_mask = d_mask
    scale = tl.load(scale_ptr + b * scale_b + row * scale_r + d * scale_d, mask=row_mask, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + b * shift_b + row * shift_r + d * shift_d, mask=row_mask, other=0.0).to(tl.float32)
    out = centred * rstd * (1.0 + scale) + shift
    tl.store(out_ptr + flat_token * D + d, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + flat_token, mean, mask=token_mask)
    tl.store(rstd_ptr + flat_token, rstd, mask=token_mask)


@triton.jit
def _layer_norm_bwd_kernel(
    grad_ptr, x_ptr, scale_ptr, index_ptr, mean_ptr, rstd_ptr, dx_ptr, dscale_ptr, dshift_ptr,
    R, L, run, D,
    grad_b, grad_l, grad_d, x_b, x_l, x_d, scale_b, scale_r, scale_d,
    HAS_INDEX: tl.constexpr, ROW_GRADS: tl.constexpr, TOKENS: tl.constexpr, T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Computes, with `n = (x - mean) * rstd` and `dn = grad * (1 + scale[row])`:

    `dx = rstd * (dn - mean_d(dn) - n * mean_d(dn * n))`, `dscale[row] = sum_t(grad * n)`, `dshift[row] = sum_t(grad)`.

    Grid: (B * R * pieces of TOKENS tokens,). `dscale` and `dshift` have the shape (B, R, pieces, D), or (B, R, D) with an
    index.
    """
    pid = tl.program_id(0).to(tl.int64)
    b, r, start = _tile(pid, R, run, TOKENS)
    first = 0 if HAS_INDEX else r * run
    if HAS_INDEX:
        piece = start + tl.arange(0, TOKENS)
        if tl.max((tl.load(index_ptr + piece, mask=piece < run, other=-1) == r).to(tl.int32)) == 0:
            return

    d = tl.arange(0, BLOCK_D)[None, :]  # [1, BLOCK_D]
    d_mask = d < D
    scale = tl.load(scale_ptr + b * scale_b + r * scale_r + d * scale_d, mask=d_mask, other=0.0).to(tl.float32)
    dscale = tl.zeros([1, BLOCK_D], dtype=tl.float32)
    dshift = tl.zeros([1, BLOCK_D], dtype=tl.float32)
    for offset in range(0, TOKENS, T):
        t = start + offset + tl.arange(0, T)[:, None]  # [T, 1]
        token_mask = t < run
        token = first + t
        if HAS_INDEX:
            token_mask &= tl.load(index_ptr + token, mask=token_mask, other=-1) == r
        mask = token_mask & d_mask
        grad = tl.load(grad_ptr + b * grad_b + token * grad_l + d * grad_d, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + b * x_b + token * x_l + d * x_d, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + b * L + token, mask=token_mask, other=0.0)
        rstd = tl.load(rstd_ptr + b * L + token, mask=token_mask, other=0.0)
        normed = tl.where(mask, (x - mean) * rstd, 0.0)
        dnormed = grad * (1.0 + scale)
        dx = (
            dnormed
            - (tl.sum(dnormed, axis=1, keep_dims=True) + normed * tl.sum(dnormed * normed, axis=1, keep_dims=True)) / D
        )
        tl.store(dx_ptr + (b * L + token) * D + d, (dx * rstd).to(dx_ptr.dtype.element_ty), mask=mask)
        if ROW_GRADS:
            dscale += tl.sum(grad * normed, axis=0, keep_dims=True)
            dshift += tl.sum(grad, axis=0, keep_dims=True)
    if ROW_GRADS:
        if HAS_INDEX:
            tl.atomic_add(dscale_ptr + (b * R + r) * D + d, dscale, mask=d_mask, sem="relaxed")
            tl.atomic_add(dshift_ptr + (b * R + r) * D + d, dshift, mask=d_mask, sem="relaxed")
        else:
            tl.store(dscale_ptr + pid * D + d, dscale, mask=d_mask)
            tl.store(dshift_ptr + pid * D + d, dshift, mask=d_mask)


@triton.jit
def _gated_residual_fwd_kernel(
    x_ptr, residual_ptr, gate_ptr, index_ptr, out_ptr,
    num_runs, run, D,
    x_b, x_l, x_d, residual_b, residual_l, residual_d, gate_b, gate_r, gate_d,
    HAS_INDEX: tl.constexpr, T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Computes `out = x + residual * gate[row]`. Grid: (B * runs * blocks of T tokens, blocks of BLOCK_D channels)."""
    b, r, start = _tile(tl.program_id(0).to(tl.int64), num_runs, run, T)
    t = start + tl.arange(0, T)[:, None]  # [T, 1]
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]  # [1, BLOCK_D]
    token_mask, d_mask = t < run, d < D
    mask = token_mask & d_mask
    token = r * run + t
    if HAS_INDEX:
        row = tl.load(index_ptr + token, mask=token_mask, other=0).to(tl.int64)  # [T, 1]
        row_mask = mask
    else:
        row = r
        row_mask = d_mask
    x = tl.load(x_ptr + b * x_b + token * x_l + d * x_d, mask=mask, other=0.0).to(tl.float32)
    residual_ptrs = residual_ptr + b * residual_b + token * residual_l + d * residual_d
    residual = tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + b * gate_b + row * gate_r + d * gate_d, mask=row_mask, other=0.0).to(tl.float32)
    out = (x + residual * gate).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (b * num_runs * run + token) * D + d, out, mask=mask)


@triton.jit
def _gated_residual_bwd_kernel(
    grad_ptr, residual_ptr, gate_ptr, index_ptr, dresidual_ptr, dgate_ptr,
    R, L, run, D,
    grad_b, grad_l, grad_d, residual_b, residual_l, residual_d, gate_b, gate_r, gate_d,
    HAS_INDEX: tl.constexpr, ROW_GRADS: tl.constexpr, TOKENS: tl.constexpr, T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Computes `dresidual = grad * gate[row]`, `dgate[row] = sum_t(grad * residual)`. The gradient of `x` is `grad` itself.

    Grid: (B * R * pieces of TOKENS tokens, blocks of BLOCK_D channels). `dgate` has the shape (B, R, pieces, D), or (B, R, D)
    with an index.
    """
    pid = tl.program_id(0).to(tl.int64)
    b, r, start = _tile(pid, R, run, TOKENS)
    first = 0 if HAS_INDEX else r * run
    if HAS_INDEX:
        piece = start + tl.arange(0, TOKENS)
        if tl.max((tl.load(index_ptr + piece, mask=piece < run, other=-1) == r).to(tl.int32)) == 0:
            return

    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]  # [1, BLOCK_D]
    d_mask = d < D
    gate = tl.load(gate_ptr + b * gate_b + r * gate_r + d * gate_d, mask=d_mask, other=0.0).to(tl.float32)
    dgate = tl.zeros([1, BLOCK_D], dtype=tl.float32)
    for offset in range(0, TOKENS, T):
        t = start + offset + tl.arange(0, T)[:, None]  # [T, 1]
        token_mask = t < run
        token = first + t
        if HAS_INDEX:
            token_mask &= tl.load(index_ptr + token, mask=token_mask, other=-1) == r
        mask = token_mask & d_mask
        grad = tl.load(grad_ptr + b * grad_b + token * grad_l + d * grad_d, mask=mask, other=0.0).to(tl.float32)
        dresidual = (grad * gate).to(dresidual_ptr.dtype.element_ty)
        tl.store(dresidual_ptr + (b * L + token) * D + d, dresidual, mask=mask)
        if ROW_GRADS:
            residual_ptrs = residual_ptr + b * residual_b + token * residual_l + d * residual_d
            dgate += tl.sum(grad * tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32), axis=0, keep_dims=True)
    if ROW_GRADS:
        if HAS_INDEX:
            tl.atomic_add(dgate_ptr + (b * R + r) * D + d, dgate, mask=d_mask, sem="relaxed")
        else:
            tl.store(dgate_ptr + pid * D + d, dgate, mask=d_mask)


# With TRITON_INTERPRET=1, `triton.jit` returns interpreted functions, which run on a CPU.
INTERPRETED = not isinstance(_layer_norm_fwd_kernel, triton.JITFunction)


def _packed(row_index: torch.Tensor | None) -> torch.Tensor | None:
    """Returns the index as the kernels read it: contiguous."""
    return None if row_index is None else row_index.contiguous()


def _runs(tokens: torch.Tensor, rows: torch.Tensor, row_index: torch.Tensor | None) -> tuple[int, int]:
    """Returns the number and the length of the runs that the forward kernels split into tiles."""
    return (1, tokens.shape[1]) if row_index is not None else (rows.shape[1], tokens.shape[1] // rows.shape[1])


def _forward_tile(run: int, block_d: int) -> dict[str, int]:
    return _tile_sizes(run, block_d, _TILE_ELEMENTS, _THREAD_ELEMENTS)


def _backward_tile(run: int, block_d: int) -> dict[str, int]:
    tokens = min(triton.next_power_of_2(run), _TOKENS_PER_SUM)
    return {"TOKENS": tokens, **_tile_sizes(tokens, block_d, _BACKWARD_TILE_ELEMENTS, _BACKWARD_THREAD_ELEMENTS)}


def _tile_sizes(run: int, block_d: int, elements: int, thread_elements: int) -> dict[str, int]:
    tokens = min(triton.next_power_of_2(run), max(1, elements // block_d))
    num_warps = tokens * block_d // (32 * thread_elements)
    return {"T": tokens, "BLOCK_D": block_d, "num_warps": max(1, min(16, num_warps))}


def _elementwise_block_d(dim: int) -> int:
    return min(triton.next_power_of_2(dim), _ELEMENTWISE_BLOCK_D)


def _row_grads(rows: torch.Tensor, pieces: int, row_index: torch.Tensor | None, needed: bool) -> torch.Tensor:
    """Returns memory for the gradient of `rows`: partial sums along dim 2, or with an index zeros for the whole sum."""
    batch_size, num_rows, dim = rows.shape
    if not needed:
        return torch.empty(0, dtype=torch.float32, device=rows.device)
    if row_index is not None:
        return torch.zeros((batch_size, num_rows, dim), dtype=torch.float32, device=rows.device)
    return torch.empty((batch_size, num_rows, pieces, dim), dtype=torch.float32, device=rows.device)


def _sum_like(rows: torch.Tensor, needed: bool) -> torch.Tensor:
    """Returns a tensor with the shape and dtype of `_summed(_row_grads(...))`."""
    return torch.empty(rows.shape if needed else (0,), dtype=torch.float32, device=rows.device)


def _summed(parts: torch.Tensor) -> torch.Tensor:
    return parts.sum(2) if parts.ndim == 4 else parts


@torch.library.custom_op(
    "diffusers_fvg::modulated_layer_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor scale, Tensor shift, float eps, Tensor? row_index) -> (Tensor, Tensor, Tensor)",
)
def _layer_norm_op(x, scale, shift, eps, row_index):
    out, mean, rstd = _layer_norm_outputs(x, scale, shift, eps, row_index)
    num_runs, run = _runs(x, scale, row_index)
    tile = _forward_tile(run, triton.next_power_of_2(x.shape[2]))
    grid = (x.shape[0] * num_runs * triton.cdiv(run, tile["T"]),)
    # Triton launches on the current device, which may not be the tensors' device if a model is spread over several GPUs.
    with torch.cuda.device_of(x):
        _layer_norm_fwd_kernel[grid](
            x, scale, shift, row_index, out, mean, rstd,
            num_runs, run, x.shape[2], eps,
            *x.stride(), *scale.stride(), *shift.stride(),
            HAS_INDEX=row_index is not None, **tile,
        )  # fmt: skip
    return out, mean, rstd


@_layer_norm_op.register_fake
def _layer_norm_outputs(x, scale, shift, eps, row_index):
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for _ in range(2))
    return out, mean, rstd


@torch.library.custom_op(
    "diffusers_fvg::modulated_layer_norm_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor scale, Tensor mean, Tensor rstd, Tensor? row_index, bool row_grads)"
    " -> (Tensor, Tensor, Tensor)",
)
def _layer_norm_backward_op(grad, x, scale, mean, rstd, row_index, row_grads):
    (batch_size, length, dim), num_rows = x.shape, scale.shape[1]
    run = _runs(x, scale, row_index)[1]
    tile = _backward_tile(run, triton.next_power_of_2(dim))
    pieces = triton.cdiv(run, tile["TOKENS"])
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dscale, dshift = (_row_grads(scale, pieces, row_index, row_grads) for _ in range(2))
    with torch.cuda.device_of(x):
        _layer_norm_bwd_kernel[(batch_size * num_rows * pieces,)](
            grad, x, scale, row_index, mean, rstd, dx, dscale, dshift,
            num_rows, length, run, dim,
            *grad.stride(), *x.stride(), *scale.stride(),
            HAS_INDEX=row_index is not None, ROW_GRADS=row_grads, **tile,
        )  # fmt: skip
    return dx, *(_summed(parts) for parts in (dscale, dshift))


@_layer_norm_backward_op.register_fake
def _(grad, x, scale, mean, rstd, row_index, row_grads):
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, *(_sum_like(scale, row_grads) for _ in range(2))


def _layer_norm_setup(ctx, inputs, output):
    x, scale, shift, _, row_index = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, scale, mean, rstd, row_index)
    ctx.shift_dtype = shift.dtype


def _layer_norm_backward(ctx, grad, _grad_mean, _grad_rstd):
    x, scale, mean, rstd, row_index = ctx.saved_tensors
    row_grads = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    dx, dscale, dshift = _layer_norm_backward_op(grad, x, scale, mean, rstd, row_index, row_grads)
    if not row_grads:
        return dx, None, None, None, None
    return dx, dscale.to(scale.dtype), dshift.to(ctx.shift_dtype), None, None


_layer_norm_op.register_autograd(_layer_norm_backward, setup_context=_layer_norm_setup)


@torch.library.custom_op(
    "diffusers_fvg::gated_residual",
    mutates_args=(),
    schema="(Tensor x, Tensor residual, Tensor gate, Tensor? row_index) -> Tensor",
)
def _gated_residual_op(x, residual, gate, row_index):
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_runs, run = _runs(x, gate, row_index)
    tile = _forward_tile(run, _elementwise_block_d(x.shape[2]))
    grid = (x.shape[0] * num_runs * triton.cdiv(run, tile["T"]), triton.cdiv(x.shape[2], tile["BLOCK_D"]))
    with torch.cuda.device_of(x):
        _gated_residual_fwd_kernel[grid](
            x, residual, gate, row_index, out,
            num_runs, run, x.shape[2],
            *x.stride(), *residual.stride(), *gate.stride(),
            HAS_INDEX=row_index is not None, **tile,
        )  # fmt: skip
    return out


@_gated_residual_op.register_fake
def _(x, residual, gate, row_index):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op(
    "diffusers_fvg::gated_residual_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor? residual, Tensor gate, Tensor? row_index, ScalarType dtype) -> (Tensor, Tensor)",
)
def _gated_residual_backward_op(grad, residual, gate, row_index, dtype):
    (batch_size, length, dim), num_rows = grad.shape, gate.shape[1]
    run = _runs(grad, gate, row_index)[1]
    tile = _backward_tile(run, _elementwise_block_d(dim))
    pieces = triton.cdiv(run, tile["TOKENS"])
    dresidual = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    row_grads = residual is not None
    dgate = _row_grads(gate, pieces, row_index, row_grads)
    with torch.cuda.device_of(grad):
        _gated_residual_bwd_kernel[(batch_size * num_rows * pieces, triton.cdiv(dim, tile["BLOCK_D"]))](
            grad, residual, gate, row_index, dresidual, dgate,
            num_rows, length, run, dim,
            *grad.stride(), *(residual.stride() if row_grads else (0, 0, 0)), *gate.stride(),
            HAS_INDEX=row_index is not None, ROW_GRADS=row_grads, **tile,
        )  # fmt: skip
    return dresidual, _summed(dgate)


@_gated_residual_backward_op.register_fake
def _(grad, residual, gate, row_index, dtype):
    dresidual = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    return dresidual, _sum_like(gate, residual is not None)


def _gated_residual_setup(ctx, inputs, output):
    _, residual, gate, row_index = inputs
    # Only the gradient of the gate needs the residual. With an adapter on frozen weights the gate has no gradient.
    ctx.save_for_backward(residual if ctx.needs_input_grad[2] else None, gate, row_index)
    ctx.residual_dtype = residual.dtype


def _gated_residual_backward(ctx, grad):
    residual, gate, row_index = ctx.saved_tensors
    dresidual, dgate = _gated_residual_backward_op(grad, residual, gate, row_index, ctx.residual_dtype)
    return grad, dresidual, None if residual is None else dgate.to(gate.dtype), None


_gated_residual_op.register_autograd(_gated_residual_backward, setup_context=_gated_residual_setup)


def modulated_layer_norm(
    hidden_states: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    row_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes [`reference.modulated_layer_norm`] for float32, float16 and bfloat16.

    `row_index` must lie in `[0, R)`; this is not checked. `hidden_states`, `scale`, and each token's mean and inverse standard
    deviation are saved for the backward pass.
    """
    return _layer_norm_op(hidden_states, scale, shift, eps, _packed(row_index))[0]


def gated_residual(
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    gate: torch.Tensor,
    row_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes [`reference.gated_residual`] for float32, float16 and bfloat16.

    `row_index` must lie in `[0, R)`; this is not checked. `gate`, and `residual` if the gate needs a gradient, are saved for
    the backward pass.
    """
    return _gated_residual_op(hidden_states, residual, gate, _packed(row_index))
