"""Adapters of norms, modulation tables and biases, for which PEFT has no layer."""

from __future__ import annotations

import copy

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn


def base_parameter(transformer: nn.Module, name: str) -> nn.Parameter:
    """A parameter by its name in the model without adapters."""
    module, _, leaf = name.rpartition(".")
    module = transformer.get_submodule(module)
    return getattr(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module, leaf)


class ParameterDeltas(nn.Module, BaseTunerLayer):
    """Adapters made of plain additions to parameters: `original + sum(strength * delta)`, written into the parameter.

    To PEFT and diffusers it is one more adapter layer, so that `set_adapters`, `delete_adapters`, `disable_lora`,
    `fuse_lora` and `unfuse_lora` reach it. Values are brought up to date before each forward of the transformer. It
    holds no parameters of its own and never runs: the model's state dict and its speed stay as they are. In a saved
    state dict the parameters are those in use; `originals` has the base values.

    Args:
        transformer (`nn.Module`): the model whose parameters are changed; gets this object as `parameter_deltas`.
    """

    other_param_names = ("deltas", "scaling")
    # `set_lora_device` asks every adapter layer for its low-rank weights.
    lora_A: dict[str, nn.Module] = {}
    # Of a base layer, which this has none of; the inherited properties would look for it without end.
    weight = bias = None

    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.originals: dict[str, torch.Tensor] = {}
        self.deltas: dict[str, dict[str, torch.Tensor]] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._fused: dict[str, float] = {}
        self._applied: dict[str, float] | None = {}
        # In a tuple: as an attribute the transformer would become a child of its own child.
        self._transformer = (transformer,)
        self._hook = transformer.register_forward_pre_hook(self._before_forward)

    def _before_forward(self, transformer: nn.Module, args: tuple) -> None:
        self.refresh()

    def add(self, adapter_name: str, deltas: dict[str, torch.Tensor]) -> None:
        """Adds or replaces an adapter: parameter name -> delta of the parameter's shape. Its strength is 1."""
        for name in deltas:
            if name not in self.originals:
                self._own(name)
                self.originals[name] = self._parameter(name).detach().to("cpu", copy=True)
        self.deltas[adapter_name] = deltas
        self.scaling[adapter_name] = 1.0
        self._applied = None

    def _own(self, name: str) -> None:
        """Gives the transformer a parameter that no other model has: a stock one that it was made of may share it."""
        path, _, leaf = name.rpartition(".")
        module = self._transformer[0].get_submodule(path)
        if isinstance(module, BaseTunerLayer):
            path, module = f"{path}.base_layer", module.get_base_layer()
        # What hooks act on stays as it is: they know the module that they were put on.
        if not module._modules and "forward" not in vars(module):
            module = copy.copy(module)
            module._parameters = module._parameters.copy()
            self._transformer[0].set_submodule(path, module)
        parameter = module._parameters[leaf]
        module._parameters[leaf] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)

    def _parameter(self, name: str) -> nn.Parameter:
        return base_parameter(self._transformer[0], name)

    def _strengths(self) -> dict[str, float]:
        (transformer,) = self._transformer
        if self.merged:
            return self._fused
        # `unload_lora` takes PEFT's layers out of the model and this attribute with them.
        if self.disable_adapters or not getattr(transformer, "peft_config", None):
            return {}
        return {name: self.scaling[name] for name in self.active_adapters if name in self.deltas}

    def _value(self, name: str, strengths: dict[str, float], device: torch.device) -> torch.Tensor:
        original = self.originals[name]
        value = original.to(device, torch.promote_types(original.dtype, torch.float32))
        for adapter, strength in strengths.items():
            if name in self.deltas[adapter]:
                value = value + strength * self.deltas[adapter][name].to(value)
        return value

    @torch.no_grad()
    def refresh(self) -> None:
        """Writes the parameters if strengths have changed.

        Raises:
            `ValueError`: the parameters are away (sequential offload).
        """
        strengths = self._strengths()
        if strengths == self._applied:
            return
        parameters = {name: self._parameter(name) for name in self.originals}
        for name, parameter in parameters.items():
            if parameter.is_meta:
                raise ValueError(
                    f"The LoRA changes `{name}`, which sequential offload has moved away: load LoRAs and set their "
                    "strengths before `enable_sequential_cpu_offload()`, or use `enable_model_cpu_offload()`."
                )
        # Not known until all are written: an error in between must not leave a mixture that counts as up to date.
        self._applied = None
        for name, parameter in parameters.items():
            parameter.data.copy_(self._value(name, strengths, parameter.device))
        self._applied = dict(strengths)

    def retire(self) -> None:
        """Leaves the transformer with the parameters as they should be: fused, or the original ones."""
        self.refresh()
        self._hook.remove()
        (transformer,) = self._transformer
        del transformer.parameter_deltas

    # What PEFT and diffusers call.

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        pass  # `refresh` takes the deltas to the parameters' device

    def set_scale(self, adapter: str, scale: float) -> None:
        if adapter in self.scaling:
            self.scaling[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        # Called within a forward (`attention_kwargs={"scale": s}`), after the values were brought up to date.
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale
        self.refresh()

    def unscale_layer(self, scale: float | None = None) -> None:
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale
        # Not compared but written again: offloading may have dropped what was written within the forward.
        self._applied = None

    def enable_adapters(self, enabled: bool) -> None:
        # A PEFT layer un-fuses itself when it is disabled.
        if not enabled:
            self.unmerge()
        super().enable_adapters(enabled)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.deltas:
                continue
            if safe_merge and not all(torch.isfinite(delta).all() for delta in self.deltas[name].values()):
                raise ValueError(f"The adapter {name!r} has deltas that are not finite; it was not fused.")
            self._fused[name] = self.scaling[name]
            self.merged_adapters.append(name)
        self._applied = None
        self.refresh()

    def unmerge(self) -> None:
        self.merged_adapters.clear()
        self._fused = {}
        self.refresh()

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self._fused:
            # As with PEFT's layers, what is fused stays in the weights for good.
            strengths = {adapter_name: self._fused.pop(adapter_name)}
            self.merged_adapters.remove(adapter_name)
            for name, original in self.originals.items():
                self.originals[name] = self._value(name, strengths, original.device).to(original.dtype)
        super().delete_adapter(adapter_name)
        self._applied = None
