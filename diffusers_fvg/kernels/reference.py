"""The definition of each fused operation in plain torch, which every faster implementation must agree with.

B batch, L tokens, D width, R rows, N heads, H channels of a head. VAE features: C channels, F/H/W frames, height, width.

`modulated_layer_norm` and `gated_residual` read their modulation from *rows*, a `(B, R, D)` table with one row per distinct
timestep. `R` divides the `L` tokens into equal consecutive runs: `R = 1` is one timestep per sample, `R = frames` one per
latent frame, `R = L` one per token. If a sequence does not begin or end on a frame (a shard of a context-parallel run),
`row_index`, an integer `(L,)`, gives the row of every token instead. Only then a table of the size of the tokens is built.

Arithmetic is in float32, or in float64 for float64 tokens; the result has the dtype of the tokens.
"""

import torch
import torch.nn.functional as F


def modulated_layer_norm(
    hidden_states: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    row_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns `layer_norm(hidden_states) * (1 + scale) + shift`, normalized over the last dimension without affine weights.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, L, D)`): tokens.
        scale (`torch.Tensor` of shape `(B, R, D)`): rows of the factor minus 1.
        shift (`torch.Tensor` of shape `(B, R, D)`): rows of the offset.
        eps (`float`): added to the variance.
        row_index (`torch.Tensor` of shape `(L,)`, *optional*): row of each token.

    Returns:
        `torch.Tensor` of shape `(B, L, D)`.
    """
    dtype = _compute_dtype(hidden_states)
    scale, shift = (_rows(x, row_index, dtype) for x in (scale, shift))
    normed = F.layer_norm(hidden_states.to(dtype), hidden_states.shape[-1:], eps=eps)
    return torch.addcmul(shift, _runs(normed, scale), 1 + scale).flatten(1, 2).to(hidden_states.dtype)


def gated_residual(
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    gate: torch.Tensor,
    row_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns `hidden_states + residual * gate`.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, L, D)`): tokens.
        residual (`torch.Tensor` of shape `(B, L, D)`): output of the residual branch (attention, feed-forward).
        gate (`torch.Tensor` of shape `(B, R, D)`): rows of the factor on the branch.
        row_index (`torch.Tensor` of shape `(L,)`, *optional*): row of each token.

    Returns:
        `torch.Tensor` of shape `(B, L, D)`.
    """
    gate = _rows(gate, row_index, _compute_dtype(hidden_states))
    # addcmul promotes the tokens to the gate's dtype by itself, which avoids a wider copy of them on a GPU.
    out = torch.addcmul(_runs(hidden_states, gate), _runs(residual, gate), gate)
    return out.flatten(1, 2).to(hidden_states.dtype)


def rms_norm_rope(
    query: torch.Tensor,
    key: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Applies RMS norm over the channels of all heads, then rotates every pair of neighbouring channels.

    `n = x / sqrt(mean_d(x * x) + eps) * weight`, then per pair `(n0 * cos - n1 * sin, n0 * sin + n1 * cos)`, for both query
    and key, as in Wan's self-attention. Each pair of a head belongs to one of the three axes of a video; `cos` and `sin`
    hold the angle of each pair.

    Args:
        query (`torch.Tensor` of shape `(B, L, N * H)`): projected tokens.
        key (`torch.Tensor` of shape `(B, L, N * H)`): projected tokens.
        query_weight (`torch.Tensor` of shape `(N * H,)`): factor of the query's norm.
        key_weight (`torch.Tensor` of shape `(N * H,)`): factor of the key's norm.
        cos (`torch.Tensor` of shape `(1, L, 1, H)` or `(B, L, 1, H)`): cosines of the angles, each repeated for both channels
            of a pair.
        sin (`torch.Tensor` of the shape of `cos`): sines of the angles, repeated likewise.
        eps (`float`): added to the mean square.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(B, L, N, H)`: query and key.
    """
    angle = cos[..., 0::2].contiguous(), sin[..., 1::2].contiguous()
    return _norm_and_turn(query, query_weight, *angle, eps), _norm_and_turn(key, key_weight, *angle, eps)


def rms_norm_silu(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns `silu(x / |x| * sqrt(C) * weight)`, with `|x|` over the channels of a pixel, as in Wan's VAE.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, C, F, H, W)`): features.
        weight (`torch.Tensor` of shape `(C,)`): factor of the norm.

    Returns:
        `torch.Tensor` of shape `(B, C, F, H, W)`.
    """
    dtype, channels = _compute_dtype(hidden_states), hidden_states.shape[1]
    weight = weight.to(dtype).view(-1, *[1] * (hidden_states.ndim - 2))
    normed = F.normalize(hidden_states.to(dtype), dim=1) * channels**0.5 * weight
    return F.silu(normed).to(hidden_states.dtype)


def _norm_and_turn(
    tokens: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    dtype = _compute_dtype(tokens)
    normed = F.rms_norm(tokens.to(dtype), tokens.shape[-1:], weight.to(dtype), eps)
    first, second = normed.unflatten(2, (-1, cos.shape[3], 2)).unbind(-1)
    turned = torch.empty(*first.shape, 2, dtype=tokens.dtype, device=tokens.device)
    # Each half is written in place: `torch.stack` would be one more pass over the tokens.
    turned[..., 0] = torch.addcmul(first * cos, second, sin, value=-1)
    turned[..., 1] = torch.addcmul(first * sin, second, cos)
    return turned.flatten(3)


def _compute_dtype(tokens: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tokens.dtype, torch.float32)


def _rows(rows: torch.Tensor, row_index: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """(B, R, D) -> (B, R, 1, D), which broadcasts a row over the tokens of its run."""
    if row_index is not None:
        rows = rows[:, row_index]
    return rows.to(dtype).unsqueeze(2)


def _runs(tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(B, L, D) -> (B, R, L / R, D), a view."""
    return tokens.unflatten(1, (rows.shape[1], -1))
