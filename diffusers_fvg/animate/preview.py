"""Previews of latents as small images without the VAE's decoder: one convolution, fitted to the VAE's encoder.

Shape legend: B videos, C latent channels, f latent frames, h and w latent rows and columns; F, H, W the same in pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from ..devices import get_module_execution_device
from .anchor import encode_anchor


# Side of the square of latents that each pixel is computed from; side of the square of pixels for each latent.
KERNEL, SCALE = 3, 4
# Ridge regularization, per position: the clips do not determine all channels, which would give large weights that cancel out.
RIDGE = 1e-3
# Number of clips of moving rectangles, their side in latents, and the rectangles in each.
NUM_CLIPS, SIDE, NUM_RECTANGLES = 4, 16, 24


class LatentPreview:
    """Converts latents to preview images with `SCALE` x `SCALE` pixels for each latent position.

    The convolution is fitted by least squares to the given VAE, so no table of factors per model is needed. Fitting calls the
    encoder once; afterwards a preview takes less than a thousandth of the time of decoding.

    Args:
        vae (`AutoencoderKLWan`): VAE of the pipeline.
        clips (`torch.Tensor` of shape `(B, 3, F, H, W)`, *optional*): clips to fit to, in [0, 1], with 4k + 1 frames, similar
            to the VAE's training data; [`moving_rectangles`] when left out.
    """

    def __init__(self, vae, clips: torch.Tensor | None = None):
        temporal, spatial = vae.config.scale_factor_temporal, vae.config.scale_factor_spatial
        clips = moving_rectangles(spatial, temporal) if clips is None else clips
        with torch.no_grad():
            latents = encode_anchor(vae, clips * 2 - 1, 0, get_module_execution_device(vae))
        # The target for each latent frame: the first frame, then the mean of four frames.
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
        """Returns the preview of one video, one image for each latent frame.

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
    """Returns latent frames `(B, C, f, h, w)` as a batch of images, padded for the convolution."""
    return functional.pad(latents.transpose(1, 2).flatten(0, 1), [KERNEL // 2] * 4, mode="replicate")


def moving_rectangles(spatial: int, temporal: int) -> torch.Tensor:
    """Returns clips of moving rectangles of many sizes and colours that hide each other, like objects in a photograph.

    Args:
        spatial, temporal (`int`): pixels (per side) and frames per latent.

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
