"""Importing the package changes nothing for stock pipelines: what they read, write, fetch and say."""

import json

import pytest
import stock
from hub_server import HubServer


CODE = """
{first}
import stock
stock.main({folder!r})
"""


# Files in the Hub's repositories that the loader must choose among: in a folder within a component's, pickles beside
# safetensors files, weights of no standard name (which it takes for a repository without safetensors files).
MORE = {
    "wan": ["vae/inner/diffusion_pytorch_model.safetensors", "original/model.safetensors"],
    "sdxl": ["vae/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.fp16.bin", "weights.ckpt"],
    "flux": ["scheduler/weights.safetensors", "tokenizer/notes.bin"],
}


@pytest.fixture
def folders(tmp_path):
    """What the Hub has of each pipeline."""
    for name, files in MORE.items():
        pipe = stock.build(name)
        pipe.save_pretrained(tmp_path / name)
        pipe.save_pretrained(tmp_path / name, variant="fp16")
        for file in files:
            (tmp_path / name / file).parent.mkdir(exist_ok=True)
            (tmp_path / name / file).write_bytes(file.encode())
    return {name: tmp_path / name for name in MORE}


def run(run_python, folders, place, first: str) -> tuple[dict, list, list]:
    """What a fresh process with a Hub of its own prints, fetches and asks for."""
    place.mkdir()
    with HubServer(place / "server") as server:
        for name, folder in folders.items():
            server.add(f"org/{name}", folder)
        (place / "work").mkdir()
        hub = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "0"}
        out = run_python(CODE.format(first=first, folder=str(place / "work")), **hub)
        seen = json.loads(out.replace(server.endpoint, "HUB"))
        return seen, sorted(server.downloads), sorted(server.requests)


def test_with_and_without_the_import(folders, run_python, tmp_path):
    stock_seen, stock_fetched, stock_asked = run(run_python, folders, tmp_path / "without", "")
    seen, fetched, asked = run(run_python, folders, tmp_path / "with", "import diffusers_fvg")
    assert seen == stock_seen
    assert fetched == stock_fetched
    assert asked == stock_asked

    # And there was something to compare.
    assert {name: seen[name]["plain"][""][0] for name in stock.PIPELINES} == {
        "wan": "WanPipeline",
        "sdxl": "StableDiffusionXLPipeline",
        "flux": "FluxPipeline",
    }
    wan = seen["wan"]
    assert "should be <class 'diffusers.models.modeling_utils.ModelMixin'>" in wan["wrong"]
    assert "variant=int8" in wan["no such variant"] and "variant=int8" in wan["hub without a variant"]
    assert wan["pickle"]["vae"] == wan["plain"]["vae"]
    assert wan["hub plain"]["vae"] == wan["plain"]["vae"] != wan["half"]["vae"]
    assert ("org/sdxl", "vae/diffusion_pytorch_model.fp16.safetensors", False) in fetched
    assert seen["said"]
