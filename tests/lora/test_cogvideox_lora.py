"""LoRA files for CogVideoX: the formats of the Wan tests, on its layers, against plain addition to the weights."""

import pytest
import torch
from test_loader import FORMATS as WAN_TESTED
from test_loader import SCALE, in_form
from tiny_cogvideox import CONFIG_1_0, tiny_cogvideox_pipeline, tiny_cogvideox_transformer

from diffusers_fvg.lora.loader import load_lora


LAYERS = [f"transformer_blocks.{n}.attn1.to_{name}" for n in range(2) for name in ("q", "k", "v", "out.0")]
LAYERS += ["transformer_blocks.0.ff.net.0.proj", "transformer_blocks.1.ff.net.2", "transformer_blocks.1.norm1.linear"]
LAYERS += ["patch_embed.proj", "patch_embed.text_proj", "time_embedding.linear_1", "norm_out.linear", "proj_out"]
kohya = {"names": "diffusers", "down": "lora_down", "up": "lora_up", "alpha": True, "flat": True}
FORMATS = {
    name: WAN_TESTED[name]
    for name in (
        "diffusers",
        "diffusers without prefix",
        "diffusers with alpha",
        "peft",
        "peft with adapter name",
        "peft with adapter name, without prefix",
        "kohya of the diffusers model",
        "tensors without a leaf",
    )
} | {
    "comfyui": in_form("diffusion_model.{}", names="diffusers", alpha=True),
    "down and up": in_form("transformer.{}", names="diffusers", down="lora_down", up="lora_up", alpha=True),
    "videox-fun": in_form("lora_unet__{}", **kohya),
    "kohya named after the transformer": in_form("lora_transformer_{}", **kohya),
}


def pairs_for(model):
    """layer -> (A, B), as large as the weights; of a convolution, as its LoRA has them."""
    generator, pairs = torch.Generator().manual_seed(0), {}
    for layer in LAYERS:
        outputs, *inputs = model.get_submodule(layer).weight.shape
        ones = [1] * (len(inputs) - 1)
        shapes = (3, *inputs), (outputs, 3, *ones)
        pairs[layer] = tuple(torch.randn(shape, generator=generator) / 5 for shape in shapes)
    return pairs


@torch.no_grad()
def run(model, dtype=torch.float32):
    generator = torch.Generator().manual_seed(9)
    latents = torch.randn(1, 4, 4, 8, 8, generator=generator).to(dtype)
    texts = torch.randn(1, 16, 32, generator=generator).to(dtype)
    rotary = model.rotary_embedding(4, 8, 8) if hasattr(model, "rotary_embedding") else None
    return model(latents, texts, torch.tensor([500]), image_rotary_emb=rotary, return_dict=False)[0]


@torch.no_grad()
def merged(pairs, scale, **config):
    """The model with the deltas in its weights, which it was computed with in float64."""
    model = tiny_cogvideox_transformer(anchored=True, **config)
    for layer, (down, up) in pairs.items():
        weight = model.get_submodule(layer).weight
        delta = up.flatten(1).double() @ down.flatten(1).double()
        weight.copy_(weight.double() + scale * delta.view_as(weight))
    return model


# CogVideoX 1.5 has a linear patch embedding, 1.0 a convolution.
@pytest.mark.parametrize("config", [{}, CONFIG_1_0], ids=["1.5", "1.0"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_equals_merged_weights(name, config):
    model = tiny_cogvideox_transformer(anchored=True, **config)
    pairs, before = pairs_for(model), run(model)
    reference = run(merged(pairs, SCALE, **config))
    assert not torch.allclose(before, reference, rtol=0, atol=1e-2)
    tensors = FORMATS[name](pairs)
    report = load_lora(model, tensors)
    torch.testing.assert_close(run(model), reference, rtol=0, atol=2e-5)
    assert report.unmatched == {} and report.matched.keys() == tensors.keys()


def test_the_pipeline_loads_weighs_fuses_and_unloads():
    pipe = tiny_cogvideox_pipeline()
    pairs, before = pairs_for(pipe.transformer), run(pipe.transformer)
    norm = pipe.transformer.transformer_blocks[0].norm1.norm
    report = pipe.load_lora_weights(FORMATS["videox-fun"](pairs), "style", strength=0.5)
    assert report.adapters == {"transformer": "style"} and pipe.get_active_adapters() == ["style"]
    for step in (None, pipe.fuse_lora, pipe.unfuse_lora):
        if step is not None:
            step()
        torch.testing.assert_close(run(pipe.transformer), run(merged(pairs, SCALE * 0.5)), rtol=0, atol=2e-5)
    pipe.set_adapters("style", 2.0)
    torch.testing.assert_close(run(pipe.transformer), run(merged(pairs, SCALE * 2)), rtol=0, atol=5e-5)
    # A delta of a norm, for which PEFT has no layer.
    key = "transformer.transformer_blocks.0.norm1.norm"
    weight = norm.weight.clone()
    pipe.load_lora_weights({f"{key}.diff": torch.full_like(weight, 0.3)}, "deltas")
    run(pipe.transformer)
    torch.testing.assert_close(pipe.transformer.transformer_blocks[0].norm1.norm.weight, weight + 0.3)
    pipe.unload_lora_weights()
    torch.testing.assert_close(run(pipe.transformer), before, rtol=0, atol=2e-5)


def test_what_does_not_fit_is_an_error_or_told():
    pipe = tiny_cogvideox_pipeline()
    tensors = FORMATS["diffusers"](pairs_for(pipe.transformer))
    wan = {key.replace("transformer_blocks", "blocks"): tensor for key, tensor in tensors.items() if "attn1" in key}
    with pytest.raises(
        ValueError, match="No key of the state dict fits: transformer.blocks.0.attn1.to_q.lora_A.weight"
    ):
        pipe.load_lora_weights(wan)
    sat = "model.diffusion_model.transformer.layers.0.attention.query_key_value.matrix_A.0"
    with pytest.raises(ValueError, match=r"matrix_A.0\), which keeps its alpha elsewhere: export it"):
        pipe.load_lora_weights({sat: torch.ones(3, 32)})
    with pytest.raises(ValueError, match="DoRA"):
        pipe.load_lora_weights(tensors | {"transformer.proj_out.lora_magnitude_vector": torch.ones(32)})
    # Of an image-to-video model: its patches have twice the channels.
    inputs = 2 * tensors["transformer.patch_embed.proj.lora_A.weight"].shape[1]
    wide = tensors | {"transformer.patch_embed.proj.lora_A.weight": torch.ones(3, inputs)}
    with pytest.raises(
        ValueError, match="2 of 32 LoRA keys were not used: .*patch_embed.proj.lora_A.weight .*do not fit"
    ):
        pipe.load_lora_weights(wide, strict=True)
    assert not hasattr(pipe.transformer, "peft_config")
    assert len(pipe.load_lora_weights(wide).unmatched) == 2
