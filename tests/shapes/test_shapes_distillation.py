"""The guidance report: which steps are guided, by what, and what the table says of it."""

import json

import pytest

from diffusers_fvg.embedded import EMBEDDED_FOLDER
from diffusers_fvg.shapes.distillation import Guiding, guided_within, guidings, write_guidance_report
from diffusers_fvg.shapes.train import distilled_config


LORA = EMBEDDED_FOLDER / "anchor_lora" / "weights"


@pytest.mark.parametrize("way", guidings(15), ids=lambda way: way.name(15))
def test_an_interval_guides_its_steps_and_no_others(pipe, way):
    """Counted at the transformer: batches of one video, the unconditional forward right behind the other one."""
    times, preset = [], pipe.presets["anchored-15"]
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: times.append(float(kwargs["timestep"].max())), with_kwargs=True
    )
    with guided_within(pipe, way.interval(preset, 15) if way.last else (0.0, 1.0)):
        scale = 2.0 if way.last else 1.0
        pipe.animate("a red circle", num_frames=5, guidance_scale=scale, preset="anchored-15", output_type="latent")
    hook.remove()
    steps = list(dict.fromkeys(times))
    guided = [number for number, time in enumerate(steps, 1) if times.count(time) == 2]
    assert len(steps) == 15 and guided == (list(range(way.first, way.last + 1)) if way.last else [])
    assert len(times) == 15 + way.extra_forwards
    assert pipe.presets["anchored-15"] is preset


def test_the_report_compares_with_its_first_row(pipe, few_scenes, tmp_path):
    # The model's own LoRA in place of a distilled one: the same videos as without guidance.
    ways = (Guiding(1, 2), Guiding(0, 0), Guiding(0, 0, distilled=True))
    text = write_guidance_report(pipe, tmp_path, LORA, per_category=1, seeds=1, steps=2, ways=ways)
    report = json.loads((tmp_path / "guidance.json").read_text())
    assert report["synthetic"] and text == (tmp_path / "guidance.txt").read_text().rstrip("\n")
    full, none, distilled = report["rows"]
    names = ["all steps", "no guidance", "no guidance, distilled LoRA"]
    assert [row["guidance at"] for row in report["rows"]] == names and Guiding(2, 3).name(15) == "steps 2 to 3"
    assert [row["forwards"] for row in report["rows"]] == [4, 2, 2]
    assert [row["scale"] for row in report["rows"]] == [pipe.presets["anchored-15"].guidance_scale, 1.0, 1.0]
    for arm, values in none["inputs"].items():
        same = distilled["inputs"][arm]
        assert {key: values[key] for key in ("score", "motion", "loses")} == {
            key: same[key] for key in ("score", "motion", "loses")
        }
        assert values["loses"] == pytest.approx(full["inputs"][arm]["score"] - values["score"], abs=1e-4)
        assert values["motion"] != full["inputs"][arm]["motion"] or values["score"] != full["inputs"][arm]["score"]
    assert set(pipe.get_active_adapters()) == {"anchor"}
    with pytest.raises(
        ValueError, match="No pytorch_lora_weights.safetensors in .*, the folder of the distilled LoRA"
    ):
        write_guidance_report(pipe, tmp_path, tmp_path)


def test_the_shapes_run_distils_the_guidance_of_the_default_preset(pipe, tmp_path):
    config = distilled_config(tmp_path)
    assert config.distill_guidance == (next(iter(pipe.presets.values())).guidance_scale,)
    assert config.teacher_lora == str(tmp_path / "anchor_lora") and config.prompt_dropout == 0
