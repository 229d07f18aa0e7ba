"""Less memory for a base that is frozen: fewer bits, weights and activations in the computer's memory.

The LoRA is there before any of it: its layers stay as they are, on the device and in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint


# Numbers that share a constant: bitsandbytes' default, and QLoRA's.
NF4_BLOCK = 64


def blocks_of(transformer: nn.Module) -> nn.ModuleList:
    """The blocks of a Wan or CogVideoX transformer."""
    return transformer.blocks if hasattr(transformer, "blocks") else transformer.transformer_blocks


def quantized_layers(transformer: nn.Module, kind: str) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that [`quantize_base`] stores in fewer bits, with their names: all linear ones of the blocks that belong to
    neither a norm nor a LoRA. They are nearly all of the weights: 98 % of Wan2.2-TI2V-5B's. In 4 bits only such that take a
    multiple of 64 numbers, as every layer of Wan and CogVideoX does."""
    blocks = blocks_of(transformer)
    prefix = next(name for name, module in transformer.named_children() if module is blocks)
    # bitsandbytes 0.50 gives other values on a CPU where a block of 64 runs over the end of a row.
    multiple = NF4_BLOCK if kind == "nf4" else 1
    for name, module in blocks.named_modules(prefix=prefix):
        plain = isinstance(module, nn.Linear) and "norm" not in name and "lora_" not in name
        if plain and module.in_features % multiple == 0:
            yield name, module


def quantize_base(transformer: nn.Module, kind: str, device: torch.device) -> None:
    """Stores the weights of [`quantized_layers`] in fewer bits. What is computed with them has the model's own type.

    Args:
        transformer (`ModelMixin`): frozen, on the CPU, with its LoRA.
        kind (`str`): `"fp8"`: float8_e4m3fn, by diffusers' layerwise casting. `"nf4"`: 4 bits by bitsandbytes, with its
            constants in 8 bits as in QLoRA (arXiv 2305.14314, sections 3 and 4).
        device (`torch.device`): where bitsandbytes finds the 4 bits, and keeps them.
    """
    if kind == "fp8":
        transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=transformer.dtype)
        return
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, layer in list(quantized_layers(transformer, kind)):
        has_bias, dtype = layer.bias is not None, layer.weight.dtype
        made = Linear4bit(layer.in_features, layer.out_features, has_bias, dtype, quant_type="nf4", device="meta")
        made.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=made)
        made.bias = layer.bias
        # It would lay weights out anew in evaluation, for a product that has no gradient.
        made.support_avx512bf16_for_cpu = False
        transformer.set_submodule(name, made.to(device))


def checkpoint_blocks(transformer: nn.Module, activation_offload: bool) -> None:
    """Gradient checkpointing of the blocks.

    Args:
        transformer (`ModelMixin`): that has it.
        activation_offload (`bool`): keep what a block has to begin anew with, the video's tokens, in the computer's memory. All
            else that is passed to it is the same for all blocks, and stays where it is.
    """
    if not activation_offload:
        transformer.enable_gradient_checkpointing()
        return

    def checkpointed(block: Callable, hidden_states: torch.Tensor, *others: torch.Tensor | None):
        # Within the context the only tensor that is saved is the one that is passed on: the block's own are dropped.
        with save_on_cpu(pin_memory=hidden_states.is_cuda):
            return checkpoint(lambda tokens: block(tokens, *others), hidden_states, use_reentrant=False)

    transformer.enable_gradient_checkpointing(checkpointed)


def offload_blocks(transformer: nn.Module, device: torch.device) -> None:
    """Keeps the frozen weights of the blocks in the computer's memory. Each block gets copies of its own on the device while it
    runs, in the forward and again when gradient checkpointing runs it for the backward; all else is moved to the device.

    diffusers' group offload moves the weights themselves, back again as soon as a block's forward is through: its backward
    then finds them, and the LoRA, on another device.

    Args:
        transformer (`ModelMixin`): with its LoRA.
        device (`torch.device`): where it runs.
    """
    blocks = blocks_of(transformer)
    kept = {parameter for parameter in blocks.parameters() if not parameter.requires_grad}
    for module in transformer.modules():
        for parameter in module.parameters(recurse=False):
            if parameter not in kept:
                parameter.data = parameter.data.to(device)
            elif device.type == "cuda":
                parameter.data = parameter.data.pin_memory()
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    for block in blocks:
        block.forward = _WithCopies(block, device)


class _WithCopies:
    """The forward of a block whose frozen weights are elsewhere."""

    def __init__(self, block: nn.Module, device: torch.device):
        self.computed, self.device = _Forward(block), device
        self.frozen = {name: p for name, p in self.computed.named_parameters() if not p.requires_grad}

    def __call__(self, *args, **kwargs):
        copies = {name: weight.to(self.device, non_blocking=True) for name, weight in self.frozen.items()}
        return torch.func.functional_call(self.computed, copies, args, kwargs)


class _Forward(nn.Module):
    """A block's own forward as a module, which `functional_call` asks for."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block, self.computed = block, block.forward

    def forward(self, *args, **kwargs):
        return self.computed(*args, **kwargs)
