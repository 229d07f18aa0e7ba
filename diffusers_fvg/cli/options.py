"""Flags that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="recipe (see fvg models), folder or Hub repository; the embedded shapes model when left out"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of every stage")
    parser.add_argument("--device", help="cuda, mps or cpu; the fastest there is when left out")
    parser.add_argument("--seed", type=int, help="makes the run repeatable; drawn and printed when left out")
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def add_rewriter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rewriter",
        metavar="NAME|URL",
        help="in place of the model's: chat model (folder, org/name or org/name@revision), or OpenAI-compatible server",
    )
    parser.add_argument("--rewriter-model", metavar="NAME", help="the server's name of the chat model")
    parser.add_argument(
        "--rewriter-api-key-env", metavar="VAR", help="environment variable that holds the server's key"
    )


def add_composer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--composer",
        metavar="NAME",
        help="in place of the model's: text-to-image pipeline (folder, org/name or org/name@revision)",
    )


def add_lora(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lora", metavar="NAME", help="anchor LoRA for a recipe, of any format")


def add_video(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("video.mp4"), help="mp4 to write (default: %(default)s)")
    parser.add_argument("--preset", help="sampling preset, such as anchored-15 or full-50")
    parser.add_argument("--num-inference-steps", "--steps", type=int, help="steps of the video model")
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--num-frames", type=int)
    parser.add_argument("--negative-prompt")
    parser.add_argument(
        "--anchor-decode", choices=("raw", "match", "replace"), default="raw", help="colours of the anchored frames"
    )
    parser.add_argument("--strip", type=Path, help="also write a PNG with prompt, anchor and some frames")
