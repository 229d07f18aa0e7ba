"""What a repository must not be able to do: pickles, paths out of it, code, and what must not leak: the rewriter's key."""

import json
import logging
import os
import re
import shutil
from pathlib import Path

import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, ModularPipeline, WanPipeline
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from test_rewriter import ChatServer, reply
from tiny import tiny_pipeline, tiny_rewriter, tiny_transformer, tiny_wan_components

from diffusers_fvg import (
    Anchor,
    AnchorComposer,
    AnchorLora,
    ChatEndpoint,
    FactorizedVideoPipeline,
    FirstFrameRewriter,
    SchedulerPreset,
    SchedulerPresets,
    assemble,
    load_lora,
)
from diffusers_fvg.checks import check_name
from diffusers_fvg.cli import main
from diffusers_fvg.loading.safety import check_folder


LORA = {
    "transformer.blocks.0.attn1.to_q.lora_A.weight": torch.ones(1, 24),
    "transformer.blocks.0.attn1.to_q.lora_B.weight": torch.ones(24, 1),
}
# Component -> folder of its weights.
WEIGHTS = {
    "transformer": "transformer",
    "vae": "vae",
    "text_encoder": "text_encoder",
    "rewriter": "rewriter/model",
    "composer": "composer/vae",
    "anchor_lora": "anchor_lora/weights",
}
# Ways out of a folder, on this system and on others.
ESCAPES = ("../evil", "..", "/etc/evil", "C:\\evil", "C:evil", "..\\evil")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("safe") / "repository"
    tiny_pipeline(anchor_lora=AnchorLora(LORA)).save_pretrained(folder)
    return folder


@pytest.fixture
def repository(saved, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "repository"))


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pickle_weights(folder):
    """Replaces the safetensors of a folder by what torch.save writes; returns the new file's name."""
    (file,) = folder.glob("*.safetensors")
    name = "pytorch_model.bin" if file.name == "model.safetensors" else f"{file.stem}.bin"
    torch.save(load_file(file), folder / name)
    file.unlink()
    return name


# -- pickles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("component", WEIGHTS)
def test_a_pickle_in_a_folder_is_refused_by_name(repository, component):
    name = pickle_weights(repository / WEIGHTS[component])
    with pytest.raises(ValueError, match=f"{name}.*pickle"):
        DiffusionPipeline.from_pretrained(repository)


@pytest.mark.parametrize("component", ["vae", "rewriter", "composer"])
def test_a_pickle_on_the_hub_is_refused_by_name(hub, repository, tmp_path, component):
    name = pickle_weights(repository / WEIGHTS[component])
    api = HfApi(token=hub.token)
    api.create_repo("org/fvg")
    api.upload_folder(folder_path=repository, repo_id="org/fvg")
    with pytest.raises(ValueError, match=f"{name}.*pickle"):
        DiffusionPipeline.from_pretrained("org/fvg", cache_dir=tmp_path / "cache")


def test_pickles_in_referenced_repositories_are_refused_by_name(hub, repository, tmp_path):
    api = HfApi(token=hub.token)
    pickle_weights(repository / "rewriter" / "model")
    pickle_weights(repository / "composer" / "vae")
    (repository / "lora").mkdir()
    torch.save(LORA, repository / "lora" / "lora.ckpt")
    parts = {"chat": ["rewriter/model", "rewriter/tokenizer"], "draw": ["composer"], "lora": ["lora"]}
    for name, folders in parts.items():
        api.create_repo(f"org/{name}")
        for folder in folders:
            api.upload_folder(folder_path=repository / folder, repo_id=f"org/{name}")
    with pytest.raises((OSError, ValueError), match="pytorch_model.bin"):
        FirstFrameRewriter.from_pretrained("org/chat", cache_dir=tmp_path)
    with pytest.raises((OSError, ValueError), match="vae/diffusion_pytorch_model.bin"):
        AnchorComposer.from_pretrained("org/draw", cache_dir=tmp_path)
    for options in ({}, {"weight_name": "lora.ckpt"}):
        with pytest.raises(ValueError, match="lora.ckpt.*pickle"):
            load_lora(tiny_transformer(anchored=True), "org/lora", cache_dir=tmp_path, **options)
    assert not any(path.endswith((".bin", ".ckpt")) for _, path, _ in hub.downloads)


@pytest.mark.parametrize(
    ("component", "missing"), [("vae", "post_quant_conv.bias"), ("rewriter", "model.norm.weight")]
)
def test_weights_that_are_missing_are_named(repository, component, missing):
    (file,) = (repository / WEIGHTS[component]).glob("*.safetensors")
    tensors = load_file(file)
    del tensors[missing]
    save_file(tensors, file, {"format": "pt"})
    others = {"rewriter": None} if component == "vae" else {}
    with pytest.raises(ValueError, match=f"lacks (the )?weights.*{missing}"):
        DiffusionPipeline.from_pretrained(repository, composer=None, **others)


