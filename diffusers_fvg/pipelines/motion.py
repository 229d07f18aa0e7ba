"""Stage 3 of a call, looked at: videos in which nothing moves are told of, and made again where the call says so."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import logging

from ..animate.motion import motion_amounts
from ..checks import MAX_COUNT, check_at_least_one
from .seeds import draw_seed


if TYPE_CHECKING:
    from .request import VideoRequest
    from .stages import FactorizedStages

logger = logging.get_logger(__name__)


class MotionOfVideos:
    """Stage 3 of a [`VideoRequest`]."""

    def _check_motion(self: VideoRequest) -> None:
        """Raises `ValueError` where the video's text is there twice, or videos cannot be looked at or drawn from other noise."""
        others = {"prompt_embeds": self.prompt_embeds is not None, "rewriter_motion": self.rewriter_motion}
        for name in (name for name, is_given in others.items() if is_given and self.motion_prompt is not None):
            raise ValueError(f"Only one of `motion_prompt` and `{name}` can be used: both give the video's text.")
        if self.motion_retries is False or self.motion_retries != 0:
            check_at_least_one("motion_retries", self.motion_retries, MAX_COUNT)
        if not self.motion_retries:
            return
        given = "`latents`, which are given" if self.latents is not None else '`output_type="latent"`'
        if self.latents is not None or self.output_type == "latent":
            raise ValueError(
                f"`motion_retries={self.motion_retries}` has no effect with {given}: it draws new noise for decoded videos that "
                "stand still. Leave one of them out."
            )

    def animate_moving(
        self: VideoRequest, pipe: FactorizedStages, seeds: list[dict[str, Any]], audio: list[Any] | None = None
    ) -> tuple[Any, list[float] | None]:
        """Makes the videos of a call. One that moves less than the preset's `min_motion` is made again, up to `motion_retries`
        times, from the same anchors with another seed, and the one that moves most is kept.

        Args:
            seeds (`list[dict]`): with each video's `"video"`, which becomes that of the one that is kept.
            audio (`list`, *optional*): gets the sound tracks of the videos that are kept.

        Returns:
            frames in the form of `output_type`, and [`~animate.motion.motion_amounts`] of them.
        """
        frames, tracks = pipe._animate(self)
        motion = None if self.output_type == "latent" else motion_amounts(frames)
        sampling = self.sampling(pipe)
        floor = pipe.own_min_motion if sampling is None else sampling.min_motion
        if motion is not None and floor is not None:
            self._keep_moving(pipe, floor, frames, motion, tracks, seeds)
        if audio is not None:
            audio.extend(tracks)
        return frames, motion

    def _keep_moving(
        self: VideoRequest,
        pipe: FactorizedStages,
        floor: float,
        frames: Any,
        motion: list[float],
        tracks: list[Any],
        seeds: list[dict[str, Any]],
    ) -> None:
        """Replaces videos that stand still by those that move more, in place, and tells of those that are left."""
        for _ in range(self.motion_retries):
            still = [video for video, amount in enumerate(motion) if amount < floor]
            if not still or pipe.interrupt:
                break
            generator = self.generator
            # Drawn from what is left of a video's generator: the same call has the same seeds.
            drawn = [draw_seed(generator[video] if isinstance(generator, list) else generator) for video in still]
            generators = [torch.Generator().manual_seed(seed) for seed in drawn]
            again, sounds = pipe._animate(self._of_videos(still, generators))
            for number, amount in enumerate(motion_amounts(again) or ()):
                video = still[number]
                if amount > motion[video]:
                    frames[video], motion[video] = again[number], amount
                    seeds[video]["video"] = drawn[number]
                    if sounds:
                        tracks[video] = sounds[number]
        for video, amount in enumerate(motion):
            if amount < floor:
                prompt = "" if self.prompt is None else f" of {self.prompt[video // self.num_videos_per_prompt]!r}"
                logger.warning(
                    f"Video {video}{prompt} hardly moves: {amount:.1%} of the picture changes, less than {floor:.1%}. If something should "
                    "move, try another seed (`motion_retries` does so), a prompt that says more of it, or a lower LoRA strength."
                )

    def _of_videos(self: VideoRequest, videos: list[int], generators: list[torch.Generator]) -> VideoRequest:
        """The request of stage 3 for some of the videos alone, each with a generator of its own."""
        prompts = [video // self.num_videos_per_prompt for video in videos]
        per_prompt: dict[str, Any] = {
            name: [value[index] for index in prompts]
            for name in ("prompt", "negative_prompt", "motion_prompt")
            if (value := getattr(self, name)) is not None
        }
        per_prompt |= {
            name: value[prompts]
            for name in ("prompt_embeds", "negative_prompt_embeds", "prompt_embeds_2", "negative_prompt_embeds_2")
            if (value := getattr(self, name)) is not None
        }
        anchors = self.anchors and [self.anchors[video] for video in videos]
        return replace(self, **per_prompt, anchors=anchors, num_videos_per_prompt=1, generator=generators)
