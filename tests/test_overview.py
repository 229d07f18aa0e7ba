"""Output of `fvg models`, `fvg train --recipe` and `fvg doctor`, against published counts, training examples and the tests' Hub."""

import json
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan
from test_assembly import write_base
from transformers import UMT5Config, UMT5EncoderModel

import diffusers_fvg
from diffusers_fvg import RECIPES, assemble
from diffusers_fvg.cli import main
from diffusers_fvg.kernels.dispatch import kernel_report, use_kernels
from diffusers_fvg.loading.references import HubReference
from diffusers_fvg.overview import models_text, training_text, weight_bytes
from diffusers_fvg.pipelines.profiles import WAN_VAES
from diffusers_fvg.recipes import ANIMATOR_RECIPES, STORED
from diffusers_fvg.recipes.outline import make_animator_models, make_parts
from diffusers_fvg.schedules.presets import SchedulerPresets
from diffusers_fvg.training.config import TrainConfig


EXAMPLES = Path(__file__).parents[1] / "examples" / "training"
# Counted from checkpoints or stated by the authors; of Qwen3-4B the model card says 4.0B, and 3.6B without embeddings.
Z_IMAGE, QWEN3_4B, QWEN3_4B_EMBEDDINGS = 6_154_908_736, 4_022_468_096, 151936 * 2560
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())


# -- published configs, no weights ------------------------------------------------------------------------------------


@every_recipe
def test_a_base_resolves_to_the_published_model(recipe, hub, tmp_path):
    facts = recipe.facts
    commit = hub.add(facts.repository, Path(write_base(tmp_path / "base", facts.name)))
    assembly = assemble(tmp_path / "out", facts.repository)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["call_defaults"] == json.loads(json.dumps(facts.call_defaults))
    presets = SchedulerPresets.from_pretrained(tmp_path / "out" / "schedulers")
    assert next(iter(presets)) == "anchored-15" and presets["anchored-15"].guidance_scale == facts.guidance_scale
    assert index["transformer"] == ["diffusers", HubReference.__name__]
    reference = json.loads((tmp_path / "out" / "transformer" / "reference.json").read_text())
    assert (reference["repository"], reference["revision"]) == (facts.repository, commit)
    part = next(part for part in assembly.parts if part.name == "transformer")
    kind = getattr(diffusers_fvg, reference["class"])
    with init_empty_weights():
        model = kind.from_config(part.source.read_json("transformer/config.json"))
    assert model.num_parameters() == facts.parameters and {tensor.device.type for tensor in model.parameters()} == {
        "meta"
    }
    assert not [path for _, path, _ in hub.downloads if path.endswith(".safetensors")]


@every_recipe
def test_parts_have_the_published_number_of_parameters(recipe):
    with torch.device("meta"):
        parts = make_parts(recipe)
    counts = {name: sum(tensor.numel() for tensor in part.parameters()) for name, part in parts.items()}
    assert counts == {"rewriter": QWEN3_4B, "composer": Z_IMAGE + QWEN3_4B}
    assert round(QWEN3_4B / 1e9, 1) == 4.0 and round((QWEN3_4B - QWEN3_4B_EMBEDDINGS) / 1e9, 1) == 3.6


def test_stored_sizes_are_counted():
    with torch.device("meta"):
        vae = AutoencoderKLWan(**WAN_VAES[48])
        umt5 = UMT5EncoderModel(
            UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
        )
    transformer = RECIPES["wan2.2-5b"].facts.parameters
    expected = 4 * (transformer + vae.num_parameters()) + 2 * umt5.num_parameters()
    assert {RECIPES["wan2.2-5b"].facts.repository: expected, "Qwen/Qwen3-4B-Instruct-2507": 2 * QWEN3_4B} == STORED


@every_recipe
def test_names_and_sources(recipe):
    assert "/" not in recipe.name and recipe.name == recipe.name.lower()
    assert recipe.lora is None, "the text says that none is published"
    for part in (recipe.composer, recipe.rewriter):
        assert {"repository", "license", "configs"} <= part.sources.keys() and all(part.sources.values())
        assert bool(part.call_defaults) == ("call_defaults" in part.sources)
    assert set(recipe.licenses.values()) <= {"apache-2.0", "cogvideox-license"}


