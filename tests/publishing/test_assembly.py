"""What `assemble` writes for the real models, from their configs alone, and for CogVideoX; see `test_hub.py` for the rest."""

import json

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, DiffusionPipeline, WanPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from tiny import tiny_wan_family
from tiny_animators import tiny_animator
from tiny_cogvideox import tiny_cogvideox_components, tiny_cogvideox_transformer
from tiny_composers import flux

from diffusers_fvg import (
    FactorizedCogVideoXPipeline,
    FactorizedImageToVideoPipeline,
    FactorizedVideoPipeline,
    assemble,
    load,
)
from diffusers_fvg.animate.transformer_anchor_cogvideox import AnchorConditionedCogVideoXTransformer3D
from diffusers_fvg.cli import main
from diffusers_fvg.models import MODELS, WAN_NEGATIVE_PROMPT
from diffusers_fvg.schedules.cogvideox import COGVIDEOX_1_5_SCHEDULE, COGVIDEOX_PRESETS
from diffusers_fvg.schedules.presets import SchedulerPresets


def write_base(folder, name):
    """A repository with the model's configs and empty files in place of its weights."""
    facts = MODELS[name]
    experts = ["transformer"] if facts.boundary_ratio is None else ["transformer", "transformer_2"]
    index = {"_class_name": facts.pipeline_class, "vae": ["diffusers", "AutoencoderKLWan"]}
    index |= {"tokenizer": ["transformers", "T5TokenizerFast"], "text_encoder": ["transformers", "UMT5EncoderModel"]}
    index |= {expert: ["diffusers", facts.transformer_class] for expert in experts}
    if facts.pipeline_class == "WanPipeline":
        index |= {"boundary_ratio": facts.boundary_ratio, "expand_timesteps": facts.expand_timesteps}
    for part in ("vae", "text_encoder", *experts):
        (folder / part).mkdir(parents=True)
        config = facts.transformer_config if part in experts else {}
        (folder / part / "config.json").write_text(json.dumps(config))
        weights = "model.safetensors" if part == "text_encoder" else "diffusion_pytorch_model.safetensors"
        (folder / part / weights).write_bytes(b"")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps(index))
    return str(folder)


@pytest.mark.parametrize("name", MODELS)
def test_a_repository_has_the_model_s_own_defaults(name, tmp_path):
    facts, base = MODELS[name], write_base(tmp_path / "base", name)
    assemble(tmp_path / "out", base)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    pipeline = "FactorizedVideoPipeline" if name.startswith("Wan") else "FactorizedCogVideoXPipeline"
    assert index["_class_name"] == pipeline
    assert index["transformer"] == ["diffusers", facts.anchored_class]
    defaults = index["call_defaults"]
    assert [defaults["height"], defaults["width"]] == [facts.sizes[0].height, facts.sizes[0].width]
    assert [defaults["num_frames"], defaults["frame_rate"]] == [facts.frame_counts[0], facts.frame_rate]
    assert defaults["negative_prompt"] == (WAN_NEGATIVE_PROMPT if name.startswith("Wan") else "")
    assert index.get("boundary_ratio") == facts.boundary_ratio
    presets = SchedulerPresets.from_pretrained(tmp_path / "out" / "schedulers")
    default = next(iter(presets.values()))
    assert default.name == "anchored-15"
    assert (default.guidance_scale, getattr(default, "guidance_scale_2", None)) == (
        facts.guidance_scale,
        facts.guidance_scale_2,
    )
    assert getattr(default, "flow_shift", None) == facts.sizes[0].flow_shift
    assert index["scheduler"] == ["diffusers", default.scheduler_class]
    shim = (tmp_path / "out" / "pipeline.py").read_text()
    assert shim == f"from diffusers_fvg import {pipeline}  # noqa: F401\n"


def test_a_repository_for_480p_begins_with_its_shift(tmp_path):
    base = write_base(tmp_path / "base", "Wan2.1-T2V-14B")
    made = assemble(tmp_path / "out", base, call_defaults={"height": 480, "width": 832})
    assert next(iter(made.presets)) == "anchored-15-480p" and made.presets["anchored-15-480p"].flow_shift == 3.0
    assert made.index["call_defaults"]["num_frames"] == 81 and made.index["call_defaults"]["width"] == 832
    # A repository made of it keeps what it was made for, unless told otherwise.
    again = assemble(tmp_path / "again", str(tmp_path / "out"), dry_run=True)
    assert again.index["call_defaults"] == made.index["call_defaults"] and list(again.presets) == list(made.presets)
    chosen = assemble(tmp_path / "chosen", base, presets=["lightx2v-4", "full-50"], dry_run=True)
    assert list(chosen.presets) == ["lightx2v-4", "full-50"]
    with pytest.raises(ValueError, match="Unknown preset 'lightning-4'; this pipeline has anchored-15, full-50, "):
        assemble(tmp_path / "wrong", base, presets=["lightning-4"])


