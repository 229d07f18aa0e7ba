"""Strengths of adapters for the length of one forward."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..locks import exclusive
from .deltas import ParameterDeltas


# Of layers whose strengths are changed at the moment.
_true_strengths: weakref.WeakKeyDictionary[BaseTunerLayer, dict[str, float]] = weakref.WeakKeyDictionary()


class AdapterScales:
    """Strengths that a model's adapters have in one call's forwards and nowhere else.

    A strength stands in the adapter's layers, which other pipelines and threads may run. So it is changed for one forward at a
    time, in which the model is this thread's alone, and what stood there is put back whatever happens.

    Args:
        model (`nn.Module`): with or without adapters.
        scale (`float`): factor on all of them.
        off (`Collection[str]`): names of adapters that are switched off.

    Raises:
        `ValueError`: an adapter of `off` is fused into the weights, or one that is fused keeps `scale` or another adapter from
            having an effect.
    """

    def __init__(self, model: nn.Module, scale: float = 1.0, off: Collection[str] = ()):
        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        fused = sorted({name for layer in layers for name in layer.merged_adapters if name in off})
        if fused:
            raise ValueError(f"The {fused[0]} LoRA is fused, and in this call it is off: call `unfuse_lora()` first.")
        _check_effect(layers, scale, off)
        self.model, self.scale, self.off = model, scale, off
        self.layers = [layer for layer in layers if scale != 1 or layer.scaling.keys() & set(off)]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """For one forward."""
        with exclusive(self.model):
            # An interrupt may have kept the last one from putting them back.
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
    """Refuses what a layer with fused adapters would not do: it runs with its weights alone."""
    layers = [layer for layer in layers if layer.merged]
    fused = sorted({name for layer in layers for name in layer.merged_adapters})
    if fused and scale != 1:
        raise ValueError(
            f"`attention_kwargs` has `scale={scale:g}`, and the LoRAs {fused} are fused with the strengths that they had: call "
            "`unfuse_lora()` first."
        )
    active = {name for layer in layers for name in layer.active_adapters if layer.scaling.get(name)}
    if hidden := sorted(active - set(fused) - set(off)):
        raise ValueError(
            f"The LoRAs {hidden} have no effect beside {fused}, which are fused: fuse all that the call is to use, or call "
            "`unfuse_lora()`."
        )


def without_scale(attention_kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
    """What of `attention_kwargs` is for the processors: [`AdapterScales`] has taken care of `"scale"`."""
    return attention_kwargs and {name: value for name, value in attention_kwargs.items() if name != "scale"}
