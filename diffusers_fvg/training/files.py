"""Files that are whole or not there, and tensors that are known to be: for caches, checkpoints and logs."""

from __future__ import annotations

import json
import zlib
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .. import atomic


_HINT = "With room on the disk the same run goes on from what is whole."


def write_whole(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes safetensors beside `path`, to disk, and renames: a kill at any instant leaves the old file or the new one.

    Raises:
        `OSError`: as on a full disk, naming the file.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", **(metadata or {})}
    with atomic.replacing(path, _HINT) as draft:
        save_file(tensors, draft, metadata=metadata | {"crc32": _checksum(tensors, metadata)})


def write_text_whole(path: Path, text: str) -> None:
    """[`write_whole`] of a text."""
    with atomic.replacing(path, _HINT) as draft:
        draft.write_text(text, encoding="utf-8")


def naming(path: Path) -> AbstractContextManager[None]:
    """[`atomic.naming`] for what a run goes on from."""
    return atomic.naming(path, _HINT)


def read_whole(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
    """Tensors and metadata of a file of [`write_whole`]; `None` when it is missing, cut off or changed."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError):
        return None
    written = metadata.pop("crc32", None)
    return (tensors, metadata) if written == _checksum(tensors, metadata) else None


def _checksum(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    crc = zlib.crc32(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.flatten().view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"
