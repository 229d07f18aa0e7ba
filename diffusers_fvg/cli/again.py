"""`fvg generate --from`: repeats a video from the record in its file."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..pipelines.output import FactorizedVideoPipelineOutput
    from ..pipelines.stages import FactorizedStages

# Name of a quantization in a record -> value of `--quantize`.
QUANTIZED = {
    "float8_e4m3fn": "fp8",
    "torchao-fp8-dynamic": "fp8-dynamic",
    "torchao": "int8",
    "bitsandbytes-4bit": "nf4",
}
# Component that a repository may hold as a reference -> its configuration file, and the key of the repository in it.
PART_CONFIGS = {"composer": ("composer_config.json", "repository"), "rewriter": ("rewriter_config.json", "model")}


@dataclass
class Again:
    """A video to repeat.

    Args:
        record (`dict`): record of the file.
        call (`dict`): arguments of the pipeline's call with the changes applied, without a generator.
        images (*optional*): pictures of the recorded call, given again.
        changes (`dict`): arguments of the call that come from flags.
        needs_lora (`bool`): whether the model's anchor LoRA must be the recorded one: the model is the recorded one, and
            `--lora` names no other.
    """

    record: dict[str, Any]
    call: dict[str, Any]
    images: Any
    changes: dict[str, Any]
    needs_lora: bool

    def make(self, pipe: FactorizedStages, draws: dict[str, Any]) -> FactorizedVideoPipelineOutput:
        """Makes the video; `draws` contains the generator of `--seed`, or is empty.

        Raises:
            `ValueError`: the recorded anchor LoRA differs from the model's own, or as in [`replay`].
        """
        from ..pipelines.replay import replay

        if self.needs_lora:
            _check_lora(pipe, self.record)
        if self.record.get("vae_tiling"):
            pipe.vae.enable_tiling()
        return replay(pipe, self.record, self.images, **self.changes, **draws)


def add_from(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="VIDEO",
        help="mp4 made by fvg, to repeat from the settings in its record; other flags override them",
    )


def take_over(arguments: argparse.Namespace, call: dict[str, Any]) -> Again:
    """Reads the record of `--from` and fills in the flags for the model and its device that were not given.

    The file may come from a stranger. It can name only models that `--model` can name on the Hub, and they are printed before
    anything is downloaded.

    Raises:
        `ValueError`: the file has no record, the record does not name its model, a picture is missing, or a flag has no effect.
    """
    from ..pipelines.record import model_name
    from ..pipelines.replay import needs_images, read_record, recorded_call

    record, changes, images = read_record(arguments.source), dict(call), None
    if needs_images(record) and call.get("mode", record["mode"]) == record["mode"]:
        images = _take_image(record, changes)
    if arguments.rewriter is not None and record.get("prompt") is not None and "prompt" not in changes:
        # A list differs from the recorded prompt, so that stage 1 runs again.
        changes["prompt"] = [record["prompt"]]
    wanted = recorded_call(record, images, changes)
    arguments.mode = wanted["mode"]
    captions = [moment.caption for moment in wanted.get("storyboard", ())]
    arguments.first_frame_prompt = wanted.get("first_frame_prompt", captions[0] if captions else None)
    _check_effect(arguments, wanted)
    is_same = arguments.model is None or model_name(arguments.model.partition("@")[0]) == record.get("model")
    if is_same:
        _take_model(arguments, record, wanted)
    needs_lora = is_same and arguments.lora is None and arguments.mode != "direct"
    dtypes = record.get("dtypes") or {}
    dtype = next((dtypes[name] for name in ("transformer", "unet", "animator") if name in dtypes), None)
    if arguments.dtype is None and dtype in ("float32", "bfloat16", "float16"):
        arguments.dtype = dtype
    if arguments.quantize is None:
        arguments.quantize = QUANTIZED.get((record.get("quantization") or {}).get("transformer") or "")
    if arguments.device is None and arguments.memory is None and _is_here(record.get("device")):
        arguments.device = record["device"]
    return Again(record, wanted, images, changes, needs_lora)


def _take_image(record: dict[str, Any], changes: dict[str, Any]) -> Any:
    """Returns the recorded picture, given again by `--image`; a different picture replaces it, with a warning."""
    from ..animate.anchor import Anchor
    from ..pipelines.replay import given_anchors, logger

    image = changes.pop("image", None)
    if image is None or len(record["anchors"]) > 1:
        return image
    try:
        given_anchors(record, image)
    except ValueError:
        logger.warning("--image differs from the recorded picture, so that the video will differ.")
        entry = record["anchors"][0]
        changes["anchors"] = [Anchor(image, entry["frame_index"], entry["strength"])]
        return None
    return image


def _check_effect(arguments: argparse.Namespace, wanted: dict[str, Any]) -> None:
    """Raises `ValueError` for a flag of a stage that does not run."""
    given = next((name for name in ("image", "anchors") if name in wanted), None)
    cause = (
        "a picture is given" if given else "--mode direct has no first frame" if wanted["mode"] == "direct" else None
    )
    flags = {"composer": cause, "rewriter": cause or arguments.first_frame_prompt and "a first-frame prompt is given"}
    flags["num_moments"] = None if wanted["mode"] == "storyboard" else "it needs --mode storyboard"
    for name, reason in flags.items():
        value = getattr(arguments, name)
        if value is not None and reason:
            raise ValueError(f"--{name.replace('_', '-')} {value} has no effect: {reason}; leave it out.")


def _check_lora(pipe: FactorizedStages, record: dict[str, Any]) -> None:
    from ..pipelines.record import surroundings

    here = surroundings(pipe)
    for expert, adapters in (record.get("adapter_hashes") or {}).items():
        # In another dtype, the same weights have another hash.
        kinds = [(found.get(key) or {}).get(expert) for key in ("dtypes", "quantization") for found in (record, here)]
        is_comparable = kinds[0] == kinds[1] and kinds[2] == kinds[3]
        recorded, own = adapters.get("anchor"), here["adapter_hashes"].get(expert, {}).get("anchor")
        if recorded is not None and (own is None or is_comparable and own != recorded):
            raise ValueError(
                f"--from: the video was made with another anchor LoRA than the model's own (sha256 {recorded}); give it as --lora."
            )


def _take_model(arguments: argparse.Namespace, record: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Fills in the flags of the recorded model and of the components that replaced its own."""
    from ..recipes import ANIMATOR_RECIPES, RECIPES

    model, kind, parts = record.get("model"), record.get("model_kind"), record.get("hub_revisions") or {}
    recipe = (RECIPES | ANIMATOR_RECIPES).get(model or "") if kind == "recipe" else None
    if arguments.model is None:
        if model is None:
            raise ValueError("--from: the record names no model; give it as --model.")
        if kind == "recipe" and recipe is None:
            raise ValueError(f"--from: {model!r} is not a recipe of this version; give the model as --model.")
        if kind not in ("embedded", "recipe", "hub"):
            raise ValueError(f"--from: the model was a local folder named {model!r}; give it as --model.")
    names, revision = {"composer": parts.get("composer"), "lora": parts.get("anchor_lora")}, record.get("revision")
    if wanted["mode"] == "direct" or {"image", "anchors"} & wanted.keys():
        del names["composer"]
    elif arguments.first_frame_prompt is None:
        names["rewriter"] = parts.get("rewriter")
    taken = {flag: name for flag, name in names.items() if name and getattr(arguments, flag) is None}
    if arguments.model is None and kind != "embedded":
        taken = {"model": model} | taken
    for flag, name in taken.items():
        if Path(name).exists() or Path(name.partition("@")[0]).exists():
            raise ValueError(
                f"--from: {name!r} in the record is also the name of a local path; give the one that you mean as --{flag}."
            )
    if recipe is not None:
        has_lora = any("anchor" in adapters for adapters in (record.get("adapters") or {}).values())
        is_own = recipe.lora is not None or names["lora"] is not None or arguments.lora is not None
        if has_lora and not is_own and wanted["mode"] != "direct":
            raise ValueError("--from: the video was made with a local anchor LoRA; give it as --lora.")
        base, _, revision = parts.get("animator" if model in ANIMATOR_RECIPES else "vae", "").partition("@")
        revision = revision if base == recipe.repositories.get("base", recipe.repositories.get("animator")) else None
    if "model" in taken:
        arguments.revision = arguments.revision or revision or None
    shown = dict(taken)
    if "model" in taken and arguments.revision:
        shown["model"] = f"{model}@{arguments.revision}"
    if shown:
        titles = {"lora": "LoRA"}
        print("from the record:    " + ", ".join(f"{titles.get(part, part)} {name}" for part, name in shown.items()))
    for flag, name in taken.items():
        setattr(arguments, flag, name)
    if recipe is None and kind != "embedded":
        _keep_own_parts(arguments, taken)


def _keep_own_parts(arguments: argparse.Namespace, taken: dict[str, str]) -> None:
    """Unsets flags for components that the repository itself names, so that they load with its settings."""
    from ..recipes.loading import hub_options
    from ..recipes.sources import find_source

    if not taken.keys() & PART_CONFIGS.keys():
        return
    source = find_source(arguments.model, arguments.revision, hub_options(arguments.token or None))
    for part in taken.keys() & PART_CONFIGS.keys():
        name, key = PART_CONFIGS[part]
        assert source.folder is not None
        file = source.folder / part / name
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        own = [config.get(key), config.get("revision")]
        if "@".join(filter(None, own)) == taken[part]:
            setattr(arguments, part, None)


def _is_here(device: str | None) -> bool:
    import torch

    return (
        device == "cpu" or torch.accelerator.is_available() and device == torch.accelerator.current_accelerator().type
    )
