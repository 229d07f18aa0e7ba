"""The world of coloured shapes: objects, their changes over time, and a renderer.

Positions and sizes are fractions: `x` of the width, `y` and `radius` of the height, both from the top left corner. Time
runs from 0 (first frame) to 1 (last frame). Shapes are signed distance fields, so that edges are anti-aliased and shapes can
be interpolated.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


BACKGROUND = (128, 128, 128)
# Hues 60 degrees apart, so that a nearest-hue rule reads a colour back after blur, noise or H.264.
PALETTE = {
    "red": (225, 30, 30),
    "yellow": (225, 225, 30),
    "green": (30, 225, 30),
    "cyan": (30, 225, 225),
    "blue": (30, 30, 225),
    "magenta": (225, 30, 225),
}
COLOURS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle")


@dataclass(frozen=True)
class Change:
    """One change of an object between times `start` and `end`.

    The `value` of each `kind`: `"move"` (dx, dy); `"recolour"` a colour; `"reshape"` a shape; `"scale"` a factor of the radius;
    `"bounce"` (height, number of hops); `"blink"` the number of times that it is hidden; `"vanish"` `None`.
    """

    kind: str
    value: object = None
    start: float = 0.0
    end: float = 1.0

    def progress(self, time: np.ndarray) -> np.ndarray:
        return np.clip((time - self.start) / max(self.end - self.start, 1e-9), 0.0, 1.0)


@dataclass(frozen=True)
class ShapeObject:
    colour: str
    shape: str
    x: float
    y: float
    radius: float
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True)
class Scene:
    """A prompt of one category, the clip that it describes, and facts for the scorer (`meta`)."""

    category: str
    prompt: str
    caption: str
    objects: tuple[ShapeObject, ...]
    meta: dict = field(default_factory=dict)


def _signed_distance(shape: str, dx: np.ndarray, dy: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Returns the distance to the outline in pixels, negative inside. `radius` is half of the bounding box's height."""
    if shape == "circle":
        return np.hypot(dx, dy) - radius
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - 0.9 * radius
    if shape == "triangle":
        # An isosceles triangle with the apex up, whose base and height are 2 * radius.
        slope = np.array([2.0, -1.0]) / np.sqrt(5.0)
        return np.maximum(dy - radius, slope[0] * np.abs(dx) + slope[1] * (dy + radius))
    raise ValueError(f"Unknown shape {shape!r}; use one of {SHAPES}.")


def render(objects: tuple[ShapeObject, ...], num_frames: int = 17, height: int = 64, width: int = 64) -> np.ndarray:
    """Draws a clip.

    Args:
        objects (`tuple[ShapeObject, ...]`): objects; later ones are in front of earlier ones.
        num_frames (`int`, *optional*): number of frames, from time 0 to time 1.
        height, width (`int`, *optional*): size in pixels.

    Returns:
        `np.ndarray` of shape `(num_frames, height, width, 3)`, `uint8`.
    """
    time = np.linspace(0.0, 1.0, num_frames)[:, None, None] if num_frames > 1 else np.zeros((1, 1, 1))
    rows = (np.arange(height) + 0.5)[None, :, None]
    columns = (np.arange(width) + 0.5)[None, None, :]
    frames = np.broadcast_to(np.array(BACKGROUND, dtype=np.float64), (num_frames, height, width, 3)).copy()
    for item in objects:
        x, y = np.full_like(time, item.x), np.full_like(time, item.y)
        radius, opacity, morph = np.full_like(time, item.radius), np.ones_like(time), np.zeros_like(time)
        colour = np.broadcast_to(np.array(PALETTE[item.colour], dtype=np.float64), (num_frames, 1, 1, 3))
        next_shape = item.shape
        for change in item.changes:
            amount = change.progress(time)
            if change.kind == "move":
                x, y = x + change.value[0] * amount, y + change.value[1] * amount
            elif change.kind == "recolour":
                colour = colour + amount[..., None] * (np.array(PALETTE[change.value]) - colour)
            elif change.kind == "reshape":
                next_shape, morph = change.value, amount
            elif change.kind == "scale":
                radius = radius * (1 + (change.value - 1) * amount)
            elif change.kind == "bounce":
                hop, count = change.value
                y = y - hop * np.abs(np.sin(np.pi * count * amount))
            elif change.kind == "blink":
                opacity = opacity * (np.sin(2 * np.pi * change.value * amount) > -0.01)
            elif change.kind == "vanish":
                opacity = opacity * (1 - amount)
            else:
                raise ValueError(f"Unknown change {change.kind!r}.")
        dx, dy, size = columns - x * width, rows - y * height, radius * height
        distance = _signed_distance(item.shape, dx, dy, size)
        if next_shape != item.shape:
            distance = (1 - morph) * distance + morph * _signed_distance(next_shape, dx, dy, size)
        coverage = (np.clip(0.5 - distance, 0.0, 1.0) * opacity)[..., None]
        frames = frames + coverage * (colour - frames)
    return np.round(frames).astype(np.uint8)
