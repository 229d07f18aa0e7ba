import re
from pathlib import Path

import pytest
from diffusers import WanTransformer3DModel
from tiny import TRANSFORMER_CONFIG
from training_runs import OPTIONS

from diffusers_fvg.training.config import TrainConfig
from diffusers_fvg.training.estimate import estimated_memory


EXAMPLES = Path(__file__).parents[2] / "examples" / "training"
PLACES = {"model": "m", "data": "d", "cache_dir": "c", "output_dir": "o"}

# Of the models' own `transformer/config.json`.
WAN = {"patch_size": (1, 2, 2), "attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256}
WAN_SIZES = {
    "wan2.2-ti2v-5b": (16, {"num_layers": 30, "num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48}),
    "wan2.1-t2v-1.3b": (8, {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960, "in_channels": 16}),
    "wan2.2-t2v-a14b": (8, {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824, "in_channels": 16}),
}


def config(**options) -> TrainConfig:
    return TrainConfig(**PLACES | OPTIONS | options)


def test_load_gives_back_what_to_toml_wrote(tmp_path):
    written = config(data='a "quoted" \\ path \u00e4', experts=["transformer", "transformer_2"], anchor_noise=0.2)
    (tmp_path / "c.toml").write_text(written.to_toml(), encoding="utf-8")
    assert TrainConfig.load(tmp_path / "c.toml") == written


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rnak = 8", r"unknown keys \['rnak'\]; known ones are .*rank"),
        ("rank = 8\nrank = 9", "no valid TOML"),
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
        ({"buckets": [[1, 32, 32]]}, "a clip of one frame has no motion"),
        ({"experts": ["transformer_3"]}, r"may hold \['transformer', 'transformer_2'\]"),
        ({"targets": ["to_q", "to_q"]}, "each thing once"),
        ({"warmup_steps": 7}, "must be below steps=7"),
        ({"anchor_probability": 0}, "trains no anchor"),
        ({"timestep_density": "uniform", "timestep_std": 2.0}, "has no effect"),
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
    assert parts["lora"] == 16 * 3 * 4 * (24 + 24)
    # 3 latent frames of 2 x 2 patches, two clips.
    assert parts["block_inputs"] == 2 * (2 * 12) * 24 * 4


@pytest.mark.parametrize("name", WAN_SIZES)
def test_example_config_states_its_computed_memory(name):
    path = EXAMPLES / f"{name}.toml"
    spatial, sizes = WAN_SIZES[name]
    shape = WAN | sizes | {"out_channels": sizes["in_channels"]}
    parts = estimated_memory(TrainConfig.load(path), shape, spatial)
    stated = dict(re.findall(r"^# +(\w+) +([\d.]+) GiB", path.read_text(), flags=re.MULTILINE))
    computed = {part: f"{size / 2**30:.1f}" for part, size in parts.items()}
    assert stated == computed | {"sum": f"{sum(parts.values()) / 2**30:.1f}"}


def test_every_example_config_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.toml")} == set(WAN_SIZES)


def test_config_is_light(run_python):
    code = "import sys; from diffusers_fvg.training.config import TrainConfig; print('torch' in sys.modules)"
    assert run_python(code) == "False\n"
