"""Values outside a model's training give one warning; values that cannot work are refused with the nearest one that can."""

import dataclasses

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler, UniPCMultistepScheduler
from tiny import tiny_pipeline

from diffusers_fvg import models
from diffusers_fvg.checks import check_num_frames, check_size
from diffusers_fvg.models import MODELS, model_presets, warn_untrained
from diffusers_fvg.schedules.presets import check_steps


@pytest.fixture
def warned(caplog):
    """Messages of this test, with those of the process cleared before."""
    models._warn_once.cache_clear()
    yield lambda: [record.message for record in caplog.records if record.name == models.logger.name]
    models._warn_once.cache_clear()


def ask(name, height, width, num_frames, preset="anchored-15", scheduler=None):
    presets = model_presets(MODELS[name])
    scheduler = scheduler or UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=MODELS[name].sizes[0].flow_shift)
    warn_untrained(MODELS[name], height, width, num_frames, preset and presets[preset], scheduler, presets)


@pytest.mark.parametrize("name", MODELS)
def test_what_was_trained_does_not_warn(name, warned):
    facts = MODELS[name]
    for size in facts.sizes:
        for count in facts.frame_counts:
            preset = next(iter(model_presets(facts, size.height, size.width)))
            ask(name, size.height, size.width, count, preset)
    ask(name, facts.sizes[0].height, facts.sizes[0].width, facts.frame_counts[0], None)
    assert warned() == []


def test_a_size_and_a_length_that_were_not_trained_warn_once(warned):
    for _ in range(2):
        ask("Wan2.2-TI2V-5B", 480, 832, 49)
    assert warned() == [
        "Wan2.2-TI2V-5B was trained at 704 x 1280, 1280 x 704 (`height` x `width`); expect lower quality at `height=480`, `width=832`.",
        "Wan2.2-TI2V-5B was trained on videos of 121 frames; expect lower quality at `num_frames=49`.",
    ]
    ask("CogVideoX1.5-5B", 768, 1360, 89)
    assert warned()[2:] == [
        "CogVideoX1.5-5B was trained on videos of 81 or 161 frames; expect lower quality at `num_frames=89`."
    ]


def test_a_preset_for_another_resolution_names_the_right_one(warned):
    ask("Wan2.1-T2V-14B", 480, 832, 81)
    ask("Wan2.1-T2V-14B", 720, 1280, 81, "full-50-480p")
    small, large = warned()
    assert "'anchored-15' has flow shift 5.0, but Wan2.1-T2V-14B has 3.0 at 480 x 832: use" in small
    assert "`preset='anchored-15-480p'` or `preset='full-50-480p'`" in small
    assert "at 720 x 1280: use `preset='anchored-15'` or `preset='full-50'`." in large
    # Distilled weights have their own.
    ask("Wan2.1-T2V-14B", 480, 832, 81, "lightx2v-4")
    assert len(warned()) == 2
    # A repository's scheduler is for one resolution, too; nothing is known about one without a shift.
    for scheduler in (FlowMatchEulerDiscreteScheduler(shift=7.0), LCMScheduler()):
        ask("Wan2.1-T2V-14B", 720, 1280, 81, None, scheduler)
    assert [message.split(": use")[0] for message in warned()[2:]] == [
        "The scheduler has flow shift 7.0, but Wan2.1-T2V-14B has 5.0 at 720 x 1280"
    ]


def test_what_cannot_work_names_the_nearest_that_can():
    with pytest.raises(ValueError, match="`height=500` must be a positive multiple of 32; nearest: 480 and 512"):
        check_size("height", 500, 32)
    with pytest.raises(ValueError, match="`width=0` .*nearest: 16 and 32"):
        check_size("width", 0, 16)
    with pytest.raises(ValueError, match="`num_frames=80` must be 4k \\+ 1; nearest: 77 and 81"):
        check_num_frames(80, 4)
    with pytest.raises(ValueError, match="`num_frames=0` .*nearest: 1 and 5"):
        check_num_frames(0, 4)
    with pytest.raises(ValueError, match="`num_inference_steps=0` must be at least 1"):
        check_steps(0, None)
    with pytest.raises(ValueError, match="'fastwan-3' has 3 fixed steps"):
        check_steps(4, model_presets(MODELS["Wan2.2-TI2V-5B"])["fastwan-3"])


def test_a_pipeline_knows_the_model_that_it_holds(warned, monkeypatch):
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    inputs = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16, "num_inference_steps": 1}
    pipe.animate("a red circle", **inputs)
    assert warned() == []
    # The tiny model takes the place of one in the table.
    config = {name: pipe.transformer.config[name] for name in MODELS["Wan2.1-T2V-1.3B"].transformer_config}
    config["patch_size"] = tuple(config["patch_size"])
    facts = dataclasses.replace(MODELS["Wan2.1-T2V-1.3B"], transformer_config=config)
    monkeypatch.setitem(MODELS, facts.name, facts)
    pipe.animate("a red circle", **inputs)
    assert [message.split(" was trained ")[0] for message in warned()] == ["Wan2.1-T2V-1.3B"] * 2