# Numbers of weights. Stated by their authors, of Qwen2.5-7B without its head, or counted of the classes with the converters'
# values: diffusers' own.
GEMMA_3_12B, QWEN25_7B, UMT5_XXL = 12_187_325_040, 7_615_616_512 - 152064 * 3584, 5_680_910_336
ANIMATORS = {
    "ltx-2.3": {"text_encoder": GEMMA_3_12B, "transformer": 18_988_838_144},
    "hunyuanvideo-1.5-i2v": {"text_encoder": QWEN25_7B, "transformer": 8_326_608_160, "image_encoder": 428_225_600},
    "wan2.2-i2v-a14b": {"text_encoder": UMT5_XXL, "transformer": 14_288_901_184, "transformer_2": 14_288_901_184},
    "sana-video-2b": {"text_encoder": 2_614_341_888, "transformer": 1_905_841_344, "vae": 126_892_531},
}


@pytest.mark.parametrize("recipe", ANIMATOR_RECIPES.values(), ids=ANIMATOR_RECIPES.keys())
def test_an_animator_resolves_on_the_meta_device(recipe):
    with torch.device("meta"):
        models = make_animator_models(recipe)
    assert all(tensor.device.type == "meta" for model in models.values() for tensor in model.parameters())
    counts = {name: sum(tensor.numel() for tensor in model.parameters()) for name, model in models.items()}
    expected = ANIMATORS[recipe.name]
    assert {name: counts[name] for name in expected} == expected
    # The width of the text encoders' output is that of the video model's input.
    config = models["transformer"].config
    widths = [config.get(name) for name in ("text_dim", "caption_channels", "text_embed_dim") if config.get(name)]
    texts = models["text_encoder"].config
    assert widths[0] == getattr(texts, "d_model", None) or widths[0] == texts.get_text_config().hidden_size
    for part in recipe.parts.values():
        named = "models" if part is recipe.animator else "configs"
        assert {"repository", "license", named} <= part.sources.keys() and all(part.sources.values())
        assert bool(part.call_defaults) == ("call_defaults" in part.sources)
    assert "/" not in recipe.name and recipe.name == recipe.name.lower()


# -- fvg models -------------------------------------------------------------------------------------------------------


def rows(text: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split() for line in text.splitlines() if line}


def test_the_table_fits_a_terminal_and_says_what_is_not_known(capsys):
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    table = rows(text)
    assert table["wan2.2-5b"][1] == "kept" and table["wan2.1-1.3b"][1:3] == ["needs", "LoRA"]
    # Weights of the composer and of the VAE, and 2 GiB of working memory.
    peak = (2 * (Z_IMAGE + QWEN3_4B) + 2 * 704_688_668) / 2**30 + 2
    assert table["wan2.2-5b"][6:8] == ["stages", f"{peak:.1f}"]
    # All components at once do not fit 48 GB.
    assert [table["wan2.2-5b"][2], table["wan2.2-5b"][8]] == ["layers", "all"]
    # Its VAE has 215,583,907 numbers, and decodes in tiles.
    peak = (2 * (Z_IMAGE + QWEN3_4B) + 2 * 215_583_907) / 2**30 + 2
    assert table["cogvideox1.5-5b"][5:7] == ["stages", f"{peak:.1f}+"] and "has never run a recipe" in text
    # The composer's weights, the text encoder's behind them or the VAE's, and the rooms to work in.
    sana = table["sana-video-2b"]
    peak = (2 * (Z_IMAGE + QWEN3_4B) + 2 * 126_892_531) / 2**30 + 2
    assert sana[3:5] == ["stages", f"{peak:.1f}"]
    # Both experts of 28.6 GB at once are for no card, one of them and the VAE for 48 GB, with an allowance of 8 GiB.
    assert table["wan2.2-i2v-a14b"][5:] == ["stages", f"{(2 * 14_288_901_184 + 2 * 126_892_531) / 2**30 + 8:.1f}"] * 2
    # Without a Hub, published sizes are used, or none.
    assert table["Wan-AI/Wan2.2-TI2V-5B-Diffusers"][1:3] == ["apache-2.0", "34.2"]
    assert table["Tongyi-MAI/Z-Image-Turbo"][1:] == ["apache-2.0", "?", "all:", "composer"]
    assert table["zai-org/CogVideoX1.5-5B"][1:] == ["cogvideox-license", "?", "cogvideox1.5-5b:", "base"]


