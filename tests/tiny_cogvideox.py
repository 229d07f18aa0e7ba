"""Real components of a CogVideoX 1.5 pipeline at tiny size, the same weights on every call."""

from collections.abc import Callable
from functools import partial

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from tiny import WORDS, built, tiny_composer, tiny_rewriter, tiny_tokenizer
from transformers import T5Config, T5EncoderModel

from diffusers_fvg.animate.transformer_anchor_cogvideox import AnchorConditionedCogVideoXTransformer3D
from diffusers_fvg.pipelines.pipeline_factorized_cogvideox import FactorizedCogVideoXPipeline
from diffusers_fvg.schedules.cogvideox import COGVIDEOX_PRESETS


TRANSFORMER_CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 32,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
    "patch_size": 2,
    "patch_size_t": 2,
    "patch_bias": False,
    "max_text_seq_length": 16,
    "use_rotary_positional_embeddings": True,
}
# Config of CogVideoX 1.0: no temporal patch.
CONFIG_1_0 = {"patch_size_t": None, "patch_bias": True}


def tiny_cogvideox_transformer(anchored: bool = False, seed: int = 0, **config) -> CogVideoXTransformer3DModel:
    """Builds the stock class or, with `anchored`, ours, both with the same weights."""
    torch.manual_seed(seed)
    cls = AnchorConditionedCogVideoXTransformer3D if anchored else CogVideoXTransformer3DModel
    model = cls(**(TRANSFORMER_CONFIG | config)).eval()
    with torch.no_grad():
        # Norms are initialized as the identity, which would hide the effect of their weights.
        for name, parameter in model.named_parameters():
            if "norm" in name and "linear" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tiny_t5() -> T5EncoderModel:
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(WORDS) + 3, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    return T5EncoderModel(config).eval()


def tiny_cogvideox_vae() -> AutoencoderKLCogVideoX:
    """8 times smaller in space, 4 times in time, 4 channels."""
    torch.manual_seed(0)
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.7,
        invert_scale_latents=True,
    ).eval()


def _components(anchored: bool = False, **config) -> dict[str, Callable]:
    return {
        "tokenizer": tiny_tokenizer,
        "text_encoder": tiny_t5,
        "transformer": partial(tiny_cogvideox_transformer, anchored, **config),
        "vae": tiny_cogvideox_vae,
    }


def tiny_cogvideox_components(anchored: bool = False, **config) -> dict:
    """Returns the components of a `CogVideoXPipeline`, without its scheduler."""
    return built(_components(anchored, **config), {})


def tiny_cogvideox_pipeline(**changes) -> FactorizedCogVideoXPipeline:
    """All three stages at tiny size; `changes` replace components and settings."""
    parts = _components(anchored=True) | {
        "scheduler": COGVIDEOX_PRESETS["anchored-15"].make_scheduler,
        "rewriter": tiny_rewriter,
        "composer": tiny_composer,
    }
    return FactorizedCogVideoXPipeline(**built(parts, {"anchor_lora": None, "schedulers": None} | changes))
