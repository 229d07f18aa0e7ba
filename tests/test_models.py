"""The table of model facts against the models' own classes, checkpoint sizes, and the numbers that the package uses."""

import dataclasses
import tomllib
from pathlib import Path

import diffusers
import pytest
from accelerate import init_empty_weights

import diffusers_fvg
from diffusers_fvg.models import MODELS, WAN_NEGATIVE_PROMPT, ModelFacts, find_model, model_presets
from diffusers_fvg.schedules import WAN_PRESETS


CONFIGS = sorted((Path(__file__).parents[1] / "examples" / "training").glob("*.toml"))
# Listings on the Hub, in GB, and bytes a number: Wan-AI/Wan2.1-T2V-1.3B-Diffusers/transformer (float32),
# Comfy-Org/Wan_2.1_ComfyUI_repackaged wan2.1_t2v_14B_bf16, Comfy-Org/Wan_2.2_ComfyUI_Repackaged wan2.2_t2v_high_noise_14B_fp16,
# Kijai/CogVideoX-5b-1.5/transformer_T2V (bfloat16: 4.98 + 4.95 + 1.22).
CHECKPOINTS = {
    "Wan2.1-T2V-1.3B": (5.68, 4),
    "Wan2.1-T2V-14B": (28.6, 2),
    "Wan2.2-T2V-A14B": (28.6, 2),
    "CogVideoX1.5-5B": (11.15, 2),
}
# Tokens of the default size and length: 31 x 22 x 40, 21 x 30 x 52, 21 x 45 x 80, and 22 (padded to even) / 2 x 48 x 85.
TOKENS = {
    "Wan2.2-TI2V-5B": 27280,
    "Wan2.1-T2V-1.3B": 32760,
    "Wan2.1-T2V-14B": 75600,
    "Wan2.2-T2V-A14B": 75600,
    "CogVideoX1.5-5B": 44880,
}

ANCHORED = [facts for facts in MODELS.values() if facts.anchored_class in diffusers_fvg.__all__]

every_model = pytest.mark.parametrize("facts", MODELS.values(), ids=MODELS.keys())


def on_meta(library, class_name: str, facts: ModelFacts):
    with init_empty_weights():
        return getattr(library, class_name)(**facts.transformer_config)


@every_model
def test_the_transformer_has_the_published_number_of_parameters(facts):
    stock = on_meta(diffusers, facts.transformer_class, facts)
    assert stock.num_parameters() == facts.parameters
    if facts.name in CHECKPOINTS:
        gigabytes, width = CHECKPOINTS[facts.name]
        assert facts.parameters * width / 1e9 == pytest.approx(gigabytes, rel=2e-3)


@pytest.mark.parametrize("facts", ANCHORED, ids=lambda facts: facts.name)
def test_our_class_takes_the_stock_state_dict(facts):
    stock = on_meta(diffusers, facts.transformer_class, facts).state_dict()
    ours = on_meta(diffusers_fvg, facts.anchored_class, facts).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in stock.items()}


@every_model
def test_every_value_has_its_source(facts):
    values = {field.name: getattr(facts, field.name) for field in dataclasses.fields(facts)}
    given = {name for name, value in values.items() if value not in (None, "")}
    named = {"name", "anchored_class", "sources"}
    assert given - named <= set(facts.sources) <= set(values) - named
    assert all(facts.sources.values())


@every_model
def test_sizes_and_lengths_fit_the_strides(facts):
    frames, rows, columns = facts.vae_stride
    for size in facts.sizes:
        assert size.height % (rows * facts.patch_size[1]) == size.width % (columns * facts.patch_size[2]) == 0
        assert (size.flow_shift is not None) == (facts.prediction == "flow")
    assert facts.frame_step % frames == 0
    assert all(count % facts.frame_step == 1 for count in facts.frame_counts)
    latent_frames = 1 + (facts.frame_counts[0] - 1) // frames
    patches = -(-latent_frames // facts.patch_size[0])
    height, width = facts.sizes[0].height // rows, facts.sizes[0].width // columns
    assert patches * (height // facts.patch_size[1]) * (width // facts.patch_size[2]) == TOKENS[facts.name]


@every_model
def test_two_experts_come_with_two_guidance_scales(facts):
    # WanPipeline refuses `guidance_scale_2` without a boundary.
    assert (facts.guidance_scale_2 is None) == (facts.boundary_ratio is None)


def test_negative_prompt_is_the_reference_s():
    assert len(WAN_NEGATIVE_PROMPT) == 137
    # "static", "three legs" and "walking backwards" of the authors' translation.
    phrases = WAN_NEGATIVE_PROMPT.split("\uff0c")
    assert phrases[2] == "\u9759\u6001" and phrases[-3] == "\u4e09\u6761\u817f" and phrases[-1] == "\u5012\u7740\u8d70"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_training_configs_agree_with_the_table(path):
    config = tomllib.loads(path.read_text())
    facts = find_model(config["model"])
    assert facts is not None and facts.name.lower() == path.stem
    assert config["frame_rate"] == facts.frame_rate
    sizes = {(size.height, size.width): size.flow_shift for size in facts.sizes}
    for num_frames, height, width in config["buckets"]:
        assert num_frames <= max(facts.frame_counts)
        assert sizes[height, width] in (config.get("flow_shift"), None)


def test_presets_of_the_5b_are_the_package_s_own():
    made = model_presets(MODELS["Wan2.2-TI2V-5B"])
    assert list(made) == list(WAN_PRESETS)
    for name, preset in WAN_PRESETS.items():
        assert (made[name].sigmas, made[name].guidance_scale) == (preset.sigmas, preset.guidance_scale)


def test_presets_have_the_model_s_shift_and_steps():
    made = model_presets(MODELS["Wan2.2-T2V-A14B"])
    assert list(made) == ["anchored-15", "full-40"]
    # Shift 12 of u = 39/40: 12 * 0.975 / (1 + 11 * 0.975).
    assert made["full-40"].sigmas[1] == pytest.approx(11.7 / 11.725, abs=1e-6)
    assert made["full-40"].guidance_scale == 4.0


def test_presets_of_cogvideox_have_its_own_steps_and_guidance():
    facts = MODELS["CogVideoX1.5-5B"]
    full = model_presets(facts)["full-50"]
    assert (full.num_inference_steps, full.guidance_scale) == (facts.num_inference_steps, facts.guidance_scale)
    assert full.scheduler_config["prediction_type"] == "v_prediction"


def test_find_model():
    assert find_model("Wan-AI/Wan2.1-T2V-14B-Diffusers").name == "Wan2.1-T2V-14B"
    assert find_model("Wan-AI/Wan2.1-T2V-14B") is None
