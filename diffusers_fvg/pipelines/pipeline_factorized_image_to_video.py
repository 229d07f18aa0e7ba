"""Factorized Video Generation (arXiv 2512.16371) with any image-to-video pipeline of diffusers as its third stage."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, Self

import PIL.Image
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import logging

from ..animate.anchor import Anchor
from ..animate.animator import AnchorAnimator, joined
from ..animate.family import fitting_size, frame_step, signature_defaults, size_multiple
from ..animate.fidelity import decode_anchored
from ..checks import Generators, check_size
from ..compose.composer import AnchorComposer
from ..compose.judge import Judge
from ..loading.arguments import HUB_ARGUMENTS
from ..loading.pipeline_component import call_arguments
from ..rewrite.rewriter import FirstFrameRewriter
from ..rewrite.storyboard import Moment, pair_storyboards
from ..schedules.presets import MIN_MOTION, SchedulerPresets
from .output import FactorizedImageToVideoPipelineOutput
from .parts import as_animator, with_optional_components
from .profiles import VIDEO_MODELS
from .request import AnchorResolver, Image, StepCallback, VideoRequest
from .seeds import anchor_seeds
from .stages import FactorizedStages


logger = logging.get_logger(__name__)


class FactorizedImageToVideoPipeline(FactorizedStages, DiffusionPipeline):
    r"""Text to video in three stages: an LLM describes the first frame, a text-to-image model draws it, an image-to-video
    pipeline of diffusers animates it. Each stage is a public method that returns plain data: [`rewrite`], [`compose`],
    [`animate`].

    With `image=`, each video equals that of the image-to-video pipeline called alone with the image. The table in
    [`~animate.families`] lists which anchors other than a first frame each family supports, and its rules for sizes, lengths
    and guidance; unsupported arguments are refused before a model runs.

    Args:
        animator (`AnchorAnimator`): stage 3; may also be an image-to-video pipeline or its name.
        rewriter (`FirstFrameRewriter`, *optional*): stage 1; not needed when `first_frame_prompt` or `image` is given.
        composer (`AnchorComposer`, *optional*): stage 2; not needed when `image` or `anchors` is given.
        anchor_judge (`AnchorJudge`, *optional*): chooses among several images of stage 2.
        schedulers (`SchedulerPresets`, *optional*): presets for `preset=`; [`AnchorAnimator.presets`] when left out.
        call_defaults (`dict`, *optional*): defaults of `height`, `width`, `num_frames`, `frame_rate`, `max_sequence_length`
            and `negative_prompt` in calls; the animator's own when left out.

    Raises:
        `ValueError`: a component does not fit.
    """

    model_cpu_offload_seq = "rewriter->anchor_judge->composer->animator"
    _optional_components = ["rewriter", "composer", "anchor_judge", "schedulers"]
    pipeline_shim = "from diffusers_fvg import FactorizedImageToVideoPipeline  # noqa: F401\n"
    # This pipeline uses no model of the table in `models.py`; without a preset, the animator uses its own scheduler.
    facts, matches_presets, own_min_motion = None, False, MIN_MOTION

    @with_optional_components
    def __init__(
        self,
        animator: AnchorAnimator,
        rewriter: FirstFrameRewriter | None,
        composer: AnchorComposer | None,
        anchor_judge: Judge | None,
        schedulers: SchedulerPresets | None,
        call_defaults: dict[str, Any] | None = None,
    ):
        super().__init__()
        parts = {"rewriter": rewriter, "composer": composer, "anchor_judge": anchor_judge, "schedulers": schedulers}
        self._add_stages({"animator": animator} | parts, call_defaults)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Self:
        """Loads a repository of this class, or of a stock image-to-video pipeline, which becomes the animator.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a folder or a Hub repository.
            kwargs: arguments of [`~diffusers.DiffusionPipeline.from_pretrained`], including components and settings of this
                class.
        """
        hub = {name: kwargs[name] for name in (*HUB_ARGUMENTS, "revision") if name in kwargs}
        if "animator" in kwargs or "animator" in cls.load_config(pretrained_model_name_or_path, **hub):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        own = {name: kwargs.pop(name) for name in (*cls._optional_components, "call_defaults") if name in kwargs}
        return cls(animator=AnchorAnimator.from_pretrained(pretrained_model_name_or_path, **kwargs), **own)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> Self:
        """Makes a pipeline from an image-to-video pipeline, or from the components of another pipeline of this class.

        Nothing is copied.

        Args:
            pipeline (`DiffusionPipeline`): becomes the animator. It can still be used, but its progress bar is switched off.
            kwargs: components and settings of this class.
        """
        if isinstance(pipeline, FactorizedStages):
            return super().from_pipe(pipeline, **kwargs)
        return cls(animator=pipeline, **kwargs)

    def _taken_over(self, name: str, component: Any) -> Any:
        return as_animator(component) if name == "animator" else super()._taken_over(name, component)

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @property
    def scheduler(self) -> SchedulerMixin:
        """Scheduler of the animator."""
        return self.animator.pipeline.scheduler

    @property
    def vae(self) -> torch.nn.Module | None:
        """VAE of the animator."""
        return getattr(self.animator.pipeline, "vae", None)

    @property
    def own_guidance_scale(self) -> float | None:  # type: ignore[override]  # Never set; `None` without guidance.
        return self.animator.guidance_scale

    @property
    def own_num_inference_steps(self) -> int:  # type: ignore[override]  # Never set.
        return self.animator.num_inference_steps

    def _experts(self) -> dict[str, torch.nn.Module]:
        return {name: self.animator.models[name] for name in VIDEO_MODELS if name in self.animator.models}

    @property
    def _callback_tensor_inputs(self) -> list[str]:
        return getattr(self.animator.pipeline, "_callback_tensor_inputs", ["latents"])

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Moves each model to the device when it runs, including each model of the animator, as in its own pipeline."""
        animator = self.animator
        self.__dict__["animator"] = None
        try:
            super().enable_model_cpu_offload(gpu_id, device)
        finally:
            self.__dict__["animator"] = animator
        animator.pipeline.enable_model_cpu_offload(device=self._offload_device)

    # -- methods that FactorizedStages requires -----------------------------------------------------------------------

    @property
    def presets(self) -> SchedulerPresets:
        return self.animator.presets if self.schedulers is None else self.schedulers

    @property
    def call_defaults(self) -> dict[str, Any]:
        # 24 is the frame rate of files for a family without its own.
        return {
            "frame_rate": 24,
            **signature_defaults(self.animator.pipeline),
            **self.animator.family.call_defaults,
            **(self.config.call_defaults or {}),
        }

    def _frame_step(self) -> int:
        return frame_step(self.animator.pipeline, self.animator.family)

    def _check_size(self, height: int, width: int) -> None:
        pipeline, family = self.animator.pipeline, self.animator.family
        for name, value in (("height", height), ("width", width)):
            check_size(name, value, size_multiple(pipeline, family))
        fitting = fitting_size(pipeline, height, width)
        if fitting != (height, width):
            raise ValueError(
                f"`height={height}`, `width={width}`: {family.name} derives its size from the image's aspect ratio; for this "
                f"ratio use `height={fitting[0]}`, `width={fitting[1]}`."
            )

    def _latents_shape(self, num_videos: int, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        # The shape depends on the family, and the call has no `latents`.
        return ()

    def _anchor_resolver(self) -> AnchorResolver:
        return partial(self.animator.family.resolve, temporal=self._frame_step())

    def _request(self, arguments: dict[str, Any]) -> VideoRequest:
        request = super()._request(arguments)
        first, others = request.generator, request.num_videos - 1
        if not isinstance(first, torch.Generator) or not others:
            return request
        # Videos are generated one at a time, and each record has its own seed: later videos get seeds derived from the first.
        seeds = anchor_seeds(first, others)
        return replace(request, generator=[first, *(torch.Generator().manual_seed(seed) for seed in seeds)])

    def _warn_unguided(self, request: VideoRequest) -> None:
        # Guidance other than `guidance_scale` may use the negative prompt.
        if not self.animator.family.unguided or (request.preset and self.presets[request.preset].weights):
            super()._warn_unguided(request)

    def _check_own(self, request: VideoRequest) -> None:
        family, pipeline = self.animator.family, self.animator.pipeline
        if request.mode == "storyboard":
            self._check_storyboard(request)
        elif request.draws_anchors and family.frames == "first and last":
            raise ValueError(
                f'{family.name} needs a first and a last frame: use `mode="storyboard"`, which draws both, or give `anchors`.'
            )
        if request.callback_on_step_end is not None and "callback_on_step_end" not in call_arguments(pipeline):
            raise ValueError(
                f"`callback_on_step_end`: {family.name} does not support it; use `callback_on_stage_step`."
            )
        direct = request.anchors is None and request.image is None and not request.draws_anchors
        arguments = self._arguments(request, request.negative_prompt)
        self.animator.check_call(arguments, request.num_frames, request.sampling(self), direct)

    def _check_storyboard(self, request: VideoRequest) -> None:
        family = self.animator.family
        if family.frames == "first":
            raise ValueError(f'{family.name} takes a first frame only and does not support `mode="storyboard"`.')
        if family.frames == "any":
            return
        if request.storyboard is None and request.num_moments > 2:
            raise ValueError(
                f"`num_moments={request.num_moments}`: {family.name} takes a first and a last frame; use 2 moments."
            )
        for moments in pair_storyboards(request.storyboard, request.num_prompts) if request.storyboard else ():
            times = [moment.time for moment in moments]
            if times not in ([0, 1], [0]):
                raise ValueError(f"{family.name} takes moments at the times 0 and 1, but `storyboard` has {times}.")

    def _write_moments(self, request: VideoRequest) -> list[list[Moment]]:
        boards = super()._write_moments(request)
        if request.mode != "storyboard" or request.storyboard is not None or self.animator.family.frames == "any":
            return boards
        for moments in boards:
            for moment in [moment for moment in moments if moment.time not in (0, 1)]:
                logger.warning(
                    f"{self.animator.family.name} takes a first and a last frame: the moment at time {moment.time} is left out."
                )
                moments.remove(moment)
        return boards

    def _moment_anchor(self, picture: PIL.Image.Image, frame: int) -> Anchor:
        return Anchor(picture, frame)

    # -- stage 3 ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def animate(
        self,
        prompts: str | list[str] | None = None,
        anchors: Anchor | list[Anchor] | list[list[Anchor]] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_scale_2: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: Generators = None,
        output_type: str = "np",
        attention_kwargs: dict[str, Any] | None = None,
        animator_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        preset: str | None = None,
        anchor_decode: str = "raw",
    ):
        """Stage 3: generates a video of each prompt that contains its anchors.

        Args:
            prompts (`str` or `list[str]`): descriptions of the videos.
            anchors (`Anchor`, `list[Anchor]` or `list[list[Anchor]]`, *optional*): one list for all videos, one per
                prompt, or one per video.

        The other arguments are those of `__call__`. Returns only the frames.
        """
        request = self._request(locals())
        with self._running():
            return self._animate(request)[0]

    def _animate(self, request: VideoRequest) -> tuple[Any, list[torch.Tensor]]:
        with self._running() as progress:
            request.check_safety(self.safety_checker)
            if self.animator.family.note:
                tell_once(f"{self.animator.family.name} {self.animator.family.note}.")
            repeats, audio = request.num_videos_per_prompt, []
            texts = [text for text in request.motion_prompt or request.prompt or () for _ in range(repeats)]
            negative = request.negative_prompt and [text for text in request.negative_prompt for _ in range(repeats)]

            def make(output_type: str):
                with progress.stage("animate") as report:
                    animation = self.animator.animate(
                        texts,
                        request.anchors or [[]] * request.num_videos,
                        request.height,
                        request.width,
                        request.num_frames,
                        request.generator,
                        negative,
                        request.sampling(self),
                        output_type,
                        self._arguments(request),
                        request.callback_on_step_end,
                        request.callback_on_step_end_tensor_inputs or (),
                        report,
                        lambda: self.interrupt,
                    )
                audio.extend(animation.audio)
                return joined(animation.frames, output_type)

            frames = decode_anchored(make, request.anchors, request.anchor_decode, request.output_type)
            return frames, audio

    def _arguments(self, request: VideoRequest, negative_prompt: list[str] | None = None) -> dict[str, Any]:
        """Returns the arguments of the animator's calls that are the same for all videos of the request."""
        names = (
            "num_inference_steps",
            "guidance_scale",
            "guidance_scale_2",
            "fps",
            "max_sequence_length",
            "attention_kwargs",
        )
        given = {name: getattr(request, name) for name in names} | {"negative_prompt": negative_prompt}
        both = sorted(
            name for name in given.keys() & (request.animator_kwargs or {}).keys() if given[name] is not None
        )
        if both:
            raise ValueError(
                f"`animator_kwargs` holds {both}, which are also given as arguments of the call; give them once."
            )
        return given | (request.animator_kwargs or {})

    # -- all of it ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_scale_2: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: Generators = None,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        animator_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        preset: str | None = None,
        mode: str = "factorized",
        first_frame_prompt: str | list[str] | None = None,
        motion_prompt: str | list[str] | None = None,
        image: Image | list[Image] | None = None,
        anchors: Anchor | list[Anchor] | list[list[Anchor]] | None = None,
        anchor_decode: str = "raw",
        storyboard: list[Moment] | list[list[Moment]] | None = None,
        num_moments: int = 2,
        rewriter_max_new_tokens: int | None = None,
        rewriter_motion: bool = False,
        composer_num_inference_steps: int | None = None,
        composer_guidance_scale: float | None = None,
        composer_negative_prompt: str | list[str] | None = None,
        composer_num_candidates: int | None = None,
        motion_retries: int = 0,
        callback_on_stage_step: Callable | None = None,
    ) -> FactorizedImageToVideoPipelineOutput | tuple:
        r"""Generates videos.

        Args:
            prompt (`str` or `list[str]`): descriptions of the videos.
            negative_prompt (`str` or `list[str]`, *optional*): for the video model.
            height, width (`int`, *optional*): in pixels, multiples of the family's number; the animator's when left out.
            num_frames (`int`, *optional*): mostly 4k + 1 or 8k + 1, by the family's rule; the animator's when left out.
            fps (`float`, *optional*): frame rate that is passed to the video model, if it has such an input.
            num_inference_steps (`int`, *optional*): steps of the video model; the preset's or animator's when left out.
            guidance_scale (`float`, *optional*): passed under the name that the family uses for guidance: `guidance_scale`,
                `true_cfg_scale`, `max_guidance_scale` or its guider.
            guidance_scale_2 (`float`, *optional*): guidance of the low-noise expert.
            num_videos_per_prompt (`int`, *optional*): each video gets its own anchor.
            generator (`torch.Generator`, its seed, or a list with one per video, *optional*): the anchor's seed is drawn from
                a copy of its state. A single generator is used for the first video; the others get seeds derived from it.
            output_type (`str`, *optional*): `"np"`, `"uint8"`, `"pt"`, `"pil"` or `"latent"` (whose shape depends on the
                family).
            return_dict (`bool`, *optional*): `False` returns a tuple in the order of the output's fields.
            attention_kwargs (`dict`, *optional*): arguments for the transformer's attention.
            animator_kwargs (`dict`, *optional*): other arguments of the animator's pipeline, under its own names.
            callback_on_step_end (`Callable`, *optional*): called after each video step, as in every diffusers pipeline, with
                the animator's pipeline as its first argument.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): names that the animator's pipeline supports.
            max_sequence_length (`int`, *optional*): largest number of text tokens of the video model.
            preset (`str`, *optional*): a name in `pipe.presets`; the animator's own scheduler when left out.
            mode (`str`, *optional*): `"factorized"`; `"direct"` for text-to-video, if the family supports it with the same
                weights; `"storyboard"` to write, draw and anchor several moments, if it supports more than a first frame.
            first_frame_prompt (`str` or `list[str]`, *optional*): captions of the first frames; skips stage 1.
            motion_prompt (`str` or `list[str]`, *optional*): texts for the video model instead of `prompt`.
            image (PIL image, array or tensor, or a list with one per prompt, *optional*): first frames; skips stages 1 and 2;
                the same as `anchors=[Anchor(image)]`.
            anchors (`Anchor` or lists of them, *optional*): given frames; skips stages 1 and 2; see [`animate`].
            anchor_decode (`str`, *optional*): `"raw"`, `"match"` or `"replace"`; see [`FactorizedVideoPipeline`].
            storyboard (`list[Moment]` or one list per prompt, *optional*): with `mode="storyboard"`, skips stage 1.
            num_moments (`int`, *optional*): with `mode="storyboard"`, the largest number of moments that stage 1 writes.
            rewriter_max_new_tokens (`int`, *optional*): token limit of stage 1's answer.
            rewriter_motion (`bool`): whether stage 1 also writes `motion_prompt`, a caption of the motion that uses the names
                in the first-frame caption.
            composer_num_inference_steps, composer_guidance_scale, composer_negative_prompt (*optional*): arguments of stage 2.
            composer_num_candidates (`int`, *optional*): largest number of images drawn for a video, from which
                `anchor_judge` chooses.
            motion_retries (`int`): how often a video with less motion than the preset's `min_motion`, or than 2 % without a
                preset, is generated again with another seed.
            callback_on_stage_step (`Callable`, *optional*): `callback(pipe, stage, step, steps)` after each step of each
                stage. Setting `pipe._interrupt = True` in either callback stops the call: the current video is decoded as it
                is, if its pipeline can be interrupted, and later videos are left out.

        Returns:
            [`FactorizedImageToVideoPipelineOutput`] or `tuple`.

        Raises:
            `ValueError`: an argument is not valid, or the animator's family does not support it; raised before any model runs.
            `FloatingPointError`: a stage gave values that are not finite.
        """
        request = self._request(locals())
        moments = images = candidates = None
        with self._running(callback_on_stage_step) as progress:
            request, seeds = request.with_generator()
            if request.draws_anchors:
                # Stage 1: a language model describes the first frame, or several moments
                moments = self._write_moments(request)
                request = self._write_motion(request, moments)
                # Stage 2: a text-to-image model draws them
                images, candidates, request = self._draw_moments(request, moments, seeds)
            # Stage 3: the image-to-video pipeline animates them
            audio: list[torch.Tensor] = []
            frames, motion = ([], None) if self.interrupt else request.animate_moving(self, seeds, audio)
            sound = {"audio": audio, "audio_sampling_rate": self.animator.audio_sampling_rate} if audio else {}
            output = FactorizedImageToVideoPipelineOutput
            made = (self, frames, moments, images, seeds, progress.timings)
            return request.output(*made, output, motion=motion, candidates=candidates, **sound)


@cache
def tell_once(message: str) -> None:
    logger.warning(message)
