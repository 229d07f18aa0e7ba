"""Which of the known models a pipeline holds, its presets, and warnings of what it was not trained for. Light to import."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

from .model_facts import MODELS, WAN_NEGATIVE_PROMPT, License, ModelFacts, TrainedSize


if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import SchedulerMixin

    from .schedules.presets import SchedulerPreset, SchedulerPresets

__all__ = [
    "MODELS",
    "WAN_NEGATIVE_PROMPT",
    "License",
    "ModelFacts",
    "TrainedSize",
    "find_model",
    "match_model",
    "model_presets",
    "warn_untrained",
]

logger = logging.getLogger(__name__)


def find_model(repository: str) -> ModelFacts | None:
    """Facts of a Hub repository in diffusers' layout; `None` for one that is not in the table."""
    return next((facts for facts in MODELS.values() if facts.repository == repository), None)


def match_model(transformer_config: Mapping[str, Any], boundary_ratio: float | None = None) -> ModelFacts | None:
    """Facts of the model that a pipeline holds; `None` for one that is not in the table.

    Args:
        transformer_config (`Mapping`): of the transformer, loaded or from its `config.json`.
        boundary_ratio (`float`, *optional*): of the pipeline; one of two experts has the layers of one of a single expert.
    """

    def plain(value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    if "inject_sample_info" in transformer_config:
        return None  # SkyReels-V2: other weights in the shapes of Wan's.
    for facts in MODELS.values():
        same = all(plain(transformer_config.get(name)) == value for name, value in facts.transformer_config.items())
        if same and (facts.boundary_ratio is None) == (boundary_ratio is None):
            return facts
    return None


def model_presets(facts: ModelFacts, height: int | None = None, width: int | None = None) -> SchedulerPresets:
    """`anchored-15` and `full-<steps>` at the model's own guidance, then those of distilled weights.

    A flow model whose shift depends on the size has both for each shift: those of the default size bear the plain names, the
    others the size in it, as `anchored-15-480p`.

    Args:
        facts ([`ModelFacts`]): of the model.
        height, width (`int`, *optional*): the size that the first presets are for, which are the default; that of the model
            when left out or not trained.
    """
    if facts.prediction == "v":
        from .schedules.cogvideox import COGVIDEOX_PRESETS

        return COGVIDEOX_PRESETS
    from .schedules.distilled import DISTILLED_PRESETS
    from .schedules.presets import SchedulerPresets, unipc_preset

    # Shift -> name; the first of its sizes names it.
    suffixes: dict[float, str] = {}
    for size in facts.sizes:
        if size.flow_shift is not None:
            suffixes.setdefault(size.flow_shift, f"-{min(size.height, size.width)}p" if suffixes else "")
    asked = facts.size(height, width) or facts.sizes[0]
    steps, presets = facts.num_inference_steps, []
    for shift in sorted(suffixes, key=lambda shift: shift != asked.flow_shift):
        for name, number, source in (
            ("anchored-15", 15, f"arXiv 2512.16371: 15 steps; shift and guidance of {facts.name}"),
            (f"full-{steps}", steps, facts.sources["num_inference_steps"]),
        ):
            presets.append(
                unipc_preset(
                    name + suffixes[shift],
                    number,
                    shift,
                    facts.guidance_scale,
                    source,
                    guidance_scale_2=facts.guidance_scale_2,
                )
            )
    return SchedulerPresets.of(*presets, *DISTILLED_PRESETS.get(facts.name, ()))


def warn_untrained(
    facts: ModelFacts,
    height: int,
    width: int,
    num_frames: int,
    preset: SchedulerPreset | None,
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
    if size is None or size.flow_shift is None or (preset is not None and preset.weights):
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
