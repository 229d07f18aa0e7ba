# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import PIL.Image
import torch
from diffusers import DiffusionPipeline, WanPipeline
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.utils import replace_example_docstring
from transformers import TextGenerationPipeline


EXAMPLE_DOC_STRING = """
    Examples:
        ```python
        >>> import torch
        >>> from transformers import pipeline
        >>> from diffusers import DiffusionPipeline
        >>> from diffusers.utils import export_to_video

        >>> pipe = DiffusionPipeline.from_pretrained(
        ...     "Wan-AI/Wan2.2-TI2V-5B-Diffusers", custom_pipeline="pipeline_factorized_video", dtype=torch.bfloat16
        ... ).to("cuda")
        >>> rewriter = pipeline("text-generation", "Qwen/Qwen3-4B-Instruct-2507", dtype=torch.bfloat16, device="cuda")
        >>> text_to_image = DiffusionPipeline.from_pretrained("Qwen/Qwen-Image", dtype=torch.bfloat16).to("cuda")

        >>> prompt = "A green leaf slowly turns yellow, then brown."
        >>> caption = pipe.rewrite([prompt], rewriter)
        >>> image = pipe.compose(caption, text_to_image, height=704, width=1280, true_cfg_scale=4.0, negative_prompt=" ")
        >>> frames = pipe(prompt, image=image, height=704, width=1280, num_frames=121, num_inference_steps=15).frames
        >>> export_to_video(frames[0], "leaf.mp4", fps=24)
        ```
"""

# Stage 1 describes the state before anything has moved, and nothing that happens later.
REWRITE_INSTRUCTION = (
    "You are given a prompt for a short video. Describe only its very first frame, as a caption for an image model: the "
    "objects, their number, colours, sizes and places, the background and the style. Show the state before any motion or "
    "change has begun. Do not mention motion, change, time, sound or camera movement. Answer with the caption alone."
)


