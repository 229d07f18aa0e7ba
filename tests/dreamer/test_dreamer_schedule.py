import math

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler

from diffusers_fvg.dreamer.schedule import DREAMER_PRESETS, dreamer_schedule
from diffusers_fvg.schedules.cogvideox import add_noise, training_sigmas, velocity
from diffusers_fvg.schedules.presets import SchedulerPresets


def log_snr(**config):
    alphas = CogVideoXDDIMScheduler(**dreamer_schedule(**config)).alphas_cumprod.double()
    return (alphas / (1 - alphas)).log()


def stable_diffusion():
    """Cumulative products of Stable Diffusion's schedule, by its formula in float64."""
    root = [0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999 for i in range(1000)]
    products, product = [], 1.0
    for value in root:
        product *= 1 - value**2
        products.append(product)
    return products


def expected_log_snr(shift, power, rescale):
    values = []
    for alpha in stable_diffusion():
        snr = alpha / (1 - alpha) * shift**power
        values.append(math.sqrt(snr / (1 + snr)))
    if rescale:
        first, last = values[0], values[-1]
        values = [(value - last) * first / (first - last) for value in values]
    # log(a^2 / (1 - a^2)), and -inf at a = 0.
    return torch.tensor([math.log(a * a / (1 - a * a)) if a > 0 else -math.inf for a in values], dtype=torch.float64)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize(("shift", "power"), [(1.0, 2), (0.125, 1), (0.125, 2), (0.1, 2), (0.15, 2)])
def test_log_snr_of_every_time(shift, power, rescale):
    made = log_snr(shift=shift, power=power, zero_terminal_snr=rescale)
    expected = expected_log_snr(shift, power, rescale)
    assert made[-1] == expected[-1] or not rescale
    assert (made[:-1] - expected[:-1]).abs().max() < 1e-9
    if not rescale:
        plain = log_snr(shift=1.0, zero_terminal_snr=False)
        assert (made - plain - power * math.log(shift)).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("config", "first", "middle", "last"),
    [
        ({"shift": 1.0, "zero_terminal_snr": False}, 7.07, -0.96, -5.36),
        ({"shift": 1.0}, 7.07, -1.14, -math.inf),
        ({"power": 1, "zero_terminal_snr": False}, 4.99, -3.03, -7.44),
        ({"power": 1}, 4.99, -3.23, -math.inf),
        ({"zero_terminal_snr": False}, 2.91, -5.11, -9.52),
        ({}, 2.91, -5.33, -math.inf),
    ],
)
def test_published_table(config, first, middle, last):
    made = log_snr(**config)
    # Two digits, some of them cut, not rounded.
    assert made[[0, 499, 999]].tolist() == pytest.approx([first, middle, last], abs=0.01)


def test_times_with_more_signal_than_noise():
    counts = [
        (log_snr(zero_terminal_snr=False, **config) > 0).sum().item() for config in ({"shift": 1.0}, {"power": 1}, {})
    ]
    assert counts == [354, 105, 17]


def test_sampling_ends_at_the_data_whatever_the_start():
    """The exact velocity of one known clip leads to it in any number of steps."""
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 3, 4).double(), torch.randn(2, 3, 4).double()
    for steps in (1, 10, 50):
        scheduler = DREAMER_PRESETS["full-50"].make_scheduler(steps)
        sigmas = training_sigmas(scheduler)
        assert scheduler.timesteps[0] == 999 and sigmas[-1] == 1
        latents = noise
        for t in scheduler.timesteps:
            sigma = sigmas[t]
            assert (latents - add_noise(clean, noise, sigma)).abs().max() < 1e-6
            latents = scheduler.step(velocity(clean, noise, sigma), t, latents, return_dict=False)[0]
        assert (latents - clean).abs().max() < 1e-6


def test_the_same_schedule_runs_on_stock_ddim():
    """Shift and rescale as betas: another of diffusers' schedulers is given the same noise levels."""
    cogvideox = CogVideoXDDIMScheduler(**dreamer_schedule(zero_terminal_snr=False))
    alphas = cogvideox.alphas_cumprod
    betas = 1 - alphas / torch.cat([alphas.new_ones(1), alphas[:-1]])
    stock = DDIMScheduler(trained_betas=betas.tolist(), rescale_betas_zero_snr=True)
    ours = CogVideoXDDIMScheduler(**dreamer_schedule()).alphas_cumprod
    assert (stock.alphas_cumprod.double() - ours).abs().max() < 1e-5


def test_presets_save_and_load(tmp_path):
    DREAMER_PRESETS.save_pretrained(tmp_path)
    assert SchedulerPresets.from_pretrained(tmp_path) == DREAMER_PRESETS


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match="shift=0"):
        dreamer_schedule(shift=0)
    with pytest.raises(ValueError, match="power=3"):
        dreamer_schedule(power=3)