@pytest.mark.parametrize(
    ("name", "defaults", "message"),
    [
        ("Wan2.1-T2V-1.3B", {"height": 65}, "`height=65` must be a positive multiple of 16; nearest: 64 and 80"),
        ("Wan2.2-TI2V-5B", {"width": 848}, "`width=848` must be a positive multiple of 32"),
        ("Wan2.1-T2V-1.3B", {"num_frames": 4}, "`num_frames=4` must be 4k . 1; nearest: 1 and 5"),
        ("CogVideoX1.5-5B", {"num_frames": 13}, "`num_frames=13` must be 8k . 1"),
        ("CogVideoX1.5-5B", {"height": 776}, "`height=776` must be a positive multiple of 16"),
        ("Wan2.1-T2V-1.3B", {"frame_rate": 0}, "`frame_rate=0` must be above 0"),
        ("Wan2.1-T2V-1.3B", {"frame_rate": float("inf")}, "`frame_rate=inf` must be a finite number"),
        ("Wan2.1-T2V-1.3B", {"height": True}, "`height=True` must be a whole number"),
        ("Wan2.1-T2V-1.3B", {"max_sequence_length": 0}, "`max_sequence_length=0` must be at least 1"),
    ],
)
def test_defaults_that_no_call_could_have_are_not_written(name, defaults, message, tmp_path):
    base = write_base(tmp_path / "base", name)
    config = {"z_dim": 48, "scale_factor_spatial": 16} if name == "Wan2.2-TI2V-5B" else {}
    (tmp_path / "base" / "vae" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        assemble(tmp_path / "out", base, call_defaults=defaults)
    # Nor where they are those of the base.
    index = tmp_path / "base" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"call_defaults": defaults}))
    with pytest.raises(ValueError, match=message):
        assemble(tmp_path / "out", base)
    assert not (tmp_path / "out").exists()


def test_defaults_of_an_animator_and_a_composer_are_checked(tmp_path):
    tiny_animator("wan22_i2v").save_pretrained(tmp_path / "animator")
    for options in ({"call_defaults": {"frame_rate": 0}}, {"animator_call_defaults": {"num_inference_steps": 0}}):
        with pytest.raises(ValueError, match="=0"):
            assemble(tmp_path / "out", animator=str(tmp_path / "animator"), **options)