class WanFactorizedVideoPipeline(WanPipeline):
    r"""
    Factorized Video Generation (https://huggingface.co/papers/2512.16371) on any Wan text-to-video model: a language
    model describes the first frame, a text-to-image model draws it, the video model animates it.

    The drawn frame is the anchor: its latent stays unchanged through all steps and always has timestep 0, while the other
    frames have the timestep of the step. `WanTransformer3DModel` takes one timestep per token, so that stock weights run.
    Wan2.2-TI2V-5B was trained for this; other models need a LoRA trained for it (`pipe.load_lora_weights`).

    Components and loading are those of [`WanPipeline`]; the language model and the text-to-image pipeline are arguments of
    the call.
    """

    @staticmethod
    def rewrite(
        prompts: list[str],
        rewriter: Callable[[str], str] | TextGenerationPipeline,
        max_new_tokens: int = 256,
    ) -> list[str]:
        r"""
        Stage 1: describes the first frame of each video.

        Args:
            prompts (`list[str]`):
                Prompts of the videos.
            rewriter (`Callable` or `TextGenerationPipeline`):
                A function from a prompt to a caption, or a transformers pipeline of a chat model.
            max_new_tokens (`int`, *optional*, defaults to 256):
                Maximum number of tokens of the chat model's answer.
        """
        if not isinstance(rewriter, TextGenerationPipeline):
            return [rewriter(prompt) for prompt in prompts]
        captions = []
        for prompt in prompts:
            chat = [{"role": "system", "content": REWRITE_INSTRUCTION}, {"role": "user", "content": prompt}]
            answer = rewriter(chat, max_new_tokens=max_new_tokens, do_sample=False, return_full_text=False)
            captions.append(answer[0]["generated_text"].strip())
        return captions

    @staticmethod
    def compose(captions: list[str], text_to_image: DiffusionPipeline, **kwargs) -> list[PIL.Image.Image]:
        r"""
        Stage 2: draws the first frame of each video.

        Args:
            captions (`list[str]`):
                Captions from stage 1.
            text_to_image (`DiffusionPipeline`):
                Any text-to-image pipeline.
            kwargs (*optional*):
                Other arguments of the text-to-image pipeline, such as `height`, `width` and `generator`.
        """
        return text_to_image(captions, **kwargs).images

    @torch.no_grad()
    def encode_anchor(self, image: PIL.Image.Image | list, height: int, width: int) -> torch.Tensor:
        r"""Scales, crops and encodes each picture; returns normalised latents of shape `(B, C, 1, h, w)` in float32."""
        pixels = self.video_processor.preprocess(image, height, width, resize_mode="crop")[:, :, None]
        latents = self.vae.encode(pixels.to(self._execution_device, self.vae.dtype)).latent_dist.mode().float()
        mean, std = self._latent_statistics(latents)
        return (latents - mean) / std

    def _latent_statistics(self, latents: torch.Tensor) -> list[torch.Tensor]:
        return [
            torch.tensor(values).view(1, -1, 1, 1, 1).to(latents.device, latents.dtype)
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        ]

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        image: PIL.Image.Image | list[PIL.Image.Image] | None = None,
        first_frame_prompt: str | list[str] | None = None,
        rewriter: Callable[[str], str] | TextGenerationPipeline | None = None,
        text_to_image: DiffusionPipeline | None = None,
        text_to_image_kwargs: dict[str, Any] | None = None,
        height: int = 704,
        width: int = 1280,
        num_frames: int = 121,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        guidance_scale_2: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
    ) -> WanPipelineOutput | tuple:
        r"""
        Generates videos. For plain text-to-video with the same components, use [`WanPipeline`].

        Args:
            prompt (`str` or `list[str]`):
                Prompts of the videos.
            negative_prompt (`str` or `list[str]`, *optional*):
                Description of what the video should not show.
            image (`PIL.Image.Image` or `list`, *optional*):
                The first frame, one for all prompts or one per prompt. Skips stages 1 and 2.
            first_frame_prompt (`str` or `list[str]`, *optional*):
                Captions of the first frames. Skips stage 1.
            rewriter (`Callable` or `TextGenerationPipeline`, *optional*):
                Language model for stage 1, see [`rewrite`].
            text_to_image (`DiffusionPipeline`, *optional*):
                Text-to-image pipeline for stage 2, see [`compose`].
            text_to_image_kwargs (`dict`, *optional*):
                Other arguments of `text_to_image`. A `height` and `width` in it set the size of the picture, which is then
                scaled and cropped to the size of the video.
            height, width (`int`, defaults to 704 and 1280):
                Size of the video in pixels, multiples of the VAE's stride times the patch size.
            num_frames (`int`, defaults to 121):
                Number of frames, a multiple of the VAE's temporal stride plus 1.
            num_inference_steps (`int`, defaults to 50):
                Steps of the video model. The paper reports that 15 are enough with an anchor.
            guidance_scale, guidance_scale_2 (`float`, *optional*):
                Classifier-free guidance scales of `transformer` and `transformer_2`.
            generator, latents, output_type, return_dict, attention_kwargs, max_sequence_length (*optional*):
                As in [`WanPipeline`].
            callback_on_step_end, callback_on_step_end_tensor_inputs (*optional*):
                As in [`WanPipeline`].

        Examples:

        Returns:
            [`~WanPipelineOutput`] or `tuple`: the frames.
        """
        # 1. Check inputs
        prompt = [prompt] if isinstance(prompt, str) else prompt
        self.check_inputs(
            prompt,
            negative_prompt,
            height,
            width,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            guidance_scale_2=guidance_scale_2,
        )
        patch = self.transformer.config.patch_size[1]
        if height % (self.vae_scale_factor_spatial * patch) or width % (self.vae_scale_factor_spatial * patch):
            raise ValueError(
                f"`height={height}` and `width={width}` must be multiples of {self.vae_scale_factor_spatial * patch}."
            )
        if (num_frames - 1) % self.vae_scale_factor_temporal:
            raise ValueError(
                f"`num_frames={num_frames}` must be {self.vae_scale_factor_temporal}k + 1 for a whole number k."
            )
        if image is None and (text_to_image is None or (first_frame_prompt is None and rewriter is None)):
            raise ValueError("Pass `image`, or `text_to_image` with either `first_frame_prompt` or `rewriter`.")
        self._guidance_scale = guidance_scale
        self._guidance_scale_2 = guidance_scale if guidance_scale_2 is None else guidance_scale_2
        self._attention_kwargs = attention_kwargs
        self._current_timestep = None
        self._interrupt = False
        device, dtype, batch_size = self._execution_device, self.transformer.dtype, len(prompt)

        # 2. Stage 1, reasoning, and stage 2, composition
        if image is None:
            captions = self.rewrite(prompt, rewriter) if first_frame_prompt is None else first_frame_prompt
            captions = [captions] if isinstance(captions, str) else captions
            size = {"height": height, "width": width}
            image = self.compose(captions, text_to_image, **size | (text_to_image_kwargs or {}))
        anchor = self.encode_anchor(image, height, width).to(device)
        if len(anchor) not in (1, batch_size):
            raise ValueError(
                f"`image` has {len(anchor)} first frames for {batch_size} prompts; pass one or {batch_size}."
            )

        # 3. Stage 3, temporal synthesis: encode prompts, draw noise
        negative_prompt = [negative_prompt] * batch_size if isinstance(negative_prompt, str) else negative_prompt
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt,
            negative_prompt,
            self.do_classifier_free_guidance,
            max_sequence_length=max_sequence_length,
            device=device,
        )
        prompt_embeds = prompt_embeds.to(dtype)
        if negative_prompt_embeds is not None:
            negative_prompt_embeds = negative_prompt_embeds.to(dtype)
        channels = self.transformer.config.in_channels
        latents = self.prepare_latents(
            batch_size, channels, height, width, num_frames, torch.float32, device, generator, latents
        ).clone()
        latents[:, :, :1] = anchor

        # One timestep per token: 0 for those of the anchored frame
        token_mask = torch.ones_like(latents[:, 0, :, ::patch, ::patch])
        token_mask[:, 0] = 0
        token_mask = token_mask.flatten(1)

        # 4. Denoising loop
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        boundary = (self.config.boundary_ratio or 0) * self.scheduler.config.num_train_timesteps
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                # Wan2.2-A14B: `transformer_2` takes over at low noise
                first_expert = self.transformer_2 is None or t >= boundary
                model = self.transformer if first_expert else self.transformer_2
                scale = self._guidance_scale if first_expert else self._guidance_scale_2
                inputs = {
                    "hidden_states": latents.to(dtype),
                    "timestep": token_mask * t,
                    "attention_kwargs": attention_kwargs,
                    "return_dict": False,
                }
                with model.cache_context("cond"):
                    noise_pred = model(encoder_hidden_states=prompt_embeds, **inputs)[0]
                if self.do_classifier_free_guidance:
                    with model.cache_context("uncond"):
                        noise_uncond = model(encoder_hidden_states=negative_prompt_embeds, **inputs)[0]
                    noise_pred = noise_uncond + scale * (noise_pred - noise_uncond)

                latents = self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]
                # The anchored frame stays unchanged
                latents[:, :, :1] = anchor

                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for k in callback_on_step_end_tensor_inputs:
                        callback_kwargs[k] = locals()[k]
                    callback_outputs = callback_on_step_end(self, i, t, callback_kwargs)
                    latents = callback_outputs.pop("latents", latents)
                    prompt_embeds = callback_outputs.pop("prompt_embeds", prompt_embeds)
                    negative_prompt_embeds = callback_outputs.pop("negative_prompt_embeds", negative_prompt_embeds)
                progress_bar.update()
        self._current_timestep = None

        # 5. Decode
        video = latents
        if output_type != "latent":
            mean, std = self._latent_statistics(latents)
            video = self.vae.decode((latents * std + mean).to(self.vae.dtype), return_dict=False)[0]
            video = self.video_processor.postprocess_video(video, output_type=output_type)
        self.maybe_free_model_hooks()
        return WanPipelineOutput(frames=video) if return_dict else (video,)
