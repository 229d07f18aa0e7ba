"""Recognizes the known video models, and gives their presets and warnings. Does not import torch."""

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
    """Returns the facts of the model in a Hub repository in diffusers' layout; `None` if `MODELS` does not list it."""
    return next((facts for facts in MODELS.values() if facts.repository == repository), None)


def match_model(transformer_config: Mapping[str, Any], boundary_ratio: float | None = None) -> ModelFacts | None:
    """Returns the facts of the model with this transformer config; `None` if `MODELS` does not list it.

    Args:
        transformer_config (`Mapping`): config of the loaded transformer, or its `config.json`.
        boundary_ratio (`float`, *optional*): `boundary_ratio` of the pipeline. Only this distinguishes a model with two
            experts from a model with one transformer of the same config.
    """

    def plain(value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    if "inject_sample_info" in transformer_config:
        return None  # SkyReels-V2 has other weights, in the shapes of Wan's.
    for facts in MODELS.values():
        same = all(plain(transformer_config.get(name)) == value for name, value in facts.transformer_config.items())
        if same and (facts.boundary_ratio is None) == (boundary_ratio is None):
            return facts
    return None


def model_presets(facts: ModelFacts, height: int | None = None, width: int | None = None) -> SchedulerPresets:
    """Returns the presets `anchored-15` and `full-<steps>` at the model's own guidance, then those of distilled weights.

    A flow model whose shift depends on the size has both presets for each shift. Presets of the model's default size have
    the plain names; the others have the size in the name, as in `anchored-15-480p`.

    Args:
        facts ([`ModelFacts`]): facts of the model.
        height, width (`int`, *optional*): size in pixels whose presets come first, which makes them the default. The
            model's default size is used when they are left out or the model was not trained at them.
    """
    if facts.prediction == "v":
        from .schedules.cogvideox import COGVIDEOX_PRESETS

        return COGVIDEOX_PRESETS
    from .schedules.distilled import DISTILLED_PRESETS
    from .schedules.presets import SchedulerPresets, unipc_preset

    # Shift -> suffix of the names, from the first size with that shift.
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
    """Warns of a size, a length or a flow shift that the model was not trained with. Logs each warning once per process.

    Args:
        facts ([`ModelFacts`]): facts of the model.
        height, width, num_frames (`int`): size of the video in pixels, and its frames.
        preset (*optional*): preset of the call; `None` if the pipeline's own scheduler is used.
        scheduler (`SchedulerMixin`): scheduler of the pipeline.
        presets ([`SchedulerPresets`]): presets of the pipeline, from which the warning suggests one.
    """
    size = facts.size(height, width)
    if size is None:
        trained = ", ".join(f"{size.height} x {size.width}" for size in facts.sizes)
        _warn_once(
            f"{facts.name} was trained at {trained} (`height` x `width`); expect lower quality at `height={height}`, `width={width}`."
        )
    if num_frames not in facts.frame_counts:
        trained = " or ".join(map(str, facts.frame_counts))
        _warn_once(
            f"{facts.name} was trained on videos of {trained} frames; expect lower quality at `num_frames={num_frames}`."
        )
    if size is None or size.flow_shift is None or (preset is not None and preset.weights):
        return  # Presets of distilled weights have their own shift.
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
        f"The {user} has flow shift {used}, but {facts.name} has {size.flow_shift} at {height} x {width}: {fix}."
    )


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
