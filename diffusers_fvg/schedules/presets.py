"""Sampling presets: data that says how to sample."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch

from ..checks import MAX_STEPS, check_at_least_one, check_guidance, check_name, check_number
from ..loading.reading import read_json
from .flow import shifted_sigmas


# Schedulers that take a number of steps and no sigmas of one's own.
TIMESTEP_SCHEDULERS = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
# Between frozen clips of the shapes world, 0, and the least moving ones, 0.05 (synthetic). Of real models not yet measured.
MIN_MOTION = 0.02


@dataclass(frozen=True)
class SchedulerPreset:
    """How to sample: a scheduler and what goes with it. All of it is data.

    Args:
        name (`str`): what `preset=` selects.
        scheduler_class (`str`): a diffusers scheduler class whose `set_timesteps` takes `sigmas`, or one of
            `TIMESTEP_SCHEDULERS`.
        scheduler_config (`dict`): its config. It must not shift again what `sigmas` already holds.
        sigmas (`tuple[float, ...]` or `None`): noise levels of the steps, decreasing, in (0, 1]; the final 0 is left out. They are
            explicit because schedulers do not agree on their own (`FlowMatchEulerDiscreteScheduler` shifts twice).
            `None` for a scheduler of `TIMESTEP_SCHEDULERS`, whose config and number of steps say every timestep.
        flow_shift (`float` or `None`): the shift behind `sigmas`, from which another number of steps is derived.
        guidance_scale (`float`): classifier-free guidance, 1 is off; of the high-noise expert, where there are two.
        guidance_interval (`tuple[float, float]`): guidance runs at sigmas in this closed interval and is off elsewhere
            (arXiv 2404.07724).
        guidance_scale_2 (`float`, *optional*): of the low-noise expert; the same as the other's when left out.
        weights (`str`): distilled weights that the steps were trained with, on the Hub or, without a slash, a folder of the
            repository with a LoRA in place of the anchor's; empty for the base model's own.
        source (`str`): where the values come from.
        anchor_window (`int`, *optional*): while the preset samples, frames attend to the anchors and to those so many latent
            frames away alone, as the anchor LoRA was trained; see [`AnchorConditionedTransformer3D.set_anchor_window`].
        num_inference_steps (`int`, *optional*): steps unless the call says otherwise; with `sigmas` their number.
        min_motion (`float`, *optional*): in [0, 1], the share of the picture that changes in a video, below which it is said to
            stand still; `None` says nothing. See [`~animate.motion.motion_amounts`].

    Raises:
        `ValueError`: values that are out of range or do not belong together.
    """

    name: str
    scheduler_class: str
    scheduler_config: dict
    sigmas: tuple[float, ...] | None
    flow_shift: float | None
    guidance_scale: float
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_scale_2: float | None = None
    weights: str = ""
    source: str = ""
    anchor_window: int | None = None
    num_inference_steps: int = None  # type: ignore[assignment]  # `__post_init__` sets or asks for it.
    min_motion: float | None = MIN_MOTION

    def __post_init__(self) -> None:
        self._check_kinds()
        check_name(self.name, "A preset")
        try:
            self._check_numbers()
        except ValueError as error:
            raise ValueError(f"Preset {self.name!r}: {error}") from error
        window = self.anchor_window
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 0):
            raise ValueError(f"Preset {self.name!r}: `anchor_window={window!r}` must be a whole number from 0 on.")
        if self.sigmas is None:
            self._check_timesteps()
            return
        falling = all(a > b for a, b in zip(self.sigmas, self.sigmas[1:]))
        if not self.sigmas or not falling or self.sigmas[0] > 1 or self.sigmas[-1] <= 0:
            raise ValueError(f"Preset {self.name!r}: `sigmas` must fall within (0, 1], but are {self.sigmas}.")
        check_at_least_one("num_inference_steps", self.num_inference_steps)
        if self.num_inference_steps not in (None, len(self.sigmas)):
            raise ValueError(
                f"Preset {self.name!r}: `num_inference_steps={self.num_inference_steps}` for {len(self.sigmas)} sigmas."
            )
        object.__setattr__(self, "num_inference_steps", len(self.sigmas))

    def _check_kinds(self) -> None:
        kinds: dict[str, Any] = {
            "name": str,
            "scheduler_class": str,
            "scheduler_config": dict,
            "weights": str,
            "source": str,
        }
        kinds |= {"guidance_interval": (list, tuple), "sigmas": (list, tuple, NoneType)}
        for name, kind in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                wanted = kind.__name__ if isinstance(kind, type) else "list of numbers"
                raise ValueError(f"Preset {self.name!r:.60}: `{name}={value!r:.60}` must be a {wanted}.")
        for name in ("guidance_interval", "sigmas"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))

    def _check_numbers(self) -> None:
        numbers = {"flow_shift": self.flow_shift, "min_motion": self.min_motion}
        for name in ("guidance_interval", "sigmas"):
            numbers |= {f"{name}[{place}]": value for place, value in enumerate(getattr(self, name) or ())}
        for name, value in numbers.items():
            if value is None and "[" in name:
                raise ValueError(f"`{name}=None` must be a finite number.")
            check_number(name, value)
        check_guidance("guidance_scale", self.guidance_scale)
        check_guidance("guidance_scale_2", self.guidance_scale_2)
        if self.guidance_scale is None:
            raise ValueError("`guidance_scale=None` must be a number; 1 is no guidance.")
        if self.flow_shift is not None and self.flow_shift <= 0:
            raise ValueError(f"`flow_shift={self.flow_shift}` must be above 0; 1 is no shift.")
        if self.min_motion is not None and not 0 <= self.min_motion <= 1:
            raise ValueError(f"`min_motion={self.min_motion}` must lie in [0, 1].")
        if len(self.guidance_interval) != 2 or not 0 <= self.guidance_interval[0] <= self.guidance_interval[1] <= 1:
            raise ValueError(
                f"`guidance_interval={self.guidance_interval}` must be two sigmas in [0, 1], the lower first."
            )

    def _check_timesteps(self) -> None:
        if self.scheduler_class not in TIMESTEP_SCHEDULERS:
            raise ValueError(
                f"Preset {self.name!r}: `scheduler_class={self.scheduler_class!r}`; use {TIMESTEP_SCHEDULERS}, or give "
                "`sigmas`."
            )
        if self.num_inference_steps is None:
            raise ValueError(f"Preset {self.name!r} needs `sigmas` or `num_inference_steps`.")
        check_at_least_one("num_inference_steps", self.num_inference_steps, MAX_STEPS)
        others = self.flow_shift, self.guidance_scale_2, self.anchor_window
        if others != (None, None, None) or self.guidance_interval != (0.0, 1.0):
            raise ValueError(
                f"Preset {self.name!r}: shift, guidance interval, second guidance and window belong to `sigmas`; leave them out."
            )

    def make_scheduler(self, num_inference_steps: int | None = None, device: torch.device | str | None = None):
        """A fresh scheduler of the preset's class and config, its timesteps set."""
        diffusers = importlib.import_module("diffusers")
        scheduler_class = getattr(diffusers, self.scheduler_class, None)
        if not isinstance(scheduler_class, type) or not issubclass(scheduler_class, diffusers.SchedulerMixin):
            raise ValueError(f"Preset {self.name!r}: {self.scheduler_class!r} is no scheduler class of diffusers.")
        steps = None if self.sigmas is None else self.steps(num_inference_steps)
        try:
            scheduler = scheduler_class(**self.scheduler_config)
            if steps is None:
                scheduler.set_timesteps(num_inference_steps or self.num_inference_steps, device=device)
            else:
                # An array: UniPC multiplies what it is given.
                scheduler.set_timesteps(num_inference_steps=len(steps), sigmas=np.array(steps), device=device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"Preset {self.name!r}: a {self.scheduler_class} cannot be made and set by it: {str(error)[:200]}"
            ) from error
        return scheduler

    def steps(self, num_inference_steps: int | None) -> tuple[float, ...]:
        """The preset's sigmas, or as many as asked for from the same `flow_shift`.

        Raises:
            `ValueError`: another number of steps than a distilled model knows, whose sigmas are not those of a shift.
        """
        assert self.sigmas is not None
        if num_inference_steps is None or num_inference_steps == self.num_inference_steps:
            return self.sigmas
        shift = self.flow_shift
        if shift is None or self.sigmas != shifted_sigmas(self.num_inference_steps, shift):
            raise ValueError(
                f"`num_inference_steps={num_inference_steps}`, but preset {self.name!r} has {self.num_inference_steps} steps of "
                "its own, which no shift gives; leave `num_inference_steps` out."
            )
        return shifted_sigmas(num_inference_steps, shift)

    def is_scheduler(self, scheduler) -> bool:
        """Whether a scheduler is of the preset's class and agrees with its config."""
        config = scheduler.config
        return type(scheduler).__name__ == self.scheduler_class and all(
            config.get(key) == value for key, value in self.scheduler_config.items()
        )


