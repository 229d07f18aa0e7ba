"""The anchor-conditioned transformer of SkyReels-V2 diffusion forcing: Wan's network, trained with timesteps per frame.

Sources: arXiv 2504.13074; huggingface/diffusers 0.42.1, models/transformers/transformer_skyreels_v2.py.
"""

from typing import TypeAlias

import torch
from diffusers import SkyReelsV2Transformer3DModel, WanTransformer3DModel
from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2AttnProcessor

from .stock_weights import configured_as
from .transformer_anchor import AnchorConditionedTransformer3D, TimesPerFrame


# Index of the frame-rate embedding: 0 is 16 frames per second, 1 is any other rate (diffusers, pipelines/skyreels_v2). The
# published diffusion-forcing models generate 24.
FRAME_RATE = 1


class AnchorConditionedSkyReelsV2Transformer3D(TimesPerFrame, SkyReelsV2Transformer3DModel):
    """SkyReels-V2 video transformer with one timestep per latent frame.

    Config and state dict are those of [`SkyReelsV2Transformer3DModel`]. With the same weights and timesteps, its output
    equals that of the stock class with `enable_diffusion_forcing=True`, at 24 frames per second. All frames attend to all
    frames; use the stock pipeline for asynchronous sampling in causal blocks (`num_frame_per_block`).

    Arguments of the constructor are those of [`SkyReelsV2Transformer3DModel`].

    Raises:
        `ValueError`: `num_frame_per_block` is not 1.
    """

    stock_class = SkyReelsV2Transformer3DModel
    stock_processor = SkyReelsV2AttnProcessor
    further_inputs = {"image_dim": "image embeddings"}
    _keep_in_fp32_modules = [*SkyReelsV2Transformer3DModel._keep_in_fp32_modules, "time_proj"]

    @configured_as(SkyReelsV2Transformer3DModel)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._convert()

    def _convert(self) -> None:
        if self.config.num_frame_per_block != 1:
            raise ValueError(
                f"The transformer has `num_frame_per_block={self.config.num_frame_per_block}`, but anchors need frames that "
                "attend to all others: set it to 1."
            )
        super()._convert()

    def _time_rows(self, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        temb, modulation = super()._time_rows(timestep)
        if self.config.inject_sample_info:
            rate = self.fps_embedding(torch.full((1,), FRAME_RATE, device=timestep.device))
            modulation = modulation + self.fps_projection(rate).unflatten(1, (1, 6, -1)).to(modulation.dtype)
        return temb, modulation


# Classes that pipelines with Wan's network accept as their video model.
WanNetwork: TypeAlias = (
    AnchorConditionedTransformer3D
    | AnchorConditionedSkyReelsV2Transformer3D
    | WanTransformer3DModel
    | SkyReelsV2Transformer3DModel
)


def as_anchored(
    transformer: WanNetwork, name: str = "transformer"
) -> AnchorConditionedTransformer3D | AnchorConditionedSkyReelsV2Transformer3D:
    """Converts a stock transformer of Wan's network to the anchor-conditioned class; see [`StockWeights.from_stock`]."""
    inner = getattr(transformer, "_orig_mod", transformer)
    is_skyreels = isinstance(inner, SkyReelsV2Transformer3DModel)
    kind = AnchorConditionedSkyReelsV2Transformer3D if is_skyreels else AnchorConditionedTransformer3D
    return kind.from_stock(transformer, name)
