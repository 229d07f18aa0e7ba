"""What the pipelines of every base model share: stages 1 and 2, checks, presets, progress, seeds, saving.

Stage 3 is the model's own. A pipeline has `FactorizedStages` before its stock class among the bases, defines what is listed
there, and calls [`FactorizedStages._add_stages`] at the end of its `__init__`.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from transformers import PreTrainedTokenizerBase

from ..animate.anchor import Anchor, pair_anchors, picture_tensor, pictures_of
from ..checks import check_at_least_one, check_finite, check_generators, check_num_frames, check_number, check_texts
from ..compose.composer import AnchorComposer
from ..loading.patches import NOT_ONNX
from ..locks import exclusive
from ..lora.anchor_lora import ADAPTER_NAME, AnchorLora
from ..lora.scales import AdapterScales
from ..models import ModelFacts, match_model, model_presets, warn_untrained
from ..publishing.push import push
from ..rewrite.rewriter import FirstFrameRewriter
from ..rewrite.storyboard import Moment, moment_frames, pair_storyboards
from ..schedules.presets import SchedulerPresets, check_steps
from .output import FactorizedVideoPipelineOutput
from .progress import StageProgress
from .saving import as_saved, forget_origins


MODES = ("factorized", "direct", "storyboard")

NO_REWRITER = (
    "This pipeline has no `rewriter`, which writes the first-frame prompt: pass `first_frame_prompt=` or `image=`, use "
    '`mode="direct"`, or load a rewriter.'
)
NO_COMPOSER = (
    "This pipeline has no `composer`, which draws the anchor: pass `image=` or `anchors=`, use "
    '`mode="direct"`, or load a composer.'
)

# Of what a call takes; its tensors are checked as well.
FINITE_NUMBERS = (
    "guidance_scale",
    "guidance_scale_2",
    "guidance_rescale",
    "fps",
    "attention_kwargs['scale']",
)

Image = PIL.Image.Image | np.ndarray | torch.Tensor
StepCallback = Callable | PipelineCallback | MultiPipelineCallbacks


class FactorizedStages:
    """Stages 1 and 2 and the frame of a call, for a pipeline whose stage 3 is `_animate(**inputs)`.

    The pipeline defines:

    * `default_presets` and `default_call`: presets, and `height`, `width`, `num_frames`, `frame_rate` and
      `max_sequence_length`, for a repository that brings none.
    * `_frame_step()`: lengths of a video are this times k, plus 1.
    * `_check_size(height, width)`, `_check_stock_inputs(prompts, inputs)`, `_check_anchors(anchors, num_frames)`: what its
      model asks for; each raises `ValueError`.
    * `_latents_shape(num_videos, inputs)`: shape of `latents` for a call.
    * `_animate(prompts, anchors, **inputs)`: stage 3, with inputs that [`_video_inputs`] has checked.

    `safety_checker` may be set to a function that is shown each anchor (an RGB PIL image) before its video is computed and
    returns `True`, or what is wrong with it as text, for one that must not be animated. It is no component and not saved.
    """

    # What `loading_patches` asks a pipeline's class, and tells our classes by.
    safetensors_only = True
    _is_onnx = NOT_ONNX
    safety_checker: Callable[[PIL.Image.Image], bool | str | None] | None = None
    default_presets: SchedulerPresets
    default_call: dict[str, Any]
    # The file that makes a saved repository load without an import of this package: see `save_pretrained`.
    pipeline_shim: str

    def _add_stages(
        self,
        rewriter: FirstFrameRewriter | None,
        composer: AnchorComposer | None,
        anchor_lora: AnchorLora | None,
        schedulers: SchedulerPresets | None,
        call_defaults: dict[str, Any] | None,
    ) -> None:
        self.register_modules(rewriter=rewriter, composer=composer, anchor_lora=anchor_lora, schedulers=schedulers)
        self.register_to_config(call_defaults=call_defaults)
        if anchor_lora is not None:
            for name, expert in self._experts().items():
                if ADAPTER_NAME not in getattr(expert, "peft_config", {}):
                    anchor_lora.load_into(expert, prefix=name)
        self._interrupt = False

    def _experts(self) -> dict[str, torch.nn.Module]:
        experts = {name: getattr(self, name, None) for name in ("transformer", "transformer_2")}
        return {name: expert for name, expert in experts.items() if expert is not None}

    # -- loading ------------------------------------------------------------------------------------------------------

    def register_modules(self, **kwargs) -> None:
        super().register_modules(**kwargs)
        self._record_own_classes(kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in getattr(self, "_internal_dict", {}):
            self._record_own_classes({name: value})

    def _record_own_classes(self, components: dict[str, Any]) -> None:
        # diffusers would record our module path, which makes a file's place a wire format and which a Hub download
        # refuses. Our classes are attributes of diffusers (see `__init__.py`), so that name is recorded instead.
        for name, component in components.items():
            if type(component).__module__.split(".")[0] == "diffusers_fvg":
                self.register_to_config(**{name: ("diffusers", type(component).__name__)})

    def save_pretrained(self, save_directory: str | os.PathLike, *args, bundle: bool = False, **kwargs) -> None:
        """Writes a repository: components with their weights, and a `pipeline.py` of one import.

        With that file `DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)` works in a
        process that has not imported this package.

        Args:
            save_directory (`str` or `os.PathLike`): the folder, made if it is not there.
            bundle (`bool`): write the weights of components that came from a light repository. Otherwise they are
                references again: bundle after changing weights of such a component.
            args, kwargs: of [`~diffusers.DiffusionPipeline.save_pretrained`], but for its `push_to_hub`: use [`push_to_hub`].
        """
        if kwargs.pop("push_to_hub", False):
            raise ValueError(
                "`push_to_hub=True` is not for `save_pretrained` here; call `pipe.push_to_hub(repository)`."
            )
        os.makedirs(save_directory, exist_ok=True)
        with open(os.path.join(save_directory, "pipeline.py"), "w") as file:
            file.write(self.pipeline_shim)
        super(FactorizedStages, as_saved(self, bundle)).save_pretrained(save_directory, *args, **kwargs)
        forget_origins(save_directory)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        variant: str | None = None,
        bundle: bool = False,
    ) -> str:
        """Saves the pipeline as [`save_pretrained`] does and uploads it with a card; see [`~diffusers_fvg.push`].

        Args:
            repo_id (`str`): repository on the Hub, made if it is not there.
            commit_message, private, token, create_pr (*optional*): of [`~diffusers_fvg.push`].
            variant, bundle (*optional*): of [`save_pretrained`].

        Returns:
            `str`: address of the commit, or of the pull request.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, variant=variant, bundle=bundle)
            return push(folder, repo_id, commit_message, private, create_pr, token)

    # -- what a call runs with ----------------------------------------------------------------------------------------

    @property
    def facts(self) -> ModelFacts | None:
        """What is published of the model that the pipeline holds; `None` for one that is not in `models.MODELS`."""
        return match_model(self.transformer.config, self.config.get("boundary_ratio"))

    @property
    def presets(self) -> SchedulerPresets:
        """Presets of this pipeline, the default first: the repository's, else the model's."""
        if self.schedulers is not None:
            return self.schedulers
        return self.default_presets if self.facts is None else model_presets(self.facts)

    @property
    def call_defaults(self) -> dict[str, Any]:
        of_model = {} if self.facts is None else self.facts.call_defaults
        return self.default_call | of_model | (self.config.call_defaults or {})

    def _default(self, name: str, value: Any) -> Any:
        return self.call_defaults.get(name) if value is None else value

    def _sampling(self, preset: str | None):
        """The preset of a call; `None` when `scheduler` is the user's own."""
        return self.presets[preset] if preset is not None else self.presets.matching(self.scheduler)

    @contextmanager
    def _running(self, callback: Callable | None = None) -> Iterator[StageProgress]:
        """Starts a run, or continues the one under way: `__call__` and a stage called by hand share their code.

        Raises:
            `RuntimeError`: the pipeline runs already, in another thread or in a stage whose callback this is.
        """
        progress = StageProgress(self, callback)
        # One look and change: of two threads that get here at once, one finds the other's.
        running = self.__dict__.setdefault("_progress", progress)
        if running is not progress:
            if not running.may_continue:
                raise RuntimeError(
                    f"This {type(self).__name__} is already running, and a pipeline makes one call at a time. Wait for it, or "
                    "make another pipeline of the same components, which shares their weights."
                )
            yield running
            return
        try:
            self._interrupt = False
            with exclusive(*self._parts_of_a_run()):
                try:
                    yield progress
                finally:
                    self.maybe_free_model_hooks()
        finally:
            del self.__dict__["_progress"]
            progress.close()

    def _parts_of_a_run(self) -> list[Any]:
        """What other pipelines leave alone during a run: all, where hooks keep state from one forward to the next (offload,
        layerwise casting, step caches); otherwise each part is taken only while it works.
        """
        pipelines = [self] if self.composer is None else [self, self.composer.pipeline]
        parts = [part for pipeline in pipelines for part in pipeline.components.values()]
        parts += [] if self.rewriter is None else [self.rewriter.model, self.rewriter.tokenizer]
        models = [part for part in parts if isinstance(part, torch.nn.Module)]
        if not any(_is_hooked(module) for model in models for module in model.modules()):
            return []
        return models + [part for part in parts if isinstance(part, PreTrainedTokenizerBase)]

    def _adapter_scales(self, attention_kwargs: dict[str, Any] | None, anchored: bool) -> dict[str, AdapterScales]:
        """Strengths of the experts' adapters in a call: without an anchor the base model is what is asked for."""
        scale, off = (attention_kwargs or {}).get("scale", 1.0), () if anchored else (ADAPTER_NAME,)
        return {name: AdapterScales(expert, scale, off) for name, expert in self._experts().items()}

    def _own_scheduler(self, num_inference_steps: int, device: torch.device):
        """The user's own scheduler for one call: a copy, since it keeps the state of a run and may be shared."""
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(num_inference_steps, device=device)
        return scheduler

    # -- checks -------------------------------------------------------------------------------------------------------

    def _video_inputs(self, prompts: list[str] | None, anchors, inputs: dict[str, Any]) -> dict[str, Any]:
        """Fills in the model's defaults and checks everything that stage 3 takes. Returns the arguments of `_animate`."""
        inputs = dict(inputs)
        for name in ("height", "width", "num_frames", "max_sequence_length"):
            inputs[name] = self._default(name, inputs[name])
        if inputs["negative_prompt_embeds"] is None:
            inputs["negative_prompt"] = self._default("negative_prompt", inputs["negative_prompt"])
        callback = inputs["callback_on_step_end"]
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            inputs["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs

        for name in ("max_sequence_length", "num_videos_per_prompt"):
            check_at_least_one(name, inputs[name])
        scale = (inputs["attention_kwargs"] or {}).get("scale")
        for name, value in {**inputs, "attention_kwargs['scale']": scale}.items():
            if name in FINITE_NUMBERS:
                check_number(name, value)
            elif isinstance(value, torch.Tensor):
                check_finite(name, value)
        self._check_size(inputs["height"], inputs["width"])
        check_num_frames(inputs["num_frames"], self._frame_step())
        if prompts is not None:
            check_texts("prompt", prompts)
        self._check_stock_inputs(prompts, inputs)
        num_prompts = len(prompts) if prompts is not None else inputs["prompt_embeds"].shape[0]
        negative_prompt = inputs["negative_prompt"]
        if isinstance(negative_prompt, list) and len(negative_prompt) != num_prompts:
            raise ValueError(
                f"`negative_prompt` has {len(negative_prompt)} texts for {num_prompts} prompts; give one or {num_prompts}."
            )
        if isinstance(negative_prompt, str):
            inputs["negative_prompt"] = [negative_prompt] * num_prompts
        preset = self._sampling(inputs["preset"])
        check_steps(inputs["num_inference_steps"], preset)
        if self.facts is not None:
            size = inputs["height"], inputs["width"], inputs["num_frames"]
            warn_untrained(self.facts, *size, preset, self.scheduler, self.presets)
        num_videos = num_prompts * inputs["num_videos_per_prompt"]
        check_generators(inputs["generator"], num_videos, "videos")
        if inputs["latents"] is not None:
            expected = self._latents_shape(num_videos, inputs)
            if tuple(inputs["latents"].shape) != expected:
                raise ValueError(
                    f"`latents` has shape {tuple(inputs['latents'].shape)}, but this call needs {expected}."
                )
        if anchors is not None:
            anchors = pair_anchors(anchors, num_prompts, inputs["num_videos_per_prompt"])
            for video_anchors in anchors:
                self._check_anchors(video_anchors, inputs["num_frames"])
                for anchor in video_anchors:
                    for picture in pictures_of(anchor.image):
                        picture_tensor(picture)
        return {"prompts": prompts, "anchors": anchors, **inputs}

    # -- stages 1 and 2 -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rewrite(self, prompts: str | list[str], max_new_tokens: int | None = None) -> list[str]:
        """Stage 1: writes a caption of the first frame for each prompt.

        Args:
            prompts (`str` or `list[str]`): what should happen in the videos.
            max_new_tokens (`int`, *optional*): limit of the answer; the rewriter's own when left out.

        Returns:
            `list[str]`: one caption per prompt.
        """
        return self._ask_rewriter("rewrite", "rewrite", prompts, max_new_tokens=max_new_tokens)

    def _ask_rewriter(self, method: str, stage: str, prompts: str | list[str], **options) -> list:
        prompts = [prompts] if isinstance(prompts, str) else prompts
        check_texts("prompts", prompts)
        if self.rewriter is None:
            raise ValueError(NO_REWRITER)
        with self._running() as progress, progress.stage(stage) as report:
            ask = getattr(self.rewriter, method)
            return ask(list(prompts), on_progress=report, should_stop=lambda: self.interrupt, **options)

    @torch.no_grad()
    def storyboard(
        self, prompts: str | list[str], num_moments: int = 2, max_new_tokens: int | None = None
    ) -> list[list[Moment]]:
        """Stage 1 of `mode="storyboard"`: writes captions of the first frame and of later moments for each prompt.

        Args:
            prompts (`str` or `list[str]`): what should happen in the videos.
            num_moments (`int`, *optional*): the most moments, at least 2. There are fewer where the prompt does not settle
                what is seen later, or where nothing changes that a picture shows.
            max_new_tokens (`int`, *optional*): limit of the answer; left out, the rewriter's own for each moment.

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
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> list[PIL.Image.Image]:
        """Stage 2: draws the anchor image of each caption.

        Args:
            first_frame_prompts (`str` or `list[str]`): captions of first frames.
            height, width (`int`, *optional*): pixels of the video.
            num_inference_steps, guidance_scale, negative_prompt (*optional*): of the text-to-image pipeline; its own
                values when left out.
            generator (`torch.Generator` or one per caption, *optional*): for reproducible pictures.

        Returns:
            `list[PIL.Image.Image]`: one picture of `height` x `width` per caption.
        """
        captions = [first_frame_prompts] if isinstance(first_frame_prompts, str) else first_frame_prompts
        check_texts("first_frame_prompts", captions)
        options = (num_inference_steps, guidance_scale, negative_prompt, generator)
        return self._draw(None, list(captions), height, width, *options)

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
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> list[PIL.Image.Image]:
        """Stage 2 of `mode="storyboard"`: draws later moments of scenes that [`compose`] has drawn.

        How depends on the composer, see [`AnchorComposer.derive`]: from the picture by an image-to-image pipeline of its
        family, or by shared noise.

        Args:
            images (`PIL.Image.Image` or a list with one per caption): first moments.
            captions (`str` or `list[str]`): of the later moments.
            generator (`torch.Generator` or one per caption, *optional*): seeded as those that drew `images`.

        The other arguments are those of [`compose`], and so is what it returns.
        """
        captions = [captions] if isinstance(captions, str) else captions
        check_texts("captions", captions)
        images = [images] * len(captions) if isinstance(images, PIL.Image.Image) else list(images)
        options = (num_inference_steps, guidance_scale, negative_prompt, generator)
        return self._draw(images, list(captions), height, width, *options)

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
        """Stage 2, from captions alone or from pictures of the same scenes."""
        height, width = self._default("height", height), self._default("width", width)
        self._check_size(height, width)
        check_generators(generator, len(captions), "captions")
        if self.composer is None:
            raise ValueError(NO_COMPOSER)
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

    def _check_safety(self, anchors: list[list[Anchor]], num_videos_per_prompt: int) -> None:
        """Shows each picture to `safety_checker` once and raises `ValueError` for the first that it refuses."""
        shown = set()
        for video, video_anchors in enumerate(anchors):
            for image in (anchor.image for anchor in video_anchors if id(anchor.image) not in shown):
                shown.add(id(image))
                for picture in pictures_of(image):
                    pixels = (picture_tensor(picture) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
                    refusal = self.safety_checker(PIL.Image.fromarray(pixels))
                    if refusal:
                        reason = f" ({refusal})" if isinstance(refusal, str) else ""
                        raise ValueError(
                            f"`safety_checker` refused the anchor of prompt {video // num_videos_per_prompt}{reason}; no "
                            "video was computed. Change the prompt or the image."
                        )

    # -- all of it ----------------------------------------------------------------------------------------------------

    def _generate(
        self,
        prompt: str | list[str] | None,
        inputs: dict[str, Any],
        mode: str,
        first_frame_prompt: str | list[str] | None,
        image: Image | list[Image] | None,
        anchors: Anchor | list[Anchor] | list[list[Anchor]] | None,
        storyboard: list[Moment] | list[list[Moment]] | None,
        num_moments: int,
        rewriter_max_new_tokens: int | None,
        composer_num_inference_steps: int | None,
        composer_guidance_scale: float | None,
        composer_negative_prompt: str | list[str] | None,
        callback_on_stage_step: Callable | None,
        return_dict: bool,
    ) -> FactorizedVideoPipelineOutput | tuple:
        """The three stages in a row: `__call__` with the arguments of stage 3, except prompts and anchors, in `inputs`."""
        # 1. Check inputs
        if mode not in MODES:
            raise ValueError(f"Unknown mode {mode!r}; use one of {MODES}.")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        captions = [first_frame_prompt] if isinstance(first_frame_prompt, str) else first_frame_prompt
        if prompts is None and inputs["prompt_embeds"] is None:
            raise ValueError("Provide `prompt` or `prompt_embeds`: the video model follows it in every mode.")
        num_prompts = len(prompts) if prompts is not None else inputs["prompt_embeds"].shape[0]
        first_frames = {"first_frame_prompt": captions, "image": image, "anchors": anchors}
        given = [name for name, value in first_frames.items() if value is not None]
        if mode != "factorized" and given:
            does = "uses no first frame" if mode == "direct" else "makes its own pictures of `storyboard`"
            raise ValueError(f'`mode="{mode}"` {does}, but `{given[0]}` was given; leave one of them out.')
        if mode != "storyboard" and storyboard is not None:
            raise ValueError(f'`storyboard` is for `mode="storyboard"`, not for {mode!r}; change one of them.')
        if len(given) > 1:
            raise ValueError(f"Only one of `first_frame_prompt`, `image` and `anchors` can be used, but got {given}.")
        if image is not None:
            pictures = list(image) if isinstance(image, (list, tuple)) else [image] * num_prompts
            if len(pictures) != num_prompts:
                raise ValueError(
                    f"`image` has {len(pictures)} pictures for {num_prompts} prompts; give one or {num_prompts}."
                )
            anchors = [[Anchor(picture)] for picture in pictures]
        for name, value in (
            ("num_moments", num_moments),
            ("rewriter_max_new_tokens", rewriter_max_new_tokens),
            ("composer_num_inference_steps", composer_num_inference_steps),
        ):
            check_at_least_one(name, value)
        check_number("composer_guidance_scale", composer_guidance_scale)
        compose = mode != "direct" and anchors is None
        boards = None if storyboard is None else pair_storyboards(storyboard, num_prompts)
        if compose:
            written = captions if boards is None else [moments[0].caption for moments in boards]
            self._check_stages(prompts, written, num_prompts)
        inputs = self._video_inputs(prompts, anchors, inputs)
        if mode == "storyboard":
            # Before there are moments, those that are evenly spread stand in for them.
            even = [Moment("unwritten", index / max(1, num_moments - 1)) for index in range(num_moments)]
            self._moment_frames(boards or [even], inputs["num_frames"])

        # 2. Settle the seeds
        num_videos = num_prompts * inputs["num_videos_per_prompt"]
        generator = inputs["generator"]
        if generator is None:
            generator = [torch.Generator().manual_seed(draw_seed()) for _ in range(num_videos)]
            inputs["generator"] = generator
        generators = generator if isinstance(generator, list) else [generator] * num_videos
        seeds = [{"video": item.initial_seed()} for item in generators]

        images = None
        with self._running(callback_on_stage_step) as progress:
            # 3. Stages 1 and 2
            if compose:
                if mode == "storyboard":
                    boards = boards or self.storyboard(prompts, num_moments, rewriter_max_new_tokens)
                    captions = [moments[0].caption for moments in boards]
                elif captions is None:
                    captions = self.rewrite(prompts, max_new_tokens=rewriter_max_new_tokens)
                moments = boards or [[Moment(caption, 0.0)] for caption in captions]
                moments = [chosen for chosen in moments for _ in range(inputs["num_videos_per_prompt"])]
                frames = self._moment_frames(moments, inputs["num_frames"])
                if not self.interrupt:
                    for seed, anchor_seed in zip(seeds, anchor_seeds(generator, num_videos)):
                        seed["anchor"] = anchor_seed
                    images = self._draw_moments(
                        moments,
                        [seed["anchor"] for seed in seeds],
                        composer_negative_prompt,
                        height=inputs["height"],
                        width=inputs["width"],
                        num_inference_steps=composer_num_inference_steps,
                        guidance_scale=composer_guidance_scale,
                    )
                    inputs["anchors"] = [
                        [self._moment_anchor(*pair) for pair in zip(*video)] for video in zip(images, frames)
                    ]
                    if mode == "factorized":
                        images = [picture for (picture,) in images]

            # 4. Stage 3
            videos = [] if self.interrupt else self._animate(**inputs)

        output = FactorizedVideoPipelineOutput(
            frames=videos,
            first_frame_prompts=captions,
            anchor_images=images,
            seeds=seeds,
            timings=progress.timings,
            storyboards=boards,
        )
        return output if return_dict else tuple(getattr(output, name) for name in output.__dataclass_fields__)

    def _moment_frames(self, boards: list[list[Moment]], num_frames: int) -> list[list[int]]:
        """Frames of the moments of each prompt; raises `ValueError` where two moments share a latent frame."""
        frames = [moment_frames(moments, num_frames) for moments in boards]
        for moments, places in zip(boards, frames):
            try:
                self._check_anchors([self._moment_anchor(None, place) for place in places], num_frames)
            except ValueError as error:
                times = [moment.time for moment in moments]
                raise ValueError(
                    f"Moments at the times {times} cannot all be anchored in {num_frames} frames ({error}) Use fewer moments "
                    "or more frames."
                ) from error
        return frames

    def _moment_anchor(self, picture: PIL.Image.Image | None, frame: int) -> Anchor:
        """The anchor of a moment: where several latents are a patch (CogVideoX 1.5), the picture stands still over it."""
        step = self._frame_step()
        if frame == 0 or step == self.vae_scale_factor_temporal:
            return Anchor(picture, frame)
        return Anchor([picture] * step, 1 + (frame - 1) // step * step)

    def _draw_moments(
        self,
        moments: list[list[Moment]],
        seeds: list[int],
        negative_prompt: str | list[str] | None,
        **options: Any,
    ) -> list[list[PIL.Image.Image]]:
        """Stage 2 of each video: the picture of its first moment, then those that are derived from it, by the same seed."""

        def inputs_of(videos: list[int]) -> dict[str, Any]:
            negative = negative_prompt
            if isinstance(negative, list) and len(negative) == len(moments):
                negative = [negative[video] for video in videos]
            generators = [torch.Generator().manual_seed(seeds[video]) for video in videos]
            return {"generator": generators, "negative_prompt": negative, **options}

        firsts = self.compose([first.caption for first, *_ in moments], **inputs_of(list(range(len(moments)))))
        pictures = [[image] for image in firsts]
        later = [(video, moment.caption) for video, (_, *rest) in enumerate(moments) for moment in rest]
        if later and not self.interrupt:
            videos, captions = map(list, zip(*later))
            derived = self.derive([firsts[video] for video in videos], captions, **inputs_of(videos))
            for video, picture in zip(videos, derived):
                pictures[video].append(picture)
        return pictures

    def _check_stages(self, prompts: list[str] | None, captions: list[str] | None, num_prompts: int) -> None:
        """Stages 1 and 2 can run: their models are there, and there is one caption or prompt for each video prompt."""
        if captions is None and prompts is None:
            raise ValueError("`prompt_embeds` cannot be rewritten: pass `prompt`, `first_frame_prompt` or `image`.")
        if captions is None and self.rewriter is None:
            raise ValueError(NO_REWRITER)
        if self.composer is None:
            raise ValueError(NO_COMPOSER)
        if captions is not None:
            check_texts("first_frame_prompt", captions)
            if len(captions) != num_prompts:
                raise ValueError(f"`first_frame_prompt` has {len(captions)} texts for {num_prompts} prompts.")


def _is_hooked(module: torch.nn.Module) -> bool:
    hooks = getattr(module, "_diffusers_hook", None)
    return hasattr(module, "_hf_hook") or (hooks is not None and bool(hooks.hooks))


def draw_seed(generator: torch.Generator | None = None) -> int:
    """A seed from the generator, or from torch's own."""
    return int(torch.randint(2**31, (1,), generator=generator, device=generator.device if generator else None))


def anchor_seeds(generator: torch.Generator | list[torch.Generator], num_videos: int) -> list[int]:
    """Seeds for the anchors from copies of the generators, whose own state stays for the video's noise."""
    if isinstance(generator, list):
        return [draw_seed(item.clone_state()) for item in generator]
    copy = generator.clone_state()
    return [draw_seed(copy) for _ in range(num_videos)]
