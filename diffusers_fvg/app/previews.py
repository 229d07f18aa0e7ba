"""A preview of a video while it is denoised: what the step so far would end in, at a bounded share of the time."""

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

# Of the time of denoising, that previews may take.
SHARE = 0.03


class Previews:
    """Previews of a pipeline's videos; none of one whose loop is not this package's flow matching over Wan's latents.

    Args:
        pipe ([`FactorizedStages`]): idle. Its VAE's encoder runs once.
    """

    def __init__(self, pipe: FactorizedStages):
        self.show, self.took = None, 0.0
        if isinstance(pipe, FactorizedVideoPipeline):
            with pipe._running():
                self.show = LatentPreview(pipe.vae, _clips(pipe))

    def callback(
        self, pipe: FactorizedStages, call: dict[str, Any], take: Callable[[bytes], None]
    ) -> Callable[..., dict] | None:
        """A `callback_on_step_end` that hands over previews, animated WebP; `None` where there are none.

        The two ends of a step lie on a line that leads on to the clean video: exactly for an Euler step, nearly for other solvers
        that draw no noise. The next preview waits until the one before is no more than `SHARE` of the time since.

        Args:
            pipe ([`FactorizedStages`]): the one that makes the video.
            call (`dict`): arguments of its call.
        """
        if self.show is None:
            return None
        scheduler = VideoRequest(**call).completed(pipe).make_scheduler(pipe, torch.device("cpu"))
        if "LCM" in type(scheduler).__name__:
            # It draws new noise in every step, and so its steps end on no line.
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
                # What the step itself still computes is not the preview's time.
                torch.accelerator.synchronize(latents.device)
            start = time.monotonic()
            velocity = (latents - known) / (sigmas[step + 1] - sigmas[step])
            take(preview_webp(self.show(latents - sigmas[step + 1] * velocity), frame_rate))
            since = time.monotonic()
            self.took = since - start
            return {}

        return on_step_end


def _clips(pipe: FactorizedStages) -> torch.Tensor | None:
    """The embedded model's VAE knows coloured shapes alone."""
    if pipe.prompt_check is not check_world:
        return None
    random, temporal = np.random.default_rng(0), pipe.vae_scale_factor_temporal
    scenes = [make_scene(category, random) for category in CATEGORIES for _ in range(2)]
    clips = np.stack([render(scene.objects)[: temporal + 1] for scene in scenes])
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 255
