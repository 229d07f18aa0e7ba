"""Presets of distilled weights against their authors' own arithmetic, done here in numpy."""

import numpy as np
import pytest

from diffusers_fvg.models import MODELS, model_presets
from diffusers_fvg.schedules.distilled import DISTILLED_PRESETS


PRESETS = [(name, preset) for name, presets in DISTILLED_PRESETS.items() for preset in presets]
every_preset = pytest.mark.parametrize(("model", "preset"), PRESETS, ids=[preset.name for _, preset in PRESETS])


def lightx2v_times(steps, shift):
    """ModelTC/LightX2V, WanStepDistillScheduler: 1000 shifted levels, of which `denoising_step_list` picks by index."""
    levels = np.linspace(1, 0, 1001)[:-1]
    levels = shift * levels / (1 + (shift - 1) * levels)
    return levels[[1000 - step for step in steps]] * 1000


def lightning_times(number, shift):
    """ModelTC/Wan2.2-Lightning, EulerScheduler: evenly spaced times, shifted, without the last, which is 0."""
    levels = np.linspace(1000, 0, number + 1) / 1000
    return (shift * levels / (1 + (shift - 1) * levels) * 1000)[:-1]


def fastwan_levels(times):
    """hao-ai-lab/FastVideo, pred_noise_to_pred_video: of 1000 levels at shift 8, the one whose time is nearest."""
    levels = np.arange(1000, 0, -1) / 1000
    levels = 8 * levels / (1 + 7 * levels)
    return [levels[np.abs(levels * 1000 - time).argmin()] for time in times]


@every_preset
def test_steps_reach_the_scheduler_as_they_are(model, preset):
    scheduler = preset.make_scheduler()
    assert type(scheduler).__name__ == preset.scheduler_class
    np.testing.assert_allclose(scheduler.sigmas, [*preset.sigmas, 0.0], atol=1e-6)
    np.testing.assert_allclose(scheduler.timesteps, np.array(preset.sigmas) * 1000, atol=1e-3)


def test_steps_are_those_of_the_authors():
    for model, name in (("Wan2.2-T2V-A14B", "lightning-4"), ("Wan2.1-T2V-14B", "lightx2v-4")):
        times = model_presets(MODELS[model])[name].make_scheduler().timesteps
        np.testing.assert_allclose(times, lightx2v_times([1000, 750, 500, 250], 5.0), atol=1e-3)
        np.testing.assert_allclose(times, lightning_times(4, 5.0), atol=1e-3)
        # As their author lists them (Wan2.2-Lightning issue 3).
        np.testing.assert_allclose(times, [1000.0, 937.5001, 833.3333, 625.0], atol=1e-3)
    fastwan = model_presets(MODELS["Wan2.2-TI2V-5B"])["fastwan-3"]
    assert fastwan.make_scheduler().timesteps.tolist() == pytest.approx([1000, 757, 522], abs=1e-3)
    # The level that goes with a time is off by less than half a step of their table.
    np.testing.assert_allclose(fastwan.sigmas, fastwan_levels([1000, 757, 522]), atol=1.2e-3)


@every_preset
def test_guidance_is_off_and_the_weights_are_named(model, preset):
    assert preset.guidance_scale == 1.0 and preset.guidance_scale_2 is None
    assert preset.weights.count("/") == 1 and preset.source
    assert model in MODELS and preset.name in model_presets(MODELS[model])


def test_eight_steps_of_lightning_are_its_author_s_and_fastwan_has_three():
    eight = model_presets(MODELS["Wan2.2-T2V-A14B"])["lightning-4"].make_scheduler(8).timesteps
    expected = [1000.0, 972.2224, 937.5001, 892.8571, 833.3333, 750.0001, 625.0, 416.6667]
    np.testing.assert_allclose(eight, expected, atol=2e-3)
    with pytest.raises(ValueError, match="'fastwan-3' has 3 steps of its own"):
        model_presets(MODELS["Wan2.2-TI2V-5B"])["fastwan-3"].make_scheduler(4)
