"""Estimates memory and arithmetic of a training run from shapes; nothing is measured."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import CogVideoXTransformer3DModel, WanTransformer3DModel

from .config import TrainConfig
from .draws import appended_frames
from .low_memory import blocks_of, quantized_layers


# Number of tensors of the model's width and of the feed-forward's width that backpropagation through one block of Wan holds at
# its peak, counted in Wan's source with LoRA on every linear layer and memory-efficient attention. The forward keeps 15 and 2
# of them. CogVideoX, which has no cross-attention, keeps 11 and 2, so for its blocks this is an upper bound.
BLOCK_WIDTHS, BLOCK_FEED_FORWARDS = 24, 4
# Bytes per weight; see [`estimated_memory`].
QUANTIZED_BYTES = {"fp8": 1.0, "nf4": 1 / 2 + 1 / 64 + 4 / (64 * 256)}
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw-8bit": 2 * (1 + 4 / 256)}


def estimated_memory(
    config: TrainConfig, transformer_config: dict[str, Any], spatial: int, temporal: int = 4
) -> dict[str, int]:
    """Returns the bytes that training needs on each device, by part. Allocator and libraries take about 2 GiB more.

    weights: the frozen base (2 bytes per parameter in bf16, else 4) of one expert, even if two are trained. A quantized layer
        takes 1 byte per parameter in fp8 and `1/2 + 1/64 + 4/(64 * 256)` in nf4: 4 bits, a constant of 8 bits for every 64
        parameters and one of 32 bits for every 256 of these constants (QLoRA, arXiv 2305.14314, section 3). With
        `block_offload` only one block is on the device.
    lora: float32 weight and gradient, 8 bytes per parameter; 4 for the average, 2 for the bfloat16 copy of mixed precision;
        with guidance distillation also the teacher's frozen LoRA.
    optimizer: two moments of AdamW, 8 bytes per parameter; in 8 bits `2 * (1 + 4/256)`, with a constant of 32 bits for every
        256 (arXiv 2110.02861).
    block_inputs: with gradient checkpointing one activation per block, or none if they are offloaded; without it each block's
        whole working set.
    block: the working set of one block on the tokens of [`clip_tokens`], `batch * tokens * (24 * width + 4 * feed_forward)`
        values, and dequantized weights: with fp8 a copy of all its layers, with nf4 one of the largest layer.

    Args:
        config (`TrainConfig`): batch size, buckets, rank, targets, and options that save memory.
        transformer_config (`dict`): config of a Wan or CogVideoX transformer, as in its `config.json`.
        spatial, temporal (`int`): scale factors of the VAE: pixels per latent in space, frames per latent in time.
    """
    transformer, number = _empty(transformer_config), _bytes_a_number(config)
    width, feed_forward, tokens = _sizes(config, transformer, spatial, temporal)
    linears = [
        module
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and any(f".{name}".endswith(f".{end}") for end in config.targets)
    ]
    lora = sum(config.rank * (module.in_features + module.out_features) for module in linears)
    lora_number = 8 + (4 if config.ema_decay else 0) + (2 if config.mixed_precision == "bf16" else 0)
    lora_number += number if config.distill_guidance else 0
    working_set = config.batch_size * tokens * number * (BLOCK_WIDTHS * width + BLOCK_FEED_FORWARDS * feed_forward)
    per_block = config.batch_size * tokens * number * width if config.gradient_checkpointing else working_set
    blocks = blocks_of(transformer)
    layers = (
        {layer for _, layer in quantized_layers(transformer, config.quantize)} if config.quantize != "none" else set()
    )
    wide = [number * _numel(module) for module in blocks[0].modules() if module in layers]
    return {
        "weights": _stored(transformer, layers, config)
        - (_stored(blocks[1:], layers, config) if config.block_offload else 0),
        "lora": lora_number * lora,
        "optimizer": int(OPTIMIZER_BYTES[config.optimizer] * lora),
        "block_inputs": 0 if config.activation_offload else len(blocks) * per_block,
        "block": working_set + {"none": 0, "fp8": sum(wide), "nf4": max(wide, default=0)}[config.quantize],
    }


def estimated_host_memory(
    config: TrainConfig, transformer_config: dict[str, Any], spatial: int, temporal: int = 4
) -> dict[str, int]:
    """Returns the bytes that each process keeps in CPU memory for the device, by part; empty if nothing is offloaded.

    This memory is pinned, and PyTorch allocates pinned memory in powers of two (`CachingHostAllocator`). Besides, the base is
    loaded into CPU memory, in `mixed_precision`, before it moves to the device. The arguments are those of
    [`estimated_memory`].
    """
    transformer, number = _empty(transformer_config), _bytes_a_number(config)
    width, _, tokens = _sizes(config, transformer, spatial, temporal)
    memory = {}
    if config.block_offload:
        layers = {layer for _, layer in quantized_layers(transformer, "fp8")} if config.quantize == "fp8" else set()
        sizes = [
            parameter.numel() * (1 if module in layers else number)
            for module in blocks_of(transformer).modules()
            for parameter in module.parameters(recurse=False)
        ]
        memory["weights"] = sum(map(_pinned, sizes))
    if config.activation_offload:
        block_input = config.batch_size * tokens * number * width
        memory["block_inputs"] = len(blocks_of(transformer)) * _pinned(block_input)
    return memory


def _empty(transformer_config: dict[str, Any]) -> torch.nn.Module:
    wan = "ffn_dim" in transformer_config
    with init_empty_weights():
        return (WanTransformer3DModel if wan else CogVideoXTransformer3DModel).from_config(transformer_config)


def _sizes(config: TrainConfig, transformer: torch.nn.Module, spatial: int, temporal: int) -> tuple[int, int, int]:
    """Returns the widths of the tokens and of the feed-forward, and the number of tokens in the largest bucket."""
    shape = transformer.config
    width = shape.num_attention_heads * shape.attention_head_dim
    if isinstance(transformer, WanTransformer3DModel):
        feed_forward, texts, patch = shape.ffn_dim, 0, tuple(shape.patch_size)
    else:
        # Text tokens pass through the blocks, too. The feed-forward of diffusers' class is four times as wide as the model.
        feed_forward, texts = 4 * width, shape.max_text_seq_length
        patch = (shape.patch_size_t or 1, shape.patch_size, shape.patch_size)
    return width, feed_forward, texts + _longest_video(config, patch, spatial, temporal)


def _bytes_a_number(config: TrainConfig) -> int:
    return 2 if config.mixed_precision == "bf16" else 4


def _stored(module: torch.nn.Module, layers: set[torch.nn.Module], config: TrainConfig) -> int:
    """Returns the bytes of a module's frozen weights, with those of `layers` quantized."""
    number, saved = _bytes_a_number(config), 0.0
    for layer in layers.intersection(module.modules()):
        # bitsandbytes does not quantize biases.
        size = _numel(layer) if config.quantize == "fp8" else layer.weight.numel()
        saved += size * (number - QUANTIZED_BYTES[config.quantize])
    return round(number * _numel(module) - saved)


