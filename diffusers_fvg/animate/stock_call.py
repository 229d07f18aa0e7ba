"""Context managers for the calls of stock pipelines in composer and animator."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..checks import stop_unless_finite


@contextlib.contextmanager
def seeded_steps(
    pipeline: DiffusionPipeline, generator: torch.Generator | list[torch.Generator] | None
) -> Iterator[None]:
    """Makes a scheduler that draws noise in `step` use `generator`, which pipelines of flow models do not pass to it."""
    scheduler = getattr(pipeline, "scheduler", None)
    if scheduler is None or "generator" not in inspect.signature(scheduler.step).parameters:
        yield
        return
    scheduler.step = functools.partial(scheduler.step, generator=generator)
    try:
        yield
    finally:
        del scheduler.step


@contextlib.contextmanager
def finite_decoding(pipeline: DiffusionPipeline, stage: str) -> Iterator[None]:
    """Raises `FloatingPointError` if the VAE's decoder gives values that are not finite, before they are clamped to white."""
    decoder = getattr(getattr(pipeline, "vae", None), "decoder", None)
    if not isinstance(decoder, torch.nn.Module):
        yield
        return

    def check(module: torch.nn.Module, inputs: Any, made: Any) -> None:
        # Some decoders return a tuple: the frames, and a cache for later frames.
        stop_unless_finite(stage, made[0] if isinstance(made, tuple) else made)

    handle = decoder.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()
