"""Matrix products of a video model's blocks in 8 bits, by torchao."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from diffusers import TorchAoConfig

# Linear layers outside of attention and feed-forward, in Wan, SkyReels-V2 and CogVideoX: embeddings of texts, times and latents,
# modulation, and the last projection. They take no time worth saving, and what they make is in every block. What a class keeps in
# float32, diffusers leaves out by itself.
WIDE_LAYERS = ("condition_embedder", "fps_projection", "patch_embed", "time_embedding", "ofs_embedding")
WIDE_LAYERS += ("norm1", "norm2", "norm_out", "proj_out")
# Of NVIDIA GPUs, from which on they multiply float8 (torchao 0.18, float8/inference.py).
CAPABILITY = (8, 9)


def fp8_dynamic() -> TorchAoConfig:
    """Weights and inputs of the blocks' linear layers in float8_e4m3fn, with a scale for each row; of inputs in each forward anew.

    For weights loaded in bfloat16, on a GPU that multiplies float8: see [`fp8_problem`]. Compile the blocks, or rounding the inputs
    takes what the products save. LoRAs are layers of their own beside it, in the model's dtype. Needs the package torchao.

    Returns:
        [`~diffusers.TorchAoConfig`]: `quantization_config` of a video model's `from_pretrained`, or of its name in a
            [`~diffusers.PipelineQuantizationConfig`].
    """
    from diffusers import TorchAoConfig
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    return TorchAoConfig(config, modules_to_not_convert=list(WIDE_LAYERS))


def fp8_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a model on `device` with weights of `dtype` cannot run with [`fp8_dynamic`]; `None` where it can."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    if not is_nvidia or torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"{device} is no NVIDIA GPU of compute capability {'.'.join(map(str, CAPABILITY))} or higher"
    if dtype != torch.bfloat16:
        return f"a scale for each row needs weights in bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None
