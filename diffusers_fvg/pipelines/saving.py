"""What a pipeline writes: references again for what came by reference, and nothing of this machine."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from peft.tuners.tuners_utils import BaseTunerLayer

from ..loading.references import HubReference


logger = logging.get_logger(__name__)


def as_saved(pipe: DiffusionPipeline, bundle: bool) -> DiffusionPipeline:
    """A shallow copy of a pipeline as `save_pretrained` should write it.

    What came by reference is a reference again, or with `bundle` has its weights written. A rewriter or a judge that asks an
    endpoint, or calls a function, is left out, with a warning: who loads the repository names one.

    Raises:
        `ValueError`: a component that came by reference has LoRAs fused into its weights, which the reference would lose.
    """
    saved = copy.copy(pipe)
    for name, component in pipe.components.items():
        reference = getattr(component, "hub_reference", None)
        callers = [own for own in ("endpoint", "function") if getattr(component, own, None) is not None]
        if callers:
            logger.warning(
                f"`{name}` is your {callers[0]} and is not saved; pass it again as `{name}=` when you load."
            )
            setattr(saved, name, None)
        elif reference is not None and not bundle:
            if any(isinstance(module, BaseTunerLayer) and module.merged for module in _modules(component)):
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


def _modules(component: Any) -> Iterable[torch.nn.Module]:
    return component.modules() if isinstance(component, torch.nn.Module) else ()


def forget_origins(folder: str | os.PathLike) -> None:
    """Takes `_name_or_path`, which may be a path on this machine, out of the configurations of a saved pipeline."""
    index = Path(folder) / DiffusionPipeline.config_name
    components = json.loads(index.read_text(encoding="utf-8"))
    for file in [index, *(file for name in components for file in Path(folder, name).rglob("*.json"))]:
        if file.name in (index.name, "config.json", "scheduler_config.json"):
            config = json.loads(file.read_text(encoding="utf-8"))
            if config.pop("_name_or_path", "absent") != "absent":
                file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
