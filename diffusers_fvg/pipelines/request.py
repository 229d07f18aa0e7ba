"""The request of one call: its arguments, with defaults filled in and checked once by [`request_checks`]."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import PIL.Image
import torch
from diffusers import SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from ..animate.anchor import Anchor, decoded_anchors, pair_anchors, pictures_of
from ..animate.fidelity import check_has_anchors
from ..checks import Generators, as_generators, stop_unless_finite
from ..rewrite.storyboard import Moment, pair_storyboards
from ..schedules.presets import SchedulerPreset
from .candidates import ChosenPictures, candidate_count
from .motion import MotionOfVideos
from .output import FactorizedVideoPipelineOutput
from .record import make_records
from .request_checks import RequestChecks
from .seeds import Seed, draw_seed, video_seeds


if TYPE_CHECKING:
    from .stages import FactorizedStages

Image: TypeAlias = PIL.Image.Image | np.ndarray | torch.Tensor
StepCallback: TypeAlias = Callable | PipelineCallback | MultiPipelineCallbacks
LEFT_OUT: Any = None  # [`VideoRequest.completed`] fills in the model's default.
AnchorResolver = Callable[[Sequence[Anchor], int], list[tuple[range, Anchor]]]


@dataclass(frozen=True)
class VideoRequest(RequestChecks, ChosenPictures, MotionOfVideos):
    """Arguments of a call of any pipeline, under the names in `__call__`, which documents them.

    [`completed`] returns the request that the stages use: with lists of texts, one for each prompt; a list of anchors with
    decoded images for each video; and the model's defaults for arguments that were left out. All values are checked. The field
    types are those of a completed request.
    """

    # All stages. Without `mode`, the call runs only stage 3 (`animate`).
    prompt: list[str] | None = None
    mode: str | None = None
    num_videos_per_prompt: int = 1
    generator: Generators = None
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
        """Whether stages 1 and 2 run to make the first frames."""
        return self.mode in ("factorized", "storyboard") and self.image is None and self.anchors is None

    @property
    def _written(self) -> list[str] | list[list[Moment]] | None:
        """Captions that the caller passed, so that stage 1 is skipped."""
        return self.first_frame_prompt if self.storyboard is None else self.storyboard

    @property
    def is_anchored(self) -> bool:
        return self.anchors is not None and any(self.anchors)

    def sampling(self, pipe: FactorizedStages) -> SchedulerPreset | None:
        """Returns the preset of the call; `None` if `pipe.scheduler` matches no preset."""
        if self.preset is not None:
            return pipe.presets[self.preset]
        return pipe.presets.matching(pipe.scheduler) if pipe.matches_presets else None

    def steps(self, pipe: FactorizedStages) -> int:
        """Returns the number of steps of the video model."""
        sampling = self.sampling(pipe)
        return self.num_inference_steps or (
            pipe.own_num_inference_steps if sampling is None else sampling.num_inference_steps
        )

    def guidance(self, pipe: FactorizedStages) -> tuple[float, float]:
        """Returns the guidance scale of the video model, and that of its low-noise expert."""
        sampling, scale, scale_2 = self.sampling(pipe), self.guidance_scale, self.guidance_scale_2
        if scale is None:
            scale = pipe.own_guidance_scale if sampling is None else sampling.guidance_scale
            if scale_2 is None and sampling is not None:
                scale_2 = sampling.guidance_scale_2
        return scale, scale if scale_2 is None else scale_2

    # -- used by the stages -------------------------------------------------------------------------------------------

    def make_scheduler(self, pipe: FactorizedStages, device: torch.device) -> SchedulerMixin:
        """Returns a new scheduler with timesteps set: schedulers keep state, and the pipeline's may be shared."""
        sampling = self.sampling(pipe)
        if sampling is not None:
            return sampling.make_scheduler(self.num_inference_steps, device)
        scheduler = copy.deepcopy(pipe.scheduler)
        scheduler.set_timesteps(self.steps(pipe), device=device)
        return scheduler

    def embeds_of_videos(
        self, embeds: Sequence[torch.Tensor | None], device: torch.device, dtype: torch.dtype
    ) -> list[torch.Tensor | None]:
        """Returns the embeddings for each video; embeddings that the caller passed are repeated for each video."""
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
        """Calls the user's callback after a step of stage 3, and returns the tensors with its changes."""
        if self.callback_on_step_end is not None:
            given = {name: tensors[name] for name in self.callback_on_step_end_tensor_inputs or ()}
            changed = self.callback_on_step_end(pipe, step, timestep, given) or {}
            tensors |= {name: value for name, value in changed.items() if name in tensors}
        return list(tensors.values())

    def with_generator(self) -> tuple[VideoRequest, list[dict[str, Seed]]]:
        """Returns the request with a generator, and the seed of each video. Call it before anything is drawn."""
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
        """Returns the output of the call, made from the results of the stages."""
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
        # In the tuple, the fields that a subclass adds come after those of the base class, and `records` last.
        names = sorted(output.__dataclass_fields__, key="records".__eq__)
        return output if self.return_dict else tuple(getattr(output, name) for name in names)

    def check_safety(self, safety_checker: Callable[[PIL.Image.Image], bool | str | None] | None) -> None:
        """Calls the checker once for each anchor image, and raises `ValueError` for the first that it refuses."""
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
                            "no video was generated. Change the prompt or the image."
                        )

    # -- completion ---------------------------------------------------------------------------------------------------

    def completed(self, pipe: FactorizedStages) -> VideoRequest:
        """Returns the request with the pipeline's defaults, checked before any model runs.

        Raises:
            `ValueError`: names the argument, its value and the fix.
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
        filled: dict[str, Any] = {"generator": as_generators(self.generator)}
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
