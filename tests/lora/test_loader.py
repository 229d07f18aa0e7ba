"""LoRA files of all formats against plain addition to the weights: each is written from the same known deltas."""

import json
import logging
import math

import PIL.Image
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from diffusers.utils.logging import get_logger
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from tiny import tiny_pipeline, tiny_transformer
from torch._dynamo.testing import CompileCounter

from diffusers_fvg.lora.anchor_lora import AnchorLora
from diffusers_fvg.lora.formats import module_names
from diffusers_fvg.lora.loader import FactorizedVideoLoraLoaderMixin, LoraReport, load_lora


TOLERANCE = {"rtol": 0, "atol": 1e-5}
RANK, ALPHA = 3, 2.0  # alpha / rank is not a power of two: it cannot hide in rounding

# Layers under diffusers' name and under Wan's, with a layer of each kind that LoRAs are trained on.
LAYERS = {
    "blocks.0.attn1.to_q": "blocks.0.self_attn.q",
    "blocks.0.attn1.to_k": "blocks.0.self_attn.k",
    "blocks.0.attn1.to_v": "blocks.0.self_attn.v",
    "blocks.0.attn1.to_out.0": "blocks.0.self_attn.o",
    "blocks.1.attn2.to_q": "blocks.1.cross_attn.q",
    "blocks.1.attn2.to_k": "blocks.1.cross_attn.k",
    "blocks.1.attn2.to_v": "blocks.1.cross_attn.v",
    "blocks.1.attn2.to_out.0": "blocks.1.cross_attn.o",
    "blocks.0.ffn.net.0.proj": "blocks.0.ffn.0",
    "blocks.1.ffn.net.2": "blocks.1.ffn.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
}
# Deltas of single tensors: parameter -> LightX2V's key.
DELTAS = {
    "blocks.0.attn1.to_v.bias": "blocks.0.self_attn.v.diff_b",
    "blocks.1.attn1.to_q.bias": "blocks.1.self_attn.q.diff_b",
    "blocks.1.attn1.to_k.weight": "blocks.1.self_attn.k.diff",
    "blocks.1.ffn.net.0.proj.weight": "blocks.1.ffn.0.diff",
    "blocks.1.ffn.net.0.proj.bias": "blocks.1.ffn.0.diff_b",
    "blocks.0.ffn.net.2.weight": "blocks.0.ffn.2.diff",
    "patch_embedding.weight": "patch_embedding.diff",
    "patch_embedding.bias": "patch_embedding.diff_b",
    "blocks.0.attn1.norm_q.weight": "blocks.0.self_attn.norm_q.diff",
    "blocks.1.attn2.norm_k.weight": "blocks.1.cross_attn.norm_k.diff",
    "blocks.0.norm2.weight": "blocks.0.norm3.diff",
    "blocks.0.norm2.bias": "blocks.0.norm3.diff_b",
    "blocks.1.scale_shift_table": "blocks.1.diff_m",
    "scale_shift_table": "head.diff_m",
}
# Those that PEFT has no layer for.
IN_PARAMETERS = [name for name in DELTAS if "norm" in name or "table" in name or name.endswith(".bias")]


class Pipeline(FactorizedVideoLoraLoaderMixin, WanPipeline):
    pass


def make_pipeline(two_experts=False):
    return Pipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=UniPCMultistepScheduler(),
        transformer=tiny_transformer(anchored=True),
        transformer_2=tiny_transformer(anchored=True, seed=1) if two_experts else None,
        boundary_ratio=0.5 if two_experts else None,
    )


def make_pairs(seed=0, layers=LAYERS, rank=RANK):
    """layer -> (A, B), the same for the same seed; as large as the weights, so that a lost layer shows."""
    generator = torch.Generator().manual_seed(seed)
    model = tiny_transformer()
    pairs = {}
    for layer in layers:
        weight = model.get_submodule(layer).weight
        pairs[layer] = (
            torch.randn(rank, weight.shape[1], generator=generator) / 5,
            torch.randn(weight.shape[0], rank, generator=generator) / 5,
        )
    return pairs


def make_deltas(seed=0):
    generator = torch.Generator().manual_seed(seed + 100)
    model = tiny_transformer()
    return {name: torch.randn(model.get_parameter(name).shape, generator=generator) / 5 for name in DELTAS}


@torch.no_grad()
def run(transformer, **kwargs):
    generator = torch.Generator().manual_seed(9)
    return transformer(
        torch.randn(1, 16, 2, 4, 4, generator=generator),
        torch.tensor([500.0]),
        torch.randn(1, 5, 32, generator=generator),
        return_dict=False,
        **kwargs,
    )[0]


@torch.no_grad()
def merged(*adapters, seed=0):
    """The model with deltas in its weights, in float64: `(pairs, scale)` or `({parameter: delta}, scale)`."""
    model = tiny_transformer(anchored=True, seed=seed)
    for tensors, scale in adapters:
        for name, value in tensors.items():
            if isinstance(value, tuple):
                delta, name = (value[1].double() @ value[0].double()), name + ".weight"
            else:
                delta = value.double()
            parameter = model.get_parameter(name)
            parameter.copy_(parameter.double() + scale * delta)
    return model


SCALE = ALPHA / RANK


def in_form(layer_form, names="wan", down="lora_A", up="lora_B", leaf=".weight", alpha=False, flat=False):
    """Writer of a format: `layer_form` holds `{}` for the layer's name."""

    def write(pairs, scale=SCALE):
        tensors = {}
        for layer, (a, b) in pairs.items():
            name = LAYERS[layer] if names == "wan" else layer
            name = layer_form.format(name.replace(".", "_") if flat else name)
            tensors[f"{name}.{down}{leaf}"] = a.clone()
            tensors[f"{name}.{up}{leaf}"] = b.clone() if alpha else b * scale
            if alpha:
                tensors[f"{name}.alpha"] = torch.tensor(scale * a.shape[0])
        return tensors

    return write


