"""Products in 8 bits: which layers have them, what they cost in accuracy, LoRAs beside them, and where they cannot run."""

import re

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from peft import LoraConfig
from tiny import TRANSFORMER_CONFIG, tiny_pipeline, tiny_transformer
from tiny_cogvideox import tiny_cogvideox_components

from diffusers_fvg import (
    AnchorConditionedCogVideoXTransformer3D,
    AnchorConditionedSkyReelsV2Transformer3D,
    AnchorLora,
)
from diffusers_fvg.animate.quantization import fp8_dynamic, fp8_problem
from diffusers_fvg.pipelines.record import _quantization


WIDE = {"num_attention_heads": 4, "attention_head_dim": 16, "ffn_dim": 64}


def skyreels():
    config = TRANSFORMER_CONFIG | WIDE | {"inject_sample_info": True}
    return AnchorConditionedSkyReelsV2Transformer3D(**config)


def cogvideox():
    return AnchorConditionedCogVideoXTransformer3D.from_stock(tiny_cogvideox_components()["transformer"])


MODELS = {"Wan": lambda: tiny_transformer(anchored=True, **WIDE), "SkyReels-V2": skyreels, "CogVideoX": cogvideox}


@pytest.fixture
def float8(monkeypatch):
    """torchao, which multiplies float8 on a CPU too, but asks for a GPU."""
    pytest.importorskip("torchao")
    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda granularity: None)


def loaded(model, folder, **options):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=torch.bfloat16, **options)


@torch.no_grad()
def forward(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, text = (torch.randn(shape, generator=generator).bfloat16() for shape in ((1, 16, 3, 4, 4), (1, 5, 32)))
    return model(latents, torch.tensor([[0.0, 500.0, 500.0]]), text, return_dict=False)[0].double()


@pytest.mark.parametrize("name", MODELS)
def test_attention_and_feed_forward_of_blocks_alone_are_in_8_bits(name, float8, tmp_path):
    model = loaded(MODELS[name](), tmp_path, quantization_config=fp8_dynamic())
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    # torchao leaves what does not fill a row of 16 as it is.
    fitting = {name for name, layer in linear.items() if layer.in_features % 16 == 0 and layer.out_features % 16 == 0}
    blocks = {name for name in fitting if re.fullmatch(r"(transformer_)?blocks\.\d+\.(attn\d|ffn?)\..*", name)}
    found = {name for name, layer in linear.items() if type(layer.weight).__name__ == "Float8Tensor"}
    assert found == blocks and blocks
    assert {layer.weight.dtype for name, layer in linear.items() if name not in found} <= {
        torch.bfloat16,
        torch.float32,
    }
    assert _quantization(model) == "torchao-fp8-dynamic"


def test_the_error_is_that_of_eight_bits_and_a_lora_goes_beside_them(float8, tmp_path):
    plain = loaded(MODELS["Wan"](), tmp_path)
    model = loaded(MODELS["Wan"](), tmp_path, quantization_config=fp8_dynamic())
    base = [forward(one) for one in (plain, model)]
    # float8_e4m3fn rounds to 4 significant bits: by at most 1/16 each weight and input.
    assert 1e-3 < (base[1] - base[0]).norm() / base[0].norm() < 1 / 16
    lora = LoraConfig(r=2, target_modules=["to_q", "to_out.0", "ffn.net.2"], init_lora_weights=False)
    for one in (plain, model):
        torch.manual_seed(0)
        one.add_adapter(lora, "anchor")
    with_lora = [forward(one) for one in (plain, model)]
    effect = [after - before for before, after in zip(base, with_lora)]
    assert effect[0].norm() > 0.1 * base[0].norm()
    assert (effect[1] - effect[0]).norm() < 0.2 * effect[0].norm()
    with pytest.raises(ValueError, match=r"are quantized \(Float8Tensor\)"):
        model.fuse_lora()


def test_where_it_cannot_run(monkeypatch):
    assert "cpu is not an NVIDIA GPU of compute capability 8.9" in fp8_problem(torch.device("cpu"), torch.bfloat16)
    for capability, dtype, problem in (
        ((8, 6), torch.bfloat16, "not an NVIDIA GPU"),
        ((8, 9), torch.float32, "not float32"),
        ((9, 0), torch.bfloat16, None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        found = fp8_problem(torch.device("cuda"), dtype)
        assert found is None if problem is None else problem in found


def test_a_pipeline_is_loaded_with_it_and_its_anchor_lora(float8, tmp_path):
    transformer = MODELS["Wan"]()
    torch.manual_seed(0)
    state = {
        f"transformer.blocks.{block}.{layer}.lora_{half}.weight": torch.randn(shape) / 2
        for block in (0, 1)
        for layer in ("attn1.to_q", "attn1.to_v")
        for half, shape in (("A", (2, 64)), ("B", (64, 2)))
    }
    tiny_pipeline(
        transformer=transformer, anchor_lora=AnchorLora(state), rewriter=None, composer=None
    ).save_pretrained(tmp_path)
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": fp8_dynamic()})
    call = {"prompt": "a red circle", "image": np.full((32, 32, 3), 0.5, np.float32), "output_type": "latent"}
    call |= {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16, "num_inference_steps": 2}
    frames = {}
    for name, options in {"bfloat16": {}, "float8": {"quantization_config": mapping}}.items():
        pipe = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16, **options)
        pipe.set_progress_bar_config(disable=True)
        frames[name] = pipe(**call, generator=0).frames
        pipe.transformer.disable_lora()
        frames[f"{name}, without"] = pipe(**call, generator=0).frames
    assert type(pipe.transformer.blocks[0].attn1.to_q.base_layer.weight).__name__ == "Float8Tensor"
    effect = frames["bfloat16"] - frames["bfloat16, without"]
    assert (frames["float8"] - frames["float8, without"] - effect).norm() < 0.3 * effect.norm()
    assert (frames["float8"] - frames["bfloat16"]).norm() < 0.1 * frames["bfloat16"].norm()