def check_steps(num_inference_steps: int | None, preset: SchedulerPreset | None) -> None:
    """At least one, and as many as the preset can make."""
    check_at_least_one("num_inference_steps", num_inference_steps, MAX_STEPS)
    if preset is not None and preset.sigmas is not None:
        preset.steps(num_inference_steps)


# UniPC keeps second order at 15 steps where Euler loses detail. flow_shift=1 here: the shift is in the explicit sigmas.
UNIPC_CONFIG = {
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 1.0,
    "solver_order": 2,
    "final_sigmas_type": "zero",
}


def unipc_preset(name: str, num_inference_steps: int, flow_shift: float, guidance_scale: float, source: str, **more):
    """A preset on `UniPCMultistepScheduler`, Wan's own solver, with shifted sigmas written out."""
    sigmas = shifted_sigmas(num_inference_steps, flow_shift)
    return SchedulerPreset(
        name, "UniPCMultistepScheduler", dict(UNIPC_CONFIG), sigmas, flow_shift, guidance_scale, source=source, **more
    )


def timestep_preset(
    name: str,
    scheduler_class: str,
    scheduler_config: dict,
    num_inference_steps: int,
    guidance_scale: float,
    source: str = "",
) -> SchedulerPreset:
    """A preset on one of `TIMESTEP_SCHEDULERS`."""
    return SchedulerPreset(
        name,
        scheduler_class,
        scheduler_config,
        None,
        None,
        guidance_scale,
        source=source,
        num_inference_steps=num_inference_steps,
    )