def test_asking_for_pickles_is_refused(saved):
    with pytest.raises(ValueError, match="use_safetensors=False"):
        DiffusionPipeline.from_pretrained(saved, use_safetensors=False)


def test_a_component_that_is_passed_may_be_a_pickle_in_the_repository(repository):
    pickle_weights(repository / "vae")
    vae = AutoencoderKLWan.from_pretrained(repository / "vae")
    assert DiffusionPipeline.from_pretrained(repository, vae=vae, rewriter=None, composer=None).vae is vae


def test_other_pipelines_in_the_process_load_as_ever(tmp_path):
    WanPipeline(**tiny_wan_components()).save_pretrained(tmp_path)
    pickle_weights(tmp_path / "vae")
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is WanPipeline


@pytest.mark.parametrize(
    ("shard", "message"), [("model-1.bin", "pickle"), ("../vae/diffusion_pytorch_model.safetensors", "plain name")]
)
@pytest.mark.parametrize("folder", ["text_encoder", "rewriter/model", "composer/text_encoder"])
def test_an_index_names_safetensors_beside_it(repository, folder, shard, message):
    file = repository / folder / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    torch.save(tensors, repository / folder / "model-1.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}
    (repository / folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        DiffusionPipeline.from_pretrained(repository)


def test_shards_load(saved, tmp_path):
    first = DiffusionPipeline.from_pretrained(saved)
    first.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.rglob("*.safetensors.index.json"))) > 2
    again = DiffusionPipeline.from_pretrained(tmp_path)
    for name, tensor in first.composer.state_dict().items():
        assert torch.equal(tensor, again.composer.state_dict()[name])


