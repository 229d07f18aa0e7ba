"""Saves memory of the frozen base: quantization, and offloading of weights and activations to CPU memory.

The LoRA must be added before. Its layers stay on the device and in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint


# Number of weights that share a quantization constant: the default of bitsandbytes and QLoRA.
NF4_BLOCK = 64


def blocks_of(transformer: nn.Module) -> nn.ModuleList:
    """Returns the blocks of a Wan or CogVideoX transformer."""
    return transformer.blocks if hasattr(transformer, "blocks") else transformer.transformer_blocks


def quantized_layers(transformer: nn.Module, kind: str) -> Iterator[tuple[str, nn.Linear]]:
    """Yields name and module of the layers that [`quantize_base`] quantizes.

    These are all linear layers of the blocks that belong to neither a norm nor a LoRA, 98 % of the weights of
    Wan2.2-TI2V-5B. With `"nf4"`, `in_features` must also be a multiple of 64, as in all layers of Wan and CogVideoX.
    """
    blocks = blocks_of(transformer)
    prefix = next(name for name, module in transformer.named_children() if module is blocks)
    # On a CPU, bitsandbytes 0.50 computes other values if a block of 64 extends over the end of a row.
    multiple = NF4_BLOCK if kind == "nf4" else 1
    for name, module in blocks.named_modules(prefix=prefix):
        plain = isinstance(module, nn.Linear) and "norm" not in name and "lora_" not in name
        if plain and module.in_features % multiple == 0:
            yield name, module


def quantize_base(transformer: nn.Module, kind: str, device: torch.device) -> None:
    """Quantizes the weights of [`quantized_layers`]. Their results keep the model's dtype.

    Args:
        transformer (`ModelMixin`): frozen transformer on the CPU, with its LoRA.
        kind (`str`): `"fp8"`: float8_e4m3fn, by diffusers' layerwise casting. `"nf4"`: 4 bits by bitsandbytes, with its
            constants in 8 bits as in QLoRA (arXiv 2305.14314, sections 3 and 4).
        device (`torch.device`): device on which bitsandbytes quantizes the weights and keeps them.
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
        # In evaluation mode the flag would repack the weights for a matrix product that has no gradient.
        made.support_avx512bf16_for_cpu = False
        transformer.set_submodule(name, made.to(device))


def checkpoint_blocks(transformer: nn.Module, activation_offload: bool) -> None:
    """Enables gradient checkpointing of the blocks.

    Args:
        transformer (`ModelMixin`): transformer that supports gradient checkpointing.
        activation_offload (`bool`): whether to keep the input of each block, the video's tokens, in CPU memory. Its other
            arguments are the same for all blocks and stay on the device.
    """
    if not activation_offload:
        transformer.enable_gradient_checkpointing()
        return

    def checkpointed(block: Callable, hidden_states: torch.Tensor, *others: torch.Tensor | None):
        # The context saves only the block's input, because `checkpoint` drops the tensors inside the block.
        with save_on_cpu(pin_memory=hidden_states.is_cuda):
            return checkpoint(lambda tokens: block(tokens, *others), hidden_states, use_reentrant=False)

    transformer.enable_gradient_checkpointing(checkpointed)


def offload_blocks(transformer: nn.Module, device: torch.device) -> None:
    """Keeps the frozen weights of the blocks in CPU memory. While a block runs, in the forward and in the repeated forward of
    gradient checkpointing, it uses copies on the device. All other weights are moved to the device.

    diffusers' group offloading moves the weights themselves, and moves them back after a block's forward. The backward would
    find them, and the LoRA, on another device.

    Args:
        transformer (`ModelMixin`): transformer with its LoRA.
        device (`torch.device`): device on which it runs.
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
    """Forward of a block that copies its frozen weights to the device first."""

    def __init__(self, block: nn.Module, device: torch.device):
        self.computed, self.device = _Forward(block), device
        self.frozen = {name: p for name, p in self.computed.named_parameters() if not p.requires_grad}

    def __call__(self, *args, **kwargs):
        copies = {name: weight.to(self.device, non_blocking=True) for name, weight in self.frozen.items()}
        return torch.func.functional_call(self.computed, copies, args, kwargs)


class _Forward(nn.Module):
    """Module whose forward is a block's original forward, for `functional_call`."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block, self.computed = block, block.forward

    def forward(self, *args, **kwargs):
        return self.computed(*args, **kwargs)
