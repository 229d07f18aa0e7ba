"""`fuse_lora`: the weights give what the layers gave, whatever form the model is in, or it is refused and nothing has changed."""

import importlib.util

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from test_loader import DIFFUSERS, lightx2v, make_deltas, make_pairs, make_pipeline
from test_ways import (
    gguf,
    layerwise_cast,
    offloaded_as_a_whole,
    offloaded_by_block,
    offloaded_by_leaf,
    sequentially_offloaded,
    torchao,
)
from tiny import tiny_pipeline, tiny_transformer

from diffusers_fvg import AnchorLora
from diffusers_fvg.lora.loader import load_lora


CALL = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16, "num_inference_steps": 2}
CALL |= {"prompt": "a red circle", "generator": 0, "output_type": "latent"}
ANCHORED = CALL | {"image": np.full((32, 32, 3), 0.5, np.float32)}


def anchored_pipeline(**changes):
    state = {
        f"transformer.{key.removeprefix('transformer.')}": value for key, value in DIFFUSERS(make_pairs()).items()
    }
    pipe = tiny_pipeline(anchor_lora=AnchorLora(state), rewriter=None, composer=None, **changes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def forward(model, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    latents, text = (torch.randn(shape, generator=generator).to(dtype) for shape in ((1, 16, 2, 4, 4), (1, 5, 32)))
    return model(latents, torch.tensor([[0.0, 500.0]]), text, return_dict=False)[0]


def merged_layers(model) -> int:
    return sum(module.merged for module in model.modules() if isinstance(module, BaseTunerLayer))


def test_in_float64_the_weights_give_what_the_layers_gave():
    model = tiny_transformer(anchored=True).double()
    base = forward(model, torch.float64)
    load_lora(model, DIFFUSERS(make_pairs()), "anchor")
    layers = forward(model, torch.float64)
    assert layers.dtype == torch.float64 and (layers - base).abs().max() > 1e-2
    model.fuse_lora()
    assert merged_layers(model) > 0
    torch.testing.assert_close(forward(model, torch.float64), layers, rtol=0, atol=1e-12)
    model.unfuse_lora()
    model.disable_lora()
    torch.testing.assert_close(forward(model, torch.float64), base, rtol=0, atol=1e-12)


def test_a_pipeline_gives_the_same_frames_and_the_base_model_after_unfusing():
    pipe = anchored_pipeline()
    direct, anchored = pipe(mode="direct", **CALL).frames, pipe(**ANCHORED).frames
    pipe.transformer.disable_lora()
    without = pipe(**ANCHORED).frames
    pipe.transformer.enable_lora()
    assert (without - anchored).abs().max() > 1e-2
    pipe.fuse_lora()
    torch.testing.assert_close(pipe(**ANCHORED).frames, anchored, rtol=0, atol=1e-4)
    with pytest.raises(
        ValueError, match=r"anchor LoRA is fused, but this call runs without it: call `unfuse_lora\(\)`"
    ):
        pipe(mode="direct", **CALL)
    with pytest.raises(ValueError, match=r"`scale=0.5` in .* no effect, because the LoRAs \['anchor'\] are fused"):
        pipe(attention_kwargs={"scale": 0.5}, **ANCHORED)
    with pytest.raises(ValueError, match=r"\['anchor'\] are fused, so new strengths .* before `set_adapters`"):
        pipe.set_adapters("anchor", 0.5)
    pipe.unfuse_lora()
    torch.testing.assert_close(pipe(mode="direct", **CALL).frames, direct, rtol=0, atol=1e-4)
    torch.testing.assert_close(pipe(**ANCHORED).frames, anchored, rtol=0, atol=1e-4)


def test_a_lora_that_another_one_hides_is_told_of():
    pipe = anchored_pipeline()
    pipe.load_lora_weights(DIFFUSERS(make_pairs(seed=1)), "fast")
    both, direct = pipe(**ANCHORED).frames, pipe(mode="direct", **CALL).frames
    pipe.fuse_lora(adapter_names=["fast"])
    with pytest.raises(ValueError, match=r"LoRAs \['anchor'\] have no effect, because \['fast'\] are fused"):
        pipe(**ANCHORED)
    # Where the anchor's is off there is nothing to hide.
    torch.testing.assert_close(pipe(mode="direct", **CALL).frames, direct, rtol=0, atol=1e-4)
    pipe.unfuse_lora()
    pipe.fuse_lora()
    torch.testing.assert_close(pipe(**ANCHORED).frames, both, rtol=0, atol=1e-4)


def test_what_is_fused_is_not_saved_twice(tmp_path):
    pipe = anchored_pipeline()
    pipe.transformer.hub_reference = {"repository": "org/base", "class_name": type(pipe.transformer).__name__}
    anchored = pipe(**ANCHORED).frames
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="fused into `transformer`.* act twice"):
        pipe.save_pretrained(tmp_path / "twice")
    assert not (tmp_path / "twice").exists()
    # The way that the error names. A reference to the base would lose what is fused: the weights themselves are saved.
    pipe.unload_lora_weights()
    pipe.anchor_lora = None
    pipe.save_pretrained(tmp_path / "once")
    again = DiffusionPipeline.from_pretrained(tmp_path / "once")
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(again(**ANCHORED).frames, anchored, rtol=0, atol=1e-4)


def test_a_model_is_saved_with_fused_pairs_and_deltas(tmp_path):
    pipe = make_pipeline()
    load_lora(pipe, lightx2v(make_pairs(), make_deltas()), "fast", strict=True)
    layers = forward(pipe.transformer)
    pipe.fuse_lora()
    pipe.transformer.save_pretrained(tmp_path)
    saved = type(pipe.transformer).from_pretrained(tmp_path)
    torch.testing.assert_close(forward(saved), layers, rtol=0, atol=1e-4)


WORKING = [offloaded_by_leaf, offloaded_by_block, offloaded_as_a_whole]
REFUSED = {
    sequentially_offloaded: "sequential offload keeps its weights off the device",
    layerwise_cast: r"are quantized \(torch.float8_e4m3fn\)",
    gguf: r"are quantized \(GGUFParameter\)",
    torchao: r"are quantized \(Int8Tensor\)",
}


def wide_model(change, lora_first: bool):
    if change in (gguf, torchao) and importlib.util.find_spec(change.__name__) is None:
        pytest.skip(f"needs the package {change.__name__}")
    model = tiny_transformer(anchored=True, num_attention_heads=4, attention_head_dim=16, ffn_dim=64)
    if lora_first:
        add_lora(model)
    change(model)
    if not lora_first:
        add_lora(model)
    return model


def add_lora(model) -> None:
    torch.manual_seed(0)
    layers = ["to_q", "to_out.0", "ffn.net.2"]
    model.add_adapter(LoraConfig(r=2, target_modules=layers, init_lora_weights=False), "anchor")


@pytest.mark.parametrize("change", WORKING, ids=lambda change: change.__name__)
def test_a_form_of_a_model_is_fused_into(change):
    model = wide_model(change, lora_first=True)
    layers = forward(model)
    model.fuse_lora()
    assert merged_layers(model) == 10
    torch.testing.assert_close(forward(model), layers, rtol=0, atol=1e-4)
    model.unfuse_lora()
    torch.testing.assert_close(forward(model), layers, rtol=0, atol=1e-4)


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_a_form_of_a_model_refuses_to_be_fused_into(change):
    # PEFT makes no layer over weights of 8 bits that it does not know, and none under a quantized one.
    model = wide_model(change, lora_first=change in (layerwise_cast, sequentially_offloaded))
    layers = forward(model)
    with pytest.raises(ValueError, match=f"cannot be fused into this Anchor.*{REFUSED[change]}"):
        model.fuse_lora()
    assert merged_layers(model) == 0
    assert torch.equal(forward(model), layers)
