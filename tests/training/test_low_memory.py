"""Training with a quantized base and with offloaded weights and activations, compared with plain training."""

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from forked import finish
from safetensors.torch import load_file
from tiny import tiny_transformer
from tiny_cogvideox import tiny_cogvideox_transformer
from torch.autograd.graph import saved_tensors_hooks
from training_runs import (
    losses,
    save_cogvideox_model,
    save_config,
    save_model,
    save_videos,
    start,
    tiny_config,
)

from diffusers_fvg import AnchorLora
from diffusers_fvg.animate.transformer_anchor import AnchorConditionedTransformer3D
from diffusers_fvg.lora.anchor_lora import WEIGHT_NAME
from diffusers_fvg.training import low_memory
from diffusers_fvg.training.loop import check_model
from diffusers_fvg.training.low_memory import blocks_of, offload_blocks, quantize_base, quantized_layers
from diffusers_fvg.training.trainer import main_train


HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs the package bitsandbytes")
OFFLOADED = {"block_offload": True, "activation_offload": True}
# What makes other numbers, and how far from those of the full base the tiny model's loss of 1.5 may be.
FORMS = [
    pytest.param({"quantize": "fp8"}, 0.005, id="fp8", marks=pytest.mark.slow),
    pytest.param({"quantize": "fp8"} | OFFLOADED, 0.005, id="fp8, offloaded"),
    pytest.param({"quantize": "nf4", "rank": 64}, 0.02, id="nf4", marks=needs_bitsandbytes),
    pytest.param({"optimizer": "adamw-8bit", "rank": 64}, 0.02, id="adamw-8bit", marks=needs_bitsandbytes),
]


# Of 64 channels, which bitsandbytes stores in 4 bits.
WIDE = {"attention_head_dim": 32, "ffn_dim": 128}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("low_memory")
    return save_model(root / "model"), save_videos(root / "data")


@pytest.fixture(scope="module")
def wide(places, tmp_path_factory):
    root = tmp_path_factory.mktemp("wide")
    shutil.copytree(places[0], root / "model")
    tiny_transformer(**WIDE).save_pretrained(root / "model" / "transformer")
    return root / "model", places[1]


@pytest.fixture(scope="module")
def whole(places, wide, tmp_path_factory):
    """Runs without any of it: of the tiny model, and where it is needed of one for bitsandbytes, whose moments have 8 bits of
    tensors as large as a rank of 64 makes them."""
    configs = {4: tiny_config(*places, tmp_path_factory.mktemp("whole"))}
    if HAS_BITSANDBYTES:
        configs[64] = tiny_config(*wide, tmp_path_factory.mktemp("whole"), rank=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        torch.set_num_threads(1)
        for config in configs.values():
            run(config)
    return configs


def run(config) -> dict[str, torch.Tensor]:
    main_train(save_config(config, Path(config.output_dir) / "run.toml"))
    return load_file(Path(config.output_dir) / WEIGHT_NAME)


def finished(config) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir) / WEIGHT_NAME)


