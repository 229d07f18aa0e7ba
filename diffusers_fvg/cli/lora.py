"""`fvg lora`: exports a LoRA for other programs, or merges it into a base model."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_lora(commands: argparse._SubParsersAction) -> None:
    lora = commands.add_parser("lora", help="export or merge a trained LoRA")
    actions = lora.add_subparsers(dest="action", required=True, metavar="ACTION")
    export = actions.add_parser("export", help="write the LoRA with the keys of another program")
    _add_source(export)
    export.add_argument(
        "output", type=Path, help="file ending in .safetensors; for ComfyUI, a LoRA of two experts becomes two files"
    )
    export.add_argument(
        "--format",
        choices=("diffusers", "comfyui"),
        default="comfyui",
        help="keys of diffusers, or those of Wan's own code, which ComfyUI reads (default: %(default)s)",
    )
    export.set_defaults(run=_export)
    merge = actions.add_parser("merge", help="write a pipeline with the LoRA merged into its weights")
    _add_source(merge)
    merge.add_argument("base", help="pipeline on which the LoRA was trained: folder or Hub repository")
    merge.add_argument("output", type=Path, help="an empty or new folder")
    merge.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of the weights (default: %(default)s)",
    )
    merge.set_defaults(run=_merge)


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="folder or file of a finished LoRA, or a checkpoint of a run")
    parser.add_argument(
        "--last-weights", action="store_true", help="use the weights of a checkpoint instead of their moving average"
    )


def _export(arguments: argparse.Namespace) -> None:
    from ..lora.export import export_lora

    average = not arguments.last_weights
    for path in export_lora(arguments.source, arguments.output, arguments.format, average):
        print(f"LoRA: {path}")


def _merge(arguments: argparse.Namespace) -> None:
    import torch

    from ..lora.export import merge_lora

    dtype = getattr(torch, arguments.dtype)
    merge_lora(arguments.source, arguments.base, arguments.output, not arguments.last_weights, dtype)
    print(f"pipeline: {arguments.output}")
