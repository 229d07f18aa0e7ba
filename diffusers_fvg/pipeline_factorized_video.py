"""Factorized Video Generation (arXiv 2512.16371): prompt -> first-frame prompt -> anchor image -> video."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKLWan, SchedulerMixin, WanPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import get_module_execution_device, randn_tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from .anchor import (
    Anchor,
    AnchorLatents,
    anchored_model_input,
    crop_and_resize,
    denormalize_latents,
    encode_anchor,
    picture_tensor,
    resolve_anchors,
)
from .anchor_lora import ADAPTER_NAME, AnchorLora
from .checks import (
    check_at_least_one,
    check_generators,
    check_num_frames,
    check_size,
    check_texts,
    pair_anchors,
)
from .composer import AnchorComposer
from .lora import FactorizedVideoLoraLoaderMixin
from .memory import decoder_bytes, free_bytes
from .pipeline_output import FactorizedVideoPipelineOutput
from .progress import StageProgress
from .rewriter import FirstFrameRewriter
from .schedules import WAN_PRESETS, SchedulerPreset, SchedulerPresets
from .transformer_anchor import AnchorConditionedTransformer3D


MODES = ("factorized", "direct")
# Used where neither the call nor the repository says: Wan2.2-TI2V-5B's own size and length.
WAN_CALL_DEFAULTS = {"height": 704, "width": 1280, "num_frames": 121, "frame_rate": 24, "max_sequence_length": 512}

NO_REWRITER = (
    "This pipeline has no `rewriter`, which writes the first-frame prompt: pass `first_frame_prompt=` or `image=`, use "
    '`mode="direct"`, or load a rewriter.'
)
NO_COMPOSER = (
    "This pipeline has no `composer`, which draws the anchor: pass `image=` or `anchors=`, use "
    '`mode="direct"`, or load a composer.'
)

Image = PIL.Image.Image | np.ndarray | torch.Tensor
StepCallback = Callable | PipelineCallback | MultiPipelineCallbacks


class FactorizedVideoPipeline(FactorizedVideoLoraLoaderMixin, WanPipeline):
    r"""Text to video in three stages: an LLM describes the first frame, a text-to-image model draws it, a video model
    animates it. Each stage is a public method that returns plain data: [`rewrite`], [`compose`], [`animate`].

    Text encoding, LoRA loading and the no-anchor path are those of [`~diffusers.WanPipeline`].

    Args:
        tokenizer (`PreTrainedTokenizerBase`): of the video model's text encoder.
        text_encoder (`UMT5EncoderModel`): the video model's text encoder.
        vae (`AutoencoderKLWan`): causal video VAE.
        scheduler (`SchedulerMixin`): flow-matching scheduler used when no preset is asked for.
        transformer (`AnchorConditionedTransformer3D`): video model, or its high-noise expert.
        transformer_2 (`AnchorConditionedTransformer3D`, *optional*): low-noise expert (Wan2.2-A14B).
        rewriter (`FirstFrameRewriter`, *optional*): stage 1; not needed when `first_frame_prompt` or `image` is given.
        composer (`AnchorComposer`, *optional*): stage 2; not needed when `image` or `anchors` is given.
        anchor_lora (`AnchorLora`, *optional*): loaded into the transformers as adapter `"anchor"`. It is switched off
            while there is no anchor, so that `mode="direct"` is the base model.
        schedulers (`SchedulerPresets`, *optional*): what `preset=` selects from; those of Wan when absent.
        boundary_ratio (`float`, *optional*): share of the time range below which `transformer_2` takes over.
        expand_timesteps (`bool`, *optional*): the base has a native first-frame mode (Wan2.2-TI2V-5B). Kept in the config
            for stock pipelines; per-frame times are used here whenever there is an anchor.
        call_defaults (`dict`, *optional*): `height`, `width`, `num_frames`, `frame_rate`, `max_sequence_length` and
            `negative_prompt` of the model, used where a call leaves them out.

    The optional components have no default value: with one, `DiffusionPipeline.from_pretrained(..., rewriter=None)` would
    load the component all the same.
    """

    model_cpu_offload_seq = "rewriter->composer->text_encoder->transformer->transformer_2->vae"
    _optional_components = ["transformer_2", "rewriter", "composer", "anchor_lora", "schedulers"]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: UMT5EncoderModel,
        vae: AutoencoderKLWan,
        scheduler: SchedulerMixin,
        transformer: AnchorConditionedTransformer3D,
        transformer_2: AnchorConditionedTransformer3D | None,
        rewriter: FirstFrameRewriter | None,
        composer: AnchorComposer | None,
        anchor_lora: AnchorLora | None,
        schedulers: SchedulerPresets | None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
        call_defaults: dict[str, Any] | None = None,
    ):
        if transformer is None:
            raise ValueError("`transformer` is None: the repository has no video model, which every mode needs.")
        experts = {"transformer": transformer, "transformer_2": transformer_2}
        experts = {
            name: AnchorConditionedTransformer3D.from_stock(expert)
            for name, expert in experts.items()
            if expert is not None
        }
        super().__init__(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            scheduler=scheduler,
            transformer=experts["transformer"],
            transformer_2=experts.get("transformer_2"),
            boundary_ratio=boundary_ratio,
            expand_timesteps=expand_timesteps,
        )
        self.register_modules(rewriter=rewriter, composer=composer, anchor_lora=anchor_lora, schedulers=schedulers)
        self.register_to_config(call_defaults=call_defaults)
        if anchor_lora is not None:
            for name, expert in experts.items():
                if ADAPTER_NAME not in getattr(expert, "peft_config", {}):
                    anchor_lora.load_into(expert, prefix=name)
        self._progress: StageProgress | None = None
        self._interrupt = False

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
            if type(component).__module__.split(".")[0] == __package__:
                self.register_to_config(**{name: ("diffusers", type(component).__name__)})

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Writes a bundled repository: every component with its weights, and a `pipeline.py` of one import.

        With that file `DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)` works in a
        process that has not imported this package. Arguments are those of [`~diffusers.DiffusionPipeline`].
        """
        os.makedirs(save_directory, exist_ok=True)
        with open(os.path.join(save_directory, "pipeline.py"), "w") as file:
            file.write(f"from {__package__} import {type(self).__name__}  # noqa: F401\n")
        super().save_pretrained(save_directory, *args, **kwargs)

    # -- what a call runs with ----------------------------------------------------------------------------------------

    @property
    def presets(self) -> SchedulerPresets:
        """Presets of this pipeline, the default first."""
        return self.schedulers if self.schedulers is not None else WAN_PRESETS

    @property
    def call_defaults(self) -> dict[str, Any]:
        return WAN_CALL_DEFAULTS | (self.config.call_defaults or {})

    def _default(self, name: str, value: Any) -> Any:
        return self.call_defaults.get(name) if value is None else value

    def _sampling(self, preset: str | None) -> SchedulerPreset | None:
        """The preset of a call; `None` when `scheduler` is the user's own."""
        return self.presets[preset] if preset is not None else self.presets.matching(self.scheduler)

    @contextmanager
    def _running(self, callback: Callable | None = None) -> Iterator[StageProgress]:
        """Starts a run, or joins the one under way: `__call__` and a stage called by hand share their code."""
        if self._progress is not None:
            yield self._progress
            return
        self._progress = StageProgress(self, callback)
        self._interrupt = False
        try:
            yield self._progress
        finally:
            self._progress.close()
            self._progress = None
            self.maybe_free_model_hooks()

    @contextmanager
    def _without_anchor_lora(self) -> Iterator[None]:
        """Scales the anchor LoRA to zero: without an anchor the base model is what is asked for."""
        scalings = [
            module.scaling
            for expert in (self.transformer, self.transformer_2)
            if expert is not None
            for module in expert.modules()
            if ADAPTER_NAME in getattr(module, "scaling", {})
        ]
        values = [scaling[ADAPTER_NAME] for scaling in scalings]
        for scaling in scalings:
            scaling[ADAPTER_NAME] = 0.0
        try:
            yield
        finally:
            for scaling, value in zip(scalings, values):
                scaling[ADAPTER_NAME] = value

    # -- checks -------------------------------------------------------------------------------------------------------

    def _check_size(self, height: int, width: int) -> None:
        _, patch_height, patch_width = self.transformer.config.patch_size
        check_size("height", height, self.vae_scale_factor_spatial * patch_height)
        check_size("width", width, self.vae_scale_factor_spatial * patch_width)

    def _video_inputs(self, prompts: list[str] | None, anchors, inputs: dict[str, Any]) -> dict[str, Any]:
        """Fills in the model's defaults and checks everything that stage 3 takes. Returns the arguments of [`animate`]."""
        inputs = dict(inputs)
        for name in ("height", "width", "num_frames", "max_sequence_length"):
            inputs[name] = self._default(name, inputs[name])
        if inputs["negative_prompt_embeds"] is None:
            inputs["negative_prompt"] = self._default("negative_prompt", inputs["negative_prompt"])
        callback = inputs["callback_on_step_end"]
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            inputs["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs
        height, width, num_frames = inputs["height"], inputs["width"], inputs["num_frames"]

        self._check_size(height, width)
        check_num_frames(num_frames, self.vae_scale_factor_temporal)
        if prompts is not None:
            check_texts("prompt", prompts)
        # The stock checks: embeddings against prompts, tensor names of the callback, the second guidance scale.
        self.check_inputs(
            prompts,
            inputs["negative_prompt"],
            height,
            width,
            inputs["prompt_embeds"],
            inputs["negative_prompt_embeds"],
            inputs["callback_on_step_end_tensor_inputs"],
            inputs["guidance_scale_2"],
        )
        num_prompts = len(prompts) if prompts is not None else inputs["prompt_embeds"].shape[0]
        negative_prompt = inputs["negative_prompt"]
        if isinstance(negative_prompt, list) and len(negative_prompt) != num_prompts:
            raise ValueError(
                f"`negative_prompt` has {len(negative_prompt)} texts for {num_prompts} prompts; give one or {num_prompts}."
            )
        if isinstance(negative_prompt, str):
            inputs["negative_prompt"] = [negative_prompt] * num_prompts
        check_at_least_one("num_inference_steps", inputs["num_inference_steps"])
        check_at_least_one("num_videos_per_prompt", inputs["num_videos_per_prompt"])
        num_videos = num_prompts * inputs["num_videos_per_prompt"]
        check_generators(inputs["generator"], num_videos, "videos")
        self._sampling(inputs["preset"])
        if inputs["latents"] is not None:
            expected = (
                num_videos,
                self.transformer.config.in_channels,
                (num_frames - 1) // self.vae_scale_factor_temporal + 1,
                height // self.vae_scale_factor_spatial,
                width // self.vae_scale_factor_spatial,
            )
            if tuple(inputs["latents"].shape) != expected:
                raise ValueError(
                    f"`latents` has shape {tuple(inputs['latents'].shape)}, but this call needs {expected}."
                )
        if anchors is not None:
            anchors = pair_anchors(anchors, num_prompts, inputs["num_videos_per_prompt"])
            for video_anchors in anchors:
                for _, anchor in resolve_anchors(video_anchors, num_frames, self.vae_scale_factor_temporal):
                    picture_tensor(anchor.image)
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
        prompts = [prompts] if isinstance(prompts, str) else prompts
        check_texts("prompts", prompts)
        if self.rewriter is None:
            raise ValueError(NO_REWRITER)
        with self._running() as progress, progress.stage("rewrite") as report:
            return self.rewriter.rewrite(
                list(prompts), max_new_tokens=max_new_tokens, on_progress=report, should_stop=lambda: self.interrupt
            )

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
        height, width = self._default("height", height), self._default("width", width)
        check_texts("first_frame_prompts", captions)
        self._check_size(height, width)
        check_generators(generator, len(captions), "captions")
        if self.composer is None:
            raise ValueError(NO_COMPOSER)
        with self._running() as progress, progress.stage("compose") as report:
            return self.composer.compose(
                list(captions),
                height=height,
                width=width,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                negative_prompt=negative_prompt,
                generator=generator,
                on_progress=report,
                should_stop=lambda: self.interrupt,
            )

    # -- stage 3 ------------------------------------------------------------------------------------------------------

    def encode_anchors(
        self,
        anchors: list[list[Anchor]],
        latents: torch.Tensor,
        height: int,
        width: int,
        num_frames: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> AnchorLatents:
        """Encodes the anchors of each video.

        Args:
            anchors (`list[list[Anchor]]`): one list per video.
            latents (`torch.Tensor` of shape `(B, C, f, h, w)`): gives shape, device and dtype.
            height, width, num_frames (`int`): of the video, in pixels and frames.
            generator (*optional*): draws the noise of anchors whose strength is below 1.
        """
        clean = torch.zeros_like(latents)
        strength = latents.new_zeros(latents.shape[0], latents.shape[2])
        # Videos of one prompt share their picture: each is encoded once for each position.
        encoded: dict[tuple[int, int], torch.Tensor] = {}
        for video, video_anchors in enumerate(anchors):
            for index, anchor in resolve_anchors(video_anchors, num_frames, self.vae_scale_factor_temporal):
                key = (id(anchor.image), index)
                if key not in encoded:
                    pixels = crop_and_resize(anchor.image, height, width)[None]
                    encoded[key] = encode_anchor(self.vae, pixels, index, get_module_execution_device(self.vae))
                clean[video, :, index] = encoded[key][0, :, 0].to(latents)
                strength[video, index] = anchor.strength
        noise = torch.zeros_like(latents)
        if ((strength > 0) & (strength < 1)).any():
            noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        return AnchorLatents(clean, strength, noise)

    @torch.no_grad()
    def animate(
        self,
        prompts: str | list[str] | None = None,
        anchors: Anchor | list[Anchor] | list[list[Anchor]] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_scale_2: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "np",
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        preset: str | None = None,
    ):
        """Stage 3: makes a video of each prompt that passes through its anchors; plain text-to-video without any.

        Args:
            prompts (`str` or `list[str]`, *optional*): what should happen; or give `prompt_embeds`.
            anchors (`Anchor`, `list[Anchor]` or `list[list[Anchor]]`, *optional*): one list for all videos, one per
                prompt, or one per video.

        The other arguments are those of `__call__`. Returns the frames alone.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        inputs = {
            "negative_prompt": negative_prompt,
            "height": height,
            "width": width,
            "num_frames": num_frames,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "guidance_scale_2": guidance_scale_2,
            "num_videos_per_prompt": num_videos_per_prompt,
            "generator": generator,
            "latents": latents,
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "output_type": output_type,
            "attention_kwargs": attention_kwargs,
            "callback_on_step_end": callback_on_step_end,
            "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs,
            "max_sequence_length": max_sequence_length,
            "preset": preset,
        }
        return self._animate(**self._video_inputs(prompts, anchors, inputs))

    def _animate(
        self,
        prompts: list[str] | None,
        anchors: list[list[Anchor]] | None,
        negative_prompt: list[str] | None,
        height: int,
        width: int,
        num_frames: int,
        num_inference_steps: int | None,
        guidance_scale: float | None,
        guidance_scale_2: float | None,
        num_videos_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        output_type: str,
        attention_kwargs: dict[str, Any] | None,
        callback_on_step_end: StepCallback | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
        max_sequence_length: int,
        preset: str | None,
    ):
        sampling = self._sampling(preset)
        if guidance_scale is None:
            guidance_scale = 5.0 if sampling is None else sampling.guidance_scale
        low, high = (0.0, 1.0) if sampling is None else sampling.guidance_interval
        self._guidance_scale = guidance_scale
        self._guidance_scale_2 = guidance_scale if guidance_scale_2 is None else guidance_scale_2
        self._attention_kwargs = attention_kwargs
        self._current_timestep = None

        with self._running() as progress:
            device, dtype = self._execution_device, self.transformer.dtype

            # 1. Encode prompts, then draw noise, then encode anchors: a seed means the same clip with and without them
            with progress.stage("encode"):
                prompt_embeds, negative_prompt_embeds = self.encode_prompt(
                    prompts,
                    negative_prompt=negative_prompt,
                    do_classifier_free_guidance=self.do_classifier_free_guidance,
                    num_videos_per_prompt=num_videos_per_prompt,
                    prompt_embeds=prompt_embeds,
                    negative_prompt_embeds=negative_prompt_embeds,
                    max_sequence_length=max_sequence_length,
                    device=device,
                )
                prompt_embeds = prompt_embeds.to(dtype)
                if negative_prompt_embeds is not None:
                    negative_prompt_embeds = negative_prompt_embeds.to(dtype)
                batch_size = len(prompts) * num_videos_per_prompt if prompts is not None else prompt_embeds.shape[0]
                latents = self.prepare_latents(
                    batch_size,
                    self.transformer.config.in_channels,
                    height,
                    width,
                    num_frames,
                    torch.float32,
                    device,
                    generator,
                    latents,
                )
                anchor_latents = None
                if anchors is not None and any(anchors):
                    anchor_latents = self.encode_anchors(anchors, latents, height, width, num_frames, generator)

            # 2. Prepare timesteps
            if sampling is None:
                scheduler = self.scheduler
                scheduler.set_timesteps(num_inference_steps or 50, device=device)
            else:
                # A fresh one: the pipeline's own is shared and keeps its state.
                scheduler = sampling.make_scheduler(num_inference_steps, device)
            timesteps, sigmas = scheduler.timesteps, _sigmas(scheduler)
            self._num_timesteps = len(timesteps)
            boundary = (self.config.boundary_ratio or 0.0) * scheduler.config.num_train_timesteps
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(0)

            # 3. Denoising loop
            with (
                progress.stage("denoise", len(timesteps)) as report,
                nullcontext() if anchor_latents is not None else self._without_anchor_lora(),
            ):
                if anchor_latents is not None:
                    latents = anchor_latents.impose(latents, sigmas[0])
                for i, t in enumerate(timesteps):
                    if self.interrupt:
                        break
                    self._current_timestep = t
                    first_expert = self.transformer_2 is None or t >= boundary
                    expert = self.transformer if first_expert else self.transformer_2
                    scale = self._guidance_scale if first_expert else self._guidance_scale_2

                    hidden_states, timestep = anchored_model_input(
                        latents, sigmas[i], t.expand(latents.shape[0]), anchor_latents
                    )
                    inputs = {
                        "hidden_states": hidden_states.to(dtype),
                        "timestep": timestep,
                        "attention_kwargs": attention_kwargs,
                        "return_dict": False,
                    }
                    context = {"step_index": i, "sigma": sigmas[i], "num_inference_steps": len(timesteps)}
                    with expert.cache_context("cond", **context):
                        noise_pred = expert(encoder_hidden_states=prompt_embeds, **inputs)[0]
                    if self.do_classifier_free_guidance and low <= sigmas[i] <= high:
                        with expert.cache_context("uncond", **context):
                            noise_uncond = expert(encoder_hidden_states=negative_prompt_embeds, **inputs)[0]
                        noise_pred = noise_uncond + scale * (noise_pred - noise_uncond)

                    if anchor_latents is not None:
                        # What a multistep solver remembers of an anchored frame is then the anchor itself.
                        noise_pred = anchor_latents.hold(noise_pred, latents, sigmas[i])
                    latents = scheduler.step(noise_pred, t, latents, return_dict=False)[0]
                    if anchor_latents is not None:
                        latents = anchor_latents.impose(latents, sigmas[i + 1])

                    if callback_on_step_end is not None:
                        callback_kwargs = {}
                        for name in callback_on_step_end_tensor_inputs:
                            callback_kwargs[name] = locals()[name]
                        changed = callback_on_step_end(self, i, t, callback_kwargs)
                        latents = changed.pop("latents", latents)
                        prompt_embeds = changed.pop("prompt_embeds", prompt_embeds)
                        negative_prompt_embeds = changed.pop("negative_prompt_embeds", negative_prompt_embeds)
                    report(i + 1, len(timesteps))
            self._current_timestep = None

            # 4. Decode
            if output_type == "latent":
                return latents
            with progress.stage("decode"):
                return self.decode(latents, output_type)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, output_type: str = "np"):
        """Normalised latents `(B, C, f, h, w)` to frames. The VAE works in tiles when it would not fit otherwise."""
        latents = denormalize_latents(
            latents.to(get_module_execution_device(self.vae), dtype=self.vae.dtype), self.vae
        )
        tile = not self.vae.use_tiling and decoder_bytes(self.vae, latents) > free_bytes(latents.device)
        if tile:
            self.vae.enable_tiling()
        try:
            video = self.vae.decode(latents, return_dict=False)[0]
        finally:
            if tile:
                self.vae.disable_tiling()
        return self.video_processor.postprocess_video(video, output_type=output_type)

    # -- all of it ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_scale_2: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        preset: str | None = None,
        mode: str = "factorized",
        first_frame_prompt: str | list[str] | None = None,
        image: Image | list[Image] | None = None,
        anchors: Anchor | list[Anchor] | list[list[Anchor]] | None = None,
        rewriter_max_new_tokens: int | None = None,
        composer_num_inference_steps: int | None = None,
        composer_guidance_scale: float | None = None,
        composer_negative_prompt: str | list[str] | None = None,
        callback_on_stage_step: Callable | None = None,
    ) -> FactorizedVideoPipelineOutput | tuple:
        r"""Generates videos.

        Args:
            prompt (`str` or `list[str]`, *optional*): what should happen. May be left out with `prompt_embeds`.
            negative_prompt (`str` or `list[str]`, *optional*): for the video model; the model's own when left out.
            height, width (`int`, *optional*): pixels, multiples of VAE stride times patch size.
            num_frames (`int`, *optional*): 4k + 1.
            num_inference_steps (`int`, *optional*): steps of the video model; the preset's when left out.
            guidance_scale (`float`, *optional*): 1 is off; the preset's when left out.
            guidance_scale_2 (`float`, *optional*): of the low-noise expert.
            num_videos_per_prompt (`int`, *optional*): each video gets an anchor of its own.
            generator (`torch.Generator` or one per video, *optional*): the anchor's seed is derived from its state
                without using it up, so that a seed draws the same video noise in every mode.
            latents (`torch.Tensor` of shape `(B, C, f, h, w)`, *optional*): unit Gaussian start of the video.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor` of shape `(B, L, D)`, *optional*): instead of texts.
            output_type (`str`, *optional*): `"np"`, `"pt"`, `"pil"` or `"latent"`.
            return_dict (`bool`, *optional*): `False` gives a tuple in the order of the output's fields.
            attention_kwargs (`dict`, *optional*): passed on to the transformer.
            callback_on_step_end (`Callable`, *optional*): as in every diffusers pipeline, after each video step.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): of `latents`, `prompt_embeds`,
                `negative_prompt_embeds`.
            max_sequence_length (`int`, *optional*): text tokens of the video model.
            preset (`str`, *optional*): a name in `pipe.presets`. Left out: the preset that `pipe.scheduler` belongs to;
                a scheduler of your own runs as it is, with 50 steps and guidance 5 unless given.
            mode (`str`, *optional*): `"factorized"`, or `"direct"` for plain text-to-video by the base model.
            first_frame_prompt (`str` or `list[str]`, *optional*): skips stage 1.
            image (PIL image, array or tensor, or a list with one per prompt, *optional*): skips stages 1 and 2; the same
                as `anchors=[Anchor(image)]`.
            anchors (`Anchor` or lists of them, *optional*): skips stages 1 and 2; see [`animate`].
            rewriter_max_new_tokens (`int`, *optional*): stage 1.
            composer_num_inference_steps, composer_guidance_scale, composer_negative_prompt (*optional*): stage 2.
            callback_on_stage_step (`Callable`, *optional*): `callback(pipe, stage, step, steps)` after each step of each
                stage. Setting `pipe._interrupt = True` in it, or in the other callback, stops the run.

        Returns:
            [`FactorizedVideoPipelineOutput`] or `tuple`.

        Raises:
            `ValueError`: bad input, before any model runs.
        """
        # 1. Check inputs
        if mode not in MODES:
            raise ValueError(f"Unknown mode {mode!r}; use one of {MODES}.")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        captions = [first_frame_prompt] if isinstance(first_frame_prompt, str) else first_frame_prompt
        if prompts is None and prompt_embeds is None:
            raise ValueError("Provide `prompt` or `prompt_embeds`: the video model follows it in every mode.")
        num_prompts = len(prompts) if prompts is not None else prompt_embeds.shape[0]
        first_frames = {"first_frame_prompt": captions, "image": image, "anchors": anchors}
        given = [name for name, value in first_frames.items() if value is not None]
        if mode == "direct" and given:
            raise ValueError(
                f'`mode="direct"` uses no first frame, but `{given[0]}` was given; leave one of them out.'
            )
        if len(given) > 1:
            raise ValueError(f"Only one of `first_frame_prompt`, `image` and `anchors` can be used, but got {given}.")
        if image is not None:
            pictures = list(image) if isinstance(image, (list, tuple)) else [image] * num_prompts
            if len(pictures) != num_prompts:
                raise ValueError(
                    f"`image` has {len(pictures)} pictures for {num_prompts} prompts; give one or {num_prompts}."
                )
            anchors = [[Anchor(picture)] for picture in pictures]
        compose = mode == "factorized" and anchors is None
        if compose:
            self._check_stages(prompts, captions, num_prompts)
        inputs = self._video_inputs(
            prompts,
            anchors,
            {
                "negative_prompt": negative_prompt,
                "height": height,
                "width": width,
                "num_frames": num_frames,
                "num_inference_steps": num_inference_steps,
                "guidance_scale": guidance_scale,
                "guidance_scale_2": guidance_scale_2,
                "num_videos_per_prompt": num_videos_per_prompt,
                "generator": generator,
                "latents": latents,
                "prompt_embeds": prompt_embeds,
                "negative_prompt_embeds": negative_prompt_embeds,
                "output_type": output_type,
                "attention_kwargs": attention_kwargs,
                "callback_on_step_end": callback_on_step_end,
                "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs,
                "max_sequence_length": max_sequence_length,
                "preset": preset,
            },
        )

        # 2. Settle the seeds
        num_videos = num_prompts * num_videos_per_prompt
        if generator is None:
            generator = [torch.Generator().manual_seed(_draw_seed()) for _ in range(num_videos)]
            inputs["generator"] = generator
        generators = generator if isinstance(generator, list) else [generator] * num_videos
        seeds = [{"video": item.initial_seed()} for item in generators]

        images = None
        with self._running(callback_on_stage_step) as progress:
            # 3. Stages 1 and 2
            if compose:
                if captions is None:
                    captions = self.rewrite(prompts, max_new_tokens=rewriter_max_new_tokens)
                if not self.interrupt:
                    for seed, anchor_seed in zip(seeds, _anchor_seeds(generator, num_videos)):
                        seed["anchor"] = anchor_seed
                    images = self.compose(
                        [caption for caption in captions for _ in range(num_videos_per_prompt)],
                        inputs["height"],
                        inputs["width"],
                        num_inference_steps=composer_num_inference_steps,
                        guidance_scale=composer_guidance_scale,
                        negative_prompt=composer_negative_prompt,
                        generator=[torch.Generator().manual_seed(seed["anchor"]) for seed in seeds],
                    )
                    inputs["anchors"] = [[Anchor(picture)] for picture in images]

            # 4. Stage 3
            frames = [] if self.interrupt else self._animate(**inputs)

        output = FactorizedVideoPipelineOutput(
            frames=frames, first_frame_prompts=captions, anchor_images=images, seeds=seeds, timings=progress.timings
        )
        return output if return_dict else tuple(getattr(output, name) for name in output.__dataclass_fields__)

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


def _sigmas(scheduler) -> list[float]:
    """Noise levels of the steps and the final one. Time is `sigma * num_train_timesteps` where there are none (LCM)."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        sigmas = [*(scheduler.timesteps / scheduler.config.num_train_timesteps), 0.0]
    return [float(sigma) for sigma in sigmas]


def _draw_seed(generator: torch.Generator | None = None) -> int:
    return int(torch.randint(2**31, (1,), generator=generator, device=generator.device if generator else None))


def _anchor_seeds(generator: torch.Generator | list[torch.Generator], num_videos: int) -> list[int]:
    """Seeds for the anchors from copies of the generators, whose own state stays for the video's noise."""
    if isinstance(generator, list):
        return [_draw_seed(item.clone_state()) for item in generator]
    copy = generator.clone_state()
    return [_draw_seed(copy) for _ in range(num_videos)]
