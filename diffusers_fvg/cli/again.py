"""`fvg generate --from`: a video made again from what its file says of it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..pipelines.output import FactorizedVideoPipelineOutput
    from ..pipelines.stages import FactorizedStages

# Of `--quantize`: how a record names it.
QUANTIZED = {"float8_e4m3fn": "fp8", "torchao": "int8", "bitsandbytes-4bit": "nf4"}


@dataclass
class Again:
    """A video that is to be made again.

    Args:
        record (`dict`): of the file.
        call (`dict`): arguments of the pipeline's call, changes among them, without a generator.
        images (*optional*): those that the call was given.
        changes (`dict`): arguments of the call that flags give.
    """

    record: dict[str, Any]
    call: dict[str, Any]
    images: Any
    changes: dict[str, Any]

    def make(self, pipe: FactorizedStages, draws: dict[str, Any]) -> FactorizedVideoPipelineOutput:
        """The video; `draws` has the generator of `--seed`, or nothing."""
        from ..pipelines.replay import replay

        if self.record.get("vae_tiling"):
            pipe.vae.enable_tiling()
        return replay(pipe, self.record, self.images, **self.changes, **draws)


def add_from(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="VIDEO",
        help="an mp4 that fvg made, to make again; what other flags say counts before what its file says",
    )


def take_over(arguments: argparse.Namespace, call: dict[str, Any]) -> Again:
    """Reads the record of `--from` and fills in the flags that say which model runs and where; those that are given stay.

    The file may be a stranger's: of a model it can name what --model can, on the Hub alone, and that is printed before anything
    is fetched.

    Raises:
        `ValueError`: no record, one whose model is to be given, or a picture that is missing or another one.
    """
    from ..pipelines.replay import needs_images, read_record, recorded_call

    record, changes, images = read_record(arguments.source), dict(call), None
    if needs_images(record) and call.get("mode", record["mode"]) == record["mode"]:
        images = changes.pop("image", None)
    wanted = recorded_call(record, images, changes)
    arguments.mode = wanted["mode"]
    captions = [moment.caption for moment in wanted.get("storyboard", ())]
    arguments.first_frame_prompt = wanted.get("first_frame_prompt", captions[0] if captions else None)
    if arguments.model is None and record.get("model") != "embedded":
        _take_model(arguments, record)
    dtypes = record.get("dtypes") or {}
    dtype = dtypes.get("transformer", dtypes.get("unet"))
    if arguments.dtype is None and dtype in ("float32", "bfloat16", "float16"):
        arguments.dtype = dtype
    if arguments.quantize is None:
        arguments.quantize = QUANTIZED.get((record.get("quantization") or {}).get("transformer"))
    if arguments.device is None and arguments.memory is None and _is_here(record.get("device")):
        arguments.device = record["device"]
    return Again(record, wanted, images, changes)


def _take_model(arguments: argparse.Namespace, record: dict[str, Any]) -> None:
    """The model of a record, and what it was given in place of its own parts."""
    from ..recipes import RECIPES

    model, parts = record.get("model"), record.get("hub_revisions") or {}
    if model is None:
        raise ValueError("--from: the record names no model; give it as --model.")
    recipe = RECIPES.get(model)
    if recipe is None and "/" not in model:
        raise ValueError(f"--from: the model was a folder called {model!r}; give it as --model.")
    taken = {"model": model, "composer": parts.get("composer", ""), "lora": parts.get("anchor_lora", "")}
    for flag, name in taken.items():
        if name and (Path(name).exists() or Path(name.partition("@")[0]).exists()):
            raise ValueError(f"--from: {name!r} of the record is also a place here; say by --{flag} which is meant.")
    arguments.model, revision = model, record.get("revision")
    if recipe is not None:
        base, _, revision = parts.get("vae", "").partition("@")
        revision = revision if base == recipe.facts.repository else None
        if arguments.composer is None and taken["composer"].partition("@")[0] != recipe.composer.repository:
            arguments.composer = taken["composer"] or None
    arguments.revision = arguments.revision or revision or None
    arguments.lora = arguments.lora or taken["lora"] or None
    named = {"model": f"{model}@{arguments.revision}" if arguments.revision else model}
    named |= {"composer": arguments.composer, "LoRA": arguments.lora}
    print("from the record:    " + ", ".join(f"{part} {name}" for part, name in named.items() if name))


def _is_here(device: str | None) -> bool:
    import torch

    return (
        device == "cpu" or torch.accelerator.is_available() and device == torch.accelerator.current_accelerator().type
    )
