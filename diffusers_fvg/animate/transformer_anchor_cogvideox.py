"""The anchor-conditioned video transformer of CogVideoX: one timestep per latent frame.

As in [`animate.transformer_anchor`], an anchor is a clean frame (timestep 0) among noisy ones, and a timestep acts through
modulation vectors that are the same for all tokens of a frame: one row per frame, not per token. CogVideoX differs in two
points:

* Text tokens pass through the same blocks and norms, with their own modulation vectors. They belong to no frame and take the
  largest timestep of their video, which is also their timestep in text-to-video.
* CogVideoX 1.5 puts two latent frames into one patch, and a patch has one timestep. So the frames of a patch must be anchored
  together or not at all. An odd number of latent frames is padded at the front with a copy of the first (THUDM/CogVideo,
  finetune/models/cogvideox_t2v/lora_trainer.py). An anchored first frame therefore fills its patch, as the copy is anchored
  with it.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNorm, CogVideoXLayerNormZero
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from diffusers.utils import apply_lora_scale

from ..kernels import gated_residual
from .stock_weights import StockWeights, configured_as


def _modulated(normed: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Returns `normed * (1 + scale) + shift` for tokens `(B, L, D)` and rows `(B, R, D)`, each for an equal run of tokens.

    The rows are float32 or wider: they are small, and in bfloat16 `1 + scale` would keep only 8 bits.
    """
    dtype = torch.promote_types(normed.dtype, torch.float32)
    scale, shift = (rows.to(dtype).unsqueeze(2) for rows in (scale, shift))
    runs = normed.unflatten(1, (scale.shape[1], -1))
    return torch.addcmul(shift, runs, 1 + scale).flatten(1, 2).to(normed.dtype)


