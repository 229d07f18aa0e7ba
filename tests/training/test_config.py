import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from accelerate.commands.config.config_args import load_config_from_file
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from tiny import TRANSFORMER_CONFIG
from tiny_cogvideox import TRANSFORMER_CONFIG as COGVIDEOX_CONFIG
from tiny_cogvideox import tiny_cogvideox_transformer
from training_runs import OPTIONS

import diffusers_fvg.training
from diffusers_fvg.animate.transformer_anchor import AnchorConditionedTransformer3D
from diffusers_fvg.models import MODELS
from diffusers_fvg.publishing.privacy import without_paths
from diffusers_fvg.training.config import TrainConfig
from diffusers_fvg.training.estimate import estimated_host_memory, estimated_memory
from diffusers_fvg.training.loop import check_model


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))
from harness import LiveBytes  # noqa: E402


EXAMPLES = Path(__file__).parents[2] / "examples" / "training"
PLACES = {"model": "m", "data": "d", "cache_dir": "c", "output_dir": "o"}
DISTILLED = {"distill_guidance": [4.0], "teacher_lora": "lora", "prompt_dropout": 0.0}

EXAMPLE_MODELS = {
    "wan2.2-ti2v-5b": "Wan2.2-TI2V-5B",
    "wan2.2-ti2v-5b-distilled": "Wan2.2-TI2V-5B",
    "wan2.1-t2v-1.3b": "Wan2.1-T2V-1.3B",
    "wan2.2-t2v-a14b": "Wan2.2-T2V-A14B",
    "cogvideox1.5-5b": "CogVideoX1.5-5B",
}


def config(**options) -> TrainConfig:
    return TrainConfig(**PLACES | OPTIONS | options)


