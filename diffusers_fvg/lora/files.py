"""Reads the tensors and the metadata of LoRA files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import SafetensorError, safe_open


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads the tensors and the metadata of a safetensors file.

    Raises:
        `ValueError`: the file has another format or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a safetensors file, or is damaged ({error}): download or convert it again."
        ) from error


def adapter_config(metadata: dict[str, str], label: str) -> dict[str, Any]:
    """Returns the entries of PEFT's `LoraConfig` in the metadata of a file; an empty dictionary if there are none.

    Raises:
        `ValueError`: the config is not a JSON object.
    """
    try:
        config = json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"The `LoraConfig` in the metadata of {label} is not valid JSON: {str(error)[:120]}."
        ) from error
    if not isinstance(config, dict):
        raise ValueError(
            f"The `LoraConfig` in the metadata of {label} must be a JSON object, but is a {type(config).__name__}."
        )
    return config


def check_weights(weights: Any) -> None:
    """Checks that a LoRA is given as a file, a folder, a Hub repository, or a state dict (strings to tensors).

    Raises:
        `ValueError`: `weights`, or an entry of the state dict, has another type.
    """
    if not isinstance(weights, (str, os.PathLike, dict)):
        raise ValueError(f"`weights={weights!r:.60}` must be a file, a folder, a Hub repository or a state dict.")
    for key, value in weights.items() if isinstance(weights, dict) else ():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"A state dict of a LoRA holds tensors, but {key!r:.80} is a {type(value).__name__}.")