def _numel(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _pinned(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def estimated_operations(
    config: TrainConfig,
    parameters: int,
    width: int,
    num_layers: int,
    patch: tuple[int, int, int],
    spatial: int,
    temporal: int = 4,
) -> float:
    """Returns the floating-point operations of one process in all steps, for clips of the largest bucket without text tokens.

    A forward has `2 * parameters * tokens` operations, and in self-attention `4 * tokens^2 * width` per layer. Gradient
    checkpointing runs a second forward. The backward pass takes as much as a forward in the frozen layers, which need no
    gradient of their weights, and twice as much in attention.

    Args:
        config (`TrainConfig`): steps, batch size, buckets.
        parameters, width, num_layers (`int`): sizes of the transformer.
        patch (`tuple[int, int, int]`): frames, rows and columns of latents in one token.
        spatial, temporal (`int`): as in [`estimated_memory`].
    """
    tokens = _longest_video(config, patch, spatial, temporal)
    clips = config.steps * config.gradient_accumulation_steps * config.batch_size
    again = 1 if config.gradient_checkpointing else 0
    dense, attention = 2.0 * parameters * tokens, 4.0 * tokens**2 * width * num_layers
    return clips * ((2 + again) * dense + (3 + again) * attention)


def clip_tokens(
    config: TrainConfig, bucket: tuple[int, int, int], patch: tuple[int, int, int], spatial: int, temporal: int = 4
) -> int:
    """Returns the most tokens that a clip has in a forward. An appended anchor adds one latent frame.

    Args:
        config (`TrainConfig`): `anchor_form`, `anchor_position`, `anchor_probability`.
        bucket (`tuple[int, int, int]`): frames, height and width of the clip, in pixels.
        patch, spatial, temporal: as in [`estimated_operations`].
    """
    num_frames, rows, columns = bucket
    frames = math.ceil((1 + (num_frames - 1) // temporal) / patch[0])
    is_appended = config.anchor_probability > 0 and bool(appended_frames(config, "", num_frames, temporal))
    return (frames + is_appended) * (rows * columns // (patch[1] * patch[2] * spatial**2))


def _longest_video(config: TrainConfig, patch: tuple[int, int, int], spatial: int, temporal: int) -> int:
    """Returns the number of tokens of a clip of the largest bucket."""
    return max(clip_tokens(config, bucket, patch, spatial, temporal) for bucket in config.all_buckets)
