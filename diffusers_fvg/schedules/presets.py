"""The sign convention, and the sampling presets.

Sigma is the noise level: 1 is noise, 0 is data, and with the rectified flow of Wan (arXiv 2503.20314, section 4.2.2)

    noisy = (1 - sigma) * clean + sigma * noise
    model output = noise - clean                      (the velocity)
    Euler: noisy(sigma_next) = noisy(sigma) + (sigma_next - sigma) * velocity

The model's time is `sigma * num_train_timesteps`. Training and sampling both import from here; nothing re-derives it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..checks import check_at_least_one, check_number
from ..loading.safety import check_name


if TYPE_CHECKING:
    from .cogvideox import TimestepPreset


def add_noise(clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """`(1 - sigma) * clean + sigma * noise`; `sigma` in [0, 1] broadcasts against the latents."""
    return (1 - sigma) * clean + sigma * noise


def velocity(clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """What the model is trained to predict: `noise - clean`."""
    return noise - clean


def shifted_sigmas(num_inference_steps: int, flow_shift: float) -> tuple[float, ...]:
    """Sigmas of the steps, from 1 downwards, the final 0 left out.

    `shift * u / (1 + (shift - 1) * u)` for `num_inference_steps` values u that divide
    [0, 1] evenly and leave out 0 (time shifting of Stable Diffusion 3, arXiv 2403.03206, equation 23).

    Args:
        num_inference_steps (`int`): at least 1.
        flow_shift (`float`): 1 leaves the spacing even, larger values spend more steps at high noise.
    """
    if num_inference_steps < 1:
        raise ValueError(f"`num_inference_steps` must be at least 1, but is {num_inference_steps}.")
    even = [1 - step / num_inference_steps for step in range(num_inference_steps)]
    return tuple(round(flow_shift * u / (1 + (flow_shift - 1) * u), 6) for u in even)


@dataclass(frozen=True)
class SchedulerPreset:
    """How to sample: a scheduler and what goes with it. All of it is data.

    Args:
        name (`str`): what `preset=` selects.
        scheduler_class (`str`): a diffusers scheduler class whose `set_timesteps` takes `sigmas`.
        scheduler_config (`dict`): its config. It must not shift again what `sigmas` already holds.
        sigmas (`tuple[float, ...]`): noise levels of the steps, decreasing, in (0, 1]; the final 0 is left out. They are
            explicit because schedulers do not agree on their own (`FlowMatchEulerDiscreteScheduler` shifts twice).
        flow_shift (`float`): the shift behind `sigmas`, from which another number of steps is derived.
        guidance_scale (`float`): classifier-free guidance, 1 is off; of the high-noise expert, where there are two.
        guidance_interval (`tuple[float, float]`): guidance runs at sigmas in this closed interval and is off elsewhere
            (arXiv 2404.07724).
        guidance_scale_2 (`float`, *optional*): of the low-noise expert; the same as the other's when left out.
        weights (`str`): distilled weights that the steps were trained with, on the Hub or, without a slash, a folder of the
            repository with a LoRA in place of the anchor's; empty for the base model's own.
        source (`str`): where the values come from.
        anchor_window (`int`, *optional*): while the preset samples, frames attend to the anchors and to those so many latent
            frames away alone, as the anchor LoRA was trained; see [`AnchorConditionedTransformer3D.set_anchor_window`].
    """

    name: str
    scheduler_class: str
    scheduler_config: dict
    sigmas: tuple[float, ...]
    flow_shift: float
    guidance_scale: float
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_scale_2: float | None = None
    weights: str = ""
    source: str = ""
    anchor_window: int | None = None

    def __post_init__(self) -> None:
        check_name(self.name, "A preset")
        object.__setattr__(self, "sigmas", tuple(self.sigmas))
        object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))
        falling = all(a > b for a, b in zip(self.sigmas, self.sigmas[1:]))
        if not self.sigmas or not falling or self.sigmas[0] > 1 or self.sigmas[-1] <= 0:
            raise ValueError(f"Preset {self.name!r}: `sigmas` must fall within (0, 1], but are {self.sigmas}.")
        numbers = {"flow_shift": self.flow_shift, "guidance_scale": self.guidance_scale}
        numbers |= {"guidance_scale_2": self.guidance_scale_2}
        numbers |= {f"guidance_interval[{side}]": value for side, value in enumerate(self.guidance_interval)}
        for name, value in numbers.items():
            check_number(name, value)

    @property
    def num_inference_steps(self) -> int:
        return len(self.sigmas)

    def make_scheduler(self, num_inference_steps: int | None = None, device: torch.device | str | None = None):
        """A fresh scheduler of the preset's class and config, its timesteps set from the preset's sigmas."""
        diffusers = importlib.import_module("diffusers")
        scheduler_class = getattr(diffusers, self.scheduler_class, None)
        if not isinstance(scheduler_class, type) or not issubclass(scheduler_class, diffusers.SchedulerMixin):
            raise ValueError(f"Preset {self.name!r}: {self.scheduler_class!r} is no scheduler class of diffusers.")
        scheduler = scheduler_class(**self.scheduler_config)
        # An array: UniPC multiplies what it is given.
        sigmas = np.array(self.steps(num_inference_steps))
        scheduler.set_timesteps(num_inference_steps=len(sigmas), sigmas=sigmas, device=device)
        return scheduler

    def steps(self, num_inference_steps: int | None) -> tuple[float, ...]:
        """The preset's sigmas, or as many as asked for from the same `flow_shift`.

        Raises:
            `ValueError`: another number of steps than a distilled model knows, whose sigmas are not those of a shift.
        """
        if num_inference_steps in (None, self.num_inference_steps):
            return self.sigmas
        if self.sigmas != shifted_sigmas(self.num_inference_steps, self.flow_shift):
            raise ValueError(
                f"`num_inference_steps={num_inference_steps}`, but preset {self.name!r} has {self.num_inference_steps} steps of "
                "its own, which no shift gives; leave `num_inference_steps` out."
            )
        return shifted_sigmas(num_inference_steps, self.flow_shift)

    def is_scheduler(self, scheduler) -> bool:
        """Whether a scheduler is of the preset's class and agrees with its config."""
        config = scheduler.config
        return type(scheduler).__name__ == self.scheduler_class and all(
            config.get(key) == value for key, value in self.scheduler_config.items()
        )


