"""Checks of what a caller passes, made before any model runs.

What cannot work raises `ValueError` naming the value and the fix; what a model was not trained on warns, once.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from diffusers.utils import logging

from .anchor import Anchor
from .models import ModelFacts
from .schedules import SchedulerPreset, SchedulerPresets


if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from .schedules_cogvideox import TimestepPreset

logger = logging.get_logger(__name__)


# Text encoders read 512 tokens; a prompt longer than this many characters is a mistake (a file, a log), not a prompt.
MAX_PROMPT_CHARACTERS = 10_000


def check_texts(name: str, texts: list[str]) -> None:
    """A non-empty list of texts, each a string with something in it and of bounded length."""
    if not isinstance(texts, (list, tuple)) or not texts:
        raise ValueError(f"`{name}` must be a string or a non-empty list of strings, but is {texts!r}.")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"`{name}` must hold strings, but holds {type(text).__name__}.")
        if not text.strip():
            raise ValueError(f"`{name}` is empty: {text!r}; describe what should be seen.")
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise ValueError(
                f"`{name}` has {len(text)} characters, starting {text[:40]!r}; keep it under {MAX_PROMPT_CHARACTERS}."
            )


def check_size(name: str, value: int, multiple: int) -> None:
    """Pixels: a positive multiple of what a patch of the video model covers."""
    if not isinstance(value, int) or value < multiple or value % multiple:
        below = max(multiple, int(value) // multiple * multiple)
        raise ValueError(
            f"`{name}={value}` must be a positive multiple of {multiple}; nearest: {below} and {below + multiple}."
        )


def check_num_frames(num_frames: int, step: int) -> None:
    """Frames: 1, then `step` for every further latent."""
    if not isinstance(num_frames, int) or num_frames < 1 or (num_frames - 1) % step:
        below = max(1, (int(num_frames) - 1) // step * step + 1)
        raise ValueError(f"`num_frames={num_frames}` must be {step}k + 1; nearest: {below} and {below + step}.")


def check_at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"`{name}={value}` must be at least 1.")


def check_generators(generator: torch.Generator | list[torch.Generator] | None, count: int, things: str) -> None:
    if isinstance(generator, list) and len(generator) != count:
        raise ValueError(
            f"`generator` is a list of {len(generator)} for {count} {things}; give one generator or {count}."
        )


def check_steps(num_inference_steps: int | None, preset: SchedulerPreset | TimestepPreset | None) -> None:
    """At least one, and as many as the preset can make."""
    check_at_least_one("num_inference_steps", num_inference_steps)
    if isinstance(preset, SchedulerPreset):
        preset.steps(num_inference_steps)


def warn_untrained(
    facts: ModelFacts,
    height: int,
    width: int,
    num_frames: int,
    preset: SchedulerPreset | TimestepPreset | None,
    scheduler: SchedulerMixin,
    presets: SchedulerPresets,
) -> None:
    """Warns of a size, a length, or a flow shift for the size that the model was not trained with. Each once in a process.

    Args:
        facts ([`ModelFacts`]): of the model.
        height, width, num_frames (`int`): of the video.
        preset (*optional*): of the call; `None` where the pipeline's own scheduler is used.
        scheduler (`SchedulerMixin`): of the pipeline.
        presets ([`SchedulerPresets`]): of the pipeline, to name a better one.
    """
    size = facts.size(height, width)
    if size is None:
        trained = ", ".join(f"{size.height} x {size.width}" for size in facts.sizes)
        _warn_once(
            f"{facts.name} was trained at {trained} (`height` x `width`); expect less of `height={height}`, `width={width}`."
        )
    if num_frames not in facts.frame_counts:
        trained = " or ".join(map(str, facts.frame_counts))
        _warn_once(
            f"{facts.name} was trained on videos of {trained} frames; expect less of `num_frames={num_frames}`."
        )
    if size is None or size.flow_shift is None or getattr(preset, "weights", ""):
        return  # Distilled weights have a shift of their own.
    config = scheduler.config
    used = config.get("flow_shift", config.get("shift")) if preset is None else preset.flow_shift
    if used in (None, size.flow_shift):
        return
    user = "scheduler" if preset is None else f"preset {preset.name!r}"
    better = [
        f"`preset={name!r}`"
        for name, other in presets.items()
        if other.flow_shift == size.flow_shift and not other.weights
    ]
    fix = f"use {' or '.join(better)}" if better else "the pipeline has no preset for it"
    _warn_once(
        f"The {user} has flow shift {used}, but at {height} x {width} {facts.name}'s is {size.flow_shift}: {fix}."
    )


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def pair_anchors(anchors, num_prompts: int, num_videos_per_prompt: int) -> list[list[Anchor]]:
    """One list of anchors for each video, from an anchor or a list for all, or lists per prompt or per video."""
    anchors = [anchors] if isinstance(anchors, Anchor) else list(anchors)
    for item in anchors:
        members = item if isinstance(item, (list, tuple)) else [item]
        wrong = [type(member).__name__ for member in members if not isinstance(member, Anchor)]
        if wrong:
            raise ValueError(
                f"`anchors` must hold `Anchor`s or lists of them, but holds {wrong[0]}; use `Anchor(image)`."
            )
    num_videos = num_prompts * num_videos_per_prompt
    if all(isinstance(item, Anchor) for item in anchors):
        return [anchors] * num_videos
    if len(anchors) == num_videos:
        return [list(item) for item in anchors]
    if len(anchors) == num_prompts:
        return [list(item) for item in anchors for _ in range(num_videos_per_prompt)]
    raise ValueError(
        f"`anchors` has {len(anchors)} lists for {num_prompts} prompts and {num_videos} videos; give one list for all, one "
        "per prompt or one per video."
    )
