"""Finds the device that the inputs of a module must be on."""

from __future__ import annotations

import itertools

import torch


try:
    from diffusers.utils.torch_utils import get_module_execution_device
except ImportError:  # diffusers 0.40 has this code only inside `DiffusionPipeline._execution_device`.
    from diffusers.hooks.group_offloading import _get_group_onload_device

    def get_module_execution_device(module: torch.nn.Module) -> torch.device:
        """Returns the device that offloading hooks move a module to, or else the device of its weights."""
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
