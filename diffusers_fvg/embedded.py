"""The embedded models, which ship with the package: small versions of both pipelines, trained on coloured shapes."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer


if TYPE_CHECKING:
    from .pipelines.pipeline_factorized_dreamer import FactorizedDreamerPipeline
    from .pipelines.pipeline_factorized_video import FactorizedVideoPipeline

EMBEDDED_FOLDER = Path(__file__).parent / "shapes" / "weights"
EMBEDDED_DREAMER_FOLDER = Path(__file__).parent / "shapes" / "dreamer_weights"
# Copied from `shapes.world`.
COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")
SHAPES = ("circle", "square", "triangle")

logger = logging.getLogger(__name__)


def check_world(text: str, writes: bool = False) -> None:
    """Warns once per text of words that the embedded models do not know; the `prompt_check` of their pipelines.

    Args:
        text (`str`): prompt or caption.
        writes (`bool`): whether stage 1 will write a caption from `text`. It would invent one for a text without shapes.

    Raises:
        `ValueError`: `writes` is `True` and `text` names none of the shapes.
    """
    encoding = _tokenizer().encode(text, add_special_tokens=False)
    unknown = [text[slice(*place)] for token, place in zip(encoding.tokens, encoding.offsets) if token == "<unk>"]
    has_shape = any(token in SHAPES or token.removesuffix("s") in SHAPES for token in encoding.tokens)
    if has_shape and not unknown:
        return
    words = ", ".join(repr(word) for word in dict.fromkeys(unknown))
    message = (
        f"The embedded model is a toy, and {f'does not know {words}' if unknown else f'{text!r} names none of its shapes'}: it "
        f"knows {', '.join(COLOURS[:-1])} and {COLOURS[-1]} {'s, '.join(SHAPES[:-1])}s and {SHAPES[-1]}s, as in 'A red circle "
        'moves to the right\'. For any other prompt name a real model: `--model wan2.2-5b`, or `load("wan2.2-5b")`; `fvg models` '
        "lists them."
    )
    if writes and not has_shape:
        raise ValueError(message)
    _warn_once(message)


@functools.cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(EMBEDDED_FOLDER / "tokenizer" / "tokenizer.json"))


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def load_embedded(dtype: torch.dtype | None = None) -> FactorizedVideoPipeline:
    """Loads the embedded pipeline: all three stages, 64 x 64 pixels, 17 frames.

    Args:
        dtype (`torch.dtype`, *optional*): dtype of every stage; float32 when left out, which is the fastest on a CPU.
            The weights are stored in float16.
    """
    from .pipelines.pipeline_factorized_video import FactorizedVideoPipeline

    pipe = FactorizedVideoPipeline.from_pretrained(EMBEDDED_FOLDER, dtype=dtype or torch.float32)
    pipe.prompt_check = check_world
    pipe.register_to_config(_name_or_path="embedded")
    pipe.origin = {"kind": "embedded"}
    return pipe


def load_embedded_dreamer(
    dtype: torch.dtype | None = None, folder: str | os.PathLike = EMBEDDED_DREAMER_FOLDER
) -> FactorizedDreamerPipeline:
    """Loads the embedded Factorized-Dreamer: 64 x 64 pixels, 8 frames at 4 per second; stages 1 and 2 are those of
    [`load_embedded`].

    Args:
        dtype (`torch.dtype`, *optional*): as for [`load_embedded`].
        folder (`str` or `os.PathLike`, *optional*): a folder that `fvg shapes dreamer` made; the embedded weights when left
            out.
    """
    from .compose.composer import AnchorComposer
    from .pipelines.pipeline_factorized_dreamer import FactorizedDreamerPipeline
    from .rewrite.rewriter import FirstFrameRewriter

    dtype = dtype or torch.float32
    rewriter = FirstFrameRewriter.from_pretrained(EMBEDDED_FOLDER / "rewriter", dtype=dtype)
    composer = AnchorComposer.from_pretrained(EMBEDDED_FOLDER / "composer", dtype=dtype)
    pipe = FactorizedDreamerPipeline.from_pretrained(folder, rewriter=rewriter, composer=composer, dtype=dtype)
    pipe.prompt_check = check_world
    return pipe
