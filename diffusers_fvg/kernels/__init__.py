"""Fused operations of the transformers: a definition in plain torch, Triton kernels, and a dispatcher that models call."""

from .dispatch import (
    frame_attention,
    fuses_norm,
    gated_residual,
    layer_norm,
    modulated_layer_norm,
    rms_norm_rope,
    rms_norm_silu,
    use_kernels,
)


__all__ = [
    "frame_attention",
    "fuses_norm",
    "gated_residual",
    "layer_norm",
    "modulated_layer_norm",
    "rms_norm_rope",
    "rms_norm_silu",
    "use_kernels",
]
