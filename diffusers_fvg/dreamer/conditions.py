"""Inputs of the video UNet besides the prompt, for training and for sampling: image latents, CLIP image, motion text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.utils import logging
from transformers import CLIPVisionModelWithProjection, PreTrainedTokenizerBase, T5EncoderModel, UMT5EncoderModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..animate.anchor import Anchor, cover, pictures_of
from ..devices import get_module_execution_device


logger = logging.get_logger(__name__)

# Frames that the image VAE encodes or decodes at once. Its activations are large, and a larger batch is not faster.
VAE_BATCH = 4


def encode_pixels(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Encodes images `(N, 3, H, W)` in [-1, 1] to scaled latents `(N, C, h, w)`, float32: the mode of the posterior."""
    chunks = [vae.encode(chunk.to(vae.dtype)).latent_dist.mode() for chunk in pixels.split(VAE_BATCH)]
    return torch.cat(chunks).float() * vae.config.scaling_factor


def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Decodes scaled latents `(N, C, h, w)` to images `(N, 3, H, W)` in about [-1, 1], float32: see [`encode_pixels`]."""
    latents = (latents / vae.config.scaling_factor).to(vae.dtype)
    return torch.cat([vae.decode(chunk, return_dict=False)[0] for chunk in latents.split(VAE_BATCH)]).float()


def embed_images(image_encoder: CLIPVisionModelWithProjection, pixels: torch.Tensor) -> torch.Tensor:
    """Embeds images `(N, 3, H, W)` in [-1, 1] as pooled CLIP embeddings `(N, projection_dim)`.

    Each image is scaled to cover CLIP's square input and cropped at the centre, as in CLIP's training.
    """
    size = image_encoder.config.image_size
    pictures = torch.stack([cover((picture.clamp(-1, 1) + 1) / 2, size, size) for picture in pixels.float()])
    mean, std = (pictures.new_tensor(values).view(1, 3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return image_encoder((pictures - mean).div(std).to(image_encoder.dtype)).image_embeds


def embed_motion(
    text_encoder: T5EncoderModel | UMT5EncoderModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    max_sequence_length: int,
    device: torch.device,
) -> torch.Tensor:
    """Encodes texts with T5 to `(N, max_sequence_length, d_model)`, zero where padded.

    A text with more tokens is truncated, with a warning.
    """
    tokens = tokenizer(
        texts, padding="max_length", max_length=max_sequence_length, truncation=True, return_tensors="pt"
    )
    for text, full in zip(texts, tokenizer(texts).input_ids):
        if len(full) > max_sequence_length:
            logger.warning(
                f"The motion prompt {text[:60]!r} has {len(full)} tokens and is cut to `max_sequence_length="
                f"{max_sequence_length}`."
            )
    mask = tokens.attention_mask.to(device)
    return text_encoder(tokens.input_ids.to(device), mask).last_hidden_state * mask[..., None]


def image_conditions(
    unet_config: Mapping[str, Any],
    vae: AutoencoderKL,
    image_encoder: CLIPVisionModelWithProjection | None,
    pixels: torch.Tensor,
    image_latents: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Returns the arguments of the UNet that describe the first frames: `image_latents` with `paca`, `image_embeds` with
    `t2i_adapter`.

    Args:
        unet_config (`Mapping`): config of the UNet.
        vae, image_encoder: components of the pipeline; each runs on its own device.
        pixels (`torch.Tensor` of shape `(N, 3, H, W)`): first frames in [-1, 1].
        image_latents (`torch.Tensor` of shape `(N, C, h, w)`, *optional*): latents of the same frames; left out, `vae`
            encodes `pixels`.
    """
    conditions = {}
    if unet_config["paca"] is not None:
        if image_latents is None:
            image_latents = encode_pixels(vae, pixels.to(get_module_execution_device(vae)))
        conditions["image_latents"] = image_latents
    if unet_config["t2i_adapter"] is not None:
        conditions["image_embeds"] = embed_images(image_encoder, pixels.to(get_module_execution_device(image_encoder)))
    return conditions


def resolve_first_frame(
    anchors: Sequence[Anchor], num_frames: int, unet_config: Mapping[str, Any]
) -> list[tuple[range, Anchor]]:
    """Checks the anchors of one video and returns them with the frames that they fill; this model takes at most one.

    Raises:
        `ValueError`: more than one anchor, an anchor of several images, at another frame than 0 or with a strength other
            than 1, or a UNet with neither `paca` nor `t2i_adapter`.
    """
    if anchors and unet_config["paca"] is None and unet_config["t2i_adapter"] is None:
        raise ValueError(
            'The UNet has neither `paca` nor `t2i_adapter`, so it takes no first frame; use `mode="direct"`.'
        )
    for anchor in anchors:
        if len(pictures_of(anchor.image)) > 1:
            raise ValueError("This model takes one image as its first frame, but the anchor holds several; pass one.")
        if anchor.frame_index not in (0, -num_frames):
            raise ValueError(
                f"The anchor has `frame_index={anchor.frame_index}`, but this model takes a first frame only; use 0."
            )
        if anchor.strength != 1:
            raise ValueError(
                f"The anchor has `strength={anchor.strength}`, but this model takes a fixed first frame only; use 1."
            )
    if len(anchors) > 1:
        raise ValueError(
            f"This model takes one anchor, its first frame, but got {len(anchors)}; leave the others out."
        )
    return [(range(1), anchor) for anchor in anchors]
