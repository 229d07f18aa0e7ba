"""8-bit matrix products in the blocks of video models, by torchao."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from diffusers import TorchAoConfig

# Linear layers outside of attention and feed-forward in Wan, SkyReels-V2 and CogVideoX: embeddings of text, time and latents,
# modulation, and the output projection. They take little time, and every block uses their results, so they are not quantized.
# diffusers itself excludes the layers that a class keeps in float32.
WIDE_LAYERS: tuple[str, ...]
WIDE_LAYERS = ("condition_embedder", "fps_projection", "patch_embed", "time_embedding", "ofs_embedding")
WIDE_LAYERS += ("norm1", "norm2", "norm_out", "proj_out")
# Lowest compute capability of NVIDIA GPUs with float8 products (torchao 0.18, float8/inference.py).
CAPABILITY = (8, 9)


def fp8_dynamic() -> TorchAoConfig:
    """Returns a config that quantizes weights and inputs of the blocks' linear layers to float8_e4m3fn.

    Each row has its own scale; inputs are quantized in each forward. The weights must be loaded in bfloat16, and the GPU must
    support float8 products: see [`fp8_problem`]. Compile the blocks; otherwise quantizing the inputs takes the time that the
    products save. LoRA layers stay in the model's dtype. Requires the package torchao.

    Returns:
        [`~diffusers.TorchAoConfig`]: `quantization_config` of a video model's `from_pretrained`, or of its name in a
            [`~diffusers.PipelineQuantizationConfig`].
    """
    from diffusers import TorchAoConfig
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    return TorchAoConfig(config, modules_to_not_convert=list(WIDE_LAYERS))


def fp8_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns why a model on `device` with weights of `dtype` cannot use [`fp8_dynamic`]; `None` if it can."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    if not is_nvidia or torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"{device} is not an NVIDIA GPU of compute capability {'.'.join(map(str, CAPABILITY))} or higher"
    if dtype != torch.bfloat16:
        return f"scales per row need weights in bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None
