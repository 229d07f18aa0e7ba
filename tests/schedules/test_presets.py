import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from diffusers_fvg.schedules.flow import add_noise, shifted_sigmas, velocity
from diffusers_fvg.schedules.presets import WAN_PRESETS, SchedulerPreset, SchedulerPresets, unipc_preset


def test_sign_convention_is_noise_at_one_and_data_at_zero():
    clean, noise = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(add_noise(clean, noise, torch.tensor(1.0)), noise)
    assert torch.equal(add_noise(clean, noise, torch.tensor(0.0)), clean)
    sigma, smaller = 0.7, 0.2
    step = add_noise(clean, noise, sigma) + (smaller - sigma) * velocity(clean, noise)
    torch.testing.assert_close(step, add_noise(clean, noise, smaller))


def test_shifted_sigmas_closed_form():
    # LightX2V's four steps of Wan at shift 5 are the times 1000, 937.5, 833.3 and 625 (Wan2.2-Lightning issue 3).
    np.testing.assert_allclose(shifted_sigmas(4, 5.0), [1.0, 0.9375, 0.833333, 0.625], atol=1e-6)
    assert shifted_sigmas(4, 1.0) == (1.0, 0.75, 0.5, 0.25)
    with pytest.raises(ValueError, match="at least 1"):
        shifted_sigmas(0, 5.0)


@pytest.mark.parametrize("name", list(WAN_PRESETS))
def test_preset_sigmas_reach_the_scheduler_unchanged(name):
    preset = WAN_PRESETS[name]
    scheduler = preset.make_scheduler()
    expected = [5 * u / (1 + 4 * u) for u in np.arange(preset.num_inference_steps, 0, -1) / preset.num_inference_steps]
    np.testing.assert_allclose(scheduler.sigmas[:-1], expected, atol=2e-6)
    assert scheduler.sigmas[-1] == 0
    np.testing.assert_allclose(scheduler.timesteps, np.floor(np.minimum(expected, 1 - 1e-6) * 1000), atol=1)


def test_another_number_of_steps_comes_from_the_shift():
    assert WAN_PRESETS["full-50"].steps(15) == WAN_PRESETS["anchored-15"].sigmas
    own = SchedulerPreset("own", "FlowMatchEulerDiscreteScheduler", {"shift": 1.0}, (1.0, 0.757, 0.522), 5.0, 1.0)
    assert own.steps(3) == own.steps(None) == (1.0, 0.757, 0.522)
    with pytest.raises(ValueError, match="`num_inference_steps=4`, but preset 'own' has 3 fixed steps"):
        own.make_scheduler(4)


def test_preset_names_and_steps():
    assert list(WAN_PRESETS) == ["anchored-15", "full-50"]
    assert [preset.num_inference_steps for preset in WAN_PRESETS.values()] == [15, 50]
    assert WAN_PRESETS["anchored-15"].steps(8) == shifted_sigmas(8, 5.0)


def test_a_preset_on_flow_match_euler_does_not_shift_twice():
    preset = SchedulerPreset(
        "euler", "FlowMatchEulerDiscreteScheduler", {"shift": 1.0}, shifted_sigmas(4, 5.0), 5.0, 1.0
    )
    scheduler = preset.make_scheduler()
    np.testing.assert_allclose(scheduler.timesteps, [1000, 937.5, 833.333, 625], atol=1e-2)
    # What the explicit sigmas are for: left to itself the class ends at 24 instead of 625.
    left_alone = FlowMatchEulerDiscreteScheduler(shift=5.0)
    left_alone.set_timesteps(4)
    assert left_alone.timesteps[-1] < 100


def test_presets_round_trip_and_stock_scheduler_reads_them(tmp_path):
    WAN_PRESETS.save_pretrained(tmp_path)
    again = SchedulerPresets.from_pretrained(tmp_path)
    assert list(again.items()) == list(WAN_PRESETS.items())
    stock = UniPCMultistepScheduler.from_pretrained(tmp_path / "full-50")
    assert stock.config.use_flow_sigmas and stock.config.flow_shift == 1.0
    assert json.loads((tmp_path / "anchored-15" / "scheduler_config.json").read_text())["_preset"]["sigmas"][0] == 1.0


def test_matching_finds_the_default_preset_and_not_a_changed_scheduler():
    scheduler = WAN_PRESETS["full-50"].make_scheduler()
    assert WAN_PRESETS.matching(scheduler).name == "anchored-15"
    changed = UniPCMultistepScheduler.from_config(scheduler.config, solver_order=3)
    assert WAN_PRESETS.matching(changed) is None
    assert WAN_PRESETS.matching(FlowMatchEulerDiscreteScheduler()) is None


def test_a_preset_of_distilled_weights_is_found_only_where_it_is_the_default():
    # A user's plain Euler scheduler has the preset's config, and the base model's own weights know no 4 steps.
    fast = SchedulerPreset(
        "fast", "FlowMatchEulerDiscreteScheduler", {"shift": 1.0}, shifted_sigmas(4, 5.0), 5.0, 1.0, weights="org/fast"
    )
    assert SchedulerPresets.of(WAN_PRESETS["full-50"], fast).matching(FlowMatchEulerDiscreteScheduler()) is None
    assert SchedulerPresets.of(fast, WAN_PRESETS["full-50"]).matching(FlowMatchEulerDiscreteScheduler()) is fast


def test_guidance_of_two_experts_and_weights_are_saved(tmp_path):
    presets = SchedulerPresets.of(
        unipc_preset("two", 15, 12.0, 4.0, guidance_scale_2=3.0, weights="org/fast", source="a test")
    )
    presets.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "two" / "scheduler_config.json").read_text())["_preset"]
    assert (saved["guidance_scale"], saved["guidance_scale_2"], saved["weights"]) == (4.0, 3.0, "org/fast")
    assert SchedulerPresets.from_pretrained(tmp_path) == presets
    # A repository from before there were two.
    for name in ("guidance_scale_2", "weights"):
        del saved[name]
    config = json.loads((tmp_path / "two" / "scheduler_config.json").read_text()) | {"_preset": saved}
    (tmp_path / "two" / "scheduler_config.json").write_text(json.dumps(config))
    assert SchedulerPresets.from_pretrained(tmp_path)["two"].guidance_scale_2 is None


def test_bad_presets_are_refused():
    with pytest.raises(ValueError, match="anchored-15, full-50"):
        WAN_PRESETS["anchored-14"]
    with pytest.raises(ValueError, match="sigmas"):
        SchedulerPreset("rising", "UniPCMultistepScheduler", {}, (0.5, 0.6), 1.0, 1.0)
    with pytest.raises(ValueError, match="sigmas"):
        SchedulerPreset("beyond", "UniPCMultistepScheduler", {}, (1.5, 0.6), 1.0, 1.0)
