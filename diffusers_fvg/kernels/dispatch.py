"""The functions that models call. They check the shapes once and choose the implementation."""

import torch

from . import reference


def modulated_layer_norm(
    hidden_states: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    row_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """LayerNorm without weights, then scale and shift by rows; see [`reference.modulated_layer_norm`].

    Raises:
        `ValueError`: if the rows do not fit the tokens.
    """
    _check_rows(hidden_states, row_index, scale=scale, shift=shift)
    return reference.modulated_layer_norm(hidden_states, scale, shift, eps, row_index)


def gated_residual(
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    gate: torch.Tensor,
    row_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Residual branch times rows of a gate, added; see [`reference.gated_residual`].

    Raises:
        `ValueError`: if the rows do not fit the tokens.
    """
    _check_rows(hidden_states, row_index, gate=gate)
    return reference.gated_residual(hidden_states, residual, gate, row_index)


def _check_rows(hidden_states: torch.Tensor, row_index: torch.Tensor | None, **tables: torch.Tensor) -> None:
    batch_size, num_tokens, dim = hidden_states.shape
    for name, rows in tables.items():
        if rows.ndim != 3 or rows.shape[0] != batch_size or rows.shape[2] != dim:
            raise ValueError(f"{name} has shape {tuple(rows.shape)}; pass ({batch_size}, rows, {dim}).")
        if row_index is None and num_tokens % rows.shape[1] != 0:
            raise ValueError(
                f"{name} has {rows.shape[1]} rows, which do not divide {num_tokens} tokens into equal runs; "
                "pass row_index to name the row of each token."
            )
    if row_index is not None and row_index.shape != (num_tokens,):
        raise ValueError(f"row_index has shape {tuple(row_index.shape)}; pass ({num_tokens},), one row per token.")
