"""Fused operations of the transformers: a definition in plain torch, and a dispatcher that the models call."""

from .dispatch import gated_residual, modulated_layer_norm


__all__ = ["gated_residual", "modulated_layer_norm"]
