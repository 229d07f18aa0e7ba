"""Recipes: from published configs without weights, and end to end with tiny weights under the real names."""

import functools
import re
from dataclasses import FrozenInstanceError
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
    FluxPipeline,
    WanPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from tiny import WORDS, tiny_pipeline, tiny_rewriter, tiny_tokenizer, tiny_unipc, tiny_wan_family
from tiny_cogvideox import tiny_cogvideox_components, tiny_cogvideox_pipeline
from tiny_composers import flux
from transformers import Qwen3Config, Qwen3Model

import diffusers_fvg
from diffusers_fvg import FactorizedVideoPipeline, hub_revisions, load
from diffusers_fvg.cli import main
from diffusers_fvg.media import read_video, read_video_metadata
from diffusers_fvg.recipes import ANIMATOR_RECIPES, RECIPES, outline
from diffusers_fvg.schedules.cogvideox import COGVIDEOX_1_5_SCHEDULE


BASES = {
    "wan2.2-5b": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    "wan2.1-1.3b": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "cogvideox1.5-5b": "zai-org/CogVideoX1.5-5B",
}
COMPOSER, REWRITER = "Tongyi-MAI/Z-Image-Turbo", "Qwen/Qwen3-4B-Instruct-2507"
PROMPT = "a red circle moves right"


def tiny_z_image() -> ZImagePipeline:
    """The same components as in diffusers' own test of the pipeline."""
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4]
    )
    with torch.no_grad():
        # These weights are created by `torch.empty`.
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


@pytest.fixture(scope="module", autouse=True)
def outlined_once():
    """The models of a recipe without weights, in their real sizes, are made once for each dtype."""
    make = outline._recipe_components

    @functools.cache
    def made(name: str, dtype: torch.dtype) -> dict:
        return make(RECIPES[name])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outline, "_recipe_components", lambda recipe: dict(made(recipe.name, torch.get_default_dtype())))
        yield


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
    """Commit of each repository."""
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
def test_a_name_becomes_a_video(recipe, repositories, lora, tmp_path, capsys):
    more = ("--memory", "16GB") if recipe == "wan2.2-5b" else ("--memory", "16GB", "--lora", lora(recipe))
    assert generate(recipe, tmp_path / "video.mp4", *more, "--save-stages", str(tmp_path / "stages")) == 0
    assert "memory:             16GB: all, peak 2.0 GiB (computed)\n" in capsys.readouterr().out
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


def test_what_needs_no_lora_asks_for_none_and_fetches_its_part_alone(hub, repositories, tmp_path, capsys):
    recipe = "wan2.1-1.3b"
    assert main(["rewrite", PROMPT, "--model", recipe, "--quiet"]) == 0
    assert capsys.readouterr().out.strip()
    fetched = {path.split("/")[0] for repository, path, _ in hub.downloads if path.endswith(".safetensors")}
    assert hub.downloaded(REWRITER) and not hub.downloaded(BASES[recipe]) | hub.downloaded(COMPOSER), fetched
    hub.downloads.clear()
    picture = tmp_path / "anchor.png"
    options = ["--height", "16", "--width", "32", "--quiet", "--output", str(picture), "--steps", "1"]
    assert main(["compose", PROMPT, "--model", recipe, *options]) == 0
    assert PIL.Image.open(picture).size == (32, 16) and not hub.downloaded(BASES[recipe]) | hub.downloaded(REWRITER)
    hub.downloads.clear()
    assert generate(recipe, tmp_path / "video.mp4", "--mode", "direct", "--quantize", "fp8", "--memory", "cpu") == 0
    assert hub.downloaded(BASES[recipe]) and not hub.downloaded(COMPOSER) | hub.downloaded(REWRITER)
    assert read_video(tmp_path / "video.mp4")[0].shape[0] == 9


