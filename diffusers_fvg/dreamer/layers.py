"""Layers that turn an image UNet into a video UNet. Each added layer is exactly the identity at initialization.

Shapes: B videos, F frames, (B F) the frames of all videos in order, C channels, (h, w) the size at the UNet's level, H heads,
D channels per head. Only the last linear map of each residual is initialized to zero, so that it has a gradient from the first
step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D, TemporalConvLayer
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from torch import nn


# Keys and values `(B, H, L, D)`, and the position embedding `(h w, C)` that is added to the queries of each frame, or `None`.
KeysValues = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def pixel_positions(height: int, width: int, channels: int, like: torch.Tensor) -> torch.Tensor:
    """Returns sinusoidal embeddings of row and column at the UNet's level: `(height * width, channels)`.

    The periods are 4 to 256 pixels, so that even neighbours differ. The amplitude is 2, twice that of normalized features: at
    the start of training a pixel's position counts for more than its content.
    """
    frequencies = math.pi / 2 * 64 ** -torch.linspace(0, 1, channels // 4, device=like.device)
    angles = [torch.arange(size, device=like.device)[:, None] * frequencies for size in (height, width)]
    rows, columns = (2 * torch.cat([angle.sin(), angle.cos()], dim=1) for angle in angles)
    return torch.cat([rows.repeat_interleave(width, 0), columns.repeat(height, 1)], dim=1).to(like)


class ClipAttention(nn.Module):
    """Cross-attention from every pixel of every frame to tokens of the video, as a residual that is zero at initialization.

    The frames of a video share keys and values, so their queries are one sequence: tokens are repeated neither over frames
    nor over pixels, and the result of [`keys_values`] can be reused as long as the tokens stay the same. A token of zeros has
    value zero, so a video whose tokens are all zero is unchanged.

    Args:
        channels (`int`): channels of the frames.
        token_dim (`int`): width of the tokens.
        num_heads (`int`): number of attention heads.
    """

    def __init__(self, channels: int, token_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(channels)
        # RMSNorm has no bias, so a token of zeros stays zero.
        self.norm_tokens = nn.RMSNorm(token_dim, eps=1e-6)
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(token_dim, channels, bias=False)
        self.to_v = nn.Linear(token_dim, channels, bias=False)
        self.to_out = nn.Linear(channels, channels, bias=False)
        nn.init.zeros_(self.to_out.weight)

    def look_at_own_place(self) -> None:
        """Initializes the key projection as a copy of the query projection, so that each pixel attends to its own place in the
        image and to its neighbours. `token_dim` must equal `channels`."""
        nn.init.orthogonal_(self.to_q.weight)
        self.to_k.weight.data.copy_(self.to_q.weight)

    def _heads(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def keys_values(self, tokens: torch.Tensor) -> KeysValues:
        """Returns keys and values of text tokens `(B, L, token_dim)`."""
        tokens = self.norm_tokens(tokens)
        return self._heads(self.to_k(tokens)), self._heads(self.to_v(tokens)), None

    def pixel_keys_values(self, features: torch.Tensor) -> KeysValues:
        """Returns keys and values of image features `(B, token_dim, h, w)`, one token per pixel, with positions on keys and
        queries."""
        tokens = self.norm_tokens(features.flatten(2).transpose(1, 2))
        height, width = features.shape[2:]
        key = self.to_k(tokens + pixel_positions(height, width, tokens.shape[2], tokens))
        queries = self.to_q(pixel_positions(height, width, self.to_q.in_features, tokens))
        return self._heads(key), self._heads(self.to_v(tokens)), queries

    def forward(self, hidden_states: torch.Tensor, keys_values: KeysValues) -> torch.Tensor:
        """Adds the attention's output to the frames.

        Args:
            hidden_states (`torch.Tensor` of shape `(B F, C, h, w)`): frames.
            keys_values (`tuple`): output of [`keys_values`], or of [`pixel_keys_values`] for features of the same (h, w).
        """
        key, value, positions = keys_values
        query = self.to_q(self.norm(hidden_states.flatten(2).transpose(1, 2)))
        if positions is not None:
            query = query + positions
        query = self._heads(query.reshape(key.shape[0], -1, query.shape[2]))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        attended = self.to_out(attended).reshape(hidden_states.shape[0], -1, hidden_states.shape[1])
        return hidden_states + attended.transpose(1, 2).reshape(hidden_states.shape)


class VideoResnetBlock(ResnetBlock2D):
    """diffusers' resnet block, followed by a convolution over time."""

    def add_video_layers(self) -> None:
        self.temporal_conv = TemporalConvLayer(self.out_channels, norm_num_groups=self.norm2.num_groups)

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """Runs the resnet block on each frame, then the convolution over time.

        Args:
            input_tensor (`torch.Tensor` of shape `(B F, C, h, w)`): frames.
            temb (`torch.Tensor` of shape `(B, F, T)`): time embedding of each frame; its shape tells which frames belong to
                one video.
        """
        hidden_states = super().forward(input_tensor, temb.flatten(0, 1))
        return self.temporal_conv(hidden_states, num_frames=temb.shape[1])


