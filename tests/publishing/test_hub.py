"""Light repositories, assembling and pushing, against the tests' Hub with the real client."""

import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import BitsAndBytesConfig, DiffusionPipeline, PipelineQuantizationConfig, WanPipeline
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import (
    TRANSFORMER_CONFIG,
    tiny_composer,
    tiny_pipeline,
    tiny_rewriter,
    tiny_transformer,
    tiny_vae,
    tiny_wan_components,
)

from diffusers_fvg import (
    AnchorConditionedTransformer3D,
    AnchorLora,
    FactorizedVideoPipeline,
    HubReference,
    assemble,
    load_lora,
    push,
)
from diffusers_fvg.cli import main
from diffusers_fvg.publishing.parts import PARTS_NAME


TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
MODELS = {
    "text_encoder": "model.safetensors",
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
BASE_FILES = {f"tokenizer/{name}" for name in TOKENIZER}
BASE_FILES |= {f"{name}/{file}" for name, weights in MODELS.items() for file in (weights, "config.json")}
CHAT_FILES = {"config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"} | TOKENIZER


def write_card(folder: Path, license: str) -> None:
    (folder / "README.md").write_text(f"---\nlicense: {license}\n---\n# A model\n")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The parts as their repositories hold them, with more in them than is needed."""
    root = tmp_path_factory.mktemp("parts")
    WanPipeline(**tiny_wan_components()).save_pretrained(root / "base")
    for name in ("transformer", "vae"):
        # Another content, to tell them apart: a variant is only another dtype elsewhere.
        weights = load_file(root / "base" / name / MODELS[name])
        halved = {key: value.half() / 2 for key, value in weights.items()}
        save_file(halved, root / "base" / name / "diffusion_pytorch_model.fp16.safetensors", {"format": "pt"})
    for name in ("transformer/diffusion_pytorch_model.bin", "transformer/notes.png", "original/wan.safetensors"):
        (root / "base" / name).parent.mkdir(exist_ok=True)
        (root / "base" / name).write_bytes(b"not to be fetched")
    tiny_composer().pipeline.save_pretrained(root / "t2i")
    rewriter = tiny_rewriter()
    rewriter.model.save_pretrained(root / "chat")
    rewriter.tokenizer.save_pretrained(root / "chat")
    (root / "chat" / "pytorch_model.bin").write_bytes(b"not to be fetched")
    for name, license in (("base", "apache-2.0"), ("t2i", "other\nlicense_name: tiny-license"), ("chat", "mit")):
        write_card(root / name, license)
    # As PEFT and many trainers write it: no expert in the keys, alpha in a file beside it, scale 3 here.
    donor = tiny_transformer()
    donor.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"], init_lora_weights=False))
    (root / "lora").mkdir()
    state = {f"base_model.model.{key}": value for key, value in get_peft_model_state_dict(donor).items()}
    metadata = {"format": "pt", "training_config": json.dumps({"data": "/home/somebody/clips/train"})}
    save_file(state, root / "lora" / "adapter_model.safetensors", metadata)
    donor.peft_config["default"].save_pretrained(root / "lora")
    return root


@pytest.fixture
def parts(hub, folders):
    for name in ("base", "t2i", "chat"):
        hub.add(f"org/{name}", folders / name)
    return {"base": "org/base", "composer": "org/t2i", "rewriter": "org/chat", "lora": str(folders / "lora")}


COMPOSER_CALL = {"num_frames": 1, "num_inference_steps": 2, "max_sequence_length": 16}


@pytest.fixture
def light(hub, parts, tmp_path):
    """`org/light` on the Hub, and nothing in the cache that is used afterwards."""
    assemble(tmp_path / "light", **parts, composer_call_defaults=COMPOSER_CALL, cache_dir=tmp_path / "assembling")
    hub.add("org/light", tmp_path / "light")
    hub.downloads.clear()
    return tmp_path / "light"


def assert_weights(component, truth, scale: float = 1) -> None:
    state, expected = component.state_dict(), truth.state_dict()
    base = {key.replace(".base_layer.", "."): value for key, value in state.items() if ".lora_" not in key}
    assert base.keys() == expected.keys()
    for key, value in expected.items():
        want = (value.half() / 2).to(base[key].dtype) if scale != 1 else value.to(base[key].dtype)
        assert torch.equal(base[key], want), key


def test_light_repository_fetches_what_it_names_in_the_asked_dtypes(hub, light, tmp_path):
    assert sum(path.stat().st_size for path in light.rglob("*")) < 60_000
    dtype = {"transformer": torch.bfloat16, "rewriter": torch.float16, "composer": torch.bfloat16}
    pipe = DiffusionPipeline.from_pretrained("org/light", dtype=dtype, cache_dir=tmp_path / "cache")
    assert type(pipe) is FactorizedVideoPipeline
    assert {name: getattr(pipe, name).dtype for name in dtype} == dtype
    assert pipe.vae.dtype == pipe.text_encoder.dtype == torch.float32
    truth = tiny_wan_components()
    for name in MODELS:
        assert_weights(getattr(pipe, name), truth[name])
    assert_weights(pipe.rewriter, tiny_rewriter())
    assert_weights(pipe.composer, tiny_composer())
    assert pipe.tokenizer("a red circle").input_ids == truth["tokenizer"]("a red circle").input_ids
    assert list(pipe.presets) == ["anchored-15", "full-50"] and pipe.call_defaults["height"] == 704

    assert hub.downloaded("org/base") == BASE_FILES
    assert hub.downloaded("org/chat") == CHAT_FILES
    inside = BASE_FILES | {"model_index.json", "scheduler/scheduler_config.json"}
    # The client fetches a file with the same content as one in its cache once; both text encoders are equal here.
    assert hub.downloaded("org/t2i") <= inside
    assert {"model_index.json", f"transformer/{MODELS['transformer']}"} <= hub.downloaded("org/t2i")
    assert len(hub.downloads) == len(set(hub.downloads)), "each file is fetched once"


def test_works_offline_afterwards(hub, light, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = DiffusionPipeline.from_pretrained("org/light", cache_dir=cache)
    hub.downloads.clear()
    again = DiffusionPipeline.from_pretrained("org/light", cache_dir=cache)
    assert not hub.downloads
    hub.requests.clear()
    local = DiffusionPipeline.from_pretrained("org/light", cache_dir=cache, local_files_only=True)
    assert not hub.requests, "local_files_only reaches every part"
    hub.stop()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = FactorizedVideoPipeline.from_pretrained("org/light", cache_dir=cache)
    for pipe in (again, local, offline):
        for name in (*MODELS, "rewriter", "composer"):
            assert_weights(getattr(pipe, name), _without_lora(getattr(first, name)))
    with pytest.raises(OSError, match=r"`vae/reference.json` names org/base@[0-9a-f]{40}.*not in the cache") as error:
        DiffusionPipeline.from_pretrained(light, cache_dir=tmp_path / "empty", local_files_only=True, **_none("vae"))
    assert isinstance(error.value.__cause__, LocalEntryNotFoundError)


def _without_lora(component):
    class Truth:
        @staticmethod
        def state_dict():
            state = component.state_dict()
            return {key.replace(".base_layer.", "."): value for key, value in state.items() if ".lora_" not in key}

    return Truth


def _none(kept: str) -> dict:
    """Arguments that keep all components but one from being loaded."""
    components = tiny_pipeline().components | {"anchor_lora": None, "rewriter": None, "composer": None}
    return {name: value for name, value in components.items() if name != kept}


def test_any_part_can_be_left_out_or_replaced_and_is_not_fetched(hub, light, tmp_path):
    composer, vae, transformer = tiny_composer(), tiny_vae(), tiny_transformer(anchored=True, seed=3)
    for cls in (DiffusionPipeline, FactorizedVideoPipeline):
        pipe = cls.from_pretrained(
            "org/light",
            cache_dir=tmp_path / cls.__name__,
            rewriter=None,
            composer=composer,
            vae=vae,
            transformer=transformer,
            anchor_lora=None,
        )
        assert pipe.rewriter is None and pipe.composer is composer
        assert pipe.vae is vae and pipe.transformer is transformer
    assert hub.downloaded("org/chat") == hub.downloaded("org/t2i") == set()
    assert hub.downloaded("org/base") == {
        name for name in BASE_FILES if name.startswith(("text_encoder", "tokenizer"))
    }
    assert not hub.downloaded("org/light") & {"anchor_lora/weights/pytorch_lora_weights.safetensors"}
    with pytest.raises(ValueError, match="should be"):
        # The check of what is passed still holds for stock pipelines.
        WanPipeline.from_pretrained("org/base", cache_dir=tmp_path / "stock", vae=tiny_wan_components()["scheduler"])


@pytest.mark.parametrize(
    ("change", "message", "cause"),
    [
        ({"repository": "org/nowhere"}, "org/nowhere@.*Repository", RepositoryNotFoundError),
        ({"revision": "v9"}, "org/base@v9.*v9", RevisionNotFoundError),
        ({"subfolder": "vea"}, "'vea', which holds nothing", ValueError),
        ({"variant": "int8"}, "variant 'int8' in 'vae'", ValueError),
        (
            {"subfolder": "tokenizer"},
            "no safetensors weights in 'tokenizer', which holds .*'tokenizer.json'",
            ValueError,
        ),
    ],
)
def test_a_wrong_reference_says_which_and_what_was_looked_for(light, change, message, cause, tmp_path):
    file = light / "vae" / "reference.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(OSError, match=f"(?s)`vae/reference.json` names .*{message}") as error:
        DiffusionPipeline.from_pretrained(light, cache_dir=tmp_path / "cache", **_none("vae"))
    assert isinstance(error.value.__cause__, cause)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class": "DiffusionPipeline"}, "DiffusionPipeline is not a model"),
        ({"class": "HubReference"}, "HubReference is not a model"),
        ({"class": "Popen", "library": "subprocess"}, "library 'subprocess' must be one of"),
        ({"class": "NoSuchModel"}, "no class 'NoSuchModel'"),
        ({"subfolder": "../../secrets"}, "not a path within"),
        ({"repository": "/etc"}, "Repo id"),
        ({"trust_remote_code": True}, "unexpected keyword"),
    ],
)
def test_a_reference_names_a_known_class_in_a_repository(light, change, message, hub):
    file = light / "vae" / "reference.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        HubReference.from_pretrained(light / "vae")
    assert not hub.downloads


def test_revisions_are_pinned_when_assembled(hub, parts, folders, tmp_path):
    assemble(tmp_path / "light", base=f"org/base@{hub.repositories['org/base'].refs['refs/heads/main'][:40]}")
    old = assemble(tmp_path / "again", base="org/base").parts[0].source.revision
    shutil.copytree(folders / "base", tmp_path / "changed")
    tiny_transformer(seed=5).save_pretrained(tmp_path / "changed" / "transformer")
    new = hub.add("org/base", tmp_path / "changed")
    for name in ("light", "again"):
        pipe = DiffusionPipeline.from_pretrained(tmp_path / name)
        assert_weights(pipe.transformer, tiny_transformer())
        assert pipe.composer is pipe.rewriter is pipe.anchor_lora is None
    HfApi(token=hub.token).create_tag("org/base", tag="v2")
    recorded = json.loads((tmp_path / "again" / "vae" / "reference.json").read_text())
    assert recorded["revision"] == old and old != new
    assert assemble(tmp_path / "v2", base="org/base@v2", dry_run=True).parts[0].source.revision == new

    # The light repository's own revisions.
    hub.add("org/light", tmp_path / "light")
    HfApi(token=hub.token).create_tag("org/light", tag="first")
    (tmp_path / "light" / "model_index.json").write_text("{}")
    hub.add("org/light", tmp_path / "light")
    assert_weights(DiffusionPipeline.from_pretrained("org/light", revision="first").transformer, tiny_transformer())


def test_variant(hub, light, tmp_path, caplog):
    pipe = DiffusionPipeline.from_pretrained("org/light", variant="fp16", cache_dir=tmp_path / "cache", rewriter=None)
    truth = tiny_wan_components()
    for name, scale in (("transformer", 0.5), ("vae", 0.5), ("text_encoder", 1)):
        assert_weights(getattr(pipe, name), truth[name], scale)
    variants = {f"{name}/diffusion_pytorch_model.fp16.safetensors" for name in ("transformer", "vae")}
    standard = {f"{name}/diffusion_pytorch_model.safetensors" for name in ("transformer", "vae")}
    assert hub.downloaded("org/base") == BASE_FILES - standard | variants

    # Assembled with a variant, it is the repository's own: in a reference, and as the standard weights of a copy.
    for kind in ("light", "bundled"):
        folder = tmp_path / f"{kind}-fp16"
        assemble(folder, base="org/base", light=kind == "light", variant="fp16", presets=["full-50"])
        bundled = DiffusionPipeline.from_pretrained(folder)
        assert_weights(bundled.vae, truth["vae"], 0.5)
        assert_weights(bundled.text_encoder, truth["text_encoder"])
    assert [preset.name for preset in bundled.presets.values()] == ["full-50"]
    with pytest.raises(ValueError, match="`variant='int8'`: no component has weights of this variant"):
        assemble(tmp_path / "int8", base="org/base", variant="int8")


def test_variant_of_a_bundled_repository(tmp_path):
    # Folders within components' folders: diffusers' own look for variants fails on them.
    tiny_pipeline().save_pretrained(tmp_path, variant="fp16")
    pipe = DiffusionPipeline.from_pretrained(tmp_path, variant="fp16")
    assert_weights(pipe.transformer, tiny_transformer())


def test_token_reaches_every_part(hub, light, tmp_path):
    for name in ("light", "base", "t2i", "chat"):
        hub.repositories[f"org/{name}"].private = True
    cache = tmp_path / "cache"
    with pytest.raises(OSError, match="org/light") as error:
        DiffusionPipeline.from_pretrained("org/light", cache_dir=cache)
    assert isinstance(error.value.__cause__, RepositoryNotFoundError)
    with pytest.raises(OSError, match="`vae/reference.json` names org/base@") as error:
        DiffusionPipeline.from_pretrained(light, cache_dir=cache, **_none("vae"))
    assert isinstance(error.value.__cause__, RepositoryNotFoundError)
    assert error.value.__cause__.response.status_code == 401
    assert not hub.downloads
    DiffusionPipeline.from_pretrained("org/light", cache_dir=cache, token=hub.token)
    assert all(token for _, path, token in hub.downloads if path.endswith(".json"))


def test_quantization_config_reaches_models_behind_references(light, tmp_path):
    def load(mapping, **components):
        config = PipelineQuantizationConfig(quant_mapping=mapping)
        DiffusionPipeline.from_pretrained(light, quantization_config=config, **components)

    config = BitsAndBytesConfig(load_in_8bit=True)
    for name in ("transformer", "composer.transformer"):
        # Neither the package nor a GPU is there where the tests run; without the config nothing would ask for them.
        with pytest.raises((ImportError, RuntimeError), match="bitsandbytes|quantization"):
            load({name: config}, **_none(name.split(".")[0]))
    with pytest.raises(ValueError, match="'composer.transformer'"):
        load({"composer": config}, **_none("composer"))


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    ("damage", "message"), [(flip, "content that differs from sha256"), (lambda data: data[:-7], "size|bytes")]
)
def test_a_corrupted_file_is_detected_and_fetched_again(hub, light, damage, message, tmp_path):
    hub.damage["vae/diffusion_pytorch_model.safetensors"] = damage
    load = {"pretrained_model_name_or_path": light, "cache_dir": tmp_path / "cache", **_none("vae")}
    with pytest.raises(OSError, match=message):
        DiffusionPipeline.from_pretrained(**load)
    hub.damage.clear()
    assert_weights(DiffusionPipeline.from_pretrained(**load).vae, tiny_vae())
    # Damage in the cache itself, such as a full disk leaves behind.
    blob = next((tmp_path / "cache").rglob("diffusion_pytorch_model.safetensors")).resolve()
    os.truncate(blob, blob.stat().st_size - 7)
    with pytest.raises(OSError, match="vae/diffusion_pytorch_model.safetensors arrived with .* bytes"):
        DiffusionPipeline.from_pretrained(**load)
    assert_weights(DiffusionPipeline.from_pretrained(**load).vae, tiny_vae())


def test_three_processes_share_one_cache(hub, light, tmp_path):
    def load(results) -> None:
        pipe = DiffusionPipeline.from_pretrained("org/light", cache_dir=tmp_path / "cache")
        results.put(float(sum(value.double().sum() for value in pipe.transformer.state_dict().values())))

    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = [context.Process(target=load, args=(results,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    sums = {results.get() for _ in processes}
    pipe = DiffusionPipeline.from_pretrained("org/light", cache_dir=tmp_path / "cache", local_files_only=True)
    assert sums == {float(sum(value.double().sum() for value in pipe.transformer.state_dict().values()))}
    assert not list((tmp_path / "cache").rglob("*.incomplete"))


# -- saving again -----------------------------------------------------------------------------------------------------


def file_names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_saved_again_it_is_light_unless_bundled(hub, light, tmp_path):
    pipe = DiffusionPipeline.from_pretrained("org/light", cache_dir=tmp_path / "cache")
    pipe.save_pretrained(tmp_path / "again")
    assert file_names(tmp_path / "again") | {PARTS_NAME} == file_names(light)
    for name in ("vae/reference.json", "composer/composer_config.json", "rewriter/rewriter_config.json"):
        again, first = (json.loads((root / name).read_text()) for root in (tmp_path / "again", light))
        assert first.items() <= again.items() and "org/" in json.dumps(first)
    assert type(pipe.vae).__name__ == pipe.config.vae[1] == "AutoencoderKLWan", "the pipeline itself is as it was"
    replaced = DiffusionPipeline.from_pretrained(tmp_path / "again", cache_dir=tmp_path / "cache")
    replaced.vae = tiny_vae()
    replaced.save_pretrained(tmp_path / "replaced")
    assert "vae/diffusion_pytorch_model.safetensors" in file_names(tmp_path / "replaced")

    pipe.save_pretrained(tmp_path / "bundled", bundle=True)
    hub.stop()
    bundled = DiffusionPipeline.from_pretrained(tmp_path / "bundled", cache_dir=tmp_path / "empty")
    for name in (*MODELS, "rewriter", "composer"):
        assert_weights(getattr(bundled, name), _without_lora(getattr(pipe, name)))
    assert not any(str(tmp_path) in path.read_text() for path in (tmp_path / "bundled").rglob("*.json"))
    assert pipe.composer.reference["repository"] == "org/t2i"

    pipe.fuse_lora()
    with pytest.raises(ValueError, match="The anchor LoRA is fused into `transformer`"):
        pipe.save_pretrained(tmp_path / "fused")


# -- assembling -------------------------------------------------------------------------------------------------------


def test_assembled_bundled_it_needs_no_hub(hub, parts, folders, tmp_path):
    assemble(tmp_path / "out", **parts, light=False, composer_call_defaults=COMPOSER_CALL)
    hub.stop()
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out", cache_dir=tmp_path / "empty")
    truth = tiny_wan_components()
    for name in MODELS:
        assert_weights(getattr(pipe, name), truth[name])
    assert_weights(pipe.rewriter, tiny_rewriter())
    assert_weights(pipe.composer, tiny_composer())
    assert pipe.composer.reference is pipe.rewriter.reference is None
    assert pipe.anchor_lora.metadata["training_config"] == '{"data": "train"}'
    prompts = {"prompt": "a red circle moves", "first_frame_prompt": "a red circle"}
    pipe(**prompts, num_inference_steps=1, height=16, width=16, num_frames=5, max_sequence_length=16)

    # The LoRA acts as it does when it is loaded from its own file, alpha and all.
    expected = tiny_transformer(anchored=True)
    load_lora(expected, str(folders / "lora"))
    inputs = {
        "hidden_states": torch.randn(1, 16, 2, 4, 4),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 3, 32),
    }
    base = tiny_transformer(anchored=True)(**inputs).sample
    want, got = expected(**inputs).sample, pipe.transformer(**inputs).sample
    assert torch.allclose(got, want, atol=1e-6) and (want - base).abs().max() > 1e-3


def test_dry_run_lists_what_the_first_load_fetches(hub, parts, tmp_path, capsys):
    arguments = ["assemble", str(tmp_path / "out"), "--base", "org/base", "--composer", "org/t2i"]
    arguments += ["--rewriter", "org/chat", "--lora", parts["lora"], "--height", "480", "--width", "832"]
    assert main([*arguments, "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()
    planned = capsys.readouterr().out
    assert all(path.endswith((".json", ".md")) for _, path, _ in hub.downloads), "no weights"
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed == planned + f"repository: {tmp_path / 'out'}\n"
    for name, license in (("org/base@", "apache-2.0"), ("org/t2i@", "tiny-license"), ("org/chat@", "mit")):
        assert any(name in line and license in line for line in printed.splitlines())
    recorded = json.loads((tmp_path / "out" / PARTS_NAME).read_text())
    assert recorded["vae"]["repository"] == "org/base" and recorded["vae"]["license"] == "apache-2.0"
    assert recorded["anchor_lora"]["license"] == "not stated" and str(tmp_path) not in json.dumps(recorded)

    hub.downloads.clear()
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out", cache_dir=tmp_path / "cache")
    assert pipe.call_defaults["height"] == 480 and pipe.call_defaults["num_frames"] == 121
    assembly = assemble(tmp_path / "other", **parts, dry_run=True)
    for repository in ("org/base", "org/chat", "org/t2i"):
        files = {file for part in assembly.parts if part.source.name == repository for file in part.files}
        assert hub.downloaded(repository) <= files
        if repository != "org/t2i":  # Some of its files equal those of the base and are there already.
            assert hub.downloaded(repository) == files
    sizes = [part.bytes for part in assembly.parts if part.refers]
    assert f"{sum(sizes) / 1e6:,.3f} MB" in printed.splitlines()[-2]


def test_assembling_again_from_a_light_repository(light, parts, tmp_path):
    again = assemble(tmp_path / "again", base="org/light", lora=parts["lora"])
    assert (tmp_path / "again" / "vae" / "reference.json").read_text() == (
        light / "vae" / "reference.json"
    ).read_text()
    assert {part.source.name for part in again.parts if part.refers} == {"org/base"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"base": "org/t2o"}, OSError, "'org/t2o' is not a local folder, and the Hub answers"),
        ({"base": "org/chat"}, ValueError, "org/chat@[0-9a-f]{8} has no file model_index.json"),
        ({"presets": ["fast-4"]}, ValueError, "Unknown preset 'fast-4'"),
        ({"rewriter": "org/base"}, ValueError, "no safetensors weights"),
        ({"lora": "missing.safetensors"}, OSError, "missing.safetensors"),
    ],
)
def test_assemble_refuses(parts, change, error, message, tmp_path):
    with pytest.raises(error, match=message):
        assemble(tmp_path / "out", **parts | change)


def test_assemble_refuses_a_foreign_lora_and_a_full_folder(parts, tmp_path):
    save_file({"blocks.7.attn1.to_q.lora_A.weight": torch.ones(1, 24)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="No key of .*foreign.safetensors fits"):
        assemble(tmp_path / "out", **parts | {"lora": str(tmp_path / "foreign.safetensors")})
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(ValueError, match="not an empty folder"):
        assemble(tmp_path / "out", **parts)


# -- pushing ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    lora = AnchorLora({"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 24)})
    lora.state_dict["transformer.blocks.0.attn1.to_q.lora_B.weight"] = torch.ones(24, 2)
    tiny_pipeline(rewriter=None, composer=None, anchor_lora=lora).save_pretrained(tmp_path / "saved")
    write_card(tmp_path / "saved", "mit")
    return tmp_path / "saved"


def test_push_creates_updates_and_opens_a_pull_request(hub, saved, light, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert main(["push", str(saved), "org/new", "--private", "--commit-message", "First"]) == 0
    repository = hub.repositories["org/new"]
    assert repository.private and hub.files("org/new") == file_names(saved) | {".gitattributes"}
    assert {"README.md", "pipeline.py", "schedulers/full-50/scheduler_config.json"} <= hub.files("org/new")
    assert capsys.readouterr().out.startswith(f"{hub.endpoint}/org/new/commit/")
    loaded = DiffusionPipeline.from_pretrained("org/new", token=hub.token, cache_dir=tmp_path / "cache")
    assert_weights(loaded.transformer, tiny_transformer())

    # From bundled to light: weights beside a reference would be fetched in its place.
    HfApi(token=hub.token).upload_file(path_or_fileobj=b"x", path_in_repo="notes.txt", repo_id="org/new")
    write_card(light, "mit")
    assert "/discussions/1" in push(light, "org/new", token=hub.token, create_pr=True)
    assert hub.files("org/new", "refs/pr/1") == file_names(light) | {".gitattributes", "notes.txt"}
    assert "vae/diffusion_pytorch_model.safetensors" in hub.files("org/new"), "main is as it was"
    push(light, "org/new", token=hub.token)
    assert hub.files("org/new") == file_names(light) | {".gitattributes", "notes.txt"}
    loaded = DiffusionPipeline.from_pretrained("org/new", token=hub.token, cache_dir=tmp_path / "cache")
    assert_weights(loaded.transformer, tiny_transformer())


def test_a_trained_lora_is_pushed_with_its_card(hub, tmp_path):
    """Of a run's folder what is for others; its log and checkpoints stay."""
    output = tmp_path / "out"
    AnchorLora({"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 24)}).save_pretrained(output)
    (output / "weights" / "README.md").write_text("A LoRA.")
    (output / "log_transformer.jsonl").write_text("{}")
    for folder, name in ((output, "org/lora"), (output / "weights", "org/other")):
        assert "/commit/" in push(folder, name, token=hub.token)
        assert hub.files(name) == {"pytorch_lora_weights.safetensors", "README.md", ".gitattributes"}
    with pytest.raises(ValueError, match="has neither model_index.json nor weights/pytorch_lora_weights.safetensors"):
        push(tmp_path, "org/lora", token=hub.token)


def test_nothing_private_goes_to_a_public_repository(hub, saved):
    push(saved, "org/open", token=hub.token)
    before = hub.files("org/open")
    (saved / "secret.txt").write_text("mine")
    with pytest.raises(ValueError, match="org/open is public, and `private=True` applies only to a new repository"):
        push(saved, "org/open", private=True, token=hub.token)
    assert hub.files("org/open") == before
    push(saved, "org/hidden", private=True, token=hub.token)
    push(saved, "org/hidden", private=True, token=hub.token)
    assert hub.repositories["org/hidden"].private


def test_interrupted_upload_is_repeated(hub, saved):
    hub.uploads_left = 2
    with pytest.raises(OSError, match="Push again"):
        push(saved, "org/new", token=hub.token)
    assert hub.files("org/new") == {".gitattributes"}, "no half repository"
    hub.uploads_left = None
    arrived = {path.name for path in hub.folder.iterdir()}
    hub.requests.clear()
    push(saved, "org/new", token=hub.token)
    assert hub.files("org/new") == file_names(saved) | {".gitattributes"}
    sent = {request.split("/")[-1] for request in hub.requests if request.startswith("PUT /storage/")}
    assert sent and not sent & arrived, "only what had not arrived is sent"
    assert len(sent) == len(list(saved.rglob("*.safetensors"))) - 2


def test_pipelines_push_both_kinds_with_a_card(hub, light, tmp_path):
    pipe = DiffusionPipeline.from_pretrained("org/light", cache_dir=tmp_path / "cache", token=hub.token)
    for name, bundle in (("org/copy", False), ("org/whole", True)):
        pipe.push_to_hub(name, token=hub.token, commit_message="Upload", bundle=bundle)
        loaded = DiffusionPipeline.from_pretrained(name, cache_dir=tmp_path / name)
        for component in (*MODELS, "rewriter", "composer"):
            assert_weights(getattr(loaded, component), _without_lora(getattr(pipe, component)))
        assert {"README.md", "pipeline.py"} <= hub.files(name)
    assert "vae/reference.json" in hub.files("org/copy") and "vae/reference.json" not in hub.files("org/whole")
    # A card that somebody has written stays.
    HfApi(token=hub.token).upload_file(path_or_fileobj=b"# Mine", path_in_repo="README.md", repo_id="org/copy")
    pipe.push_to_hub("org/copy", token=hub.token)
    card = hub.repositories["org/copy"].commits[hub._sha(hub.repositories["org/copy"], "main")]["README.md"]
    assert (hub.folder / card.sha256).read_bytes() == b"# Mine"


@pytest.mark.parametrize(
    "secret", ["hf_" + "aB" * 17, "Bearer 0123456789abcdef01", "/home/somebody/data/clips", "own key", "here"]
)
def test_no_key_and_no_local_path_is_pushed(hub, saved, secret, monkeypatch):
    monkeypatch.setenv("MY_SERVICE_API_KEY", "quite-a-secret-value-7")
    text = {"own key": "quite-a-secret-value-7", "here": str(saved)}.get(secret, secret)
    for name in ("notes.json", "anchor_lora/weights/pytorch_lora_weights.safetensors"):
        broken = saved.with_name(f"broken-{len(name)}")
        shutil.copytree(saved, broken)
        if name.endswith(".json"):
            (broken / name).write_text(f"trained with {text}")
        else:
            save_file(load_file(broken / name), broken / name, {"source": text})
        with pytest.raises(ValueError, match=f"Not pushed: {name} ") as error:
            push(broken, "org/leak", token=hub.token)
        assert text not in str(error.value)
    assert "org/leak" not in hub.repositories
    with pytest.raises(ValueError, match="pass a saved pipeline or a trained LoRA"):
        push(saved / "vae", "org/leak", token=hub.token)


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_loading_is_the_weights(run_python, tmp_path):
    """A process's peak resident memory while it loads, with the file's own pages in it, against the weights on disk."""
    config = {"num_attention_heads": 12, "attention_head_dim": 64, "ffn_dim": 3072, "num_layers": 8}
    with torch.device("meta"):
        transformer = AnchorConditionedTransformer3D(**TRANSFORMER_CONFIG | config)
    transformer = transformer.to(torch.bfloat16).to_empty(device="cpu")
    tiny_pipeline(rewriter=None, composer=None, transformer=transformer).save_pretrained(tmp_path / "big")
    tiny_pipeline(rewriter=None, composer=None).save_pretrained(tmp_path / "small")
    code = f"""
    import re, torch, diffusers_fvg
    from diffusers import DiffusionPipeline

    def status(name):
        return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

    # What the libraries need for themselves the first time.
    DiffusionPipeline.from_pretrained({str(tmp_path / "small")!r}, dtype=torch.bfloat16)
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    pipe = DiffusionPipeline.from_pretrained({str(tmp_path / "big")!r}, dtype=torch.bfloat16)
    # Weights that are mapped from their file come into memory when they are read.
    for weight in pipe.transformer.parameters():
        weight.sum()
    print(status("VmHWM") - before)
    """
    peak = int(run_python(code))
    weights = sum(path.stat().st_size for path in (tmp_path / "big").rglob("*.safetensors"))
    assert weights > 100e6
    print(f"peak {peak / 1e6:.0f} MB for {weights / 1e6:.0f} MB of weights")
    assert 0.5 * weights < peak < 1.2 * weights
