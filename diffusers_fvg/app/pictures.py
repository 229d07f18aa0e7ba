"""Pictures as files: a server keeps those of many people, and decoded a photograph takes a hundred MiB."""

from __future__ import annotations

import io
import secrets
import weakref
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import torch

from ..animate.anchor import Anchor, fit_picture
from ..animate.frames import first_frame


class PictureFile:
    """A picture that is decoded when it is asked for. Its file is deleted once nobody holds the object any more.

    Args:
        folder (`Path`): where it is written.
        content (`bytes`): of a file that [`limits.open_upload`] takes.
    """

    def __init__(self, folder: Path, content: bytes):
        self.path = folder / secrets.token_hex(16)
        self.path.write_bytes(content)
        weakref.finalize(self, self.path.unlink, missing_ok=True)
        self._fitted: tuple[tuple[int, int], PictureFile] | None = None

    @classmethod
    def of(cls, folder: Path, image: PIL.Image.Image) -> PictureFile:
        """An RGB picture, kept without loss."""
        file = io.BytesIO()
        image.save(file, "PNG")
        return cls(folder, file.getvalue())

    def open(self) -> PIL.Image.Image:
        """The picture, upright and opaque, RGB."""
        return first_frame(self.path)

    def fitted(self, height: int, width: int) -> PictureFile:
        """The picture as a video of this size has it: scaled until it covers the frame, and cropped about the centre."""
        if self._fitted is None or self._fitted[0] != (height, width):
            pixels = fit_picture(self.open(), height, width)
            image = PIL.Image.fromarray(pixels.permute(1, 2, 0).mul(255).round().to(torch.uint8).numpy())
            self._fitted = (height, width), PictureFile.of(self.path.parent, image)
        return self._fitted[1]


@dataclass(frozen=True)
class Upload:
    """A picture of a person's own that a video passes through; arguments as of an [`Anchor`].

    Raises:
        `ValueError`: a strength that is none.
    """

    file: PictureFile
    frame_index: int = 0
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"`strength={self.strength}` must be above 0, and at the most 1.")

    def anchor(self, image: PIL.Image.Image | None = None) -> Anchor:
        """The anchor; another picture may stand in for its own, as where only places are checked."""
        return Anchor(self.file.open() if image is None else image, self.frame_index, self.strength)
