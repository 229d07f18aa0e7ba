"""Schedulers that always use the steps of a preset, whatever steps a stock pipeline sets."""

from __future__ import annotations

from typing import Any

from diffusers import SchedulerMixin

from .presets import SchedulerPreset


def pinned_scheduler(preset: SchedulerPreset, num_inference_steps: int | None = None) -> SchedulerMixin:
    """Returns a preset's scheduler whose `set_timesteps` always sets the preset's steps.

    Stock pipelines set the steps of their scheduler themselves, with a number or with their own sigmas, so that explicit sigmas
    cannot be passed to them. The result is a subclass and not a changed object, because some pipelines copy their scheduler.

    Args:
        preset (`SchedulerPreset`): preset with or without explicit sigmas.
        num_inference_steps (`int`, *optional*): number of steps instead of the preset's.
    """
    made = preset.make_scheduler(num_inference_steps)

    kind: Any = type(made)

    class Pinned(kind):
        def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, timesteps=None, mu=None, **others):
            fresh = preset.make_scheduler(pinned_steps, device)
            # Resets the scheduler to the state at the start of a run, on the device of the run.
            self.__dict__.update(fresh.__dict__)

    pinned_steps = num_inference_steps
    Pinned.__name__, Pinned.__qualname__, Pinned.__module__ = (
        type(made).__name__,
        type(made).__qualname__,
        type(made).__module__,
    )
    made.__class__ = Pinned
    return made
