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
    """Output of a pipeline: the videos, and the results of every stage.

    Args:
        frames (`torch.Tensor`, `np.ndarray` or `list[list[PIL.Image.Image]]`): the videos, `num_videos_per_prompt` for each
            prompt, in the format of `output_type` (`(B, F, H, W, 3)` in [0, 1] for `"np"`). Empty if the call was interrupted
            before stage 3.
        first_frame_prompts (`list[str]` or `None`): captions of stage 1, one per prompt; `None` if stages 1 and 2 were
            skipped.
        anchor_images (`list[PIL.Image.Image]`, `list[list[PIL.Image.Image]]` or `None`): images of stage 2, one per video,
            or with `mode="storyboard"` a list per video with one for each moment.
        seeds (`list[dict[str, int | dict]]`): per video, `{"anchor": ..., "video": ...}` for the stages that drew random
            numbers. A dictionary describes a generator that was used before, is not on the CPU, or was shared by videos.
        timings (`dict[str, float]`): seconds per stage. A stage ends when the CPU has checked its results, so this includes the
            work of the device.
        storyboards (`list[list[Moment]]` or `None`): the moments of each prompt, with `mode="storyboard"`.
        records (`list[dict]`): per video, the record from which [`replay`] generates it again. It can be saved as JSON, or in
            the video's file: `write_video(..., metadata=out.records[0])`.
        rewrites (`list[RewriteOutcome | None]` or `None`): how stage 1 made each caption: accepted, repaired or a fallback,
            with reasons; `None` for a caption of the caller, or if stages 1 and 2 were skipped.
        motion (`list[float]` or `None`): per video, the fraction of the picture that changes, in [0, 1]
            ([`~animate.motion`]); `None` for latents and for videos of one frame.
        candidates (`list[list[AnchorCandidate]]` or `None`): per video, the images from which `anchor_judge` chose the first
            frame, in the order of drawing, with scores, answers and seeds; `None` if only one image was drawn.
        motion_prompts (`list[str]` or `None`): the texts that the video model read instead of the prompts, one per prompt.
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
    """Output of a pipeline: the videos, and the results of every stage.

    Args:
        frames, first_frame_prompts, anchor_images, seeds, timings, storyboards, records, rewrites, motion, candidates: as in
            [`FactorizedVideoPipelineOutput`].
        motion_prompts (`list[str]` or `None`): the texts that the video model read, one per prompt; `None` for embeddings.
    """


@dataclass
class FactorizedImageToVideoPipelineOutput(FactorizedVideoPipelineOutput):
    """Output of a pipeline: the videos, and the results of every stage.

    Args:
        frames, first_frame_prompts, anchor_images, seeds, timings, storyboards, records, rewrites, motion, candidates,
            motion_prompts: as in [`FactorizedVideoPipelineOutput`].
        audio (`list[torch.Tensor]` or `None`): sound track `(channels, samples)` of each video, for [`~media.write_video`];
            `None` if the animator generates none.
        audio_sampling_rate (`int` or `None`): samples per second.
    """

    audio: list[torch.Tensor] | None = None
    audio_sampling_rate: int | None = None
