"""What the video UNet is told of an image and of a motion's text, made the same way to train and to sample."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from diffusers.utils import logging
from transformers import CLIPVisionModelWithProjection, PreTrainedTokenizerBase, T5EncoderModel, UMT5EncoderModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..animate.anchor import crop_and_resize


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
    pictures = torch.stack([crop_and_resize((picture.clamp(-1, 1) + 1) / 2, size, size) for picture in pixels.float()])
    mean, std = (pictures.new_tensor(values).view(1, 3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return image_encoder(((pictures + 1) / 2 - mean).div(std).to(image_encoder.dtype)).image_embeds


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
