"""The table of model facts against the models' own classes, checkpoint sizes, and the numbers that the package uses."""

import dataclasses
import json
import tomllib
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate import init_empty_weights

import diffusers_fvg
from diffusers_fvg.lora.loader import read_lora
from diffusers_fvg.models import MODELS, WAN_NEGATIVE_PROMPT, ModelFacts, find_model, match_model, model_presets
from diffusers_fvg.schedules.presets import WAN_PRESETS


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

# `transformer/config.json` of Wan's 14B models as it is saved: what scripts/convert_wan_to_diffusers.py of diffusers gives for
# "Wan-T2V-14B" and "Wan2.2-T2V-A14B", with the class's defaults.
WAN_14B_CONFIG = """{"added_kv_proj_dim": null, "attention_head_dim": 128, "cross_attn_norm": true, "eps": 1e-06,
    "ffn_dim": 13824, "freq_dim": 256, "image_dim": null, "in_channels": 16, "num_attention_heads": 40, "num_layers": 40,
    "out_channels": 16, "patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
    "text_dim": 4096}"""

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


@every_model
def test_our_class_takes_the_stock_state_dict(facts):
    stock = on_meta(diffusers, facts.transformer_class, facts)
    ours = on_meta(diffusers_fvg, facts.anchored_class, facts)
    shapes = {key: value.shape for key, value in stock.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes
    # Without a copy of the weights, as the pipeline loads each expert of a stock checkpoint.
    taken = type(ours).from_stock(stock)
    assert dict(taken.config) == dict(ours.config) and taken.num_parameters() == facts.parameters


# Weights of one block, from Wan-Video/Wan2.2, wan/modules/model.py: q, k, v, o with bias and two norms in each of two
# attentions; the feed-forward's two layers; one affine norm; six rows of modulation.
@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("Wan")])
def test_parameters_of_a_wan_model_by_hand(name):
    config = MODELS[name].transformer_config
    width, ffn, layers = config["num_attention_heads"] * 128, config["ffn_dim"], config["num_layers"]
    block = 2 * (4 * (width + 1) * width + 2 * width) + (width + 1) * ffn + (ffn + 1) * width + 2 * width + 6 * width
    patch_in, patch_out = (4 * config[f"{end}_channels"] for end in ("in", "out"))
    embedders = (256 + 1) * width + (width + 1) * width + (4096 + 1) * width + (width + 1) * width
    ends = (patch_in + 1) * width + embedders + (width + 1) * 6 * width + (width + 1) * patch_out + 2 * width
    assert layers * block + ends == MODELS[name].parameters


@every_model
def test_an_anchor_lora_fits_every_expert(facts, monkeypatch):
    # Tensors on the meta device have no values to check.
    monkeypatch.setattr("diffusers_fvg.lora.loader.check_finite", lambda name, values: None)
    experts = ["transformer"] if facts.boundary_ratio is None else ["transformer", "transformer_2"]
    models = [on_meta(diffusers_fvg, facts.anchored_class, facts) for _ in experts]
    # Attention and feed-forward layers, as training adapts them.
    layers = [
        (name, module)
        for name, module in models[0].named_modules()
        if isinstance(module, torch.nn.Linear) and "blocks." in name and "norm" not in name
    ]
    assert len(layers) == facts.transformer_config["num_layers"] * (6 if facts.prediction == "v" else 10)
    tensors = {}
    with torch.device("meta"):
        for expert in experts:
            for name, layer in layers:
                tensors[f"{expert}.{name}.lora_A.weight"] = torch.empty(1, layer.in_features)
                tensors[f"{expert}.{name}.lora_B.weight"] = torch.empty(layer.out_features, 1)
    files = read_lora(tensors, dict(zip(experts, models)))
    assert files.unmatched == {} and {name: len(fit.pairs) for name, fit in files.fits.items()} == dict.fromkeys(
        experts, len(layers)
    )


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
    assert facts is not None and path.stem.removesuffix("-distilled") == facts.name.lower()
    assert config["frame_rate"] == facts.frame_rate
    sizes = {(size.height, size.width): size.flow_shift for size in facts.sizes}
    for num_frames, height, width in config["buckets"]:
        assert num_frames <= max(facts.frame_counts)
        assert sizes[height, width] in (config.get("flow_shift"), None)