def test_an_adapter_in_a_components_folder_is_refused(repository):
    # transformers would load it from the path or repository that it names.
    (repository / "text_encoder" / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(ValueError, match="adapter_config.json.*load_lora_weights"):
        DiffusionPipeline.from_pretrained(repository)


def test_a_lora_s_metadata_gives_alpha_alone(quiet_hub, tmp_path, monkeypatch):
    # PEFT imports `megatron_core`, and reads and writes the files of other settings.
    (tmp_path / "evil_module.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    config = {"r": 1, "lora_alpha": 3, "peft_type": "LORA", "base_model_name_or_path": "org/base"}
    config |= {
        "megatron_config": {"x": 1},
        "megatron_core": "evil_module",
        "auto_mapping": {"parent_library": "evil_module"},
    }
    config |= {"init_lora_weights": "corda", "corda_config": {"cache_file": str(tmp_path / "cache")}}
    save_file(LORA, tmp_path / "diffusers.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    (tmp_path / "peft").mkdir()
    # PEFT's own names, of the transformer alone.
    tensors = {name.replace("transformer.", "base_model.model.", 1): tensor for name, tensor in LORA.items()}
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    for place in ("diffusers.safetensors", "peft"):
        transformer = tiny_transformer(anchored=True)
        load_lora(transformer, tmp_path / place, "a")
        made = transformer.peft_config["a"]
        assert (made.megatron_config, made.auto_mapping, made.corda_config, made.init_lora_weights) == (None,) * 3 + (
            True,
        )
        # Alpha 3 at rank 1, multiplied into the pair.
        layer = transformer.blocks[0].attn1.to_q
        assert torch.allclose(layer.get_delta_weight("a"), torch.full((24, 24), 3.0))
    assert not (tmp_path / "cache").exists()


# -- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ESCAPES, "", "a/../../b", "a//b"])
def test_names_that_leave_their_folder(name):
    for folders in (False, True):
        with pytest.raises(ValueError, match="does not stay"):
            check_name(name, "A file", folders)


def test_names_that_stay():
    for name in ("wan (high).safetensors", "anchored-15", "v1.0"):
        assert check_name(name, "A file") == name
    assert check_name("v1/lora.safetensors", "A file", folders=True)
    with pytest.raises(ValueError, match="does not stay"):
        check_name("v1/lora.safetensors", "A file")


@pytest.mark.parametrize("link", ["vae", "vae/diffusion_pytorch_model.safetensors", "schedulers/full-50"])
def test_links_out_of_the_repository_are_refused(repository, tmp_path, link):
    outside = tmp_path / "outside"
    shutil.move(repository / link, outside)
    (repository / link).symlink_to(outside)
    with pytest.raises(ValueError, match="link to .*outside"):
        DiffusionPipeline.from_pretrained(repository)


def test_links_within_the_repository_load(repository):
    shutil.rmtree(repository / "composer" / "text_encoder")
    (repository / "composer" / "text_encoder").symlink_to(repository / "text_encoder")
    check_folder(repository / "composer")
    DiffusionPipeline.from_pretrained(repository, rewriter=None)


@pytest.mark.parametrize("name", ESCAPES)
def test_configurations_name_repositories_and_not_paths(repository, tmp_path, monkeypatch, name):
    # What they would find if they followed the path.
    shutil.copytree(repository / "composer", tmp_path / "evil")
    monkeypatch.chdir(repository)
    for config, key, load in (
        ("composer/composer_config.json", "repository", AnchorComposer.from_pretrained),
        ("rewriter/rewriter_config.json", "model", FirstFrameRewriter.from_pretrained),
    ):
        file = repository / config
        edit_json(file, **{key: name})
        with pytest.raises((OSError, ValueError), match="[Rr]epo id"):
            load(file.parent)
        edit_json(file, **{key: "org/name", "revision": name})
        with pytest.raises((OSError, ValueError), match="does not stay"):
            load(file.parent)


@pytest.mark.parametrize("name", ESCAPES)
def test_the_index_names_no_component_elsewhere(repository, name):
    # Nothing is loaded for a name that the pipeline has no argument for.
    edit_json(repository / "model_index.json", **{name: ["diffusers", "AutoencoderKLWan"]})
    pipe = DiffusionPipeline.from_pretrained(repository, rewriter=None, composer=None)
    assert name not in pipe.components


@pytest.mark.parametrize("name", ESCAPES)
def test_preset_and_lora_names(repository, name):
    # A preset's name becomes a folder when it is saved.
    file = repository / "schedulers" / "full-50" / "scheduler_config.json"
    preset = json.loads(file.read_text())["_preset"]
    edit_json(file, _preset=preset | {"name": name})
    with pytest.raises(ValueError, match="rename the folder or the preset"):
        SchedulerPresets.from_pretrained(repository / "schedulers")
    with pytest.raises(ValueError, match="does not stay"):
        SchedulerPreset(name, "UniPCMultistepScheduler", {}, (1.0,), 1.0, 1.0)
    save_file(LORA, repository / "lora.safetensors")
    for arguments in ({"weight_name": name}, {"subfolder": name}):
        with pytest.raises(ValueError, match="does not stay"):
            load_lora(tiny_transformer(anchored=True), repository, **arguments)


def test_a_preset_is_called_as_its_folder(repository):
    (repository / "schedulers" / "full-50").rename(repository / "schedulers" / "other")
    with pytest.raises(ValueError, match="'full-50'"):
        SchedulerPresets.from_pretrained(repository / "schedulers")


@pytest.mark.parametrize("name", ["AutoencoderKLWan", "utils", "Absent"])
def test_a_preset_makes_schedulers_only(name):
    preset = SchedulerPreset("p", name, {}, (1.0,), 1.0, 1.0)
    with pytest.raises(ValueError, match=f"'{name}'` must be a scheduler class"):
        preset.make_scheduler()


def test_a_tokenizer_s_links_stay_in_its_rewriter(repository, tmp_path):
    shutil.move(repository / "rewriter" / "tokenizer", tmp_path / "outside")
    (repository / "rewriter" / "tokenizer").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="link to .*outside"):
        FirstFrameRewriter.from_pretrained(repository / "rewriter")


@pytest.fixture
def draw(hub, repository, tmp_path, monkeypatch):
    """The composer on the Hub as org/draw, and in the current folder another one of that name."""
    api = HfApi(token=hub.token)
    api.create_repo("org/draw")
    api.upload_folder(folder_path=repository / "composer", repo_id="org/draw")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(repository / "composer", tmp_path / "org" / "draw")
    edit_json(tmp_path / "org" / "draw" / "model_index.json", _class_name="Local")
    shutil.rmtree(repository / "composer")
    (repository / "composer").mkdir()
    (repository / "composer" / "composer_config.json").write_text(json.dumps({"repository": "org/draw"}))
    return hub


def test_a_named_repository_is_the_hub_s_and_no_folder_here(draw, repository):
    composer = AnchorComposer.from_pretrained(repository / "composer")
    assert composer.reference == {"repository": "org/draw"}
    assert {name for name, _, _ in draw.downloads} == {"org/draw"}


@pytest.mark.parametrize("name", ["{outside}", "org/outside", "../outside"])
def test_assemble_copies_no_folder_that_a_reference_names(repository, tmp_path, monkeypatch, name):
    for outside in (tmp_path / "outside", tmp_path / "org" / "outside"):
        shutil.copytree(repository / "vae", outside / "vae")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path if name.startswith("org") else tmp_path / "work")
    shutil.rmtree(repository / "vae")
    (repository / "vae").mkdir()
    values = {"repository": name.format(outside=tmp_path / "outside"), "subfolder": "vae"}
    values |= {"library": "diffusers", "class": "AutoencoderKLWan"}
    (repository / "vae" / "reference.json").write_text(json.dumps(values))
    edit_json(repository / "model_index.json", vae=["diffusers", "HubReference"])
    with pytest.raises((OSError, ValueError), match="[Rr]epo id|Hub access is switched off"):
        assemble(tmp_path / "out", str(repository), light=False, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subfolder": "../vae"}, "not a path within a repository"),
        ({"subfolder": "/vae"}, "not a path within a repository"),
        ({"variant": "../fp16"}, "no safetensors weights of the variant"),
        ({"library": "os", "class": "system"}, "library 'os' must be one of"),
        ({"class": "AutoModel"}, "is not a model"),
        ({"api_key_env": "HF_TOKEN"}, "api_key_env"),
    ],
)
def test_a_reference_names_a_component_in_a_repository_on_the_hub(draw, repository, change, message):
    values = {"repository": "org/draw", "subfolder": "vae", "library": "diffusers", "class": "AutoencoderKLWan"}
    (repository / "vae" / "reference.json").write_text(json.dumps(values | change))
    edit_json(repository / "model_index.json", vae=["diffusers", "HubReference"])
    with pytest.raises((OSError, ValueError), match=message):
        DiffusionPipeline.from_pretrained(repository, rewriter=None, composer=None)
    assert draw.downloads == []