FORMATS = {
    "diffusers": in_form("transformer.{}", names="diffusers"),
    "diffusers without prefix": in_form("{}", names="diffusers"),
    "diffusers with alpha": in_form("transformer.{}", names="diffusers", alpha=True),
    "peft": in_form("base_model.model.{}", names="diffusers"),
    "peft with adapter name": in_form("base_model.model.{}", names="diffusers", leaf=".some_name.weight"),
    "peft with adapter name, without prefix": in_form("{}", names="diffusers", leaf=".default_0.weight"),
    "peft of the raw model": in_form("base_model.model.{}"),
    "raw": in_form("{}"),
    "diffsynth": in_form("{}", leaf=".default.weight"),
    "diffsynth with prefix": in_form("diffusion_model.{}", leaf=".default.weight"),
    "diffsynth before its prefix is removed": in_form("pipe.dit.{}", leaf=".default.weight"),
    "comfyui": in_form("diffusion_model.{}"),
    "comfyui with alpha": in_form("diffusion_model.{}", alpha=True),
    "comfyui with down and up": in_form("diffusion_model.{}", down="lora_down", up="lora_up", alpha=True),
    "lightx2v": in_form("diffusion_model.{}", down="lora_down", up="lora_up"),
    "musubi": in_form("lora_unet_{}", down="lora_down", up="lora_up", alpha=True, flat=True),
    "videox-fun": in_form("lora_unet__{}", down="lora_down", up="lora_up", alpha=True, flat=True),
    "kohya of the diffusers model": in_form(
        "lora_unet_{}", names="diffusers", down="lora_down", up="lora_up", alpha=True, flat=True
    ),
    "tensors without a leaf": in_form("transformer.{}", names="diffusers", leaf=""),
}
EXPERT_FORMATS = {
    "diffusers": (
        in_form("transformer.{}", names="diffusers"),
        in_form("transformer_2.{}", names="diffusers"),
    ),
    "ai-toolkit": (in_form("diffusion_model.transformer_1.{}"), in_form("diffusion_model.transformer_2.{}")),
    "noise names": (in_form("high_noise.{}", alpha=True), in_form("low_noise.{}", alpha=True)),
    "noise models": (
        in_form("high_noise_model.diffusion_model.{}"),
        in_form("diffusion_model.low_noise_model.{}"),
    ),
    "diffsynth": (in_form("pipe.dit.{}", leaf=".default.weight"), in_form("pipe.dit2.{}", leaf=".default.weight")),
    "kohya": (
        in_form("lora_unet_high_noise_{}", down="lora_down", up="lora_up", alpha=True, flat=True),
        in_form("lora_unet_low_noise_model_{}", down="lora_down", up="lora_up", alpha=True, flat=True),
    ),
}
DIFFUSERS = FORMATS["diffusers"]


def lightx2v(pairs, deltas):
    """A file as LightX2V extracts it: low rank for the large matrices, plain differences for the rest."""
    tensors = FORMATS["lightx2v"](pairs)
    return tensors | {f"diffusion_model.{DELTAS[name]}": delta.clone() for name, delta in deltas.items()}


@pytest.fixture
def warnings(caplog):
    """Messages of this package's logger, which does not propagate (it is diffusers' logging)."""
    logger = get_logger("diffusers_fvg.lora.loader")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


# -- formats ----------------------------------------------------------------------------------------------------------


def test_wan_names_are_those_of_the_stock_checkpoint_converter():
    model = tiny_transformer(num_layers=1, image_dim=8, added_kv_proj_dim=24)
    block = "blocks.0."
    attention = [f"{block}{kind}_attn.{part}" for kind in ("self", "cross") for part in ("q", "k", "v", "o")]
    norms = [f"{block}{kind}_attn.norm_{part}" for kind in ("self", "cross") for part in ("q", "k")]
    image = [f"{block}cross_attn.{part}" for part in ("k_img", "v_img", "norm_k_img")]
    embedders = ["time_embedding.0", "time_embedding.2", "text_embedding.0", "text_embedding.2", "time_projection.1"]
    embedders += ["img_emb.proj.0", "img_emb.proj.1", "img_emb.proj.3", "img_emb.proj.4"]
    rest = [f"{block}ffn.0", f"{block}ffn.2", f"{block}norm3", "patch_embedding", "head.head"]
    wan = attention + norms + image + embedders + rest
    names = module_names(model)
    for name in wan:
        (stock,) = convert_wan_transformer_to_diffusers({f"{name}.weight": torch.zeros(1)})
        assert f"{names[name]}.weight" == stock
        assert names[name.replace(".", "_")] == names[name]
        assert isinstance(model.get_parameter(stock), torch.nn.Parameter)
    # Nothing with weights is left without a name.
    layers = {name.rpartition(".")[0] for name, _ in model.named_parameters() if "scale_shift_table" not in name}
    assert layers == {names[name] for name in wan}


@pytest.mark.parametrize("name", FORMATS)
def test_format_equals_merged_weights(name):
    pairs = make_pairs()
    reference = run(merged((pairs, SCALE)))
    tensors = FORMATS[name](pairs)
    transformer = tiny_transformer(anchored=True)
    assert not torch.allclose(run(transformer), reference, rtol=0, atol=1e-2)

    report = load_lora(transformer, tensors)

    torch.testing.assert_close(run(transformer), reference, **TOLERANCE)
    assert report.unmatched == {}
    assert report.matched.keys() == tensors.keys()
    assert set(report.matched.values()) == {f"transformer.{layer}" for layer in LAYERS}
    assert report.adapters == {"transformer": "default_0"}


@pytest.mark.parametrize("name", ["comfyui with alpha", "musubi"])
def test_complete_files_load_as_in_stock_diffusers(name):
    parts = {"self_attn": "attn1", "cross_attn": "attn2"}
    outputs = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
    layers = {
        f"blocks.{n}.{parts[part]}.{outputs[letter]}": f"blocks.{n}.{part}.{letter}"
        for n in range(2)
        for part in parts
        for letter in outputs
    }
    layers |= {
        f"blocks.{n}.ffn.net.{k}": f"blocks.{n}.ffn.{i}" for n in range(2) for i, k in ((0, "0.proj"), (2, "2"))
    }
    pairs = make_pairs(layers=layers)
    form = "lora_unet_{}" if name == "musubi" else "diffusion_model.{}"
    tensors = {}
    for layer, (a, b) in pairs.items():
        key = form.format(layers[layer].replace(".", "_") if name == "musubi" else layers[layer])
        tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(ALPHA)}
    stock = WanPipeline(None, None, None, UniPCMultistepScheduler(), tiny_transformer(anchored=True))
    stock.load_lora_weights({key: value.clone() for key, value in tensors.items()})
    ours = tiny_transformer(anchored=True)
    load_lora(ours, tensors)
    torch.testing.assert_close(run(ours), run(stock.transformer), **TOLERANCE)


