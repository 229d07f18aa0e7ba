"""Repositories of a pipeline that are damaged, or say what cannot be."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_rows import Row, Shared
from diffusers import DiffusionPipeline

from diffusers_fvg import FactorizedVideoPipeline, SchedulerPresets


def repository(title: str, change: Callable[[Path], Any], *words: str, error: type = ValueError) -> Row:
    """The embedded repository with one change, loaded by diffusers' own call."""

    def give(shared: Shared) -> None:
        folder = shared.repository()
        change(folder)
        FactorizedVideoPipeline.from_pretrained(folder)

    return Row(f"repository: {title}", give, words, error)


def rewritten(name: str, **changes: Any) -> Callable[[Path], None]:
    """Keys of a JSON file with other values; a key that is `None` is taken out."""

    def change(folder: Path) -> None:
        path = folder / name
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return change


def replaced(name: str, content: str | bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        # A weights' file is the package's own by another name: it is not written into.
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: os.remove(folder / name)


DEEP = "[" * 100_000 + "]" * 100_000
INDEX = "model_index.json"
PRESET = "schedulers/full-50/scheduler_config.json"
ROWS = [
    repository("no model_index.json", removed(INDEX), INDEX, error=OSError),
    repository("model_index.json of 0 bytes", replaced(INDEX, ""), INDEX, error=OSError),
    repository("model_index.json of half an object", replaced(INDEX, '{"_class_name": '), INDEX, error=OSError),
    repository("model_index.json of deep lists", replaced(INDEX, DEEP), INDEX, error=Exception),
    repository("no transformer in the index", rewritten(INDEX, transformer=None), "transformer", error=Exception),
    repository("a transformer that is null", rewritten(INDEX, transformer=[None, None]), "transformer"),
    repository("a class of another library", rewritten(INDEX, vae=["os", "system"]), "os", "system"),
    repository("a tokenizer for a VAE", rewritten(INDEX, vae=["transformers", "T5Tokenizer"]), "vae", error=Exception),
    repository("call_defaults of a list", rewritten(INDEX, call_defaults=[1]), "call_defaults", "dictionary"),
    repository(
        "a size of NaN", rewritten(INDEX, call_defaults={"height": float("nan")}), "`height=nan`", "whole number"
    ),
    repository("boundary_ratio of a text", rewritten(INDEX, boundary_ratio="x"), "`boundary_ratio='x'`"),
    repository("boundary_ratio of NaN", rewritten(INDEX, boundary_ratio=float("nan")), "`boundary_ratio=nan`"),
    repository("no VAE weights", removed("vae/diffusion_pytorch_model.safetensors"), "vae", error=OSError),
    repository("a VAE of 0 bytes", replaced("vae/diffusion_pytorch_model.safetensors", b""), "vae", error=Exception),
    repository("a VAE of text", replaced("vae/diffusion_pytorch_model.safetensors", "x" * 99), "vae", error=Exception),
    repository("a VAE config of half an object", replaced("vae/config.json", "{"), "config.json", error=Exception),
    repository("a VAE config of deep lists", replaced("vae/config.json", DEEP), "config.json", error=Exception),
    repository(
        "a rewriter config of half an object", replaced("rewriter/rewriter_config.json", "{"), "rewriter_config.json"
    ),
    repository(
        "a rewriter config of deep lists", replaced("rewriter/rewriter_config.json", DEEP), "rewriter_config.json"
    ),
    repository(
        "a rewriter that names a server",
        rewritten("rewriter/rewriter_config.json", endpoint="http://127.0.0.1:9/v1"),
        "rewriter_config.json",
        "endpoint",
    ),
    repository(
        "a composer config of a list",
        replaced("composer/composer_config.json", "[]"),
        "composer_config.json",
        "object",
    ),
    repository("no anchor LoRA", removed("anchor_lora/weights/pytorch_lora_weights.safetensors"), "anchor_lora"),
    repository("a preset of half an object", replaced(PRESET, "{"), "scheduler_config.json", "not valid JSON"),
    repository("a preset of deep lists", replaced(PRESET, DEEP), "scheduler_config.json", "too deeply"),
    repository("a preset without its values", rewritten(PRESET, _preset=None), "scheduler_config.json", "_preset"),
    repository("a preset of a list", rewritten(PRESET, _preset=[1]), "scheduler_config.json", "damaged"),
    repository("a preset of another class", rewritten(PRESET, _class_name=3), "`scheduler_class=3`"),
]


def preset(title: str, words: tuple[str, ...], **changes: Any) -> Row:
    """A preset's file with other values among its own."""

    def give(shared: Shared) -> None:
        folder = shared.repository() / "schedulers"
        path = folder / "full-50" / "scheduler_config.json"
        values = json.loads(path.read_text())
        values["_preset"] |= changes
        path.write_text(json.dumps(values))
        SchedulerPresets.from_pretrained(folder)

    return Row(f"repository: preset {title}", give, words)


ROWS += [
    preset("of another name", ("'other'", "rename the folder"), name="other"),
    preset("name=../x", ("'../x'",), name="../x"),
    preset("guidance_scale=NaN", ("full-50", "`guidance_scale=nan`"), guidance_scale=float("nan")),
    preset("guidance_scale='5'", ("full-50", "`guidance_scale='5'`"), guidance_scale="5"),
    preset("sigmas of NaN", ("full-50", "`sigmas[1]=nan`"), sigmas=[1.0, float("nan")]),
    preset("sigmas that rise", ("full-50", "must descend"), sigmas=[0.5, 1.0]),
    preset("order='x'", ("full-50", "order"), order="x"),
    preset("an unknown value", ("scheduler_config.json", "colour"), colour="red"),
]


def named(name: Any, *words: str, error: type = Exception) -> Row:
    return Row(
        f"repository: from_pretrained({name!r})",
        lambda shared: DiffusionPipeline.from_pretrained(name, local_files_only=True),
        words,
        error,
    )


ROWS += [
    named("/no/such/folder", "/no/such/folder"),
    named("a b/c", "a b/c"),
    named("../../etc", "../../etc"),
    named("http://127.0.0.1:9/model", "http://127.0.0.1:9/model"),
]
