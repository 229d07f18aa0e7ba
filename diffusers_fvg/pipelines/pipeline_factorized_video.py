"""Factorized Video Generation (arXiv 2512.16371): prompt -> first-frame prompt -> anchor image -> video."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from diffusers import AutoencoderKLWan, SchedulerMixin, WanPipeline
from diffusers.utils import logging
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from ..animate.anchor import FORMS, Anchor, encode_anchors, resolve_anchors
from ..animate.conditioning import AnchorLatents, anchored_model_input, denormalize_latents
from ..animate.decoding import decode_video
from ..animate.fidelity import decode_anchored
from ..animate.memory import decoder_bytes, free_bytes
from ..animate.transformer_anchor_skyreels import WanNetwork, as_anchored
from ..checks import Generators, check_finite, check_latents, check_number, check_size, stop_unless_finite
from ..compose.composer import AnchorComposer
from ..compose.judge import Judge
from ..devices import get_module_execution_device
from ..locks import exclusive
from ..lora.anchor_lora import AnchorLora
from ..lora.loader import FactorizedVideoLoraLoaderMixin
from ..lora.scales import without_scale
from ..rewrite.rewriter import FirstFrameRewriter
from ..rewrite.storyboard import Moment
from ..schedules.flow import noise_levels
from ..schedules.presets import WAN_PRESETS, SchedulerPresets
from .output import FactorizedVideoPipelineOutput
from .parts import check_boundary, with_optional_components
from .progress import StageProgress
from .request import AnchorResolver, Image, StepCallback, VideoRequest
from .stages import FactorizedStages


logger = logging.get_logger(__name__)

# Used where neither the call nor the repository says: Wan2.2-TI2V-5B's own size and length.
WAN_CALL_DEFAULTS = {"height": 704, "width": 1280, "num_frames": 121, "frame_rate": 24, "max_sequence_length": 512}


class FactorizedVideoPipeline(FactorizedStages, FactorizedVideoLoraLoaderMixin, WanPipeline):
    r"""Text to video in three stages: an LLM describes the first frame, a text-to-image model draws it, a video model
    animates it. Each stage is a public method that returns plain data: [`rewrite`], [`compose`], [`animate`].

    Text encoding, LoRA loading and the no-anchor path are those of [`~diffusers.WanPipeline`].

    Args:
        tokenizer (`PreTrainedTokenizerBase`): of the video model's text encoder.
        text_encoder (`UMT5EncoderModel`): the video model's text encoder.
        vae (`AutoencoderKLWan`): causal video VAE.
        scheduler (`SchedulerMixin`): flow-matching scheduler used when no preset is asked for.
        transformer (`AnchorConditionedTransformer3D`): video model, or its high-noise expert; or one of SkyReels-V2 diffusion forcing.
        transformer_2 (`AnchorConditionedTransformer3D`, *optional*): low-noise expert (Wan2.2-A14B).
        rewriter (`FirstFrameRewriter`, *optional*): stage 1; not needed when `first_frame_prompt` or `image` is given.
        composer (`AnchorComposer`, *optional*): stage 2; not needed when `image` or `anchors` is given.
        anchor_judge (`AnchorJudge`, *optional*): chooses among several pictures of stage 2.
        anchor_lora (`AnchorLora`, *optional*): loaded into the transformers as adapter `"anchor"`. It is switched off
            while there is no anchor, so that `mode="direct"` is the base model. Its metadata `anchor_form` says how anchors
            are given to the model, see [`animate.anchor`].
        schedulers (`SchedulerPresets`, *optional*): what `preset=` selects from; those of Wan when absent.
        boundary_ratio (`float`, *optional*): share of the time range below which `transformer_2` takes over; needed with it.
        expand_timesteps (`bool`, *optional*): the base has a native first-frame mode (Wan2.2-TI2V-5B). Kept in the config
            for stock pipelines; per-frame times are used here whenever there is an anchor.
        call_defaults (`dict`, *optional*): `height`, `width`, `num_frames`, `frame_rate`, `max_sequence_length` and
            `negative_prompt` of the model, used where a call leaves them out.

    Components may come as people have them: a stock transformer, a text-to-image pipeline or the name of one as `composer`,
    `(model, tokenizer)`, a [`ChatEndpoint`] or the name of a chat model as `rewriter`. Optional ones may be left out.

    Raises:
        `ValueError`: a component that does not fit.
    """

    model_cpu_offload_seq = "rewriter->anchor_judge->composer->text_encoder->transformer->transformer_2->vae"
    _optional_components = ["transformer_2", "rewriter", "composer", "anchor_judge", "anchor_lora", "schedulers"]
    component_kinds = {"vae": ("AutoencoderKLWan", ("z_dim",)), "text_encoder": ("UMT5EncoderModel", ("d_model",))}
    anchor_forms = FORMS
    attention_keys = ("scale",)
    default_presets = WAN_PRESETS
    own_guidance_scale = 5.0
    default_call = WAN_CALL_DEFAULTS
    pipeline_shim = "from diffusers_fvg import FactorizedVideoPipeline  # noqa: F401\n"

    @with_optional_components
    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: UMT5EncoderModel,
        vae: AutoencoderKLWan,
        scheduler: SchedulerMixin,
        transformer: WanNetwork,
        transformer_2: WanNetwork | None,
        rewriter: FirstFrameRewriter | None,
        composer: AnchorComposer | None,
        anchor_judge: Judge | None,
        anchor_lora: AnchorLora | None,
        schedulers: SchedulerPresets | None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
        call_defaults: dict[str, Any] | None = None,
    ):
        if transformer is None:
            raise ValueError("`transformer` is None: the repository has no video model, which every mode needs.")
        check_number("boundary_ratio", boundary_ratio)
        check_boundary(transformer_2, boundary_ratio)
        # `register_modules` asks them which latents and texts a transformer must take.
        self.vae, self.text_encoder = vae, text_encoder
        super().__init__(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            scheduler=scheduler,
            transformer=transformer,
            transformer_2=transformer_2,
            boundary_ratio=boundary_ratio,
            expand_timesteps=expand_timesteps,
        )
        parts = {"rewriter": rewriter, "composer": composer, "anchor_judge": anchor_judge, "schedulers": schedulers}
        self._add_stages(parts | {"anchor_lora": anchor_lora}, call_defaults)

    # -- what FactorizedStages asks of a model ------------------------------------------------------------------------

    def _taken_over(self, name: str, component: Any) -> Any:
        if name not in ("transformer", "transformer_2") or component is None:
            return super()._taken_over(name, component)
        transformer = as_anchored(component, name)
        # A modular pipeline's components come one by one.
        beside = self._setting("vae", "z_dim"), self._setting("text_encoder", "d_model")
        transformer.check_text_to_video(transformer.config, f"`{name}`", *beside)
        if name == "transformer_2" and hasattr(self, "_interrupt"):
            check_boundary(transformer, self.config.boundary_ratio)
        return transformer

    def _check_scheduler(self) -> None:
        config = self.scheduler.config
        if config.get("use_dynamic_shifting"):
            raise ValueError(
                "`scheduler` has `use_dynamic_shifting=True`, whose shift the pipeline would have to compute for each size: set it "
                "to False, and `shift` or `flow_shift` to the model's."
            )
        if config.get("prediction_type", "flow_prediction") != "flow_prediction":
            logger.warning(
                f"The scheduler, a {type(self.scheduler).__name__}, is for `prediction_type={config.prediction_type!r}`, and the "
                "model predicts a flow: make it with `prediction_type='flow_prediction', use_flow_sigmas=True`, if it has those."
            )

    def _check_size(self, height: int, width: int) -> None:
        config = self.transformer.config
        for name, value, cells in zip(("height", "width"), (height, width), config.patch_size[1:]):
            multiple = self.vae_scale_factor_spatial * cells
            # A patch has a place in the rotary embedding.
            check_size(name, value, multiple, multiple * config.rope_max_seq_len)

    def _frame_step(self) -> int:
        return self.vae_scale_factor_temporal

    def _most_frames(self) -> int:
        config = self.transformer.config
        return 1 + (config.rope_max_seq_len * config.patch_size[0] - 1) * self.vae_scale_factor_temporal

    def _anchor_resolver(self) -> AnchorResolver:
        return partial(resolve_anchors, temporal=self.vae_scale_factor_temporal, form=self.anchor_form)

    def _latents_shape(self, num_videos: int, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        return (
            num_videos,
            self.transformer.config.in_channels,
            (num_frames - 1) // self.vae_scale_factor_temporal + 1,
            height // self.vae_scale_factor_spatial,
            width // self.vae_scale_factor_spatial,
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
        """[`animate.anchor.encode_anchors`] in the form that the anchor LoRA was trained in, which has the arguments."""
        size = height, width, num_frames
        return encode_anchors(self.vae, anchors, latents, *size, generator, self.anchor_form)

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
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "np",
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        preset: str | None = None,
        anchor_decode: str = "raw",
    ):
        """Stage 3: makes a video of each prompt that passes through its anchors; plain text-to-video without any.

        Args:
            prompts (`str` or `list[str]`, *optional*): what should happen; or give `prompt_embeds`.
            anchors (`Anchor`, `list[Anchor]` or `list[list[Anchor]]`, *optional*): one list for all videos, one per
                prompt, or one per video, which may be empty beside others that are not: plain text-to-video with the anchor
                LoRA on.

        The other arguments are those of `__call__`. Returns the frames alone.
        """
        request = self._request(locals())
        with self._running():
            return self._animate(request)[0]

    def _animate(self, request: VideoRequest) -> tuple[Any, list[torch.Tensor]]:
        with self._running() as progress:
            request.check_safety(self.safety_checker)
            self._settle_guidance(request)
            # A seed means the same clip with and without anchors: noise is drawn before they are encoded.
            with progress.stage("encode"):
                prompt_embeds, negative_prompt_embeds = self._encode_texts(request)
                latents = self.prepare_latents(
                    request.num_videos,
                    self.transformer.config.in_channels,
                    request.height,
                    request.width,
                    request.num_frames,
                    torch.float32,
                    self._execution_device,
                    request.generator,
                    request.latents,
                )
                anchors = None
                if request.anchors is not None and request.is_anchored:
                    size = request.height, request.width, request.num_frames
                    anchors = self.encode_anchors(request.anchors, latents, *size, request.generator)
                    stop_unless_finite("encode", anchors.latents, self.vae.dtype)
            latents = self._denoise(request, progress, latents, prompt_embeds, negative_prompt_embeds, anchors)
            if request.output_type == "latent":
                return latents, []
            with progress.stage("decode"):
                decode = partial(self.decode, latents)
                return decode_anchored(decode, request.anchors, request.anchor_decode, request.output_type), []

    def _settle_guidance(self, request: VideoRequest) -> None:
        """Sets what the stock pipeline's properties tell of a run."""
        self._guidance_scale, self._guidance_scale_2 = request.guidance(self)
        self._attention_kwargs = request.attention_kwargs
        self._current_timestep = None

    def _encode_texts(self, request: VideoRequest) -> list[torch.Tensor | None]:
        """Embeddings of prompts and negative prompts, one for each video; the latter are `None` without guidance."""
        device, dtype = self._execution_device, self.transformer.dtype
        # A fast tokenizer keeps padding and truncation of its last call.
        with exclusive(self.tokenizer):
            embeds = self.encode_prompt(
                request.motion_prompt or request.prompt,
                negative_prompt=request.negative_prompt,
                do_classifier_free_guidance=self.do_classifier_free_guidance,
                num_videos_per_prompt=request.num_videos_per_prompt,
                prompt_embeds=request.prompt_embeds,
                negative_prompt_embeds=request.negative_prompt_embeds,
                max_sequence_length=request.max_sequence_length,
                device=device,
            )
        return request.embeds_of_videos(embeds, device, dtype)

    def _denoise(
        self,
        request: VideoRequest,
        progress: StageProgress,
        latents: torch.Tensor,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None,
        anchors: AnchorLatents | None,
    ) -> torch.Tensor:
        """The sampling loop, from noise to clean latents `(B, C, f, h, w)`."""
        dtype, sampling = self.transformer.dtype, request.sampling(self)
        scheduler = request.make_scheduler(self, latents.device)
        timesteps, sigmas = scheduler.timesteps, noise_levels(scheduler)
        check_finite("scheduler.sigmas", torch.tensor(sigmas))
        self._num_timesteps = len(timesteps)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        # Some (LCM) draw noise in every step.
        draws = {"generator": request.generator} if "generator" in signature(scheduler.step).parameters else {}
        low, high = (0.0, 1.0) if sampling is None else sampling.guidance_interval
        boundary = (self.config.boundary_ratio or 0.0) * scheduler.config.num_train_timesteps
        predict = self._predictor(request, boundary, anchored=anchors is not None)

        with progress.stage("denoise", len(timesteps)) as report:
            if anchors is not None:
                latents = anchors.impose(latents, sigmas[0])
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    break
                self._current_timestep = t
                inputs = anchored_model_input(latents, sigmas[i], t.expand(len(latents)), anchors)
                inputs["hidden_states"] = inputs["hidden_states"].to(dtype)
                place = {"step_index": i, "sigma": sigmas[i], "num_inference_steps": len(timesteps)}
                noise_pred, scale = predict("cond", t, prompt_embeds, inputs, place)
                if self.do_classifier_free_guidance and low <= sigmas[i] <= high:
                    noise_uncond, _ = predict("uncond", t, negative_prompt_embeds, inputs, place)
                    noise_pred = noise_uncond + scale * (noise_pred - noise_uncond)
                if anchors is not None:
                    # What a multistep solver remembers of an anchored frame is then the anchor itself.
                    noise_pred = anchors.hold(noise_pred, latents, sigmas[i])
                latents = scheduler.step(noise_pred, t, latents, return_dict=False, **draws)[0]
                if anchors is not None:
                    latents = anchors.impose(latents, sigmas[i + 1])
                tensors = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
                latents, prompt_embeds, negative_prompt_embeds = request.after_step(
                    self, i, t, latents=latents, **tensors
                )
                stop_unless_finite("denoise", latents, dtype, f"step {i + 1} of {len(timesteps)}")
                report(i + 1, len(timesteps))
        self._current_timestep = None
        return latents

    def _predictor(
        self, request: VideoRequest, boundary: float, anchored: bool
    ) -> Callable[..., tuple[torch.Tensor, float]]:
        """`predict(branch, t, embeds, inputs, place)`: the velocity by the expert of time `t`, and its guidance scale."""
        adapters = self._adapter_scales(request.attention_kwargs, anchored)
        sampling = request.sampling(self)
        options = {
            "attention_kwargs": without_scale(request.attention_kwargs),
            "anchor_window": None if sampling is None else sampling.anchor_window,
            "return_dict": False,
        }

        def predict(branch: str, t: torch.Tensor, embeds: torch.Tensor, inputs: dict[str, Any], place: dict[str, Any]):
            is_first = self.transformer_2 is None or t >= boundary
            name = "transformer" if is_first else "transformer_2"
            expert, scale = getattr(self, name), self._guidance_scale if is_first else self._guidance_scale_2
            with adapters[name].applied(), expert.cache_context(branch, **place):
                return expert(encoder_hidden_states=embeds, **inputs, **options)[0].float(), scale

        return predict

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, output_type: str = "np"):
        """Normalised latents `(B, C, f, h, w)` to frames, a latent frame at a time, in tiles when it would not fit otherwise.

        `output_type="uint8"` gives a `np.ndarray` of shape `(B, F, H, W, 3)`, a quarter of the memory of `"np"`.
        """
        check_latents(latents, (None, self.vae.config.z_dim, None, None, None))
        latents = denormalize_latents(
            latents.to(get_module_execution_device(self.vae), dtype=self.vae.dtype), self.vae
        )
        tile = decoder_bytes(self.vae, latents) > free_bytes(latents.device)
        with exclusive(self.vae):
            return decode_video(self.vae, latents, output_type, tile)

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
        generator: Generators = None,
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
    ) -> FactorizedVideoPipelineOutput | tuple:
        r"""Generates videos.

        Args:
            prompt (`str` or `list[str]`, *optional*): what should happen. May be left out with `prompt_embeds`.
            negative_prompt (`str` or `list[str]`, *optional*): for the video model; the model's own when left out.
            height, width (`int`, *optional*): pixels, multiples of VAE stride times patch size.
            num_frames (`int`, *optional*): 4k + 1.
            num_inference_steps (`int`, *optional*): steps of the video model; the preset's when left out.
            guidance_scale, guidance_scale_2 (`float`, *optional*): 1 is off; the preset's when left out. 2: the low-noise expert's.
            num_videos_per_prompt (`int`, *optional*): each video gets an anchor of its own.
            generator (`torch.Generator`, its seed, or a list with one per video, *optional*): the anchor's seed is derived from its state
                without using it up, so that a seed draws the same video noise in every mode.
            latents (`torch.Tensor` of shape `(B, C, f, h, w)`, *optional*): unit Gaussian start of the video.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor` of shape `(B, L, D)`, *optional*): instead of texts.
            output_type (`str`, *optional*): `"np"`, `"uint8"`, `"pt"`, `"pil"` or `"latent"`; see [`decode`].
            return_dict (`bool`, *optional*): `False` gives a tuple in the order of the output's fields.
            attention_kwargs (`dict`, *optional*): passed on to the transformer.
            callback_on_step_end (`Callable`, *optional*): as in every diffusers pipeline, after each video step.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): of `latents`, `prompt_embeds`, `negative_prompt_embeds`.
            max_sequence_length (`int`, *optional*): text tokens of the video model.
            preset (`str`, *optional*): a name in `pipe.presets`. Left out: the preset that `pipe.scheduler` belongs to;
                a scheduler of your own runs as it is, with 50 steps and guidance 5 unless given.
            mode (`str`, *optional*): `"factorized"`; `"direct"` for plain text-to-video by the base model; `"storyboard"`
                to write and draw the first frame and later moments ([`rewrite.storyboard`], [`compose`], [`derive`]) and anchor all.
            first_frame_prompt (`str` or `list[str]`, *optional*): skips stage 1.
            motion_prompt (`str` or `list[str]`, *optional*): what the video model reads in place of `prompt`.
            image (PIL image, array or tensor, or a list with one per prompt, *optional*): skips stages 1 and 2; the same
                as `anchors=[Anchor(image)]`.
            anchors (`Anchor` or lists of them, *optional*): skips stages 1 and 2; see [`animate`].
            anchor_decode (`str`, *optional*): what is done where the VAE gives an anchor's colours back changed. `"raw"`:
                nothing. `"match"`: the frames get the colours of their anchors, from one anchor to the next.
                `"replace"`: so they do, and the anchored frames become the pictures themselves, pixel by pixel.
            storyboard (`list[Moment]` or one list per prompt, *optional*): with `mode="storyboard"`, skips stage 1. A moment
                becomes the frame nearest to its time; no two may share a latent frame.
            num_moments (`int`, *optional*): with `mode="storyboard"`, the most that stage 1 writes.
            rewriter_max_new_tokens (`int`, *optional*): stage 1; an error where that does not run.
            rewriter_motion (`bool`): stage 1 also writes `motion_prompt`: what happens, by the names of the first frame.
            composer_num_inference_steps, composer_guidance_scale, composer_negative_prompt (*optional*): stage 2; likewise.
            composer_num_candidates (`int`, *optional*): the most pictures drawn for a video, of which `anchor_judge` chooses.
            motion_retries (`int`): how often a video that moves less than the preset's `min_motion` is made again by another seed.
            callback_on_stage_step (`Callable`, *optional*): `callback(pipe, stage, step, steps)` after each step of each
                stage. Setting `pipe._interrupt = True` in it, or in the other callback, stops the run.

        Returns:
            [`FactorizedVideoPipelineOutput`] or `tuple`.

        Raises:
            `ValueError`: bad input, before any model runs.
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
            # Stage 3: the video model animates them
            frames, motion = ([], None) if self.interrupt else request.animate_moving(self, seeds)
        judged: dict[str, Any] = {"motion": motion, "candidates": candidates}
        return request.output(self, frames, moments, images, seeds, progress.timings, **judged)