def test_image_layers_and_a_module_without_weights():
    model = tiny_transformer(anchored=True, num_layers=1, image_dim=8, added_kv_proj_dim=24)
    a, b = torch.randn(2, 24), torch.randn(24, 2)
    tensors = {
        "diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight": a,
        "diffusion_model.blocks.0.cross_attn.k_img.lora_B.weight": b,
        "diffusion_model.blocks.0.cross_attn.norm_k_img.diff": torch.ones(24),
        # In Wan's code norm2 has no weights; it is not diffusers' norm2, which has.
        "diffusion_model.blocks.0.norm2.diff": torch.ones(24),
    }
    before = model.blocks[0].attn2.norm_added_k.weight.clone()
    base = model.blocks[0].attn2.add_k_proj.weight.clone()
    report = load_lora(model, tensors)
    assert list(report.unmatched) == ["diffusion_model.blocks.0.norm2.diff"]
    torch.testing.assert_close(model.blocks[0].attn2.norm_added_k.weight, before + 1)
    model.fuse_lora()
    torch.testing.assert_close(model.blocks[0].attn2.add_k_proj.weight, base + b @ a, **TOLERANCE)


# -- alpha ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_alpha_from_the_header_that_diffusers_writes(tmp_path, rslora):
    pairs = make_pairs()
    config = {
        "r": RANK,
        "lora_alpha": ALPHA,
        "alpha_pattern": {"blocks.1.attn2.to_k": 5.0},
        "use_rslora": rslora,
    }
    root = math.sqrt(RANK) if rslora else RANK
    WanPipeline.save_lora_weights(
        tmp_path,
        {f"{layer}.lora_{x}.weight": pair[i] for layer, pair in pairs.items() for i, x in enumerate("AB")},
        transformer_lora_adapter_metadata=config,
    )
    scaled = {
        layer: (a, b * (5.0 if layer == "blocks.1.attn2.to_k" else ALPHA) / root) for layer, (a, b) in pairs.items()
    }
    transformer = tiny_transformer(anchored=True)
    load_lora(transformer, tmp_path)
    torch.testing.assert_close(run(transformer), run(merged((scaled, 1))), **TOLERANCE)


