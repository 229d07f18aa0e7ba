"""Presets of distilled weights against their authors' own arithmetic, done here in numpy."""

import numpy as np
import pytest

from diffusers_fvg.animate.families import FAMILIES
from diffusers_fvg.models import MODELS, model_presets
from diffusers_fvg.schedules.distilled import DISTILLED_ANIMATOR_PRESETS, DISTILLED_PRESETS


PRESETS = [
    (name, preset)
    for table in (DISTILLED_PRESETS, DISTILLED_ANIMATOR_PRESETS)
    for name, presets in table.items()
    for preset in presets
]
every_preset = pytest.mark.parametrize(
    ("model", "preset"), PRESETS, ids=[f"{name}-{preset.name}" for name, preset in PRESETS]
)


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
    if model in MODELS:
        assert preset.name in model_presets(MODELS[model])
    else:
        assert model in {family.name for family in FAMILIES}


def test_steps_of_image_to_video_are_those_of_the_authors():
    levels = {name: presets[0].sigmas for name, presets in DISTILLED_ANIMATOR_PRESETS.items()}
    for family in ("Wan2.2-I2V", "Wan2.1-I2V"):
        np.testing.assert_allclose(
            np.array(levels[family]) * 1000, lightx2v_times([1000, 750, 500, 250], 5.0), atol=1e-3
        )
    # Two of the four are of the high-noise expert, whose boundary in diffusers is 0.9.
    assert sum(level >= 0.9 for level in levels["Wan2.2-I2V"]) == 2
    # hyvideo: evenly spaced, shifted once.
    even = np.linspace(1, 0, 9)[:-1]
    np.testing.assert_allclose(levels["HunyuanVideo-1.5-I2V"], 7 * even / (1 + 6 * even), atol=1e-6)
    utils = pytest.importorskip("diffusers.pipelines.ltx2.utils")
    assert levels["LTX-2 conditions"] == levels["LTX-2 image-to-video"] == tuple(utils.DISTILLED_SIGMA_VALUES)
    # LTX-Video's are the same, rounded by their authors, but for the last.
    np.testing.assert_allclose(levels["LTX-Video image-to-video"], utils.DISTILLED_SIGMA_VALUES[:-1], atol=1e-4)


def test_eight_steps_of_lightning_are_its_author_s_and_fastwan_has_three():
    eight = model_presets(MODELS["Wan2.2-T2V-A14B"])["lightning-4"].make_scheduler(8).timesteps
    expected = [1000.0, 972.2224, 937.5001, 892.8571, 833.3333, 750.0001, 625.0, 416.6667]
    np.testing.assert_allclose(eight, expected, atol=2e-3)
    with pytest.raises(ValueError, match="'fastwan-3' has 3 fixed steps"):
        model_presets(MODELS["Wan2.2-TI2V-5B"])["fastwan-3"].make_scheduler(4)
