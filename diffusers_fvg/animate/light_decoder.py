"""A small decoder of Wan's latents, for previews and quick results: taew2_1 and taew2_2 of taehv.

Architecture, names of the weights and conventions are those of https://github.com/madebyollin/taehv (`taehv.py`, MIT licence),
whose folder `safetensors` has the weights; they are not part of this package. The tests compare the frames with those of
`taehv.py` on other weights. The published weights were not run, nor latents of a real Wan model.

Shape legend: B videos, C latent channels, f latent frames, h and w latent rows and columns; F, H, W the same in pixels; D
channels of features.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from torch.nn import functional

from ..checks import as_dtype, check_name, stop_unless_finite
from ..loading.arguments import hub_arguments
from ..loading.files import fetch
from ..loading.safety import refuse_pickles
from ..lora.files import read_safetensors


# Name of the published file -> latent channels, and `patch_size`: the last layer gives a square patch of that many pixels per
# side at each position. Both equal `z_dim` and `patch_size` in the config of the VAE.
FILES = {"taew2_1": (16, 1), "taew2_2": (48, 2)}
USES = "taew2_1 is for Wan 2.1, Wan2.2-A14B and SkyReels-V2, taew2_2 for Wan2.2-TI2V-5B"
# Frames that the decoder makes of each latent frame. Of the first latent frame, only the last one belongs to the video.
FRAMES = 4


class LightDecoder(nn.Module):
    """Decodes latents of Wan in a small part of the time and memory of the VAE's decoder, with less detail.

    A [`FactorizedVideoPipeline`] decodes with it once it is assigned; the VAE still encodes the anchors:

        pipe.light_decoder = LightDecoder.from_pretrained("taew2_2.safetensors")

    Its input is the latents of the video model (normalised), so the means and standard deviations in its config are 0 and 1.

    Args:
        name (`str`): `"taew2_1"` (16 latent channels) or `"taew2_2"` (48 latent channels).

    Raises:
        `ValueError`: `name` is another one.
    """

    def __init__(self, name: str):
        super().__init__()
        if name not in FILES:
            raise ValueError(f"`name` is {name!r}: use taew2_1 or taew2_2. {USES}.")
        channels, self.patch_size = FILES[name]
        statistics = {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
        self.config = SimpleNamespace(name=name, z_dim=channels, **statistics)
        self.decoder = nn.Sequential(
            _Clamp(), _conv(channels, 256), nn.ReLU(inplace=True),
            *_memory_blocks(256), nn.Upsample(scale_factor=2), _MoreFrames(256, 1), _conv(256, 128, bias=False),
            *_memory_blocks(128), nn.Upsample(scale_factor=2), _MoreFrames(128, 2), _conv(128, 64, bias=False),
            *_memory_blocks(64), nn.Upsample(scale_factor=2), _MoreFrames(64, 2), _conv(64, 64, bias=False),
            nn.ReLU(inplace=True), _conv(64, 3 * self.patch_size**2),
        )  # fmt: skip

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        weight_name: str | None = None,
        dtype: torch.dtype | str = torch.float32,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> LightDecoder:
        """Loads a published file, which also holds an encoder that is not used.

        The files are in the folder `safetensors` of https://github.com/madebyollin/taehv.

        Args:
            source (`str` or `os.PathLike`): safetensors file, or a folder or Hub repository that holds it.
            weight_name (`str`, *optional*): path of the file in the folder or repository, such as `"taew2_1.safetensors"`.
            dtype (`torch.dtype` or `str`, *optional*): dtype of the weights and of the computation. The published files are
                in float16.
            revision (`str`, *optional*): revision of the repository.
            token (`str` or `bool`, *optional*): token for the Hub.

        Returns:
            `LightDecoder`, on the CPU; the pipeline moves it to its device.

        Raises:
            `ValueError`: the file does not exist, is not named as published, is not a safetensors file, or has other weights;
                `weight_name` is missing or not needed; `dtype` is not a floating-point dtype.
            `OSError`: the Hub repository cannot be loaded, or does not have the file.
        """
        dtype = as_dtype(dtype, torch.float32)
        path = _find(source, weight_name, revision, token)
        name = next((name for name in FILES if path.name.startswith(name)), None)
        if name is None:
            # lighttaew2_*: `need_scaled` in https://github.com/ModelTC/LightX2V.
            raise ValueError(
                f"{path} is not a light decoder of Wan: the name must begin with taew2_1 or taew2_2 ({USES}). The files of other "
                "models (taehv, taecvx) have the same weights by name and shape, and lighttaew2_1 and lighttaew2_2 need latents "
                "that are not normalised."
            )
        found = {key: value for key, value in read_safetensors(path)[0].items() if key.startswith("decoder.")}
        with torch.device("meta"):
            decoder = cls(name)
        needed = decoder.state_dict()
        keys = sorted(needed.keys() | found.keys())
        wrong = [key for key in keys if _shape(needed.get(key)) != _shape(found.get(key))]
        if wrong:
            told = "; ".join(f"{key}: {_shape(found.get(key))}, not {_shape(needed.get(key))}" for key in wrong[:3])
            raise ValueError(
                f"{path} does not have the weights of {name}. {told}. Use the published file; taew2_2_super is another network."
            )
        decoder.load_state_dict({key: value.to(dtype) for key, value in found.items()}, assign=True)
        return decoder.eval().requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes normalised latents `(B, C, f, h, w)` to pixels `(B, 3, F, H, W)` in [-1, 1], with F = 4 (f - 1) + 1."""
        return torch.cat(list(self.frames(latents)), dim=2)

    def frames(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yields the frames of [`forward`], `(B, 3, 1, H, W)`, each as soon as it is decoded.

        Raises:
            `FloatingPointError`: the decoder gave values that are not finite.
        """
        memory: dict[int, torch.Tensor] = {}
        for index, latent in enumerate(latents.unbind(2)):
            for pixels in islice(self._frames(latent, memory), FRAMES - 1 if index == 0 else 0, None):
                stop_unless_finite("decode", pixels)
                yield functional.pixel_shuffle(pixels, self.patch_size)[:, :, None].clamp(0, 1) * 2 - 1

    def _frames(
        self, features: torch.Tensor, memory: dict[int, torch.Tensor], start: int = 0
    ) -> Iterator[torch.Tensor]:
        """Yields the decoder's output for each frame of one latent frame `(B, C, h, w)`, from the block `start` on.

        `memory` holds the last input of each memory block, and is updated.
        """
        for index in range(start, len(self.decoder)):
            block = self.decoder[index]
            if isinstance(block, _MoreFrames):
                for frame in block(features):
                    yield from self._frames(frame, memory, index + 1)
                return
            if isinstance(block, _MemoryBlock):
                before = memory[index] if index in memory else torch.zeros_like(features)
                memory[index] = features
                features = block(features, before)
            else:
                features = block(features)
        yield features


def fitting_file(vae: Any) -> str | None:
    """Returns the name in [`FILES`] whose decoder fits a VAE by latent channels and patches; `None` if none does."""
    wanted = vae.config.z_dim, vae.config.patch_size or 1
    return next((name for name, shape in FILES.items() if shape == wanted), None)


def check_light_decoder(decoder: Any, vae: Any) -> None:
    """Checks that a decoder can stand in for a VAE. A VAE of the same shape with other weights cannot be told from Wan's.

    A modular pipeline may not have loaded its VAE yet, so `vae` may be `None`.

    Raises:
        `ValueError`: it is of another kind, or decodes the latents of another VAE.
    """
    if not isinstance(decoder, LightDecoder):
        kind = type(decoder).__name__
        raise ValueError(
            f"`light_decoder` is a {kind}: make one with `LightDecoder.from_pretrained`, or set it to None."
        )
    if vae is not None and decoder.config.name != fitting_file(vae):
        raise ValueError(
            f"`light_decoder` is {decoder.config.name}, which does not decode latents of the pipeline's VAE (`z_dim` "
            f"{vae.config.z_dim}, `patch_size` {vae.config.patch_size}): {USES}. Set it to None."
        )


class _Clamp(nn.Module):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.tanh(features / 3) * 3


class _MemoryBlock(nn.Module):
    """Residual block that also sees the frame before; `(B, D, h, w)` each."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * channels, channels),
            nn.ReLU(inplace=True),
            _conv(channels, channels),
            nn.ReLU(inplace=True),
            _conv(channels, channels),
        )

    def forward(self, frame: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.conv(torch.cat([frame, before], dim=1)) + frame)