def test_a_referenced_repository_s_index_names_safetensors_beside_it(draw, repository):
    file = repository / "vae" / "diffusion_pytorch_model.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(file), "../text_encoder/model.safetensors")}
    api = HfApi(token=draw.token)
    name = "vae/diffusion_pytorch_model.safetensors.index.json"
    api.upload_file(repo_id="org/draw", path_in_repo=name, path_or_fileobj=json.dumps(index).encode())
    values = {"repository": "org/draw", "subfolder": "vae", "library": "diffusers", "class": "AutoencoderKLWan"}
    (repository / "vae" / "reference.json").write_text(json.dumps(values))
    edit_json(repository / "model_index.json", vae=["diffusers", "HubReference"])
    with pytest.raises(ValueError, match="plain name"):
        DiffusionPipeline.from_pretrained(repository, rewriter=None, composer=None)


def test_a_composer_s_defaults_name_no_picture_and_no_address(repository, tmp_path):
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    for value in (str(tmp_path / "private.png"), [str(tmp_path / "private.png")], "https://example.org/a.png"):
        edit_json(repository / "composer" / "composer_config.json", call_defaults={"negative_prompt": value})
        with pytest.raises(ValueError, match="`negative_prompt` .* a local file or a URL"):
            AnchorComposer.from_pretrained(repository / "composer")


# -- settings of diffusers and transformers ---------------------------------------------------------------------------


@pytest.fixture
def quiet_hub(hub):
    """The Hub, which must not be asked for anything."""
    yield hub
    assert hub.requests == []


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("text_encoder/config.json", {"attn_implementation": "org/kernel"}, "run code from another"),
        ("rewriter/model/config.json", {"_attn_implementation": {"": "org/kernel@main:f"}}, "run code from another"),
        (
            "composer/text_encoder/config.json",
            {"sub_config": {"attn_implementation": "org/k"}},
            "run code from another",
        ),
        ("rewriter/model/config.json", {"experts_implementation": "paged|org/kernel"}, "run code from another"),
        ("text_encoder/config.json", {"configuration_files": ["config.5.0/../../../x.json"]}, "does not stay"),
        ("text_encoder/config.json", {"transformers_weights": "../vae/x.safetensors"}, "does not stay"),
        ("text_encoder/config.json", {"transformers_weights": "adapter_model.bin"}, "pickle"),
        ("text_encoder/config.json", {"backbone": "org/backbone"}, "fetched from elsewhere"),
        ("text_encoder/config.json", {"vision_config": {"architecture": "hf-hub:org/name"}}, "fetched from elsewhere"),
        ("vae/config.json", {"tokenizer": "org/tokenizer"}, "fetched from elsewhere"),
        ("rewriter/tokenizer/tokenizer_config.json", {"vocab_file": __file__}, "a local file outside of the folder"),
        ("tokenizer/special_tokens_map.json", {"spm_file": __file__}, "a local file outside of the folder"),
        (
            "tokenizer/tokenizer_config.json",
            {"sp_model_kwargs": {"model_file": __file__}},
            "a local file outside of the folder",
        ),
        ("tokenizer/tokenizer_config.json", {"gguf_file": "../../x.gguf"}, "open another file"),
        ("tokenizer/tokenizer_config.json", {"init_inputs": ["/etc/passwd"]}, "open another file"),
        ("tokenizer/tokenizer_config.json", {"fast_tokenizer_files": ["../tokenizer.4.0.json"]}, "does not stay"),
    ],
)
def test_settings_that_name_code_files_or_repositories_are_refused(quiet_hub, repository, file, changes, message):
    path = repository / file
    if not path.is_file():
        path.write_text("{}")
    edit_json(path, **changes)
    others = {name: None for name in ("rewriter", "composer") if not file.startswith(name)}
    with pytest.raises(ValueError, match=message):
        DiffusionPipeline.from_pretrained(repository, **others)


