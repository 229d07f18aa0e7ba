"""Checks that the components and the embeddings of a Factorized-Dreamer pipeline fit together."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from transformers import (
    CLIPTextModel,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerBase,
    T5EncoderModel,
    UMT5EncoderModel,
)

from .unet import FactorizedDreamerUNet


def check_components(
    unet: FactorizedDreamerUNet,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    text_encoder_2: T5EncoderModel | UMT5EncoderModel | None,
    tokenizer_2: PreTrainedTokenizerBase | None,
    image_encoder: CLIPVisionModelWithProjection | None,
) -> None:
    """Raises a `ValueError` if a component does not fit the UNet; the message names both widths."""
    if not isinstance(unet, FactorizedDreamerUNet):
        raise ValueError(
            f"`unet` is a {type(unet).__name__}; convert it with `FactorizedDreamerUNet.from_unet2d(unet)`."
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
                f"`{name}` that the UNet was trained with."
            )
    if (text_encoder_2 is None) != (tokenizer_2 is None):
        raise ValueError("`text_encoder_2` and `tokenizer_2` belong together; give both or none.")


def check_embeds(
    name: str, embeds: torch.Tensor | None, motion_embeds: torch.Tensor | None, num_prompts: int, width: int | None
) -> None:
    """Raises a `ValueError` if only one of a call's two embeddings is given, or if `motion_embeds` has the wrong shape.

    Args:
        name (`str`): the argument that holds the CLIP embeddings; the T5 embeddings are in the argument `{name}_2`.
        embeds, motion_embeds (`torch.Tensor`, *optional*): embeddings of CLIP and of T5.
        num_prompts (`int`): number of prompts in the call.
        width (`int`, *optional*): `motion_embed_dim` of the UNet.
    """
    if width is not None and (motion_embeds is None) != (embeds is None):
        raise ValueError(f"`{name}` holds CLIP embeddings and `{name}_2` T5 embeddings; give both or none.")
    if motion_embeds is not None and (motion_embeds.ndim != 3 or motion_embeds.shape[::2] != (num_prompts, width)):
        raise ValueError(
            f"`{name}_2` has shape {tuple(motion_embeds.shape)}, but this call needs ({num_prompts}, tokens, {width})."
        )
