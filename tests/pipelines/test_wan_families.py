"""Each Wan model's topology at tiny size: stock pipelines on the same weights, two experts, distilled weights."""

import dataclasses

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from safetensors.torch import save_file
from tiny import WAN_FAMILIES, tiny_transformer, tiny_wan_family

from diffusers_fvg import Anchor, AnchorLora, FactorizedVideoPipeline, load_lora
from diffusers_fvg.models import MODELS, model_presets
from diffusers_fvg.schedules.distilled import DISTILLED_PRESETS


SIZE = {"height": 64, "width": 32, "num_frames": 9, "max_sequence_length": 16, "output_type": "latent"}
PROMPT, NEGATIVE = "a red circle", "low quality"
A14B = "Wan2.2-T2V-A14B"

every_family = pytest.mark.parametrize("name", WAN_FAMILIES)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def picture(seed=0):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 32, 3), dtype=np.uint8))


def make_pipeline(name, **changes):
    """Ours, with the model's own presets."""
    presets = model_presets(MODELS[name])
    parts = {"transformer_2": None, "rewriter": None, "composer": None, "anchor_lora": None, "schedulers": presets}
    parts |= {"scheduler": next(iter(presets.values())).make_scheduler()} | tiny_wan_family(name, anchored=True)
    pipe = FactorizedVideoPipeline(**parts | changes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def animate(pipe, image=None, **options):
    """Latents of stage 3, anchored at frame 0 or plain text-to-video; always the same noise."""
    anchors = None if image is None else Anchor(image)
    return pipe.animate(PROMPT, anchors, NEGATIVE, **SIZE, **options, generator=seeded())


def with_sigmas(preset):
    """The preset's scheduler for a stock pipeline, which asks it for a number of steps only."""
    made = preset.make_scheduler()

    class Fixed(type(made)):
        def set_timesteps(self, num_inference_steps, device=None):
            super().set_timesteps(num_inference_steps, sigmas=np.array(preset.sigmas), device=device)

    return Fixed.from_config(made.config)


def make_stock(kind, name, preset, **changes):
    parts = {"scheduler": with_sigmas(preset)} | tiny_wan_family(name)
    if kind is WanImageToVideoPipeline:
        parts |= {"expand_timesteps": True, "image_encoder": None, "image_processor": None}
    pipe = kind(**parts | changes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def guidance(name):
    facts = MODELS[name]
    scales = {"guidance_scale": facts.guidance_scale}
    return scales if facts.guidance_scale_2 is None else scales | {"guidance_scale_2": facts.guidance_scale_2}


# -- parity -----------------------------------------------------------------------------------------------------------


@every_family
def test_without_anchor_it_equals_wan_pipeline(name):
    pipe = make_pipeline(name)
    for preset in ("anchored-15", *(preset.name for preset in DISTILLED_PRESETS.get(name, ()))):
        preset = pipe.presets[preset]
        if preset.scheduler_class == "FlowMatchLCMScheduler":
            continue  # It draws noise: see below.
        scales = {"guidance_scale": 1.0} if preset.weights else guidance(name)
        stock = make_stock(WanPipeline, name, preset)
        options = {**SIZE, **scales, "num_inference_steps": preset.num_inference_steps}
        expected = stock(PROMPT, NEGATIVE, **options, generator=seeded()).frames
        frames = animate(pipe, **scales, preset=preset.name)
        assert frames.shape[2:] == ((3, 4, 2) if name == "Wan2.2-TI2V-5B" else (3, 8, 4))
        assert (frames - expected).abs().max() < 1e-4, preset.name


@every_family
def test_with_a_first_frame_it_equals_wan_image_to_video_pipeline(name):
    # The stock pipeline gives each token a time of its own, with any Wan transformer that takes no extra channels.
    pipe = make_pipeline(name)
    preset = pipe.presets["anchored-15"]
    stock = make_stock(WanImageToVideoPipeline, name, preset)
    options = {**SIZE, **guidance(name), "num_inference_steps": preset.num_inference_steps}
    expected = stock(picture(), PROMPT, NEGATIVE, **options, generator=seeded()).frames
    ours = animate(pipe, picture(), **guidance(name))
    assert (ours - expected).abs().max() < 1e-4
    other = animate(pipe, picture(1), **guidance(name))
    assert (other[:, :, 1:] - expected[:, :, 1:]).abs().max() > 1e-2


# -- two experts ------------------------------------------------------------------------------------------------------


def times_seen(pipe, **options):
    """Times that each expert is called with, in order: expert -> list of `(B, frames)` or `(B,)`."""
    seen = {"transformer": [], "transformer_2": []}
    for name, times in seen.items():
        getattr(pipe, name).register_forward_pre_hook(
            lambda module, args, kwargs, times=times: times.append(kwargs["timestep"].clone()), with_kwargs=True
        )
    animate(pipe, picture(), **options)
    return seen


def test_experts_share_the_steps_at_the_boundary_and_see_the_anchor_at_time_zero():
    seen = times_seen(make_pipeline(A14B), guidance_scale=1.0)
    # Shift 12: 12 u / (1 + 11 u) >= 0.875 from u = 0.3684 up, so for the steps u = 15/15 to 6/15.
    assert [len(times) for times in seen.values()] == [10, 5]
    expected = [12 * u / (1 + 11 * u) * 1000 for u in np.arange(15, 0, -1) / 15]
    times = torch.stack(seen["transformer"] + seen["transformer_2"])[:, 0]
    assert times.shape == (15, 3) and (times[:, 0] == 0).all()
    np.testing.assert_allclose(times[:, 1:], np.repeat(np.array(expected)[:, None], 2, 1), atol=1)


def test_distilled_steps_fall_on_the_experts_that_were_distilled_for_them():
    # ModelTC/LightX2V, wan_moe_t2v_distill_lora.json: `boundary_step_index` 2.
    seen = times_seen(make_pipeline(A14B), preset="lightning-4")
    assert [[float(time[0, 1]) for time in times] for times in seen.values()] == [
        pytest.approx([1000, 937.5], abs=1e-3),
        pytest.approx([833.333, 625], abs=1e-3),
    ]


def test_each_expert_has_its_own_guidance():
    pipe, scales = make_pipeline(A14B), {"guidance_scale": 4.0, "guidance_scale_2": 3.0}
    base = animate(pipe, picture(), **scales)
    low = animate(pipe, picture(), **scales | {"guidance_scale_2": 2.0})
    high = animate(pipe, picture(), **scales | {"guidance_scale": 5.0})
    assert (low - base).abs().max() > 1e-3 and (high - base).abs().max() > 1e-3
    # In the first ten steps the low-noise expert's scale plays no part.
    runs = []
    for scale in (3.0, 2.0):
        runs.append([])
        keep = {"callback_on_step_end": lambda _, step, timestep, tensors: runs[-1].append(tensors["latents"]) or {}}
        animate(pipe, picture(), **scales | {"guidance_scale_2": scale}, **keep)
    same = [torch.equal(first, second) for first, second in zip(*runs)]
    assert same == [True] * 10 + [False] * 5


def test_guidance_of_both_experts_is_the_preset_s():
    pipe = make_pipeline(A14B)
    assert torch.equal(animate(pipe, picture()), animate(pipe, picture(), guidance_scale=4.0, guidance_scale_2=3.0))
    # As in stock pipelines, one scale that is given is for both.
    assert torch.equal(
        animate(pipe, picture(), guidance_scale=2.0),
        animate(pipe, picture(), guidance_scale=2.0, guidance_scale_2=2.0),
    )


def test_a_stock_repository_has_the_defaults_of_its_model(monkeypatch):
    pipe = make_pipeline(A14B, schedulers=None)
    config = {name: pipe.transformer.config[name] for name in MODELS[A14B].transformer_config}
    monkeypatch.setitem(MODELS, A14B, dataclasses.replace(MODELS[A14B], transformer_config=config))
    assert list(pipe.presets) == ["anchored-15", "full-40", "lightning-4"]
    assert (pipe.call_defaults["height"], pipe.call_defaults["num_frames"]) == (720, 81)
    pipe.register_to_config(call_defaults={"height": 480, "width": 832})
    assert (pipe.call_defaults["height"], pipe.call_defaults["frame_rate"]) == (480, 16)


# -- LoRAs ------------------------------------------------------------------------------------------------------------

# Layers that anchor LoRAs and distilled ones both change, in diffusers' names and in Wan's.
LAYERS = {
    "blocks.0.attn1.to_q": "blocks.0.self_attn.q",
    "blocks.1.attn2.to_v": "blocks.1.cross_attn.v",
    "blocks.0.ffn.net.0.proj": "blocks.0.ffn.0",
    "blocks.1.attn1.to_out.0": "blocks.1.self_attn.o",
}


def make_pairs(seed, rank, **config):
    """layer -> (down, up), as large as the weights, so that a lost one shows."""
    generator, model = torch.Generator().manual_seed(seed), tiny_transformer(**config)
    shapes = {layer: model.get_submodule(layer).weight.shape for layer in LAYERS}
    return {
        layer: (torch.randn(rank, columns, generator=generator) / 5, torch.randn(rows, rank, generator=generator) / 5)
        for layer, (rows, columns) in shapes.items()
    }


@torch.no_grad()
def add(transformer, pairs, scale=1.0):
    for layer, (down, up) in pairs.items():
        weight = transformer.get_submodule(layer).weight
        weight.copy_(weight.double() + scale * (up.double() @ down.double()))


def anchor_lora(pairs_of):
    """One file for both experts, as training writes it."""
    return AnchorLora(
        {
            f"{expert}.{layer}.lora_{letter}.weight": tensor
            for expert, pairs in pairs_of.items()
            for layer, pair in pairs.items()
            for letter, tensor in zip("AB", pair)
        }
    )


def lightning(pairs, alpha):
    """Keys that ModelTC/Wan2.2-Lightning merges: wan/utils/utils.py, load_and_merge_lora_weight. All float32, with alpha."""
    keys = {}
    for layer, (down, up) in pairs.items():
        name = f"diffusion_model.{LAYERS[layer]}"
        keys |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha)}
    return keys


