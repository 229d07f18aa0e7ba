"""The models that ship with the package: both systems, trained on a world of coloured shapes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from .pipelines.pipeline_factorized_dreamer import FactorizedDreamerPipeline
    from .pipelines.pipeline_factorized_video import FactorizedVideoPipeline

EMBEDDED_FOLDER = Path(__file__).parent / "shapes" / "weights"
EMBEDDED_DREAMER_FOLDER = Path(__file__).parent / "shapes" / "dreamer_weights"


def load_embedded(dtype: torch.dtype | None = None) -> FactorizedVideoPipeline:
    """Loads the embedded pipeline: all three stages, 64 x 64 pixels, 17 frames.

    Args:
        dtype (`torch.dtype`, *optional*): of every stage; float32 when left out, which is the fastest on a CPU. The
            weights are stored in float16.
    """
    from .pipelines.pipeline_factorized_video import FactorizedVideoPipeline

    return FactorizedVideoPipeline.from_pretrained(EMBEDDED_FOLDER, dtype=dtype or torch.float32)


def load_embedded_dreamer(
    dtype: torch.dtype | None = None, folder: str | os.PathLike = EMBEDDED_DREAMER_FOLDER
) -> FactorizedDreamerPipeline:
    """Loads the embedded Factorized-Dreamer: 64 x 64 pixels, 8 frames at 4 per second; stages 1 and 2 are those of
    [`load_embedded`].

    Args:
        dtype (`torch.dtype`, *optional*): as for [`load_embedded`].
        folder (`str` or `os.PathLike`, *optional*): a repository that `fvg shapes dreamer` made; the one that ships when left
            out.
    """
    from .compose.composer import AnchorComposer
    from .pipelines.pipeline_factorized_dreamer import FactorizedDreamerPipeline
    from .rewrite.rewriter import FirstFrameRewriter

    dtype = dtype or torch.float32
    rewriter = FirstFrameRewriter.from_pretrained(EMBEDDED_FOLDER / "rewriter", dtype=dtype)
    composer = AnchorComposer.from_pretrained(EMBEDDED_FOLDER / "composer", dtype=dtype)
    return FactorizedDreamerPipeline.from_pretrained(folder, rewriter=rewriter, composer=composer, dtype=dtype)
