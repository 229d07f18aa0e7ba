"""CogVideoX's noise in the terms of [`schedules.flow`], and its sampling presets.

Sigma is the noise level here too: 1 is noise, 0 is data. CogVideoX preserves variance instead of mixing in a straight line,
and predicts the velocity along that arc (arXiv 2202.00512, section 4), which has the orientation of the straight one:

    noisy = alpha * clean + sigma * noise          alpha = sqrt(1 - sigma^2) = sqrt(alphas_cumprod)
    model output = alpha * noise - sigma * clean   (the velocity)
    clean = alpha * noisy - sigma * velocity

The model's time is an index, 0 to 999, into a table of noise levels (scaled-linear betas, rescaled so that the last level is
exactly 1: zero terminal SNR, arXiv 2305.08891). Levels are float64: near 1 float32 has no digits left for alpha.
"""

from __future__ import annotations

import torch

from .presets import SchedulerPresets, timestep_preset


def training_sigmas(scheduler) -> torch.Tensor:
    """Noise level of every training time, `sqrt(1 - alphas_cumprod)`: `(T,)`, float64, rising.

    Args:
        scheduler (`CogVideoXDDIMScheduler` or `CogVideoXDPMScheduler`): of the model's repository.
    """
    return (1 - scheduler.alphas_cumprod.double()).sqrt()


def signal(sigma: torch.Tensor) -> torch.Tensor:
    """`alpha = sqrt(1 - sigma^2)`, the share of the clean video in the noisy one."""
    return ((1 - sigma) * (1 + sigma)).sqrt()


def _alpha_sigma(sigma: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return signal(sigma).to(like), sigma.to(like)


def add_noise(clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """`alpha * clean + sigma * noise`; `sigma` in [0, 1] broadcasts against the latents."""
    alpha, sigma = _alpha_sigma(sigma, clean)
    return alpha * clean + sigma * noise


def velocity(clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """What the model is trained to predict: `alpha * noise - sigma * clean`."""
    alpha, sigma = _alpha_sigma(sigma, clean)
    return alpha * noise - sigma * clean


def clean_estimate(noisy: torch.Tensor, predicted_velocity: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The clean latents that a predicted velocity stands for: `alpha * noisy - sigma * velocity`."""
    alpha, sigma = _alpha_sigma(sigma, noisy)
    return alpha * noisy - sigma * predicted_velocity


def min_snr_weight(sigma: torch.Tensor, gamma: float = 5.0) -> torch.Tensor:
    """Min-SNR weight of the squared error of the velocity: `min(SNR, gamma) / (SNR + 1)` with `SNR = (alpha / sigma)^2`.

    arXiv 2303.09556, section 3.4, whose gamma is 5. CogVideoX itself is trained with weight 1 here: its trainer weighs the
    error of the clean estimate, which is `sigma` times that of the velocity, by `1 / (1 - alphas_cumprod) = 1 / sigma^2`.

    Args:
        sigma (`torch.Tensor`, any shape): in (0, 1].
        gamma (`float`, *optional*): above 0.

    Returns:
        `torch.Tensor` of the same shape, in [0, 1); 0 at pure noise.
    """
    ratio = (1 - sigma) * (1 + sigma) / sigma.square()
    return ratio.clamp(max=gamma) / (ratio + 1)


def uniform_sigmas(quantiles: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Noise levels of training times that are all equally likely, as CogVideoX is trained.

    Args:
        quantiles (`torch.Tensor`, any shape): in [0, 1]; uniform ones give uniform times.
        sigmas (`torch.Tensor` of shape `(T,)`): from [`training_sigmas`].

    Returns:
        `torch.Tensor` of the same shape as `quantiles`, entries of `sigmas`.
    """
    return sigmas[(quantiles * len(sigmas)).long().clamp(max=len(sigmas) - 1)]


def times_of(sigma: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """The model's times of noise levels: where `sigma` stands in the table, between two entries in proportion.

    A level below the table's first, such as an anchor's 0, has the model's lowest time, 0: nothing cleaner was trained.

    Args:
        sigma (`torch.Tensor`, any shape): in [0, 1].
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

# DDIM, 50 steps and guidance 6 are what the method's first author samples this model with; 15 steps is the step reduction of
# Factorized Video Generation, arXiv 2512.16371. diffusers' schedulers step by 1000 // 15 = 66, a little less than the
# distance of the timesteps, and so end at time 0 (sigma 0.03), not at sigma 0; 16 or 20 steps end at 0.
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
