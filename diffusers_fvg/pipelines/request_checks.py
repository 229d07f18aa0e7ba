"""Checks of a call's arguments before any model runs; [`VideoRequest.completed`] calls them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from types import NoneType
from typing import TYPE_CHECKING

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from ..animate.fidelity import check_anchor_decode
from ..checks import (
    MAX_COUNT,
    MAX_PROMPT_CHARACTERS,
    MAX_STEPS,
    check_at_least_one,
    check_callback,
    check_finite,
    check_generators,
    check_guidance,
    check_negative_texts,
    check_num_frames,
    check_number,
    check_scale,
    check_texts,
)
from ..models import warn_untrained
from ..rewrite.storyboard import moment_frames, pair_storyboards
from ..schedules.presets import SchedulerPreset, check_steps
from .candidates import NO_COMPOSER
from .record import boundary_ratio


if TYPE_CHECKING:
    from .request import VideoRequest
    from .stages import FactorizedStages

MODES = ("factorized", "direct", "storyboard")
EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "prompt_embeds_2", "negative_prompt_embeds_2")
OUTPUT_TYPES = ("np", "uint8", "pt", "pil", "latent")
# Largest number of pixels of all videos of a call, about 240 GB in float32 RGB. A minute of 1080 x 1920 at 24 fps has 3e9.
MAX_PIXELS = 2 * 10**10

NO_REWRITER = (
    "This pipeline has no `rewriter`, which writes the first-frame prompt: pass `first_frame_prompt=` or `image=`, use "
    '`mode="direct"`, or load a rewriter.'
)


class RequestChecks:
    """Checks of a [`VideoRequest`]: each raises `ValueError`, which names the argument, its value and the fix."""

    def _check_kinds(self: VideoRequest) -> None:
        """Checks the types of arguments, which the other checks rely on."""
        for name in ("prompt", "first_frame_prompt", "motion_prompt", "negative_prompt"):
            self._check_kind(name, (str, list, tuple), "a text or a list of texts")
        for name in ("latents", *EMBEDS):
            self._check_kind(name, torch.Tensor, "a tensor")
            value = getattr(self, name)
            if value is not None and not value.is_floating_point():
                raise ValueError(f"`{name}` must be a tensor of floating-point numbers, but is of {value.dtype}.")
        for name in ("attention_kwargs", "animator_kwargs"):
            self._check_kind(name, dict, "a dictionary")
            keys = [key for key in getattr(self, name) or () if not isinstance(key, str)]
            if keys:
                raise ValueError(f"`{name}` must have texts for keys, but has {keys[0]!r:.60}.")
        self._check_kind("preset", str, "the name of one")
        names = self.callback_on_step_end_tensor_inputs
        if isinstance(names, str) or not isinstance(names, (Sequence, NoneType)):
            raise ValueError(f"`callback_on_step_end_tensor_inputs={names!r:.60}` must be a list of names.")
        step = ("pipe", "step", "timestep", "callback_kwargs")
        if not isinstance(self.callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            check_callback("callback_on_step_end", self.callback_on_step_end, step)
        check_callback("callback_on_stage_step", self.callback_on_stage_step, ("pipe", "stage", "step", "steps"))
        for name in ("return_dict", "use_dynamic_cfg", "rewriter_motion"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}={getattr(self, name)!r:.60}` must be True or False.")
        for name in ("num_videos_per_prompt", "num_moments", "motion_retries"):
            if getattr(self, name) is None:
                raise ValueError(f"`{name}=None` must be a whole number.")

    def _check_kind(self: VideoRequest, name: str, kinds: type | tuple[type, ...], wanted: str) -> None:
        value = getattr(self, name)
        if value is not None and not isinstance(value, kinds):
            raise ValueError(f"`{name}` must be {wanted}, but is a {type(value).__name__}.")

    def _check_mode(self: VideoRequest) -> None:
        if self.mode is not None and self.mode not in MODES:
            raise ValueError(f"Unknown mode {self.mode!r}; use one of {MODES}.")
        if self.prompt is None and self.prompt_embeds is None:
            raise ValueError("Pass `prompt` or `prompt_embeds`: the video model needs a text in every mode.")
        given = [name for name in ("first_frame_prompt", "image", "anchors") if getattr(self, name) is not None]
        if self.mode in ("direct", "storyboard") and given:
            does = "uses no first frame" if self.mode == "direct" else "draws its own pictures of `storyboard`"
            raise ValueError(f'`mode="{self.mode}"` {does}, but `{given[0]}` was given; leave one of them out.')
        if self.mode != "storyboard" and self.storyboard is not None:
            raise ValueError(f'`storyboard` is for `mode="storyboard"`, not for {self.mode!r}; change one of them.')
        if len(given) > 1:
            raise ValueError(f"Only one of `first_frame_prompt`, `image` and `anchors` can be used, but got {given}.")
        if not isinstance(self.output_type, str) or self.output_type not in OUTPUT_TYPES:
            raise ValueError(f"Unknown `output_type` {self.output_type!r}; use one of {OUTPUT_TYPES}.")
        check_anchor_decode(self.anchor_decode, self.output_type)

    def _check_numbers(self: VideoRequest, pipe: FactorizedStages) -> None:
        most = {
            "num_inference_steps": MAX_STEPS,
            "composer_num_inference_steps": MAX_STEPS,
            "num_videos_per_prompt": MAX_COUNT,
            "max_sequence_length": pipe._most_tokens(),
            "num_moments": MAX_COUNT,
            # The rewriter checks its own limit.
            "rewriter_max_new_tokens": None,
        }
        for name, highest in most.items():
            check_at_least_one(name, getattr(self, name), highest)
        for name in ("guidance_scale", "guidance_scale_2", "guidance_rescale", "composer_guidance_scale"):
            check_guidance(name, getattr(self, name))
        if self.guidance_rescale is None or self.guidance_rescale > 1:
            raise ValueError(f"`guidance_rescale={self.guidance_rescale}` must lie in [0, 1]; 0 is off.")
        check_number("fps", self.fps)
        if self.fps is not None and not 0 < self.fps <= MAX_COUNT:
            raise ValueError(f"`fps={self.fps}` must be above 0 and at most {MAX_COUNT} frames per second.")
        if self.guidance_scale_2 is not None and boundary_ratio(pipe) is None:
            raise ValueError(
                f"`guidance_scale_2={self.guidance_scale_2}` is for a model with two experts, but this one has no "
                "`boundary_ratio`; leave it out."
            )
        known = pipe.attention_keys
        unknown = sorted((self.attention_kwargs or {}).keys() - known) if known else []
        if unknown:
            raise ValueError(
                f"`attention_kwargs` has the key {unknown[0]!r}, but this model supports only {', '.join(known)}; remove it."
            )
        if self.attention_kwargs and "scale" in self.attention_kwargs:
            check_scale("attention_kwargs['scale']", self.attention_kwargs["scale"])

    def _check_texts(self: VideoRequest, pipe: FactorizedStages) -> None:
        num_prompts = self.num_prompts
        for name in ("prompt", "first_frame_prompt", "motion_prompt"):
            texts = getattr(self, name)
            if texts is None:
                continue
            check_texts(name, texts)
            is_written_of = name == "prompt" and self.draws_anchors and self._written is None
            pipe._check_known(texts, writes=is_written_of)
            if len(texts) != num_prompts:
                raise ValueError(f"`{name}` has {len(texts)} texts for {num_prompts} prompts; give one for each.")
        check_negative_texts("negative_prompt", self.negative_prompt, num_prompts)
        check_negative_texts("composer_negative_prompt", self.composer_negative_prompt, self.num_videos)

    def _check_embeds(self: VideoRequest, pipe: FactorizedStages) -> None:
        for text, embeds in (("prompt", "prompt_embeds"), ("negative_prompt", "negative_prompt_embeds")):
            if getattr(self, text) is not None and getattr(self, embeds) is not None:
                raise ValueError(f"Only one of `{text}` and `{embeds}` can be used; leave one of them out.")
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            embeds = getattr(self, name)
            if embeds is None:
                continue
            width = pipe._text_width()
            fits = embeds.ndim == 3 and embeds.shape[0] == self.num_prompts and width in (None, embeds.shape[2])
            if not fits or not 1 <= embeds.shape[1] <= MAX_PROMPT_CHARACTERS:
                raise ValueError(
                    f"`{name}` has shape {tuple(embeds.shape)}, but this call needs ({self.num_prompts}, tokens, "
                    f"{width or 'width'}), of 1 to {MAX_PROMPT_CHARACTERS} tokens."
                )
        made, negative = self.prompt_embeds, self.negative_prompt_embeds
        if made is not None and negative is not None and made.shape != negative.shape:
            raise ValueError(
                f"`prompt_embeds` and `negative_prompt_embeds` must have the same shape, but have {tuple(made.shape)} and "
                f"{tuple(negative.shape)}."
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor) and field.name not in ("image", "anchors"):
                check_finite(field.name, value)

    def _check_size(self: VideoRequest, pipe: FactorizedStages) -> None:
        pipe._check_size(self.height, self.width)
        check_num_frames(self.num_frames, pipe._frame_step(), pipe._most_frames())
        pixels = self.num_videos * self.num_frames * self.height * self.width
        if pixels > MAX_PIXELS:
            raise ValueError(
                f"`num_frames={self.num_frames}` of `height={self.height}` and `width={self.width}` for {self.num_videos} videos "
                f"are {pixels:.1e} pixels, but one call supports at most {MAX_PIXELS:.1e}: use fewer or smaller videos."
            )

    def _check_stages(self: VideoRequest, pipe: FactorizedStages) -> None:
        """Checks that stages 1 and 2 have their models and inputs, and that a skipped stage has no arguments."""
        self._check_skipped()
        if not self.draws_anchors:
            return
        if self._written is None and self.prompt is None:
            raise ValueError("`prompt_embeds` cannot be rewritten: pass `prompt`, `first_frame_prompt` or `image`.")
        if self._written is None and pipe.rewriter is None:
            raise ValueError(NO_REWRITER)
        if pipe.composer is None:
            raise ValueError(NO_COMPOSER)
        pipe.composer.check_call(
            self.num_videos,
            self.composer_num_inference_steps,
            self.composer_guidance_scale,
            self.composer_negative_prompt,
            derive=self.mode == "storyboard",
        )

    def _check_skipped(self: VideoRequest) -> None:
        """Checks that no argument of a skipped stage is given."""
        if self.mode not in (None, "storyboard") and self.num_moments != type(self).num_moments:
            raise ValueError(
                f'`num_moments={self.num_moments}` is for `mode="storyboard"`, not for {self.mode!r}; leave it out.'
            )
        draws = self.draws_anchors or self.mode is None
        stages = {"composer_": draws, "rewriter_": draws and self._written is None}
        for field in fields(self):
            runs = next((runs for stage, runs in stages.items() if field.name.startswith(stage)), True)
            value = getattr(self, field.name)
            if not runs and value is not None and value is not False:
                given = ("first_frame_prompt", "storyboard", "image", "anchors")
                cause = next(
                    (f"`{name}`" for name in given if getattr(self, name) is not None), f"`mode={self.mode!r}`"
                )
                raise ValueError(
                    f"`{field.name}={value!r}` has no effect: {cause} skips its stage. Leave one of them out."
                )

    def _check_sampling(self: VideoRequest, pipe: FactorizedStages) -> None:
        preset = self.sampling(pipe)
        if preset is None:
            pipe._check_scheduler()
        check_steps(self.num_inference_steps, preset)
        # The animator's pipeline prepares its own scheduler.
        if preset is not None or self.num_inference_steps is not None and "animator" not in pipe.components:
            self._check_makes_scheduler(pipe, preset)
        if pipe.facts is not None:
            size = self.height, self.width, self.num_frames
            warn_untrained(pipe.facts, *size, preset, pipe.scheduler, pipe.presets)
        check_generators(self.generator, self.num_videos, "videos")
        names = self.callback_on_step_end_tensor_inputs or ()
        unknown = [name for name in names if name not in pipe._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {pipe._callback_tensor_inputs}, but has {unknown}."
            )

    def _check_makes_scheduler(self: VideoRequest, pipe: FactorizedStages, preset: SchedulerPreset | None) -> None:
        """Checks that the scheduler of the call can be made and supports the number of steps."""
        try:
            self.make_scheduler(pipe, torch.device("cpu"))
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            of = f"`scheduler`, a {type(pipe.scheduler).__name__}," if preset is None else f"Preset {preset.name!r}"
            raise ValueError(f"{of} cannot be used for {self.steps(pipe)} steps: {str(error)[:200]}") from error

    def _check_latents(self: VideoRequest, pipe: FactorizedStages) -> None:
        expected = pipe._latents_shape(self.num_videos, self.num_frames, self.height, self.width)
        if self.latents is not None and tuple(self.latents.shape) != expected:
            raise ValueError(f"`latents` has shape {tuple(self.latents.shape)}, but this call needs {expected}.")
        self._check_motion()

    def _check_moments(self: VideoRequest, pipe: FactorizedStages) -> None:
        if self.mode != "storyboard":
            return
        if self.storyboard is not None:
            times = [
                [moment.time for moment in board] for board in pair_storyboards(self.storyboard, self.num_prompts)
            ]
        elif self.num_moments < 2:
            raise ValueError(f'`num_moments={self.num_moments}` must be at least 2 with `mode="storyboard"`.')
        elif self.num_moments > 1 + (self.num_frames - 1) // pipe._frame_step():
            check_at_least_one("num_moments", self.num_moments, 1 + (self.num_frames - 1) // pipe._frame_step())
        else:
            # Evenly spaced moments have the largest distances, so any moments fit if these do.
            times = [[number / (self.num_moments - 1) for number in range(self.num_moments)]]
        for video in times:
            moment_frames(video, self.num_frames, pipe._frame_step())
