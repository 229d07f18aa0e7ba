"""What one call asks for: its arguments, completed and checked once. The only place where a call's arguments are checked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import PIL.Image
import torch
from diffusers import SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from ..animate.anchor import Anchor, decoded_anchors, pair_anchors, pictures_of
from ..animate.fidelity import check_anchor_decode, check_has_anchors
from ..checks import (
    check_at_least_one,
    check_characters,
    check_finite,
    check_generators,
    check_guidance,
    check_num_frames,
    check_number,
    check_texts,
    stop_unless_finite,
)
from ..models import warn_untrained
from ..rewrite.storyboard import Moment, moment_frames, pair_storyboards
from ..schedules.presets import SchedulerPreset, check_steps
from .candidates import NO_COMPOSER, ChosenPictures, candidate_count
from .motion import MotionOfVideos
from .output import FactorizedVideoPipelineOutput
from .record import boundary_ratio, make_records
from .seeds import Seed, draw_seed, video_seeds


if TYPE_CHECKING:
    from .stages import FactorizedStages

MODES = ("factorized", "direct", "storyboard")
EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "prompt_embeds_2", "negative_prompt_embeds_2")
OUTPUT_TYPES = ("np", "uint8", "pt", "pil", "latent")

NO_REWRITER = (
    "This pipeline has no `rewriter`, which writes the first-frame prompt: pass `first_frame_prompt=` or `image=`, use "
    '`mode="direct"`, or load a rewriter.'
)

Image: TypeAlias = PIL.Image.Image | np.ndarray | torch.Tensor
StepCallback: TypeAlias = Callable | PipelineCallback | MultiPipelineCallbacks
LEFT_OUT: Any = None  # [`VideoRequest.completed`] fills in the model's own.
AnchorResolver = Callable[[Sequence[Anchor], int], list[tuple[range, Anchor]]]


@dataclass(frozen=True)
class VideoRequest(ChosenPictures, MotionOfVideos):
    """Arguments of a call of any of the pipelines, under their own names; their `__call__` says what each is.

    [`completed`] gives the request that the stages work on: texts in lists, one for each prompt; a list of anchors for each
    video, their pictures decoded; the model's own values where the call left one out; all checked. Field types are its own.
    """

    # All stages. Without a mode it is a call of stage 3 alone.
    prompt: list[str] | None = None
    mode: str | None = None
    num_videos_per_prompt: int = 1
    generator: torch.Generator | list[torch.Generator] | None = None
    callback_on_stage_step: Callable | None = None
    # Stages 1 and 2
    first_frame_prompt: list[str] | None = None
    motion_prompt: list[str] | None = None
    storyboard: list[list[Moment]] | None = None
    num_moments: int = 2
    rewriter_max_new_tokens: int | None = None
    rewriter_motion: bool = False
    composer_num_inference_steps: int | None = None
    composer_guidance_scale: float | None = None
    composer_negative_prompt: str | list[str] | None = None
    composer_num_candidates: int = LEFT_OUT
    # First frames that are given
    image: Image | list[Image] | None = None
    anchors: list[list[Anchor]] | None = None
    # Stage 3
    negative_prompt: list[str] | None = None
    height: int = LEFT_OUT
    width: int = LEFT_OUT
    num_frames: int = LEFT_OUT
    fps: float | None = None
    preset: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    guidance_rescale: float = 0.7
    use_dynamic_cfg: bool = False
    latents: torch.Tensor | None = None
    prompt_embeds: torch.Tensor | None = None
    negative_prompt_embeds: torch.Tensor | None = None
    prompt_embeds_2: torch.Tensor | None = None
    negative_prompt_embeds_2: torch.Tensor | None = None
    max_sequence_length: int = LEFT_OUT
    attention_kwargs: dict[str, Any] | None = None
    animator_kwargs: dict[str, Any] | None = None
    callback_on_step_end: StepCallback | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)
    output_type: str = "np"
    anchor_decode: str = "raw"
    motion_retries: int = 0
    return_dict: bool = True

    @property
    def num_prompts(self) -> int:
        prompts: Any = self.prompt_embeds if self.prompt is None else self.prompt
        return len(prompts)

    @property
    def num_videos(self) -> int:
        return self.num_prompts * self.num_videos_per_prompt

    @property
    def draws_anchors(self) -> bool:
        """Whether stages 1 and 2 make the first frames."""
        return self.mode in ("factorized", "storyboard") and self.image is None and self.anchors is None

    @property
    def _written(self) -> list[str] | list[list[Moment]] | None:
        """What the caller wrote in place of stage 1."""
        return self.first_frame_prompt if self.storyboard is None else self.storyboard

    @property
    def is_anchored(self) -> bool:
        return self.anchors is not None and any(self.anchors)

    def sampling(self, pipe: FactorizedStages) -> SchedulerPreset | None:
        """The preset of the call; `None` when `pipe.scheduler` is the user's own."""
        if self.preset is not None:
            return pipe.presets[self.preset]
        return pipe.presets.matching(pipe.scheduler) if pipe.matches_presets else None

    def steps(self, pipe: FactorizedStages) -> int:
        """Steps of the video model."""
        sampling = self.sampling(pipe)
        return self.num_inference_steps or (
            pipe.own_num_inference_steps if sampling is None else sampling.num_inference_steps
        )

    def guidance(self, pipe: FactorizedStages) -> tuple[float, float]:
        """Guidance of the video model, and of its low-noise expert."""
        sampling, scale, scale_2 = self.sampling(pipe), self.guidance_scale, self.guidance_scale_2
        if scale is None:
            scale = pipe.own_guidance_scale if sampling is None else sampling.guidance_scale
            if scale_2 is None and sampling is not None:
                scale_2 = sampling.guidance_scale_2
        return scale, scale if scale_2 is None else scale_2

    # -- what the stages ask of it ------------------------------------------------------------------------------------

    def make_scheduler(self, pipe: FactorizedStages, device: torch.device) -> SchedulerMixin:
        """The scheduler of the call, its timesteps set: it keeps the state of a run, and the pipeline's may be shared."""
        sampling = self.sampling(pipe)
        if sampling is not None:
            return sampling.make_scheduler(self.num_inference_steps, device)
        scheduler = copy.deepcopy(pipe.scheduler)
        scheduler.set_timesteps(self.steps(pipe), device=device)
        return scheduler

    def embeds_of_videos(
        self, embeds: Sequence[torch.Tensor | None], device: torch.device, dtype: torch.dtype
    ) -> list[torch.Tensor | None]:
        """Embeddings of prompts and negative prompts as the loop takes them; those that were given are not yet one a video."""
        given, made = (self.prompt_embeds is not None, self.negative_prompt_embeds is not None), []
        for tensor, is_given in zip(embeds, given):
            if tensor is not None:
                stop_unless_finite("encode", tensor)
                tensor = tensor.to(device, dtype).repeat_interleave(
                    self.num_videos_per_prompt if is_given else 1, dim=0
                )
            made.append(tensor)
        return made

    def after_step(
        self, pipe: FactorizedStages, step: int, timestep: torch.Tensor, **tensors: torch.Tensor | None
    ) -> list[torch.Tensor | None]:
        """Calls the user's callback after a step of stage 3. Returns the tensors, with what it changed of them."""
        if self.callback_on_step_end is not None:
            given = {name: tensors[name] for name in self.callback_on_step_end_tensor_inputs or ()}
            changed = self.callback_on_step_end(pipe, step, timestep, given) or {}
            tensors |= {name: value for name, value in changed.items() if name in tensors}
        return list(tensors.values())

    def with_generator(self) -> tuple[VideoRequest, list[dict[str, Seed]]]:
        """The request with a generator, and the seed of each video's noise: to be asked before anything is drawn."""
        request = self
        if self.generator is None:
            request = replace(
                self, generator=[torch.Generator().manual_seed(draw_seed()) for _ in range(self.num_videos)]
            )
        return request, [{"video": seed} for seed in video_seeds(request.generator, self.num_videos)]

    def output(
        self,
        pipe: FactorizedStages,
        frames: Any,
        moments: list[list[Moment]] | None,
        pictures: list[list[PIL.Image.Image]] | None,
        seeds: list[dict[str, Seed]],
        timings: dict[str, float],
        output_class: type[FactorizedVideoPipelineOutput] = FactorizedVideoPipelineOutput,
        **more: Any,
    ) -> FactorizedVideoPipelineOutput | tuple:
        """What the call gives back, of what the stages made."""
        is_storyboard = self.mode == "storyboard"
        shown: Any = pictures if pictures is None or is_storyboard else [first for (first,) in pictures]
        output = output_class(
            frames=frames,
            first_frame_prompts=None if moments is None else [first.caption for first, *_ in moments],
            anchor_images=shown,
            seeds=seeds,
            timings=timings,
            storyboards=moments if is_storyboard else None,
            records=make_records(pipe, self, moments, seeds),
            rewrites=None if moments is None else [first.rewrite for first, *_ in moments],
            **{"motion_prompts": self.motion_prompt} | more,
        )
        # Last in every class, of which one adds fields of its own.
        names = sorted(output.__dataclass_fields__, key="records".__eq__)
        return output if self.return_dict else tuple(getattr(output, name) for name in names)

    def check_safety(self, safety_checker: Callable[[PIL.Image.Image], bool | str | None] | None) -> None:
        """Shows each picture to the checker once and raises `ValueError` for the first that it refuses."""
        if safety_checker is None:
            return
        shown = set()
        for video, anchors in enumerate(self.anchors or ()):
            for image in (anchor.image for anchor in anchors if id(anchor.image) not in shown):
                shown.add(id(image))
                for picture in pictures_of(image):
                    pixels = (torch.as_tensor(picture) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
                    refusal = safety_checker(PIL.Image.fromarray(pixels))
                    if refusal:
                        reason = f" ({refusal})" if isinstance(refusal, str) else ""
                        raise ValueError(
                            f"`safety_checker` refused the anchor of prompt {video // self.num_videos_per_prompt}{reason}; "
                            "no video was computed. Change the prompt or the image."
                        )

    # -- completion ---------------------------------------------------------------------------------------------------

    def completed(self, pipe: FactorizedStages) -> VideoRequest:
        """The request with the pipeline's values filled in, checked before a model runs.

        Raises:
            `ValueError`: naming the argument, its value and the fix.
        """
        self._check_kinds()
        self._check_mode()
        request = replace(self, **self._filled(pipe))
        for check in (
            request._check_numbers,
            request._check_texts,
            request._check_embeds,
            request._check_size,
            request._check_stages,
            request._check_sampling,
            request._check_latents,
            request._check_moments,
        ):
            check(pipe)
        pipe._check_own(request)
        return request._with_anchors(pipe)

    def _filled(self, pipe: FactorizedStages) -> dict[str, Any]:
        filled: dict[str, Any] = {}
        if self.draws_anchors:
            count = self.composer_num_candidates
            filled["composer_num_candidates"] = candidate_count(pipe, count, "composer_num_candidates")
        for name in ("height", "width", "num_frames", "max_sequence_length"):
            filled[name] = pipe.call_defaults.get(name) if getattr(self, name) is None else getattr(self, name)
        for name in ("prompt", "first_frame_prompt", "motion_prompt"):
            text = getattr(self, name)
            filled[name] = [text] if isinstance(text, str) else list(text) if isinstance(text, tuple) else text
        negative = self.negative_prompt
        if negative is None and self.negative_prompt_embeds is None:
            negative = pipe.call_defaults.get("negative_prompt")
        prompts = self.prompt_embeds if filled["prompt"] is None else filled["prompt"]
        if isinstance(negative, str):
            negative = [negative] * len(prompts)
        filled["negative_prompt"] = list(negative) if isinstance(negative, tuple) else negative
        if isinstance(self.callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            filled["callback_on_step_end_tensor_inputs"] = self.callback_on_step_end.tensor_inputs
        return filled

    def _with_anchors(self, pipe: FactorizedStages) -> VideoRequest:
        anchors, num_prompts = self.anchors, self.num_prompts
        if self.image is not None:
            pictures = list(self.image) if isinstance(self.image, (list, tuple)) else [self.image] * num_prompts
            if len(pictures) != num_prompts:
                raise ValueError(
                    f"`image` has {len(pictures)} pictures for {num_prompts} prompts; give one or {num_prompts}."
                )
            anchors = [[Anchor(picture)] for picture in pictures]
        if anchors is not None:
            anchors, resolve = pair_anchors(anchors, num_prompts, self.num_videos_per_prompt), pipe._anchor_resolver()
            for video_anchors in anchors:
                resolve(video_anchors, self.num_frames)
            anchors = decoded_anchors(anchors)
        if not self.draws_anchors:
            check_has_anchors(self.anchor_decode, anchors is not None and any(anchors))
        boards = None if self.storyboard is None else pair_storyboards(self.storyboard, num_prompts)
        return replace(self, anchors=anchors, image=None, storyboard=boards)

    # -- checks -------------------------------------------------------------------------------------------------------

    def _check_kinds(self) -> None:
        """Values are of the kinds that the other checks read."""
        for name in ("prompt", "first_frame_prompt", "motion_prompt", "negative_prompt"):
            self._check_kind(name, (str, list, tuple), "a text or a list of texts")
        for name in ("latents", *EMBEDS):
            self._check_kind(name, torch.Tensor, "a tensor")
            value = getattr(self, name)
            if value is not None and not value.is_floating_point():
                raise ValueError(f"`{name}` must be a tensor of floating-point numbers, but is of {value.dtype}.")
        for name in ("attention_kwargs", "animator_kwargs"):
            self._check_kind(name, dict, "a dictionary")
        self._check_kind("generator", (torch.Generator, list), "a torch.Generator or a list of them")
        members = self.generator if isinstance(self.generator, list) else []
        if not all(isinstance(member, torch.Generator) for member in members):
            raise ValueError(f"`generator` must hold torch.Generators, but is {self.generator!r}.")
        for name in ("callback_on_step_end", "callback_on_stage_step"):
            value = getattr(self, name)
            known = (PipelineCallback, MultiPipelineCallbacks)
            if not (value is None or callable(value) or isinstance(value, known)):
                raise ValueError(f"`{name}` must be a function, but is a {type(value).__name__}.")
        for name in ("num_videos_per_prompt", "num_moments", "motion_retries"):
            if getattr(self, name) is None:
                raise ValueError(f"`{name}=None` must be a whole number.")

    def _check_kind(self, name: str, kinds: type | tuple[type, ...], wanted: str) -> None:
        value = getattr(self, name)
        if value is not None and not isinstance(value, kinds):
            raise ValueError(f"`{name}` must be {wanted}, but is a {type(value).__name__}.")

    def _check_mode(self) -> None:
        if self.mode is not None and self.mode not in MODES:
            raise ValueError(f"Unknown mode {self.mode!r}; use one of {MODES}.")
        if self.prompt is None and self.prompt_embeds is None:
            raise ValueError("Provide `prompt` or `prompt_embeds`: the video model follows it in every mode.")
        given = [name for name in ("first_frame_prompt", "image", "anchors") if getattr(self, name) is not None]
        if self.mode in ("direct", "storyboard") and given:
            does = "uses no first frame" if self.mode == "direct" else "makes its own pictures of `storyboard`"
            raise ValueError(f'`mode="{self.mode}"` {does}, but `{given[0]}` was given; leave one of them out.')
        if self.mode != "storyboard" and self.storyboard is not None:
            raise ValueError(f'`storyboard` is for `mode="storyboard"`, not for {self.mode!r}; change one of them.')
        if len(given) > 1:
            raise ValueError(f"Only one of `first_frame_prompt`, `image` and `anchors` can be used, but got {given}.")
        if self.output_type not in OUTPUT_TYPES:
            raise ValueError(f"Unknown `output_type` {self.output_type!r}; use one of {OUTPUT_TYPES}.")
        check_anchor_decode(self.anchor_decode, self.output_type)

    def _check_numbers(self, pipe: FactorizedStages) -> None:
        for name in (
            "num_inference_steps",
            "num_videos_per_prompt",
            "max_sequence_length",
            "num_moments",
            "rewriter_max_new_tokens",
            "composer_num_inference_steps",
        ):
            check_at_least_one(name, getattr(self, name))
        for name in ("guidance_scale", "guidance_scale_2", "guidance_rescale", "composer_guidance_scale"):
            check_guidance(name, getattr(self, name))
        check_number("fps", self.fps)
        if self.guidance_scale_2 is not None and boundary_ratio(pipe) is None:
            raise ValueError(
                f"`guidance_scale_2={self.guidance_scale_2}` is for a model of two experts, and this one has no "
                "`boundary_ratio`; leave it out."
            )
        check_number("attention_kwargs['scale']", (self.attention_kwargs or {}).get("scale"))

    def _check_texts(self, pipe: FactorizedStages) -> None:
        num_prompts = self.num_prompts
        for name in ("prompt", "first_frame_prompt", "motion_prompt"):
            texts = getattr(self, name)
            if texts is None:
                continue
            check_texts(name, texts)
            is_written_of = name == "prompt" and self.draws_anchors and self._written is None
            pipe._check_known(texts, writes=is_written_of)
            if len(texts) != num_prompts:
                raise ValueError(f"`{name}` has {len(texts)} texts for {num_prompts} prompts.")
        negative = self.negative_prompt
        wrong = [type(text).__name__ for text in negative or () if not isinstance(text, str)]
        if wrong:
            raise ValueError(f"`negative_prompt` must hold texts, but holds {wrong[0]}.")
        check_characters("negative_prompt", negative)
        check_characters("composer_negative_prompt", self.composer_negative_prompt)
        if negative is not None and len(negative) != num_prompts:
            raise ValueError(
                f"`negative_prompt` has {len(negative)} texts for {num_prompts} prompts; give one or {num_prompts}."
            )

    def _check_embeds(self, pipe: FactorizedStages) -> None:
        for text, embeds in (("prompt", "prompt_embeds"), ("negative_prompt", "negative_prompt_embeds")):
            if getattr(self, text) is not None and getattr(self, embeds) is not None:
                raise ValueError(f"Only one of `{text}` and `{embeds}` can be used; leave one of them out.")
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            embeds = getattr(self, name)
            if embeds is not None and (embeds.ndim != 3 or embeds.shape[0] != self.num_prompts):
                raise ValueError(
                    f"`{name}` has shape {tuple(embeds.shape)}, but this call needs ({self.num_prompts}, tokens, width)."
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

    def _check_size(self, pipe: FactorizedStages) -> None:
        pipe._check_size(self.height, self.width)
        check_num_frames(self.num_frames, pipe._frame_step())

    def _check_stages(self, pipe: FactorizedStages) -> None:
        """Stages 1 and 2 can run: their models are there, and so is what they start from. Of one that does not, nothing is set."""
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

    def _check_skipped(self) -> None:
        """No argument is given of a stage that does not run."""
        if self.mode not in (None, "storyboard") and self.num_moments != VideoRequest.num_moments:
            raise ValueError(f'`num_moments={self.num_moments}` is for `mode="storyboard"`, not for {self.mode!r}.')
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

    def _check_sampling(self, pipe: FactorizedStages) -> None:
        preset = self.sampling(pipe)
        if preset is None:
            pipe._check_scheduler()
        check_steps(self.num_inference_steps, preset)
        if pipe.facts is not None:
            size = self.height, self.width, self.num_frames
            warn_untrained(pipe.facts, *size, preset, pipe.scheduler, pipe.presets)
        check_generators(self.generator, self.num_videos, "videos")
        names = self.callback_on_step_end_tensor_inputs or ()
        unknown = [name for name in names if name not in pipe._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has to be in {pipe._callback_tensor_inputs}, but found {unknown}."
            )

    def _check_latents(self, pipe: FactorizedStages) -> None:
        expected = pipe._latents_shape(self.num_videos, self.num_frames, self.height, self.width)
        if self.latents is not None and tuple(self.latents.shape) != expected:
            raise ValueError(f"`latents` has shape {tuple(self.latents.shape)}, but this call needs {expected}.")
        self._check_motion()

    def _check_moments(self, pipe: FactorizedStages) -> None:
        if self.mode != "storyboard":
            return
        if self.storyboard is not None:
            times = [
                [moment.time for moment in board] for board in pair_storyboards(self.storyboard, self.num_prompts)
            ]
        elif self.num_moments < 2:
            raise ValueError(f'`num_moments={self.num_moments}` must be at least 2 with `mode="storyboard"`.')
        else:
            # The closest that as many moments are without fail: evenly spread.
            times = [[number / (self.num_moments - 1) for number in range(self.num_moments)]]
        for video in times:
            moment_frames(video, self.num_frames, pipe._frame_step())
