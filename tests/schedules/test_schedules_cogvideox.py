"""CogVideoX's noise against closed forms and diffusers' own schedulers."""

import math

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

from diffusers_fvg.schedules.cogvideox import (
    COGVIDEOX_1_5_SCHEDULE,
    COGVIDEOX_PRESETS,
    add_noise,
    clean_estimate,
    min_snr_weight,
    signal,
    times_of,
    training_sigmas,
    uniform_sigmas,
    velocity,
)
from diffusers_fvg.schedules.presets import SchedulerPresets, timestep_preset


SCHEDULERS = (CogVideoXDDIMScheduler, CogVideoXDPMScheduler)
SHAPE = (4, 2, 3, 4, 5)


def gaussian(seed, dtype=torch.float64):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def closed_form_sigmas():
    """scaled-linear betas 0.00085 to 0.012; sqrt(abar) moved and scaled so that it ends at 0 and begins where it did."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha = np.sqrt(np.exp(np.log1p(-betas).cumsum()))
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    return torch.from_numpy(np.sqrt(1 - alpha**2))


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_the_table_is_scaled_linear_with_zero_terminal_snr(scheduler_class):
    sigmas = training_sigmas(scheduler_class(**COGVIDEOX_1_5_SCHEDULE))
    torch.testing.assert_close(sigmas, closed_form_sigmas(), rtol=0, atol=1e-12)
    assert sigmas[-1] == 1 and (sigmas.diff() > 0).all()
    assert sigmas[0].item() == pytest.approx(math.sqrt(0.00085))


def test_noise_and_velocity_are_the_schedulers():
    scheduler = CogVideoXDDIMScheduler(**COGVIDEOX_1_5_SCHEDULE)
    clean, noise, times = gaussian(0), gaussian(1), torch.tensor([0, 400, 998, 999])
    sigma = training_sigmas(scheduler)[times].view(-1, 1, 1, 1, 1)
    noisy, target = add_noise(clean, noise, sigma), velocity(clean, noise, sigma)
    torch.testing.assert_close(noisy, scheduler.add_noise(clean, noise, times), rtol=0, atol=1e-12)
    torch.testing.assert_close(target, scheduler.get_velocity(clean, noise, times), rtol=0, atol=1e-12)
    torch.testing.assert_close(clean_estimate(noisy, target, sigma), clean, rtol=0, atol=1e-12)
    # The ends, in the package's convention: data at 0; at 1 noise, and noise minus nothing is not what is left to predict.
    assert torch.equal(noisy[3], noise[3]) and torch.equal(target[3], -clean[3])
    nothing = torch.zeros(4, 1, 1, 1, 1, dtype=torch.float64)
    assert torch.equal(add_noise(clean, noise, nothing), clean) and torch.equal(velocity(clean, noise, nothing), noise)


def test_velocity_is_the_derivative_along_the_arc():
    # sigma = sin(angle): d(noisy) / d(angle) by central differences.
    clean, noise = gaussian(0), gaussian(1)
    angle, step = torch.tensor(0.7, dtype=torch.float64), 1e-6
    ahead, behind = (add_noise(clean, noise, torch.sin(angle + offset)) for offset in (step, -step))
    torch.testing.assert_close(
        (ahead - behind) / (2 * step), velocity(clean, noise, torch.sin(angle)), rtol=0, atol=1e-8
    )


def test_alpha_keeps_its_digits_near_pure_noise():
    # alphas_cumprod of the last time but one, which 1 - sigma in float32 would round to 6 %.
    scheduler = CogVideoXDDIMScheduler(**COGVIDEOX_1_5_SCHEDULE)
    expected = scheduler.alphas_cumprod[998].sqrt()
    assert signal(training_sigmas(scheduler)[998]).item() == pytest.approx(expected.item(), rel=1e-6)


def test_weights():
    scheduler = CogVideoXDDIMScheduler(**COGVIDEOX_1_5_SCHEDULE)
    times = torch.tensor([0, 300, 700, 999])
    abar, sigma = scheduler.alphas_cumprod[times], training_sigmas(scheduler)[times]
    snr = abar / (1 - abar)
    expected = torch.tensor([min(value, 5.0) / (value + 1) for value in snr.tolist()], dtype=torch.float64)
    torch.testing.assert_close(min_snr_weight(sigma), expected, rtol=1e-9, atol=1e-15)
    assert snr[0] > 5 and snr[2] < 5  # both branches of the minimum

    # The weight of CogVideoX's trainer on the clean estimate, 1 / (1 - abar), is weight 1 on the velocity.
    clean, noise, predicted = gaussian(0), gaussian(1), gaussian(2)
    wide = sigma.view(-1, 1, 1, 1, 1)
    estimate = clean_estimate(add_noise(clean, noise, wide), predicted, wide)
    weighed = (estimate - clean).square() / (1 - abar).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(weighed, (predicted - velocity(clean, noise, wide)).square(), rtol=1e-6, atol=1e-9)


def test_times_of_noise_levels():
    sigmas = training_sigmas(CogVideoXDDIMScheduler(**COGVIDEOX_1_5_SCHEDULE))
    every = torch.arange(1000, dtype=torch.float64)
    assert torch.equal(times_of(sigmas, sigmas), every)
    between = 0.25 * sigmas[10] + 0.75 * sigmas[11]
    assert times_of(between, sigmas).item() == pytest.approx(10.75)
    assert times_of(torch.tensor([[0.0, 0.02]]), sigmas).tolist() == [[0.0, 0.0]]


def test_uniform_times():
    sigmas = training_sigmas(CogVideoXDDIMScheduler(**COGVIDEOX_1_5_SCHEDULE))
    quantiles = (torch.arange(5000) + 0.5) / 5000
    counts = torch.bincount(times_of(uniform_sigmas(quantiles, sigmas), sigmas).long(), minlength=1000)
    assert (counts == 5).all()
    assert uniform_sigmas(torch.tensor([0.0, 1.0]), sigmas).tolist() == [sigmas[0].item(), 1.0]


def test_presets():
    preset = COGVIDEOX_PRESETS["anchored-15"]
    assert list(COGVIDEOX_PRESETS) == ["anchored-15", "full-50"]
    scheduler = preset.make_scheduler()
    assert isinstance(scheduler, CogVideoXDDIMScheduler) and len(scheduler.timesteps) == 15
    assert scheduler.timesteps[0] == 999 and len(preset.make_scheduler(7).timesteps) == 7
    assert COGVIDEOX_PRESETS.matching(scheduler) is preset
    assert COGVIDEOX_PRESETS.matching(CogVideoXDPMScheduler(**COGVIDEOX_1_5_SCHEDULE)) is None
    other = CogVideoXDDIMScheduler(**COGVIDEOX_1_5_SCHEDULE | {"snr_shift_scale": 3.0})
    assert COGVIDEOX_PRESETS.matching(other) is None
    with pytest.raises(ValueError, match="'DDIMScheduler'` needs `sigmas`; .*CogVideoXDDIMScheduler"):
        timestep_preset("other", "DDIMScheduler", {}, 10, 6.0)


def test_presets_round_trip(tmp_path):
    COGVIDEOX_PRESETS.save_pretrained(tmp_path)
    assert SchedulerPresets.from_pretrained(tmp_path) == COGVIDEOX_PRESETS
    # Stock diffusers reads the file as its scheduler's.
    scheduler = CogVideoXDDIMScheduler.from_pretrained(tmp_path / "full-50")
    assert COGVIDEOX_PRESETS["full-50"].is_scheduler(scheduler)
