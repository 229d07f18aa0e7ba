"""The model families that can be trained: classes, sizes, encoding and objective. The transformer's config selects one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    DiffusionPipeline,
    WanPipeline,
)
from transformers import AutoTokenizer, T5EncoderModel, UMT5EncoderModel

from ..animate.conditioning import normalize_latents
from ..animate.transformer_anchor import AnchorConditionedTransformer3D
from ..animate.transformer_anchor_cogvideox import AnchorConditionedCogVideoXTransformer3D
from ..checks import check_num_frames, check_size
from ..schedules.cogvideox import training_sigmas
from .config import TrainConfig
from .objectives import FlowMatching, VPrediction


class Family:
    """Base class of the families: the attributes and methods that the cache needs."""

    # Options that the cached tensors depend on.
    cache_settings: tuple[str, ...] = ("buckets", "frame_rate", "clips_per_video", "max_sequence_length")
    # Whether the family supports `anchor_form="appended"`.
    takes_pictures = False

    def encoders(self, folder: Path) -> dict[str, Path]:
        """Returns the folders of the models whose output is cached."""
        return {part: folder / part for part in ("vae", "text_encoder", "tokenizer")}

    def cached(self, vae: torch.nn.Module, pixels: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        """Encodes clips `(B, 3, F, H, W)` to the tensors that the cache keeps of each."""
        return [{"latents": latents} for latents in self.encode(vae, pixels)]

    @staticmethod
    def encode(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Encodes pixels to latents. Subclasses define it."""
        raise NotImplementedError


class Wan(Family):
    """Wan 2.1 and 2.2.

    Args:
        folder (`Path`): folder of the pipeline.
        transformer_config (`dict`): config of the transformer to train.
    """

    transformer, vae, text_encoder = AnchorConditionedTransformer3D, AutoencoderKLWan, UMT5EncoderModel
    pipeline = WanPipeline
    takes_pictures = True

    def __init__(self, folder: Path, transformer_config: dict):
        self.objective = FlowMatching()
        self.vae_config = AutoencoderKLWan.load_config(folder / "vae")
        self.empty = _empty(self.transformer, transformer_config)

    def check_bucket(self, num_frames: int, height: int, width: int) -> None:
        """Checks that a bucket's size fits the scale factors of the VAE and the patch size.

        Raises:
            `ValueError`: the size does not fit; the message names the nearest ones that do.
        """
        check_num_frames(num_frames, self.vae_config["scale_factor_temporal"])
        patch = self.empty.config.patch_size
        check_size("height", height, self.vae_config["scale_factor_spatial"] * patch[1])
        check_size("width", width, self.vae_config["scale_factor_spatial"] * patch[2])

    @property
    def strides(self) -> tuple[int, int]:
        """Scale factors of the VAE: pixels per latent in space, frames per latent in time."""
        return self.vae_config["scale_factor_spatial"], self.vae_config["scale_factor_temporal"]

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns per token."""
        return tuple(self.empty.config.patch_size)

    @staticmethod
    def encode(vae: AutoencoderKLWan, pixels: torch.Tensor) -> torch.Tensor:
        """Encodes pixels `(B, 3, F, H, W)` in [-1, 1] to normalised latents `(B, C, f, h, w)`: the mode of the posterior."""
        with torch.no_grad():
            latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
        return normalize_latents(latents.float(), vae).cpu()


class CogVideoX(Family):
    """CogVideoX 1.0 and 1.5, with the methods of [`Wan`]."""

    transformer, vae, text_encoder = AnchorConditionedCogVideoXTransformer3D, AutoencoderKLCogVideoX, T5EncoderModel
    pipeline = CogVideoXPipeline

    def __init__(self, folder: Path, transformer_config: dict):
        scheduler = CogVideoXDDIMScheduler.from_pretrained(folder, subfolder="scheduler")
        self.objective = VPrediction(training_sigmas(scheduler), transformer_config.get("patch_size_t") or 1)
        self.vae_config = AutoencoderKLCogVideoX.load_config(folder / "vae")
        self.empty = _empty(self.transformer, transformer_config)

    def check_bucket(self, num_frames: int, height: int, width: int) -> None:
        spatial, temporal = self.strides
        # At sampling the VAE decodes latent frames in pairs.
        check_num_frames(num_frames, 2 * temporal)
        check_size("height", height, spatial * self.empty.config.patch_size)
        check_size("width", width, spatial * self.empty.config.patch_size)
        self.empty.check_size(height // spatial, width // spatial)

    @property
    def strides(self) -> tuple[int, int]:
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1), int(
            self.vae_config["temporal_compression_ratio"]
        )

    @property
    def patch(self) -> tuple[int, int, int]:
        size = self.empty.config.patch_size
        return self.empty.config.patch_size_t or 1, size, size

    @staticmethod
    def encode(vae: AutoencoderKLCogVideoX, pixels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
        return (latents.float() * vae.config.scaling_factor).cpu()


def _empty(transformer: type[torch.nn.Module], config: dict) -> torch.nn.Module:
    """Returns the model without weights, to read names and sizes from."""
    with init_empty_weights():
        return transformer.from_config(config)


FAMILIES: dict[str, type[Wan | CogVideoX]] = {
    "WanTransformer3DModel": Wan,
    "AnchorConditionedTransformer3D": Wan,
    "CogVideoXTransformer3DModel": CogVideoX,
    "AnchorConditionedCogVideoXTransformer3D": CogVideoX,
}


def family_of(config: TrainConfig, folder: Path) -> Wan | CogVideoX:
    """Returns the family of the model in `folder`, and checks that the config's buckets fit it.

    Raises:
        `ValueError`: the model belongs to no known family, or a bucket does not fit it.
    """
    path = folder / config.experts[0] / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {path.relative_to(folder)}: `model` must be a pipeline in diffusers' layout."
        )
    transformer_config = json.loads(path.read_text())
    name = transformer_config.get("_class_name")
    if name not in FAMILIES:
        raise ValueError(f"{path} belongs to a {name}; classes that can be trained are {', '.join(FAMILIES)}.")
    family = FAMILIES[name](folder, transformer_config)
    for bucket in config.all_buckets:
        family.check_bucket(*bucket)
    return family


def text_pipeline(
    family: Wan | CogVideoX, folder: Path, dtype: torch.dtype, device: torch.device
) -> DiffusionPipeline:
    """Loads diffusers' pipeline with text encoder and tokenizer only."""
    text_encoder = family.text_encoder.from_pretrained(folder / "text_encoder", dtype=dtype).to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return family.pipeline(tokenizer=tokenizer, text_encoder=text_encoder, vae=None, scheduler=None, transformer=None)