def test_flash_attention_of_a_file_is_no_kernel_of_the_hub(repository, monkeypatch):
    # With the package `kernels` transformers takes it from the Hub; without, it wants the package `flash_attn`.
    edit_json(repository / "text_encoder" / "config.json", attn_implementation="flash_attention_2")
    check_folder(repository / "text_encoder")
    monkeypatch.setattr("transformers.utils.import_utils.is_kernels_available", lambda: True)
    with pytest.raises(ValueError, match="run code from another"):
        check_folder(repository / "text_encoder")


def test_settings_that_do_nothing_load(repository):
    # What files of real models hold: paths of their authors' machines, and plain names of implementations.
    changes = {
        "special_tokens_map_file": "/root/.cache/map.json",
        "tokenizer_file": None,
        "name_or_path": "/home/somebody/x",
    }
    edit_json(repository / "tokenizer" / "tokenizer_config.json", **changes)
    quantized = {
        "quantization_config": {"tokenizer": "org/name"},
        "vision_config": {"architecture": "mobilenetv5_300m_enc"},
    }
    edit_json(repository / "rewriter" / "model" / "config.json", attn_implementation="eager", _name_or_path="org/name")
    DiffusionPipeline.from_pretrained(repository, composer=None)
    edit_json(repository / "rewriter" / "model" / "config.json", **quantized)
    check_folder(repository / "rewriter")


def test_a_backbone_is_not_looked_up(quiet_hub, repository):
    # This class asks the Hub for the name while its configuration is made.
    edit_json(repository / "model_index.json", text_encoder=["transformers", "DetrModel"])
    config = {"model_type": "detr", "backbone": "org/backbone", "use_timm_backbone": False}
    (repository / "text_encoder" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="fetched from elsewhere"):
        DiffusionPipeline.from_pretrained(repository)


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("auto_pipeline", "AutoPipelineForText2Image"),
        ("pipeline_utils", "os"),
        ("diffusers", "AutoModel"),
        ("diffusers", "OnnxRuntimeModel"),
        ("transformers", "AutoModelForCausalLM"),
        ("os", "system"),
    ],
)
def test_a_component_is_of_a_kind_that_is_data(quiet_hub, repository, library, name):
    edit_json(repository / "model_index.json", vae=[library, name])
    edit_json(repository / "composer" / "model_index.json", vae=[library, name])
    for load in (DiffusionPipeline, AnchorComposer):
        with pytest.raises(ValueError, match="which is not a model, scheduler, tokenizer or processor"):
            load.from_pretrained(repository if load is DiffusionPipeline else repository / "composer")