def test_sizes_are_what_the_hub_has(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_fvg.overview.memory_cells", lambda recipe, profiles: ["-"] * len(profiles))
    for repository in {name for recipe in RECIPES.values() for name in recipe.repositories.values()}:
        folder = tmp_path / repository / "transformer"
        folder.mkdir(parents=True)
        for name in ("diffusion_pytorch_model", "diffusion_pytorch_model.fp16", "other"):
            (folder / f"{name}.safetensors").write_bytes(b"\0" * 7)
        hub.add(repository, tmp_path / repository)
    hub.sizes["transformer/diffusion_pytorch_model.safetensors"] = 60_000_000
    table = rows(models_text())
    assert table["Tongyi-MAI/Z-Image-Turbo"][2] == table["Wan-AI/Wan2.2-TI2V-5B-Diffusers"][2] == "0.1"
    assert hub.downloads == []


def test_weights_that_are_loaded_are_counted():
    files = {"text_encoder/model-00001-of-00002.safetensors": 5, "text_encoder/model-00002-of-00002.safetensors": 7}
    files |= {"text_encoder/model.fp16.safetensors": 100, "original/wan.safetensors": 1000, "model.safetensors": 11}
    files |= {"text_encoder/model.safetensors.index.json": 3, "text_encoder/pytorch_model.bin": 40}
    assert weight_bytes(files) == 5 + 7 + 11


# -- fvg train --recipe -----------------------------------------------------------------------------------------------


@every_recipe
def test_it_prints_the_config_of_the_examples(recipe, capsys, tmp_path):
    assert main(["train", "--recipe", recipe.name]) == 0
    text = capsys.readouterr().out
    example = EXAMPLES / f"{recipe.facts.name.lower()}.toml"
    assert tomllib.loads(text) == tomllib.loads(example.read_text())
    (tmp_path / "run.toml").write_text(text)
    assert TrainConfig.load(tmp_path / "run.toml") == TrainConfig.load(example)
    (total,) = re.findall(r"sum +([\d.]+) GiB", example.read_text())
    assert f"Memory: {float(total):.0f} GiB" in text and "never run" in text
    assert f"fvg train {recipe.name}.toml" in text and f"--model {recipe.name} --lora " in text


def test_cost_by_hand():
    # Wan2.1-T2V-1.3B: 30 layers of width 1536, 21 x 30 x 52 = 32760 tokens, 2000 steps of 8 clips.
    dense = 6 * 1_418_996_800 * 32760
    attention = 16 * 32760**2 * 1536 * 30
    hours = 16000 * (dense + attention) / 989.4e12 / 3600
    text = training_text(RECIPES["wan2.1-1.3b"])
    assert "16000 clips in 2000 steps" in text and f"at least {hours:.0f} hours" in text and 4.5 < hours < 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either the TOML file of a run or --recipe NAME"),
        (["run.toml", "--recipe", "wan2.2-5b"], "give either"),
        (["--recipe", "wan"], "--recipe wan must be one of wan2.2-5b, wan2.1-1.3b, cogvideox1.5-5b"),
    ],
)
def test_train_refuses(arguments, message, capsys):
    assert main(["train", *arguments]) == 2
    assert message in capsys.readouterr().err


# -- fvg doctor -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gibibytes", "fits"), [(100, True), (20, False)])
def test_doctor_tells_what_there_is_and_what_would_run(gibibytes, fits, capsys, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("diffusers_fvg.animate.memory.free_bytes", lambda device: gibibytes * 2**30)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for package in ("torch", "diffusers", "transformers"):
        assert f"\n{package} {version(package)}\n" in text
    assert f", {gibibytes}.0 GiB free\n  attention: native, diffusers' default; " in text
    assert "\n  kernels: torch (FVG_KERNELS=auto" in text
    assert "\n  8-bit products: off; --quantize fp8-dynamic fails: cpu is not an NVIDIA GPU" in text
    assert "\n  anchor LoRA: separate layers" in text
    # 8.04 + 20.35 + 11.36 + 10.00 + 1.41 GB of weights, and what the VAE or the transformer works in.
    if fits:
        (peak,) = re.findall(r"wan2.2-5b: fits: all, ([\d.]+) GiB", text)
        assert 51.16e9 / 2**30 < float(peak) < 60
    else:
        assert re.search(r"wan2.2-5b: too large: `\w+` needs [\d.]+ GiB \(computed\)\n", text)
    # 2 bytes of 9 x 20 numbers for each pixel and channel do not fit into what is left: tiles do.
    cogvideox = "cogvideox1.5-5b: fits: all, decode in tiles" if fits else "cogvideox1.5-5b: too large: "
    assert cogvideox in text and "`fvg` uses cpu" in text


def test_kernels_are_reported_as_they_are_chosen():
    cpu = torch.device("cpu")
    assert kernel_report(cpu).startswith("torch (FVG_KERNELS=auto); Triton is not for cpu: ")
    with use_kernels("reference"):
        assert kernel_report(cpu).startswith("torch (FVG_KERNELS=reference); Triton is not for cpu: ")


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out == f"fvg {version('diffusers-fvg')}\n"
