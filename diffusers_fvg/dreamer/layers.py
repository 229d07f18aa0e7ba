"""The layers that make an image UNet one of videos. Those that it does not have begin as the identity, exactly.

Shapes: B videos, F frames, (B F) frames of all videos one after the other, C channels, (h, w) of the level, H heads, D of a
head. The last linear map of each residual begins at zero and no other, so that its gradient is not zero from the first step.
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


# Key and value `(B, H, L, D)`, and what is added to the queries of each frame, `(h w, C)`, or `None`.
KeysValues = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def pixel_positions(height: int, width: int, channels: int, like: torch.Tensor) -> torch.Tensor:
    """Sines and cosines of rows and columns, in pixels of the level: `(height * width, channels)`.

    Their periods are 4 to 256 pixels, so that even neighbours differ, and they are twice as large as what is normed: at
    first a place counts for more than what is to be seen there.
    """
    frequencies = math.pi / 2 * 64 ** -torch.linspace(0, 1, channels // 4, device=like.device)
    angles = [torch.arange(size, device=like.device)[:, None] * frequencies for size in (height, width)]
    rows, columns = (2 * torch.cat([angle.sin(), angle.cos()], dim=1) for angle in angles)
    return torch.cat([rows.repeat_interleave(width, 0), columns.repeat(height, 1)], dim=1).to(like)


class ClipAttention(nn.Module):
    """Cross-attention from every pixel of every frame to tokens of the video, as a residual that begins at zero.

    Frames share keys and values, so the queries of a video's frames are one sequence: tokens are repeated neither over
    frames nor over pixels, and [`keys_values`] need not be computed again as long as the tokens stay the same. A token of
    zeros has value zero: a video whose tokens are all zero goes through unchanged.

    Args:
        channels (`int`): of the frames.
        token_dim (`int`): of the tokens.
        num_heads (`int`): of the attention.
    """

    def __init__(self, channels: int, token_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(channels)
        # Without a bias, so that zero stays zero.
        self.norm_tokens = nn.RMSNorm(token_dim, eps=1e-6)
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(token_dim, channels, bias=False)
        self.to_v = nn.Linear(token_dim, channels, bias=False)
        self.to_out = nn.Linear(channels, channels, bias=False)
        nn.init.zeros_(self.to_out.weight)

    def look_at_own_place(self) -> None:
        """Begins with keys that are made as queries are, so that a pixel looks at its own place in the picture and around it.
        Tokens as wide as frames only."""
        nn.init.orthogonal_(self.to_q.weight)
        self.to_k.weight.data.copy_(self.to_q.weight)

    def _heads(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def keys_values(self, tokens: torch.Tensor) -> KeysValues:
        """Of text: tokens `(B, L, token_dim)`."""
        tokens = self.norm_tokens(tokens)
        return self._heads(self.to_k(tokens)), self._heads(self.to_v(tokens)), None

    def pixel_keys_values(self, features: torch.Tensor) -> KeysValues:
        """Of a picture: features `(B, token_dim, h, w)`, one token per pixel. Keys and queries know where they are."""
        tokens = self.norm_tokens(features.flatten(2).transpose(1, 2))
        height, width = features.shape[2:]
        key = self.to_k(tokens + pixel_positions(height, width, tokens.shape[2], tokens))
        queries = self.to_q(pixel_positions(height, width, self.to_q.in_features, tokens))
        return self._heads(key), self._heads(self.to_v(tokens)), queries

    def forward(self, hidden_states: torch.Tensor, keys_values: KeysValues) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(B F, C, h, w)`): frames.
            keys_values (`tuple`): of [`keys_values`] or, at the same (h, w), [`pixel_keys_values`].
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
    """The stock block with a convolution over time behind it. Weights and arithmetic of the rest are stock."""

    def add_video_layers(self) -> None:
        self.temporal_conv = TemporalConvLayer(self.out_channels, norm_num_groups=self.norm2.num_groups)

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """
        Args:
            input_tensor (`torch.Tensor` of shape `(B F, C, h, w)`): frames.
            temb (`torch.Tensor` of shape `(B, F, T)`): embedded time of each, which also says what frames are a video.
        """
        hidden_states = super().forward(input_tensor, temb.flatten(0, 1))
        return self.temporal_conv(hidden_states, num_frames=temb.shape[1])


class VideoTransformer(Transformer2DModel):
    """The stock spatial transformer, followed by what looks at the anchor's pixels, at the other frames, and at the text of
    the motion. Weights and arithmetic of the stock part are stock.
    """

    def add_video_layers(self, num_frames: int, pixel_dim: int | None, motion_dim: int | None) -> None:
        """
        Args:
            num_frames (`int`): longest clip.
            pixel_dim (`int`, *optional*): channels of the image pyramid at this level; `None` for no attention to it.
            motion_dim (`int`, *optional*): width of the motion text's tokens; `None` for no attention to them.
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
        """The stock forward. The UNet's `cross_attention_kwargs` hold under `video` what it knows of the clip: the number of
        frames and, for each transformer by its index, keys and values."""
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
    """IP-Adapter's attention (arXiv 2308.06721): image tokens have keys and values of their own, `text + image`."""
    processor = IPAdapterAttnProcessor2_0(attention.inner_dim, attention.cross_attention_dim, num_tokens=(num_tokens,))
    nn.init.zeros_(processor.to_v_ip[0].weight)
    return processor


class ConcatenatedImageAttention(nn.Module):
    """Image tokens among those of the text, through the UNet's own keys and values, mixed in by a gate that begins at zero.

    More tokens would change a softmax from the start, whatever they hold: `text + gate * (text_and_image - text)`.
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
    """Features of a clean image latent at every level of the UNet.

    Args:
        in_channels (`int`): of the latent.
        level_channels (`list[int]`): of the UNet's levels, fine to coarse.
    """

    def __init__(self, in_channels: int, level_channels: list[int]):
        super().__init__()
        # The UNet halves sizes the same way, odd ones too.
        convs = [nn.Conv2d(in_channels, level_channels[0], 3, padding=1)]
        convs += [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(level_channels, level_channels[1:])]
        self.convs = nn.ModuleList(convs)

    def forward(self, image_latents: torch.Tensor) -> list[torch.Tensor]:
        """`(B, in_channels, h, w)` to `(B, level_channels[i], h / 2^i, w / 2^i)` for each level `i`."""
        features = [self.convs[0](image_latents)]
        for conv in self.convs[1:]:
            features.append(conv(F.silu(features[-1])))
        return features