def test_folder_written_by_peft(tmp_path):
    model = get_peft_model(
        tiny_transformer(anchored=True),
        LoraConfig(r=RANK, lora_alpha=7, target_modules=["to_q", "ffn.net.2"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path)
    transformer = tiny_transformer(anchored=True)
    report = load_lora(transformer, tmp_path)
    assert report.unmatched == {}
    torch.testing.assert_close(run(transformer), run(model.base_model.model), **TOLERANCE)

    # The file alone does not know its alpha.
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="adapter_config.json"):
        load_lora(transformer, tmp_path, "again")

    # In memory, alpha equals the rank unless said otherwise.
    tensors = get_peft_model_state_dict(model.base_model.model)
    transformer = tiny_transformer(anchored=True)
    header = {"lora_adapter_metadata": json.dumps({"r": RANK, "lora_alpha": 7})}
    load_lora(transformer, tensors, metadata=header)
    torch.testing.assert_close(run(transformer), run(model.base_model.model), **TOLERANCE)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_alpha_does_not_round_a_low_precision_file(alpha):
    # 2 / 3 is not a bfloat16 times a bfloat16; 1 / 2 and its like are.
    rank = 3 if alpha == 2 else 2
    pairs = {layer: (a.bfloat16(), b.bfloat16()) for layer, (a, b) in make_pairs(rank=rank).items()}
    transformer = tiny_transformer(anchored=True)
    load_lora(transformer, FORMATS["musubi"](pairs, alpha / rank))
    torch.testing.assert_close(run(transformer), run(merged((pairs, alpha / rank))), **TOLERANCE)


def test_different_ranks_in_one_file():
    pairs = {
        layer: pair for n, layer in enumerate(LAYERS) for pair in make_pairs(layers=[layer], rank=1 + n % 3).values()
    }
    transformer = tiny_transformer(anchored=True)
    load_lora(transformer, FORMATS["musubi"](pairs, 0.7))
    torch.testing.assert_close(run(transformer), run(merged((pairs, 0.7))), **TOLERANCE)


# -- deltas of whole tensors ------------------------------------------------------------------------------------------


def base_state(transformer):
    return {
        name.replace(".base_layer", ""): value.clone()
        for name, value in transformer.state_dict().items()
        if ".lora_" not in name
    }


def test_lightx2v_deltas_in_every_state_of_an_adapter():
    pairs, deltas = make_pairs(), make_deltas()
    other = make_pairs(seed=1)

    def reference(strength=0.0, other_strength=0.0):
        return run(merged((pairs, SCALE * strength), (deltas, strength), (other, SCALE * other_strength)))

    pipe = make_pipeline()
    transformer = pipe.transformer
    before = base_state(transformer)
    report = pipe.load_lora_weights(lightx2v(pairs, deltas), "fast", strength=0.5)
    assert report.unmatched == {}
    assert len(report.matched) == 2 * len(LAYERS) + len(DELTAS)
    torch.testing.assert_close(run(transformer), reference(0.5), **TOLERANCE)

    pipe.set_adapters("fast", 1.3)
    torch.testing.assert_close(run(transformer), reference(1.3), **TOLERANCE)
    torch.testing.assert_close(run(transformer, attention_kwargs={"scale": 0.5}), reference(0.65), **TOLERANCE)
    torch.testing.assert_close(run(transformer), reference(1.3), **TOLERANCE)

    pipe.load_lora_weights(DIFFUSERS(other), "other", strength=0.7)
    torch.testing.assert_close(run(transformer), reference(1.3, 0.7), **TOLERANCE)
    pipe.set_adapters("other")
    torch.testing.assert_close(run(transformer), reference(0, 1), **TOLERANCE)
    pipe.set_adapters(["fast", "other"], [1.0, 0.7])
    torch.testing.assert_close(run(transformer), reference(1, 0.7), **TOLERANCE)

    # A scale written into the layers takes effect, as with PEFT's own.
    transformer.parameter_deltas.scaling["fast"] = 0.0
    layers_only = {name: delta for name, delta in deltas.items() if name not in IN_PARAMETERS}
    expected = merged((pairs, SCALE), (layers_only, 1), (other, SCALE * 0.7))
    torch.testing.assert_close(run(transformer), run(expected), **TOLERANCE)
    transformer.parameter_deltas.scaling["fast"] = 1.0

    pipe.disable_lora()
    torch.testing.assert_close(run(transformer), reference(), **TOLERANCE)
    pipe.enable_lora()
    torch.testing.assert_close(run(transformer), reference(1, 0.7), **TOLERANCE)

    pipe.fuse_lora(adapter_names=["fast"])
    torch.testing.assert_close(run(transformer), reference(1), **TOLERANCE)
    pipe.unfuse_lora()
    torch.testing.assert_close(run(transformer), reference(1, 0.7), **TOLERANCE)

    pipe.delete_adapters("fast")
    torch.testing.assert_close(run(transformer), reference(0, 0.7), **TOLERANCE)
    pipe.unload_lora_weights()
    assert transformer.state_dict().keys() == before.keys()
    for name in IN_PARAMETERS:
        assert torch.equal(transformer.get_parameter(name), before[name])
    torch.testing.assert_close(run(transformer), reference(), **TOLERANCE)


def test_fused_deltas_stay_when_the_adapter_goes():
    pairs, deltas = make_pairs(), make_deltas()
    reference = run(merged((pairs, SCALE), (deltas, 1)))
    for take_out in ("unload_lora_weights", "delete_adapters"):
        pipe = make_pipeline()
        pipe.load_lora_weights(lightx2v(pairs, deltas), "fast")
        pipe.fuse_lora()
        getattr(pipe, take_out)(*(["fast"] if take_out == "delete_adapters" else []))
        torch.testing.assert_close(run(pipe.transformer), reference, **TOLERANCE)


def test_deltas_are_gone_after_unloading_the_transformer_itself():
    transformer, deltas = tiny_transformer(anchored=True), make_deltas()
    base = run(transformer)
    load_lora(transformer, lightx2v({}, deltas), "fast")
    assert not torch.allclose(run(transformer), base, atol=1e-2)
    transformer.unload_lora()
    assert torch.equal(run(transformer), base)
    load_lora(transformer, lightx2v({}, deltas), "fast", strength=2.0)
    torch.testing.assert_close(run(transformer), run(merged((deltas, 2))), **TOLERANCE)


def test_norm_and_modulation_deltas_alone_make_an_adapter():
    deltas = {name: delta for name, delta in make_deltas().items() if name in IN_PARAMETERS}
    pipe = make_pipeline()
    pipe.load_lora_weights(lightx2v({}, deltas), "norms")
    torch.testing.assert_close(run(pipe.transformer), run(merged((deltas, 1))), **TOLERANCE)
    pipe.set_adapters("norms", 0.25)
    torch.testing.assert_close(run(pipe.transformer), run(merged((deltas, 0.25))), **TOLERANCE)
    pipe.set_lora_device(["norms"], "cpu")


def test_bias_deltas_are_not_scaled_by_alpha_and_low_rank_biases_are():
    pairs = make_pairs(layers=["blocks.0.attn1.to_v", "blocks.1.ffn.net.2"])
    bias = torch.ones(24)
    tensors = FORMATS["comfyui with alpha"](pairs) | {"diffusion_model.blocks.0.self_attn.v.diff_b": bias}
    transformer = tiny_transformer(anchored=True)
    load_lora(transformer, tensors)
    torch.testing.assert_close(
        run(transformer), run(merged((pairs, SCALE), ({"blocks.0.attn1.to_v.bias": bias}, 1))), **TOLERANCE
    )
    # Biases on some layers only: stock diffusers ends with "cannot be called on meta tensors".
    tensors = FORMATS["diffusers with alpha"](pairs) | {"transformer.blocks.0.attn1.to_v.lora_B.bias": bias}
    transformer = tiny_transformer(anchored=True)
    load_lora(transformer, tensors)
    torch.testing.assert_close(
        run(transformer), run(merged((pairs, SCALE), ({"blocks.0.attn1.to_v.bias": bias}, SCALE))), **TOLERANCE
    )


# -- experts ----------------------------------------------------------------------------------------------------------


def check_experts(pipe, pairs, pairs_2, strength=1.0, strength_2=1.0):
    torch.testing.assert_close(run(pipe.transformer), run(merged((pairs, SCALE * strength))), **TOLERANCE)
    torch.testing.assert_close(
        run(pipe.transformer_2), run(merged((pairs_2, SCALE * strength_2), seed=1)), **TOLERANCE
    )


@pytest.mark.parametrize("name", EXPERT_FORMATS)
def test_both_experts_from_one_file(name, warnings):
    pairs, pairs_2 = make_pairs(), make_pairs(seed=1)
    pipe = make_pipeline(two_experts=True)
    high, low = EXPERT_FORMATS[name]
    report = pipe.load_lora_weights(high(pairs) | low(pairs_2), "a", strength=0.5, strength_2=1.5)
    assert report.adapters == {"transformer": "a", "transformer_2": "a"}
    assert report.unmatched == {} and warnings.text == ""
    check_experts(pipe, pairs, pairs_2, 0.5, 1.5)


def test_both_experts_from_two_files(tmp_path, warnings):
    pairs, pairs_2 = make_pairs(), make_pairs(seed=1)
    high, low = FORMATS["comfyui"](pairs), FORMATS["musubi"](pairs_2)
    save_file(high, tmp_path / "wan_HIGH_fp16.safetensors")
    save_file(low, tmp_path / "wan_LOW_fp16.safetensors")
    files = [tmp_path / "wan_HIGH_fp16.safetensors", tmp_path / "wan_LOW_fp16.safetensors"]
    for weights in ((high, low), files, tmp_path):
        pipe = make_pipeline(two_experts=True)
        report = pipe.load_lora_weights(weights, strength=2.0, strength_2=0.5)
        check_experts(pipe, pairs, pairs_2, 2.0, 0.5)
        assert len(report.matched) == len(high) + len(low)
    assert warnings.text == ""

    # One expert after the other, as in stock diffusers; diffusers' prefix does not say which.
    pipe = make_pipeline(two_experts=True)
    pipe.load_lora_weights(DIFFUSERS(pairs), adapter_name="a")
    assert "into `transformer` only" in warnings.text
    report = pipe.load_lora_weights(DIFFUSERS(pairs_2), adapter_name="a", load_into_transformer_2=True)
    assert report.adapters == {"transformer_2": "a"}
    check_experts(pipe, pairs, pairs_2)


def test_fusing_reaches_both_experts():
    pairs, pairs_2 = make_pairs(), make_pairs(seed=1)
    pipe = make_pipeline(two_experts=True)
    base = [run(expert) for expert in (pipe.transformer, pipe.transformer_2)]
    pipe.load_lora_weights((DIFFUSERS(pairs), DIFFUSERS(pairs_2)))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert not any(".lora_" in name for name in pipe.transformer_2.state_dict())
    check_experts(pipe, pairs, pairs_2)

    pipe = make_pipeline(two_experts=True)
    pipe.load_lora_weights((DIFFUSERS(pairs), DIFFUSERS(pairs_2)))
    pipe.fuse_lora()
    pipe.unfuse_lora()
    check_experts(pipe, pairs, pairs_2)
    pipe.unload_lora_weights()
    for expert, output in zip((pipe.transformer, pipe.transformer_2), base):
        torch.testing.assert_close(run(expert), output, **TOLERANCE)


def test_experts_that_are_not_there_or_not_meant():
    pairs = make_pairs()
    high, low = EXPERT_FORMATS["noise names"]
    pipe = make_pipeline()
    report = pipe.load_lora_weights(high(pairs) | low(pairs))
    assert set(report.unmatched) == set(low(pairs))
    assert set(report.unmatched.values()) == {"there is no `transformer_2`"}

    pipe = make_pipeline(two_experts=True)
    with pytest.raises(ValueError, match="names `transformer_2`"):
        pipe.load_lora_weights((low(pairs), high(pairs)))
    with pytest.raises(ValueError, match=r"`\(weights, weights\)`"):
        pipe.load_lora_weights(DIFFUSERS(pairs), strength_2=0.5)
    with pytest.raises(ValueError, match="pair"):
        pipe.load_lora_weights((DIFFUSERS(pairs),))
    assert not hasattr(pipe.transformer, "peft_config")


# -- nothing in silence -----------------------------------------------------------------------------------------------


def test_no_match_is_an_error():
    transformer = tiny_transformer(anchored=True)
    unknown = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(3, 3)}
    with pytest.raises(ValueError, match=r"lora_te_text_model.*Known formats: diffusers.*lora_unet_"):
        load_lora(transformer, unknown)
    # A LoRA of a wider model.
    wide = {
        key: torch.ones(value.shape[0] * 2, value.shape[1] * 2) for key, value in FORMATS["raw"](make_pairs()).items()
    }
    with pytest.raises(ValueError, match=r"blocks.0.self_attn.q.*do not fit"):
        load_lora(transformer, wide)
    with pytest.raises(ValueError, match="No key"):
        load_lora(transformer, {})
    assert not hasattr(transformer, "peft_config")


