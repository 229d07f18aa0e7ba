"""The sign convention of flow-matching models.

Sigma is the noise level: 1 is noise, 0 is data, and with the rectified flow of Wan (arXiv 2503.20314, section 4.2.2)

    noisy = (1 - sigma) * clean + sigma * noise
    model output = noise - clean                      (the velocity)
    Euler: noisy(sigma_next) = noisy(sigma) + (sigma_next - sigma) * velocity

The model's timestep is `sigma * num_train_timesteps`. Training and sampling both import this module, and no other code repeats the
formulas.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from diffusers import SchedulerMixin


def add_noise(clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Returns `(1 - sigma) * clean + sigma * noise`; `sigma` in [0, 1] broadcasts against the latents."""
    return (1 - sigma) * clean + sigma * noise


def velocity(clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Returns the training target of the model: `noise - clean`."""
    return noise - clean


def shifted_sigmas(num_inference_steps: int, flow_shift: float) -> tuple[float, ...]:
    """Returns the sigmas of the steps, descending from 1, without the final 0.

    They are `shift * u / (1 + (shift - 1) * u)` for `num_inference_steps` evenly spaced values u in (0, 1] (timestep shifting of
    Stable Diffusion 3, arXiv 2403.03206, equation 23).

    Args:
        num_inference_steps (`int`): number of steps, at least 1.
        flow_shift (`float`): shift; 1 keeps the spacing even, larger values spend more steps at high noise.

    Raises:
        `ValueError`: `num_inference_steps` is below 1.
    """
    if num_inference_steps < 1:
        raise ValueError(f"`num_inference_steps` must be at least 1, but is {num_inference_steps}.")
    even = [1 - step / num_inference_steps for step in range(num_inference_steps)]
    return tuple(round(flow_shift * u / (1 + (flow_shift - 1) * u), 6) for u in even)


def noise_levels(scheduler: SchedulerMixin) -> list[float]:
    """Returns the noise levels of a scheduler's steps and the final one; LCM has no sigmas, and they follow from its timesteps."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        sigmas = [*(scheduler.timesteps / scheduler.config.num_train_timesteps), 0.0]
    return [float(sigma) for sigma in sigmas]
