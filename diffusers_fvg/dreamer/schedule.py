"""Factorized-Dreamer's noise schedule: Stable Diffusion's, shifted by s = 0.125 and rescaled to end in pure noise.

The log signal-to-noise ratio of every time is lowered by the same amount. Two readings of "shifting factor s" are at hand:

* `power=2`, the default: `log SNR + 2 log s`. "simple diffusion" (arXiv 2301.11093, section 2.1) shifts by `2 log(64 / d)`, and
  64 / 512 is 0.125 at the paper's 512 pixels; an input scaled by s (arXiv 2301.10972) has its SNR scaled by s^2 as well.
* `power=1`: `log SNR + log s`, that factor taken as one of the SNR itself. It leaves more times below the noise: 105 of 1000
  have more signal than noise, against 17 of the default. The one to turn to when details do not come out.

Then the terminal step is rescaled to zero SNR (arXiv 2305.08891, algorithm 1): the paper says "lower SNR at terminal timesteps",
and its neighbours (Emu Video, FancyVideo, DynamiCrafter) all take zero. Noise prediction says nothing at a time that is all
noise, hence velocity (arXiv 2202.00512).

diffusers' CogVideoX schedulers do exactly this, in this order: they divide the SNR by `snr_shift_scale`, here `s^-power`. Noise
levels, noising and the velocity are those of [`schedules.cogvideox`]. The cleanest time still has noise, 0.23 of it with the
default; the last step goes from there to none (`set_alpha_to_one`).
"""

from __future__ import annotations

from typing import Any

from ..schedules.presets import SchedulerPresets, timestep_preset


SHIFT = 0.125


def dreamer_schedule(shift: float = SHIFT, power: int = 2, zero_terminal_snr: bool = True) -> dict[str, Any]:
    """Config of a `CogVideoXDDIMScheduler`.

    Args:
        shift (`float`): s, above 0; 1 is Stable Diffusion's own schedule.
        power (`int`): 2 for `log SNR + 2 log s`, 1 for `log SNR + log s`.
        zero_terminal_snr (`bool`): rescale, so that the last time is pure noise.

    Raises:
        `ValueError`: a shift that is not above 0, or another power.
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


# The paper names no sampler: DDIM, 50 steps and guidance 7.5 are those of ConsistI2V, DynamiCrafter and FancyVideo.
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