def test_a_modular_index_names_no_other_repository(quiet_hub, repository):
    kind = ["diffusers", "AutoencoderKLWan"]
    component = [*kind, {"pretrained_model_name_or_path": "org/other", "subfolder": "vae", "type_hint": kind}]
    index = {"_class_name": "FactorizedVideoModularPipeline", "_blocks_class_name": "FactorizedVideoBlocks"}
    (repository / "modular_model_index.json").write_text(json.dumps(index | {"vae": component}))
    pipe = ModularPipeline.from_pretrained(str(repository))
    pipe.load_components("vae")
    assert pipe.vae.config._name_or_path == str(repository / "vae")
    (repository / "modular_config.json").write_text(json.dumps({"auto_map": {"ModularPipelineBlocks": "evil.P"}}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        ModularPipeline.from_pretrained(str(repository))


def test_a_module_that_nobody_imported_is_not_imported(repository, tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    edit_json(repository / "model_index.json", vae=["evil_module", "Evil"])
    with pytest.raises(ValueError, match="has not been imported"):
        DiffusionPipeline.from_pretrained(repository)


def test_a_composer_s_readme_fetches_no_other_pipeline(quiet_hub, repository):
    index = {"_class_name": "KandinskyV22CombinedPipeline", "_diffusers_version": "0.42.1"}
    (repository / "composer" / "model_index.json").write_text(json.dumps(index))
    (repository / "composer" / "README.md").write_text("---\nprior:\n- org/prior\n---\n")
    with pytest.raises(ValueError, match="README.md names other pipelines"):
        AnchorComposer.from_pretrained(repository / "composer")


# -- code -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """Code that leaves a file when it runs; and nobody is asked at the terminal."""

    def no_question(text=""):
        raise AssertionError(f"asked: {text}")

    monkeypatch.setattr("builtins.input", no_question)
    sprung = tmp_path / "sprung"
    code = f"import pathlib\npathlib.Path({str(sprung)!r}).touch()\nfrom diffusers_fvg import FactorizedVideoPipeline as P\n"
    return sprung, code


@pytest.mark.parametrize("where", ["pipeline", "component", "composer", "rewriter", "tokenizer"])
def test_code_of_a_repository_does_not_run(repository, trap, where):
    sprung, code = trap
    if where == "pipeline":
        (repository / "evil.py").write_text(code)
        edit_json(repository / "model_index.json", _class_name=["evil", "P"])
    elif where == "component":
        (repository / "vae" / "evil.py").write_text(code)
        edit_json(repository / "model_index.json", vae=["evil", "P"])
    elif where == "composer":
        (repository / "composer" / "evil.py").write_text(code)
        edit_json(repository / "composer" / "model_index.json", _class_name=["evil", "P"])
    else:
        folder = repository / "rewriter" / ("model" if where == "rewriter" else "tokenizer")
        (folder / "evil.py").write_text(code)
        if where == "rewriter":
            names = {"AutoConfig": "evil.P", "AutoModelForCausalLM": "evil.P"}
            edit_json(folder / "config.json", auto_map=names, model_type="evil")
        else:
            changes = {"auto_map": {"AutoTokenizer": ["evil.P", "evil.P"]}, "tokenizer_class": "P"}
            edit_json(folder / "tokenizer_config.json", **changes)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(repository)
    assert not sprung.exists()


def test_a_community_pipeline_is_not_fetched(hub, repository, monkeypatch):
    # diffusers fetches one and runs it without being told to, from the Hub alone.
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.get_diffusers_versions", lambda: [])
    api = HfApi(token=hub.token)
    for place in (repository, repository / "composer"):
        edit_json(place / "model_index.json", _class_name=["clip_guided_stable_diffusion", "P"])
        api.create_repo(f"org/{place.name}")
        api.upload_folder(folder_path=place, repo_id=f"org/{place.name}")
    hub.requests.clear()
    for load in (FactorizedVideoPipeline, AnchorComposer):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load.from_pretrained("org/repository" if load is FactorizedVideoPipeline else "org/composer")
    assert hub.requests and not any("community" in request for request in hub.requests)


def test_a_file_called_none_is_no_pipeline(repository, trap):
    # diffusers looks for the name of the pipeline that the call asks for, and none is asked for.
    sprung, code = trap
    (repository / "None.py").write_text(code)
    (repository / "pipeline.py").write_text(code)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(repository)
    (repository / "None.py").unlink()
    DiffusionPipeline.from_pretrained(repository, rewriter=None, composer=None)
    assert not sprung.exists()


def test_a_processor_does_not_ask_whether_to_run_code(repository, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "n")
    edit_json(repository / "composer" / "model_index.json", vae=["transformers", "CLIPProcessor"])
    shutil.copytree(repository / "rewriter" / "tokenizer", repository / "composer" / "vae", dirs_exist_ok=True)
    file = repository / "composer" / "vae" / "tokenizer_config.json"
    edit_json(file, auto_map={"AutoTokenizer": ["evil.P", "evil.P"]}, tokenizer_class="P")
    (file.parent / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "CLIPImageProcessor"}))
    with pytest.raises(ValueError, match="auto_map|custom code"):
        AnchorComposer.from_pretrained(repository / "composer")
    assert asked == []


def test_custom_generate_does_not_run(repository, trap):
    sprung, code = trap
    folder = repository / "rewriter" / "model"
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code + "def generate(model, **kwargs):\n    return 1\n")
    (folder / "generation_config.json").write_text(
        json.dumps({"custom_generate": str(folder), "trust_remote_code": True})
    )
    FirstFrameRewriter.from_pretrained(repository / "rewriter").rewrite(["a red circle"])
    assert not sprung.exists()


def test_trusted_code_runs(repository, trap):
    sprung, code = trap
    (repository / "evil.py").write_text(code)
    edit_json(repository / "model_index.json", _class_name=["evil", "P"])
    DiffusionPipeline.from_pretrained(repository, rewriter=None, composer=None, trust_remote_code=True)
    assert sprung.exists()


def test_a_chat_template_is_kept_in_its_sandbox(trap):
    sprung, _ = trap
    rewriter = tiny_rewriter()
    rewriter.tokenizer.chat_template = (
        "{{ cycler.__init__.__globals__.os.system('touch " + str(sprung) + "') }}{{ messages[0]['content'] }}"
    )
    with pytest.raises(Exception, match="(unsafe|undefined)"):
        rewriter.rewrite(["a red circle"])
    assert not sprung.exists()


# -- the rewriter's key -----------------------------------------------------------------------------------------------

KEY = "sk-planted-0123456789abcdef"
CAPTION = json.dumps({"first_frame": f"A red circle on the left. {KEY}"})


