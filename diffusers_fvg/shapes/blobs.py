"""Finds the objects in images of the shapes world: connected regions of one colour, and their shapes.

Positions are fractions of the width and the height from the top left corner, as in `world.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage

from .world import COLOURS, SHAPES


# Bright channels of each colour as bits of red, green and blue. A pixel gets the nearest of six hues, 60 degrees apart.
_COLOUR_BITS = {"red": 1, "yellow": 3, "green": 2, "cyan": 6, "blue": 4, "magenta": 5}
_BITS_TO_LABEL = np.array([next((k + 1 for k, c in enumerate(COLOURS) if _COLOUR_BITS[c] == b), 0) for b in range(8)])
_MIN_CHROMA = 40
_MIN_AREA = 0.0015
# (blur, offset) of the templates in pixels: blur of the median filter alone or of a soft decoder, centre on or between pixels.
_SOFTNESS = ((0.7, 0.0), (0.7, 0.5), (1.2, 0.0), (1.2, 0.5))
_IN_FRAME = np.zeros((3, 3, 3), dtype=bool)
_IN_FRAME[1] = True


@dataclass(frozen=True)
class Blob:
    """One connected region of one colour.

    `area` is a fraction of the frame, `x` and `y` the centre of mass, and `box` (left, top, right, bottom). `fits` are the IoUs
    with the templates of `SHAPES`, stretched to the box; `shape` is the best one. `squareness` is the ratio of the box's
    shorter to its longer side in pixels, 1 for a complete shape.
    """

    colour: str
    shape: str
    area: float
    x: float
    y: float
    box: tuple[float, float, float, float]
    fits: tuple[float, float, float]
    squareness: float

    @property
    def template_iou(self) -> float:
        return max(self.fits)

    @property
    def place(self) -> tuple[float, float]:
        """Centre of the box, which is the position in `world.py`. A triangle's centre of mass is lower."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


def _check_frames(frames: np.ndarray) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(
            f"`frames` must be uint8 of shape (num_frames, height, width, 3), but are {frames.dtype} of shape "
            f"{frames.shape}; pass one image as image[None]."
        )