def test_half_dropped_file_is_reported(warnings):
    pairs = make_pairs()
    tensors = FORMATS["comfyui with alpha"](pairs)
    layer = "diffusion_model.blocks.1.cross_attn.k"
    del tensors[f"{layer}.lora_B.weight"]
    tensors["diffusion_model.blocks.7.self_attn.q.lora_A.weight"] = torch.ones(1, 24)
    tensors["diffusion_model.blocks.7.self_attn.q.lora_B.weight"] = torch.ones(24, 1)
    tensors["diffusion_model.blocks.0.norm1.diff"] = torch.ones(24)
    tensors["diffusion_model.blocks.0.self_attn.q.diff"] = torch.ones(24, 24)
    tensors["diffusion_model.blocks.0.self_attn.k.diff_m"] = torch.ones(24)
    tensors["diffusion_model.blocks.0.self_attn.k.diff_b"] = torch.ones(25)
    tensors["step"] = torch.ones(1)
    left = {
        f"{layer}.lora_A.weight": "other half",
        f"{layer}.alpha": "other half",
        "diffusion_model.blocks.7.self_attn.q.lora_A.weight": "no such module",
        "diffusion_model.blocks.7.self_attn.q.lora_B.weight": "no such module",
        "diffusion_model.blocks.0.norm1.diff": "FP32LayerNorm",
        "diffusion_model.blocks.0.self_attn.q.diff": "beside a low-rank one",
        "diffusion_model.blocks.0.self_attn.k.diff_m": "no parameter for `diff_m`",
        "diffusion_model.blocks.0.self_attn.k.diff_b": "(25,) is not the parameter's (24,)",
        "step": "not a known form",
    }
    transformer = tiny_transformer(anchored=True)
    base = run(transformer)
    with pytest.raises(ValueError, match="9 of 48 LoRA keys were not used.*blocks.1.cross_attn.k.lora_A.weight"):
        load_lora(transformer, tensors, strict=True)
    assert torch.equal(run(transformer), base) and not hasattr(transformer, "peft_config")

    report = load_lora(transformer, tensors)
    assert isinstance(report, LoraReport)
    assert report.unmatched.keys() == left.keys()
    assert all(reason in report.unmatched[key] for key, reason in left.items())
    assert report.matched.keys() == tensors.keys() - left.keys()
    assert "9 of 48 LoRA keys" in warnings.text and f"{layer}.lora_A.weight" in warnings.text
    assert warnings.records[0].levelno == logging.WARNING
    del pairs["blocks.1.attn2.to_k"]
    torch.testing.assert_close(run(transformer), run(merged((pairs, SCALE))), **TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer.proj_out.lora_magnitude_vector": torch.ones(64)}, "DoRA"),
        ({"diffusion_model.blocks.0.ffn.0.dora_scale": torch.ones(32)}, "DoRA"),
        ({"lora_unet_blocks_0_ffn_0.lokr_w1": torch.ones(2, 2)}, "LoKr"),
        ({"transformer.proj_out.alpha": torch.tensor(0.0)}, "alpha 0"),
        ({"transformer.proj_out.lora_A.second.weight": torch.ones(3, 24)}, "several adapters"),
    ],
)
def test_files_that_would_load_wrong_are_refused(changes, message):
    transformer = tiny_transformer(anchored=True)
    with pytest.raises(ValueError, match=message):
        load_lora(transformer, DIFFUSERS(make_pairs()) | changes)
    assert not hasattr(transformer, "peft_config")