def test_load_gives_back_what_to_toml_wrote(tmp_path):
    options = {"data": 'a "quoted" \\ path \u00e4', "experts": ["transformer", "transformer_2"], "anchor_noise": 0.2}
    for more in ({}, {"anchor_window": 0}, DISTILLED | {"distill_guidance": [4.0, 3.0]}):
        written = config(**options | more)
        (tmp_path / "c.toml").write_text(written.to_toml(), encoding="utf-8")
        assert TrainConfig.load(tmp_path / "c.toml") == written


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rnak = 8", r"unknown keys \['rnak'\]; known ones are .*rank"),
        ("rank = 8\nrank = 9", "not valid TOML"),
        ("rank = 8", r"lacks the keys \['model', 'data', 'cache_dir', 'output_dir', 'buckets', 'frame_rate'\]"),
    ],
)
def test_load_refuses(tmp_path, line, message):
    (tmp_path / "c.toml").write_text(line)
    with pytest.raises(ValueError, match=message):
        TrainConfig.load(tmp_path / "c.toml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": "8"}, "`rank='8'` must be of type int"),
        ({"rank": True}, "`rank=True` must be of type int"),
        ({"rank": 0}, "`rank=0` must be at least 1"),
        ({"learning_rate": float("nan")}, "`learning_rate=nan` must be above 0"),
        ({"anchor_position": "middle"}, "must be one of 'first', 'start-middle-last', 'uniform'"),
        ({"anchor_noise": 1.0}, r"`anchor_noise=1.0` must lie in \[0, 1\)"),
        ({"buckets": []}, "needs at least one"),
        ({"buckets": [[9, 32]]}, r"`buckets=\[9, 32\]` must be of type tuple\[int, int, int\]"),
        ({"buckets": [[1, 32, 32]]}, "needs a bucket of more than one frame"),
        ({"experts": ["transformer_3"]}, r"may hold \['transformer', 'transformer_2'\]"),
        ({"targets": ["to_q", "to_q"]}, "at least one value, each once"),
        ({"warmup_steps": 7}, "must be below steps=7"),
        ({"anchor_probability": 0}, "trains no anchor"),
        ({"timestep_density": "uniform", "timestep_std": 2.0}, "has no effect"),
        (
            {"validation_every": 1, "validation_prompts": ["a dog"], "validation_anchors": ["a.png", ""]},
            "needs one for each of 1 validation_prompts",
        ),
        ({"validation_prompts": ["a dog"], "validation_anchors": ["a.png"]}, "no effect with validation_every=0"),
        ({"clips_per_video": 0}, "`clips_per_video=0` must be at least 1"),
        ({"teacher_lora": "lora"}, "`teacher_lora='lora'` has no effect without distill_guidance"),
        ({"negative_prompt": "blurred"}, "`negative_prompt='blurred'` has no effect without distill_guidance"),
        (DISTILLED | {"distill_guidance": [1.0]}, r"`distill_guidance=\(1.0,\)` must be above 1"),
        (DISTILLED | {"distill_guidance": [4.0, 3.0]}, "needs one scale for each of experts=\\['transformer'\\]"),
        (DISTILLED | {"distill_guidance": 4.0}, "must be of type tuple\\[float, ...\\]"),
        (DISTILLED | {"teacher_lora": ""}, "`teacher_lora=''` must name the anchor LoRA that is distilled"),
        (DISTILLED | {"prompt_dropout": 0.1}, "`prompt_dropout=0.1` must be 0 with distill_guidance"),
        ({"anchor_window": -1}, "`anchor_window=-1` must not be negative"),
        ({"anchor_window": 1.5}, "`anchor_window=1.5` must be of type int"),
        ({"anchor_window": 1, "frame_times": "independent"}, '`anchor_window=1` needs frame_times="shared"'),
    ],
)
def test_validate_names_value_and_fix(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_estimated_memory_counts_parameters():
    train = config(targets=["to_q"], rank=3, mixed_precision="no", ema_decay=0.0, batch_size=2)
    parts = estimated_memory(train, TRANSFORMER_CONFIG, spatial=8)
    transformer = WanTransformer3DModel(**TRANSFORMER_CONFIG)
    assert parts["weights"] == 4 * sum(p.numel() for p in transformer.parameters())
    # Two blocks of two attentions, 24 wide.
    assert parts["lora"] == parts["optimizer"] == 8 * 3 * 4 * (24 + 24)
    # 3 latent frames of 2 x 2 patches, two clips.
    assert parts["block_inputs"] == 2 * (2 * 12) * 24 * 4
    # The teacher's adapter is as large and frozen.
    taught = estimated_memory(replace(train, **DISTILLED), TRANSFORMER_CONFIG, spatial=8)
    assert taught == parts | {"lora": parts["lora"] + 4 * 3 * 4 * (24 + 24)}


def test_estimated_memory_counts_an_appended_anchor():
    train = config(buckets=[[9, 128, 128]], rank=2, mixed_precision="no", ema_decay=0.0, batch_size=1)
    model = TRANSFORMER_CONFIG | {"attention_head_dim": 32, "num_layers": 3, "ffn_dim": 128}
    torch.manual_seed(0)
    transformer = AnchorConditionedTransformer3D(**model).requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=2, target_modules=list(train.targets)))
    transformer.train().enable_gradient_checkpointing()
    estimated, measured = [], []
    for form, frames, more in (
        ("slot", 3, {}),
        ("appended", 4, {"anchor_positions": torch.tensor([[2.375]], dtype=torch.float64)}),
    ):
        parts = estimated_memory(replace(train, anchor_form=form), model, spatial=8)
        # Latent frames of 8 x 8 patches, 64 wide, three blocks.
        assert parts["block_inputs"] == 3 * frames * 8 * 8 * 64 * 4
        estimated.append(parts["block_inputs"] + parts["block"])
        inputs = {"hidden_states": torch.randn(1, 16, frames, 16, 16), "timestep": torch.full((1, frames), 500.0)}
        inputs["encoder_hidden_states"] = torch.randn(1, 16, model["text_dim"])
        # Gradients are no activations.
        for known in (None, [*transformer.parameters(), *transformer.buffers(), *inputs.values()]):
            transformer.zero_grad(set_to_none=True)
            with LiveBytes(known or ()) as counter:
                transformer(**inputs, **more).sample.square().mean().backward()
        measured.append(counter.peak)
    assert all(low <= high <= 1.3 * low for low, high in zip(measured, estimated))
    assert estimated[1] / estimated[0] == pytest.approx(measured[1] / measured[0], rel=0.03)