def test_anchor_lora_of_both_experts_and_lightning_add_up(tmp_path):
    config = WAN_FAMILIES[A14B][0]
    anchor = {name: make_pairs(seed, 3, **config) for seed, name in enumerate(("transformer", "transformer_2"))}
    # Rank 64 and alpha 8 in the real files; their names say which expert they are for.
    fast = {name: make_pairs(seed, 4, **config) for seed, name in enumerate(("transformer", "transformer_2"), 2)}
    for file, name in (("high_noise_model", "transformer"), ("low_noise_model", "transformer_2")):
        save_file(lightning(fast[name], 0.5), tmp_path / f"{file}.safetensors")

    pipe = make_pipeline(A14B, anchor_lora=anchor_lora(anchor))
    report = pipe.load_lora_weights(tmp_path, adapter_name="lightning")
    assert report.unmatched == {} and set(report.adapters) == {"transformer", "transformer_2"}
    assert pipe.get_active_adapters() == ["anchor", "lightning"]

    reference = make_pipeline(A14B)
    for name in anchor:
        add(getattr(reference, name), fast[name], 0.5 / 4)
    run = {"preset": "lightning-4"}
    # Without an anchor its LoRA is off and the distilled one is not.
    assert (animate(pipe, **run) - animate(reference, **run)).abs().max() < 1e-4
    for name in anchor:
        add(getattr(reference, name), anchor[name])
    expected = animate(reference, picture(), **run)
    assert (animate(pipe, picture(), **run) - expected).abs().max() < 1e-4
    pipe.set_adapters("anchor")
    assert (animate(pipe, picture(), **run) - expected).abs().max() > 1e-2


