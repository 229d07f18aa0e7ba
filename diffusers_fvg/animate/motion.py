"""Measures the motion in a video: the most reported fault of image-to-video models is a video that stands still."""

from __future__ import annotations

import numpy as np
import PIL.Image
import torch


# Cells along the shorter side. Averaging over a cell removes the decoder's changes from frame to frame, mostly grain.
CELLS = 16
# A cell has changed if a channel differs by more than this, in [0, 1]. In clips of the shapes world, noise of 3 of 255 levels, a
# drift of 6 levels and a still clip through the VAE stay below 0.03; the smallest motion reaches 0.15 (synthetic).
CHANGED = 0.06


def motion_amounts(frames: np.ndarray | torch.Tensor | list[list[PIL.Image.Image]]) -> list[float] | None:
    """Returns the fraction of each video's area that differs from the first frame at some time.

    A change of the whole frame's colour is not counted, because decoders drift. Optical flow was tried and rejected: it
    follows noise where nothing moves, and misses changes of colour, which are the only action of some videos.

    Args:
        frames (`np.ndarray`, `torch.Tensor` or `list[list[PIL.Image.Image]]`): frames that a pipeline returns for any
            `output_type` except `"latent"`: arrays `(B, F, H, W, 3)` in [0, 1] or uint8, tensors `(B, F, 3, H, W)`, or lists
            of images.

    Returns:
        `list[float]`: one value in [0, 1] for each video; `None` for videos of one frame.
    """
    if len(frames) == 0 or len(frames[0]) < 2:
        return None
    return [_changed_share(video) for video in frames]


def _changed_share(video: np.ndarray | torch.Tensor | list[PIL.Image.Image]) -> float:
    cells = torch.stack([_cells(frame) for frame in video])
    apart = cells - cells.mean((2, 3), keepdim=True)
    changed = (apart - apart[:1]).abs().amax((0, 1)) > CHANGED
    return round(changed.float().mean().item(), 4)


def _cells(frame: np.ndarray | torch.Tensor | PIL.Image.Image) -> torch.Tensor:
    """Averages a frame over about `CELLS` by `CELLS` cells, to `(3, h, w)` in [0, 1]."""
    if not isinstance(frame, torch.Tensor):
        frame = torch.from_numpy(np.array(frame)).permute(2, 0, 1)
    scale = 1.0 if frame.is_floating_point() else 255.0
    height, width = frame.shape[1:]
    cell = max(1, min(height, width) // CELLS)
    cells = torch.nn.functional.adaptive_avg_pool2d(frame.float(), (height // cell, width // cell))
    return cells.cpu() / scale
