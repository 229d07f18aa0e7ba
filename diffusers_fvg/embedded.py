"""The model that ships with the package: a trained Factorized Video Generation model of a world of coloured shapes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from .pipeline_factorized_video import FactorizedVideoPipeline

EMBEDDED_FOLDER = Path(__file__).parent / "shapes" / "weights"


def load_embedded(dtype: torch.dtype | None = None) -> FactorizedVideoPipeline:
    """Loads the embedded pipeline: all three stages, 64 x 64 pixels, 17 frames.

    Args:
        dtype (`torch.dtype`, *optional*): of every stage; float32 when left out, which is the fastest on a CPU. The
            weights are stored in float16.
    """
    from .pipeline_factorized_video import FactorizedVideoPipeline

    return FactorizedVideoPipeline.from_pretrained(EMBEDDED_FOLDER, dtype=dtype or torch.float32)
