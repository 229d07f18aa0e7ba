"""Marker for tests of diffusers' group offloading."""

import pytest
import torch
from diffusers.hooks import apply_group_offloading


def skip_without_group_offload() -> None:
    """diffusers 0.40 asks torch for an accelerator even when both devices are the CPU."""
    cpu = torch.device("cpu")
    try:
        apply_group_offloading(torch.nn.Sequential(torch.nn.Linear(1, 1)), cpu, cpu, offload_type="leaf_level")
    except AttributeError as error:
        pytest.skip(f"this diffusers offloads groups to an accelerator only ({error})")
