"""Previews a video while it is denoised: an estimate of the clean video at each step, within a small share of the time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..animate.preview import LatentPreview
from ..embedded import check_world
from ..media import preview_webp
from ..pipelines.pipeline_factorized_video import FactorizedVideoPipeline
from ..pipelines.request import VideoRequest
from ..schedules.flow import noise_levels
from ..shapes.prompts import CATEGORIES, make_scene
from ..shapes.world import render


if TYPE_CHECKING:
    from ..pipelines.stages import FactorizedStages

# Largest share of the denoising time for previews.
SHARE = 0.03


class Previews:
    """Makes previews of a pipeline's videos. Only a `FactorizedVideoPipeline`, with flow matching on Wan's latents, has previews.

    Args:
        pipe ([`FactorizedStages`]): an idle pipeline; the constructor runs its VAE's encoder once.
    """

    def __init__(self, pipe: FactorizedStages):
        self.show, self.took = None, 0.0
        if isinstance(pipe, FactorizedVideoPipeline):
            with pipe._running():
                self.show = LatentPreview(pipe.vae, _clips(pipe))

    def callback(
        self, pipe: FactorizedStages, call: dict[str, Any], take: Callable[[bytes], None]
    ) -> Callable[..., dict] | None:
        """Returns a `callback_on_step_end` that passes previews (animated WebP) to `take`, or `None` if there are none.

        The latents before and after a step lie on a line to the clean video, exactly for an Euler step and nearly for other
        solvers without noise; the preview extrapolates this line. The next preview is made when the last one is at most `SHARE`
        of the time since.

        Args:
            pipe ([`FactorizedStages`]): pipeline that makes the video.
            call (`dict`): arguments of its call.
            take (`Callable`): receives the bytes of each preview.
        """
        if self.show is None:
            return None
        scheduler = VideoRequest(**call).completed(pipe).make_scheduler(pipe, torch.device("cpu"))
        if "LCM" in type(scheduler).__name__:
            # LCM adds new noise in every step, so that its steps do not lie on a line.
            return None
        sigmas, before, since = noise_levels(scheduler), None, time.monotonic()
        frame_rate = pipe.call_defaults["frame_rate"] / pipe.vae_scale_factor_temporal

        def on_step_end(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
            nonlocal before, since
            latents, known = tensors["latents"], before
            before = latents
            if known is None or time.monotonic() - since < self.took / SHARE:
                return {}
            if latents.device.type != "cpu":
                # Waits for the step's own computation, which is not part of the preview's time.
                torch.accelerator.synchronize(latents.device)
            start = time.monotonic()
            velocity = (latents - known) / (sigmas[step + 1] - sigmas[step])
            take(preview_webp(self.show(latents - sigmas[step + 1] * velocity), frame_rate))
            since = time.monotonic()
            self.took = since - start
            return {}

        return on_step_end


def _clips(pipe: FactorizedStages) -> torch.Tensor | None:
    """Returns clips of the shapes world for the embedded model, whose VAE knows nothing else; `None` for other models."""
    if pipe.prompt_check is not check_world:
        return None
    random, temporal = np.random.default_rng(0), pipe.vae_scale_factor_temporal
    scenes = [make_scene(category, random) for category in CATEGORIES for _ in range(2)]
    clips = np.stack([render(scene.objects)[: temporal + 1] for scene in scenes])
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 255
