"""Factorized-Dreamer (arXiv 2408.10119): prompt -> first-frame and motion captions -> first frame -> video.

The second system: an image UNet with temporal layers ([`dreamer.unet`]) animates the first frame after a text of its own, the
motion caption. Stages 1 and 2 are those of [`FactorizedVideoPipeline`].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

from ..animate.anchor import Anchor, crop_and_resize, pictures_of
from ..checks import check_size, check_texts, stop_unless_finite
from ..compose.composer import AnchorComposer
from ..devices import get_module_execution_device
from ..dreamer.conditions import decode_latents, embed_images, embed_motion, encode_pixels
from ..dreamer.schedule import DREAMER_PRESETS
from ..dreamer.unet import FactorizedDreamerUNet
from ..locks import exclusive
from ..lora.scales import AdapterScales, without_scale
from ..rewrite.rewriter import FirstFrameRewriter
from ..schedules.presets import SchedulerPresets
from .output import FactorizedVideoPipelineOutput
from .stages import FactorizedStages, Image, StepCallback


@dataclass
class FactorizedDreamerPipelineOutput(FactorizedVideoPipelineOutput):
    """What every stage made.

    Args:
        frames, first_frame_prompts, anchor_images, seeds, timings, storyboards: of [`FactorizedVideoPipelineOutput`].
        motion_prompts (`list[str]` or `None`): what the video model was told, one per prompt; `None` for embeddings.
    """

    motion_prompts: list[str] | None = None


class FactorizedDreamerPipeline(
    FactorizedStages, StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin, DiffusionPipeline
):
    r"""Text to video in three stages: an LLM writes a caption of the first frame and one of the motion, a text-to-image model
    draws the frame, a video UNet animates it. Each stage is a public method that returns plain data: [`rewrite`],
    [`describe_motion`], [`compose`], [`animate`].

    Text encoding and LoRA loading are those of [`~diffusers.StableDiffusionPipeline`].

    Args:
        tokenizer (`PreTrainedTokenizerBase`): of `text_encoder`.
        text_encoder (`CLIPTextModel`): the image UNet's.
        unet (`FactorizedDreamerUNet`): the video model.
        vae (`AutoencoderKL`): the image UNet's.
        scheduler (`SchedulerMixin`): used when no preset is asked for.
        tokenizer_2, text_encoder_2 (*optional*): T5 of the motion's text; needed where the UNet has `motion_embed_dim`.
        image_encoder (`CLIPVisionModelWithProjection`, *optional*): needed where the UNet has a `t2i_adapter`.
        rewriter (`FirstFrameRewriter`, *optional*): stage 1; not needed when `first_frame_prompt` or `image` is given.
        composer (`AnchorComposer`, *optional*): stage 2; not needed when `image` or `anchors` is given.
        schedulers (`SchedulerPresets`, *optional*): what `preset=` selects from; `DREAMER_PRESETS` when absent.
        call_defaults (`dict`, *optional*): `height`, `width`, `num_frames`, `frame_rate`, `max_sequence_length` and
            `negative_prompt` of the model, used where a call leaves them out.

    Raises:
        `ValueError`: a component that is missing or does not fit the UNet.
    """

    model_cpu_offload_seq = "rewriter->composer->text_encoder->text_encoder_2->image_encoder->unet->vae"
    _optional_components = [
        "tokenizer_2",
        "text_encoder_2",
        "image_encoder",
        "rewriter",
        "composer",
        "schedulers",
    ]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    default_presets = DREAMER_PRESETS
    # 512 pixels and 16 frames are the paper's, 8 frames per second those of Emu Video's, arXiv 2311.10709.
    default_call = {"height": 512, "width": 512, "num_frames": 16, "frame_rate": 8, "max_sequence_length": 77}
    # A frame is a latent.
    vae_scale_factor_temporal = 1
    pipeline_shim = "from diffusers_fvg import FactorizedDreamerPipeline  # noqa: F401\n"

    encode_prompt = StableDiffusionPipeline.encode_prompt
    check_inputs = StableDiffusionPipeline.check_inputs

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
            rewriter=rewriter,
            composer=composer,
            schedulers=schedulers,
        )
        self.register_to_config(call_defaults=call_defaults)
        self._interrupt = False
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def transformer(self) -> FactorizedDreamerUNet:
        """The video model, as the shared stages call it."""
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

    # -- what FactorizedStages asks of a model ------------------------------------------------------------------------

    def _frame_step(self) -> int:
        return 1

    def _check_size(self, height: int, width: int) -> None:
        check_size("height", height, self.vae_scale_factor)
        check_size("width", width, self.vae_scale_factor)

    def _check_stock_inputs(self, prompts: list[str] | None, inputs: dict[str, Any]) -> None:
        # Embeddings against prompts, tensor names of the callback.
        self.check_inputs(
            prompts,
            inputs["height"],
            inputs["width"],
            None,
            inputs["negative_prompt"],
            inputs["prompt_embeds"],
            inputs["negative_prompt_embeds"],
            callback_on_step_end_tensor_inputs=inputs["callback_on_step_end_tensor_inputs"],
        )
        config, motion = self.unet.config, inputs["motion_prompt"]
        num_prompts = len(prompts) if prompts is not None else inputs["prompt_embeds"].shape[0]
        if motion is not None:
            check_texts("motion_prompt", motion)
            if prompts is None:
                raise ValueError(
                    "Only one of `motion_prompt` and `prompt_embeds` can be used: both are the video's text."
                )
            if len(motion) != num_prompts:
                raise ValueError(f"`motion_prompt` has {len(motion)} texts for {num_prompts} prompts.")
        for name, other in (
            ("prompt_embeds_2", "prompt_embeds"),
            ("negative_prompt_embeds_2", "negative_prompt_embeds"),
        ):
            embeds = inputs[name]
            if config.motion_embed_dim is not None and (embeds is None) != (inputs[other] is None):
                raise ValueError(f"`{other}` are of CLIP and `{name}` of T5; give both or none.")
            if embeds is not None and (
                embeds.ndim != 3 or embeds.shape[::2] != (num_prompts, config.motion_embed_dim)
            ):
                raise ValueError(
                    f"`{name}` has shape {tuple(embeds.shape)}, but this call needs ({num_prompts}, tokens, "
                    f"{config.motion_embed_dim})."
                )
        if inputs["fps"] is not None and not config.fps_conditioning:
            raise ValueError(f"`fps={inputs['fps']}` was given, but the UNet has no `fps_conditioning`; leave it out.")
        sampling = self._sampling(inputs["preset"])
        scheduler = type(self.scheduler).__name__ if sampling is None else sampling.scheduler_class
        if scheduler == "CogVideoXDPMScheduler":
            raise ValueError(f"{scheduler} steps in a way of its own; use CogVideoXDDIMScheduler or DDIMScheduler.")

    def _check_anchors(self, anchors: list[Anchor], num_frames: int) -> None:
        if anchors and self.unet.config.paca is None and self.unet.config.t2i_adapter is None:
            raise ValueError(
                'The UNet has neither `paca` nor `t2i_adapter`, so it takes no first frame; use `mode="direct"`.'
            )
        for anchor in anchors:
            if len(pictures_of(anchor.image)) > 1:
                raise ValueError(
                    "This model takes one picture as its first frame, but the anchor is a run of several."
                )
            if anchor.frame_index not in (0, -num_frames):
                raise ValueError(
                    f"Anchor at `frame_index={anchor.frame_index}`: this model takes a first frame only; use 0."
                )
            if anchor.strength != 1:
                raise ValueError(
                    f"Anchor `strength={anchor.strength}`: this model takes a fixed first frame only; use 1."
                )
        if len(anchors) > 1:
            raise ValueError(f"This model takes one anchor, its first frame, but got {len(anchors)}.")

    def _windows(self, num_frames: int) -> tuple[int, int]:
        """Number of windows and frames of each. Every window after the first repeats the last frame of the one before."""
        length = self.unet.config.num_frames
        return (1, num_frames) if num_frames <= length else (math.ceil((num_frames - 1) / (length - 1)), length)

    def _latents_shape(self, num_videos: int, inputs: dict[str, Any]) -> tuple[int, ...]:
        return (
            num_videos,
            self.unet.config.in_channels,
            math.prod(self._windows(inputs["num_frames"])),
            inputs["height"] // self.vae_scale_factor,
            inputs["width"] // self.vae_scale_factor,
        )

    # -- stage 1, its second output -----------------------------------------------------------------------------------

    @torch.no_grad()
    def describe_motion(self, prompts: str | list[str], max_new_tokens: int | None = None) -> list[str]:
        """Stage 1, second output: writes a short caption of the motion for each prompt.

        Args:
            prompts (`str` or `list[str]`): what should happen in the videos.
            max_new_tokens (`int`, *optional*): limit of the answer; the rewriter's own when left out.

        Returns:
            `list[str]`: one caption per prompt.
        """
        return self._ask_rewriter("describe_motion", "describe_motion", prompts, max_new_tokens=max_new_tokens)

    # -- stage 3 ------------------------------------------------------------------------------------------------------

    def encode_anchors(self, anchors: list[list[Anchor]], height: int, width: int) -> dict[str, torch.Tensor]:
        """What the UNet is told of the first frame of each video, given one list of at most one anchor for each.

        Returns:
            `dict`: arguments of the UNet: `image_mask`, and those that its designs take of `image_latents` and `image_embeds`.
        """
        # Videos of one prompt share their picture: each is encoded once.
        pictures = {id(anchor.image): anchor.image for video in anchors for anchor in video}
        pixels = torch.stack([crop_and_resize(image, height, width) for image in pictures.values()])
        device = self._execution_device
        numbers = {key: number for number, key in enumerate(pictures)}
        index = torch.tensor([numbers[id(video[0].image)] if video else 0 for video in anchors], device=device)
        conditions = self._image_conditions(pixels)
        conditions = {name: value.to(device)[index] for name, value in conditions.items()}
        return conditions | {"image_mask": torch.tensor([float(bool(video)) for video in anchors], device=device)}

    def _image_conditions(
        self, pixels: torch.Tensor, image_latents: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Of pictures `(N, 3, H, W)` in [-1, 1], whose latents may be known."""
        conditions = {}
        if self.unet.config.paca is not None:
            if image_latents is None:
                image_latents = encode_pixels(self.vae, pixels.to(get_module_execution_device(self.vae)))
            conditions["image_latents"] = image_latents
        if self.unet.config.t2i_adapter is not None:
            device = get_module_execution_device(self.image_encoder)
            conditions["image_embeds"] = embed_images(self.image_encoder, pixels.to(device))
        return conditions

    def _next_anchor(self, latents: torch.Tensor) -> dict[str, torch.Tensor]:
        """The last frame as the anchor of the next window. Its latents are not decoded and encoded again, which would blur."""
        last = latents[:, :, -1]
        pixels = decode_latents(self.vae, last.to(get_module_execution_device(self.vae)))
        return {name: value.to(last.device) for name, value in self._image_conditions(pixels, last).items()}

    def encode_motion(self, texts: list[str], max_sequence_length: int) -> torch.Tensor | None:
        """T5 tokens of the motion's text, `(B, max_sequence_length, motion_embed_dim)`, or `None` for a UNet without."""
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
        generator: torch.Generator | list[torch.Generator] | None = None,
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
        """Stage 3: makes a video of each prompt that begins with its anchor; plain text-to-video without any.

        Args:
            prompts (`str` or `list[str]`, *optional*): captions of the motion; or give `prompt_embeds`.
            anchors (`Anchor`, `list[Anchor]` or `list[list[Anchor]]`, *optional*): one list for all videos, one per prompt,
                or one per video, with one anchor at frame 0 in each.

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
            "guidance_rescale": guidance_rescale,
            "num_videos_per_prompt": num_videos_per_prompt,
            "generator": generator,
            "latents": latents,
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "prompt_embeds_2": prompt_embeds_2,
            "negative_prompt_embeds_2": negative_prompt_embeds_2,
            "output_type": output_type,
            "attention_kwargs": attention_kwargs,
            "callback_on_step_end": callback_on_step_end,
            "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs,
            "max_sequence_length": max_sequence_length,
            "preset": preset,
            "fps": fps,
            "motion_prompt": None,
            "write_motion_prompt": False,
            "rewriter_max_new_tokens": None,
        }
        with self._running():
            return self._animate(**self._video_inputs(prompts, anchors, inputs))[0]

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
        guidance_rescale: float,
        num_videos_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        prompt_embeds_2: torch.Tensor | None,
        negative_prompt_embeds_2: torch.Tensor | None,
        output_type: str,
        attention_kwargs: dict[str, Any] | None,
        callback_on_step_end: StepCallback | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
        max_sequence_length: int,
        preset: str | None,
        fps: float | None,
        motion_prompt: list[str] | None,
        write_motion_prompt: bool,
        rewriter_max_new_tokens: int | None,
    ) -> tuple[Any, list[str] | None]:
        """Frames, and the captions of the motion that they follow."""
        if self.safety_checker is not None and anchors is not None:
            self._check_safety(anchors, num_videos_per_prompt)
        sampling = self._sampling(preset)
        if guidance_scale is None:
            guidance_scale = 7.5 if sampling is None else sampling.guidance_scale
        self._guidance_scale = guidance_scale

        with self._running() as progress:
            if write_motion_prompt:
                motion_prompt = self.describe_motion(prompts, rewriter_max_new_tokens)
            if self.interrupt:
                return [], motion_prompt
            texts = prompts if motion_prompt is None else motion_prompt
            device, dtype = self._execution_device, self.unet.dtype

            # 1. Encode texts, then draw noise, then encode anchors: a seed means the same noise with and without them
            with progress.stage("encode"):
                guided, scale = guidance_scale > 1, (attention_kwargs or {}).get("scale", 1.0)
                motion = prompt_embeds_2
                if motion is None:
                    motion = self.encode_motion(texts, max_sequence_length)
                unguided_motion = negative_prompt_embeds_2
                if unguided_motion is None and guided:
                    num_prompts = len(texts) if texts is not None else prompt_embeds.shape[0]
                    unguided_motion = self.encode_motion(negative_prompt or [""] * num_prompts, max_sequence_length)
                # A fast tokenizer keeps padding and truncation of its last call.
                adapters = AdapterScales(self.text_encoder, scale).applied
                with exclusive(self.tokenizer, self.text_encoder), adapters():
                    prompt_embeds, negative_prompt_embeds = self.encode_prompt(
                        texts,
                        device,
                        num_videos_per_prompt,
                        guided,
                        negative_prompt,
                        prompt_embeds=prompt_embeds,
                        negative_prompt_embeds=negative_prompt_embeds,
                    )
                motion, unguided_motion = (
                    tokens if tokens is None else tokens.to(device).repeat_interleave(num_videos_per_prompt, 0)
                    for tokens in (motion, unguided_motion)
                )
                num_videos = prompt_embeds.shape[0]
                shape = self._latents_shape(num_videos, {"num_frames": num_frames, "height": height, "width": width})
                if latents is None:
                    latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
                conditions = {}
                if anchors is not None and any(anchors):
                    conditions = self.encode_anchors(anchors, height, width)
                for encoded in (prompt_embeds, negative_prompt_embeds, motion, unguided_motion, *conditions.values()):
                    if encoded is not None:
                        stop_unless_finite("encode", encoded)
                if self.unet.config.fps_conditioning:
                    fps = torch.full((num_videos,), float(self._default("frame_rate", fps)), device=device)

            # 2. Denoising, window after window
            num_windows, window_length = self._windows(num_frames)
            noise, made = latents.to(device).split(window_length, dim=2), []
            steps = num_inference_steps or (50 if sampling is None else sampling.num_inference_steps)
            scaled = self._adapter_scales(attention_kwargs, anchored=True)["transformer"].applied
            with progress.stage("denoise", num_windows * steps) as report:
                for window, latents in enumerate(noise):
                    if sampling is None:
                        scheduler = self._own_scheduler(steps, device)
                    else:
                        scheduler = sampling.make_scheduler(steps, device)
                    latents = latents * scheduler.init_noise_sigma
                    self._num_timesteps = num_windows * len(scheduler.timesteps)
                    image_cache: dict[str, Any] = {}
                    motion_caches: tuple[dict, dict] = ({}, {})
                    for i, t in enumerate(scheduler.timesteps, start=window * len(scheduler.timesteps)):
                        if self.interrupt:
                            break
                        inputs = {
                            "sample": scheduler.scale_model_input(latents, t).to(dtype),
                            "timestep": t,
                            "fps": fps,
                            "image_cache": image_cache,
                            "cross_attention_kwargs": without_scale(attention_kwargs),
                            "return_dict": False,
                            **conditions,
                        }
                        with scaled():
                            prediction = self.unet(
                                encoder_hidden_states=prompt_embeds.to(dtype),
                                motion_embeds=motion,
                                motion_cache=motion_caches[0],
                                **inputs,
                            )[0].float()
                        if guided:
                            # The image stays in the branch without text.
                            with scaled():
                                unguided = self.unet(
                                    encoder_hidden_states=negative_prompt_embeds.to(dtype),
                                    motion_embeds=unguided_motion,
                                    motion_cache=motion_caches[1],
                                    **inputs,
                                )[0].float()
                            wanted = unguided + guidance_scale * (prediction - unguided)
                            prediction = rescale_noise_cfg(wanted, prediction, guidance_rescale)
                        latents = scheduler.step(prediction, t, latents, return_dict=False)[0].float()

                        if callback_on_step_end is not None:
                            callback_kwargs = {}
                            for name in callback_on_step_end_tensor_inputs:
                                callback_kwargs[name] = locals()[name]
                            changed = callback_on_step_end(self, i, t, callback_kwargs)
                            latents = changed.pop("latents", latents)
                            prompt_embeds = changed.pop("prompt_embeds", prompt_embeds)
                            negative_prompt_embeds = changed.pop("negative_prompt_embeds", negative_prompt_embeds)
                        step = f"step {i + 1} of {self._num_timesteps}"
                        stop_unless_finite("denoise", latents, dtype, step)
                        report(i + 1, self._num_timesteps)
                    # Its first frame is the last one of the window before.
                    made.append(latents if window == 0 else latents[:, :, 1:])
                    if self.interrupt:
                        break
                    if window + 1 < num_windows:
                        conditions = self._next_anchor(latents)
            latents = torch.cat(made, dim=2)[:, :, :num_frames]

            # 3. Decode
            if output_type == "latent":
                return latents, texts
            with progress.stage("decode"):
                return self.decode(latents, output_type), texts

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, output_type: str = "np"):
        """Latents `(B, C, F, h, w)` to frames."""
        frames = latents.transpose(1, 2).flatten(0, 1).to(get_module_execution_device(self.vae))
        decoded = decode_latents(self.vae, frames)
        stop_unless_finite("decode", decoded, self.vae.dtype)
        video = decoded.unflatten(0, (latents.shape[0], -1)).transpose(1, 2)
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
        generator: torch.Generator | list[torch.Generator] | None = None,
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
        callback_on_stage_step: Callable | None = None,
    ) -> FactorizedDreamerPipelineOutput | tuple:
        r"""Generates videos. Arguments are those of [`FactorizedVideoPipeline.__call__`], except for these:

        Args:
            num_frames (`int`, *optional*): any number. More than the UNet's `num_frames` are made in windows, each anchored at
                the last frame of the one before; what the last window makes past the end is left out.
            guidance_rescale (`float`): how far the guided prediction is brought back to the spread of the unguided one
                (arXiv 2305.08891, section 3.4). Guidance is to text alone: the image stays in both branches.
            latents (`torch.Tensor` of shape `(B, C, F, h, w)`, *optional*): unit Gaussian start; all windows' one after the
                other, each with all of its frames.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor`, *optional*): CLIP's.
            prompt_embeds_2, negative_prompt_embeds_2 (`torch.Tensor`, *optional*): T5's, zero where padded.
            output_type (`str`, *optional*): `"latent"` gives `(B, C, F, h, w)`.
            preset (`str`, *optional*): a name in `pipe.presets`. Left out: the preset that `pipe.scheduler` belongs to; a
                scheduler of your own runs as it is, with 50 steps and guidance 7.5 unless given.
            mode (`str`): `"direct"` makes a video without a first frame, which the UNet knows from dropped images.
            motion_prompt (`str` or `list[str]`, *optional*): captions of the motion, which the video model follows. Left out:
                the rewriter's when it also writes the first frame's, else `prompt` itself.
            anchors (*optional*): one at frame 0 for each video, of strength 1.
            fps (`float`, *optional*): frames per second that the motion is made for, where the UNet has `fps_conditioning`;
                `frame_rate` of the call defaults when left out.

        Returns:
            [`FactorizedDreamerPipelineOutput`] or `tuple`.

        Raises:
            `ValueError`: bad input, before any model runs.
        """
        motion_prompt = [motion_prompt] if isinstance(motion_prompt, str) else motion_prompt
        first_frames = (first_frame_prompt, image, anchors)
        inputs = {
            "negative_prompt": negative_prompt,
            "height": height,
            "width": width,
            "num_frames": num_frames,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "guidance_rescale": guidance_rescale,
            "num_videos_per_prompt": num_videos_per_prompt,
            "generator": generator,
            "latents": latents,
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "prompt_embeds_2": prompt_embeds_2,
            "negative_prompt_embeds_2": negative_prompt_embeds_2,
            "output_type": output_type,
            "attention_kwargs": attention_kwargs,
            "callback_on_step_end": callback_on_step_end,
            "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs,
            "max_sequence_length": max_sequence_length,
            "preset": preset,
            "fps": fps,
            "motion_prompt": motion_prompt,
            "write_motion_prompt": mode == "factorized"
            and motion_prompt is None
            and all(given is None for given in first_frames),
            "rewriter_max_new_tokens": rewriter_max_new_tokens,
        }
        made = self._generate(
            prompt,
            inputs,
            mode=mode,
            first_frame_prompt=first_frame_prompt,
            image=image,
            anchors=anchors,
            # One anchor is no storyboard: its mode is refused by the check of anchors.
            storyboard=None,
            num_moments=2,
            rewriter_max_new_tokens=rewriter_max_new_tokens,
            composer_num_inference_steps=composer_num_inference_steps,
            composer_guidance_scale=composer_guidance_scale,
            composer_negative_prompt=composer_negative_prompt,
            callback_on_stage_step=callback_on_stage_step,
            return_dict=True,
        )
        # Nothing when the run was interrupted before stage 3.
        frames, motion_prompts = made.frames or ([], motion_prompt)
        output = FactorizedDreamerPipelineOutput(
            **{name: getattr(made, name) for name in made.__dataclass_fields__} | {"frames": frames},
            motion_prompts=motion_prompts,
        )
        return output if return_dict else tuple(getattr(output, name) for name in output.__dataclass_fields__)


def check_components(
    unet: FactorizedDreamerUNet,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    text_encoder_2: T5EncoderModel | UMT5EncoderModel | None,
    tokenizer_2: PreTrainedTokenizerBase | None,
    image_encoder: CLIPVisionModelWithProjection | None,
) -> None:
    """Refuses what does not fit the UNet, naming both shapes."""
    if not isinstance(unet, FactorizedDreamerUNet):
        raise ValueError(
            f"`unet` is a {type(unet).__name__}; make a video UNet of it with `FactorizedDreamerUNet.from_unet2d(unet)`."
        )
    config = unet.config
    fits = [
        ("vae", vae, "makes latents of {} channels", "latent_channels", "in_channels", "takes {}"),
        ("text_encoder", text_encoder, "makes tokens of width {}", "hidden_size", "cross_attention_dim", "takes {}"),
        ("text_encoder_2", text_encoder_2, "makes tokens of width {}", "d_model", "motion_embed_dim", "takes {}"),
        (
            "image_encoder",
            image_encoder,
            "makes embeddings of width {}",
            "projection_dim",
            "image_embed_dim",
            "takes {}",
        ),
    ]
    unused = {"text_encoder_2": config.motion_embed_dim is None, "image_encoder": config.t2i_adapter is None}
    for name, component, makes, attribute, key, takes in fits:
        if unused.get(name):
            if component is not None:
                switch = "motion_embed_dim" if name == "text_encoder_2" else "t2i_adapter"
                raise ValueError(f"`{name}` was given, but the UNet has no `{switch}`; leave it out.")
            continue
        if component is None:
            raise ValueError(f"`{name}` is None, but the UNet needs one, with `{key}={config[key]}`.")
        value = getattr(component.config, attribute)
        if value != config[key]:
            raise ValueError(
                f"`{name}` {makes.format(value)} (`{attribute}`), but the UNet {takes.format(config[key])} (`{key}`): load the "
                "one that it was trained with."
            )
    if (text_encoder_2 is None) != (tokenizer_2 is None):
        raise ValueError("`text_encoder_2` and `tokenizer_2` belong together; give both or none.")