def _median(frames: np.ndarray) -> np.ndarray:
    """Returns the 3x3 median of every frame and channel, computed by the minimal sorting network for nine values."""
    padded = np.pad(frames, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = frames.shape[1:3]
    p = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    network = "12 45 78 01 34 67 12 45 78 03 58 47 36 14 25 47 42 64 42"
    for a, b in (map(int, pair) for pair in network.split()):
        p[a], p[b] = np.minimum(p[a], p[b]), np.maximum(p[a], p[b])
    return p[4]


def label_maps(frames: np.ndarray) -> np.ndarray:
    """Returns the colour of every pixel: 0 for the background, else 1 + index into `COLOURS`.

    A pixel is foreground if its chroma (largest minus smallest channel) is above 40 and above half of its frame's 90th
    percentile. A fixed threshold alone would include the halo that chroma subsampling or blur draws around a shape.

    Args:
        frames (`np.ndarray` of shape `(num_frames, height, width, 3)`, `uint8`): frames of a clip.

    Returns:
        `np.ndarray` of shape `(num_frames, height, width)`, `uint8`.
    """
    _check_frames(frames)
    smooth = _median(frames)
    # Over an axis of three, this takes a tenth of the time of `smooth.min(axis=-1)`.
    red, green, blue = np.moveaxis(smooth, -1, 0)
    low, high = np.minimum(np.minimum(red, green), blue), np.maximum(np.maximum(red, green), blue)
    chroma = high - low
    threshold = np.full((len(frames), 1, 1), _MIN_CHROMA, dtype=np.float64)
    for k, values in enumerate(chroma):
        coloured = values[values > _MIN_CHROMA]
        if coloured.size:
            threshold[k] = max(_MIN_CHROMA, 0.5 * np.percentile(coloured, 90))
    bright = 2 * smooth.astype(np.int16) > (low.astype(np.int16) + high)[..., None]
    bits = bright[..., 0] + 2 * bright[..., 1] + 4 * bright[..., 2]
    return np.where(chroma > threshold, _BITS_TO_LABEL[bits], 0).astype(np.uint8)


@lru_cache(maxsize=4096)
def _softened(shape: str, size: int, softness: float, phase: float) -> np.ndarray:
    """Returns the cropped mask of a shape `size` / 2 pixels high as `label_maps` sees it after a blur, which removes thin
    corners."""
    oversampling, margin = 4, 4
    points = np.arange(0, size / 2 + 2 * margin, 1 / oversampling) + 0.5 / oversampling - phase
    u, v = (points - margin) / (size / 2) * 2 - 1, (points - margin)[:, None] / (size / 2)
    inside = {
        "circle": u**2 + (2 * v - 1) ** 2 <= 1,
        "square": (np.abs(u) <= 1) & (v >= 0) & (v <= 1),
        "triangle": (np.abs(u) <= v) & (v <= 1),
    }[shape]
    cells = len(points) // oversampling
    coverage = inside[: cells * oversampling, : cells * oversampling].reshape(cells, oversampling, cells, oversampling)
    mask = ndimage.gaussian_filter(coverage.mean(axis=(1, 3)), softness) > 0.5
    return mask[np.ix_(mask.any(axis=1), mask.any(axis=0))]


@lru_cache(maxsize=4096)
def _templates(height: int, width: int) -> np.ndarray:
    """Returns masks of complete shapes that fill a box: `(3, len(_SOFTNESS), height, width)`."""
    templates = np.empty((len(SHAPES), len(_SOFTNESS), height, width), dtype=bool)
    for index, shape in enumerate(SHAPES):
        for level, (softness, phase) in enumerate(_SOFTNESS):
            size = 2 * max(height, 3)
            while _softened(shape, size, softness, phase).shape[0] < height:
                size += 1
            mask = _softened(shape, size, softness, phase)
            rows = ((np.arange(height) + 0.5) * mask.shape[0] / height).astype(int)
            columns = ((np.arange(width) + 0.5) * mask.shape[1] / width).astype(int)
            templates[index, level] = mask[np.ix_(rows, columns)]
    return templates


def _fits(mask: np.ndarray) -> tuple[float, float, float]:
    templates = _templates(*mask.shape)
    both = (templates & mask).sum(axis=(2, 3))
    return tuple((both / (templates.sum(axis=(2, 3)) + mask.sum() - both)).max(axis=1).tolist())


def _visible_shape(labels: np.ndarray, mask: np.ndarray, rows: slice, columns: slice) -> str | None:
    """Returns the shape of a region that a neighbour may cover in part, or `None` if it touches no neighbour.

    Complete shapes of several sizes are placed at the corners of the region's box and compared with it where no other object
    is, because the uncovered sides of the region are its true ones.
    """
    height, width = mask.shape
    reach = int(0.7 * max(height, width)) + 2
    padded = np.pad(labels, reach)
    window = padded[rows.start : rows.stop + 2 * reach, columns.start : columns.stop + 2 * reach]
    own = np.pad(mask, reach)
    hidden = (window > 0) & ~own
    if (ndimage.binary_dilation(own, np.ones((3, 3)), iterations=2) & hidden).sum() < 4:
        return None
    best, best_fit = SHAPES[0], 0.0
    for shape in SHAPES:
        for size in range(2 * max(height, width), 2 * (max(height, width) + reach), 2):
            template = _softened(shape, size, *_SOFTNESS[0])
            h, w = template.shape
            if h > height + reach or w > width + reach:
                break
            for top in {reach, reach + height - h}:
                for left in {reach, reach + width - w}:
                    shown = template & ~hidden[top : top + h, left : left + w]
                    both = (shown & own[top : top + h, left : left + w]).sum()
                    fit = both / (shown.sum() + mask.sum() - both)
                    if fit > best_fit:
                        best, best_fit = shape, fit
    return best


def find_blobs(labels: np.ndarray, complete_cut: bool = False) -> list[list[Blob]]:
    """Returns the blobs of every frame of label maps `(num_frames, height, width)`, the largest first.

    With `complete_cut`, the shape of a blob that touches another one is determined from its visible part.
    """
    num_frames, height, width = labels.shape
    found: list[list[Blob]] = [[] for _ in range(num_frames)]
    for label in np.unique(labels[labels > 0]):
        colour = COLOURS[label - 1]
        regions, count = ndimage.label(labels == label, structure=_IN_FRAME)
        areas = np.bincount(regions.ravel(), minlength=count + 1)
        for region, (frame, rows, columns) in enumerate(ndimage.find_objects(regions), start=1):
            if areas[region] < _MIN_AREA * height * width:
                continue
            mask = regions[frame.start, rows, columns] == region
            # Skips the thin line of a third hue where the colours of two touching objects blend.
            if not ndimage.binary_erosion(mask).any():
                continue
            fits = _fits(mask)
            shape = None
            if complete_cut and max(fits) < 0.9:
                shape = _visible_shape(labels[frame.start], mask, rows, columns)
            blob = Blob(
                colour=colour,
                shape=shape or SHAPES[int(np.argmax(fits))],
                area=float(areas[region]) / (height * width),
                x=float((mask.sum(axis=0) @ (np.arange(columns.start, columns.stop) + 0.5)) / areas[region] / width),
                y=float((mask.sum(axis=1) @ (np.arange(rows.start, rows.stop) + 0.5)) / areas[region] / height),
                box=(columns.start / width, rows.start / height, columns.stop / width, rows.stop / height),
                fits=fits,
                squareness=min(mask.shape) / max(mask.shape),
            )
            found[frame.start].append(blob)
    return [sorted(blobs, key=lambda blob: -blob.area) for blobs in found]


def find_objects(frame: np.ndarray) -> list[Blob]:
    """Returns the objects of one image, the largest first; the shape of a partly hidden one is that of its visible part.

    Args:
        frame (`np.ndarray` of shape `(height, width, 3)`, `uint8`): the image.
    """
    return find_blobs(label_maps(frame[None]), complete_cut=True)[0]
