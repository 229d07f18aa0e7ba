"""Every command and every block of Python in the README files runs, on the embedded model in place of real names."""

import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import PIL.Image
import pytest
from diffusers import WanPipeline, WanTransformer3DModel
from fastapi.testclient import TestClient
from quick import embedded_at, write_quick
from test_recipes import tiny_z_image
from tiny_dreamer import tiny_unet2d

from diffusers_fvg import load_embedded
from diffusers_fvg.cli import main
from diffusers_fvg.cli.batch import ENGINES
from diffusers_fvg.embedded import EMBEDDED_DREAMER_FOLDER
from diffusers_fvg.lora.anchor_lora import WEIGHT_NAME


FRAMES = 5
ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "diffusers_fvg").glob("*/README.md")),
]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(path: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(path.read_text(encoding="utf-8")) if kind == language]


def commands(path: Path) -> list[list[str]]:
    lines = [line for block in blocks(path, "bash") for line in block.splitlines()]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def documents_with(language: str) -> pytest.MarkDecorator:
    paths = [path for path in DOCUMENTS if blocks(path, language)]
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


@pytest.fixture(scope="module")
def brief(tmp_path_factory):
    """Folders of the embedded models with two steps; a video of the first has five frames."""
    root = tmp_path_factory.mktemp("brief")
    write_quick(root / "weights", video_steps=2, num_frames=FRAMES)
    shutil.copytree(EMBEDDED_DREAMER_FOLDER, root / "dreamer_weights")
    for path in (root / "dreamer_weights" / "schedulers").glob("*/scheduler_config.json"):
        config = json.loads(path.read_text())
        config["_preset"]["num_inference_steps"] = 2
        path.write_text(json.dumps(config))
    with embedded_at(root / "weights"):
        yield root


@pytest.fixture(scope="module")
def owned(tmp_path_factory, brief):
    """Saves the pipelines and models that the documents name."""
    pipe, folder = load_embedded(), tmp_path_factory.mktemp("owned")
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    wan = WanPipeline(**parts, transformer=WanTransformer3DModel.from_config(pipe.transformer.config))
    wan.save_pretrained(folder / "wan")
    # Room for the instruction of a chat model that was not trained for this.
    pipe.rewriter.model.config.max_position_embeddings = pipe.rewriter.tokenizer.model_max_length = 4096
    for part in (pipe.rewriter.model, pipe.rewriter.tokenizer):
        part.save_pretrained(folder / "chat-model")
    tiny_z_image().save_pretrained(folder / "text-to-image")
    return wan, folder


@pytest.fixture
def desk(tmp_path, monkeypatch, hub, brief, owned):
    """A reader's folder right after `make demo`, with the named repositories on the tests' Hub."""
    shutil.copy(brief / "weights" / "anchor_lora" / WEIGHT_NAME, tmp_path / "anchor.safetensors")
    (tmp_path / "auth.txt").write_text("ann:a-long-password\n")
    hub.add("org/fvg", brief / "weights")
    hub.add("Wan-AI/Wan2.2-TI2V-5B-Diffusers", owned[1] / "wan")
    hub.add("org/text-to-image", owned[1] / "text-to-image")
    hub.add("org/chat-model", owned[1] / "chat-model")
    (tmp_path / "prompts.txt").write_text("A red circle moves to the right\n")
    (tmp_path / "prompts.csv").write_text("prompt,mode\nA blue square moves upwards,direct\n")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.chdir(tmp_path)


def run(words: list[str], model: Path) -> None:
    program, *arguments = words
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in arguments)
    elif program == "export":
        assert words[1] in ("PATH=$PWD/.venv/bin:$PATH", "RAY_ADDRESS=first-machine:6379")
    elif program == "ray":
        # Of several machines; an engine has tests of its own.
        assert words[:2] == ["ray", "start"] and words[2] in ("--head", "--address")
    elif program == "pip":
        (extra,) = re.findall(r"^\.(?:\[(\w+)\])?$", arguments[-1])
        assert arguments[0] == "install"
        assert not extra or f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    elif program == "python":
        # Other tests run these commands.
        assert (ROOT / arguments[0]).is_file()
    else:
        assert program == "fvg"
        for place, word in enumerate(words[1:]):
            # Real weights, and videos of their size: the embedded model takes their place.
            if words[place] == "--model" and word != "org/fvg":
                arguments[place] = str(model)
            # The videos are shorter.
            if words[place] == "--min-frames":
                arguments[place] = str(FRAMES)
            # Storage that needs an account: one in memory takes its place.
            arguments[place] = arguments[place].replace("s3://", "memory://")
        if "--engine" in arguments:
            # Each has tests of its own, and takes long to start.
            assert arguments[arguments.index("--engine") + 1] in ENGINES
            arguments.append("--plan-only")
        if arguments[0] == "app":
            serve_once(arguments)
            return
        assert main(arguments) == 0, shlex.join(words)


def serve_once(arguments: list[str]) -> None:
    """A server ends when it is stopped: this one answers a request first. The page has tests of its own."""
    answers = []

    def answer(app, **_):
        answers.append(TestClient(app).get("/api/model").status_code)

    with patch("uvicorn.run", answer), patch("diffusers_fvg.cli.app._check_place"):
        assert main([*arguments, *(["--no-page"] if "--no-page" not in arguments else [])]) == 0
    assert answers == [200 if "--auth" not in arguments else 401]


@documents_with("bash")
def test_every_command_runs(path, desk, brief):
    for words in commands(path):
        run(words, brief / "weights")


@documents_with("python")
def test_every_block_of_python_runs(path, desk, owned, brief):
    """One after the other, as a reader would go through them, who has pipelines already."""
    pipe = load_embedded()
    reader_has = {
        "pipe": pipe,
        "picture": PIL.Image.new("RGB", (64, 64), (128, 128, 128)),
        "wan": owned[0],
        "another_wan": owned[0],
        "flux": tiny_z_image(),
        "chat_model": pipe.rewriter.model,
        "tokenizer": pipe.rewriter.tokenizer,
        "sd_pipe": SimpleNamespace(unet=tiny_unet2d()),
    }
    for block in blocks(path, "python"):
        block = block.replace('"cuda"', '"cpu"').replace('"24GB"', '"cpu"').replace("=17", f"={FRAMES}")
        block = block.replace(
            "load_embedded_dreamer()", f"load_embedded_dreamer(folder={str(brief / 'dreamer_weights')!r})"
        )
        exec(compile(block, str(path), "exec"), reader_has)
