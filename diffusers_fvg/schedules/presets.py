"""Sampling presets: schedulers and guidance as data."""

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


# Schedulers whose `set_timesteps` takes a number of steps and no sigmas.
TIMESTEP_SCHEDULERS = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
# Between frozen clips of the shapes world (0) and those with the least motion (0.05; synthetic). Not measured: real models.
MIN_MOTION = 0.02


@dataclass(frozen=True)
class SchedulerPreset:
    """Settings of sampling, as data: a scheduler, sigmas and guidance.

    Args:
        name (`str`): name that `preset=` selects.
        scheduler_class (`str`): diffusers scheduler class whose `set_timesteps` takes `sigmas`, or one of
            `TIMESTEP_SCHEDULERS`.
        scheduler_config (`dict`): configuration of the scheduler. It must not apply the shift that `sigmas` already contain.
        sigmas (`tuple[float, ...]` or `None`): noise levels of the steps, descending, in (0, 1], without the final 0. They are
            explicit because schedulers compute them differently (`FlowMatchEulerDiscreteScheduler` applies the shift twice).
            `None` for a scheduler in `TIMESTEP_SCHEDULERS`, whose configuration and number of steps define the timesteps.
        flow_shift (`float` or `None`): shift of `sigmas`, from which the sigmas for another number of steps are computed.
        guidance_scale (`float`): scale of classifier-free guidance, for two experts that of the high-noise expert; 1 is off.
        guidance_interval (`tuple[float, float]`): closed interval of sigmas in which guidance is used (arXiv 2404.07724).
        guidance_scale_2 (`float`, *optional*): scale for the low-noise expert; defaults to `guidance_scale`.
        weights (`str`): distilled weights for which the steps were trained: a Hub repository, or a folder of this repository
            (without a slash) with a LoRA that replaces the anchor LoRA. Empty for the base model's own weights.
        source (`str`): source of the values.
        anchor_window (`int`, *optional*): number of latent frames on each side to which a frame attends besides the anchors, as
            the anchor LoRA was trained; see [`AnchorConditionedTransformer3D.set_anchor_window`]. All frames by default.
        num_inference_steps (`int`, *optional*): default number of steps; with `sigmas`, their number.
        min_motion (`float`, *optional*): share of the picture, in [0, 1], that must change in a video; below it, a warning says
            that the video has no motion. `None` disables the warning. See [`~animate.motion.motion_amounts`].

    Raises:
        `ValueError`: a value is out of range, or values contradict each other.
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
    num_inference_steps: int = None  # type: ignore[assignment]  # `__post_init__` sets or requires it.
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
            raise ValueError(f"Preset {self.name!r}: `sigmas` must descend within (0, 1], but are {self.sigmas}.")
        check_at_least_one("num_inference_steps", self.num_inference_steps)
        if self.num_inference_steps not in (None, len(self.sigmas)):
            raise ValueError(
                f"Preset {self.name!r}: `num_inference_steps={self.num_inference_steps}` must be the number of `sigmas`, "
                f"{len(self.sigmas)}; leave it out."
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
            raise ValueError("`guidance_scale=None` must be a number; 1 disables guidance.")
        if self.flow_shift is not None and self.flow_shift <= 0:
            raise ValueError(f"`flow_shift={self.flow_shift}` must be above 0; 1 means no shift.")
        if self.min_motion is not None and not 0 <= self.min_motion <= 1:
            raise ValueError(f"`min_motion={self.min_motion}` must lie in [0, 1].")
        if len(self.guidance_interval) != 2 or not 0 <= self.guidance_interval[0] <= self.guidance_interval[1] <= 1:
            raise ValueError(
                f"`guidance_interval={self.guidance_interval}` must be two sigmas in [0, 1], the lower first."
            )

    def _check_timesteps(self) -> None:
        if self.scheduler_class not in TIMESTEP_SCHEDULERS:
            raise ValueError(
                f"Preset {self.name!r}: `scheduler_class={self.scheduler_class!r}` needs `sigmas`; give them, or use one of "
                f"{TIMESTEP_SCHEDULERS}."
            )
        if self.num_inference_steps is None:
            raise ValueError(f"Preset {self.name!r} needs `sigmas` or `num_inference_steps`.")
        check_at_least_one("num_inference_steps", self.num_inference_steps, MAX_STEPS)
        others = self.flow_shift, self.guidance_scale_2, self.anchor_window
        if others != (None, None, None) or self.guidance_interval != (0.0, 1.0):
            raise ValueError(
                f"Preset {self.name!r}: `flow_shift`, `guidance_interval`, `guidance_scale_2` and `anchor_window` need `sigmas`; "
                "leave them out."
            )

    def make_scheduler(self, num_inference_steps: int | None = None, device: torch.device | str | None = None):
        """Returns a new scheduler of the preset's class and configuration with its timesteps set.

        Args:
            num_inference_steps (`int`, *optional*): number of steps instead of the preset's.
            device (`torch.device`, *optional*): device of the timesteps.

        Raises:
            `ValueError`: the class is not a scheduler of diffusers, or does not accept the configuration or the steps.
        """
        diffusers = importlib.import_module("diffusers")
        scheduler_class = getattr(diffusers, self.scheduler_class, None)
        if not isinstance(scheduler_class, type) or not issubclass(scheduler_class, diffusers.SchedulerMixin):
            raise ValueError(
                f"Preset {self.name!r}: `scheduler_class={self.scheduler_class!r}` must be a scheduler class of diffusers."
            )
        steps = None if self.sigmas is None else self.steps(num_inference_steps)
        try:
            scheduler = scheduler_class(**self.scheduler_config)
            if steps is None:
                scheduler.set_timesteps(num_inference_steps or self.num_inference_steps, device=device)
            else:
                # UniPC multiplies the sigmas, which needs an array.
                scheduler.set_timesteps(num_inference_steps=len(steps), sigmas=np.array(steps), device=device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"Preset {self.name!r}: {self.scheduler_class} does not accept its configuration or steps: {str(error)[:200]}"
            ) from error
        return scheduler

    def steps(self, num_inference_steps: int | None) -> tuple[float, ...]:
        """Returns the preset's sigmas, or sigmas for another number of steps with the same `flow_shift`.

        Raises:
            `ValueError`: the preset's sigmas do not follow from a shift, as those of distilled weights, and another number of steps
                is requested.
        """
        assert self.sigmas is not None
        if num_inference_steps is None or num_inference_steps == self.num_inference_steps:
            return self.sigmas
        shift = self.flow_shift
        if shift is None or self.sigmas != shifted_sigmas(self.num_inference_steps, shift):
            raise ValueError(
                f"`num_inference_steps={num_inference_steps}`, but preset {self.name!r} has {self.num_inference_steps} fixed steps, "
                "which do not follow from a shift; leave `num_inference_steps` out."
            )
        return shifted_sigmas(num_inference_steps, shift)

    def is_scheduler(self, scheduler) -> bool:
        """Returns whether a scheduler has the preset's class and configuration."""
        config = scheduler.config
        return type(scheduler).__name__ == self.scheduler_class and all(
            config.get(key) == value for key, value in self.scheduler_config.items()
        )


