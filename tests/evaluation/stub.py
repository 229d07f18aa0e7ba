"""A pipeline whose tiny videos depend on the seed only, for tests of the code around it."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffusers_fvg.pipelines.output import FactorizedVideoPipelineOutput


@dataclass
class StubPipeline:
    """Records each video in a file, and fails for prompts that say so."""

    calls: Path | None = None
    seconds: float = 0.0
    call_defaults = {"frame_rate": 8.0, "num_frames": 2}

    def __call__(self, prompt, generator, mode, **arguments):
        seed = generator.initial_seed()
        if "impossible" in prompt:
            raise ValueError(f"{prompt!r} cannot be shown")
        time.sleep(self.seconds)
        if self.calls is not None:
            with open(self.calls, "a") as file:
                file.write(f"{seed}\n")
        frames = np.random.default_rng(seed).integers(0, 256, (1, 2, 384, 16, 3), dtype=np.uint8)
        record = {"prompt": prompt, "first_frame_prompt": None, "num_frames": 2, "seeds": {"video": seed}}
        empty = dict.fromkeys(("first_frame_prompts", "anchor_images", "storyboards"))
        return FactorizedVideoPipelineOutput(frames, seeds=[record["seeds"]], timings={}, records=[record], **empty)


@dataclass(frozen=True)
class StubLoad:
    calls: Path | None = None
    seconds: float = 0.0

    def __call__(self, parts: Collection[str], device: str | None = None) -> StubPipeline:
        return StubPipeline(self.calls, self.seconds)
