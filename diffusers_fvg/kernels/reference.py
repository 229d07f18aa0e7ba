"""What every kernel of this package computes, in plain torch. A faster implementation is right when it agrees with this.

Both operations read their modulation from *rows*, a `(B, R, D)` table with one row per distinct time. `R` divides the
number of tokens `L` into equal consecutive runs: `R = 1` is one time per sample, `R = frames` one per latent frame,
`R = L` one per token. `row_index`, an integer `(L,)`, names the row of every token instead, for sequences that do not
begin or end on a frame (a shard of a context-parallel run). A table the size of the tokens is built only then.

Arithmetic is in float32, or in float64 when an input is; the result has the dtype of `hidden_states`.
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
    """`layer_norm(hidden_states) * (1 + scale) + shift`, normalized over the last dimension without affine weights.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, L, D)`): tokens.
        scale (`torch.Tensor` of shape `(B, R, D)`): rows of the factor, zero where the norm is left as it is.
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
    """`hidden_states + residual * gate`.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, L, D)`): tokens.
        residual (`torch.Tensor` of shape `(B, L, D)`): what the branch (attention, feed-forward) adds.
        gate (`torch.Tensor` of shape `(B, R, D)`): rows of the factor on the branch.
        row_index (`torch.Tensor` of shape `(L,)`, *optional*): row of each token.

    Returns:
        `torch.Tensor` of shape `(B, L, D)`.
    """
    gate = _rows(gate, row_index, _compute_dtype(hidden_states))
    # addcmul promotes the tokens to the gate's dtype by itself: on a GPU that leaves no widened copy of them.
    out = torch.addcmul(_runs(hidden_states, gate), _runs(residual, gate), gate)
    return out.flatten(1, 2).to(hidden_states.dtype)


def _compute_dtype(tokens: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tokens.dtype, torch.float32)


def _rows(rows: torch.Tensor, row_index: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """(B, R, D) -> (B, R, 1, D): one row against every token of its run."""
    if row_index is not None:
        rows = rows[:, row_index]
    return rows.to(dtype).unsqueeze(2)


def _runs(tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(B, L, D) -> (B, R, L / R, D), a view."""
    return tokens.unflatten(1, (rows.shape[1], -1))
