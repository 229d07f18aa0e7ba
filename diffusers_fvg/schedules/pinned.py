"""Schedulers that step as a preset says, whatever a stock pipeline asks of them."""

from __future__ import annotations

from typing import Any

from diffusers import SchedulerMixin

from .presets import SchedulerPreset


def pinned_scheduler(preset: SchedulerPreset, num_inference_steps: int | None = None) -> SchedulerMixin:
    """A scheduler of a preset whose `set_timesteps` sets the preset's steps.

    Stock pipelines set the steps of their scheduler themselves: by a number alone, so that explicit sigmas cannot be told, or
    by sigmas of their own. A subclass and not a changed object, as some pipelines copy their scheduler.

    Args:
        preset (`SchedulerPreset`): with explicit sigmas or not.
        num_inference_steps (`int`, *optional*): in place of the preset's.
    """
    made = preset.make_scheduler(num_inference_steps)

    kind: Any = type(made)

    class Pinned(kind):
        def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, timesteps=None, mu=None, **others):
            fresh = preset.make_scheduler(pinned_steps, device)
            # What a run begins with, on the device of the run.
            self.__dict__.update(fresh.__dict__)

    pinned_steps = num_inference_steps
    Pinned.__name__, Pinned.__qualname__, Pinned.__module__ = (
        type(made).__name__,
        type(made).__qualname__,
        type(made).__module__,
    )
    made.__class__ = Pinned
    return made
