"""Code that the pipelines of all base models share: stages 1 and 2, presets, and the start and end of a call.

Each pipeline defines its own stage 3. It lists `FactorizedStages` before its stock class among the bases, defines the abstract
methods and attributes, and calls [`FactorizedParts._add_stages`] at the end of its `__init__`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import Any

import PIL.Image
import torch
from diffusers.utils import logging

from ..animate.anchor import Anchor, decoded_anchors, picture_tensor
from ..checks import MAX_PROMPT_CHARACTERS, Generators, as_generators, check_generators, check_texts
from ..compose.candidates import AnchorCandidate, best_candidate
from ..loading.pipeline_component import PipelineComponent
from ..locks import exclusive, lockable
from ..lora.anchor_lora import ADAPTER_NAME
from ..lora.scales import AdapterScales
from ..models import ModelFacts, match_model, model_presets
from ..rewrite.storyboard import Moment, moment_frames
from ..schedules.presets import SchedulerPresets
from .candidates import NO_COMPOSER, candidate_count, compose_candidates
from .components import FactorizedParts
from .progress import StageProgress
from .request import AnchorResolver, VideoRequest
from .request_checks import MODES, NO_REWRITER
from .seeds import anchor_seeds, caption_seeds


logger = logging.get_logger(__name__)


class FactorizedStages(FactorizedParts, ABC):
    """Base class of the pipelines: stages 1 and 2 and the start and end of a call. Subclasses define stage 3, [`_animate`].

    `safety_checker` may be set to a function that is called with each anchor (an RGB PIL image) before its video is generated.
    It returns `True`, or the reason as text, for an image that must not be animated. `prompt_check(text, writes)` may be set
    for a small model with a limited vocabulary: it warns of unknown words, or raises `ValueError`; `writes` says whether stage
    1 will write a caption from the text. Neither is a component, and neither is saved.
    """

    safety_checker: Callable[[PIL.Image.Image], bool | str | None] | None = None
    prompt_check: Callable[[str, bool], None] | None = None
    default_presets: SchedulerPresets
    # Used with a scheduler that matches no preset.
    own_guidance_scale: float
    own_num_inference_steps = 50
    own_min_motion: float | None = None
    matches_presets = True
    default_call: dict[str, Any]

    # -- setup of a call ----------------------------------------------------------------------------------------------

    @property
    def facts(self) -> ModelFacts | None:
        """Published facts of the pipeline's model; `None` if `models.MODELS` does not list it."""
        return match_model(self.transformer.config, self.config.get("boundary_ratio"))

    @property
    def presets(self) -> SchedulerPresets:
        """Presets of this pipeline, the default first: those of its repository, or else of its model."""
        if self.schedulers is not None:
            return self.schedulers
        return self.default_presets if self.facts is None else model_presets(self.facts)

    @property
    def call_defaults(self) -> dict[str, Any]:
        of_model = {} if self.facts is None else self.facts.call_defaults
        return self.default_call | of_model | (self.config.call_defaults or {})

    @property
    def _execution_device(self) -> torch.device:
        """Device of the models' inputs, found once for a run: diffusers asks each module of each component for its hooks."""
        progress = self.__dict__.get("_progress")
        if progress is None:
            return super()._execution_device
        if progress.device is None:
            progress.device = super()._execution_device if progress.has_hooks else self.device
        return progress.device

    @contextmanager
    def _running(self, callback: Callable | None = None) -> Iterator[StageProgress]:
        """Starts a run, or joins the current one, so that `__call__` can use the public methods of the stages.

        Raises:
            `RuntimeError`: the pipeline is already running, in another thread or in a stage whose callback calls it again.
        """
        progress = StageProgress(self, callback)
        # `setdefault` is atomic: if two threads start at once, one finds the run of the other.
        running = self.__dict__.setdefault("_progress", progress)
        if running is not progress:
            if not running.may_continue:
                raise RuntimeError(
                    f"This {type(self).__name__} is already running, and a pipeline runs one call at a time. Wait for it, or "
                    "make another pipeline from the same components, which shares their weights."
                )
            yield running
            return
        try:
            self._interrupt = False
            parts = self._parts_of_a_run()
            progress.has_hooks = bool(parts)
            with exclusive(*parts):
                try:
                    yield progress
                finally:
                    self.maybe_free_model_hooks()
        finally:
            del self.__dict__["_progress"]
            progress.close()

    def _parts_of_a_run(self) -> list[Any]:
        """Returns the components to lock for a whole run.

        These are all of them if hooks keep state between forwards (offload, layerwise casting, step caches). Otherwise the list
        is empty, and each component is locked only while it works.
        """
        # A component without weights, in a process that runs another stage, has no pipeline.
        within = [
            part.pipeline
            for part in self.components.values()
            if isinstance(part, PipelineComponent) and hasattr(part, "pipeline")
        ]
        parts = [part for pipeline in (self, *within) for part in pipeline.components.values()]
        parts += [] if self.rewriter is None else [self.rewriter.model, self.rewriter.tokenizer]
        # The list must be complete: threads that lock more components while they hold some could deadlock.
        parts = lockable(parts)
        modules = (module for part in parts if isinstance(part, torch.nn.Module) for module in part.modules())
        return parts if any(map(_is_hooked, modules)) else []

    def _adapter_scales(self, attention_kwargs: dict[str, Any] | None, anchored: bool) -> dict[str, AdapterScales]:
        """Returns the adapter strengths of each expert in a call. Without anchors, the anchor LoRA is off."""
        scale, off = (attention_kwargs or {}).get("scale", 1.0), () if anchored else (ADAPTER_NAME,)
        experts = {name: getattr(expert, "_orig_mod", expert) for name, expert in self._experts().items()}
        return {name: AdapterScales(expert, scale, off) for name, expert in experts.items()}

    def _check_known(self, texts: Sequence[str], writes: bool = False) -> None:
        """Calls `prompt_check`, if set, for each text; `writes` says whether stage 1 will write captions from them."""
        if self.prompt_check is not None:
            for text in texts:
                self.prompt_check(text, writes)

    def _request(self, arguments: dict[str, Any]) -> VideoRequest:
        """Makes the request of a call from the `locals()` of `__call__` or [`animate`]; raises `ValueError` for bad input."""
        arguments = {"prompt": arguments.get("prompts")} | arguments
        if "mode" in arguments and arguments["mode"] is None:
            raise ValueError(f"`mode=None` is not valid; use one of {MODES}, or call `animate` to run only stage 3.")
        names = {field.name for field in fields(VideoRequest)}
        given = VideoRequest(**{name: value for name, value in arguments.items() if name in names})
        request = given.completed(self)
        if given.negative_prompt or given.negative_prompt_embeds is not None:
            self._warn_unguided(request)
        return request

    def _warn_unguided(self, request: VideoRequest) -> None:
        """Warns of a negative prompt that has no effect because guidance is off."""
        scales = [scale for scale in request.guidance(self) if scale is not None]
        if scales and max(scales) <= 1:
            logger.warning(
                f"`negative_prompt` has no effect with `guidance_scale={scales[0]:g}`, which switches guidance off. Set "
                "`guidance_scale` above 1, or leave `negative_prompt` out."
            )

    # -- defined by each model ----------------------------------------------------------------------------------------

    @abstractmethod
    def _frame_step(self) -> int:
        """Returns the step of lengths: videos have `step * k + 1` frames."""

    @abstractmethod
    def _check_size(self, height: int, width: int) -> None:
        """Raises `ValueError` for a size that the model does not support."""

    @abstractmethod
    def _latents_shape(self, num_videos: int, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """Returns the shape of `latents` for a call."""

    @abstractmethod
    def _anchor_resolver(self) -> AnchorResolver:
        """Returns `resolve(anchors, num_frames)`, which checks the anchors of a video and returns the latent frames of each."""

    def _most_frames(self) -> int | None:
        """Returns the largest number of frames that the model supports; `None` if it is not known."""
        return None

    def _most_tokens(self) -> int:
        """Returns the largest allowed `max_sequence_length`, in tokens."""
        tokenizer = getattr(self, "tokenizer_2", None) or getattr(self, "tokenizer", None)
        # A tokenizer without a limit has 1e30. A token has at least one character.
        limit = min(getattr(tokenizer, "model_max_length", MAX_PROMPT_CHARACTERS), MAX_PROMPT_CHARACTERS)
        return max(self.call_defaults.get("max_sequence_length") or 1, limit)

    def _text_width(self) -> int | None:
        """Returns the width of `prompt_embeds`; `None` if it is not known."""
        config = getattr(getattr(self, "transformer", None), "config", {})
        names = ("text_dim", "text_embed_dim", "cross_attention_dim")
        return next((config[name] for name in names if isinstance(config.get(name), int)), None)

    def _check_scheduler(self) -> None:
        """Raises `ValueError` if the user's scheduler does not fit the model. The default checks nothing."""
        return

    def _check_own(self, request: VideoRequest) -> None:
        """Raises `ValueError` for arguments that only this model has or refuses. The default checks nothing."""
        return

    @abstractmethod
    def _animate(self, request: VideoRequest) -> tuple[Any, list[torch.Tensor]]:
        """Runs stage 3 and returns frames in the format of `request.output_type`, and sound tracks if the model makes any."""

    # -- stages 1 and 2 -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rewrite(self, prompts: str | list[str], max_new_tokens: int | None = None) -> list[str]:
        """Stage 1: writes a caption of the first frame for each prompt.

        Args:
            prompts (`str` or `list[str]`): descriptions of the videos.
            max_new_tokens (`int`, *optional*): token limit of the answer; the rewriter's default when left out.

        Returns:
            `list[str]`: one caption per prompt.
        """
        return self._ask_rewriter("rewrite", "rewrite", prompts, max_new_tokens=max_new_tokens)

    @torch.no_grad()
    def describe_motion(
        self,
        prompts: str | list[str],
        max_new_tokens: int | None = None,
        first_frame_prompts: str | list[str] | None = None,
    ) -> list[str]:
        """Stage 1, second output: writes a short caption of the motion for each prompt.

        Args:
            prompts (`str` or `list[str]`): descriptions of the videos.
            max_new_tokens (`int`, *optional*): token limit of the answer; the rewriter's default when left out.
            first_frame_prompts (`str` or `list[str]`, *optional*): captions of the first frames; the motion captions use
                their names of objects.

        Returns:
            `list[str]`: one caption per prompt.
        """
        captions = [first_frame_prompts] if isinstance(first_frame_prompts, str) else first_frame_prompts
        if captions is not None:
            check_texts("first_frame_prompts", captions)
            count = 1 if isinstance(prompts, str) else len(prompts)
            if len(captions) != count:
                raise ValueError(f"`first_frame_prompts` has {len(captions)} texts for {count} prompts; give {count}.")
        options = {"max_new_tokens": max_new_tokens, "captions": captions}
        return self._ask_rewriter("describe_motion", "describe_motion", prompts, **options)

    def _ask_rewriter(self, method: str, stage: str, prompts: str | list[str], **options) -> list:
        if self.rewriter is None:
            raise ValueError(NO_REWRITER)
        prompts = [prompts] if isinstance(prompts, str) else prompts
        check_texts("prompts", prompts)
        with self._running() as progress, progress.stage(stage) as report:
            ask = getattr(self.rewriter, method)
            self._check_known(prompts, writes=True)
            return ask(prompts, on_progress=report, should_stop=lambda: self.interrupt, **options)

    @torch.no_grad()
    def storyboard(
        self, prompts: str | list[str], num_moments: int = 2, max_new_tokens: int | None = None
    ) -> list[list[Moment]]:
        """Stage 1 of `mode="storyboard"`: writes captions of the first frame and of later moments for each prompt.

        Args:
            prompts (`str` or `list[str]`): descriptions of the videos.
            num_moments (`int`, *optional*): largest number of moments, at least 2. There are fewer if the prompt does not
                say what is seen later, or if nothing visible changes.
            max_new_tokens (`int`, *optional*): token limit of the answer; the rewriter's default for each moment when left
                out.

        Returns:
            `list[list[Moment]]`: the moments of each prompt in the order of time, the first at time 0.
        """
        options = {"num_moments": num_moments, "max_new_tokens": max_new_tokens}
        return self._ask_rewriter("storyboard", "rewrite", prompts, **options)

    @torch.no_grad()
    def compose(
        self,
        first_frame_prompts: str | list[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        generator: Generators = None,
        num_candidates: int | None = None,
    ) -> list[PIL.Image.Image]:
        """Stage 2: draws the anchor image of each caption.

        Args:
            first_frame_prompts (`str` or `list[str]`): captions of first frames.
            height, width (`int`, *optional*): size of the video in pixels; the model's default when left out.
            num_inference_steps, guidance_scale, negative_prompt (*optional*): arguments of the text-to-image pipeline; the
                composer's defaults when left out.
            generator (`torch.Generator`, its seed, or a list with one per caption, *optional*): for reproducible images.
            num_candidates (`int`, *optional*): largest number of images drawn for each caption, of which the best by
                `anchor_judge` is kept; the pipeline's default when left out, 1 without a judge.

        Returns:
            `list[PIL.Image.Image]`: one image of `height` x `width` per caption.
        """
        captions = [first_frame_prompts] if isinstance(first_frame_prompts, str) else first_frame_prompts
        check_texts("first_frame_prompts", captions)
        self._check_known(captions)
        generator = as_generators(generator)
        self._check_drawing(len(captions), height, width, num_inference_steps, guidance_scale, negative_prompt)
        captions, count = list(captions), candidate_count(self, num_candidates)
        check_generators(generator, len(captions), "captions")
        if count == 1:
            return self._draw(
                None, captions, height, width, num_inference_steps, guidance_scale, negative_prompt, generator
            )
        seeds = caption_seeds(generator, len(captions))
        found = compose_candidates(
            self,
            captions,
            None,
            seeds,
            count,
            height,
            width,
            num_inference_steps,
            guidance_scale,
            negative_prompt,
        )
        return [best_candidate(candidates).image for candidates in found if candidates]

    @torch.no_grad()
    def derive(
        self,
        images: PIL.Image.Image | list[PIL.Image.Image],
        captions: str | list[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        generator: Generators = None,
    ) -> list[PIL.Image.Image]:
        """Stage 2 of `mode="storyboard"`: draws later moments of scenes that [`compose`] has drawn.

        The composer draws from the image with an image-to-image pipeline of its family, or by shared noise; see
        [`AnchorComposer.derive`].

        Args:
            images (`PIL.Image.Image` or a list with one per caption): images of the first moments.
            captions (`str` or `list[str]`): captions of the later moments.
            generator (`torch.Generator`, its seed, or a list with one per caption, *optional*): with the seeds that drew
                `images`.

        The other arguments and the return value are those of [`compose`].
        """
        captions = [captions] if isinstance(captions, str) else captions
        check_texts("captions", captions)
        images = list(images) if isinstance(images, (list, tuple)) else [images] * len(captions)
        # Invalid images are refused before any image is drawn.
        for image in images:
            picture_tensor(image)
        options = (num_inference_steps, guidance_scale, negative_prompt)
        self._check_drawing(len(captions), height, width, *options)
        return self._draw(images, list(captions), height, width, *options, as_generators(generator))

    def _check_drawing(self, num_captions: int, height: int | None, width: int | None, *options: Any) -> None:
        """Raises `ValueError` for arguments that stage 2 does not support; `options` are arguments of the composer's call."""
        if self.composer is None:
            raise ValueError(NO_COMPOSER)
        given = {"height": height, "width": width}
        size = [self.call_defaults[name] if value is None else value for name, value in given.items()]
        self._check_size(*size)
        self.composer.check_call(num_captions, *options)

    def _draw(
        self,
        images: list[PIL.Image.Image] | None,
        captions: list[str],
        height: int | None,
        width: int | None,
        num_inference_steps: int | None,
        guidance_scale: float | None,
        negative_prompt: str | list[str] | None,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> list[PIL.Image.Image]:
        """Runs stage 2, from captions alone or from images of the same scenes."""
        height = self.call_defaults["height"] if height is None else height
        width = self.call_defaults["width"] if width is None else width
        check_generators(generator, len(captions), "captions")
        draw = self.composer.compose if images is None else partial(self.composer.derive, images)
        with self._running() as progress, progress.stage("compose" if images is None else "derive") as report:
            return draw(
                captions,
                height=height,
                width=width,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                negative_prompt=negative_prompt,
                generator=generator,
                on_progress=report,
                should_stop=lambda: self.interrupt,
            )

    # -- the parts of a call ------------------------------------------------------------------------------------------

    def _write_moments(self, request: VideoRequest) -> list[list[Moment]]:
        """Runs stage 1 and returns the moments of each prompt: without a storyboard, only the first frame."""
        if request.storyboard is not None:
            return request.storyboard
        if request.mode == "storyboard":
            return self.storyboard(request.prompt, request.num_moments, request.rewriter_max_new_tokens)
        captions = request.first_frame_prompt
        if captions is not None:
            return [[Moment(caption, 0.0)] for caption in captions]
        limit = request.rewriter_max_new_tokens
        outcomes = self._ask_rewriter("rewrite_outcomes", "rewrite", request.prompt or [], max_new_tokens=limit)
        return [[Moment(outcome.made, 0.0, outcome)] for outcome in outcomes]

    def _writes_motion(self, request: VideoRequest) -> bool:
        """Returns whether stage 1 also writes the text of the video model."""
        return request.rewriter_motion

    def _write_motion(self, request: VideoRequest, moments: list[list[Moment]]) -> VideoRequest:
        """Runs the second output of stage 1 if requested, and returns the request with the captions of the motion."""
        if self.interrupt or not self._writes_motion(request):
            return request
        captions = [first.caption for first, *_ in moments]
        motion = self.describe_motion(request.prompt, request.rewriter_max_new_tokens, captions)
        return replace(request, motion_prompt=motion)

    def _draw_moments(
        self, request: VideoRequest, moments: list[list[Moment]], seeds: list[dict[str, Any]]
    ) -> tuple[list[list[PIL.Image.Image]] | None, list[list[AnchorCandidate]] | None, VideoRequest]:
        """Runs stage 2. Returns the images of each video's moments, the candidates for the first one, and the request with
        the images as anchors. Sets `"anchor"` in `seeds`."""
        if self.interrupt:
            return None, None, request
        videos = [chosen for chosen in moments for _ in range(request.num_videos_per_prompt)]
        step = self._frame_step()
        frames = [moment_frames([moment.time for moment in video], request.num_frames, step) for video in videos]
        for seed, anchor_seed in zip(seeds, anchor_seeds(request.generator, len(videos))):
            seed["anchor"] = anchor_seed
        pictures, candidates = request.draw_pictures(self, videos, seeds)
        anchors = [[self._moment_anchor(*pair) for pair in zip(*video)] for video in zip(pictures, frames)]
        return pictures, candidates, replace(request, anchors=decoded_anchors(anchors))

    def _moment_anchor(self, picture: PIL.Image.Image, frame: int) -> Anchor:
        """Returns the anchor of a moment. If a patch has several latent frames (CogVideoX 1.5), the image fills the patch."""
        step = self._frame_step()
        if frame == 0 or step == self.vae_scale_factor_temporal:
            return Anchor(picture, frame)
        return Anchor([picture] * step, 1 + (frame - 1) // step * step)


def _is_hooked(module: torch.nn.Module) -> bool:
    # `hasattr` is slow for an attribute that a module does not have.
    attributes = vars(module)
    return "_hf_hook" in attributes or bool(getattr(attributes.get("_diffusers_hook"), "hooks", None))