# Facts of the base -> what is another's in its index and in its transformer's configuration, and the error.
REFUSED = {
    "another class": (
        "Wan2.1-T2V-1.3B",
        {"transformer": ["diffusers", "LTXVideoTransformer3DModel"]},
        {},
        "LTXVideo.*CogVideoX",
    ),
    "VACE": ("Wan2.1-T2V-1.3B", {"transformer": ["diffusers", "WanVACETransformer3DModel"]}, {}, "WanVACE.*T2V-1.3B"),
    "no transformer": (
        "Wan2.1-T2V-1.3B",
        {"_class_name": "ModelScopePipeline", "transformer": [None, None]},
        {},
        "a ModelScope",
    ),
    "Wan2.1-I2V": (
        "Wan2.1-T2V-14B",
        {"_class_name": "WanImageToVideoPipeline"},
        {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
        "`transformer` of .*base.* takes 36 channels and image embeddings.*such as .*Wan-AI/Wan2.1-T2V-14B-Diffusers",
    ),
    "Wan2.2-I2V": ("Wan2.2-T2V-A14B", {}, {"in_channels": 36}, "takes 36 channels, but latents have 16"),
    "CogVideoX1.5-I2V": (
        "CogVideoX1.5-5B",
        {"_class_name": "CogVideoXImageToVideoPipeline"},
        {"in_channels": 32, "ofs_embed_dim": 512},
        "takes 32 channels and an offset.*such as zai-org/CogVideoX",
    ),
}


@pytest.mark.parametrize(("name", "index", "config", "message"), REFUSED.values(), ids=REFUSED)
def test_a_base_that_cannot_be_anchored_is_refused_before_its_weights_are_read(
    name, index, config, message, hub, tmp_path
):
    base = tmp_path / "base"
    write_base(base, name)
    for file, changes in (("model_index.json", index), ("transformer/config.json", config)):
        (base / file).write_text(json.dumps(json.loads((base / file).read_text()) | changes))
    hub.add("org/base", base)
    for source, options in ((str(base), {}), ("org/base", {"light": False, "cache_dir": tmp_path / "cache"})):
        with pytest.raises(ValueError, match=message):
            assemble(tmp_path / "out", source, **options)
    assert not (tmp_path / "out").exists()
    assert not [file for file in hub.downloaded("org/base") if file.endswith(".safetensors")]


def test_a_vae_of_another_model_is_refused(tmp_path):
    write_base(tmp_path / "base", "Wan2.2-TI2V-5B")
    (tmp_path / "base" / "vae" / "config.json").write_text('{"z_dim": 16}')
    with pytest.raises(ValueError, match="takes 48 channels, but the VAE's latents have 16"):
        assemble(tmp_path / "out", str(tmp_path / "base"))


# -- end to end at tiny size ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Wan2.1-T2V-1.3B", "CogVideoX1.5-5B"])
def test_a_text_encoder_of_another_model_is_refused(name, tmp_path):
    base = tmp_path / "base"
    write_base(base, name)
    (base / "text_encoder" / "config.json").write_text('{"d_model": 768}')
    message = "takes text embeddings of width 4096, but the text encoder's have 768: load both from one repository"
    # Empty files stand for the weights: what reads them fails otherwise.
    for refused in (lambda: assemble(tmp_path / "out", str(base)), lambda: load(base, lora=False)):
        with pytest.raises(ValueError, match=message):
            refused()


def test_a_text_encoder_of_another_model_is_refused_as_a_component():
    parts = tiny_wan_family("Wan2.1-T2V-1.3B", text_dim=16)
    with pytest.raises(
        ValueError, match="`transformer` takes text embeddings of width 16, but the text encoder's have 32"
    ):
        FactorizedVideoPipeline(**parts, scheduler=None)


@pytest.mark.parametrize("light", [True, False])
def test_a_repository_around_an_animator(light, hub, tmp_path):
    stock = tiny_animator("wan22_i2v")
    stock.save_pretrained(tmp_path / "stock")
    commit = hub.add("org/i2v", tmp_path / "stock")
    flux().save_pretrained(tmp_path / "t2i")
    settings = {"guidance_scale": 3.5, "guidance_scale_2": 3.5}
    text = str(
        assemble(
            tmp_path / "out",
            animator="org/i2v",
            composer=str(tmp_path / "t2i"),
            light=light,
            call_defaults={"height": 32, "width": 32},
            animator_call_defaults=settings,
            cache_dir=tmp_path / "cache",
        )
    )
    assert f"animator: org/i2v@{commit[:8]}, {'referred to' if light else 'copied'}, licence not stated" in text
    assert bool(list((tmp_path / "out" / "animator").rglob("*.safetensors"))) is not light
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out", cache_dir=tmp_path / "cache")
    assert type(pipe) is FactorizedImageToVideoPipeline and type(pipe.composer.pipeline).__name__ == "FluxPipeline"
    assert pipe.animator.call_defaults == settings and pipe.call_defaults["height"] == 32
    assert (pipe.animator.reference or {}).get("revision") == (commit if light else None)
    expected, found = stock.transformer.state_dict(), pipe.animator.pipeline.transformer.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected) and pipe.rewriter is None


def test_what_an_animator_s_repository_does_not_take_is_refused(tmp_path, capsys):
    wan = write_base(tmp_path / "base", "Wan2.1-T2V-1.3B")
    with pytest.raises(ValueError, match="animator base is a WanPipeline, not an image-to-video pipeline"):
        assemble(tmp_path / "out", animator=wan)
    for options, message in (
        ({}, "Give either a `base` or an `animator`"),
        ({"base": wan, "animator": wan}, "Give either a `base` or an `animator`"),
        ({"animator": wan, "lora": "org/lora"}, "`lora='org/lora'` is not for a repository of an `animator`"),
        ({"base": wan, "animator_call_defaults": {"fps": 1}}, "is not for a repository of a `base`"),
    ):
        with pytest.raises(ValueError, match=message):
            assemble(tmp_path / "out", **options)
    assert main(["assemble", str(tmp_path / "out"), "--animator", wan, "--dry-run"]) == 2
    assert "not an image-to-video pipeline" in capsys.readouterr().err and not (tmp_path / "out").exists()