def check_steps(num_inference_steps: int | None, preset: SchedulerPreset | None) -> None:
    """Raises `ValueError` unless the number of steps is at least 1 and the preset supports it."""
    check_at_least_one("num_inference_steps", num_inference_steps, MAX_STEPS)
    if preset is not None and preset.sigmas is not None:
        preset.steps(num_inference_steps)


# At 15 steps, UniPC of order 2 keeps detail that Euler loses. flow_shift is 1 because the explicit sigmas contain the shift.
UNIPC_CONFIG = {
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 1.0,
    "solver_order": 2,
    "final_sigmas_type": "zero",
}


def unipc_preset(name: str, num_inference_steps: int, flow_shift: float, guidance_scale: float, source: str, **more):
    """Returns a preset with `UniPCMultistepScheduler`, the solver of Wan's authors, and explicit shifted sigmas."""
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
    """Returns a preset with one of `TIMESTEP_SCHEDULERS`."""
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
    """Presets of a repository, stored in `schedulers/<preset>/scheduler_config.json`; the first one is the default.

    Each file is a configuration of the scheduler's class, which stock diffusers can also read. The key `_preset` holds the
    other values of the preset.
    """

    presets: dict[str, SchedulerPreset] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = not isinstance(self.presets, dict) or [
            name
            for name, preset in self.presets.items()
            if not isinstance(preset, SchedulerPreset) or preset.name != name
        ]
        if wrong:
            raise ValueError(f"`presets` must map names to `SchedulerPreset`s, but is {self.presets!r:.120}.")

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
        """Returns the first preset that matches `scheduler`, or `None` for any other scheduler.

        A preset of distilled weights matches only if it is the default, because it is valid only for these weights.
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
                raise ValueError(f"{path} is not the configuration of a preset, or is damaged ({problem}).") from error
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
        raise ValueError(f"{path} names its preset {values['name']!r}; rename the folder or the preset.")
    values = {"sigmas": None, "flow_shift": None, **values}
    return order, SchedulerPreset(scheduler_class=scheduler_class, scheduler_config=config, **values)


# Defaults of a pipeline without presets, with shift and guidance of Wan2.2-TI2V-5B (Wan-Video/Wan2.2,
# wan/configs/wan_ti2v_5B.py). 15 steps instead of 50 are the step reduction of Factorized Video Generation, arXiv 2512.16371.
WAN_PRESETS = SchedulerPresets.of(
    unipc_preset(
        "anchored-15", 15, 5.0, 5.0, source="arXiv 2512.16371: 15 steps; shift and guidance of Wan2.2-TI2V-5B"
    ),
    unipc_preset("full-50", 50, 5.0, 5.0, source="Wan-Video/Wan2.2, wan/configs/wan_ti2v_5B.py"),
)