def test_presets_of_the_5b_are_the_package_s_own():
    made = model_presets(MODELS["Wan2.2-TI2V-5B"])
    assert list(made) == [*WAN_PRESETS, "fastwan-3"]
    for name, preset in WAN_PRESETS.items():
        assert (made[name].sigmas, made[name].guidance_scale) == (preset.sigmas, preset.guidance_scale)


def test_presets_have_the_model_s_shift_and_steps():
    made = model_presets(MODELS["Wan2.2-T2V-A14B"])
    assert list(made) == ["anchored-15", "full-40", "lightning-4"]
    # Shift 12 of u = 39/40: 12 * 0.975 / (1 + 11 * 0.975).
    assert made["full-40"].sigmas[1] == pytest.approx(11.7 / 11.725, abs=1e-6)
    assert [(preset.guidance_scale, preset.guidance_scale_2) for preset in made.values()] == [
        (4.0, 3.0),
        (4.0, 3.0),
        (1.0, None),
    ]


def test_presets_by_resolution():
    # Wan2.1's README: shift 5.0 for 720P, 3.0 for 480P. u = 14/15: 5 u / (1 + 4 u), 3 u / (1 + 2 u).
    facts = MODELS["Wan2.1-T2V-14B"]
    made = model_presets(facts)
    assert list(made) == ["anchored-15", "full-50", "anchored-15-480p", "full-50-480p", "lightx2v-4"]
    assert made["anchored-15"].sigmas[1] == pytest.approx(70 / 71, abs=1e-6)
    assert made["anchored-15-480p"].sigmas[1] == pytest.approx(42 / 43, abs=1e-6)
    small = model_presets(facts, 832, 480)
    assert list(small) == ["anchored-15-480p", "full-50-480p", "anchored-15", "full-50", "lightx2v-4"]
    assert dict(small) == dict(made)
    assert list(model_presets(facts, 512, 512)) == list(made)


def test_presets_of_cogvideox_have_its_own_steps_and_guidance():
    facts = MODELS["CogVideoX1.5-5B"]
    full = model_presets(facts)["full-50"]
    assert (full.num_inference_steps, full.guidance_scale) == (facts.num_inference_steps, facts.guidance_scale)
    assert full.scheduler_config["prediction_type"] == "v_prediction"


def test_find_model():
    assert find_model("Wan-AI/Wan2.1-T2V-14B-Diffusers").name == "Wan2.1-T2V-14B"
    assert find_model("Wan-AI/Wan2.1-T2V-14B") is None


def test_match_model():
    for facts in MODELS.values():
        config = on_meta(diffusers, facts.transformer_class, facts).config
        assert match_model(config, facts.boundary_ratio) is facts
    published = json.loads(WAN_14B_CONFIG)
    assert match_model(published).name == "Wan2.1-T2V-14B"
    assert match_model(published, 0.875).name == "Wan2.2-T2V-A14B"
    # The image-to-video models have more channels; the 5B has no experts.
    assert match_model(published | {"in_channels": 36}) is None
    assert match_model(MODELS["Wan2.2-TI2V-5B"].transformer_config, 0.9) is None


def test_call_defaults_are_the_model_s():
    wan, cog = (MODELS[name].call_defaults for name in ("Wan2.1-T2V-1.3B", "CogVideoX1.5-5B"))
    assert wan == {
        "height": 480,
        "width": 832,
        "num_frames": 81,
        "frame_rate": 16,
        "max_sequence_length": 512,
        "negative_prompt": WAN_NEGATIVE_PROMPT,
    }
    assert (cog["height"], cog["width"], cog["num_frames"], cog["negative_prompt"]) == (768, 1360, 81, "")
