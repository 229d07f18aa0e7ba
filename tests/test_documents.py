"""Every command and every block of Python in the README files runs, on the embedded model in place of real names."""

import re
import runpy
import shlex
import shutil
from pathlib import Path

import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline

import diffusers_fvg
from diffusers_fvg import load_embedded
from diffusers_fvg.cli import main
from diffusers_fvg.embedded import EMBEDDED_FOLDER


ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    [ROOT / "README.md", ROOT / "examples" / "README.md", *(ROOT / "diffusers_fvg").glob("*/README.md")]
)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# What a reader has, and what stands for it here.
NAMES = {
    "org/fvg": EMBEDDED_FOLDER,
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": EMBEDDED_FOLDER,
    "org/text-to-image": EMBEDDED_FOLDER / "composer",
    "org/chat-model": EMBEDDED_FOLDER / "rewriter",
    "anchor.safetensors": EMBEDDED_FOLDER / "anchor_lora" / "pytorch_lora_weights.safetensors",
}
RECIPES = ("wan2.2-5b", "wan2.1-1.3b")


def blocks(path: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(path.read_text(encoding="utf-8")) if kind == language]


def commands(path: Path) -> list[list[str]]:
    lines = [line for block in blocks(path, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]
