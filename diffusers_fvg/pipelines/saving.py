"""Prepares a pipeline for saving: writes references for components loaded by reference, and removes local paths."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from peft.tuners.tuners_utils import BaseTunerLayer

from ..loading.references import HubReference
from ..lora.anchor_lora import ADAPTER_NAME


logger = logging.get_logger(__name__)


def as_saved(pipe: DiffusionPipeline, bundle: bool) -> DiffusionPipeline:
    """Returns a shallow copy of a pipeline with the components that `save_pretrained` should write.

    Components that were loaded by reference become references again, or with `bundle` keep their weights. A rewriter or judge
    with an endpoint or a function is left out, with a warning: users of the repository pass their own.

    Raises:
        `ValueError`: a component that becomes a reference has LoRAs fused into its weights, which would be lost; or the anchor
            LoRA is fused, so that the repository would contain it twice.
    """
    saved = copy.copy(pipe)
    has_lora = getattr(pipe, "anchor_lora", None) is not None
    for name, component in pipe.components.items():
        fused = {adapter for layer in _adapter_layers(component) for adapter in layer.merged_adapters}
        if has_lora and ADAPTER_NAME in fused:
            raise ValueError(
                f"The anchor LoRA is fused into `{name}` and would also be saved as `anchor_lora`, so that it would act twice. Call "
                "`unfuse_lora()` first; or, to keep it in the weights permanently, call `unload_lora_weights()` and set "
                "`anchor_lora` to None."
            )
        reference = getattr(component, "hub_reference", None)
        callers = [own for own in ("endpoint", "function") if getattr(component, own, None) is not None]
        if callers:
            logger.warning(
                f"`{name}` is your {callers[0]} and is not saved; pass it again as `{name}=` when you load."
            )
            setattr(saved, name, None)
        elif reference is not None and not bundle:
            if fused:
                raise ValueError(
                    f"`{name}` came from {reference['repository']} and has LoRAs fused into it, which a reference would "
                    "lose: call `unfuse_lora()`, or save with `bundle=True`."
                )
            values = dict(reference)
            setattr(saved, name, HubReference(class_name=values.pop("class"), **values))
        elif bundle and getattr(component, "reference", None) is not None:
            bundled = copy.copy(component)
            bundled.reference = None
            setattr(saved, name, bundled)
    return saved


def _adapter_layers(component: Any) -> list[BaseTunerLayer]:
    modules = component.modules() if isinstance(component, torch.nn.Module) else ()
    return [module for module in modules if isinstance(module, BaseTunerLayer)]


def forget_origins(folder: str | os.PathLike) -> None:
    """Removes `_name_or_path`, which may be a local path, from the configs of a saved pipeline."""
    index = Path(folder) / DiffusionPipeline.config_name
    components = json.loads(index.read_text(encoding="utf-8"))
    for file in [index, *(file for name in components for file in Path(folder, name).rglob("*.json"))]:
        if file.name in (index.name, "config.json", "scheduler_config.json"):
            config = json.loads(file.read_text(encoding="utf-8"))
            if config.pop("_name_or_path", "absent") != "absent":
                file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
