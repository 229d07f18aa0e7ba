"""Exact optical flow of rendered clips, with the shape and units of `dreamer/flow.py`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from .world import BACKGROUND, PALETTE, ShapeObject, render


def _track(item: ShapeObject, num_frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns centre and radius of an object in every frame, in the units of `world.py`."""
    time = np.linspace(0.0, 1.0, num_frames)
    x, y, radius = (np.full(num_frames, value) for value in (item.x, item.y, item.radius))
    for change in item.changes:
        amount = change.progress(time)
        if change.kind == "move":
            x, y = x + change.value[0] * amount, y + change.value[1] * amount
        elif change.kind == "scale":
            radius = radius * (1 + (change.value - 1) * amount)
        elif change.kind == "bounce":
            hop, count = change.value
            y = y - hop * np.abs(np.sin(np.pi * count * amount))
    return x, y, radius


def exact_flow(objects: tuple[ShapeObject, ...], num_frames: int, height: int, width: int) -> torch.Tensor:
    """Returns the flow `(2, F - 1, H, W)` of the clip that [`~world.render`] draws from the same arguments.

    Pixels of an object move with it as it moves and grows; all others have no flow. `num_frames` must be at least 2.
    """
    flow = np.zeros((2, num_frames - 1, height, width), dtype=np.float32)
    rows, columns = np.mgrid[:height, :width] + 0.5
    for item in objects:
        # Drawn alone and without change of colour, since a changing colour may pass through that of the background.
        changes = tuple(change for change in item.changes if change.kind != "recolour")
        alone = render((replace(item, changes=changes),), num_frames, height, width)[:-1].astype(np.float64)
        colour = np.array(PALETTE[item.colour]) - BACKGROUND
        covered = (alone - BACKGROUND) @ colour >= 0.5 * colour @ colour
        x, y, radius = _track(item, num_frames)
        x, y, growth = x * width, y * height, radius[1:] / radius[:-1] - 1
        for frame in range(num_frames - 1):
            mask = covered[frame]
            for axis, (centre, places) in enumerate(((x, columns), (y, rows))):
                moved = centre[frame + 1] - centre[frame] + growth[frame] * (places - centre[frame])
                flow[axis, frame][mask] = moved[mask]
    return torch.from_numpy(flow)
