"""Recipes: from published configs without weights, and end to end with tiny weights under the real names."""

import re
from pathlib import Path

import PIL.Image
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from tiny import WORDS, tiny_composer, tiny_rewriter, tiny_tokenizer, tiny_unipc, tiny_wan_family
from tiny_cogvideox import tiny_cogvideox_components
from transformers import Qwen3Config, Qwen3Model

import diffusers_fvg
from diffusers_fvg import hub_revisions, load
from diffusers_fvg.cli import main
from diffusers_fvg.media import read_video, read_video_metadata
from diffusers_fvg.schedules.cogvideox import COGVIDEOX_1_5_SCHEDULE


BASES = {
    "wan2.2-5b": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    "wan2.1-1.3b": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "cogvideox1.5-5b": "zai-org/CogVideoX1.5-5B",
}
COMPOSER, REWRITER = "Tongyi-MAI/Z-Image-Turbo", "Qwen/Qwen3-4B-Instruct-2507"
PROMPT = "a red circle moves right"


def tiny_z_image() -> ZImagePipeline:
    """As diffusers' own test of the pipeline has it."""
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4]
    )
    with torch.no_grad():
        # They are made by `torch.empty`.
        transformer.x_pad_token.fill_(0.1)
        transformer.cap_pad_token.fill_(0.1)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[32, 64],
        latent_channels=16,
        norm_num_groups=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    )
    config = Qwen3Config(
        vocab_size=len(WORDS) + 3,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    parts = {"transformer": transformer, "vae": vae, "text_encoder": Qwen3Model(config), "tokenizer": tokenizer}
    return ZImagePipeline(**parts, scheduler=FlowMatchEulerDiscreteScheduler())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Repositories by their real names, with tiny weights."""
    root = tmp_path_factory.mktemp("repositories")
    for recipe, model in (("wan2.2-5b", "Wan2.2-TI2V-5B"), ("wan2.1-1.3b", "Wan2.1-T2V-1.3B")):
        WanPipeline(**tiny_wan_family(model), scheduler=tiny_unipc()).save_pretrained(root / BASES[recipe])
    scheduler = CogVideoXDDIMScheduler(**COGVIDEOX_1_5_SCHEDULE)
    cogvideox = CogVideoXPipeline(**tiny_cogvideox_components(), scheduler=scheduler)
    cogvideox.save_pretrained(root / BASES["cogvideox1.5-5b"])
    tiny_z_image().save_pretrained(root / COMPOSER)
    chat = tiny_rewriter()
    # Room for our examples.
    chat.model.config.max_position_embeddings = chat.tokenizer.model_max_length = 4096
    chat.model.save_pretrained(root / REWRITER)
    chat.tokenizer.save_pretrained(root / REWRITER)
    return root


@pytest.fixture
def repositories(hub, folders):
    """Name to commit."""
    return {name: hub.add(name, folders / name) for name in (*BASES.values(), COMPOSER, REWRITER)}


@pytest.fixture
def lora(folders, tmp_path):
    """An anchor LoRA of the recipe that the test names."""

    def make(recipe: str) -> str:
        name = {"wan2.1-1.3b": "AnchorConditionedTransformer3D"}.get(recipe, "AnchorConditionedCogVideoXTransformer3D")
        transformer = getattr(diffusers_fvg, name).from_pretrained(folders / BASES[recipe] / "transformer")
        transformer.add_adapter(
            LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        )
        state = {f"transformer.{key}": value for key, value in get_peft_model_state_dict(transformer).items()}
        save_file(state, tmp_path / "anchor.safetensors", {"format": "pt"})
        return str(tmp_path / "anchor.safetensors")

    return make


SIZE = {
    "wan2.2-5b": ["--height", "32", "--width", "64"],
    "wan2.1-1.3b": ["--height", "16", "--width", "32"],
    "cogvideox1.5-5b": ["--height", "16", "--width", "32"],
}


def generate(recipe: str, output: Path, *more: str) -> int:
    options = ["--device", "cpu", "--seed", "3", "--steps", "1", "--num-frames", "9", "--quiet", *SIZE[recipe]]
    return main(["generate", PROMPT, "--model", recipe, "--output", str(output), *options, *more])


# -- end to end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", BASES)
def test_a_name_becomes_a_video(recipe, repositories, lora, tmp_path):
    more = () if recipe == "wan2.2-5b" else ("--lora", lora(recipe))
    assert generate(recipe, tmp_path / "video.mp4", *more, "--save-stages", str(tmp_path / "stages")) == 0
    assert read_video(tmp_path / "video.mp4")[0].shape[0] == 9
    assert PIL.Image.open(tmp_path / "stages" / "anchor.png").height == int(SIZE[recipe][1])
    record = read_video_metadata(tmp_path / "video.mp4")
    assert record["model"] == recipe
    base = f"{BASES[recipe]}@{repositories[BASES[recipe]]}"
    expected = dict.fromkeys(("tokenizer", "text_encoder", "transformer", "vae"), base)
    expected |= {
        name: f"{name_}@{repositories[name_]}" for name, name_ in (("composer", COMPOSER), ("rewriter", REWRITER))
    }
    assert record["hub_revisions"] == expected


def test_the_composer_is_called_as_its_authors_call_it(repositories):
    pipe = load("wan2.2-5b")
    assert pipe.dtype == pipe.rewriter.dtype == pipe.composer.dtype == torch.bfloat16
    # README of Z-Image: num_inference_steps=9, guidance_scale=0.0.
    assert pipe.composer.call_defaults == {"num_inference_steps": 9, "guidance_scale": 0.0}
    assert type(pipe.composer.pipeline) is ZImagePipeline and pipe.config.expand_timesteps


def test_a_saved_recipe_refers_to_its_commits(repositories, tmp_path):
    pipe = load("wan2.2-5b")
    pipe.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").rglob("*.safetensors"))
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert hub_revisions(again) == hub_revisions(pipe)
    assert again.composer.call_defaults == pipe.composer.call_defaults


def test_a_commit_stays_the_same_offline_and_is_looked_up_anew_online(hub, repositories, folders):
    first = hub_revisions(load("wan2.2-5b"))
    newer = hub.add(REWRITER, folders / REWRITER)
    hub.requests.clear()
    assert hub_revisions(load("wan2.2-5b", local_files_only=True)) == first
    assert hub.requests == []
    again = hub_revisions(load("wan2.2-5b"))
    assert again["rewriter"] == f"{REWRITER}@{newer}" != first["rewriter"]
    assert {**again, "rewriter": first["rewriter"]} == first


def test_parts_can_be_replaced(hub, repositories, folders, lora, tmp_path):
    tiny_composer().pipeline.save_pretrained(tmp_path / "t2i")
    commit = hub.add("org/t2i", tmp_path / "t2i")
    hub.add("org/chat", folders / REWRITER)
    hub.add("org/lora", Path(lora("wan2.1-1.3b")).parent)
    hub.downloads.clear()
    pipe = load("wan2.1-1.3b", composer="org/t2i", rewriter="org/chat@main", lora="org/lora/anchor.safetensors")
    revisions = hub_revisions(pipe)
    assert revisions["composer"] == f"org/t2i@{commit}" and revisions["rewriter"].startswith("org/chat@")
    assert revisions["anchor_lora"].startswith("org/lora@") and len(revisions["anchor_lora"].split("@")[1]) == 40
    assert hub.downloaded(COMPOSER) == hub.downloaded(REWRITER) == set()
    # A folder is used where it is; a chat model's needs no settings.
    again = load(
        "wan2.1-1.3b", composer=tmp_path / "t2i", rewriter=folders / REWRITER, lora=tmp_path / "anchor.safetensors"
    )
    assert hub_revisions(again).keys() == {"tokenizer", "text_encoder", "transformer", "vae"}
    assert type(again.composer.pipeline) is WanPipeline


def test_a_folder_comes_before_a_recipe(hub, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wan2.2-5b").symlink_to(folders / BASES["wan2.1-1.3b"])
    pipe = load("wan2.2-5b", rewriter=tiny_rewriter())
    assert pipe.transformer.config.in_channels == 16 and pipe.rewriter is not None and hub.requests == []


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["wan2.1-1.3b", "cogvideox1.5-5b"])
def test_a_missing_anchor_lora_is_said_before_anything_is_asked(recipe, hub, tmp_path, capsys):
    assert generate(recipe, tmp_path / "video.mp4") == 2
    error = capsys.readouterr().err
    assert f"{recipe} needs an anchor LoRA, and none is published" in error and f"fvg train --recipe {recipe}" in error
    assert hub.requests == []


def test_a_wrong_part_is_said_before_weights_are_fetched(hub, repositories, lora):
    with pytest.raises(OSError, match="The rewriter names org/none on the Hub"):
        load("wan2.2-5b", rewriter="org/none")
    # Of another base, which is narrower.
    with pytest.raises(ValueError, match="fits"):
        load("wan2.2-5b", lora=lora("cogvideox1.5-5b"))
    assert not [path for _, path, _ in hub.downloads if path.endswith(".safetensors")]


def test_without_a_connection_it_is_one_line_and_the_cache_still_works(
    hub, repositories, tmp_path, capsys, monkeypatch
):
    expected = hub_revisions(load("wan2.2-5b"))
    hub.stop()
    assert generate("wan2.2-5b", tmp_path / "video.mp4") == 2
    assert re.search(r"the Hub does not answer \(.*HF_HUB_OFFLINE=1", capsys.readouterr().err.splitlines()[-1])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert generate("wan2.2-5b", tmp_path / "video.mp4") == 0
    assert read_video_metadata(tmp_path / "video.mp4")["hub_revisions"] == expected


def test_unknown_names(hub):
    with pytest.raises(ValueError, match="'wan2.2' is no folder and no recipe; recipes are wan2.2-5b, wan2.1-1.3b, "):
        load("wan2.2")
    assert hub.requests == []
