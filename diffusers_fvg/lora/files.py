"""What a LoRA's file holds: tensors, and what its header or the file beside it says of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import SafetensorError, safe_open


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a file.

    Raises:
        `ValueError`: it is of another format, or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or a damaged one ({error}).") from error


def adapter_config(metadata: dict[str, str], label: str) -> dict[str, Any]:
    """The `LoraConfig` in the metadata of a file; empty without one.

    Raises:
        `ValueError`: it is no JSON object.
    """
    try:
        config = json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The metadata of {label} hold no JSON: {str(error)[:120]}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"The metadata of {label} must hold an object, but hold a {type(config).__name__}.")
    return config


def check_weights(weights: Any) -> None:
    """A LoRA is a file, a folder, a repository's name, or a state dict, which has texts for keys and tensors for values.

    Raises:
        `ValueError`: naming what is something else.
    """
    if not isinstance(weights, (str, os.PathLike, dict)):
        raise ValueError(f"`weights={weights!r:.60}` must be a file, a folder, a repository's name or a state dict.")
    for key, value in weights.items() if isinstance(weights, dict) else ():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"A state dict of a LoRA holds tensors, but {key!r:.80} is a {type(value).__name__}.")