def test_estimated_memory_of_cogvideox():
    train = config(
        targets=["to_q", "ff.net.0.proj"], rank=3, mixed_precision="no", ema_decay=0.9, buckets=[[9, 32, 32]]
    )
    parts = estimated_memory(train, COGVIDEOX_CONFIG, spatial=8)
    transformer = tiny_cogvideox_transformer()
    assert parts["weights"] == 4 * sum(p.numel() for p in transformer.parameters())
    # Two blocks, 32 wide, with a feed-forward of 128.
    assert parts["lora"] == 12 * 3 * 2 * (32 + 32 + 32 + 128)
    # 3 latent frames in two patches of 2 x 2 each, and 16 of text.
    assert parts["block_inputs"] == 2 * (2 * 4 + 16) * 32 * 4


def test_estimated_memory_of_what_saves_it():
    train = config(targets=["to_q"], rank=3, mixed_precision="bf16", ema_decay=0.0)
    sizes = {"ffn_dim": 64, "attention_head_dim": 32}
    model = TRANSFORMER_CONFIG | sizes
    transformer = WanTransformer3DModel(**model)
    full = estimated_memory(train, model, spatial=8)
    whole = 2 * sum(p.numel() for p in transformer.parameters())
    # Eight square layers of 64 and two of the feed-forward in each of two blocks, all with biases.
    layers, biases = 8 * 64 * 64 + 2 * 64 * 64, 8 * 64 + 64 + 64
    block = 2 * sum(p.numel() for p in transformer.blocks[0].parameters())
    assert full["weights"] == whole and estimated_host_memory(train, model, spatial=8) == {}

    fp8 = estimated_memory(replace(train, quantize="fp8"), model, spatial=8)
    assert fp8 == full | {"weights": whole - 2 * (layers + biases), "block": full["block"] + 2 * (layers + biases)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: object())
        nf4, eight = replace(train, quantize="nf4"), replace(train, optimizer="adamw-8bit")
    parts = estimated_memory(nf4, model, spatial=8)
    # 4 bits, 8 for 64 of them and 32 for 256 of those; one layer at a time is computed with.
    bits = layers * 4 + layers / 64 * 8 + layers / 64 / 256 * 32
    assert parts["weights"] == pytest.approx(whole - 2 * (2 * layers - bits / 8), abs=2)
    assert parts["block"] == full["block"] + 2 * (64 * 64 + 64)
    parameters = full["optimizer"] / 8
    assert estimated_memory(eight, model, spatial=8)["optimizer"] == int(parameters * 2 * (1 + 4 / 256))

    offloaded = replace(train, block_offload=True, activation_offload=True)
    assert estimated_memory(offloaded, model, spatial=8) == full | {"weights": whole - block, "block_inputs": 0}
    host = estimated_host_memory(offloaded, model, spatial=8)
    # Pinned memory comes in powers of two: 64 x 64 and 64 numbers are some, six times 64 is none.
    table = 2 * (512 - 6 * 64)
    assert host == {"weights": 2 * (block + table), "block_inputs": 2 * 2048}


@pytest.mark.parametrize("name", EXAMPLE_MODELS)
def test_example_config_states_its_computed_memory(name):
    path, facts = EXAMPLES / f"{name}.toml", MODELS[EXAMPLE_MODELS[name]]
    train = TrainConfig.load(path)
    assert train.model == facts.repository and train.frame_rate == facts.frame_rate
    parts = estimated_memory(train, facts.transformer_config, facts.vae_stride[1])
    stated = dict(re.findall(r"^# +(\w+) +([\d.]+) GiB", path.read_text(), flags=re.MULTILINE))
    computed = {part: f"{size / 2**30:.1f}" for part, size in parts.items()}
    assert stated == computed | {"sum": f"{sum(parts.values()) / 2**30:.1f}"}


