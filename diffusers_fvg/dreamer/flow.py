"""Optical flow from each frame of a clip to the next: the training target of [`~predict_net.PredictNet`].

A flow has shape `(2, F - 1, H, W)`, float32. It holds the displacement of each pixel's content in the next frame, x then y, in
pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F


def dis_flow(frames: np.ndarray) -> torch.Tensor:
    """Estimates the flow of a clip by OpenCV's DIS (arXiv 1603.03590), which needs no weights.

    Args:
        frames (`np.ndarray` of shape `(F, H, W, 3)`, `uint8`): at least two frames.

    Returns:
        `torch.Tensor` of shape `(2, F - 1, H, W)`.

    Raises:
        `ImportError`: OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise ImportError("The optical flow of clips needs OpenCV: pip install opencv-python-headless") from error
    estimator: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    flows = [estimator.calc(first, second, None) for first, second in zip(grey, grey[1:])]
    return torch.from_numpy(np.stack(flows)).permute(3, 0, 1, 2).contiguous()


def latent_flow(flow: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resizes a flow `(2, F - 1, H, W)` to the latents' size and pixel unit: `(2, F - 1, height, width)`."""
    scale = flow.new_tensor([width / flow.shape[3], height / flow.shape[2]]).view(2, 1, 1, 1)
    return F.interpolate(flow, size=(height, width), mode="area") * scale
