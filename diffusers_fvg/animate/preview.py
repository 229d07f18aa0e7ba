"""Latents to small pictures without the VAE's decoder: by one convolution, fitted to what the VAE's encoder makes of clips.

Shape legend: B videos, C latent channels, f latent frames, h and w latent rows and columns; F, H, W the same in pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from ..devices import get_module_execution_device
from .anchor import encode_anchor


# Latents that a picture's pixels are computed from, in a square; pixels of a latent, in a square.
KERNEL, SCALE = 3, 4
# Of the squares of the weights, for each position: fewer clips than channels settle would give weights that cancel out.
RIDGE = 1e-3
# Clips of moving rectangles, their side in latents, and the rectangles of each.
NUM_CLIPS, SIDE, NUM_RECTANGLES = 4, 16, 24


class LatentPreview:
    """What latents show, `SCALE` x `SCALE` pixels for each latent position.

    The convolution is fitted by least squares, so that no table of factors is needed and it is that of the VAE at hand. Fitting
    calls the encoder once; after it a preview costs less than a thousandth of a decode.

    Args:
        vae (`AutoencoderKLWan`): of the pipeline.
        clips (`torch.Tensor` of shape `(B, 3, F, H, W)`, *optional*): in [0, 1], with 4k + 1 frames, such as the VAE was trained
            on; [`moving_rectangles`] when left out.
    """

    def __init__(self, vae, clips: torch.Tensor | None = None):
        temporal, spatial = vae.config.scale_factor_temporal, vae.config.scale_factor_spatial
        clips = moving_rectangles(spatial, temporal) if clips is None else clips
        with torch.no_grad():
            latents = encode_anchor(vae, clips * 2 - 1, 0, get_module_execution_device(vae))
        # What a latent stands for: the first frame, then the mean of four.
        seen = [clips[:, :, 0], *(part.mean(dim=2) for part in clips[:, :, 1:].split(temporal, dim=2))]
        small = functional.avg_pool2d(torch.stack(seen, dim=1).flatten(0, 1), spatial // SCALE)
        frames = _padded(latents.cpu().double())
        rows = functional.unfold(frames, KERNEL).transpose(1, 2).flatten(0, 1)
        inputs = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
        wanted = functional.pixel_unshuffle(small, SCALE).flatten(2).transpose(1, 2).flatten(0, 1).double()
        ridge = RIDGE * len(inputs) * torch.eye(inputs.shape[1], dtype=torch.double)
        solution = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ wanted).float()
        self.weight = solution[:-1].T.reshape(-1, frames.shape[1], KERNEL, KERNEL)
        self.bias = solution[-1]

    def __call__(self, latents: torch.Tensor) -> np.ndarray:
        """The frames of one video, one for each latent frame.

        Args:
            latents (`torch.Tensor` of shape `(1, C, f, h, w)`): normalised, without noise.

        Returns:
            `np.ndarray` of shape `(f, SCALE h, SCALE w, 3)`, uint8.
        """
        weight, bias = (tensor.to(latents.device) for tensor in (self.weight, self.bias))
        pixels = functional.conv2d(_padded(latents.float()), weight, bias)
        pixels = functional.pixel_shuffle(pixels, SCALE).clamp(0, 1).mul(255).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).cpu().numpy()


def _padded(latents: torch.Tensor) -> torch.Tensor:
    """Latent frames `(B, C, f, h, w)` as pictures, with a margin for the convolution."""
    return functional.pad(latents.transpose(1, 2).flatten(0, 1), [KERNEL // 2] * 4, mode="replicate")


def moving_rectangles(spatial: int, temporal: int) -> torch.Tensor:
    """Clips of rectangles of many sizes and colours that hide each other, as things in a photograph do.

    Args:
        spatial, temporal (`int`): pixels and frames of a latent.

    Returns:
        `torch.Tensor` of shape `(B, 3, 1 + temporal, H, W)`, in [0, 1].
    """
    random, side = np.random.default_rng(0), SIDE * spatial
    clips = np.empty((NUM_CLIPS, 1 + temporal, side, side, 3), np.float32)
    for clip in clips:
        clip[:] = random.random(3)
        for _ in range(NUM_RECTANGLES):
            height, width = (side * random.uniform(0.08, 0.5, 2)).astype(int)
            top, left = (side * random.uniform(-0.2, 0.9, 2)).astype(int)
            down, right = random.integers(-spatial // 2, spatial // 2 + 1, 2)
            colour = random.random(3)
            for frame, picture in enumerate(clip):
                y, x = top + frame * down, left + frame * right
                picture[max(0, y) : max(0, y + height), max(0, x) : max(0, x + width)] = colour
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3)
