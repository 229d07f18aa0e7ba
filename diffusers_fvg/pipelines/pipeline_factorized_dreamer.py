"""Factorized-Dreamer (arXiv 2408.10119): prompt -> first-frame and motion captions -> first frame -> video.

In stage 3, an image UNet with temporal layers ([`dreamer.unet`]) animates the first frame from a separate text, the motion
caption. Stages 1 and 2 are those of [`FactorizedVideoPipeline`].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin, StableDiffusionPipeline
from diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from transformers import (
    CLIPTextModel,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerBase,
    T5EncoderModel,
    UMT5EncoderModel,
)

from ..animate.anchor import Anchor, crop_and_resize
from ..animate.decoding import check_output_type, to_uint8
from ..checks import Generators, check_latents, check_size, stop_unless_finite
from ..compose.composer import AnchorComposer
from ..compose.judge import Judge
from ..devices import get_module_execution_device
from ..dreamer.components import check_components, check_embeds
from ..dreamer.conditions import decode_latents, embed_motion, image_conditions, resolve_first_frame
from ..dreamer.schedule import DREAMER_PRESETS
from ..dreamer.unet import FactorizedDreamerUNet
from ..locks import exclusive
from ..lora.scales import AdapterScales, without_scale
from ..rewrite.rewriter import FirstFrameRewriter
from ..schedules.presets import SchedulerPresets
from .output import FactorizedDreamerPipelineOutput
from .parts import with_optional_components
from .progress import StageProgress
from .request import AnchorResolver, Image, StepCallback, VideoRequest
from .stages import FactorizedStages


class FactorizedDreamerPipeline(
    FactorizedStages, StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin, DiffusionPipeline
):
    r"""Text to video in three stages: an LLM writes a caption of the first frame and one of the motion, a text-to-image model
    draws the frame, a video UNet animates it. Each stage is a public method that returns plain data: [`rewrite`],
    [`describe_motion`], [`compose`], [`animate`].

    Text encoding and LoRA loading are those of [`~diffusers.StableDiffusionPipeline`].

    Args:
        tokenizer (`PreTrainedTokenizerBase`): tokenizer of `text_encoder`.
        text_encoder (`CLIPTextModel`): text encoder of the image UNet.
        unet (`FactorizedDreamerUNet`): the video model.
        vae (`AutoencoderKL`): VAE of the image UNet.
        scheduler (`SchedulerMixin`): used when a call has no preset.
        tokenizer_2, text_encoder_2 (*optional*): T5 for the motion caption; needed if the UNet has `motion_embed_dim`.
        image_encoder (`CLIPVisionModelWithProjection`, *optional*): needed if the UNet has a `t2i_adapter`.
        rewriter (`FirstFrameRewriter`, *optional*): stage 1; not needed when `first_frame_prompt` or `image` is given.
        composer (`AnchorComposer`, *optional*): stage 2; not needed when `image` or `anchors` is given.
        anchor_judge (`AnchorJudge`, *optional*): chooses among several images of stage 2.
        schedulers (`SchedulerPresets`, *optional*): presets for `preset=`; `DREAMER_PRESETS` when left out.
        call_defaults (`dict`, *optional*): defaults of `height`, `width`, `num_frames`, `frame_rate`, `max_sequence_length`
            and `negative_prompt` in calls.

    Raises:
        `ValueError`: a component is missing or does not fit the UNet.
    """

    model_cpu_offload_seq = "rewriter->anchor_judge->composer->text_encoder->text_encoder_2->image_encoder->unet->vae"
    _optional_components = ["tokenizer_2", "text_encoder_2", "image_encoder"]
    _optional_components += ["rewriter", "composer", "anchor_judge", "schedulers"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    component_kinds = {
        "vae": ("AutoencoderKL", ("latent_channels",)),
        "text_encoder": ("CLIPTextModel", ("hidden_size",)),
    }
    default_presets = DREAMER_PRESETS
    own_guidance_scale = 7.5
    # 512 pixels and 16 frames are from the paper, 8 frames per second from Emu Video, arXiv 2311.10709.
    default_call = {"height": 512, "width": 512, "num_frames": 16, "frame_rate": 8, "max_sequence_length": 77}
    # The VAE encodes each frame as one latent frame.
    vae_scale_factor_temporal = 1
    pipeline_shim = "from diffusers_fvg import FactorizedDreamerPipeline  # noqa: F401\n"

    encode_prompt = StableDiffusionPipeline.encode_prompt

    @with_optional_components
    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: CLIPTextModel,
        unet: FactorizedDreamerUNet,
        vae: AutoencoderKL,
        scheduler: SchedulerMixin,
        tokenizer_2: PreTrainedTokenizerBase | None,
        text_encoder_2: T5EncoderModel | UMT5EncoderModel | None,
        image_encoder: CLIPVisionModelWithProjection | None,
        rewriter: FirstFrameRewriter | None,
        composer: AnchorComposer | None,
        anchor_judge: Judge | None,
        schedulers: SchedulerPresets | None,
        call_defaults: dict[str, Any] | None = None,
    ):
        super().__init__()
        check_components(unet, vae, text_encoder, text_encoder_2, tokenizer_2, image_encoder)
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            unet=unet,
            vae=vae,
            scheduler=scheduler,
            tokenizer_2=tokenizer_2,
            text_encoder_2=text_encoder_2,
            image_encoder=image_encoder,
        )
        parts = {"rewriter": rewriter, "composer": composer, "anchor_judge": anchor_judge, "schedulers": schedulers}
        self._add_stages(parts, call_defaults)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def transformer(self) -> FactorizedDreamerUNet:
        """The video model, under the name that the shared stages use."""
        return self.unet

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    # -- methods that FactorizedStages requires -----------------------------------------------------------------------

    def _frame_step(self) -> int:
        return 1

    def _check_size(self, height: int, width: int) -> None:
        check_size("height", height, self.vae_scale_factor)
        check_size("width", width, self.vae_scale_factor)

    def _check_own(self, request: VideoRequest) -> None:
        if request.mode == "storyboard":
            raise ValueError('This model takes a first frame only and does not support `mode="storyboard"`.')
        config = self.unet.config
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            pair = getattr(request, name), getattr(request, f"{name}_2")
            check_embeds(name, *pair, request.num_prompts, config.motion_embed_dim)
        if request.fps is not None and not config.fps_conditioning:
            raise ValueError(f"`fps={request.fps}` was given, but the UNet has no `fps_conditioning`; leave it out.")
        sampling = request.sampling(self)
        scheduler = type(self.scheduler).__name__ if sampling is None else sampling.scheduler_class
        if scheduler == "CogVideoXDPMScheduler":
            raise ValueError(f"{scheduler} has a different `step`; use CogVideoXDDIMScheduler or DDIMScheduler.")

    def _anchor_resolver(self) -> AnchorResolver:
        return partial(resolve_first_frame, unet_config=self.unet.config)

    def _windows(self, num_frames: int) -> tuple[int, int]:
        """Returns the number of windows and the frames of each. Later windows repeat the last frame of the previous one."""
        length = self.unet.config.num_frames
        return (1, num_frames) if num_frames <= length else (math.ceil((num_frames - 1) / (length - 1)), length)

    def _latents_shape(self, num_videos: int, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        return (
            num_videos,
            self.unet.config.in_channels,
            math.prod(self._windows(num_frames)),
            height // self.vae_scale_factor,
            width // self.vae_scale_factor,
        )

    # -- stage 3 ------------------------------------------------------------------------------------------------------

    def encode_anchors(self, anchors: list[list[Anchor]], height: int, width: int) -> dict[str, torch.Tensor]:
        """Returns the UNet's inputs for the first frames, from one list with at most one anchor for each video.

        Returns:
            `dict`: arguments of the UNet: `image_mask`, and `image_latents` and `image_embeds` if its config uses them.
        """
        # Videos of one prompt share their image, so each image is encoded once.
        pictures = {id(anchor.image): anchor.image for video in anchors for anchor in video}
        pixels = torch.stack([crop_and_resize(image, height, width) for image in pictures.values()])
        device = self._execution_device
        numbers = {key: number for number, key in enumerate(pictures)}
        index = torch.tensor([numbers[id(video[0].image)] if video else 0 for video in anchors], device=device)
        conditions = image_conditions(self.unet.config, self.vae, self.image_encoder, pixels)
        conditions = {name: value.to(device)[index] for name, value in conditions.items()}
        return conditions | {"image_mask": torch.tensor([float(bool(video)) for video in anchors], device=device)}

    def _next_anchor(self, latents: torch.Tensor) -> dict[str, torch.Tensor]:
        """Makes the last frame the anchor of the next window. Its latents are reused: encoding it again would blur it."""
        last = latents[:, :, -1]
        pixels = decode_latents(self.vae, last.to(get_module_execution_device(self.vae)))
        conditions = image_conditions(self.unet.config, self.vae, self.image_encoder, pixels, last)
        return {name: value.to(last.device) for name, value in conditions.items()}

    def encode_motion(self, texts: list[str], max_sequence_length: int) -> torch.Tensor | None:
        """Returns T5 embeddings of motion captions, `(B, max_sequence_length, motion_embed_dim)`; `None` if not used."""
        if self.unet.config.motion_embed_dim is None:
            return None
        device = self._execution_device
        with exclusive(self.tokenizer_2):
            return embed_motion(self.text_encoder_2, self.tokenizer_2, texts, max_sequence_length, device)

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
        guidance_rescale: float = 0.7,
        num_videos_per_prompt: int = 1,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        prompt_embeds_2: torch.Tensor | None = None,
        negative_prompt_embeds_2: torch.Tensor | None = None,
        output_type: str = "np",
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        preset: str | None = None,
        fps: float | None = None,
    ):
        """Stage 3: generates a video of each prompt that starts with its anchor; without anchors, plain text-to-video.

        Args:
            prompts (`str` or `list[str]`, *optional*): motion captions; or give `prompt_embeds`.
            anchors (`Anchor`, `list[Anchor]` or `list[list[Anchor]]`, *optional*): one list for all videos, one per prompt,
                or one per video, each with one anchor at frame 0.

        The other arguments are those of `__call__`. Returns only the frames.
        """
        request = self._request(locals())
        with self._running():
            return self._animate(request)[0]

    def _writes_motion(self, request: VideoRequest) -> bool:
        return request.mode == "factorized" and request.motion_prompt is None and request.first_frame_prompt is None

    def _animate(self, request: VideoRequest) -> tuple[Any, list[torch.Tensor]]:
        with self._running() as progress:
            request.check_safety(self.safety_checker)
            self._guidance_scale, _ = request.guidance(self)
            # Noise is drawn before anchors are encoded, so that a seed gives the same noise with and without anchors.
            with progress.stage("encode"):
                device, latents = self._execution_device, request.latents
                texts = self._encode_texts(request, device)
                if latents is None:
                    shape = self._latents_shape(request.num_videos, request.num_frames, request.height, request.width)
                    latents = randn_tensor(shape, request.generator, device, torch.float32)
                conditions = {}
                if request.anchors is not None and request.is_anchored:
                    conditions = self.encode_anchors(request.anchors, request.height, request.width)
                for encoded in (*texts.values(), *conditions.values()):
                    if encoded is not None:
                        stop_unless_finite("encode", encoded)
            latents = self._denoise(request, progress, latents.to(device), texts, conditions)
            if request.output_type == "latent":
                return latents, []
            with progress.stage("decode"):
                return self.decode(latents, request.output_type), []

    def _encode_texts(self, request: VideoRequest, device: torch.device) -> dict[str, torch.Tensor | None]:
        """Returns the embeddings for each video: CLIP's `prompt_embeds`, T5's `prompt_embeds_2`, and both negative ones."""
        texts = request.motion_prompt or request.prompt
        guided, length = self._guidance_scale > 1, request.max_sequence_length
        motion, unguided = request.prompt_embeds_2, request.negative_prompt_embeds_2
        if motion is None:
            motion = self.encode_motion(texts or [], length)
        if unguided is None and guided:
            unguided = self.encode_motion(request.negative_prompt or [""] * request.num_prompts, length)
        adapters = AdapterScales(self.text_encoder, (request.attention_kwargs or {}).get("scale", 1.0))
        # A fast tokenizer stores padding and truncation of its last call, so only one thread may use it.
        with exclusive(self.tokenizer, self.text_encoder), adapters.applied():
            embeds = self.encode_prompt(
                texts,
                device,
                request.num_videos_per_prompt,
                guided,
                request.negative_prompt,
                prompt_embeds=request.prompt_embeds,
                negative_prompt_embeds=request.negative_prompt_embeds,
            )
        motion, unguided = (
            tokens if tokens is None else tokens.to(device).repeat_interleave(request.num_videos_per_prompt, 0)
            for tokens in (motion, unguided)
        )
        names = ("prompt_embeds", "negative_prompt_embeds", "prompt_embeds_2", "negative_prompt_embeds_2")
        return dict(zip(names, (*embeds, motion, unguided)))

    def _denoise(
        self,
        request: VideoRequest,
        progress: StageProgress,
        latents: torch.Tensor,
        texts: dict[str, torch.Tensor | None],
        conditions: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Runs the sampling loop of one window after the other, from noise to clean latents `(B, C, F, h, w)`."""
        num_windows, window_length = self._windows(request.num_frames)
        dtype = self.unet.dtype
        noise, made = latents.split(window_length, dim=2), []
        steps = request.steps(self)
        with progress.stage("denoise", num_windows * steps) as report:
            for window, latents in enumerate(noise):
                scheduler = request.make_scheduler(self, latents.device)
                latents = latents * scheduler.init_noise_sigma
                self._num_timesteps = num_windows * len(scheduler.timesteps)
                predict = self._predictor(request, len(latents), conditions)
                for i, t in enumerate(scheduler.timesteps, start=window * len(scheduler.timesteps)):
                    if self.interrupt:
                        break
                    sample = scheduler.scale_model_input(latents, t).to(dtype)
                    prediction = predict(sample, t, texts)
                    latents = scheduler.step(prediction, t, latents, return_dict=False)[0].float()
                    named = {name: texts[name] for name in ("prompt_embeds", "negative_prompt_embeds")}
                    latents, texts["prompt_embeds"], texts["negative_prompt_embeds"] = request.after_step(
                        self, i, t, latents=latents, **named
                    )
                    stop_unless_finite("denoise", latents, dtype, f"step {i + 1} of {self._num_timesteps}")
                    report(i + 1, self._num_timesteps)
                # The first frame of a later window is the last frame of the previous one.
                made.append(latents if window == 0 else latents[:, :, 1:])
                if self.interrupt:
                    break
                if window + 1 < num_windows:
                    conditions = self._next_anchor(latents)
        return torch.cat(made, dim=2)[:, :, : request.num_frames]

    def _predictor(
        self, request: VideoRequest, num_videos: int, conditions: dict[str, torch.Tensor]
    ) -> Callable[..., torch.Tensor]:
        """Returns `predict(sample, t, texts)` for one window: the prediction with guidance by the text (not the image)."""
        fps = request.fps
        if self.unet.config.fps_conditioning:
            fps = self.call_defaults["frame_rate"] if fps is None else fps
            fps = torch.full((num_videos,), float(fps), device=self._execution_device)
        # The layers' projections of image and text do not change between steps, so they are cached.
        options = {"fps": fps, "image_cache": {}, "return_dict": False, **conditions}
        options["cross_attention_kwargs"] = without_scale(request.attention_kwargs)
        caches: dict[str, dict] = {"": {}, "negative_": {}}
        adapters = self._adapter_scales(request.attention_kwargs, anchored=True)["transformer"]

        def branch(kind: str, sample: torch.Tensor, t: torch.Tensor, texts: dict[str, torch.Tensor]) -> torch.Tensor:
            with adapters.applied():
                return self.unet(
                    sample=sample,
                    timestep=t,
                    encoder_hidden_states=texts[f"{kind}prompt_embeds"].to(sample.dtype),
                    motion_embeds=texts[f"{kind}prompt_embeds_2"],
                    motion_cache=caches[kind],
                    **options,
                )[0].float()

        def predict(sample: torch.Tensor, t: torch.Tensor, texts: dict[str, torch.Tensor]) -> torch.Tensor:
            prediction = branch("", sample, t, texts)
            if self._guidance_scale <= 1:
                return prediction
            unguided = branch("negative_", sample, t, texts)
            wanted = unguided + self._guidance_scale * (prediction - unguided)
            return rescale_noise_cfg(wanted, prediction, request.guidance_rescale)

        return predict

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, output_type: str = "np"):
        """Decodes latents `(B, C, F, h, w)` to frames."""
        check_output_type(output_type)
        check_latents(latents, (None, self.vae.config.latent_channels, None, None, None))
        frames = latents.transpose(1, 2).flatten(0, 1).to(get_module_execution_device(self.vae))
        decoded = decode_latents(self.vae, frames)
        stop_unless_finite("decode", decoded, self.vae.dtype)
        video = decoded.unflatten(0, (latents.shape[0], -1)).transpose(1, 2)
        if output_type == "uint8":
            return to_uint8(video).permute(0, 2, 3, 4, 1).numpy()
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
        guidance_rescale: float = 0.7,
        num_videos_per_prompt: int = 1,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        prompt_embeds_2: torch.Tensor | None = None,
        negative_prompt_embeds_2: torch.Tensor | None = None,
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
        fps: float | None = None,
        rewriter_max_new_tokens: int | None = None,
        composer_num_inference_steps: int | None = None,
        composer_guidance_scale: float | None = None,
        composer_negative_prompt: str | list[str] | None = None,
        composer_num_candidates: int | None = None,
        motion_retries: int = 0,
        callback_on_stage_step: Callable | None = None,
    ) -> FactorizedDreamerPipelineOutput | tuple:
        r"""Generates videos. Arguments are those of [`FactorizedVideoPipeline.__call__`], except for these:

        Args:
            num_frames (`int`, *optional*): any number. More frames than the UNet's `num_frames` are generated in windows, each
                anchored at the last frame of the previous one; surplus frames of the last window are dropped.
            guidance_rescale (`float`): in [0, 1], how far the standard deviation of the guided prediction is rescaled to that
                of the conditional one (arXiv 2305.08891, section 3.4). Guidance is by the text only: both predictions get the
                image.
            latents (`torch.Tensor` of shape `(B, C, F, h, w)`, *optional*): initial unit Gaussian noise; the noise of all
                windows one after the other, each with all of its frames.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor`, *optional*): CLIP embeddings.
            prompt_embeds_2, negative_prompt_embeds_2 (`torch.Tensor`, *optional*): T5 embeddings, zero at padding.
            output_type (`str`, *optional*): `"latent"` returns `(B, C, F, h, w)`.
            preset (`str`, *optional*): a name in `pipe.presets`. When left out, the preset that matches `pipe.scheduler`; a
                scheduler that matches none is used as it is, with 50 steps and guidance 7.5 unless given.
            mode (`str`): `"direct"` generates a video without a first frame; the UNet was trained with dropped images.
            motion_prompt (`str` or `list[str]`, *optional*): motion captions, which the video model follows. When left out,
                the rewriter writes them if it also writes the first-frame captions; otherwise `prompt` is used.
            anchors (*optional*): one anchor at frame 0 for each video, with strength 1.
            fps (`float`, *optional*): frame rate of the motion, for a UNet with `fps_conditioning`; `frame_rate` of the call
                defaults when left out.

        Returns:
            [`FactorizedDreamerPipelineOutput`] or `tuple`.

        Raises:
            `ValueError`: an argument is not valid; raised before any model runs.
            `FloatingPointError`: a stage gave values that are not finite.
        """
        request = self._request(locals())
        moments = images = candidates = None
        with self._running(callback_on_stage_step) as progress:
            request, seeds = request.with_generator()
            if request.draws_anchors:
                # Stage 1: a language model describes the first frame, and the motion
                moments = self._write_moments(request)
                request = self._write_motion(request, moments)
                # Stage 2: a text-to-image model draws the frame
                images, candidates, request = self._draw_moments(request, moments, seeds)
            # Stage 3: the video model animates it
            told = request.motion_prompt or (None if self.interrupt else request.prompt)
            frames, motion = ([], None) if self.interrupt else request.animate_moving(self, seeds)
            made = (self, frames, moments, images, seeds, progress.timings)
            judged: dict[str, Any] = {"motion": motion, "candidates": candidates}
            return request.output(*made, FactorizedDreamerPipelineOutput, motion_prompts=told, **judged)