def assert_equal(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", [*(pytest.param(name, marks=pytest.mark.slow) for name in OFFLOADED), "both"])
def test_what_is_offloaded_changes_no_bit(name, whole, tmp_path):
    options = OFFLOADED if name == "both" else {name: True}
    config = replace(whole[4], output_dir=str(tmp_path))
    # It may change when a run goes on.
    run(replace(config, steps=4))
    assert_equal(run(replace(config, **options)), finished(whole[4]))
    assert losses(tmp_path) == losses(Path(whole[4].output_dir))


@pytest.mark.parametrize(("options", "near"), FORMS)
def test_losses_are_near_those_of_the_full_base_and_a_stopped_run_is_bit_equal(options, near, whole, tmp_path):
    full = whole[options.get("rank", 4)]
    config = replace(full, output_dir=str(tmp_path / "whole"), **options)
    learnt = run(config)
    pairs = list(zip(losses(tmp_path / "whole"), losses(Path(full.output_dir))))
    assert len(pairs) == 7 and all(abs(ours[1] - theirs[1]) < near for ours, theirs in pairs)
    assert any(ours != theirs for ours, theirs in pairs)

    config = replace(config, output_dir=str(tmp_path / "stopped"))
    run(replace(config, steps=4))
    assert_equal(run(config), learnt)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")

    # As any other LoRA: in a stock pipeline of the full base, and in ours.
    inputs = {"hidden_states": torch.randn(1, 16, 3, 4, 4), "encoder_hidden_states": torch.randn(1, 8, 32)}
    inputs |= {"timestep": torch.tensor([500.0]), "return_dict": False}
    pipe = WanPipeline.from_pretrained(full.model)
    ours = AnchorConditionedTransformer3D.from_stock(WanPipeline.from_pretrained(full.model).transformer)
    with torch.no_grad():
        base = pipe.transformer(**inputs)[0]
        pipe.load_lora_weights(tmp_path / "whole" / "weights")
        AnchorLora.from_pretrained(tmp_path / "whole").load_into(ours, "transformer")
        torch.testing.assert_close(ours(**inputs)[0], pipe.transformer(**inputs)[0], rtol=1e-4, atol=1e-5)
        assert (ours(**inputs)[0] - base).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(("options", "near"), FORMS)
def test_two_processes_are_as_one(options, near, places, wide, tmp_path):
    config = tiny_config(*(wide if "rank" in options else places), tmp_path / "two", **options)
    finish(start(save_config(config, tmp_path / "run.toml"), num_processes=2))
    run(replace(config, output_dir=str(tmp_path / "one"), batch_size=2))
    expected = [loss for _, loss in losses(tmp_path / "one")]
    assert [loss for _, loss in losses(tmp_path / "two")] == pytest.approx(expected, abs=near)


@pytest.mark.slow
def test_cogvideox_is_trained_so_too(places, tmp_path):
    model = save_cogvideox_model(tmp_path / "model")
    options = {"targets": ["to_q", "to_k", "to_v"], "timestep_density": "uniform", "flow_shift": 1.0, "steps": 3}
    options["cache_dir"] = str(tmp_path / "cache")
    full = run(tiny_config(model, places[1], tmp_path / "full", **options))
    assert_equal(run(tiny_config(model, places[1], tmp_path / "off", **options | OFFLOADED)), full)
    run(tiny_config(model, places[1], tmp_path / "fp8", quantize="fp8", **options | OFFLOADED))
    ours, theirs = losses(tmp_path / "fp8"), losses(tmp_path / "full")
    assert ours != theirs and all(abs(a[1] - b[1]) < 0.02 for a, b in zip(ours, theirs))


def with_lora(make=tiny_transformer, targets=("to_q", "ff.net.0.proj", "ffn.net.2"), **options):
    from peft import LoraConfig

    transformer = make(**options)
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=2, target_modules=list(targets)), "anchor")
    return transformer


@pytest.mark.parametrize("make", [tiny_transformer, tiny_cogvideox_transformer])
def test_layers_of_the_blocks_are_stored_in_8_bits_and_the_lora_in_32(make):
    transformer = with_lora(make)
    layers = dict(quantized_layers(transformer, "fp8"))
    quantize_base(transformer, "fp8", torch.device("cpu"))
    narrow = {name for name, p in transformer.named_parameters() if p.dtype == torch.float8_e4m3fn}
    stored = {f"{name}.{part}" for name, layer in layers.items() for part, _ in layer.named_parameters()}
    # What stands before and behind the blocks may be left to diffusers.
    assert stored == {name for name in narrow if "blocks." in name}
    assert any(name.endswith("to_q.base_layer.weight") for name in narrow)
    assert all(p.dtype == torch.float32 for p in transformer.parameters() if p.requires_grad)


def test_one_activation_of_each_block_goes_to_the_computers_memory(places, tmp_path, monkeypatch):
    moved, returned = [], []

    def recording(pin_memory):
        assert not pin_memory
        return saved_tensors_hooks(lambda x: moved.append(tuple(x.shape)) or x, lambda x: returned.append(x) or x)

    monkeypatch.setattr(low_memory, "save_on_cpu", recording)
    run(tiny_config(*places, tmp_path, steps=1, warmup_steps=0, activation_offload=True))
    # Two blocks, three latent frames of 2 x 2 tokens.
    assert moved == [(1, 3 * 2 * 2, 24)] * 2 and len(returned) == 2


