"""Adapters for norms, modulation tables and biases, for which PEFT has no layer."""

from __future__ import annotations

import copy

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn


def base_parameter(transformer: nn.Module, name: str) -> nn.Parameter:
    """Returns a parameter by its name in the model without adapters."""
    module, _, leaf = name.rpartition(".")
    module = transformer.get_submodule(module)
    return getattr(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module, leaf)


class ParameterDeltas(nn.Module, BaseTunerLayer):
    """Adapters that add deltas to parameters in place: `original + sum(strength * delta)`.

    PEFT and diffusers see one more adapter layer, so that `set_adapters`, `delete_adapters`, `disable_lora`, `fuse_lora` and
    `unfuse_lora` act on it. The parameters are updated before each forward of the transformer. The layer has no parameters
    and never runs, so the keys of the model's state dict and its speed do not change. A saved state dict holds the current
    values of the parameters; `originals` holds the base values.

    Args:
        transformer (`nn.Module`): the model whose parameters are changed. The caller stores this object in the model's
            attribute `parameter_deltas`.
    """

    other_param_names = ("deltas", "scaling")
    # `set_lora_device` asks every adapter layer for its low-rank weights.
    lora_A: dict[str, nn.Module] = {}
    # The inherited properties would look for a base layer, which this layer does not have, and recurse without end.
    weight = bias = None

    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.originals: dict[str, torch.Tensor] = {}
        self.deltas: dict[str, dict[str, torch.Tensor]] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._fused: dict[str, float] = {}
        self._applied: dict[str, float] | None = {}
        # The tuple hides the transformer from `nn.Module`, which would make it a child of its own child.
        self._transformer = (transformer,)
        self._hook = transformer.register_forward_pre_hook(self._before_forward)

    def _before_forward(self, transformer: nn.Module, args: tuple) -> None:
        self.refresh()

    def add(self, adapter_name: str, deltas: dict[str, torch.Tensor]) -> None:
        """Adds or replaces an adapter with strength 1; `deltas` maps parameter names to deltas of the same shapes."""
        for name in deltas:
            if name not in self.originals:
                self._own(name)
                self.originals[name] = self._parameter(name).detach().to("cpu", copy=True)
        self.deltas[adapter_name] = deltas
        self.scaling[adapter_name] = 1.0
        self._applied = None

    def _own(self, name: str) -> None:
        """Copies a parameter, which the transformer may share with the stock model that it was made from."""
        path, _, leaf = name.rpartition(".")
        module = self._transformer[0].get_submodule(path)
        if isinstance(module, BaseTunerLayer):
            path, module = f"{path}.base_layer", module.get_base_layer()
        # Modules with hooks are not replaced: the hooks refer to the module that they were added to.
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
        # `unload_lora` removes PEFT's layers from the model, and `peft_config` with them.
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
        """Updates the parameters if strengths have changed.

        Raises:
            `ValueError`: the parameters are on the meta device (sequential offload).
        """
        strengths = self._strengths()
        if strengths == self._applied:
            return
        parameters = {name: self._parameter(name) for name in self.originals}
        for name, parameter in parameters.items():
            if parameter.is_meta:
                raise ValueError(
                    f"The LoRA changes `{name}`, which sequential offload keeps off the device: load LoRAs and set their "
                    "strengths before `enable_sequential_cpu_offload()`, or use `enable_model_cpu_offload()`."
                )
        # `None` until all are written: after an error in between, the mixture must not count as up to date.
        self._applied = None
        for name, parameter in parameters.items():
            parameter.data.copy_(self._value(name, strengths, parameter.device))
        self._applied = dict(strengths)

    def retire(self) -> None:
        """Removes this layer from the transformer, whose parameters stay fused or get their original values."""
        self.refresh()
        self._hook.remove()
        (transformer,) = self._transformer
        del transformer.parameter_deltas

    # Methods that PEFT and diffusers call.

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        pass  # `refresh` moves the deltas to the parameters' device.

    def set_scale(self, adapter: str, scale: float) -> None:
        if adapter in self.scaling:
            self.scaling[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        # Called within a forward (`attention_kwargs={"scale": s}`), after the hook has updated the values.
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale
        self.refresh()

    def unscale_layer(self, scale: float | None = None) -> None:
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale
        # The next refresh writes without comparing: offloading may have dropped the values written within the forward.
        self._applied = None

    def enable_adapters(self, enabled: bool) -> None:
        # PEFT layers unfuse themselves when they are disabled.
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
            # As with PEFT's layers, a deleted adapter that is fused stays in the weights permanently.
            strengths = {adapter_name: self._fused.pop(adapter_name)}
            self.merged_adapters.remove(adapter_name)
            for name, original in self.originals.items():
                self.originals[name] = self._value(name, strengths, original.device).to(original.dtype)
        super().delete_adapter(adapter_name)
        self._applied = None
