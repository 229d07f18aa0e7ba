"""The optimizers of a run, and their state as tensors that a file can hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .config import TrainConfig


def make_optimizer(config: TrainConfig, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, or bitsandbytes' with its two moments in 8 bits (arXiv 2110.02861): block by block, of tensors from 4096 numbers."""
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, **options)


def as_tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The state of one parameter. bitsandbytes counts steps as a number, and all its parameters share tables."""
    return {key: value.clone() if key.startswith("qmap") else torch.as_tensor(value) for key, value in state.items()}


def from_tensors(config: TrainConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The state that [`as_tensors`] was given."""
    if config.optimizer == "adamw":
        return dict(tensors)
    return {key: int(value) if key == "step" else value for key, value in tensors.items()}
