"""Whether anything happens in a video: the most reported fault of models that are given a frame is that all stands still."""

from __future__ import annotations

import numpy as np
import PIL.Image
import torch


# Cells along the shorter side. What a decoder changes from frame to frame, grain above all, is averaged away in a cell.
CELLS = 16
# A cell has changed where a channel is this far, in [0, 1], from what it was. Of clips of the shapes world noise of 3 levels
# of 255, a drift of 6 levels and a still clip through the VAE stay below 0.03, the least that moves reaches 0.15 (synthetic).
CHANGED = 0.06


def motion_amounts(frames: np.ndarray | torch.Tensor | list[list[PIL.Image.Image]]) -> list[float] | None:
    """The share of each video's picture that at some time is unlike what it was in the first frame.

    A change of the whole picture's colour is not counted: decoders drift. Optical flow was tried and left: where nothing
    moves it follows noise, and a change of colour, which is a video's whole action at times, it does not see.

    Args:
        frames (`np.ndarray`, `torch.Tensor` or `list[list[PIL.Image.Image]]`): what a pipeline gives for any `output_type` but
            `"latent"`: `(B, F, H, W, 3)` in [0, 1] or uint8, tensors `(B, F, 3, H, W)`, or lists of pictures.

    Returns:
        `list[float]`: one number in [0, 1] for each video; `None` for videos of one frame.
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
    """A frame averaged over about `CELLS` by `CELLS` cells: `(3, h, w)` in [0, 1]."""
    if not isinstance(frame, torch.Tensor):
        frame = torch.from_numpy(np.array(frame)).permute(2, 0, 1)
    scale = 1.0 if frame.is_floating_point() else 255.0
    height, width = frame.shape[1:]
    cell = max(1, min(height, width) // CELLS)
    cells = torch.nn.functional.adaptive_avg_pool2d(frame.float(), (height // cell, width // cell))
    return cells.cpu() / scale
