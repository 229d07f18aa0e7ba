"""Stops a run in the middle of a step, because a step of a large model takes long."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from ..loading.pipeline_component import PipelineComponent


if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from ..pipelines.stages import FactorizedStages


class Cancelled(Exception):
    """Raised to leave a cancelled run."""


def ask_between_blocks(pipe: FactorizedStages, is_unwanted: Callable[[], bool]) -> list[RemovableHandle]:
    """Adds hooks to all models of the pipeline that raise [`Cancelled`] before the next block once `is_unwanted` returns true.

    Blocks are the modules in an `nn.ModuleList`: layers of transformers, levels and residual blocks of UNets and VAEs.

    Returns:
        Handles of the hooks; `handle.remove()` removes one.
    """

    def ask(*_: Any) -> None:
        if is_unwanted():
            raise Cancelled

    parts = list(pipe.components.values())
    for part in pipe.components.values():
        if isinstance(part, PipelineComponent) and hasattr(part, "pipeline"):
            parts += part.pipeline.components.values()
    if pipe.rewriter is not None:
        parts.append(pipe.rewriter.model)
    blocks = {
        block
        for part in parts
        if isinstance(part, nn.Module)
        for module in part.modules()
        if isinstance(module, nn.ModuleList)
        for block in module
    }
    return [block.register_forward_pre_hook(ask) for block in blocks]
