"""What the video UNet is told of an image and of a motion's text, made the same way to train and to sample."""

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

# Frames that the image VAE encodes or decodes at once: its activations are large, and more are not faster.
VAE_BATCH = 4


def encode_pixels(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Pictures `(N, 3, H, W)` in [-1, 1] to scaled latents `(N, C, h, w)`, float32: the mode of the posterior, no sample."""
    chunks = [vae.encode(chunk.to(vae.dtype)).latent_dist.mode() for chunk in pixels.split(VAE_BATCH)]
    return torch.cat(chunks).float() * vae.config.scaling_factor


def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Inverse of [`encode_pixels`]."""
    latents = (latents / vae.config.scaling_factor).to(vae.dtype)
    return torch.cat([vae.decode(chunk, return_dict=False)[0] for chunk in latents.split(VAE_BATCH)]).float()


def embed_images(image_encoder: CLIPVisionModelWithProjection, pixels: torch.Tensor) -> torch.Tensor:
    """Pictures `(N, 3, H, W)` in [-1, 1] to pooled CLIP embeddings `(N, projection_dim)`.

    Scaled to cover CLIP's square and cropped at the centre, as CLIP is trained.
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
    """Texts to T5 tokens `(N, max_sequence_length, d_model)`, zero where padded. A longer text is cut, with a warning."""
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
    """What the designs of a UNet take of first frames: `image_latents`, `image_embeds`, both or none.

    Args:
        unet_config (`Mapping`): of the UNet.
        vae, image_encoder: of the pipeline; each runs where it is.
        pixels (`torch.Tensor` of shape `(N, 3, H, W)`): in [-1, 1].
        image_latents (`torch.Tensor` of shape `(N, C, h, w)`, *optional*): of the same pictures, where they are known.
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
    """Checks the anchors of one video, of which this model takes one, and returns it with the frame that it is.

    Raises:
        `ValueError`: anything but one fixed picture at frame 0, or a UNet without a design that takes one.
    """
    if anchors and unet_config["paca"] is None and unet_config["t2i_adapter"] is None:
        raise ValueError(
            'The UNet has neither `paca` nor `t2i_adapter`, so it takes no first frame; use `mode="direct"`.'
        )
    for anchor in anchors:
        if len(pictures_of(anchor.image)) > 1:
            raise ValueError("This model takes one picture as its first frame, but the anchor is a run of several.")
        if anchor.frame_index not in (0, -num_frames):
            raise ValueError(
                f"Anchor at `frame_index={anchor.frame_index}`: this model takes a first frame only; use 0."
            )
        if anchor.strength != 1:
            raise ValueError(f"Anchor `strength={anchor.strength}`: this model takes a fixed first frame only; use 1.")
    if len(anchors) > 1:
        raise ValueError(f"This model takes one anchor, its first frame, but got {len(anchors)}.")
    return [(range(1), anchor) for anchor in anchors]
