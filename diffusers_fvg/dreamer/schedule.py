"""Factorized-Dreamer's noise schedule: Stable Diffusion's, shifted by s = 0.125 and rescaled to end in pure noise.

The shift lowers the log signal-to-noise ratio (SNR) of every time by the same amount. The paper's "shifting factor s" can be
read in two ways:

* `power=2`, the default: `log SNR + 2 log s`. "simple diffusion" (arXiv 2301.11093, section 2.1) shifts by `2 log(64 / d)`, and
  64 / 512 is 0.125 at the paper's 512 pixels. Scaling the input by s (arXiv 2301.10972) scales the SNR by s^2 as well.
* `power=1`: `log SNR + log s`, where s scales the SNR itself. More times have more signal than noise: 105 of 1000 against 17 of
  the default. Try it when a trained model lacks detail.

Then the last time is rescaled to zero SNR (arXiv 2305.08891, algorithm 1): the paper says "lower SNR at terminal timesteps",
and related models (Emu Video, FancyVideo, DynamiCrafter) all use zero. Predicting the noise is trivial at pure noise, so the
model predicts the velocity (arXiv 2202.00512).

diffusers' CogVideoX schedulers do exactly this, in this order: they divide the SNR by `snr_shift_scale`, here `s^-power`. Noise
levels, noising and the velocity are those of [`schedules.cogvideox`]. At the cleanest time the noise level is still 0.23 with
the default; the last step goes from there to zero (`set_alpha_to_one`).
"""

from __future__ import annotations

from typing import Any

from ..schedules.presets import SchedulerPresets, timestep_preset


SHIFT = 0.125


def dreamer_schedule(shift: float = SHIFT, power: int = 2, zero_terminal_snr: bool = True) -> dict[str, Any]:
    """Returns the config of a `CogVideoXDDIMScheduler`.

    Args:
        shift (`float`): the factor s, above 0; 1 is Stable Diffusion's own schedule.
        power (`int`): 2 for `log SNR + 2 log s`, 1 for `log SNR + log s`.
        zero_terminal_snr (`bool`): whether to rescale the schedule, so that the last time is pure noise.

    Raises:
        `ValueError`: `shift` is not above 0, or `power` is neither 1 nor 2.
    """
    if shift <= 0:
        raise ValueError(f"`shift={shift}` must be above 0; 1 leaves the schedule as it is.")
    if power not in (1, 2):
        raise ValueError(f"`power={power}` must be 1 or 2.")
    return {
        # runwayml/stable-diffusion-v1-5 and stabilityai/stable-diffusion-2-1, scheduler/scheduler_config.json.
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": zero_terminal_snr,
        "set_alpha_to_one": True,
        "snr_shift_scale": shift**-power,
        "timestep_spacing": "trailing",
    }


# The paper names no sampler. ConsistI2V, DynamiCrafter and FancyVideo use DDIM, 50 steps and guidance 7.5.
DREAMER_PRESETS = SchedulerPresets.of(
    timestep_preset(
        "full-50",
        "CogVideoXDDIMScheduler",
        dreamer_schedule(),
        50,
        7.5,
        source="arXiv 2408.10119: s = 0.125; DDIM, 50 steps, guidance 7.5: arXiv 2402.04324, 2310.12190, 2408.08189",
    )
)
