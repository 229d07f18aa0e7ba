"""Detects videos without motion after stage 3, warns of them, and generates them again if the call asks for it."""

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
    """Stage 3 of a [`VideoRequest`], which inherits from this class."""

    def _check_motion(self: VideoRequest) -> None:
        """Checks `motion_prompt` and `motion_retries`: raises `ValueError` for a second text, or retries without effect."""
        others = {"prompt_embeds": self.prompt_embeds is not None, "rewriter_motion": self.rewriter_motion}
        for name in (name for name, is_given in others.items() if is_given and self.motion_prompt is not None):
            raise ValueError(
                f"Only one of `motion_prompt` and `{name}` can be used, as both set the text of the video model."
            )
        if self.motion_retries is False or self.motion_retries != 0:
            check_at_least_one("motion_retries", self.motion_retries, MAX_COUNT)
        if not self.motion_retries:
            return
        given = "`latents`, which are given" if self.latents is not None else '`output_type="latent"`'
        if self.latents is not None or self.output_type == "latent":
            raise ValueError(
                f"`motion_retries={self.motion_retries}` has no effect with {given}: it draws new noise for decoded videos "
                "without motion. Leave one of them out."
            )

    def animate_moving(
        self: VideoRequest, pipe: FactorizedStages, seeds: list[dict[str, Any]], audio: list[Any] | None = None
    ) -> tuple[Any, list[float] | None]:
        """Generates the videos of a call.

        A video with less motion than the preset's `min_motion` is generated again, up to `motion_retries` times, from the same
        anchors with another seed. The video with the most motion is kept.

        Args:
            pipe ([`FactorizedStages`]): the pipeline.
            seeds (`list[dict]`): seeds of each video; `"video"` is set to the seed of the kept video.
            audio (`list`, *optional*): the sound tracks of the kept videos are appended to it.

        Returns:
            `tuple`: frames in the format of `output_type`, and their [`~animate.motion.motion_amounts`].
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
        """Generates videos without motion again, replaces them in place if the new one moves more, and warns of the rest."""
        for _ in range(self.motion_retries):
            still = [video for video, amount in enumerate(motion) if amount < floor]
            if not still or pipe.interrupt:
                break
            generator = self.generator
            # Drawn from the video's generator, so that the same call has the same seeds.
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
                    f"Video {video}{prompt} hardly moves: {amount:.1%} of the picture changes, less than {floor:.1%}. If something "
                    "should move, try another seed (`motion_retries` does so), a prompt with more motion, or a lower LoRA strength."
                )

    def _of_videos(self: VideoRequest, videos: list[int], generators: list[torch.Generator]) -> VideoRequest:
        """Returns the request for stage 3 of some of the videos, each with its own generator."""
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
