from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput

from ..compose.candidates import AnchorCandidate
from ..rewrite.outcome import RewriteOutcome
from ..rewrite.storyboard import Moment


@dataclass
class FactorizedVideoPipelineOutput(BaseOutput):
    """What every stage made.

    Args:
        frames (`torch.Tensor`, `np.ndarray` or `list[list[PIL.Image.Image]]`): the videos, one per prompt and
            `num_videos_per_prompt`, in the form of `output_type` (`(B, F, H, W, 3)` in [0, 1] for `"np"`). Empty when the
            run was interrupted before the video stage.
        first_frame_prompts (`list[str]` or `None`): stage 1's captions, one per prompt; `None` when stages 1 and 2 were
            skipped.
        anchor_images (`list[PIL.Image.Image]`, `list[list[PIL.Image.Image]]` or `None`): stage 2's pictures, one per video,
            or with `mode="storyboard"` a list per video with one of each moment.
        seeds (`list[dict[str, int | dict]]`): per video, `{"anchor": ..., "video": ...}` for the stages that drew random numbers.
            A dictionary stands for a generator that was used before, is not on the CPU, or was shared by several videos.
        timings (`dict[str, float]`): seconds per stage.
        storyboards (`list[list[Moment]]` or `None`): the moments of each prompt, with `mode="storyboard"`.
        records (`list[dict]`): per video, what [`replay`] makes it again from. JSON holds it, and so does a video's file:
            `write_video(..., metadata=out.records[0])`.
        rewrites (`list[RewriteOutcome | None]` or `None`): how stage 1 came to each caption: accepted, repaired or a fallback,
            with reasons; `None` for one that the caller gave, or when stages 1 and 2 were skipped.
        motion (`list[float]` or `None`): of each video, what share of the picture changes ([`~animate.motion`]); `None` for
            latents, and for videos of one frame.
        candidates (`list[list[AnchorCandidate]]` or `None`): of each video the pictures among which `anchor_judge` chose its
            first frame, in the order of drawing, with their scores, answers and seeds; `None` where there was no choice.
        motion_prompts (`list[str]` or `None`): what the video model read in place of the prompts, one for each.
    """

    frames: torch.Tensor | np.ndarray | list[list[PIL.Image.Image]]
    first_frame_prompts: list[str] | None
    anchor_images: list[PIL.Image.Image] | list[list[PIL.Image.Image]] | None
    seeds: list[dict[str, Any]]
    timings: dict[str, float]
    storyboards: list[list[Moment]] | None
    records: list[dict[str, Any]]
    rewrites: list[RewriteOutcome | None] | None = None
    motion: list[float] | None = None
    candidates: list[list[AnchorCandidate]] | None = None
    motion_prompts: list[str] | None = None


@dataclass
class FactorizedDreamerPipelineOutput(FactorizedVideoPipelineOutput):
    """What every stage made.

    Args:
        frames, first_frame_prompts, anchor_images, seeds, timings, storyboards, records, rewrites, motion, candidates: of
            [`FactorizedVideoPipelineOutput`].
        motion_prompts (`list[str]` or `None`): what the video model read, one per prompt; `None` for embeddings.
    """


@dataclass
class FactorizedImageToVideoPipelineOutput(FactorizedVideoPipelineOutput):
    """What every stage made.

    Args:
        frames, first_frame_prompts, anchor_images, seeds, timings, storyboards, records, rewrites, motion, candidates,
            motion_prompts: of [`FactorizedVideoPipelineOutput`].
        audio (`list[torch.Tensor]` or `None`): the sound track of each video, `(channels, samples)`, where the animator makes
            one: for [`~media.write_video`].
        audio_sampling_rate (`int` or `None`): samples per second.
    """

    audio: list[torch.Tensor] | None = None
    audio_sampling_rate: int | None = None
