"""Flags that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..flags import FRAMES, PIXELS, SEED, STEPS, Number, Whole


QUANTIZATIONS = ("fp8", "fp8-dynamic", "int8", "nf4")
COUNTS = Whole(1, 1024)


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        help="recipe (see fvg models), folder or Hub repository; the embedded shapes model when left out",
    )
    parser.add_argument("--revision", help="commit, branch or tag of the model on the Hub; of a recipe's base")
    parser.add_argument("--variant", help="of the weights, such as fp16; parts without it come as they are")
    parser.add_argument(
        "--token",
        action="store_true",
        help="the Hub must be asked with your login: HF_TOKEN or what `hf auth login` saved. Both are used without this flag "
        "too; it makes a missing one an error. A token itself is not taken here, where every process could read it",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of every stage (default: bfloat16; float32 of the embedded model)",
    )
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu; the fastest there is when left out")
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="of the card, such as 8GB or 24GB: what does not fit is offloaded, and decoded in tiles; auto takes what is free "
        "(the default with an accelerator), cpu keeps all on the CPU",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars, those of downloads included")


def add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--height", type=PIXELS, metavar="PIXELS", help="the model's own when left out")
    parser.add_argument("--width", type=PIXELS, metavar="PIXELS", help="the model's own when left out")


def add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seed", type=SEED, metavar="NUMBER", help="makes the run repeatable; drawn and printed when left out"
    )


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


def add_choosing(parser: argparse.ArgumentParser) -> None:
    """How many pictures and videos are made, of which one is kept."""
    parser.add_argument(
        "--composer-num-candidates",
        type=COUNTS,
        metavar="NUMBER",
        help="first frames that are drawn at most, for the model's judge to choose from (default: the model's own, or 1)",
    )
    parser.add_argument(
        "--motion-retries",
        type=COUNTS,
        metavar="NUMBER",
        help="how often a video that stands still is made again, at most (default: never)",
    )


def add_lora(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lora", metavar="NAME", help="anchor LoRA of any format, in place of the model's: file, folder or org/name"
    )


def add_quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quantize",
        choices=QUANTIZATIONS,
        help="weights of the video model in fewer bits: fp8 needs nothing, int8 needs torchao, nf4 (4 bits) bitsandbytes; fp8-dynamic "
        "multiplies in 8 bits too, by torchao, which is for speed, with --compile, on a GPU that has float8",
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", help="sampling preset, such as anchored-15 or full-50")
    parser.add_argument(
        "--num-inference-steps",
        "--steps",
        type=STEPS,
        metavar="STEPS",
        help="of the video model; the preset's when left out",
    )
    parser.add_argument(
        "--guidance-scale", type=Number(0, 1000), metavar="SCALE", help="1 is off; the preset's when left out"
    )
    parser.add_argument("--num-frames", type=FRAMES, metavar="FRAMES", help="the model's own when left out")


def add_video(parser: argparse.ArgumentParser) -> None:
    add_sampling(parser)
    parser.add_argument("--negative-prompt", metavar="TEXT", help="of the video model; the model's own when left out")
    parser.add_argument(
        "--anchor-decode",
        choices=("raw", "match", "replace"),
        help="where decoding changes an anchor's colours: raw leaves it, match gives all frames the anchor's, replace its pixels "
        "too (default: raw)",
    )
    parser.add_argument("--compile", action="store_true", help="compile the video model's blocks: a slow first step")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="mp4 to write (default: video.mp4, or the next free video-2.mp4)"
    )
    parser.add_argument(
        "--strip", type=Path, metavar="FILE", help="also write a PNG with prompt, anchor and some frames"
    )
    parser.add_argument("--no-metadata", action="store_true", help="the mp4 does not say how it was made")
    add_overwrite(parser)


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there already")