class AnchorConditionedLayerNormZero(CogVideoXLayerNormZero):
    """The norm of a block with one row of modulation per timestep. Weights and arithmetic are those of the stock norm."""

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(B, L, D)`): video tokens, ordered by frame.
            encoder_hidden_states (`torch.Tensor` of shape `(B, S, D)`): text tokens.
            temb (`torch.Tensor` of shape `(B, 1 + R, T)`): time embeddings: first that of the text, then one for each of `R`
                equal runs of video tokens.

        Returns:
            `tuple`: normed video and text tokens, and the gates of their residuals, of shapes `(B, R, D)` and `(B, 1, D)`.
        """
        rows = self.linear(self.silu(temb)).chunk(6, dim=2)
        shift, scale, gate = (row[:, 1:] for row in rows[:3])
        text_shift, text_scale, text_gate = (row[:, :1] for row in rows[3:])
        hidden_states = _modulated(self.norm(hidden_states), scale, shift)
        encoder_hidden_states = _modulated(self.norm(encoder_hidden_states), text_scale, text_shift)
        return hidden_states, encoder_hidden_states, gate, text_gate


class AnchorConditionedAdaLayerNorm(AdaLayerNorm):
    """The output norm with one row of modulation per timestep. Weights and arithmetic are those of the stock norm."""

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """Normalizes video tokens `x` `(B, L, D)` with time embeddings `temb` `(B, R, T)`, one per equal run of tokens."""
        shift, scale = self.linear(self.silu(temb)).chunk(2, dim=2)
        return _modulated(self.norm(x), scale, shift)


class AnchorConditionedCogVideoXBlock(CogVideoXBlock):
    """A CogVideoX block with one row of modulation per timestep. Weights and arithmetic are those of the stock block."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states, encoder_hidden_states, temb (`torch.Tensor`): as in [`AnchorConditionedLayerNormZero`].
            image_rotary_emb (`tuple` of two `torch.Tensor` of shape `(L, head_dim)`, *optional*): cosines and sines.
            attention_kwargs (`dict`, *optional*): arguments for the attention processor.

        Returns:
            `tuple` of two `torch.Tensor`: video tokens `(B, L, D)` and text tokens `(B, S, D)`.
        """
        normed, text_normed, gate, text_gate = self.norm1(hidden_states, encoder_hidden_states, temb)
        attended, text_attended = self.attn1(
            hidden_states=normed,
            encoder_hidden_states=text_normed,
            image_rotary_emb=image_rotary_emb,
            **(attention_kwargs or {}),
        )
        hidden_states = gated_residual(hidden_states, attended, gate)
        encoder_hidden_states = gated_residual(encoder_hidden_states, text_attended, text_gate)

        normed, text_normed, gate, text_gate = self.norm2(hidden_states, encoder_hidden_states, temb)
        fed = self.ff(torch.cat([text_normed, normed], dim=1))
        text_fed, fed = fed.split([text_normed.shape[1], normed.shape[1]], dim=1)
        hidden_states = gated_residual(hidden_states, fed, gate)
        return hidden_states, gated_residual(encoder_hidden_states, text_fed, text_gate)


# Step caches (such as the first-block cache) look up a block by its exact class.
TransformerBlockRegistry.register(
    model_class=AnchorConditionedCogVideoXBlock,
    metadata=TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=1),
)


class AnchorConditionedCogVideoXTransformer3D(StockWeights, CogVideoXTransformer3DModel):
    """CogVideoX video transformer with one timestep per latent frame.

    Config and state dict are those of [`CogVideoXTransformer3DModel`], for CogVideoX 1.0 and 1.5. So CogVideoX checkpoints
    and LoRAs load into this class, and its checkpoints load into the stock class. With the same weights and timesteps, its
    output equals that of the stock class.

    Arguments of the constructor are those of [`CogVideoXTransformer3DModel`].
    """

    stock_class = CogVideoXTransformer3DModel
    further_inputs = {"ofs_embed_dim": "an offset"}
    _no_split_modules = ["AnchorConditionedCogVideoXBlock", "CogVideoXPatchEmbed"]
    _repeated_blocks = ["AnchorConditionedCogVideoXBlock"]

    @configured_as(CogVideoXTransformer3DModel)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._convert()

    def _convert(self) -> None:
        # The blocks change their class: building new ones would double the memory and time of construction.
        for block in self.transformer_blocks:
            block.__class__ = AnchorConditionedCogVideoXBlock
            block.norm1.__class__ = block.norm2.__class__ = AnchorConditionedLayerNormZero
        self.norm_out.__class__ = AnchorConditionedAdaLayerNorm

    @property
    def patch_size_t(self) -> int:
        """Latent frames in a patch: 2 in CogVideoX 1.5, 1 in 1.0."""
        return self.config.patch_size_t or 1

    def check_size(self, height: int, width: int) -> None:
        """Raises `ValueError` for latents that are larger than the rotary embedding of CogVideoX 1.5."""
        config = self.config
        too_large = height > config.sample_height or width > config.sample_width
        if config.use_rotary_positional_embeddings and config.patch_size_t is not None and too_large:
            raise ValueError(
                f"Latents of {height} x {width} are larger than the {config.sample_height} x {config.sample_width} of this "
                "model's rotary embedding; make the video smaller."
            )

    def rotary_embedding(
        self, num_latent_frames: int, height: int, width: int, device: torch.device | str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Returns cosines and sines of the rotary embedding for `image_rotary_emb`, as the stock pipelines compute them.

        Args:
            num_latent_frames, height, width (`int`): size of the latents, including padding.
            device (`torch.device`, *optional*): device of the result.

        Returns:
            `tuple` of two `torch.Tensor` of shape `(L, head_dim)`, or `None` for a model without rotary embedding.

        Raises:
            `ValueError`: as in [`check_size`].
        """
        config = self.config
        if not config.use_rotary_positional_embeddings:
            return None
        self.check_size(height, width)
        patch = config.patch_size
        grid, largest = (
            (height // patch, width // patch),
            (config.sample_height // patch, config.sample_width // patch),
        )
        if config.patch_size_t is None:
            crops = get_resize_crop_region_for_grid(grid, largest[1], largest[0])
            return get_3d_rotary_pos_embed(config.attention_head_dim, crops, grid, num_latent_frames, device=device)
        return get_3d_rotary_pos_embed(
            config.attention_head_dim,
            None,
            grid,
            num_latent_frames // config.patch_size_t,
            grid_type="slice",
            max_size=largest,
            device=device,
        )

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        timestep_cond: torch.Tensor | None = None,
        ofs: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predicts the velocity `alpha * noise - sigma * clean` of every latent ([`schedules.cogvideox`]).

        Args:
            hidden_states (`torch.Tensor` of shape `(B, F, C, H, W)`):
                Noisy latents, with anchors in place. `F`, `H`, `W` are multiples of the patch size.
            encoder_hidden_states (`torch.Tensor` of shape `(B, S, text_dim)`):
                Text embeddings.
            timestep (`torch.Tensor` of shape `(B,)` or `(B, F)`):
                Timesteps from 0 (clean) to 999 (noise), one per sample or one per latent frame, equal for all frames of a
                patch. Text tokens use the largest timestep of their sample.
            timestep_cond (`torch.Tensor`, *optional*):
                Passed to the time embedding as in the stock class; no CogVideoX model has weights for it.
            ofs (`torch.Tensor` of shape `(1,)` or `(B,)`, *optional*):
                Offset of the models with `ofs_embed_dim`; 2 in CogVideoX1.5-5B-I2V.
            image_rotary_emb (`tuple` of two `torch.Tensor` of shape `(L, head_dim)`, *optional*):
                From [`rotary_embedding`].
            attention_kwargs (`dict`, *optional*):
                `{"scale": s}` multiplies LoRA adapters by `s`; the other entries are passed to the attention processors.
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`Transformer2DModelOutput`] instead of a tuple.

        Returns:
            [`Transformer2DModelOutput`] or `tuple`: `sample` of shape `(B, F, out_channels, H, W)`.

        Raises:
            `ValueError`: the latents do not divide into patches, `timestep` has another shape or differs within a patch, or
                `ofs` is missing.
        """
        grid = self._patch_grid(hidden_states)
        times = self._time_rows(timestep, hidden_states.shape[0], hidden_states.shape[1])
        temb = self.time_proj(times.flatten()).unflatten(0, times.shape).to(hidden_states.dtype)
        temb = self.time_embedding(temb, timestep_cond)
        if self.ofs_embedding is not None:
            if ofs is None:
                raise ValueError("This model has an offset embedding; pass `ofs`, 2.0 for CogVideoX1.5-5B-I2V.")
            temb = temb + self.ofs_embedding(self.ofs_proj(ofs).to(hidden_states.dtype)).unsqueeze(1)

        num_text_tokens = encoder_hidden_states.shape[1]
        tokens = self.embedding_dropout(self.patch_embed(encoder_hidden_states, hidden_states))
        # Contiguous, as the inputs of the other blocks are, so that compiled blocks share one graph.
        encoder_hidden_states = tokens[:, :num_text_tokens].contiguous()
        hidden_states = tokens[:, num_text_tokens:].contiguous()

        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states, encoder_hidden_states = self._gradient_checkpointing_func(
                    block, hidden_states, encoder_hidden_states, temb, image_rotary_emb, attention_kwargs
                )
            else:
                hidden_states, encoder_hidden_states = block(
                    hidden_states, encoder_hidden_states, temb, image_rotary_emb, attention_kwargs
                )

        hidden_states = self.norm_out(self.norm_final(hidden_states), temb=temb[:, 1:])
        hidden_states = self.proj_out(hidden_states)

        # (B, f*h*w, C*p_t*p*p) -> (B, f*p_t, C, h*p, w*p)
        patch = (self.patch_size_t, self.config.patch_size, self.config.patch_size)
        hidden_states = hidden_states.unflatten(2, (-1, *patch)).unflatten(1, grid).permute(0, 1, 5, 4, 2, 6, 3, 7)
        sample = hidden_states.flatten(6, 7).flatten(4, 5).flatten(1, 2)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _patch_grid(self, hidden_states: torch.Tensor) -> tuple[int, int, int]:
        num_frames, _, height, width = hidden_states.shape[1:]
        size, patch = (num_frames, height, width), (self.patch_size_t, self.config.patch_size, self.config.patch_size)
        if any(n % p for n, p in zip(size, patch)):
            raise ValueError(
                f"hidden_states has {size} latent frames, height and width; pass multiples of the patch size {patch}, frames "
                "padded at the front."
            )
        return tuple(n // p for n, p in zip(size, patch))

    def _time_rows(self, timestep: torch.Tensor, batch_size: int, num_frames: int) -> torch.Tensor:
        """Returns timesteps `(B, 1 + R)`: that of the text, then one for the whole video or one for each frame of patches."""
        accepted = ((batch_size,), (batch_size, num_frames))
        if timestep.shape not in accepted:
            raise ValueError(
                f"timestep has shape {tuple(timestep.shape)}; pass {accepted[0]} for one timestep per sample, or {accepted[1]} "
                "for one per latent frame."
            )
        if timestep.ndim == 1:
            return timestep.unsqueeze(1).expand(-1, 2)
        patches = timestep.unflatten(1, (-1, self.patch_size_t))
        split = (patches != patches[..., :1]).any(dim=2)
        if split.any():
            sample, index = split.nonzero()[0].tolist()
            raise ValueError(
                f"The {self.patch_size_t} latent frames of patch {index} of sample {sample} have the timesteps "
                f"{patches[sample, index].tolist()}, but a patch has one timestep: anchor all of its frames or none."
            )
        return torch.cat([timestep.amax(dim=1, keepdim=True), patches[..., 0]], dim=1)
