"""The anchor-conditioned video transformer: diffusers' Wan transformer with one timestep per latent frame.

An anchor is a clean frame (timestep 0) among noisy ones, so the frames of one sample have different timesteps. A timestep acts
on a Wan block through six modulation vectors. They are the same for all tokens of a frame, so they are stored as one row per
frame: (B, frames, 6, D) takes 2 MB at the width of Wan2.2-5B and 31 latent frames; one row per token would take 2 GB.
"""

import inspect
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models._modeling_parallel import ContextParallelInput
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanTransformerBlock,
    _get_qkv_projections,
)
from diffusers.utils import apply_lora_scale
from torch import nn

from ..devices import get_module_execution_device
from ..kernels import frame_attention, gated_residual, layer_norm, modulated_layer_norm, rms_norm_rope
from ..kernels.attention import anchor_window as frames_within_window
from .attention import choose_backend
from .stock_weights import StockWeights, configured_as


class AnchorConditionedAttnProcessor(WanAttnProcessor):
    """Wan self-attention with a fused norm and rotary embedding of query and key, and with an optional mask between frames.

    Weights and arithmetic are those of the stock processor, except that in 16-bit dtypes the normed query and key are not
    rounded before the rotation. Projections call their modules (for adapters and fused projections); attention without a mask
    calls diffusers' dispatcher (for backends and context parallelism).
    """

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        seen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            attn (`WanAttention`): the attention module that this processor runs.
            hidden_states (`torch.Tensor` of shape `(B, L, D)`): video tokens.
            encoder_hidden_states (`torch.Tensor`, *optional*): text tokens, in cross-attention.
            attention_mask (`torch.Tensor`, *optional*): mask for the attention backend.
            rotary_emb (`tuple` of two `torch.Tensor` of shape `(1 or B, L, 1, head_dim)`, *optional*): cosines and sines.
            seen (`torch.Tensor` of shape `(B, F, F)`, *optional*): frames that each frame attends to, in self-attention; see
                [`kernels.attention`].

        Returns:
            `torch.Tensor` of shape `(B, L, D)`.
        """
        if encoder_hidden_states is not None or rotary_emb is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)

        query, key, value = _get_qkv_projections(attn, hidden_states, None)
        # The fused kernel reads the weights of the norms without calling these modules. If they have hooks, they must be
        # called: offloading loads the weights when a module is called.
        if _is_hooked(attn.norm_q) or _is_hooked(attn.norm_k):
            query, key = (
                _turn(norm(x).unflatten(2, (attn.heads, -1)), *rotary_emb)
                for norm, x in ((attn.norm_q, query), (attn.norm_k, key))
            )
        else:
            query, key = rms_norm_rope(
                query, key, attn.norm_q.weight, attn.norm_k.weight, *rotary_emb, attn.norm_q.eps
            )  # (B, L, heads, head_dim)
        value = value.unflatten(2, (attn.heads, -1))
        if seen is not None:
            hidden_states = frame_attention(query, key, value, seen)
        else:
            hidden_states = dispatch_attention_fn(
                query,
                key,
                value,
                attn_mask=attention_mask,
                dropout_p=0.0,
                is_causal=False,
                backend=self._attention_backend,
                parallel_config=self._parallel_config,
            )
        hidden_states = hidden_states.flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](hidden_states))


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Applies the rotary embedding to `x` of shape `(B, L, heads, head_dim)`."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2).type_as(x)


def _is_hooked(module: nn.Module) -> bool:
    # accelerate and diffusers hook a module by setting `forward` on the instance.
    return "forward" in module.__dict__ or bool(module._forward_hooks or module._forward_pre_hooks)


class AnchorConditionedTransformerBlock(WanTransformerBlock):
    """A Wan block with one row of modulation per timestep. Weights and arithmetic are those of the stock block."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, torch.Tensor],
        row_index: torch.Tensor | None = None,
        seen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(B, L, D)`): video tokens, ordered by frame.
            encoder_hidden_states (`torch.Tensor` of shape `(B, S, D)`): text tokens, after image tokens if there are any.
            temb (`torch.Tensor` of shape `(B, R, 6, D)`, float32): modulation rows, with `R` as in [`kernels.reference`].
            rotary_emb (`tuple` of two `torch.Tensor` of shape `(1 or B, L, 1, head_dim)`): cosines and sines.
            row_index (`torch.Tensor` of shape `(L,)`, *optional*): row of each token, if the tokens of a row are not equal
                consecutive runs.
            seen (`torch.Tensor` of shape `(B, F, F)`, *optional*): frames that each frame attends to; all when left out.

        Returns:
            `torch.Tensor` of shape `(B, L, D)`.
        """
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = (
            self.scale_shift_table.unsqueeze(1) + temb
        ).unbind(dim=2)

        normed = modulated_layer_norm(hidden_states, scale_attn, shift_attn, self.norm1.eps, row_index)
        attended = self.attn1(normed, None, None, rotary_emb, seen=seen)
        hidden_states = gated_residual(hidden_states, attended, gate_attn, row_index)

        # Without `cross_attn_norm` it is an `nn.Identity`; a hooked module must be called.
        is_plain = type(self.norm2) is FP32LayerNorm and not _is_hooked(self.norm2)
        normed = layer_norm(hidden_states, self.norm2) if is_plain else self.norm2(hidden_states)
        hidden_states = hidden_states + self.attn2(normed, encoder_hidden_states, None, None)

        normed = modulated_layer_norm(hidden_states, scale_ffn, shift_ffn, self.norm3.eps, row_index)
        return gated_residual(hidden_states, self.ffn(normed), gate_ffn, row_index)


# Step caches (such as the first-block cache) look up a block by its exact class.
TransformerBlockRegistry.register(
    model_class=AnchorConditionedTransformerBlock,
    metadata=TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None),
)


class RowIndex(nn.Module):
    """Returns the modulation row of every token, `(L,)`. It is a module so that context parallelism can shard its output."""

    def forward(self, num_rows: int, num_tokens: int, device: torch.device) -> torch.Tensor:
        return torch.arange(num_rows, device=device).repeat_interleave(num_tokens // num_rows)


class AppendedRotaryEmbedding(nn.Module):
    """Rotary embedding of the video's tokens, followed by those of appended frames at their own positions in time.

    It is a module so that context parallelism can shard its output.
    """

    def forward(
        self, cos: torch.Tensor, sin: torch.Tensor, num_frames: int, positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            cos, sin (`torch.Tensor` of shape `(1, L, 1, head_dim)`): cosines and sines for the video's tokens.
            num_frames (`int`): latent frames of the video.
            positions (`torch.Tensor` of shape `(B, A)`, *optional*): positions of the appended frames, in latent frames.

        Returns:
            `tuple` of two `torch.Tensor` of shape `(B, L / num_frames * (num_frames + A), 1, head_dim)`; without appended
            frames `cos` and `sin` themselves.
        """
        if positions is None:
            return cos, sin
        batch_size, num_appended = positions.shape
        num_tokens = cos.shape[1] // num_frames
        # The last channels are those of height and width, 2 * (head_dim // 6) each; the others are those of time.
        time_dim = cos.shape[3] - 4 * (cos.shape[3] // 6)
        # Computed like diffusers' table, but at fractional positions.
        turns = get_1d_rotary_pos_embed(
            time_dim, positions.detach().cpu().double().flatten(), use_real=True, freqs_dtype=torch.float64
        )
        joined = []
        for angles, turn in zip((cos, sin), turns, strict=True):
            time = turn.to(angles).view(batch_size, num_appended, 1, 1, time_dim).expand(-1, -1, num_tokens, -1, -1)
            space = angles[:, None, :num_tokens, :, time_dim:].expand(batch_size, num_appended, -1, -1, -1)
            appended = torch.cat([time, space], dim=-1).flatten(1, 2)
            joined.append(torch.cat([angles.expand(batch_size, -1, -1, -1), appended], dim=1))
        return tuple(joined)


class TimesPerFrame(StockWeights):
    """The forward of Wan's network with one timestep per latent frame. List it before a class of that network as a base."""

    stock_processor: type[WanAttnProcessor] = WanAttnProcessor
    _no_split_modules = ["AnchorConditionedTransformerBlock"]
    _repeated_blocks = ["AnchorConditionedTransformerBlock"]

    def _convert(self) -> None:
        # The blocks change their class: building new ones would double the memory and time of construction.
        for block in self.blocks:
            block.__class__ = AnchorConditionedTransformerBlock
            before, processor = block.attn1.processor, AnchorConditionedAttnProcessor()
            if type(before) is not self.stock_processor:
                raise ValueError(
                    f"The transformer's self-attention uses a {type(before).__name__}, but only a "
                    f"{self.stock_processor.__name__} can be converted: set that first."
                )
            processor._attention_backend, processor._parallel_config = (
                before._attention_backend,
                before._parallel_config,
            )
            block.attn1.set_processor(processor)
        self.row_index = RowIndex()
        self.appended_rotary = AppendedRotaryEmbedding()
        self.anchor_window: int | None = None

    def set_anchor_window(self, window: int | None) -> None:
        """Restricts self-attention: each latent frame attends only to the anchors and to frames at most `window` away.

        This is faster, but changes the model's output; use it with an anchor LoRA that was trained with the same window.
        Anchors are the frames with a timestep below that of their video. In a video without anchors, and in any call with one
        timestep per sample, all frames attend to all frames with the usual attention backend.

        Args:
            window (`int`, *optional*): distance in latent frames; `None`, the initial value, for all frames.

        Raises:
            `ValueError`: `window` is negative.
        """
        if window is not None and window < 0:
            raise ValueError(f"`window={window}` must be at least 0, in latent frames, or None for all frames.")
        self.anchor_window = window

    def set_attention_backend(self, backend: str) -> None:
        """Sets the attention backend as in diffusers; `"auto"` also chooses the fastest one that works on this device.

        `"auto"` considers the installed backends that support the device, the dtype and the heads, and agree with the native
        backend; see [`animate.attention.choose_backend`]. Call it after the model is on its device, and again after a change
        between `eval()` and `train()`.
        """
        if backend != "auto":
            super().set_attention_backend(backend)
            return
        attentions = [module for module in self.modules() if isinstance(module, AttentionModuleMixin)]
        backend = choose_backend(
            get_module_execution_device(self),
            self.dtype,
            self.config.attention_head_dim,
            self.training,
            any(attention.processor._parallel_config is not None for attention in attentions),
        )
        # Set only on this model: the base class would also change the process-wide backend, which other models use.
        for attention in attentions:
            attention.set_attention_backend(backend)

    def cache_context(self, name: str, **step: Any) -> AbstractContextManager:
        """Sets the cache context as in diffusers. Versions without `SeaCacheConfig` accept only the name, so `step` is dropped."""
        cache_context = super().cache_context
        return cache_context(name, **(step if len(inspect.signature(cache_context).parameters) > 1 else {}))

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_image: torch.Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        anchor_window: int | None = None,
        anchor_positions: torch.Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predicts the velocity `noise - clean` for every latent.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, C, F, H, W)`):
                Noisy latents, with anchors in place. `F`, `H`, `W` are multiples of the patch size. With `anchor_positions`,
                the last `A` of the `F` frames are appended anchors, each a latent frame of one image.
            timestep (`torch.Tensor` of shape `(B,)`, `(B, F)` or `(B, seq_len)`):
                Timesteps from 0 (clean) to 1000 (noise): one per sample, one per latent frame, or one per token (as in the
                stock model, with modulation of the size of the tokens). With a temporal patch size above 1, which no Wan
                model has, `F` here counts patches.
            encoder_hidden_states (`torch.Tensor` of shape `(B, S, text_dim)`):
                Text embeddings.
            encoder_hidden_states_image (`torch.Tensor`, *optional*):
                Image embeddings of Wan2.1 image-to-video models.
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`Transformer2DModelOutput`] instead of a tuple.
            attention_kwargs (`dict`, *optional*):
                `{"scale": s}` multiplies LoRA adapters by `s`.
            anchor_window (`int`, *optional*):
                Window of this forward, as in [`set_anchor_window`]; the model's window when left out.
            anchor_positions (`torch.Tensor` of shape `(B, A)`, *optional*):
                Positions in time of the last `A` frames of `hidden_states`, in (fractional) latent frames, from
                [`~animate.conditioning.frame_position`]. Values below 0 mark padding, which no frame attends to, for videos
                with fewer anchors than others in the batch. Read on the CPU.

        Returns:
            [`Transformer2DModelOutput`] or `tuple`: `sample` of shape `(B, out_channels, F, H, W)`, without the appended
            frames.

        Raises:
            `ValueError`: the latents do not divide into patches, `timestep` has none of the three shapes, the positions do
                not fit the latents, or a window or padding is used with context parallelism.
        """
        grid = self._patch_grid(hidden_states)
        num_tokens = grid[0] * grid[1] * grid[2]
        timestep = self._check_timestep(timestep, hidden_states.shape[0], grid)
        num_frames = grid[0] - self._count_appended(anchor_positions, hidden_states)
        window = self.anchor_window if anchor_window is None else anchor_window
        seen = self._seen_frames(timestep, num_frames, window, anchor_positions)
        # Rows take little memory. Always using one row per frame avoids that a compiled block is compiled again for one row.
        if timestep.shape[1] == 1:
            timestep = timestep.expand(-1, grid[0])

        rotary_emb = self.rope(hidden_states[:, :, : num_frames * self.config.patch_size[0]])
        rotary_emb = self.appended_rotary(*rotary_emb, num_frames, anchor_positions)
        hidden_states = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()

        # The rows of all tokens, or under context parallelism those of this rank's tokens. An index is needed only if the
        # tokens of a row are not equal consecutive runs, which is the case in a shard.
        row_index = self.row_index(timestep.shape[1], num_tokens, hidden_states.device)
        if timestep.shape[1] == num_tokens:
            timestep, row_index = timestep[:, row_index], None
        elif row_index.shape[0] == num_tokens:
            row_index = None

        temb, modulation = self._time_rows(timestep)
        encoder_hidden_states = self.condition_embedder.text_embedder(encoder_hidden_states)
        if encoder_hidden_states_image is not None:
            image_states = self.condition_embedder.image_embedder(encoder_hidden_states_image)
            encoder_hidden_states = torch.cat([image_states, encoder_hidden_states], dim=1)

        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(
                    block, hidden_states, encoder_hidden_states, modulation, rotary_emb, row_index, seen
                )
            else:
                hidden_states = block(hidden_states, encoder_hidden_states, modulation, rotary_emb, row_index, seen)

        shift, scale = (self.scale_shift_table.to(temb.device).unsqueeze(1) + temb.unsqueeze(2)).unbind(dim=2)
        # With a device map, the last block may be on another device than the time embedding.
        shift, scale = shift.to(hidden_states.device), scale.to(hidden_states.device)
        hidden_states = modulated_layer_norm(hidden_states, scale, shift, self.norm_out.eps, row_index)
        hidden_states = self.proj_out(hidden_states)

        # (B, f*h*w, p_t*p_h*p_w*C) -> (B, C, f*p_t, h*p_h, w*p_w)
        hidden_states = hidden_states.unflatten(2, (*self.config.patch_size, -1)).unflatten(1, grid)[:, :num_frames]
        hidden_states = hidden_states.permute(0, 7, 1, 4, 2, 5, 3, 6)
        sample = hidden_states.flatten(6, 7).flatten(4, 5).flatten(2, 3)

        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def check_size(self, height: int, width: int) -> None:
        """Raises `ValueError` for latents with more patches on a side than the rotary embedding has positions."""
        _, *patch = self.config.patch_size
        for name, size, cells in zip(("height", "width"), (height, width), patch):
            if size // cells > self.config.rope_max_seq_len:
                raise ValueError(
                    f"The {name} is {size // cells} patches, but this model's rotary embedding has "
                    f"{self.config.rope_max_seq_len} positions; use a smaller {name}."
                )

    def _patch_grid(self, hidden_states: torch.Tensor) -> tuple[int, int, int]:
        size, patch_size = tuple(hidden_states.shape[2:]), tuple(self.config.patch_size)
        if any(n % p for n, p in zip(size, patch_size, strict=True)):
            raise ValueError(
                f"hidden_states has {size} latent frames, height and width; pass multiples of the patch size {patch_size}."
            )
        return tuple(n // p for n, p in zip(size, patch_size, strict=True))

    @staticmethod
    def _check_timestep(timestep: torch.Tensor, batch_size: int, grid: tuple[int, int, int]) -> torch.Tensor:
        """Checks the timesteps and returns them as `(B, R)`."""
        num_frames, num_tokens = grid[0], grid[0] * grid[1] * grid[2]
        accepted = ((batch_size,), (batch_size, num_frames), (batch_size, num_tokens))
        if timestep.shape not in accepted:
            raise ValueError(
                f"timestep has shape {tuple(timestep.shape)}; pass {accepted[0]} for one timestep per sample, {accepted[1]} "
                f"for one per latent frame, or {accepted[2]} for one per token."
            )
        return timestep.unsqueeze(1) if timestep.ndim == 1 else timestep

    def _count_appended(self, anchor_positions: torch.Tensor | None, hidden_states: torch.Tensor) -> int:
        if anchor_positions is None:
            return 0
        batch_size, _, frames = hidden_states.shape[:3]
        shape = tuple(anchor_positions.shape)
        if len(shape) != 2 or shape[0] != batch_size or not 0 < shape[1] < frames:
            raise ValueError(
                f"anchor_positions has shape {shape}; pass ({batch_size}, A), the positions of the last A of the {frames} "
                "frames of hidden_states, with A at least 1 and below that number."
            )
        if self.config.patch_size[0] > 1:
            raise ValueError(
                f"anchor_positions is for models whose patches are one latent frame long, not {self.config.patch_size[0]}: "
                "leave it out."
            )
        return shape[1]

    def _seen_frames(
        self, timestep: torch.Tensor, num_frames: int, window: int | None, anchor_positions: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Returns the mask of frames that attend to each other, `(B, F + A, F + A)`, or `None` if all attend to all."""
        places, absent = None, None
        if anchor_positions is not None:
            anchor_positions = anchor_positions.to(timestep.device)
            clip = torch.arange(num_frames, device=timestep.device).expand(len(timestep), -1)
            # An appended anchor has the neighbours of the latent frame that contains its frame.
            places = torch.cat([clip, anchor_positions.round()], dim=1)
            absent = places < 0 if (anchor_positions < 0).any() else None
        if window is not None and timestep.shape[1] > 1:
            count = num_frames if places is None else places.shape[1]
            seen = frames_within_window(timestep.unflatten(1, (count, -1)).amax(dim=2), window, places)
        elif absent is None:
            return None
        else:
            seen = torch.ones(*absent.shape, absent.shape[1], dtype=torch.bool, device=absent.device)
        if any(block.attn1.processor._parallel_config is not None for block in self.blocks):
            raise ValueError(
                "Window attention needs all tokens on one device; call set_anchor_window(None) for context parallelism."
                if absent is None
                else "Videos with fewer appended anchors than others in the batch need all tokens on one device; generate them "
                "in a separate call, or without context parallelism."
            )
        return seen if absent is None else seen & ~absent[:, None, :]

    def _time_rows(self, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns embeddings `(B, R, D)` and block modulation `(B, R, 6, D)` of timesteps `(B, R)`, float32 or wider.

        The stock model and autocast cast the embedding to the dtype of the tokens before the projection. In bfloat16, this
        leaves 8 bits for a scale that multiplies every token. For few rows, float32 costs nothing.
        """
        embedder = self.condition_embedder
        with torch.autocast(timestep.device.type, enabled=False):
            frequencies = embedder.timesteps_proj(timestep.flatten()).unflatten(0, timestep.shape)
            temb = embedder.time_embedder(frequencies.to(embedder.time_embedder.linear_1.weight.dtype))
            modulation = embedder.time_proj(embedder.act_fn(temb).to(embedder.time_proj.weight.dtype))
        dtype = torch.promote_types(temb.dtype, torch.float32)
        return temb.to(dtype), modulation.unflatten(2, (6, -1)).to(dtype)


class AnchorConditionedTransformer3D(TimesPerFrame, WanTransformer3DModel):
    """Wan video transformer with one timestep per latent frame.

    Config and state dict are those of [`WanTransformer3DModel`], so Wan checkpoints and LoRAs load into this class, and its
    checkpoints load into the stock class. With the same weights and timesteps, its output equals that of the stock class.
    With timesteps per frame, it needs no modulation table of the size of the tokens, and the modulation stays in float32 in a
    bfloat16 model (load with `from_pretrained(..., dtype=torch.bfloat16)`; `.to(torch.bfloat16)` also casts those weights).

    Arguments of the constructor are those of [`WanTransformer3DModel`].
    """

    stock_class = WanTransformer3DModel
    further_inputs = {"image_dim": "image embeddings"}
    # `time_proj` is added to the stock list, because its output is the modulation.
    _keep_in_fp32_modules = [*WanTransformer3DModel._keep_in_fp32_modules, "time_proj"]
    # The stock plan shards a 2-D timestep as if it were per token. Here every rank has all timesteps, and the row index is
    # sharded with the tokens, because a shard may begin in the middle of a frame. The rotary embedding is sharded after that
    # of appended frames has been added.
    _cp_plan = {
        **{name: plan for name, plan in WanTransformer3DModel._cp_plan.items() if name not in ("", "rope")},
        "appended_rotary": WanTransformer3DModel._cp_plan["rope"],
        "row_index": {0: ContextParallelInput(split_dim=0, expected_dims=1, split_output=True)},
    }

    @configured_as(WanTransformer3DModel)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._convert()
