"""What a LoRA starts from: nothing, or another LoRA."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open

from ..lora.anchor_lora import ADAPTER_NAME, WEIGHT_NAME
from ..lora.loader import EXPERTS, load_lora


INITIAL_NAME = "initial"


def start_from(transformer: torch.nn.Module, expert: str, weights: str) -> str:
    """Gives the adapter `"anchor"` the weights of a LoRA of any known format.

    Args:
        transformer (`torch.nn.Module`): with the new adapter.
        expert (`str`): `"transformer"` or `"transformer_2"`.
        weights (`str`): file, folder or repository, see [`lora.loader.load_lora`]; also the `output_dir` of a run. Of a file
            whose keys name experts those of this one are taken.

    Returns:
        `str`: a digest of what it starts from.

    Raises:
        `ValueError`: a LoRA that does not fit into the new one's layers and rank, or has more than low-rank pairs.
    """
    label = f"`initial_lora={weights!r}`"
    source, options = of_expert(weights, expert)
    pair = [source if name == expert else None for name in EXPERTS]
    transformers = [transformer if name == expert else None for name in EXPERTS]
    load_lora(transformers, pair, INITIAL_NAME, strict=True, **options)
    deltas = getattr(transformer, "parameter_deltas", None)
    layers = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, BaseTunerLayer)}
    given = {name: layer for name, layer in layers.items() if INITIAL_NAME in layer.lora_A}
    if not given or deltas is not None:
        raise ValueError(
            f"{label} has weights of norms, biases or modulation, which a new LoRA does not: export it without."
        )
    for name, layer in given.items():
        if ADAPTER_NAME not in layer.lora_A:
            raise ValueError(f"{label} has weights for {name}, which `targets` leave out: add it.")
        rank, own = layer.r[INITIAL_NAME], layer.r[ADAPTER_NAME]
        if rank > own:
            raise ValueError(f"{label} is of rank {rank}, and the new one of `rank={own}`: set it to {rank} or more.")
    digest = hashlib.sha256()
    for name in sorted(given):
        for half in (given[name].lora_A, given[name].lora_B):
            digest.update(half[INITIAL_NAME].weight.detach().float().cpu().numpy().tobytes())
    copy_adapter(transformer, INITIAL_NAME)
    transformer.delete_adapters(INITIAL_NAME)
    transformer.set_adapter(ADAPTER_NAME)
    return digest.hexdigest()[:16]


def of_expert(weights: str, expert: str) -> tuple[str | dict[str, torch.Tensor], dict[str, Any]]:
    """What [`lora.loader.load_lora`] is given for one expert, and its further arguments.

    Args:
        weights, expert (`str`): as of [`start_from`].

    Raises:
        `ValueError`: no such LoRA, or none of this expert.
    """
    path = Path(weights)
    if not path.exists():
        path = _downloaded(weights)
    standard = [path / name for name in (WEIGHT_NAME, Path(WEIGHT_NAME).name) if (path / name).is_file()]
    path = standard[0] if standard else path
    if not (path.is_file() and path.suffix == ".safetensors"):
        return str(path), {}
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        metadata = file.metadata() or {}
    named = {key for key in tensors if key.startswith(tuple(f"{name}." for name in EXPERTS))}
    own = {key: tensor for key, tensor in tensors.items() if key not in named or key.startswith(f"{expert}.")}
    if not own:
        raise ValueError(f"`initial_lora={weights!r}` has no weights for the expert {expert!r}.")
    return own, {"metadata": metadata}


def _downloaded(name: str) -> Path:
    """The LoRA of a Hub repository: files that lie in its folders are other models."""
    try:
        validate_repo_id(name)
        files = {"allow_patterns": ["*.safetensors", "adapter_config.json"], "ignore_patterns": ["*/*"]}
        return Path(snapshot_download(name, **files))
    except (HFValidationError, RepositoryNotFoundError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"`initial_lora={name!r}` is no file, no folder and no repository that can be read."
        ) from error


@torch.no_grad()
def copy_adapter(transformer: torch.nn.Module, source: str) -> None:
    """Gives the adapter `"anchor"` the weights of another to start from. What it has beyond those begins at zero."""
    for layer in transformer.modules():
        if isinstance(layer, BaseTunerLayer) and source in layer.lora_A:
            down, up = (weights[source].weight for weights in (layer.lora_A, layer.lora_B))
            strength = layer.scaling[source] / layer.scaling[ADAPTER_NAME]
            layer.lora_A[ADAPTER_NAME].weight[: len(down)] = down
            layer.lora_B[ADAPTER_NAME].weight[:, : len(down)] = strength * up