def write_lora(path, transformers):
    """An anchor LoRA of each expert in one file, as diffusers writes it: alpha is in the header. Returns the experts with it."""
    state, config = {}, {}
    for seed, (name, transformer) in enumerate(transformers.items()):
        torch.manual_seed(seed)
        transformer.add_adapter(
            LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_v"], init_lora_weights=False)
        )
        config |= {f"{name}.r": 2, f"{name}.lora_alpha": 3}
        state |= {f"{name}.{key}": value for key, value in get_peft_model_state_dict(transformer).items()}
    save_file(state, path, {"format": "pt", "lora_adapter_metadata": json.dumps(config)})
    return transformers


def test_two_experts_with_one_lora_file(tmp_path):
    parts = tiny_wan_family("Wan2.2-T2V-A14B")
    scheduler = FactorizedVideoPipeline.default_presets["full-50"].make_scheduler()
    WanPipeline(**parts, scheduler=scheduler).save_pretrained(tmp_path / "base")
    truth = write_lora(
        tmp_path / "anchor.safetensors", {name: parts[name] for name in ("transformer", "transformer_2")}
    )
    assemble(tmp_path / "out", str(tmp_path / "base"), lora=str(tmp_path / "anchor.safetensors"))
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipe.config.boundary_ratio == 0.875
    inputs = {
        "hidden_states": torch.randn(1, 16, 3, 4, 4),
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": torch.randn(1, 3, 32),
    }
    for name, expected in truth.items():
        with torch.no_grad():
            got, want = getattr(pipe, name)(**inputs).sample, expected(**inputs).sample
            expected.disable_adapters()
            assert (want - expected(**inputs).sample).abs().max() > 1e-3
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)

    write_lora(tmp_path / "high.safetensors", {"transformer": tiny_wan_family("Wan2.2-T2V-A14B")["transformer"]})
    with pytest.raises(ValueError, match=r"has no weights for \['transformer_2'\], but the base has two experts"):
        assemble(tmp_path / "half", str(tmp_path / "base"), lora=str(tmp_path / "high.safetensors"))


def test_a_light_repository_of_cogvideox(hub, tmp_path):
    scheduler = CogVideoXDDIMScheduler(**COGVIDEOX_1_5_SCHEDULE)
    CogVideoXPipeline(**tiny_cogvideox_components(), scheduler=scheduler).save_pretrained(tmp_path / "base")
    truth = write_lora(tmp_path / "anchor.safetensors", {"transformer": tiny_cogvideox_transformer()})["transformer"]
    hub.add("org/cog", tmp_path / "base")
    assemble(tmp_path / "light", "org/cog", lora=str(tmp_path / "anchor.safetensors"), cache_dir=tmp_path / "other")
    hub.add("org/light", tmp_path / "light")
    assert not list((tmp_path / "light").glob("transformer/*.safetensors"))
    index = json.loads((tmp_path / "light" / "model_index.json").read_text())
    assert not {"transformer_2", "boundary_ratio", "expand_timesteps"} & set(index)

    pipe = DiffusionPipeline.from_pretrained("org/light", cache_dir=tmp_path / "cache")
    assert type(pipe) is FactorizedCogVideoXPipeline
    assert type(pipe.transformer) is AnchorConditionedCogVideoXTransformer3D
    assert pipe.presets == COGVIDEOX_PRESETS and pipe.call_defaults["height"] == 768
    inputs = {
        "hidden_states": torch.randn(1, 4, 4, 4, 4),
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": torch.randn(1, 16, 32),
        "image_rotary_emb": pipe.transformer.rotary_embedding(4, 4, 4, device="cpu"),
    }
    with torch.no_grad():
        torch.testing.assert_close(pipe.transformer(**inputs).sample, truth(**inputs).sample, rtol=0, atol=1e-5)
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16, "num_inference_steps": 1}
    assert pipe.animate("a red circle", **size).shape == (1, 9, 32, 32, 3)

    # Bundled it needs no Hub, and from the light one a light one is made again.
    assemble(tmp_path / "again", "org/light", dry_run=True, cache_dir=tmp_path / "other")
    assemble(tmp_path / "whole", "org/cog", light=False, cache_dir=tmp_path / "other")
    hub.stop()
    whole = DiffusionPipeline.from_pretrained(tmp_path / "whole", cache_dir=tmp_path / "empty")
    assert type(whole) is FactorizedCogVideoXPipeline and whole.anchor_lora is None