def test_files_are_found_or_named(tmp_path):
    transformer, pairs = tiny_transformer(anchored=True), make_pairs()
    with pytest.raises(ValueError, match="no .safetensors"):
        load_lora(transformer, tmp_path)
    (tmp_path / "lora.bin").touch()
    for weights in (tmp_path, tmp_path / "lora.bin", "org/name/lora.ckpt"):
        with pytest.raises(ValueError, match="pickle"):
            load_lora(transformer, weights)
    with pytest.raises(ValueError, match="pickle"):
        load_lora(transformer, tmp_path, use_safetensors=False)
    with pytest.raises(ValueError, match="no LoRA file or folder"):
        load_lora(transformer, tmp_path / "absent.safetensors")
    with pytest.raises(TypeError, match="wieght_name"):
        load_lora(transformer, tmp_path, wieght_name="one.safetensors")
    for name in ("one", "two"):
        save_file(FORMATS["raw"](pairs), tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"\['one.safetensors', 'two.safetensors'\].*weight_name"):
        load_lora(transformer, tmp_path)
    load_lora(transformer, tmp_path, weight_name="two.safetensors")
    torch.testing.assert_close(run(transformer), run(merged((pairs, SCALE))), **TOLERANCE)


def test_repository_with_two_files_and_offline(hub, monkeypatch, tmp_path):
    pairs, pairs_2 = make_pairs(), make_pairs(seed=1)
    save_file(FORMATS["raw"](pairs), tmp_path / "high_noise_model.safetensors")
    save_file(FORMATS["raw"](pairs_2), tmp_path / "low_noise_model.safetensors")
    save_file(FORMATS["raw"](pairs_2), tmp_path / "elsewhere.safetensors")
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo("org/pair")
    for name, path in (("high_noise_model", "v1"), ("low_noise_model", "v1"), ("elsewhere", ".")):
        api.upload_file(
            path_or_fileobj=tmp_path / f"{name}.safetensors",
            path_in_repo=f"{path}/{name}.safetensors".removeprefix("./"),
            repo_id="org/pair",
        )
    for offline in (False, True):
        pipe = make_pipeline(two_experts=True)
        pipe.load_lora_weights("org/pair", subfolder="v1", local_files_only=offline)
        check_experts(pipe, pairs, pairs_2)
    assert hub.downloaded("org/pair") == {"v1/high_noise_model.safetensors", "v1/low_noise_model.safetensors"}


# -- the same video -----------------------------------------------------------------------------------------------------


def as_full_deltas(pairs, scale=SCALE):
    return {f"diffusion_model.{LAYERS[layer]}.diff": b @ a * scale for layer, (a, b) in pairs.items()}


def split(write):
    """A pair of files, one for each expert."""
    return lambda pairs, pairs_2: (write(pairs), write(pairs_2))


# One expert, and two from one file or from two: each made from the same adapter.
VIDEO_TABLE = {(1, name): write for name, write in (FORMATS | {"lightx2v full": as_full_deltas}).items()}
VIDEO_TABLE |= {
    (2, f"{name}, one file"): lambda pairs, pairs_2, high=high, low=low: high(pairs) | low(pairs_2)
    for name, (high, low) in EXPERT_FORMATS.items()
}
TWO_FILES = ("diffusers", "peft", "diffsynth", "comfyui with alpha", "musubi", "lightx2v")
VIDEO_TABLE |= {(2, f"{name}, two files"): split(FORMATS[name]) for name in TWO_FILES}


def video(pipe):
    """Latents, and frames in [0, 1], of both experts where there are two."""
    generator = torch.Generator().manual_seed(0)
    size = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16, "num_inference_steps": 2}
    picture = PIL.Image.new("RGB", (32, 32), "red")
    call = {"image": picture, "generator": generator, "guidance_scale": 1, "output_type": "latent"}
    latents = pipe("a red circle", **call, **size).frames
    return latents, pipe.decode(latents, "pt")


@pytest.fixture(scope="module")
def native_videos():
    """Pipelines of one and two experts, and the video of each with its adapters loaded by stock diffusers."""
    videos = {}
    for experts in (1, 2):
        second = tiny_transformer(anchored=True, seed=1) if experts == 2 else None
        pipe = tiny_pipeline(rewriter=None, composer=None, transformer_2=second, boundary_ratio=0.9)
        pipe.set_progress_bar_config(disable=True)
        base = expected = video(pipe)
        for seed, name in enumerate(["transformer", "transformer_2"][:experts]):
            tensors = DIFFUSERS(make_pairs(seed))
            getattr(pipe, name).load_lora_adapter(tensors, prefix="transformer", adapter_name="native")
            before, expected = expected, video(pipe)
            assert (expected[0] - before[0]).abs().max() > 0.1, name
        videos[experts] = pipe, expected
        pipe.unload_lora_weights()
        assert torch.equal(video(pipe)[0], base[0])
    return videos