@pytest.mark.parametrize(
    "answer",
    [
        (401, f"Incorrect API key: {KEY}"),
        (500, {"error": {"message": KEY * 200}}),
        (200, {"error": KEY}),
        reply(CAPTION),
    ],
    ids=["refused", "long", "no answer", "in the caption"],
)
def test_the_key_stays_where_it_is(answer, monkeypatch, tmp_path, capfd, caplog):
    from diffusers_fvg.media import write_video
    from diffusers_fvg.publishing.cards import repository_card

    monkeypatch.setenv("PLANTED_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    with ChatServer(answer, answer) as server:
        pipe = tiny_pipeline(rewriter=FirstFrameRewriter(endpoint=ChatEndpoint(server.url, "chat", "PLANTED_KEY")))
        seen = []
        try:
            out = pipe("a red circle", height=32, width=32, num_frames=5, num_inference_steps=1)
        except OSError as error:
            while error is not None:
                seen += [str(error), repr(error), repr(error.__notes__ if hasattr(error, "__notes__") else "")]
                error = error.__cause__ or error.__context__
        else:
            seen += [repr(out.first_frame_prompts), repr(out.seeds), repr(out.timings)]
            write_video(tmp_path / "video.mp4", out.frames[0], 8, {"first_frame_prompt": out.first_frame_prompts[0]})
    assert server.requests[0][1] == f"Bearer {KEY}"

    warnings = []
    monkeypatch.setattr("diffusers_fvg.pipelines.saving.logger.warning", warnings.append)
    pipe.save_pretrained(tmp_path / "repository")
    assert any("`rewriter` is your endpoint and is not saved" in warning for warning in warnings)
    seen += [
        *warnings,
        repr(pipe),
        repr(pipe.config),
        repr(pipe.rewriter),
        repr(pipe.rewriter.endpoint),
        repr(vars(pipe.rewriter)),
    ]
    seen += [str(repository_card(tmp_path / "repository")), caplog.text, *capfd.readouterr()]
    assert not any(KEY in text for text in seen)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    hidden = [word.encode() for word in (KEY, "PLANTED_KEY", server.url)]
    assert len(files) > 10 and not any(word in file.read_bytes() for word in hidden for file in files)
    # The repository has no rewriter, and takes one.
    assert json.loads((tmp_path / "repository" / "model_index.json").read_text())["rewriter"] == [None, None]
    again = DiffusionPipeline.from_pretrained(tmp_path / "repository", rewriter=pipe.rewriter, composer=None)
    assert again.rewriter is pipe.rewriter


@pytest.fixture
def thief(monkeypatch):
    """A server whose author would like to have this machine's token."""
    monkeypatch.setenv("HF_TOKEN", KEY)
    with ChatServer(*[reply(CAPTION)] * 2) as server:
        yield server


def name_an_endpoint(repository, server):
    shutil.rmtree(repository / "rewriter")
    (repository / "rewriter").mkdir()
    config = {"endpoint": server.url, "model": "chat", "api_key_env": "HF_TOKEN"}
    (repository / "rewriter" / "rewriter_config.json").write_text(json.dumps(config))


def test_a_repository_that_names_an_endpoint_is_refused(repository, thief):
    name_an_endpoint(repository, thief)
    message = (
        r"rewriter_config.json' names an endpoint at '127.0.0.1'.*rewriter=FirstFrameRewriter.*--rewriter URL.*=None"
    )
    for load in (DiffusionPipeline, FactorizedVideoPipeline):
        with pytest.raises(ValueError, match=message):
            load.from_pretrained(repository)
    with pytest.raises(ValueError, match=message):
        FirstFrameRewriter.from_pretrained(repository / "rewriter")
    assert thief.requests == []
    # What it says opts in.
    DiffusionPipeline.from_pretrained(repository, rewriter=None)
    own = FirstFrameRewriter(endpoint=ChatEndpoint(thief.url, "chat", "HF_TOKEN"))
    assert DiffusionPipeline.from_pretrained(repository, rewriter=own).rewrite("a red circle")
    assert thief.requests[0][1] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"endpoint": "http://127.0.0.1:1/v1", "api_key_env": "HF_TOKEN"},
            ValueError,
            "names an endpoint.*anchor_judge=None",
        ),
        ({"model": "../evil"}, OSError, "evil"),
        ({"model": "/etc/evil"}, OSError, "evil"),
        ({"model": "org/clip", "revision": "../evil"}, OSError, "evil"),
        ({"function": "os.system"}, ValueError, "function"),
    ],
)
def test_a_repository_s_judge_names_no_endpoint_and_no_path(repository, settings, error, message):
    index = json.loads((repository / "model_index.json").read_text()) | {"anchor_judge": ["diffusers", "AnchorJudge"]}
    (repository / "model_index.json").write_text(json.dumps(index))
    (repository / "anchor_judge").mkdir()
    (repository / "anchor_judge" / "judge_config.json").write_text(json.dumps(settings))
    with pytest.raises(error, match=message):
        DiffusionPipeline.from_pretrained(repository)
    assert DiffusionPipeline.from_pretrained(repository, anchor_judge=None).anchor_judge is None


