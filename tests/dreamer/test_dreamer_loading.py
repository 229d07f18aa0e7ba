"""Factorized-Dreamer's repositories by `DiffusionPipeline.from_pretrained`, in processes of their own."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_dreamer import tiny_dreamer_pipeline

from diffusers_fvg import FactorizedDreamerPipeline, HubReference


IMPORTED = """
import diffusers_fvg, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({repo!r}, dtype=torch.bfloat16)
"""
NOT_IMPORTED = """
import sys, torch
from diffusers import DiffusionPipeline
assert "diffusers_fvg" not in sys.modules
pipe = DiffusionPipeline.from_pretrained({repo!r}, custom_pipeline={repo!r}, trust_remote_code=True, dtype=torch.bfloat16)
"""
CHECK = """
names = [type(part).__name__ for part in (pipe, pipe.unet, pipe.text_encoder_2, pipe.image_encoder)]
assert names == ["FactorizedDreamerPipeline", "FactorizedDreamerUNet", "T5EncoderModel", "CLIPVisionModelWithProjection"], names
assert pipe.unet.dtype == pipe.rewriter.dtype == pipe.composer.dtype == torch.bfloat16
print("loaded", pipe.unet.config.num_frames)
"""
STAGES = ("rewriter", "composer", "text_encoder", "text_encoder_2", "image_encoder", "unet", "vae")


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository") / "tiny-dreamer"
    tiny_dreamer_pipeline(call_defaults={"height": 32, "width": 32, "num_frames": 4}).save_pretrained(folder)
    return folder


def assert_same(loaded, expected):
    for name in STAGES:
        state, truth = getattr(loaded, name).state_dict(), getattr(expected, name).state_dict()
        assert state.keys() == truth.keys(), name
        assert all(torch.equal(state[key], truth[key]) for key in truth), name


def test_index_names_no_module_of_ours(bundled):
    index = json.loads((bundled / "model_index.json").read_text())
    assert index["_class_name"] == "FactorizedDreamerPipeline"
    assert index["unet"] == ["diffusers", "FactorizedDreamerUNet"]
    assert "diffusers_fvg" not in json.dumps(index)


def test_folder_by_the_base_class_and_by_ours(bundled):
    for cls in (DiffusionPipeline, FactorizedDreamerPipeline):
        loaded = cls.from_pretrained(bundled)
        assert type(loaded) is FactorizedDreamerPipeline
        assert loaded.call_defaults["num_frames"] == 4 and "full-50" in loaded.presets
        assert_same(loaded, tiny_dreamer_pipeline())


def test_fresh_process_without_the_package(bundled, run_python):
    assert "loaded 4" in run_python(NOT_IMPORTED.format(repo=str(bundled)) + CHECK)


def test_light_repository(hub, bundled, tmp_path, run_python):
    """The video UNet and what is small are its own; what is stock stays in another repository."""
    hub.add("org/stock", bundled)
    pipe = FactorizedDreamerPipeline.from_pretrained(bundled)
    stock = {
        "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "T5EncoderModel"),
        "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
    }
    for name, (library, kind) in stock.items():
        setattr(pipe, name, HubReference("org/stock", library, kind, subfolder=name).load(name))
    pipe.save_pretrained(tmp_path / "light")
    for name in stock:
        assert [path.name for path in (tmp_path / "light" / name).iterdir()] == ["reference.json"]
    hub.add("org/light", tmp_path / "light")
    assert_same(DiffusionPipeline.from_pretrained("org/light", cache_dir=tmp_path / "cache"), pipe)
    # A fresh process loads the folder and the repository.
    both = "".join(IMPORTED.format(repo=repo) + CHECK for repo in (str(bundled), "org/light"))
    assert run_python(both).count("loaded 4") == 2