def test_blocks_run_with_copies_that_their_backward_finds():
    """The weights are on a device that cannot compute, so only copies can have been used."""
    transformer, expected = (with_lora(anchored=True) for _ in range(2))
    inputs = {"hidden_states": torch.randn(1, 16, 3, 4, 4), "encoder_hidden_states": torch.randn(1, 8, 32)}
    inputs |= {"timestep": torch.tensor([500.0]), "return_dict": False}
    for model in (transformer, expected):
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
        model.enable_gradient_checkpointing()
    values = {name: p.clone() for name, p in blocks_of(transformer).named_parameters() if not p.requires_grad}
    offload_blocks(transformer, torch.device("cpu"))
    for block in blocks_of(transformer):
        frozen = block.forward.frozen
        for name, parameter in frozen.items():
            index = list(blocks_of(transformer)).index(block)
            frozen[name] = Elsewhere(values[f"{index}.{name.removeprefix('block.')}"])
            parameter.data = torch.full_like(parameter, float("nan"))
    for model in (transformer, expected):
        model.train()(**inputs)[0].square().mean().backward()
    gradients = {name: p.grad for name, p in expected.named_parameters() if p.requires_grad}
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    assert all(torch.equal(p.grad, gradients[n]) for n, p in transformer.named_parameters() if p.requires_grad)


@needs_bitsandbytes
def test_4_bits_are_those_of_the_weights(tmp_path):
    """Each of 64 numbers the nearest of 16 (QLoRA, arXiv 2305.14314, appendix E) times the largest of them, which is itself
    stored in 8 bits."""
    levels = [-1, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0, 0.0795803, 0.1609302]
    levels = torch.tensor([*levels, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1])
    transformer = with_lora(**WIDE)
    before = {name: layer.weight.detach().clone() for name, layer in quantized_layers(transformer, "nf4")}
    for weight in before.values():
        torch.nn.init.normal_(weight, std=0.02, generator=torch.Generator().manual_seed(0))
    for name, layer in quantized_layers(transformer, "nf4"):
        layer.weight.data.copy_(before[name])
    quantize_base(transformer, "nf4", torch.device("cpu"))
    from bitsandbytes.nn import Linear4bit

    made = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, Linear4bit)}
    assert made.keys() == before.keys() and "blocks.1.ffn.net.2.base_layer" in made
    x = torch.eye(128)
    for name, layer in made.items():
        found = layer(x[: layer.in_features, : layer.in_features]).T - layer.bias[:, None]
        rows = before[name].reshape(-1, 64)
        largest = rows.abs().amax(dim=1, keepdim=True)
        expected = levels[((rows / largest)[:, :, None] - levels).abs().argmin(dim=2)] * largest
        assert (found - expected.reshape(found.shape)).norm() < 0.01 * expected.norm()
    transformer = with_lora()
    with pytest.raises(ValueError, match="no layer of the transformer has `in_features` that are a multiple of 64"):
        check_model(transformer, tiny_config(tmp_path, tmp_path, tmp_path, quantize="nf4"))


class Elsewhere:
    """A weight that can only be copied."""

    def __init__(self, values: torch.Tensor):
        self.values = values

    def to(self, device, non_blocking):
        return self.values.to(device).clone()


@pytest.mark.skipif(HAS_BITSANDBYTES, reason="bitsandbytes is installed")
@pytest.mark.parametrize("options", [{"quantize": "nf4"}, {"optimizer": "adamw-8bit"}])
def test_a_package_that_is_absent_is_told_of_early(options, places, tmp_path):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"`{name}='{value}'` needs `pip install bitsandbytes`, or {name}="):
        tiny_config(*places, tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_offload": True}, "`activation_offload=True` needs gradient_checkpointing=true"),
        ({"block_offload": True}, "`block_offload=True` needs gradient_checkpointing=true"),
        ({"quantize": "fp8"}, "`quantize='fp8'` needs gradient_checkpointing=true"),
        ({"quantize": "nf4", "block_offload": True, "gradient_checkpointing": True}, "needs block_offload=false"),
    ],
)
def test_options_that_belong_together(options, message, places, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match=message):
        tiny_config(*places, tmp_path, **{"gradient_checkpointing": False} | options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_offloaded_blocks_are_not_on_the_device():
    transformer = with_lora(anchored=True)
    offload_blocks(transformer, torch.device("cuda"))
    for parameter in blocks_of(transformer).parameters():
        assert parameter.is_cuda == parameter.requires_grad
    inputs = {"hidden_states": torch.randn(1, 16, 3, 4, 4), "encoder_hidden_states": torch.randn(1, 8, 32)}
    inputs = {name: value.cuda() for name, value in inputs.items()} | {"timestep": torch.tensor([500.0]).cuda()}
    transformer.enable_gradient_checkpointing()
    transformer.train()(**inputs, return_dict=False)[0].square().mean().backward()
    assert all(p.grad.is_cuda for p in transformer.parameters() if p.requires_grad)
