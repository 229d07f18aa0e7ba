"""Real components of a Factorized-Dreamer pipeline at tiny size, the same weights on every call.

Those that no test changes are the same objects as well: building them takes longer than most tests.
"""

from functools import cache

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tiny import WORDS, tiny_composer, tiny_rewriter, tiny_tokenizer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from diffusers_fvg.dreamer.schedule import DREAMER_PRESETS
from diffusers_fvg.dreamer.unet import FactorizedDreamerUNet
from diffusers_fvg.pipelines.pipeline_factorized_dreamer import FactorizedDreamerPipeline


# A Stable Diffusion 1.5 in small: attention above, none at the coarsest level but in the middle.
UNET_CONFIG = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
SWITCHES = {"num_frames": 4, "image_embed_dim": 12, "motion_embed_dim": 24}
PLAIN = {"t2i_adapter": None, "paca": None, "motion_embed_dim": None}


def tiny_unet2d(**config) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**(UNET_CONFIG | config)).eval()


def tiny_unet(trained: bool = False, **switches) -> FactorizedDreamerUNet:
    """Made of `tiny_unet2d()`; `trained` moves its layers away from the identity that they begin as."""
    unet2d = tiny_unet2d()
    torch.manual_seed(1)
    unet = FactorizedDreamerUNet.from_unet2d(unet2d, **(SWITCHES | switches))
    if trained:
        with torch.no_grad():
            for _, parameter in unet.video_parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return unet


@cache
def tiny_clip_text(hidden_size: int = 32) -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=16,
        eos_token_id=1,
    )
    return CLIPTextModel(config).eval()


@cache
def tiny_clip_vision(projection_dim: int = 12) -> CLIPVisionModelWithProjection:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        projection_dim=projection_dim,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return CLIPVisionModelWithProjection(config).eval()


@cache
def tiny_motion_encoder(d_model: int = 24) -> T5EncoderModel:
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(WORDS) + 3, d_model=d_model, d_kv=6, d_ff=16, num_layers=1, num_heads=4)
    return T5EncoderModel(config).eval()


@cache
def tiny_image_vae(latent_channels: int = 4) -> AutoencoderKL:
    """4 times smaller."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=latent_channels,
        norm_num_groups=4,
    ).eval()


def clip_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 16
    return tokenizer


shared_rewriter, shared_composer = cache(tiny_rewriter), cache(tiny_composer)


def tiny_dreamer_pipeline(**changes) -> FactorizedDreamerPipeline:
    """All three stages at tiny size; `changes` replace components and settings."""
    parts = {
        "tokenizer": clip_tokenizer(),
        "text_encoder": tiny_clip_text(),
        "unet": changes["unet"] if "unet" in changes else tiny_unet(trained=True),
        "vae": tiny_image_vae(),
        "scheduler": DREAMER_PRESETS["full-50"].make_scheduler(),
        "tokenizer_2": tiny_tokenizer(),
        "text_encoder_2": tiny_motion_encoder(),
        "image_encoder": tiny_clip_vision(),
        "rewriter": shared_rewriter(),
        "composer": shared_composer(),
        "schedulers": None,
    }
    pipe = FactorizedDreamerPipeline(**parts | changes)
    pipe.set_progress_bar_config(disable=True)
    return pipe