@dataclass
class SchedulerPresets(Mapping):
    """The presets of a repository, `schedulers/<preset>/scheduler_config.json`, the first one being the default.

    Each file is a config of the scheduler's class (so that stock diffusers reads it too) with the preset's own values
    under the key `_preset`.
    """

    presets: dict[str, SchedulerPreset] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = not isinstance(self.presets, dict) or [
            name
            for name, preset in self.presets.items()
            if not isinstance(preset, SchedulerPreset) or preset.name != name
        ]
        if wrong:
            raise ValueError(f"`presets` must hold `SchedulerPreset`s by their names, but is {self.presets!r:.120}.")

    @classmethod
    def of(cls, *presets: SchedulerPreset) -> SchedulerPresets:
        return cls({getattr(preset, "name", ""): preset for preset in presets})

    def __getitem__(self, name: str) -> SchedulerPreset:
        if not isinstance(name, str) or name not in self.presets:
            raise ValueError(f"Unknown preset {name!r}; this pipeline has {', '.join(self.presets)}.")
        return self.presets[name]

    def __contains__(self, name: object) -> bool:
        return name in self.presets

    def __iter__(self) -> Iterator[str]:
        return iter(self.presets)

    def __len__(self) -> int:
        return len(self.presets)

    def matching(self, scheduler) -> SchedulerPreset | None:
        """The first preset that `scheduler` belongs to, or `None` for a scheduler of the user's own.

        A preset of distilled weights is for those alone: it is found only where it is the default.
        """
        for order, preset in enumerate(self.presets.values()):
            if preset.is_scheduler(scheduler) and (order == 0 or not getattr(preset, "weights", "")):
                return preset
        return None

    def save_pretrained(self, save_directory: str | Path) -> None:
        for order, preset in enumerate(self.presets.values()):
            values = {name: value for name, value in asdict(preset).items() if value is not None}
            if preset.sigmas is not None:
                del values["num_inference_steps"]
            config = {"_class_name": values.pop("scheduler_class"), **values.pop("scheduler_config")}
            folder = Path(save_directory) / preset.name
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(config | {"_preset": {"order": order, **values}}, indent=2)
            (folder / "scheduler_config.json").write_text(text + "\n")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path) -> SchedulerPresets:
        found = []
        for path in Path(pretrained_model_name_or_path).glob("*/scheduler_config.json"):
            try:
                found.append(_read_preset(path))
            except (KeyError, TypeError, AttributeError) as error:
                problem = f"{type(error).__name__}: {error}"
                raise ValueError(f"{path} is no preset's configuration, or a damaged one ({problem}).") from error
        if not found:
            raise ValueError(f"No `<preset>/scheduler_config.json` in {pretrained_model_name_or_path}.")
        return cls.of(*(preset for _, preset in sorted(found, key=lambda item: item[0])))


def _read_preset(path: Path) -> tuple[int, SchedulerPreset]:
    config = read_json(path)
    values, scheduler_class = config.pop("_preset"), config.pop("_class_name")
    order = values.pop("order")
    if not isinstance(order, int):
        raise TypeError(f"`order={order!r:.60}` must be a whole number")
    if values["name"] != path.parent.name:
        raise ValueError(f"{path} calls its preset {values['name']!r}; rename the folder or the preset.")
    values = {"sigmas": None, "flow_shift": None, **values}
    return order, SchedulerPreset(scheduler_class=scheduler_class, scheduler_config=config, **values)


# Wan2.2-TI2V-5B's own shift and guidance (Wan-Video/Wan2.2, wan/configs/wan_ti2v_5B.py): the default of a pipeline that
# brings no presets. 15 steps against 50 is the step reduction of Factorized Video Generation, arXiv 2512.16371.
WAN_PRESETS = SchedulerPresets.of(
    unipc_preset(
        "anchored-15", 15, 5.0, 5.0, source="arXiv 2512.16371: 15 steps; shift and guidance of Wan2.2-TI2V-5B"
    ),
    unipc_preset("full-50", 50, 5.0, 5.0, source="Wan-Video/Wan2.2, wan/configs/wan_ti2v_5B.py"),
)
