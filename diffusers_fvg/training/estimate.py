"""How much memory and arithmetic a training run needs: computed from shapes, not measured."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import CogVideoXTransformer3DModel, WanTransformer3DModel

from .config import TrainConfig


# Tensors of the model's width and of the feed-forward's that backpropagation through one of Wan's blocks holds at its peak,
# counted in its source with LoRA on every linear layer and the memory-efficient attention backends. Of these 15 and 2 are
# kept by the forward, with CogVideoX, which has no cross-attention, 11 and 2: for its blocks this is an upper bound.
BLOCK_WIDTHS, BLOCK_FEED_FORWARDS = 24, 4


def estimated_memory(
    config: TrainConfig, transformer_config: dict[str, Any], spatial: int, temporal: int = 4
) -> dict[str, int]:
    """Bytes on each device, by part; their sum is the need. Allocator and libraries take some 2 GiB more.

    weights: the frozen base (2 bytes a parameter in bf16, else 4); one expert, also where two are trained.
    lora: float32 weight, gradient and two moments of AdamW, 16 bytes a parameter; 4 for the average, 2 for the bfloat16
        copy that mixed precision makes; where guidance is distilled, the frozen LoRA that is learnt from.
    block_inputs: one activation per block with gradient checkpointing; without it each block's whole working set.
    block: the working set of one block, `batch * tokens * (24 * width + 4 * feed_forward)` numbers.

    Args:
        config (`TrainConfig`): batch size, buckets, rank, targets.
        transformer_config (`dict`): of a Wan or CogVideoX transformer, as in its `config.json`.
        spatial, temporal (`int`): pixels per latent of the VAE in space, frames per latent in time.
    """
    wan = "ffn_dim" in transformer_config
    with init_empty_weights():
        transformer = (WanTransformer3DModel if wan else CogVideoXTransformer3DModel).from_config(transformer_config)
    shape = transformer.config
    width = shape.num_attention_heads * shape.attention_head_dim
    if wan:
        feed_forward, texts, patch = shape.ffn_dim, 0, tuple(shape.patch_size)
    else:
        # Text tokens go through the blocks with the others. The feed-forward of diffusers' class is four times as wide.
        feed_forward, texts = 4 * width, shape.max_text_seq_length
        patch = (shape.patch_size_t or 1, shape.patch_size, shape.patch_size)
    tokens = texts + _longest_video(config, patch, spatial, temporal)
    linears = [
        module
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and any(f".{name}".endswith(f".{end}") for end in config.targets)
    ]
    lora = sum(config.rank * (module.in_features + module.out_features) for module in linears)
    number = 2 if config.mixed_precision == "bf16" else 4
    lora_number = 16 + (4 if config.ema_decay else 0) + (2 if config.mixed_precision == "bf16" else 0)
    lora_number += number if config.distill_guidance else 0
    block = config.batch_size * tokens * number * (BLOCK_WIDTHS * width + BLOCK_FEED_FORWARDS * feed_forward)
    per_block = config.batch_size * tokens * number * width if config.gradient_checkpointing else block
    return {
        "weights": number * transformer.num_parameters(),
        "lora": lora_number * lora,
        "block_inputs": shape.num_layers * per_block,
        "block": block,
    }


def estimated_operations(
    config: TrainConfig,
    parameters: int,
    width: int,
    num_layers: int,
    patch: tuple[int, int, int],
    spatial: int,
    temporal: int = 4,
) -> float:
    """Floating-point operations of one process in all steps, on clips of the largest bucket; texts are left out.

    A forward has `2 * parameters * tokens` and, in self-attention, `4 * tokens^2 * width` a layer. Beside it gradient
    checkpointing runs a second one, and the backward pass takes as much again in the frozen layers, whose own gradients are
    not needed, and twice as much in attention.

    Args:
        config (`TrainConfig`): steps, batch size, buckets.
        parameters, width, num_layers (`int`): of the transformer.
        patch (`tuple[int, int, int]`): frames, rows and columns of latents in one token.
        spatial, temporal (`int`): as in [`estimated_memory`].
    """
    tokens = _longest_video(config, patch, spatial, temporal)
    clips = config.steps * config.gradient_accumulation_steps * config.batch_size
    again = 1 if config.gradient_checkpointing else 0
    dense, attention = 2.0 * parameters * tokens, 4.0 * tokens**2 * width * num_layers
    return clips * ((2 + again) * dense + (3 + again) * attention)


def clip_tokens(bucket: tuple[int, int, int], patch: tuple[int, int, int], spatial: int, temporal: int = 4) -> int:
    """Tokens of a clip `(num_frames, height, width)`; see [`estimated_operations`]."""
    num_frames, rows, columns = bucket
    frames = math.ceil((1 + (num_frames - 1) // temporal) / patch[0])
    return frames * (rows * columns // (patch[1] * patch[2] * spatial**2))


def _longest_video(config: TrainConfig, patch: tuple[int, int, int], spatial: int, temporal: int) -> int:
    """Tokens of a clip of the largest bucket."""
    return max(clip_tokens(bucket, patch, spatial, temporal) for bucket in config.all_buckets)