@pytest.mark.parametrize("recipe", BASES)
def test_a_plan_fetches_no_weights(recipe, hub, repositories, capsys):
    assert main(["plan", "--model", recipe, "--memory", "16GB"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    facts = diffusers_fvg.RECIPES[recipe].facts
    size = facts.sizes[0]
    assert f"{facts.frame_counts[0]} frames at {facts.frame_rate} per second, {size.height} x {size.width}" in text
    # 15 steps, each with and without the prompt.
    assert "anchored-15: 15 steps\nforwards   30 of the video model\n" in text and "16GB     layers" in text
    assert ("needs an anchor LoRA" in text) == (recipe != "wan2.2-5b") and "licence    rewriter: apache-2.0" in text
    # Tiny weights under the real names, whose sizes are asked for.
    assert f"download   0.0 GB of weights:\n      0.0  {BASES[recipe]}\n" in text
    assert not [path for _, path, _ in hub.downloads if path.endswith(".safetensors")]


# -- folders and repositories -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["wan2.1-1.3b", "cogvideox1.5-5b"])
@pytest.mark.parametrize("place", ["folder", "repository"])
def test_a_stock_pipeline_becomes_ours_with_a_lora(recipe, place, hub, repositories, folders, lora):
    name = folders / BASES[recipe] if place == "folder" else BASES[recipe]
    with pytest.raises(ValueError, match="fits"):
        load(name, lora=lora({"wan2.1-1.3b": "cogvideox1.5-5b"}.get(recipe, "wan2.1-1.3b")))
    assert not [path for _, path, _ in hub.downloads if path.endswith(".safetensors")]
    pipe = load(name, lora=lora(recipe), rewriter=tiny_rewriter(), dtype=torch.float32)
    assert type(pipe).__name__ == {"wan2.1-1.3b": "FactorizedVideoPipeline"}.get(recipe, "FactorizedCogVideoXPipeline")
    assert "anchor" in pipe.transformer.peft_config and pipe.composer is None and pipe.rewriter is not None
    commit = {} if place == "folder" else {"pipeline": f"{BASES[recipe]}@{repositories[BASES[recipe]]}"}
    assert hub_revisions(pipe) == commit
    plain = load(name, lora=False, dtype=torch.float32)
    assert not hasattr(plain.transformer, "peft_config")


def test_every_class_of_ours_loads(tmp_path, hub, folders, repositories):
    from tiny_dreamer import tiny_dreamer_pipeline

    pipes = {"wan": tiny_pipeline(), "cogvideox": tiny_cogvideox_pipeline(), "dreamer": tiny_dreamer_pipeline()}
    for name, pipe in pipes.items():
        pipe.save_pretrained(tmp_path / name)
        commit = hub.add(f"org/{name}", tmp_path / name)
        loaded = load(f"org/{name}@main", dtype=torch.float32)
        assert type(loaded) is type(pipe) and hub_revisions(loaded) == {"pipeline": f"org/{name}@{commit}"}
        assert load(tmp_path / name, composer=False, rewriter=False).composer is None
    # A light repository refers to others.
    light = load("wan2.2-5b")
    light.save_pretrained(tmp_path / "light")
    again = load(tmp_path / "light")
    assert hub_revisions(again) == hub_revisions(light)
    with pytest.raises(ValueError, match="takes no anchor LoRA"):
        load(tmp_path / "dreamer", lora="org/lora")


def test_the_command_line_runs_every_class(tmp_path, capsys, monkeypatch):
    from tiny_dreamer import tiny_dreamer_pipeline

    monkeypatch.chdir(tmp_path)
    tiny_dreamer_pipeline().save_pretrained("dreamer")
    options = ["--model", "dreamer", "--height", "16", "--width", "16", "--quiet", "--dtype", "float32"]
    assert main(["generate", PROMPT, *options, "--steps", "1", "--output", "video.mp4", "--memory", "16GB"]) == 0
    assert read_video("video.mp4")[0].shape[0] == 16
    for wrong, message in (
        (["--mode", "storyboard"], 'does not support `mode="storyboard"`'),
        (["--anchor-decode", "match"], "--anchor-decode match is not an argument of FactorizedDreamerPipeline"),
        (["--lora", "org/lora"], "takes no anchor LoRA"),
        (["--output", "video.mp4"], "already exists"),
    ):
        assert main(["generate", PROMPT, *options, *wrong]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


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
    flux().save_pretrained(tmp_path / "t2i")
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
    assert type(again.composer.pipeline) is FluxPipeline


def test_a_folder_comes_before_a_recipe(hub, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wan2.2-5b").symlink_to(folders / BASES["wan2.1-1.3b"])
    pipe = load("wan2.2-5b", rewriter=tiny_rewriter())
    assert pipe.transformer.config.in_channels == 16 and pipe.rewriter is not None and hub.requests == []


# -- again ------------------------------------------------------------------------------------------------------------


def again(video: Path, *more: str) -> int:
    return main(["generate", "--from", str(video), "--output", str(video.with_name("again.mp4")), "--quiet", *more])


@pytest.mark.slow
def test_a_recipe_s_video_is_made_again_of_its_commits(hub, repositories, folders, lora, tmp_path, capsys):
    flux().save_pretrained(tmp_path / "t2i")
    hub.add("org/t2i", tmp_path / "t2i")
    hub.add("org/lora", Path(lora("wan2.1-1.3b")).parent)
    more = ("--lora", "org/lora/anchor.safetensors", "--composer", "org/t2i")
    assert generate("wan2.1-1.3b", tmp_path / "video.mp4", *more) == 0
    record = read_video_metadata(tmp_path / "video.mp4")
    for name in ("org/t2i", "org/lora", BASES["wan2.1-1.3b"]):
        # Newer commits, which must not be used.
        hub.add(name, folders / REWRITER)
    capsys.readouterr()
    assert again(tmp_path / "video.mp4") == 0
    assert (tmp_path / "video.mp4").read_bytes() == (tmp_path / "again.mp4").read_bytes()
    revisions, printed = record["hub_revisions"], capsys.readouterr().out
    assert revisions["rewriter"].startswith(REWRITER)
    commit = revisions["vae"].partition("@")[2]
    told = f"model wan2.1-1.3b@{commit}, composer {revisions['composer']}, LoRA {revisions['anchor_lora']}"
    assert f"from the record:    {told}\n" in printed


def test_a_repository_s_video_is_made_again_of_its_commit(hub, tmp_path, capsys, monkeypatch):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "fvg")
    commit = hub.add("org/fvg", tmp_path / "fvg")
    size = ["--height", "32", "--width", "32", "--num-frames", "5", "--steps", "1", "--device", "cpu", "--quiet"]
    call = ["generate", PROMPT, "--model", "org/fvg", *size, "--output", str(tmp_path / "video.mp4")]
    assert main(call) == 0
    record = read_video_metadata(tmp_path / "video.mp4")
    assert (record["model"], record["revision"]) == ("org/fvg", commit)
    # Loading without a recipe gives the same.
    loaded = FactorizedVideoPipeline.from_pretrained("org/fvg")
    there = loaded(PROMPT, mode="direct", height=32, width=32, num_frames=5, num_inference_steps=1).records[0]
    assert (there["model"], there["revision"]) == ("org/fvg", commit)
    torch.nn.init.zeros_(pipe.transformer.proj_out.weight)
    pipe.save_pretrained(tmp_path / "fvg")
    hub.add("org/fvg", tmp_path / "fvg")
    assert again(tmp_path / "video.mp4") == 0
    assert (tmp_path / "video.mp4").read_bytes() == (tmp_path / "again.mp4").read_bytes()
    warnings = []
    monkeypatch.setattr("diffusers_fvg.pipelines.replay.logger.warning", warnings.append)
    assert again(tmp_path / "video.mp4", "--model", "org/fvg", "--overwrite") == 0
    assert f"revision '{commit}', here" in warnings[0]
    assert (tmp_path / "video.mp4").read_bytes() != (tmp_path / "again.mp4").read_bytes()


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("hunyuan_video15_i2v", "ltx2_condition")]


@pytest.mark.parametrize("family", ["wan22_i2v", *SLOW])
def test_an_image_to_video_pipeline_becomes_the_animator(family, hub, repositories, tmp_path, capsys, monkeypatch):
    from tiny_animators import tiny_animator

    monkeypatch.chdir(tmp_path)
    stock = tiny_animator(family)
    stock.save_pretrained("stock")
    commit = hub.add("org/i2v", tmp_path / "stock")
    pipe = load("org/i2v", dtype=torch.float32, composer=COMPOSER, rewriter=tiny_rewriter())
    assert type(pipe) is diffusers_fvg.FactorizedImageToVideoPipeline and type(pipe.animator.pipeline) is type(stock)
    assert hub_revisions(pipe)["animator"] == f"org/i2v@{commit}"
    pipe.save_pretrained("light")
    PIL.Image.new("RGB", (64, 64), "red").save("anchor.png")
    options = ["--height", "64", "--width", "64", "--num-frames", "9", "--steps", "2", "--dtype", "float32", "--quiet"]
    if family == "hunyuan_video15_i2v":
        options[:4] = ["--height", "32", "--width", "32"]
    for model in ("org/i2v", "stock", "light"):
        arguments = ["generate", PROMPT, "--model", model, "--image", "anchor.png", *options]
        assert main([*arguments, "--output", f"{model[:3]}.mp4", "--guidance-scale", "2"]) == 0, (
            capsys.readouterr().err
        )
        assert read_video(f"{model[:3]}.mp4")[0].shape[0] == 9
    assert main(["plan", "--model", "light", *options[:6], "--memory", "24GB", "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    assert f"{pipe.animator.family.name}: activation memory is an allowance" in printed
    # Nothing large is downloaded for a call that is refused.
    before = len(hub.downloads)
    assert main([*arguments[:3], "org/i2v", *arguments[4:], "--num-frames", "6", "--output", "no.mp4"]) == 2
    assert "`num_frames=6` must be" in capsys.readouterr().err
    assert not [path for _, path, _ in hub.downloads[before:] if path.endswith(".safetensors")]
    assert main([*arguments, "--lora", "org/lora", "--output", "no.mp4"]) == 2
    assert "takes no anchor LoRA" in capsys.readouterr().err


# Recipe -> tiny weights under its name, and whether those are saved as the text-to-video pipeline that the repository is.
ANIMATORS = {
    "sana-video-2b": ("sana_video_i2v", True),
    "wan2.2-i2v-a14b": ("wan22_i2v", False),
    "ltx-2.3": ("ltx2_i2v", True),
    "hunyuanvideo-1.5-i2v": ("hunyuan_video15_i2v", False),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in list(ANIMATORS)[1:]]


@pytest.mark.parametrize("recipe", ["sana-video-2b", *SLOW])
def test_a_recipe_with_an_animator_becomes_a_video(recipe, hub, repositories, tmp_path, capsys):
    from tiny_animators import tiny_animator

    family, is_text_to_video = ANIMATORS[recipe]
    stock, facts = tiny_animator(family), ANIMATOR_RECIPES[recipe]
    saved = diffusers_fvg.AnchorAnimator(stock).text_to_video() if is_text_to_video else stock
    saved.save_pretrained(tmp_path / "stock")
    commit = hub.add(facts.animator.repository, tmp_path / "stock")
    size = ["32", "32"] if "hunyuan" in family else ["64", "64"]
    arguments = ["--height", size[0], "--width", size[1], "--num-frames", "9", "--steps", "2", "--dtype", "float32"]
    output = tmp_path / "video.mp4"
    call = ["generate", PROMPT, "--model", recipe, *arguments, "--quiet", "--output", str(output)]
    assert main(call) == 0, capsys.readouterr().err
    assert len(read_video(output)[0]) == 9
    assert read_video_metadata(output)["hub_revisions"]["animator"] == f"{facts.animator.repository}@{commit}"
    again = ["generate", "--from", str(output), "--quiet", "--output", str(tmp_path / "again.mp4")]
    assert main(again) == 0, capsys.readouterr().err
    # Its own parts at the recorded commits, and called as the recipe says.
    assert f"composer {facts.composer.repository}@" in capsys.readouterr().out
    assert (tmp_path / "again.mp4").read_bytes() == output.read_bytes()
    pipe = load(recipe, dtype=torch.float32)
    assert type(pipe.animator.pipeline) is type(stock) and pipe.animator.call_defaults == facts.animator.call_defaults
    assert pipe.composer.call_defaults == facts.composer.call_defaults
    assert main(["plan", "--model", recipe, *arguments[:6], "--memory", "80GB"]) == 0
    assert facts.licenses["animator"] in capsys.readouterr().out
    assert main([*call, "--lora", "org/lora"]) == 2


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [COMPOSER, REWRITER, "org/v2v", "org/none", f"{BASES['wan2.1-1.3b']}@none"])
def test_what_is_no_such_pipeline_is_told_before_weights_are_fetched(
    name, hub, repositories, folders, tmp_path, capsys
):
    (tmp_path / "v2v").mkdir()
    (tmp_path / "v2v" / "model_index.json").write_text('{"_class_name": "WanVideoToVideoPipeline"}')
    hub.add("org/v2v", tmp_path / "v2v")
    assert main(["generate", PROMPT, "--model", name, "--quiet", "--output", str(tmp_path / "video.mp4")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    expected = {
        COMPOSER: "is a ZImagePipeline; use one of FactorizedVideoPipeline, .* text-to-image pipeline as `composer`",
        REWRITER: "is not a pipeline: it has no model_index.json",
        "org/v2v": "is a WanVideoToVideoPipeline; use one of .* or an image-to-video pipeline of diffusers",
        "org/none": "The model names org/none on the Hub, which cannot be loaded",
    }.get(name, "Wan2.1-T2V-1.3B-Diffusers@none on the Hub, which cannot be loaded")
    assert re.search(expected, line), line
    assert not [path for _, path, _ in hub.downloads if path.endswith(".safetensors")]


@pytest.mark.parametrize("recipe", ["wan2.1-1.3b", "cogvideox1.5-5b"])
def test_a_missing_anchor_lora_is_said_before_anything_is_asked(recipe, hub, tmp_path, capsys):
    assert generate(recipe, tmp_path / "video.mp4") == 2
    error = capsys.readouterr().err
    assert f"{recipe} needs an anchor LoRA, and none is published" in error and f"fvg train --recipe {recipe}" in error
    assert hub.requests == []


def test_a_wrong_part_is_said_before_weights_are_fetched(hub, repositories, lora):
    with pytest.raises(OSError, match="The rewriter names org/none on the Hub"):
        load("wan2.2-5b", rewriter="org/none")
    # A LoRA of another base with a smaller width.
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


@pytest.mark.parametrize("recipe", [*RECIPES.values(), *ANIMATOR_RECIPES.values()], ids=[*RECIPES, *ANIMATOR_RECIPES])
def test_a_recipe_cannot_be_changed_for_all_who_load_it(recipe):
    with pytest.raises(FrozenInstanceError):
        recipe.composer = None


def test_unknown_names(hub):
    with pytest.raises(
        ValueError, match="'wan2.2' is neither a folder nor a recipe; the recipes are wan2.2-5b, wan2.1-1.3b, "
    ):
        load("wan2.2")
    assert hub.requests == []
