"""Factorized Video Generation (arXiv 2512.16371) with CogVideoX as the video model of stage 3."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from ..animate.anchor import Anchor, anchor_pixels
from ..animate.anchor_cogvideox import (
    anchored_model_input,
    encode_anchor,
    impose,
    num_padding_frames,
    resolve_patch_anchors,
)
from ..animate.conditioning import AnchorLatents
from ..animate.decoding import decode_video
from ..animate.fidelity import decode_anchored
from ..animate.transformer_anchor_cogvideox import AnchorConditionedCogVideoXTransformer3D
from ..checks import Generators, check_finite, check_latents, check_size, stop_unless_finite
from ..compose.composer import AnchorComposer
from ..compose.judge import Judge
from ..devices import get_module_execution_device
from ..locks import exclusive
from ..lora.anchor_lora import AnchorLora
from ..lora.loader import FactorizedVideoLoraLoaderMixin
from ..lora.scales import without_scale
from ..rewrite.rewriter import FirstFrameRewriter
from ..rewrite.storyboard import Moment
from ..schedules.cogvideox import COGVIDEOX_PRESETS, training_sigmas
from ..schedules.presets import SchedulerPresets
from .output import FactorizedVideoPipelineOutput
from .parts import with_optional_components
from .progress import StageProgress
from .request import AnchorResolver, Image, StepCallback, VideoRequest
from .stages import FactorizedStages


class FactorizedCogVideoXPipeline(FactorizedStages, FactorizedVideoLoraLoaderMixin, CogVideoXPipeline):
    r"""Text to video in three stages on CogVideoX: an LLM describes the first frame, a text-to-image model draws it, CogVideoX
    animates it. Each stage is a public method that returns plain data: [`rewrite`], [`compose`], [`animate`].

    Text encoding and generation without anchors are those of [`~diffusers.CogVideoXPipeline`]. `load_lora_weights` calls
    [`load_lora`], which loads every known LoRA format or raises an error; the stock method skips keys without the prefix
    `transformer.`.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): tokenizer of the text encoder.
        text_encoder (`T5EncoderModel`): the video model's text encoder.
        vae (`AutoencoderKLCogVideoX`): causal video VAE.
        transformer (`AnchorConditionedCogVideoXTransformer3D`): text-to-video model, CogVideoX 1.5 or 1.0.
        scheduler (`CogVideoXDDIMScheduler` or `CogVideoXDPMScheduler`): used when a call has no preset.
        rewriter (`FirstFrameRewriter`, *optional*): stage 1; not needed when `first_frame_prompt` or `image` is given.
        composer (`AnchorComposer`, *optional*): stage 2; not needed when `image` or `anchors` is given.
        anchor_judge (`AnchorJudge`, *optional*): chooses among several images of stage 2.
        anchor_lora (`AnchorLora`, *optional*): loaded into the transformer as adapter `"anchor"`. It is switched off in calls
            without anchors, so that `mode="direct"` uses the base model.
        schedulers (`SchedulerPresets`, *optional*): presets for `preset=`; `COGVIDEOX_PRESETS` when left out.
        call_defaults (`dict`, *optional*): defaults of `height`, `width`, `num_frames`, `frame_rate`, `max_sequence_length`
            and `negative_prompt` in calls; the model's own when left out.

    Components may also be given in other forms, see [`FactorizedVideoPipeline`].

    Raises:
        `ValueError`: a component does not fit.
    """

    model_cpu_offload_seq = "rewriter->anchor_judge->composer->text_encoder->transformer->vae"
    _optional_components = ["rewriter", "composer", "anchor_judge", "anchor_lora", "schedulers"]
    component_kinds = {
        "vae": ("AutoencoderKLCogVideoX", ("latent_channels", "temporal_compression_ratio")),
        "text_encoder": ("T5EncoderModel", ("d_model",)),
    }
    default_presets = COGVIDEOX_PRESETS
    own_guidance_scale = 6.0
    # Defaults of CogVideoX1.5-5B (zai-org/CogVideo, README.md).
    default_call = {"height": 768, "width": 1360, "num_frames": 81, "frame_rate": 16, "max_sequence_length": 224}
    pipeline_shim = "from diffusers_fvg import FactorizedCogVideoXPipeline  # noqa: F401\n"

    @with_optional_components
    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: T5EncoderModel,
        vae: AutoencoderKLCogVideoX,
        transformer: AnchorConditionedCogVideoXTransformer3D | CogVideoXTransformer3DModel,
        scheduler: CogVideoXDDIMScheduler | CogVideoXDPMScheduler,
        rewriter: FirstFrameRewriter | None,
        composer: AnchorComposer | None,
        anchor_judge: Judge | None,
        anchor_lora: AnchorLora | None,
        schedulers: SchedulerPresets | None,
        call_defaults: dict[str, Any] | None = None,
    ):
        if transformer is None:
            raise ValueError("`transformer` is None: the repository has no video model, which every mode needs.")
        # `register_modules` checks the transformer against these two.
        self.vae, self.text_encoder = vae, text_encoder
        super().__init__(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )
        parts = {"rewriter": rewriter, "composer": composer, "anchor_judge": anchor_judge, "schedulers": schedulers}
        self._add_stages(parts | {"anchor_lora": anchor_lora}, call_defaults)

    # -- methods that FactorizedStages requires -----------------------------------------------------------------------

    def _taken_over(self, name: str, component: Any) -> Any:
        if name != "transformer" or component is None:
            return super()._taken_over(name, component)
        transformer = AnchorConditionedCogVideoXTransformer3D.from_stock(component, name)
        beside = self._setting("vae", "latent_channels"), self._setting("text_encoder", "d_model")
        transformer.check_text_to_video(transformer.config, f"`{name}`", *beside)
        return transformer

    def _frame_step(self) -> int:
        # The VAE decodes an even number of latent frames without a single first frame: 13 frames would become 16.
        return 2 * self.vae_scale_factor_temporal

    def _check_size(self, height: int, width: int) -> None:
        multiple = self.vae_scale_factor_spatial * self.transformer.config.patch_size
        check_size("height", height, multiple)
        check_size("width", width, multiple)
        try:
            self.transformer.check_size(*(side // self.vae_scale_factor_spatial for side in (height, width)))
        except ValueError as error:
            raise ValueError(f"`height={height}`, `width={width}`: {error}") from error

    def _check_own(self, request: VideoRequest) -> None:
        if not isinstance(self.scheduler, (CogVideoXDDIMScheduler, CogVideoXDPMScheduler)):
            raise ValueError(
                f"`scheduler` is a {type(self.scheduler).__name__}; use CogVideoXDDIMScheduler or CogVideoXDPMScheduler."
            )

    def _anchor_resolver(self) -> AnchorResolver:
        temporal = self.vae_scale_factor_temporal
        return partial(resolve_patch_anchors, patch_size_t=self.transformer.patch_size_t, temporal=temporal)

    def _latents_shape(self, num_videos: int, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        num_latent_frames = (num_frames - 1) // self.vae_scale_factor_temporal + 1
        return (
            num_videos,
            num_latent_frames + num_padding_frames(num_latent_frames, self.transformer.patch_size_t),
            self.transformer.config.in_channels,
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
        """Encodes the anchors of each video.

        Args:
            anchors (`list[list[Anchor]]`): one list per video.
            latents (`torch.Tensor` of shape `(B, f, C, h, w)`): padded to patches; gives shape, device and dtype.
            height, width, num_frames (`int`): size of the video in pixels, and its frames.
            generator (*optional*): generator for the noise of anchors with a strength below 1.

        Returns:
            [`AnchorLatents`], of shape `(B, C, f, h, w)` including padding.
        """
        clean = torch.zeros_like(latents)
        strength = latents.new_zeros(latents.shape[:2])
        padding = latents.shape[1] - ((num_frames - 1) // self.vae_scale_factor_temporal + 1)
        # Videos of one prompt share their image, so each image is encoded once per position.
        encoded: dict[tuple[int, int], torch.Tensor] = {}
        resolve = self._anchor_resolver()
        for video, video_anchors in enumerate(anchors):
            for covered, anchor in resolve(video_anchors, num_frames):
                key = (id(anchor.image), covered.start)
                if key not in encoded:
                    pixels = anchor_pixels(anchor, height, width)[None]
                    device = get_module_execution_device(self.vae)
                    encoded[key] = encode_anchor(self.vae, pixels, covered.start, device)[0].transpose(0, 1)
                place = slice(padding + covered.start, padding + covered.stop)
                clean[video, place] = encoded[key].to(latents)
                strength[video, place] = anchor.strength
        # Padding copies frame 0, and is anchored with it.
        clean[:, :padding] = clean[:, padding : padding + 1]
        strength[:, :padding] = strength[:, padding : padding + 1]
        noise = torch.zeros_like(latents)
        if ((strength > 0) & (strength < 1)).any():
            noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        return AnchorLatents(clean.transpose(1, 2), strength, noise.transpose(1, 2))

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
        use_dynamic_cfg: bool = False,
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
                text-to-video, but with the anchor LoRA on. In CogVideoX 1.5, the two latent frames of a patch must be anchored together: frame 0
                fills its patch alone; any other anchor needs a second one among the 8 frames of its patch. A run of frames
                fills its patches with 8k + 1 frames starting at frame 0, or 8k starting at a frame 8j + 1.

        The other arguments are those of `__call__`. Returns only the frames.
        """
        request = self._request(locals())
        with self._running():
            return self._animate(request)[0]

    def _animate(self, request: VideoRequest) -> tuple[Any, list[torch.Tensor]]:
        with self._running() as progress:
            request.check_safety(self.safety_checker)
            self._guidance_scale, _ = request.guidance(self)
            self._attention_kwargs = request.attention_kwargs
            self._current_timestep = None
            # Noise is drawn before anchors are encoded, so that a seed gives the same noise with and without anchors.
            with progress.stage("encode"):
                prompt_embeds, negative_prompt_embeds = self._encode_texts(request)
                latents, device = request.latents, self._execution_device
                size = request.height, request.width, request.num_frames
                if latents is None:
                    shape = self._latents_shape(request.num_videos, request.num_frames, request.height, request.width)
                    latents = randn_tensor(shape, request.generator, device, torch.float32)
                latents = latents.to(device)
                anchors = None
                if request.anchors is not None and request.is_anchored:
                    anchors = self.encode_anchors(request.anchors, latents, *size, request.generator)
                    stop_unless_finite("encode", anchors.latents, self.vae.dtype)
            latents = self._denoise(request, progress, latents, prompt_embeds, negative_prompt_embeds, anchors)
            if request.output_type == "latent":
                return latents, []
            with progress.stage("decode"):
                decode = partial(self.decode, latents)
                return decode_anchored(decode, request.anchors, request.anchor_decode, request.output_type), []

    def _encode_texts(self, request: VideoRequest) -> list[torch.Tensor | None]:
        """Returns embeddings of prompts and negative prompts for each video; the latter are `None` without guidance."""
        device, dtype = self._execution_device, self.transformer.dtype
        # A fast tokenizer stores padding and truncation of its last call, so only one thread may use it.
        with exclusive(self.tokenizer):
            embeds = self.encode_prompt(
                request.motion_prompt or request.prompt,
                request.negative_prompt,
                do_classifier_free_guidance=self._guidance_scale > 1,
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
        """Runs the sampling loop from noise to clean latents `(B, f, C, h, w)`, including padding."""
        dtype, guidance_scale = self.transformer.dtype, self._guidance_scale
        scheduler = request.make_scheduler(self, latents.device)
        timesteps, training = scheduler.timesteps, training_sigmas(scheduler).to(latents.device)
        check_finite("scheduler.alphas_cumprod", training)
        # Noise levels of the steps, and the final level 0.
        sigmas = torch.cat([training[timesteps], training.new_zeros(1)])
        self._num_timesteps = len(timesteps)
        step = self._stepper(scheduler, request.generator)
        predict = self._predictor(request, latents, anchored=anchors is not None)

        with progress.stage("denoise", len(timesteps)) as report:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    break
                self._current_timestep = t
                if request.use_dynamic_cfg:
                    self._guidance_scale = dynamic_guidance(guidance_scale, float(t), len(timesteps))
                hidden_states, timestep = anchored_model_input(
                    latents.transpose(1, 2), sigmas[i], t.expand(len(latents)), anchors, training
                )
                inputs = {"hidden_states": hidden_states.transpose(1, 2).to(dtype), "timestep": timestep}
                prediction = predict("cond", prompt_embeds, inputs)
                if guidance_scale > 1:
                    unguided = predict("uncond", negative_prompt_embeds, inputs)
                    prediction = unguided + self._guidance_scale * (prediction - unguided)
                latents = step(prediction, i, latents)
                if anchors is not None:
                    latents = impose(anchors, latents.transpose(1, 2), sigmas[i + 1]).transpose(1, 2)
                tensors = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
                latents, prompt_embeds, negative_prompt_embeds = request.after_step(
                    self, i, t, latents=latents, **tensors
                )
                stop_unless_finite("denoise", latents, dtype, f"step {i + 1} of {len(timesteps)}")
                report(i + 1, len(timesteps))
        self._current_timestep = None
        return latents

    def _predictor(
        self, request: VideoRequest, latents: torch.Tensor, anchored: bool
    ) -> Callable[[str, torch.Tensor, dict[str, Any]], torch.Tensor]:
        """Returns `predict(branch, embeds, inputs)`, which computes the velocity."""
        adapters = self._adapter_scales(request.attention_kwargs, anchored)["transformer"]
        options = {
            "image_rotary_emb": self.transformer.rotary_embedding(
                latents.shape[1], *latents.shape[3:], device=latents.device
            ),
            "attention_kwargs": without_scale(request.attention_kwargs),
            "return_dict": False,
        }

        def predict(branch: str, embeds: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
            with adapters.applied(), self.transformer.cache_context(branch):
                return self.transformer(encoder_hidden_states=embeds, **inputs, **options)[0].float()

        return predict

    @staticmethod
    def _stepper(
        scheduler: CogVideoXDDIMScheduler | CogVideoXDPMScheduler, generator: Any
    ) -> Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]:
        """Returns `step(prediction, index, latents)`, which computes the next latents with either scheduler."""
        timesteps, clean = scheduler.timesteps, None

        def step(prediction: torch.Tensor, index: int, latents: torch.Tensor) -> torch.Tensor:
            nonlocal clean
            t = timesteps[index]
            if isinstance(scheduler, CogVideoXDPMScheduler):
                before = timesteps[index - 1] if index > 0 else None
                latents, clean = scheduler.step(
                    prediction, clean, t, before, latents, generator=generator, return_dict=False
                )
            else:
                latents = scheduler.step(prediction, t, latents, return_dict=False)[0]
            return latents.float()

        return step

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, output_type: str = "np"):
        """Decodes latents `(B, f, C, h, w)`, including padding, to frames, two latent frames at a time.

        `output_type="uint8"` returns a `np.ndarray` of shape `(B, F, H, W, 3)`.
        """
        check_latents(latents, (None, None, self.vae.config.latent_channels, None, None))
        # A video has an odd number of latent frames: one and pairs. So its padding is that of one latent frame.
        latents = latents[:, num_padding_frames(1, self.transformer.patch_size_t) :]
        latents = latents.to(get_module_execution_device(self.vae), dtype=self.vae.dtype)
        latents = 1 / self.vae_scaling_factor_image * latents.permute(0, 2, 1, 3, 4)
        with exclusive(self.vae):
            return decode_video(self.vae, latents, output_type)

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
        use_dynamic_cfg: bool = False,
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
        r"""Generates videos. Arguments are those of [`FactorizedVideoPipeline.__call__`], except for these:

        Args:
            num_frames (`int`, *optional*): 8k + 1. CogVideoX 1.5 was trained on 16k + 1.
            use_dynamic_cfg (`bool`, *optional*): whether guidance changes from step to step, see [`dynamic_guidance`].
            latents (`torch.Tensor` of shape `(B, f, C, h, w)`, *optional*): initial unit Gaussian noise, including padding.
            output_type (`str`, *optional*): `"latent"` returns `(B, f, C, h, w)`, including padding.
            preset (`str`, *optional*): a name in `pipe.presets`. When left out, the preset that matches `pipe.scheduler`; a
                scheduler that matches none is used as it is, with 50 steps and guidance 6 unless given.

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


def dynamic_guidance(guidance_scale: float, timestep: float, num_inference_steps: int) -> float:
    """Returns CogVideoX's dynamic guidance, `1 + scale * (1 - cos(pi * ((n - t) / n)^5)) / 2`, as its code and diffusers do.

    `t` is a timestep up to 999 and `n` the number of steps, so guidance jumps between 1 and `1 + scale` until the last steps.
    The authors of CogVideoX kept this for its effect on exposure (zai-org/CogVideo issue 267).
    """
    progress = (num_inference_steps - timestep) / num_inference_steps
    return 1 + guidance_scale * (1 - math.cos(math.pi * progress**5.0)) / 2
