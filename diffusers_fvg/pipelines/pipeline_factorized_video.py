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
from ..animate.light_decoder import check_light_decoder
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

# Used if neither the call nor the repository sets them: size and length of Wan2.2-TI2V-5B.
WAN_CALL_DEFAULTS = {"height": 704, "width": 1280, "num_frames": 121, "frame_rate": 24, "max_sequence_length": 512}


class FactorizedVideoPipeline(FactorizedStages, FactorizedVideoLoraLoaderMixin, WanPipeline):
    r"""Text to video in three stages: an LLM describes the first frame, a text-to-image model draws it, a video model
    animates it. Each stage is a public method that returns plain data: [`rewrite`], [`compose`], [`animate`].

    Text encoding and generation without anchors are those of [`~diffusers.WanPipeline`]; `load_lora_weights` calls
    [`load_lora`].

    Args:
        tokenizer (`PreTrainedTokenizerBase`): tokenizer of the video model's text encoder.
        text_encoder (`UMT5EncoderModel`): the video model's text encoder.
        vae (`AutoencoderKLWan`): causal video VAE.
        scheduler (`SchedulerMixin`): flow-matching scheduler, used when a call has no preset.
        transformer (`AnchorConditionedTransformer3D`): video model, or its high-noise expert; also
            `AnchorConditionedSkyReelsV2Transformer3D` (SkyReels-V2 diffusion forcing).
        transformer_2 (`AnchorConditionedTransformer3D`, *optional*): low-noise expert (Wan2.2-A14B).
        rewriter (`FirstFrameRewriter`, *optional*): stage 1; not needed when `first_frame_prompt` or `image` is given.
        composer (`AnchorComposer`, *optional*): stage 2; not needed when `image` or `anchors` is given.
        anchor_judge (`AnchorJudge`, *optional*): chooses among several images of stage 2.
        anchor_lora (`AnchorLora`, *optional*): loaded into the transformers as adapter `"anchor"`. It is switched off in
            calls without anchors, so that `mode="direct"` uses the base model. `anchor_form` in its metadata says how anchors
            are passed to the model, see [`animate.anchor`].
        schedulers (`SchedulerPresets`, *optional*): presets for `preset=`; those of the model when left out.
        boundary_ratio (`float`, *optional*): noise level in [0, 1] below which `transformer_2` is used; required with it.
        expand_timesteps (`bool`, *optional*): whether the base was trained on clean first frames (Wan2.2-TI2V-5B). Saved in
            the config for stock pipelines; this pipeline always uses timesteps per frame in calls with anchors.
        call_defaults (`dict`, *optional*): defaults of `height`, `width`, `num_frames`, `frame_rate`, `max_sequence_length`
            and `negative_prompt` in calls; the model's own when left out.

    Components may also be given in other forms: a stock transformer; a text-to-image pipeline or its name as `composer`;
    `(model, tokenizer)`, a [`ChatEndpoint`] or the name of a chat model as `rewriter`. A name is a folder or a Hub repository.

    The attribute `light_decoder` may be set to a [`LightDecoder`], which then decodes instead of the VAE. It is not saved.

    Raises:
        `ValueError`: a component does not fit.
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
        # `register_modules` checks the transformers against these two.
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

    # -- methods that FactorizedStages requires -----------------------------------------------------------------------

    def _taken_over(self, name: str, component: Any) -> Any:
        if name not in ("transformer", "transformer_2") or component is None:
            return super()._taken_over(name, component)
        transformer = as_anchored(component, name)
        # In a modular pipeline, the other components may not be set yet.
        beside = self._setting("vae", "z_dim"), self._setting("text_encoder", "d_model")
        transformer.check_text_to_video(transformer.config, f"`{name}`", *beside)
        if name == "transformer_2" and hasattr(self, "_interrupt"):
            check_boundary(transformer, self.config.boundary_ratio)
        return transformer

    def _check_scheduler(self) -> None:
        config = self.scheduler.config
        if config.get("use_dynamic_shifting"):
            raise ValueError(
                "`scheduler` has `use_dynamic_shifting=True`, for which the pipeline does not compute a shift: set it to False, "
                "and set `shift` or `flow_shift` to the model's value."
            )
        if config.get("prediction_type", "flow_prediction") != "flow_prediction":
            logger.warning(
                f"The scheduler, a {type(self.scheduler).__name__}, has `prediction_type={config.prediction_type!r}`, but the "
                "model predicts a flow: set `prediction_type='flow_prediction', use_flow_sigmas=True` if it supports them."
            )

    def _check_light_decoder(self, decoder: Any) -> None:
        check_light_decoder(decoder, self.vae)

    def _check_size(self, height: int, width: int) -> None:
        config = self.transformer.config
        for name, value, cells in zip(("height", "width"), (height, width), config.patch_size[1:]):
            multiple = self.vae_scale_factor_spatial * cells
            # The rotary embedding limits the number of patches.
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
        """Calls [`animate.anchor.encode_anchors`] with the form that the anchor LoRA was trained in; see its arguments."""
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
        """Stage 3: generates a video of each prompt that contains its anchors; without anchors, plain text-to-video.

        Args:
            prompts (`str` or `list[str]`, *optional*): descriptions of the videos; or give `prompt_embeds`.
            anchors (`Anchor`, `list[Anchor]` or `list[list[Anchor]]`, *optional*): one list for all videos, one per
                prompt, or one per video. If some videos have anchors, the lists of others may be empty: those are plain
                text-to-video, but with the anchor LoRA on.

        The other arguments are those of `__call__`. Returns only the frames.
        """
        request = self._request(locals())
        with self._running():
            return self._animate(request)[0]

    def _animate(self, request: VideoRequest) -> tuple[Any, list[torch.Tensor]]:
        with self._running() as progress:
            request.check_safety(self.safety_checker)
            self._settle_guidance(request)
            # Noise is drawn before anchors are encoded, so that a seed gives the same noise with and without anchors.
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
        """Sets the attributes that the stock pipeline's properties read."""
        self._guidance_scale, self._guidance_scale_2 = request.guidance(self)
        self._attention_kwargs = request.attention_kwargs
        self._current_timestep = None

    def _encode_texts(self, request: VideoRequest) -> list[torch.Tensor | None]:
        """Returns embeddings of prompts and negative prompts for each video; the latter are `None` without guidance."""
        device, dtype = self._execution_device, self.transformer.dtype
        # A fast tokenizer stores padding and truncation of its last call, so only one thread may use it.
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
        """Runs the sampling loop from noise to clean latents `(B, C, f, h, w)`."""
        dtype, sampling = self.transformer.dtype, request.sampling(self)
        scheduler = request.make_scheduler(self, latents.device)
        timesteps, sigmas = scheduler.timesteps, noise_levels(scheduler)
        check_finite("scheduler.sigmas", torch.tensor(sigmas))
        self._num_timesteps = len(timesteps)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        # Some schedulers (LCM) draw noise in every step.
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
                    # A multistep solver then stores the anchor as its estimate of an anchored frame.
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
        """Returns `predict(branch, t, embeds, inputs, place)`: velocity and guidance scale of the expert for timestep `t`."""
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
        """Decodes normalised latents `(B, C, f, h, w)` to frames, one latent frame at a time; in tiles if memory is short.

        `output_type="uint8"` returns a `np.ndarray` of shape `(B, F, H, W, 3)`, a quarter of the memory of `"np"`.
        """
        device = get_module_execution_device(self.vae)
        vae = self.vae if self.light_decoder is None else self.light_decoder.to(device)
        check_latents(latents, (None, vae.config.z_dim, None, None, None))
        latents = denormalize_latents(latents.to(device, dtype=vae.dtype), vae)
        tile = vae is self.vae and decoder_bytes(vae, latents) > free_bytes(device)
        with exclusive(vae):
            return decode_video(vae, latents, output_type, tile)

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
            prompt (`str` or `list[str]`, *optional*): descriptions of the videos. May be left out with `prompt_embeds`.
            negative_prompt (`str` or `list[str]`, *optional*): for the video model; the model's default when left out.
            height, width (`int`, *optional*): in pixels, multiples of the VAE's stride times the patch size.
            num_frames (`int`, *optional*): 4k + 1.
            num_inference_steps (`int`, *optional*): steps of the video model; the preset's when left out.
            guidance_scale, guidance_scale_2 (`float`, *optional*): guidance of the video model, and of its low-noise expert; 1
                is off; the preset's when left out.
            num_videos_per_prompt (`int`, *optional*): each video gets its own anchor.
            generator (`torch.Generator`, its seed, or a list with one per video, *optional*): the anchor's seed is drawn from
                a copy of its state, so that a seed gives the same video noise in every mode.
            latents (`torch.Tensor` of shape `(B, C, f, h, w)`, *optional*): initial unit Gaussian noise.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor` of shape `(B, L, D)`, *optional*): used instead of texts.
            output_type (`str`, *optional*): `"np"`, `"uint8"`, `"pt"`, `"pil"` or `"latent"`; see [`decode`].
            return_dict (`bool`, *optional*): `False` returns a tuple in the order of the output's fields.
            attention_kwargs (`dict`, *optional*): `{"scale": s}` multiplies LoRA adapters by `s`.
            callback_on_step_end (`Callable`, *optional*): called after each video step, as in every diffusers pipeline.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): names among `latents`, `prompt_embeds` and
                `negative_prompt_embeds`.
            max_sequence_length (`int`, *optional*): largest number of text tokens of the video model.
            preset (`str`, *optional*): a name in `pipe.presets`. When left out, the preset that matches `pipe.scheduler`; a
                scheduler that matches none is used as it is, with 50 steps and guidance 5 unless given.
            mode (`str`, *optional*): `"factorized"`; `"direct"` for plain text-to-video with the base model; `"storyboard"`
                to write, draw and anchor the first frame and later moments ([`storyboard`], [`compose`], [`derive`]).
            first_frame_prompt (`str` or `list[str]`, *optional*): captions of the first frames; skips stage 1.
            motion_prompt (`str` or `list[str]`, *optional*): texts for the video model instead of `prompt`.
            image (PIL image, array or tensor, or a list with one per prompt, *optional*): first frames; skips stages 1 and 2;
                the same as `anchors=[Anchor(image)]`.
            anchors (`Anchor` or lists of them, *optional*): given frames; skips stages 1 and 2; see [`animate`].
            anchor_decode (`str`, *optional*): how to correct colours that the VAE changes. `"raw"`: no correction. `"match"`:
                frames are corrected to the colours of their anchors. `"replace"`: also replaces the anchored frames by the
                anchor images.
            storyboard (`list[Moment]` or one list per prompt, *optional*): with `mode="storyboard"`, skips stage 1. A moment
                becomes the frame nearest to its time; two moments must not share a latent frame.
            num_moments (`int`, *optional*): with `mode="storyboard"`, the largest number of moments that stage 1 writes.
            rewriter_max_new_tokens (`int`, *optional*): token limit of stage 1's answer; an error if stage 1 is skipped.
            rewriter_motion (`bool`): whether stage 1 also writes `motion_prompt`, a caption of the motion that uses the names
                in the first-frame caption.
            composer_num_inference_steps, composer_guidance_scale, composer_negative_prompt (*optional*): arguments of stage
                2; an error if stage 2 is skipped.
            composer_num_candidates (`int`, *optional*): largest number of images drawn for a video, from which
                `anchor_judge` chooses.
            motion_retries (`int`): how often a video with less motion than the preset's `min_motion` is generated again with
                another seed.
            callback_on_stage_step (`Callable`, *optional*): `callback(pipe, stage, step, steps)` after each step of each
                stage. Setting `pipe._interrupt = True` in either callback stops the call.

        Returns:
            [`FactorizedVideoPipelineOutput`] or `tuple`.

        Raises:
            `ValueError`: an argument is not valid; raised before any model runs.
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
            # Stage 3: the video model animates them
            frames, motion = ([], None) if self.interrupt else request.animate_moving(self, seeds)
            judged: dict[str, Any] = {"motion": motion, "candidates": candidates}
            return request.output(self, frames, moments, images, seeds, progress.timings, **judged)
