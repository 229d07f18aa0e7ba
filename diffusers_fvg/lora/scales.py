"""Changes the strengths of adapters for single forwards."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..locks import exclusive
from .deltas import ParameterDeltas


# The unchanged strengths of layers whose strengths are changed at the moment.
_true_strengths: weakref.WeakKeyDictionary[BaseTunerLayer, dict[str, float]] = weakref.WeakKeyDictionary()


class AdapterScales:
    """Adapter strengths that hold only for the forwards of one pipeline call.

    Strengths are stored in the adapter layers, which other pipelines and threads may use. So they are changed for one forward
    at a time, during which this thread holds the model's lock, and are always restored.

    Args:
        model (`nn.Module`): the model, with or without adapters.
        scale (`float`): factor on all strengths.
        off (`Collection[str]`): names of adapters that are switched off.

    Raises:
        `ValueError`: an adapter of `off` is fused, or a fused adapter would make `scale` or another adapter ineffective.
    """

    def __init__(self, model: nn.Module, scale: float = 1.0, off: Collection[str] = ()):
        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        fused = sorted({name for layer in layers for name in layer.merged_adapters if name in off})
        if fused:
            raise ValueError(
                f"The {fused[0]} LoRA is fused, but this call runs without it: call `unfuse_lora()` first."
            )
        _check_effect(layers, scale, off)
        self.model, self.scale, self.off = model, scale, off
        self.layers = [layer for layer in layers if scale != 1 or layer.scaling.keys() & set(off)]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Applies the strengths within the block, which should be one forward."""
        with exclusive(self.model):
            # An interrupt may have kept the previous forward from restoring the strengths.
            before = [_true_strengths.get(layer) or dict(layer.scaling) for layer in self.layers]
            try:
                for layer, strengths in zip(self.layers, before):
                    _true_strengths[layer] = strengths
                    layer.scaling.update(
                        {name: 0.0 if name in self.off else value * self.scale for name, value in strengths.items()}
                    )
                yield
            finally:
                for layer, strengths in zip(self.layers, before):
                    layer.scaling.update(strengths)
                    _true_strengths.pop(layer, None)
                for layer in self.layers:
                    if isinstance(layer, ParameterDeltas):
                        layer.refresh()


def _check_effect(layers: list[BaseTunerLayer], scale: float, off: Collection[str]) -> None:
    """Refuses settings that have no effect on layers with fused adapters, which run with their weights alone."""
    layers = [layer for layer in layers if layer.merged]
    fused = sorted({name for layer in layers for name in layer.merged_adapters})
    if fused and scale != 1:
        raise ValueError(
            f"`scale={scale:g}` in `attention_kwargs` has no effect, because the LoRAs {fused} are fused: call `unfuse_lora()` "
            "first."
        )
    active = {name for layer in layers for name in layer.active_adapters if layer.scaling.get(name)}
    if hidden := sorted(active - set(fused) - set(off)):
        raise ValueError(
            f"The LoRAs {hidden} have no effect, because {fused} are fused: fuse all that the call should use, or call "
            "`unfuse_lora()`."
        )


def without_scale(attention_kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
    """Returns `attention_kwargs` without `"scale"`, which [`AdapterScales`] applies."""
    return attention_kwargs and {name: value for name, value in attention_kwargs.items() if name != "scale"}