def lightx2v(pairs):
    """ModelTC/LightX2V, tools/extract/lora_extractor.py: no alpha, plain differences where a matrix has no low rank."""
    keys = {}
    for layer, (down, up) in pairs.items():
        name = f"diffusion_model.{LAYERS[layer]}"
        keys |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    return keys | {"diffusion_model.blocks.0.self_attn.q.diff_b": torch.full((24,), 0.3)}


def fastvideo(pairs):
    """hao-ai-lab/FastVideo, scripts/lora_extraction/extract_lora.py, from the weights in diffusers' layout."""
    keys = {}
    for layer, (down, up) in pairs.items():
        keys |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    return keys | {"blocks.0.attn1.to_q.diff_b": torch.full((24,), 0.3)}


@pytest.mark.parametrize("write", [lightx2v, fastvideo])
def test_other_distilled_formats_add_up_with_the_anchor_lora(write):
    anchor, fast = make_pairs(0, 3), make_pairs(1, 4)
    transformer = tiny_transformer(anchored=True)
    anchor_lora({"transformer": anchor}).load_into(transformer, "transformer")
    assert load_lora(transformer, write(fast), "fast").unmatched == {}
    expected = tiny_transformer(anchored=True)
    add(expected, fast)
    add(expected, anchor)
    with torch.no_grad():
        expected.blocks[0].attn1.to_q.bias.add_(0.3)
    inputs = {
        "hidden_states": torch.randn(1, 16, 3, 4, 4, generator=seeded()),
        "timestep": torch.tensor([[0.0, 625.0, 625.0]]),
        "encoder_hidden_states": torch.randn(1, 5, 32, generator=seeded(1)),
    }
    torch.testing.assert_close(transformer(**inputs).sample, expected(**inputs).sample, rtol=0, atol=1e-5)