@pytest.mark.parametrize(("experts", "name"), VIDEO_TABLE)
def test_every_format_gives_the_video_of_the_native_one(native_videos, experts, name):
    pipe, expected = native_videos[experts]
    report = pipe.load_lora_weights(VIDEO_TABLE[experts, name](*(make_pairs(seed) for seed in range(experts))))
    loaded = video(pipe)
    pipe.unload_lora_weights()
    assert report.unmatched == {} and len(report.adapters) == experts
    torch.testing.assert_close(loaded, expected, **TOLERANCE)


# -- the anchor LoRA as a component -------------------------------------------------------------------------------------


def test_an_anchor_lora_is_read_from_its_folder_the_file_s_folder_and_the_file(tmp_path):
    written = AnchorLora({"transformer.a.lora_A.weight": torch.arange(4.0)}, {"anchor_form": "appended"})
    written.save_pretrained(tmp_path)
    for place in (tmp_path, tmp_path / "weights", tmp_path / "weights" / "pytorch_lora_weights.safetensors"):
        found = AnchorLora.from_pretrained(place)
        assert found.form == "appended" and torch.equal(
            *(lora.state_dict["transformer.a.lora_A.weight"] for lora in (found, written))
        )
    pickle = tmp_path / "lora.bin"
    pickle.write_bytes(b"x")
    for place, message in ((pickle, "would be read as pickles"), (tmp_path / "none", "has no weights/pytorch_lora")):
        with pytest.raises(ValueError, match=message):
            AnchorLora.from_pretrained(place)


def test_the_anchor_lora_honours_alpha():
    pairs = make_pairs()
    halves = {f"{layer}.lora_{x}.weight": pair[i] for layer, pair in pairs.items() for i, x in enumerate("AB")}
    tensors = {f"transformer.{key}": tensor for key, tensor in halves.items()}
    config = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA}
    loras = {
        "header": AnchorLora(tensors, {"lora_adapter_metadata": json.dumps(config)}),
        "tensors": AnchorLora(FORMATS["diffusers with alpha"](pairs)),
        "none": AnchorLora(DIFFUSERS(pairs), {"format": "pt"}),
    }
    for name, lora in loras.items():
        transformer = tiny_transformer(anchored=True)
        lora.load_into(transformer, "transformer")
        torch.testing.assert_close(run(transformer), run(merged((pairs, SCALE))), **TOLERANCE, msg=name)

    # Of two experts each takes its own, in any order.
    both = AnchorLora(tensors | {f"transformer_2.{key}": 2 * tensor for key, tensor in halves.items()})
    second = tiny_transformer(anchored=True, seed=1)
    both.load_into(second, "transformer_2")
    torch.testing.assert_close(run(second), run(merged((pairs, 4), seed=1)), **TOLERANCE)

    unfit = AnchorLora(tensors | {"transformer.blocks.9.attn1.to_q.lora_A.weight": torch.ones(1, 24)})
    with pytest.raises(ValueError, match="blocks.9.*no such module"):
        unfit.load_into(tiny_transformer(anchored=True), "transformer")


# -- several adapters, state ------------------------------------------------------------------------------------------


def test_a_second_adapter_leaves_the_first_active_at_its_strength():
    anchor, fast = make_pairs(), make_pairs(seed=1)
    pipe = make_pipeline()
    pipe.load_lora_weights(FORMATS["musubi"](anchor), adapter_name="anchor", strength=0.6)
    pipe.load_lora_weights(FORMATS["diffsynth"](fast), adapter_name="fast", strength=0.3)
    assert pipe.get_active_adapters() == ["anchor", "fast"]
    reference = run(merged((anchor, SCALE * 0.6), (fast, SCALE * 0.3)))
    torch.testing.assert_close(run(pipe.transformer), reference, **TOLERANCE)
    pipe.delete_adapters("anchor")
    torch.testing.assert_close(run(pipe.transformer), run(merged((fast, SCALE * 0.3))), **TOLERANCE)
    with pytest.raises(ValueError, match="'fast' is in use"):
        pipe.load_lora_weights(DIFFUSERS(anchor), adapter_name="fast")
    with pytest.raises(ValueError, match="dot"):
        pipe.load_lora_weights(DIFFUSERS(anchor), adapter_name="v1.0")
    assert pipe.load_lora_weights(DIFFUSERS(anchor)).adapters == {"transformer": "default_0"}


def test_loading_beside_a_fused_adapter_is_refused():
    # The layers of a fused adapter pass others by.
    pairs, other = make_pairs(), make_pairs(seed=1)
    pipe = make_pipeline()
    pipe.load_lora_weights(DIFFUSERS(pairs), "a")
    pipe.fuse_lora()
    with pytest.raises(ValueError, match=r"\['a'\] are fused"):
        pipe.load_lora_weights(DIFFUSERS(other), "b")
    pipe.unload_lora_weights()
    pipe.load_lora_weights(DIFFUSERS(other), "b")
    reference = run(merged((pairs, SCALE), (other, SCALE)))
    torch.testing.assert_close(run(pipe.transformer), reference, **TOLERANCE)


def test_hotswap_takes_the_new_alpha_deltas_and_strength():
    first, second, rest = make_pairs(), make_pairs(seed=1), make_pairs(seed=2)
    deltas, deltas_2 = make_deltas(), make_deltas(seed=1)
    pipe = make_pipeline()
    pipe.load_lora_weights(lightx2v(first, deltas), "style", strength=0.5)
    pipe.load_lora_weights(DIFFUSERS(rest), "anchor")
    layers = {id(module) for module in pipe.transformer.modules()}
    for strength in (1.0, 0.4):
        tensors = FORMATS["comfyui with alpha"](second, 1.7)
        tensors |= {f"diffusion_model.{DELTAS[name]}": delta for name, delta in deltas_2.items()}
        pipe.load_lora_weights(tensors, "style", hotswap=True, strength=strength)
        reference = run(merged((second, 1.7 * strength), (deltas_2, strength), (rest, SCALE)))
        torch.testing.assert_close(run(pipe.transformer), reference, **TOLERANCE)
    assert {id(module) for module in pipe.transformer.modules()} == layers
    pipe.set_adapters(["style", "anchor"], [0.2, 1.0])
    reference = run(merged((second, 1.7 * 0.2), (deltas_2, 0.2), (rest, SCALE)))
    torch.testing.assert_close(run(pipe.transformer), reference, **TOLERANCE)

    with pytest.raises(ValueError, match="there is no 'absent'"):
        pipe.load_lora_weights(DIFFUSERS(first), "absent", hotswap=True)
    # PEFT would take the tensors of "anchor" for those of "or" and blank them.
    pipe.load_lora_weights(DIFFUSERS(first), "or")
    with pytest.raises(ValueError, match="part of"):
        pipe.load_lora_weights(DIFFUSERS(second), "or", hotswap=True)