def check_steps(num_inference_steps: int | None, preset: SchedulerPreset | TimestepPreset | None) -> None:
    """At least one, and as many as the preset can make."""
    check_at_least_one("num_inference_steps", num_inference_steps)
    if isinstance(preset, SchedulerPreset):
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


@dataclass
class SchedulerPresets(Mapping):
    """The presets of a repository, `schedulers/<preset>/scheduler_config.json`, the first one being the default.

    Each file is a config of the scheduler's class (so that stock diffusers reads it too) with the preset's own values
    under the key `_preset`.
    """

    presets: dict[str, SchedulerPreset] = field(default_factory=dict)

    @classmethod
    def of(cls, *presets: SchedulerPreset) -> SchedulerPresets:
        return cls({preset.name: preset for preset in presets})

    def __getitem__(self, name: str) -> SchedulerPreset:
        if name not in self.presets:
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
            values = asdict(preset)
            config = {"_class_name": values.pop("scheduler_class"), **values.pop("scheduler_config")}
            folder = Path(save_directory) / preset.name
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(config | {"_preset": {"order": order, **values}}, indent=2)
            (folder / "scheduler_config.json").write_text(text + "\n")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path) -> SchedulerPresets:
        found = []
        for path in Path(pretrained_model_name_or_path).glob("*/scheduler_config.json"):
            config = json.loads(path.read_text())
            values, scheduler_class = config.pop("_preset"), config.pop("_class_name")
            order = values.pop("order")
            if values["name"] != path.parent.name:
                raise ValueError(f"{path} calls its preset {values['name']!r}; rename the folder or the preset.")
            kind = SchedulerPreset
            if "sigmas" not in values:
                from .cogvideox import TimestepPreset as kind
            found.append((order, kind(scheduler_class=scheduler_class, scheduler_config=config, **values)))
        if not found:
            raise ValueError(f"No `<preset>/scheduler_config.json` in {pretrained_model_name_or_path}.")
        return cls.of(*(preset for _, preset in sorted(found, key=lambda item: item[0])))


# Wan2.2-TI2V-5B's own shift and guidance (Wan-Video/Wan2.2, wan/configs/wan_ti2v_5B.py): the default of a pipeline that
# brings no presets. 15 steps against 50 is the step reduction of Factorized Video Generation, arXiv 2512.16371.
WAN_PRESETS = SchedulerPresets.of(
    unipc_preset(
        "anchored-15", 15, 5.0, 5.0, source="arXiv 2512.16371: 15 steps; shift and guidance of Wan2.2-TI2V-5B"
    ),
    unipc_preset("full-50", 50, 5.0, 5.0, source="Wan-Video/Wan2.2, wan/configs/wan_ti2v_5B.py"),
)