def test_readme_states_the_computed_memory_of_small_cards(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    text = (Path(diffusers_fvg.training.__file__).parent / "README.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert len(rows) == 9
    columns = [
        ("wan2.2-ti2v-5b", (121, 704, 1280)),
        ("wan2.2-t2v-a14b", (81, 480, 832)),
        ("wan2.2-t2v-a14b", (49, 480, 832)),
    ]
    values = {"fp8": ("quantize", "fp8"), "nf4": ("quantize", "nf4"), "adamw-8bit": ("optimizer", "adamw-8bit")}
    options = {}
    for name, *stated in rows:
        on_host = name.startswith("...")
        if not on_host:
            options = dict(values.get(value, (value, True)) for value in re.findall(r"`([\w-]+)`", name))
        for number, (example, bucket) in zip(stated, columns):
            train, facts = TrainConfig.load(EXAMPLES / f"{example}.toml"), MODELS[EXAMPLE_MODELS[example]]
            train = replace(train, rank=32, buckets=(bucket,), **options)
            estimate = estimated_host_memory if on_host else estimated_memory
            parts = estimate(train, facts.transformer_config, facts.vae_stride[1])
            assert number == f"{sum(parts.values()) / 2**30:.1f}", (name, example)


@pytest.mark.parametrize("name", EXAMPLE_MODELS)
def test_example_config_fits_its_model(name, tmp_path):
    """Sizes, targets and experts are right for a model of the published shape (empty: nothing is allocated)."""
    train, facts = TrainConfig.load(EXAMPLES / f"{name}.toml"), MODELS[EXAMPLE_MODELS[name]]
    with init_empty_weights():
        transformer = getattr(diffusers, facts.transformer_class).from_config(facts.transformer_config)
    check_model(transformer, train)
    height, width = (facts.vae_stride[axis] * facts.patch_size[axis] for axis in (1, 2))
    for bucket in train.buckets:
        assert bucket[0] % facts.frame_step == 1 and bucket[1] % height == 0 and bucket[2] % width == 0
    assert len(train.experts) == (2 if facts.boundary_ratio else 1)
    if train.distill_guidance:
        assert (*train.distill_guidance, train.negative_prompt) == (facts.guidance_scale, facts.negative_prompt)
    # No flow model, no shift.
    assert train.flow_shift in [size.flow_shift or 1 for size in facts.sizes]


def test_every_example_config_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.toml")} == set(EXAMPLE_MODELS)


def test_config_is_light(run_python):
    code = "import sys; from diffusers_fvg.training.config import TrainConfig; print('torch' in sys.modules)"
    assert run_python(code, new_interpreter=True) == "False\n"


def test_the_accelerate_config_is_one_that_the_trainer_takes():
    launched = load_config_from_file(str(EXAMPLES / "fsdp2.yaml"))
    assert launched.distributed_type == "FSDP" and launched.fsdp_config["fsdp_version"] == 2
    assert not launched.fsdp_config["fsdp_activation_checkpointing"]


def test_a_config_for_other_people_has_no_paths(tmp_path):
    (tmp_path / "org" / "base").mkdir(parents=True)
    values = {"model": str(tmp_path / "org" / "base"), "data": "org/videos", "output_dir": str(tmp_path), "rank": 4}
    assert without_paths(values) == {"model": "base", "data": "org/videos", "output_dir": tmp_path.name, "rank": 4}
    assert without_paths({"validation_anchors": ["/home/somebody/a.png"]}) == {"validation_anchors": ["a.png"]}
    shown = without_paths({"teacher_lora": "/home/somebody/outputs/anchor", "anchor_window": None})
    assert shown == {"teacher_lora": "anchor"}