class VideoTransformer(Transformer2DModel):
    """diffusers' spatial transformer, followed by attention to the anchor's pixels, to the other frames and to the motion
    text.
    """

    def add_video_layers(self, num_frames: int, pixel_dim: int | None, motion_dim: int | None) -> None:
        """Adds the layers of the video to the image transformer.

        Args:
            num_frames (`int`): most frames of a clip.
            pixel_dim (`int`, *optional*): channels of the image pyramid at this level; `None` for no attention to pixels.
            motion_dim (`int`, *optional*): width of the motion text's tokens; `None` for no attention to the motion text.
        """
        channels, num_heads = self.config.in_channels, self.config.num_attention_heads
        self.pixel_attention: ClipAttention | None = None
        if pixel_dim is not None:
            self.pixel_attention = ClipAttention(channels, pixel_dim, num_heads)
            self.pixel_attention.look_at_own_place()
        self.temporal_attention = TransformerTemporalModel(
            num_attention_heads=num_heads,
            attention_head_dim=self.config.attention_head_dim,
            in_channels=channels,
            norm_num_groups=self.config.norm_num_groups,
            positional_embeddings="sinusoidal",
            num_positional_embeddings=num_frames,
        )
        nn.init.zeros_(self.temporal_attention.proj_out.weight)
        nn.init.zeros_(self.temporal_attention.proj_out.bias)
        self.motion_attention = None if motion_dim is None else ClipAttention(channels, motion_dim, num_heads)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        **stock: Any,
    ) -> tuple[torch.Tensor]:
        """Runs diffusers' forward and the video layers. `cross_attention_kwargs["video"]` holds the number of frames and, for
        each transformer by its index, keys and values of the pixels and of the motion text."""
        kwargs = dict(cross_attention_kwargs or {})
        video = kwargs.pop("video")
        hidden_states = super().forward(
            hidden_states, encoder_hidden_states, cross_attention_kwargs=kwargs or None, return_dict=False, **stock
        )[0]
        pixels, motion = (values and values[self.index] for values in (video["pixels"], video["motion"]))
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return (
                self._gradient_checkpointing_func(
                    self._video_layers, hidden_states, video["num_frames"], pixels, motion
                ),
            )
        return (self._video_layers(hidden_states, video["num_frames"], pixels, motion),)

    def _video_layers(
        self, hidden_states: torch.Tensor, num_frames: int, pixels: KeysValues | None, motion: KeysValues | None
    ) -> torch.Tensor:
        if pixels is not None:
            assert self.pixel_attention is not None
            hidden_states = self.pixel_attention(hidden_states, pixels)
        hidden_states = self.temporal_attention(hidden_states, num_frames=num_frames, return_dict=False)[0]
        if motion is not None:
            assert self.motion_attention is not None
            hidden_states = self.motion_attention(hidden_states, motion)
        return hidden_states


def decoupled_image_attention(attention: Attention, num_tokens: int) -> IPAdapterAttnProcessor2_0:
    """Returns IP-Adapter's attention processor (arXiv 2308.06721): `text attention + image attention`, where image tokens have
    their own key and value projections."""
    processor = IPAdapterAttnProcessor2_0(attention.inner_dim, attention.cross_attention_dim, num_tokens=(num_tokens,))
    nn.init.zeros_(processor.to_v_ip[0].weight)
    return processor


class ConcatenatedImageAttention(nn.Module):
    """Attention to text and image tokens together, through the UNet's own key and value projections.

    Further tokens change a softmax whatever their values, so the result is blended in by a learned scalar that starts at
    zero: `text + gate * (text_and_image - text)`.
    """

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: tuple[torch.Tensor, list[torch.Tensor]],
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        text, (image,) = encoder_hidden_states
        plain = AttnProcessor2_0()(attn, hidden_states, text, attention_mask)
        both = AttnProcessor2_0()(attn, hidden_states, torch.cat([text, image], dim=1))
        return plain + self.gate * (both - plain)


class ImagePyramid(nn.Module):
    """Convolutions that turn a clean image latent into features at every level of the UNet.

    Args:
        in_channels (`int`): channels of the latent.
        level_channels (`list[int]`): channels of the UNet's levels, fine to coarse.
    """

    def __init__(self, in_channels: int, level_channels: list[int]):
        super().__init__()
        # Kernel 3, stride 2, padding 1 as in the UNet: odd sizes round in the same way.
        convs = [nn.Conv2d(in_channels, level_channels[0], 3, padding=1)]
        convs += [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(level_channels, level_channels[1:])]
        self.convs = nn.ModuleList(convs)

    def forward(self, image_latents: torch.Tensor) -> list[torch.Tensor]:
        """Maps `(B, in_channels, h, w)` to one tensor `(B, level_channels[i], h / 2^i, w / 2^i)` for each level `i`."""
        features = [self.convs[0](image_latents)]
        for conv in self.convs[1:]:
            features.append(conv(F.silu(features[-1])))
        return features
