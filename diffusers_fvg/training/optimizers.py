"""Creates the optimizer of a run, and converts its state to tensors for checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .config import TrainConfig


def make_optimizer(config: TrainConfig, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Returns AdamW of torch, or of bitsandbytes with block-wise 8-bit moments (arXiv 2110.02861) for tensors of at least 4096
    weights."""
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, **options)


def as_tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Converts the optimizer state of one parameter to tensors.

    bitsandbytes stores its step count as an `int`, and all its parameters share the quantization maps, which are copied.
    """
    return {key: value.clone() if key.startswith("qmap") else torch.as_tensor(value) for key, value in state.items()}


def from_tensors(config: TrainConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Converts the tensors of [`as_tensors`] back to the optimizer state."""
    if config.optimizer == "adamw":
        return dict(tensors)
    return {key: int(value) if key == "step" else value for key, value in tensors.items()}