class _MoreFrames(nn.Module):
    """Makes `count` consecutive frames of one, `(B, D, h, w)` each."""

    def __init__(self, channels: int, count: int):
        super().__init__()
        self.count = count
        self.conv = nn.Conv2d(channels, channels * count, 1, bias=False)

    def forward(self, frame: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.conv(frame).chunk(self.count, dim=1)


def _conv(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


def _memory_blocks(channels: int) -> list[nn.Module]:
    return [_MemoryBlock(channels) for _ in range(3)]


def _shape(tensor: torch.Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))


def _find(source: str | os.PathLike, weight_name: str | None, revision: str | None, token: str | bool | None) -> Path:
    """Returns the path of the file, after downloading it if `source` is a Hub repository."""
    place = os.fspath(source)
    refuse_pickles([place, weight_name or ""])
    if os.path.isfile(place):
        if weight_name is not None:
            raise ValueError(f"{place} is a file: leave out `weight_name`, which is {weight_name!r}.")
        return Path(place)
    if place.endswith(".safetensors"):
        raise ValueError(f"There is no file {place!r}.")
    if weight_name is None:
        raise ValueError(f"Name the file in the folder or repository {place!r} by `weight_name`: {USES}.")
    name = check_name(weight_name, "The light decoder", folders=True)
    if os.path.isdir(place):
        if not Path(place, name).is_file():
            raise ValueError(f"There is no file {name!r} in {place!r}.")
        return Path(place, name)
    try:
        validate_repo_id(place)
    except HFValidationError as error:
        raise ValueError(
            f"{place!r} is neither an existing file or folder nor the name of a repository (`org/name`)."
        ) from error

    def select(names: list[str]) -> list[str]:
        if name not in names:
            raise ValueError(f"it has no file {name}.")
        return [name]

    folder, _ = fetch(place, revision, select, "The light decoder", **hub_arguments(token=token))
    return folder / name