def test_a_failure_in_the_second_expert_leaves_the_first_as_it_was(monkeypatch):
    pairs = make_pairs()
    pipe = make_pipeline(two_experts=True)
    base = run(pipe.transformer)

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pipe.transformer_2, "load_lora_adapter", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        pipe.load_lora_weights((DIFFUSERS(pairs), DIFFUSERS(pairs)), "a")
    assert torch.equal(run(pipe.transformer), base)
    assert "a" not in getattr(pipe.transformer, "peft_config", {})


# -- offload and compile ----------------------------------------------------------------------------------------------


@pytest.fixture
def accelerator(monkeypatch):
    """The hooks of offloading are real. "cpu:0" passes for an accelerator, whose absence diffusers knows by "cpu"."""
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.get_device", lambda: "cpu:0")
    return torch.device("cpu:0")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("offload", ["model", "block_level", "leaf_level"])
def test_load_before_and_after_offload(offload, when, accelerator):
    pairs, deltas = make_pairs(), make_deltas()
    tensors = lightx2v(pairs, deltas)
    pipe = make_pipeline(two_experts=True)

    def enable():
        if offload == "model":
            pipe.enable_model_cpu_offload()
        else:
            for expert in (pipe.transformer, pipe.transformer_2):
                expert.enable_group_offload(accelerator, offload_type=offload, num_blocks_per_group=1)

    if when == "after":
        enable()
    pipe.load_lora_weights((tensors, tensors), "a", strength=0.5)
    if when == "before":
        enable()
    assert hasattr(pipe.transformer, "_hf_hook" if offload == "model" else "_diffusers_hook")
    for strength in (0.5, 2.0):
        pipe.set_adapters("a", strength)
        for expert, seed in ((pipe.transformer, 0), (pipe.transformer_2, 1)):
            reference = run(merged((pairs, SCALE * strength), (deltas, strength), seed=seed))
            torch.testing.assert_close(run(expert), reference, **TOLERANCE)


def test_sequential_offload_works_or_says_why_not(accelerator):
    # accelerate's sequential hooks do not run with the CPU as accelerator, so the weights are looked at instead.
    pairs, deltas = make_pairs(), make_deltas()
    pipe = make_pipeline()
    pipe.enable_sequential_cpu_offload()
    with pytest.raises(ValueError, match="norms, biases or modulation.*before `enable_sequential_cpu_offload"):
        pipe.load_lora_weights(lightx2v(pairs, deltas), "fast")
    with pytest.raises(ValueError, match="pass the pipeline"):
        load_lora(pipe.transformer, DIFFUSERS(pairs))
    pipe.load_lora_weights(DIFFUSERS(pairs), "anchor")
    assert pipe.transformer.blocks[0].attn1.to_q.weight.is_meta
    pipe.remove_all_hooks()
    torch.testing.assert_close(run(pipe.transformer), run(merged((pairs, SCALE))), **TOLERANCE)

    pipe.load_lora_weights(lightx2v({}, deltas), "fast")
    pipe.enable_sequential_cpu_offload()
    pipe.set_adapters(["anchor", "fast"], [1.0, 0.5])
    with pytest.raises(ValueError, match="sequential offload keeps off the device"):
        run(pipe.transformer)
    pipe.remove_all_hooks()
    reference = run(merged((pairs, SCALE), (deltas, 0.5)))
    torch.testing.assert_close(run(pipe.transformer), reference, **TOLERANCE)


def test_load_into_a_compiled_model():
    pairs, deltas = make_pairs(), make_deltas()
    wrapped = torch.compile(tiny_transformer(anchored=True), backend="eager")
    run(wrapped)
    load_lora(wrapped, lightx2v(pairs, deltas))
    torch.testing.assert_close(run(wrapped), run(merged((pairs, SCALE), (deltas, 1))), **TOLERANCE)


def test_load_into_compiled_blocks_which_steps_and_hotswaps_do_not_compile_again():
    counter, pairs, deltas = CompileCounter(), make_pairs(), make_deltas()
    transformer = tiny_transformer(anchored=True)
    transformer.compile_repeated_blocks(backend=counter)
    run(transformer)
    assert counter.frame_count > 0
    load_lora(transformer, lightx2v(pairs, deltas), "a")
    torch.testing.assert_close(run(transformer), run(merged((pairs, SCALE), (deltas, 1))), **TOLERANCE)
    compiled = counter.frame_count
    for seed in (1, 2):
        pairs, deltas = make_pairs(seed), make_deltas(seed)
        load_lora(transformer, lightx2v(pairs, deltas), "a", hotswap=True)
        for _ in range(2):
            torch.testing.assert_close(run(transformer), run(merged((pairs, SCALE), (deltas, 1))), **TOLERANCE)
    assert counter.frame_count == compiled


def test_bfloat16_model_keeps_its_types_and_comes_back_exactly():
    transformer = tiny_transformer(anchored=True).to(torch.bfloat16)
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    load_lora(transformer, lightx2v(make_pairs(), make_deltas()), strength=0.3)
    assert {p.dtype for n, p in transformer.named_parameters() if ".lora_" not in n} == {torch.bfloat16}
    norm = transformer.get_parameter("blocks.0.norm2.weight")
    expected = (before["blocks.0.norm2.weight"].double() + 0.3 * make_deltas()["blocks.0.norm2.weight"]).bfloat16()
    torch.testing.assert_close(norm, expected)
    transformer.unload_lora()
    transformer.parameter_deltas.refresh()
    assert all(torch.equal(value, before[name]) for name, value in transformer.state_dict().items())