def test_scheduler_of_fastwan_estimates_and_noises_anew():
    # FastVideo's DmdDenoisingStage: clean = noisy - sigma * velocity, then (1 - sigma) * clean + sigma * noise, clean at last.
    preset = model_presets(MODELS["Wan2.2-TI2V-5B"])["fastwan-3"]
    scheduler, generator = preset.make_scheduler(), seeded()
    latents = torch.randn(1, 2, 3, 4, 4, generator=generator)
    draws = seeded(7)
    for time, sigma, following in zip(scheduler.timesteps, (1.0, 0.757, 0.522), (0.757, 0.522, 0.0)):
        velocity = torch.randn(latents.shape, generator=generator)
        clean = latents - sigma * velocity
        expected = (1 - following) * clean + following * torch.randn(latents.shape, generator=draws.clone_state())
        latents = scheduler.step(velocity, time, latents, generator=draws, return_dict=False)[0]
        torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_three_steps_of_a_dmd_lora_with_an_anchor_are_its_authors_with_a_clean_first_frame():
    """By the pipeline's loop, two LoRAs beside each other; and written out, on weights that have both."""
    name = "Wan2.2-TI2V-5B"
    config = WAN_FAMILIES[name][0]
    anchor, fast = make_pairs(0, 3, **config), make_pairs(1, 4, **config)
    pipe = make_pipeline(name, anchor_lora=anchor_lora({"transformer": anchor}))
    assert pipe.load_lora_weights(fastvideo(fast), "fast").unmatched == {}
    noise = torch.randn(1, 48, 3, 4, 2, generator=seeded(5))
    options = {"preset": "fastwan-3", "latents": noise, "generator": seeded()}
    found = pipe.animate(PROMPT, Anchor(picture()), **SIZE, **options)

    parts = tiny_wan_family(name, anchored=True)
    model, vae = parts["transformer"], parts["vae"]
    add(model, anchor)
    add(model, fast)
    model.blocks[0].attn1.to_q.bias.add_(0.3)
    pixels = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    clean = (vae.encode(pixels).latent_dist.mode() - mean) / std
    texts = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False, max_sequence_length=16)[0]
    latents, draws = noise, seeded()
    for sigma, following in zip((1.0, 0.757, 0.522), (0.757, 0.522, 0.0)):
        latents = torch.cat([clean, latents[:, :, 1:]], dim=2)
        velocity = model(latents, torch.tensor([[0.0, 1000 * sigma, 1000 * sigma]]), texts).sample
        estimate = latents - sigma * velocity
        latents = (1 - following) * estimate + following * torch.randn(noise.shape, generator=draws)
    torch.testing.assert_close(found[:, :, :1], clean, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[:, :, 1:], latents[:, :, 1:], rtol=0, atol=1e-4)
    pipe.set_adapters("anchor")
    options["generator"] = seeded()
    alone = pipe.animate(PROMPT, Anchor(picture()), **SIZE, **options)
    assert (alone - found).abs().max() > 1e-2
