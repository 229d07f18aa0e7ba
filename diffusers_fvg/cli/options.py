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
        help="recipe (see fvg models), folder or Hub repository (default: the embedded shapes model)",
    )
    parser.add_argument("--revision", help="commit, branch or tag of the model on the Hub; for a recipe, of its base")
    parser.add_argument(
        "--variant", help="variant of the weight files, such as fp16; components without it load their plain files"
    )
    parser.add_argument(
        "--token",
        action="store_true",
        help="require your Hub login (HF_TOKEN or `hf auth login`). It is used without this flag too; the flag makes a missing "
        "login an error. The flag takes no token, because it would be visible to all processes",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of every stage (default: bfloat16; float32 for the embedded model)",
    )
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: an accelerator if there is one)")
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="memory to plan for, such as 8GB or 24GB: models that do not fit are offloaded, and the video is decoded in tiles. auto "
        "uses the free memory (the default with an accelerator), cpu keeps everything on the CPU",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress bars, also for downloads")


def add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--height", type=PIXELS, metavar="PIXELS", help="height of the video (default: the model's own)"
    )
    parser.add_argument("--width", type=PIXELS, metavar="PIXELS", help="width of the video (default: the model's own)")


def add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seed",
        type=SEED,
        metavar="NUMBER",
        help="seed that makes the run repeatable (default: a random one, printed)",
    )


def add_rewriter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rewriter",
        metavar="NAME|URL",
        help="chat model instead of the model's own: folder, org/name, org/name@revision, or URL of an OpenAI-compatible server",
    )
    parser.add_argument("--rewriter-model", metavar="NAME", help="name of the chat model on the server")
    parser.add_argument("--rewriter-api-key-env", metavar="VAR", help="environment variable with the server's key")


def add_composer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--composer",
        metavar="NAME",
        help="text-to-image pipeline instead of the model's own: folder, org/name or org/name@revision",
    )


def add_choosing(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for the number of pictures and videos of which one is kept."""
    parser.add_argument(
        "--composer-num-candidates",
        type=COUNTS,
        metavar="NUMBER",
        help="maximum number of first frames to draw, of which the model's judge chooses one (default: the model's own, or 1)",
    )
    parser.add_argument(
        "--motion-retries",
        type=COUNTS,
        metavar="NUMBER",
        help="maximum number of times to repeat a video without motion (default: never)",
    )


def add_lora(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lora", metavar="NAME", help="anchor LoRA of any format instead of the model's own: file, folder or org/name"
    )


def add_quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quantize",
        choices=QUANTIZATIONS,
        help="store the video model's weights in fewer bits: fp8 needs no package, int8 needs torchao, nf4 (4 bits) needs "
        "bitsandbytes. fp8-dynamic (torchao) also multiplies in 8 bits, for speed with --compile on a GPU with float8",
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", help="sampling preset, such as anchored-15 or full-50")
    parser.add_argument(
        "--num-inference-steps",
        "--steps",
        type=STEPS,
        metavar="STEPS",
        help="steps of the video model (default: the preset's)",
    )
    parser.add_argument(
        "--guidance-scale",
        type=Number(0, 1000),
        metavar="SCALE",
        help="guidance scale; 1 disables guidance (default: the preset's)",
    )
    parser.add_argument(
        "--num-frames", type=FRAMES, metavar="FRAMES", help="number of frames (default: the model's own)"
    )


def add_video(parser: argparse.ArgumentParser) -> None:
    add_sampling(parser)
    parser.add_argument(
        "--negative-prompt", metavar="TEXT", help="negative prompt of the video model (default: the model's own)"
    )
    parser.add_argument(
        "--anchor-decode",
        choices=("raw", "match", "replace"),
        help="colours that the VAE changed: raw keeps them, match corrects all frames to the anchor's colours, replace also restores "
        "the anchor's pixels (default: raw)",
    )
    add_light_decoder(parser)
    parser.add_argument(
        "--compile", action="store_true", help="compile the video model's blocks, which makes the first step slow"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="mp4 to write (default: video.mp4, or the next free video-2.mp4)"
    )
    parser.add_argument(
        "--strip", type=Path, metavar="FILE", help="also write a PNG with prompt, anchor and some frames"
    )
    parser.add_argument("--no-metadata", action="store_true", help="store no record of the settings in the mp4")
    add_overwrite(parser)


def add_light_decoder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--light-decoder",
        metavar="NAME",
        help="decode with taew2_1 or taew2_2, which are faster and show less detail than the VAE: file, folder, org/name or "
        "org/name@revision",
    )


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
