"""CogVideoX's noise in the terms of [`schedules.flow`], and its sampling presets.

Sigma is the noise level: 1 is noise, 0 is data. CogVideoX mixes data and noise with constant variance instead of linearly, and
predicts the velocity along this arc (arXiv 2202.00512, section 4), in the same direction as the velocity of flow matching:

    noisy = alpha * clean + sigma * noise          alpha = sqrt(1 - sigma^2) = sqrt(alphas_cumprod)
    model output = alpha * noise - sigma * clean   (the velocity)
    clean = alpha * noisy - sigma * velocity

The model's timestep is an index, 0 to 999, into a table of noise levels (scaled-linear betas, rescaled so that the last level is
exactly 1: zero terminal SNR, arXiv 2305.08891). Levels are float64, because float32 is too coarse near 1 to compute alpha.
"""

from __future__ import annotations

import torch

from .presets import SchedulerPresets, timestep_preset


def training_sigmas(scheduler) -> torch.Tensor:
    """Returns the noise level of every training timestep, `sqrt(1 - alphas_cumprod)`: `(T,)`, float64, ascending.

    Args:
        scheduler (`CogVideoXDDIMScheduler` or `CogVideoXDPMScheduler`): scheduler of the model's repository.
    """
    return (1 - scheduler.alphas_cumprod.double()).sqrt()


def signal(sigma: torch.Tensor) -> torch.Tensor:
    """Returns `alpha = sqrt(1 - sigma^2)`, the share of the clean video in the noisy one."""
    return ((1 - sigma) * (1 + sigma)).sqrt()


def _alpha_sigma(sigma: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return signal(sigma).to(like), sigma.to(like)


def add_noise(clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Returns `alpha * clean + sigma * noise`; `sigma` in [0, 1] broadcasts against the latents."""
    alpha, sigma = _alpha_sigma(sigma, clean)
    return alpha * clean + sigma * noise


def velocity(clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Returns the training target of the model: `alpha * noise - sigma * clean`."""
    alpha, sigma = _alpha_sigma(sigma, clean)
    return alpha * noise - sigma * clean


def clean_estimate(noisy: torch.Tensor, predicted_velocity: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Returns the clean latents that follow from a predicted velocity: `alpha * noisy - sigma * velocity`."""
    alpha, sigma = _alpha_sigma(sigma, noisy)
    return alpha * noisy - sigma * predicted_velocity


def min_snr_weight(sigma: torch.Tensor, gamma: float = 5.0) -> torch.Tensor:
    """Returns the Min-SNR weight of the squared velocity error: `min(SNR, gamma) / (SNR + 1)` with `SNR = (alpha / sigma)^2`.

    See arXiv 2303.09556, section 3.4, which uses gamma 5. CogVideoX itself was trained with weight 1: its trainer weights the
    squared error of the clean estimate, which is `sigma^2` times that of the velocity, by `1 / (1 - alphas_cumprod) = 1 / sigma^2`.

    Args:
        sigma (`torch.Tensor`, any shape): noise levels in (0, 1].
        gamma (`float`, *optional*): limit of the SNR, above 0.

    Returns:
        `torch.Tensor` of the same shape, in [0, 1); 0 at pure noise.
    """
    ratio = (1 - sigma) * (1 + sigma) / sigma.square()
    return ratio.clamp(max=gamma) / (ratio + 1)


def uniform_sigmas(quantiles: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Returns noise levels of uniformly distributed training timesteps, as in CogVideoX's training.

    Args:
        quantiles (`torch.Tensor`, any shape): values in [0, 1]; uniform values give uniform timesteps.
        sigmas (`torch.Tensor` of shape `(T,)`): from [`training_sigmas`].

    Returns:
        `torch.Tensor` of the same shape as `quantiles`, entries of `sigmas`.
    """
    return sigmas[(quantiles * len(sigmas)).long().clamp(max=len(sigmas) - 1)]


def times_of(sigma: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Returns the model's timesteps for noise levels, by linear interpolation between the entries of the table.

    A level below the first entry, such as an anchor's 0, gets the lowest timestep, 0: the model was trained on nothing cleaner.

    Args:
        sigma (`torch.Tensor`, any shape): noise levels in [0, 1].
        sigmas (`torch.Tensor` of shape `(T,)`): from [`training_sigmas`], on the same device.

    Returns:
        `torch.Tensor` of the same shape, float64, in [0, T - 1].
    """
    sigma = sigma.to(sigmas).contiguous()
    above = torch.searchsorted(sigmas, sigma).clamp(1, len(sigmas) - 1)
    low, high = sigmas[above - 1], sigmas[above]
    return (above - 1 + (sigma - low) / (high - low)).clamp(min=0)


# THUDM/CogVideoX1.5-5B, scheduler/scheduler_config.json.
COGVIDEOX_1_5_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "snr_shift_scale": 1.0,
    "timestep_spacing": "trailing",
}

# The method's first author samples this model with DDIM, 50 steps and guidance 6; 15 steps are the step reduction of Factorized
# Video Generation, arXiv 2512.16371. diffusers' schedulers step by 1000 // 15 = 66, slightly less than the distance of the
# timesteps, so that 15 steps end at timestep 0 (sigma 0.03) and not at sigma 0; 16 or 20 steps end at sigma 0.
COGVIDEOX_PRESETS = SchedulerPresets.of(
    timestep_preset(
        "anchored-15",
        "CogVideoXDDIMScheduler",
        COGVIDEOX_1_5_SCHEDULE,
        15,
        6.0,
        source="arXiv 2512.16371: 15 steps; THUDM/CogVideoX1.5-5B: schedule; first author's code: DDIM, guidance 6",
    ),
    timestep_preset(
        "full-50",
        "CogVideoXDDIMScheduler",
        COGVIDEOX_1_5_SCHEDULE,
        50,
        6.0,
        source="first author's code for arXiv 2512.16371: DDIM, 50 steps, guidance 6; THUDM/CogVideoX1.5-5B: schedule",
    ),
)
