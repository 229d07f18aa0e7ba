"""The device that a module's inputs must be on."""

from __future__ import annotations

import itertools

import torch


try:
    from diffusers.utils.torch_utils import get_module_execution_device
except ImportError:  # diffusers 0.40 has it inside `DiffusionPipeline._execution_device` only.
    from diffusers.hooks.group_offloading import _get_group_onload_device

    def get_module_execution_device(module: torch.nn.Module) -> torch.device:
        """Where the hooks of an offloaded module bring it; otherwise where the module is."""
        try:
            return _get_group_onload_device(module)
        except ValueError:
            pass
        for part in module.modules():
            device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.device(device)
        device = getattr(module, "device", None)
        return device or next(itertools.chain(module.parameters(), module.buffers())).device


__all__ = ["get_module_execution_device"]
