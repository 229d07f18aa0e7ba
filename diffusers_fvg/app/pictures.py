"""Pictures in files: a server keeps the pictures of many users, and a decoded photograph takes about a hundred MiB."""

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
    """A picture in a file, decoded on demand. The file is deleted when the object is garbage-collected.

    Args:
        folder (`Path`): folder of the file.
        content (`bytes`): contents of a file that [`limits.open_upload`] accepts.
    """

    def __init__(self, folder: Path, content: bytes):
        self.path = folder / secrets.token_hex(16)
        self.path.write_bytes(content)
        weakref.finalize(self, self.path.unlink, missing_ok=True)
        self._fitted: tuple[tuple[int, int], PictureFile] | None = None

    @classmethod
    def of(cls, folder: Path, image: PIL.Image.Image) -> PictureFile:
        """Stores an RGB picture without loss."""
        file = io.BytesIO()
        image.save(file, "PNG")
        return cls(folder, file.getvalue())

    def open(self) -> PIL.Image.Image:
        """Decodes the picture, upright and opaque, in RGB."""
        return first_frame(self.path)

    def fitted(self, height: int, width: int) -> PictureFile:
        """Returns the picture at the size of a video: scaled to cover the frame, and cropped around the centre."""
        if self._fitted is None or self._fitted[0] != (height, width):
            pixels = fit_picture(self.open(), height, width)
            image = PIL.Image.fromarray(pixels.permute(1, 2, 0).mul(255).round().to(torch.uint8).numpy())
            self._fitted = (height, width), PictureFile.of(self.path.parent, image)
        return self._fitted[1]


@dataclass(frozen=True)
class Upload:
    """A user's own picture as an anchor; the arguments are those of [`Anchor`].

    Raises:
        `ValueError`: `strength` is not in (0, 1].
    """

    file: PictureFile
    frame_index: int = 0
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"`strength={self.strength}` must be above 0 and at most 1.")

    def anchor(self, image: PIL.Image.Image | None = None) -> Anchor:
        """Returns the anchor, with another picture if only its frame and strength are checked."""
        return Anchor(self.file.open() if image is None else image, self.frame_index, self.strength)
