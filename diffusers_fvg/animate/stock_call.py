"""What a call of a stock pipeline, the composer's or the animator's, runs within."""

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
    """Within it, a scheduler that draws noise at its steps takes it from `generator`; pipelines of flow models pass none on."""
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
    """Within it, a VAE's decoder that makes infinity stops the stage: what comes after clamps it to white."""
    decoder = getattr(getattr(pipeline, "vae", None), "decoder", None)
    if not isinstance(decoder, torch.nn.Module):
        yield
        return

    def check(module: torch.nn.Module, inputs: Any, made: Any) -> None:
        # Some give what a later frame needs beside the picture.
        stop_unless_finite(stage, made[0] if isinstance(made, tuple) else made)

    handle = decoder.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()