def test_a_repository_on_the_hub_that_names_an_endpoint_is_refused(
    hub, repository, thief, tmp_path, monkeypatch, capsys
):
    name_an_endpoint(repository, thief)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    api = HfApi(token=hub.token)
    api.create_repo("org/fvg", private=True)
    api.upload_folder(folder_path=repository, repo_id="org/fvg")
    arguments = ["a red circle", "--model", "org/fvg", "--quiet", "--device", "cpu", "--dtype", "float32"]
    size = [
        "--height",
        "32",
        "--width",
        "32",
        "--num-frames",
        "5",
        "--steps",
        "1",
        "--output",
        str(tmp_path / "a.mp4"),
    ]
    for command in (["generate", *arguments, *size], ["rewrite", *arguments]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "names an endpoint at '127.0.0.1'" in error and "--rewriter URL" in error
    assert thief.requests == []
    server = ["--rewriter", thief.url, "--rewriter-model", "chat"]
    assert main(["generate", *arguments, *size, *server]) == 0
    assert "A red circle on the left" in capsys.readouterr().out
    # Asked without a key, since the command names none: for the caption, then about it.
    assert [key for _, key, _ in thief.requests] == [None, None]


def test_assemble_refuses_a_rewriter_that_names_an_endpoint(hub, repository, thief, tmp_path, monkeypatch):
    name_an_endpoint(repository, thief)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    api = HfApi(token=hub.token)
    api.create_repo("org/rewriter")
    api.upload_folder(folder_path=repository / "rewriter", repo_id="org/rewriter")
    for place in (str(repository / "rewriter"), "org/rewriter"):
        with pytest.raises(ValueError, match="names an endpoint"):
            assemble(tmp_path / "out", str(repository), rewriter=place, cache_dir=tmp_path / "cache")
        assert not (tmp_path / "out").exists()
    assert thief.requests == []


# -- the anchor's check -----------------------------------------------------------------------------------------------

SIZE = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 1}


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(*colours):
    return [PIL.Image.new("RGB", (32, 32), colour) for colour in colours]


def is_red(image):
    return "it is red" if image.getpixel((0, 0)) == (255, 0, 0) else None


def test_a_refused_anchor_stops_before_its_video(pipe, monkeypatch):
    stages = []

    def stage(pipe, name, *steps):
        stages.append(name)

    monkeypatch.setattr(pipe, "safety_checker", is_red, raising=False)
    prompts = ["a circle", "a square"]
    arguments = {**SIZE, "num_videos_per_prompt": 2, "callback_on_stage_step": stage}
    with pytest.raises(ValueError, match=r"anchor of prompt 1 \(it is red\)"):
        pipe(prompts, image=pictures("blue", "red"), **arguments)
    assert stages == []
    with pytest.raises(ValueError, match="anchor of prompt 0"):
        pipe.animate(prompts, anchors=[Anchor(pictures("blue")[0]), Anchor(pictures("red")[0], -1)], **SIZE)
    pipe(prompts, image=pictures("blue", "green"), **arguments)
    assert "denoise" in stages


def test_drawn_anchors_are_checked_once_each(pipe, monkeypatch):
    shown = []
    monkeypatch.setattr(pipe, "safety_checker", lambda image: shown.append(image), raising=False)
    out = pipe("a circle", first_frame_prompt="a red circle", num_videos_per_prompt=2, **SIZE)
    assert [image.tobytes() for image in shown] == [image.tobytes() for image in out.anchor_images]
    monkeypatch.setattr(pipe, "safety_checker", lambda image: True, raising=False)
    stages = []
    with pytest.raises(ValueError, match="anchor of prompt 0; no video"):
        pipe(
            "a circle", first_frame_prompt="a circle", callback_on_stage_step=lambda p, s, *n: stages.append(s), **SIZE
        )
    assert set(stages) == {"compose"}
    pipe("a circle", mode="direct", **SIZE)


def test_arrays_and_tensors_are_shown_as_pictures(pipe, monkeypatch):
    shown = []
    monkeypatch.setattr(pipe, "safety_checker", lambda image: shown.append(image), raising=False)
    tensor = torch.zeros(3, 32, 32)
    tensor[0] = 1
    array = tensor.permute(1, 2, 0).numpy()
    for image in (tensor, array, (array * 255).astype("uint8")):
        pipe("a circle", image=image, **SIZE)
    assert {image.getpixel((5, 5)) for image in shown} == {(255, 0, 0)}


def test_the_checker_is_not_part_of_the_repository(tmp_path):
    pipe = tiny_pipeline(rewriter=None, composer=None)
    pipe.safety_checker = is_red
    pipe.save_pretrained(tmp_path)
    assert "safety_checker" not in json.loads((tmp_path / "model_index.json").read_text())
    assert FactorizedVideoPipeline.from_pretrained(tmp_path).safety_checker is None
    assert os.path.isfile(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")


# -- what SECURITY.md says --------------------------------------------------------------------------------------------


def test_security_md_names_tests_that_exist():
    tests = Path(__file__).parents[1]
    lines = (tests.parent / "SECURITY.md").read_text().splitlines()
    named = {name for line in lines for name in re.findall(r"`(test_\w+)`", line)}
    there = {
        name for file in tests.rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    assert len(named) > 30 and named <= there
    rows = [line for line in lines if line.startswith("| ") and " Test |" not in line]
    assert all(re.search(r"`test_\w+` \|$", row) for row in rows) and len(lines) < 80
