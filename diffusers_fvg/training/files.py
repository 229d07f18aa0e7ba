"""Atomic writing of files, with checksums for tensors: for caches, checkpoints and logs."""

from __future__ import annotations

import json
import zlib
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .. import atomic


_HINT = "With space on the disk the same run resumes from its complete files."


def write_whole(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file beside `path`, flushes it to the disk and renames it. If the process is killed, either the old
    file or the new one is left.

    Raises:
        `OSError`: the file cannot be written, as on a full disk; the message names it.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", **(metadata or {})}
    with atomic.replacing(path, _HINT) as draft:
        save_file(tensors, draft, metadata=metadata | {"crc32": _checksum(tensors, metadata)})


def write_text_whole(path: Path, text: str) -> None:
    """Writes a text file as [`write_whole`] writes tensors."""
    with atomic.replacing(path, _HINT) as draft:
        draft.write_text(text, encoding="utf-8")


def naming(path: Path) -> AbstractContextManager[None]:
    """[`atomic.naming`] with a hint that the run can be resumed."""
    return atomic.naming(path, _HINT)


def read_whole(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
    """Reads tensors and metadata from a file of [`write_whole`]; returns `None` if it is missing, incomplete or changed."""
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
