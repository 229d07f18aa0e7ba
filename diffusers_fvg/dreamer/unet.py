"""Factorized-Dreamer's video model (arXiv 2408.10119): an image UNet that learns to animate its first frame.

The authors published neither code nor weights, and the paper leaves most details open. Our choices:

| open in the paper | our choice | reason |
| --- | --- | --- |
| image UNet | any of the Stable Diffusion 1.x and 2.x family | the paper changes "the original SD noise schedule" |
| spatial weights | diffusers' names and arithmetic; [`video_parameters`] are the new ones | LoRAs load; training can freeze the rest |
| temporal layers | convolution after each resnet, attention after each spatial transformer | ModelScope's layers, which diffusers has |
| positions in time | sinusoidal | no learned weights for positions that training did not reach |
| T2I adapter | `"decoupled"`: IP-Adapter's attention, 4 tokens of the pooled CLIP image | image-only weights stay apart from text |
| | `"concat"`: text and image tokens in one attention, blended in by a learned scalar | the other reading of "combines embeddings" |
| PACA: keys and values | image latent; 3x3 and stride-2 convolutions; RMSNorm | "image latents"; one token per pixel, no ControlNet copy |
| PACA: positions | sines of row and column on queries and keys | at pure noise the position is all that a query can hold |
| PACA: initialization | key projection equals query projection | each pixel attends to its own place, most of what PACA has to learn |
| PACA: place | after the text attention of every spatial transformer; `"up"` as in the author's PASD | down blocks lose detail |
| T5: place | after temporal attention, one token sequence for the clip | motion text describes several frames together |
| T5: width | 2048, T5-XL as in Emu Video (arXiv 2311.10709) | the nearest published relative |
| padding of T5 | tokens of zeros, as in Wan | the fast attention kernels take no mask |
| frame rate | off unless `fps_conditioning` | not mentioned |
| image latent in the input | not concatenated | the paper names adapter and PACA as the only image paths |
| dropped image | its tokens are zero, which leaves the frames unchanged | a clip without an anchor needs no weights of its own |
| initialization | last linear map of each new residual is zero | equals the image UNet on each frame, difference 0.0 |

PACA is the paper's pixel-aware cross-attention. Noise schedule: [`schedule`]. Optical flow, its prediction and its loss:
[`flow`], [`predict_net`].
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import ImageProjection, TimestepEmbedding
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.utils import BaseOutput
from torch import nn

from .layers import (
    ConcatenatedImageAttention,
    ImagePyramid,
    KeysValues,
    VideoResnetBlock,
    VideoTransformer,
    decoupled_image_attention,
)


# Config values of the Stable Diffusion 1.x and 2.x family. This class does not implement others.
_STOCK_ONLY = {
    "addition_embed_type": None,
    "class_embed_type": None,
    "encoder_hid_dim_type": None,
    "time_cond_proj_dim": None,
    "dual_cross_attention": False,
    "downsample_padding": 1,
    "resnet_time_scale_shift": "default",
    "attention_type": "default",
}
_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D", "UNetMidBlock2DCrossAttn", "CrossAttnUpBlock2D", "UpBlock2D")
_VIDEO_LAYERS = {
    "temporal_conv",
    "pixel_attention",
    "temporal_attention",
    "motion_attention",
    "processor",
    "image_projection",
    "image_pyramid",
    "fps_embedding",
}


@dataclass
class FactorizedDreamerUNetOutput(BaseOutput):
    """Output of [`FactorizedDreamerUNet`].

    Args:
        sample (`torch.Tensor` of shape `(B, C, F, h, w)`): prediction, of the scheduler's `prediction_type`.
        features (`torch.Tensor` of shape `(B, C0, F, h, w)`, *optional*): output of the last block, the input of
            [`~predict_net.PredictNet`]; `C0` is `block_out_channels[0]`.
    """

    sample: torch.Tensor
    features: torch.Tensor | None = None


class FactorizedDreamerUNet(UNet2DConditionModel):
    """Image UNet with temporal layers and with the designs of Factorized-Dreamer that its config switches on.

    Config and state dict extend those of [`~diffusers.UNet2DConditionModel`], so LoRAs of the image model load. Before
    training the output equals that of the image UNet on each frame.

    Args:
        args, kwargs: arguments of [`~diffusers.UNet2DConditionModel`].
        num_frames (`int`): number of frames of the training clips, and the most that one forward takes; at least 2.
        t2i_adapter (`str`, *optional*): attention to the CLIP image, `"decoupled"` or `"concat"`; `None` for none.
        num_image_tokens (`int`): number of tokens that the CLIP image is projected to.
        image_embed_dim (`int`): width of the CLIP image embedding; 1024 is ViT-H/14.
        paca (`str`, *optional*): attention to the image's pixels in `"all"` blocks or in `"up"` blocks only; `None` for none.
        motion_embed_dim (`int`, *optional*): width of the T5 encoder that reads the motion text; `None` for no motion text.
        fps_conditioning (`bool`): whether the model takes the frames per second as an input.

    Raises:
        `ValueError`: an argument has a value that is not listed here, or the config is that of another family.
    """

    # diffusers' image projection casts its input to the dtype that its weights are stored in.
    _skip_layerwise_casting_patterns = [*UNet2DConditionModel._skip_layerwise_casting_patterns, "image_projection"]

    def __init__(
        self,
        *args: Any,
        num_frames: int = 16,
        t2i_adapter: str | None = "decoupled",
        num_image_tokens: int = 4,
        image_embed_dim: int = 1024,
        paca: str | None = "all",
        motion_embed_dim: int | None = 2048,
        fps_conditioning: bool = False,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.register_to_config(
            num_frames=num_frames,
            t2i_adapter=t2i_adapter,
            num_image_tokens=num_image_tokens,
            image_embed_dim=image_embed_dim,
            paca=paca,
            motion_embed_dim=motion_embed_dim,
            fps_conditioning=fps_conditioning,
        )
        self._check_family()
        channels, text_dim = list(self.config.block_out_channels), self.config.cross_attention_dim
        self.image_pyramid: ImagePyramid | None = None
        if paca is not None:
            # The pyramid ends at the coarsest level where a transformer attends to pixels.
            coarsest = max(level for _, level, sees_pixels in self._spatial_transformers() if sees_pixels)
            self.image_pyramid = ImagePyramid(self.config.in_channels, channels[: coarsest + 1])
        self.image_projection = None
        if t2i_adapter is not None:
            self.image_projection = ImageProjection(image_embed_dim, text_dim, num_image_tokens)
        self.fps_embedding = None
        if fps_conditioning:
            self.fps_embedding = TimestepEmbedding(channels[0], self.time_embedding.linear_2.out_features)
            nn.init.zeros_(self.fps_embedding.linear_2.weight)
            nn.init.zeros_(self.fps_embedding.linear_2.bias)

        # The classes of existing blocks are changed: new blocks would double the memory and time of construction.
        for block, _ in self._blocks():
            for resnet in block.resnets:
                resnet.__class__ = VideoResnetBlock
                resnet.add_video_layers()
        for index, (transformer, level, sees_pixels) in enumerate(self._spatial_transformers()):
            transformer.__class__ = VideoTransformer
            transformer.index = index
            transformer.add_video_layers(num_frames, channels[level] if sees_pixels else None, motion_embed_dim)
            for attention in (block.attn2 for block in transformer.transformer_blocks if t2i_adapter is not None):
                attention.set_processor(
                    decoupled_image_attention(attention, num_image_tokens)
                    if t2i_adapter == "decoupled"
                    else ConcatenatedImageAttention()
                )

    @classmethod
    def from_unet2d(cls, unet: UNet2DConditionModel, **switches: Any) -> Self:
        """Converts an image UNet to a video UNet: copies its weights, dtype and device.

        Args:
            unet (`UNet2DConditionModel`): UNet of a Stable Diffusion 1.x or 2.x checkpoint.
            switches: `num_frames`, `t2i_adapter`, `num_image_tokens`, `image_embed_dim`, `paca`, `motion_embed_dim` and
                `fps_conditioning` of the class.

        Raises:
            `ValueError`: a UNet of another family, one with adapters (load them afterwards), one with attention processors
                that have weights, or one that takes an image beside its latents.
        """
        if not isinstance(unet, UNet2DConditionModel) or isinstance(unet, cls):
            raise ValueError(f"`unet` must be a UNet2DConditionModel, but is a {type(unet).__name__}.")
        if getattr(unet, "peft_config", None):
            raise ValueError(
                f"The UNet has the adapters {sorted(unet.peft_config)}; convert it without them and load them afterwards."
            )
        # diffusers' own `to` warns of modules that must stay in float32; this class has none.
        model = nn.Module.to(cls.from_config(unet.config, **switches), unet.device, unet.dtype)
        missing = model.load_state_dict(unet.state_dict(), strict=False)
        left_out = set(missing.missing_keys) - {name for name in model.state_dict() if _is_video_layer(name)}
        if left_out or missing.unexpected_keys:
            raise ValueError(
                f"The UNet's weights do not fit its config: {sorted(left_out)} are missing and {missing.unexpected_keys} are "
                "not expected. Attention processors with weights of their own are not converted."
            )
        return model.train(unet.training)

    def _check_family(self) -> None:
        config = self.config
        for name, value in _STOCK_ONLY.items():
            if config[name] != value:
                raise ValueError(
                    f"`{name}={config[name]!r}` belongs to another family; use a Stable Diffusion 1.x or 2.x UNet."
                )
        blocks = (*config.down_block_types, config.mid_block_type, *config.up_block_types)
        unknown = sorted(set(map(str, blocks)) - set(_BLOCKS))
        if unknown:
            raise ValueError(f"The blocks {unknown} belong to another family; use a UNet of the blocks {_BLOCKS}.")
        if config.in_channels != config.out_channels:
            raise ValueError(
                f"The UNet has `in_channels={config.in_channels}` and `out_channels={config.out_channels}`; use that of a "
                "text-to-image model, where both are equal."
            )
        if config.num_frames < 2:
            raise ValueError(f"`num_frames={config.num_frames}` must be at least 2: one frame is an image.")
        for name, values in {"t2i_adapter": ("decoupled", "concat", None), "paca": ("all", "up", None)}.items():
            if config[name] not in values:
                raise ValueError(f"`{name}={config[name]!r}` is not known; use one of {values}.")

    def _blocks(self) -> Iterator[tuple[nn.Module, int]]:
        """Yields down, mid and up blocks, each with its level."""
        last = len(self.down_blocks) - 1
        yield from ((block, level) for level, block in enumerate(self.down_blocks))
        yield self.mid_block, last
        yield from ((block, last - number) for number, block in enumerate(self.up_blocks))

    def _spatial_transformers(self) -> Iterator[tuple[Transformer2DModel, int, bool]]:
        """Yields each spatial transformer with its level and whether it attends to pixels."""
        up_blocks = set(self.up_blocks)
        for block, level in self._blocks():
            sees_pixels = self.config.paca == "all" or (self.config.paca == "up" and block in up_blocks)
            for transformer in getattr(block, "attentions", ()):
                yield transformer, level, sees_pixels

    def video_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Returns names and parameters of the layers that the image UNet does not have."""
        return ((name, parameter) for name, parameter in self.named_parameters() if _is_video_layer(name))

    # -- conditions, once per video -----------------------------------------------------------------------------------

    def _image_conditions(
        self,
        image_latents: torch.Tensor | None,
        image_embeds: torch.Tensor | None,
        image_mask: torch.Tensor | None,
        batch_size: int,
    ) -> tuple[torch.Tensor | None, list[KeysValues | None] | None]:
        """Returns the CLIP image tokens `(B, N, D)`, and keys and values of the image's pixels for each transformer."""
        tokens = pixels = None
        if self.image_projection is not None:
            if image_embeds is None:
                tokens = self.image_projection.norm.weight.new_zeros(
                    batch_size, self.config.num_image_tokens, self.config.cross_attention_dim
                )
            else:
                tokens = _masked(self.image_projection(image_embeds), image_mask)
        if image_latents is not None:
            assert self.image_pyramid is not None
            features = [_masked(level, image_mask) for level in self.image_pyramid(image_latents.to(self.dtype))]
            pixels = [
                transformer.pixel_attention.pixel_keys_values(features[level]) if sees_pixels else None
                for transformer, level, sees_pixels in self._spatial_transformers()
            ]
        return tokens, pixels

    def _motion_conditions(self, motion_embeds: torch.Tensor | None) -> list[KeysValues] | None:
        if motion_embeds is None:
            return None
        # diffusers' `dtype` visits all modules, so it is asked once.
        motion_embeds = motion_embeds.to(self.dtype)
        transformers = [transformer for transformer, _, _ in self._spatial_transformers()]
        return [item.motion_attention.keys_values(motion_embeds) for item in transformers]

    def _check_conditions(self, num_frames: int, **given: Any) -> None:
        if num_frames > self.config.num_frames:
            raise ValueError(
                f"The clip has {num_frames} frames, but the UNet takes at most {self.config.num_frames}; use windows."
            )
        switches = {
            "image_latents": ("paca", self.config.paca),
            "image_embeds": ("t2i_adapter", self.config.t2i_adapter),
            "motion_embeds": ("motion_embed_dim", self.config.motion_embed_dim),
            "fps": ("fps_conditioning", self.config.fps_conditioning or None),
        }
        for name, (switch, value) in switches.items():
            if given[name] is not None and value is None:
                raise ValueError(f"`{name}` was given, but the UNet has no `{switch}`; leave it out.")
        if self.config.fps_conditioning and given["fps"] is None:
            raise ValueError("The UNet has `fps_conditioning`: pass `fps`.")

    # -- forward ------------------------------------------------------------------------------------------------------

    def get_time_embed(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Returns sinusoidal embeddings `(B, F, T)` of one time per frame `(B, F)`. The resnets take the number of frames from
        this shape."""
        return self.time_proj(timestep.flatten()).to(sample.dtype).unflatten(0, timestep.shape)

    def get_aug_embed(
        self, emb: torch.Tensor, encoder_hidden_states: torch.Tensor, added_cond_kwargs: dict[str, Any]
    ) -> torch.Tensor | None:
        if self.fps_embedding is None:
            return None
        return self.fps_embedding(self.time_proj(added_cond_kwargs["fps"]).to(emb.dtype))[:, None]

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        image_latents: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        motion_embeds: torch.Tensor | None = None,
        fps: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        image_cache: dict[str, Any] | None = None,
        motion_cache: dict[str, Any] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_features: bool = False,
        return_dict: bool = True,
    ) -> FactorizedDreamerUNetOutput | tuple:
        """Predicts the noise, velocity or sample of noisy video latents.

        Args:
            sample (`torch.Tensor` of shape `(B, C, F, h, w)`): noisy latents.
            timestep (`torch.Tensor` of shape `()`, `(B,)` or `(B, F)`): one time for all, for each video or for each frame.
            encoder_hidden_states (`torch.Tensor` of shape `(B, S, D)`): CLIP text embeddings.
            image_latents (`torch.Tensor` of shape `(B, C, h, w)`, *optional*): clean latents of the first frames, for PACA.
            image_embeds (`torch.Tensor` of shape `(B, image_embed_dim)`, *optional*): pooled CLIP embeddings of the first
                frames, for the T2I adapter.
            motion_embeds (`torch.Tensor` of shape `(B, L, motion_embed_dim)`, *optional*): T5 embeddings of the motion text,
                zero where padded.
            fps (`torch.Tensor` of shape `(B,)`, *optional*): frames per second; required with `fps_conditioning`.
            image_mask (`torch.Tensor` of shape `(B,)`, *optional*): 0 for videos whose image is dropped, else 1.
            image_cache, motion_cache (`dict`, *optional*): an empty dict is filled with keys and values of the image or of
                the motion text; a filled one replaces their computation. Both are the same at every denoising step, those
                of the image also in both branches of guidance.
            cross_attention_kwargs (`dict`, *optional*): as in [`~diffusers.UNet2DConditionModel`].
            return_features (`bool`): whether to return the last block's features, too.
            return_dict (`bool`): whether to return a [`FactorizedDreamerUNetOutput`] or a tuple.

        Raises:
            `ValueError`: the clip has more frames than `num_frames`, `fps` is missing, or an input is given whose design is
                switched off.
        """
        batch_size, _, num_frames = sample.shape[:3]
        self._check_conditions(
            num_frames, image_latents=image_latents, image_embeds=image_embeds, motion_embeds=motion_embeds, fps=fps
        )
        image_tokens, pixels = _once(
            image_cache, lambda: self._image_conditions(image_latents, image_embeds, image_mask, batch_size)
        )
        motion = _once(motion_cache, lambda: self._motion_conditions(motion_embeds))

        encoder_hidden_states = encoder_hidden_states.repeat_interleave(num_frames, 0)
        if image_tokens is not None:
            encoder_hidden_states = (encoder_hidden_states, [image_tokens.repeat_interleave(num_frames, 0)])
        if timestep.ndim < 2:
            timestep = timestep.reshape(-1, 1).expand(batch_size, num_frames)

        features = []
        hook = None
        if return_features:
            hook = self.conv_norm_out.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
        try:
            prediction = super().forward(
                sample.transpose(1, 2).flatten(0, 1),
                timestep,
                encoder_hidden_states,
                cross_attention_kwargs={
                    **(cross_attention_kwargs or {}),
                    "video": {"num_frames": num_frames, "pixels": pixels, "motion": motion},
                },
                added_cond_kwargs={"fps": fps},
                return_dict=False,
            )[0]
        finally:
            if hook is not None:
                hook.remove()
        prediction, *features = (
            frames.unflatten(0, (batch_size, num_frames)).transpose(1, 2) for frames in (prediction, *features)
        )
        if not return_dict:
            return (prediction, *features)
        return FactorizedDreamerUNetOutput(prediction, *features)


# diffusers reads the names of config values from the signature, so this one lists diffusers' own, of any version, and ours.
_ours = inspect.signature(FactorizedDreamerUNet.__init__).parameters.values()
_stock = inspect.signature(UNet2DConditionModel.__init__).parameters.values()
_init: Any = FactorizedDreamerUNet.__init__
_init.__signature__ = inspect.Signature(
    [*_stock, *(parameter for parameter in _ours if parameter.kind is inspect.Parameter.KEYWORD_ONLY)]
)


def _is_video_layer(name: str) -> bool:
    return not _VIDEO_LAYERS.isdisjoint(name.split("."))


def _masked(tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return tokens if mask is None else tokens * mask.to(tokens).view(-1, *[1] * (tokens.ndim - 1))


def _once(cache: dict[str, Any] | None, compute) -> Any:
    if cache is None:
        return compute()
    if "values" not in cache:
        cache["values"] = compute()
    return cache["values"]
