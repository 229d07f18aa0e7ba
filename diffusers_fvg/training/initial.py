"""Initializes a new LoRA from another one."""

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
    """Initializes the adapter `"anchor"` with the weights of a LoRA of any known format.

    Args:
        transformer (`torch.nn.Module`): transformer with the new adapter.
        expert (`str`): `"transformer"` or `"transformer_2"`.
        weights (`str`): file, folder or repository, see [`lora.loader.load_lora`], or the `output_dir` of a run. If the keys of
            a file name experts, only this expert's are used.

    Returns:
        `str`: digest of the initial weights.

    Raises:
        `ValueError`: the LoRA has layers or a rank that the new one does not have, or weights that are no low-rank pairs.
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
            f"{label} has weights of norms, biases or modulation, which a new LoRA cannot have: export it without them."
        )
    for name, layer in given.items():
        if ADAPTER_NAME not in layer.lora_A:
            raise ValueError(f"{label} has weights for {name}, which `targets` leave out: add it to them.")
        rank, own = layer.r[INITIAL_NAME], layer.r[ADAPTER_NAME]
        if rank > own:
            raise ValueError(
                f"{label} has rank {rank}, above `rank={own}` of the new LoRA: set `rank` to {rank} or more."
            )
    digest = hashlib.sha256()
    for name in sorted(given):
        for half in (given[name].lora_A, given[name].lora_B):
            digest.update(half[INITIAL_NAME].weight.detach().float().cpu().numpy().tobytes())
    copy_adapter(transformer, INITIAL_NAME)
    transformer.delete_adapters(INITIAL_NAME)
    transformer.set_adapter(ADAPTER_NAME)
    return digest.hexdigest()[:16]


def of_expert(weights: str, expert: str) -> tuple[str | dict[str, torch.Tensor], dict[str, Any]]:
    """Returns a LoRA's source for one expert, for [`lora.loader.load_lora`], and further arguments of that function.

    Args:
        weights, expert (`str`): as in [`start_from`].

    Raises:
        `ValueError`: the LoRA does not exist, or has no weights for this expert.
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
        raise ValueError(
            f"`initial_lora={weights!r}` has no weights for the expert {expert!r}; leave it out of `experts`."
        )
    return own, {"metadata": metadata}


def _downloaded(name: str) -> Path:
    """Downloads the LoRA at the top of a Hub repository; files in its subfolders belong to other models."""
    try:
        validate_repo_id(name)
        files = {"allow_patterns": ["*.safetensors", "adapter_config.json"], "ignore_patterns": ["*/*"]}
        return Path(snapshot_download(name, **files))
    except (HFValidationError, RepositoryNotFoundError, LocalEntryNotFoundError) as error:
        raise ValueError(f"`initial_lora={name!r}` is not a readable file, folder or repository.") from error


@torch.no_grad()
def copy_adapter(transformer: torch.nn.Module, source: str) -> None:
    """Initializes the adapter `"anchor"` with the weights of adapter `source`. Where its rank is higher, the rest of `lora_B`
    stays zero."""
    for layer in transformer.modules():
        if isinstance(layer, BaseTunerLayer) and source in layer.lora_A:
            down, up = (weights[source].weight for weights in (layer.lora_A, layer.lora_B))
            strength = layer.scaling[source] / layer.scaling[ADAPTER_NAME]
            layer.lora_A[ADAPTER_NAME].weight[: len(down)] = down
            layer.lora_B[ADAPTER_NAME].weight[:, : len(down)] = strength * up
