"""Tensor files that are whole or not there, and known to be: for caches and checkpoints."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def write_whole(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes safetensors beside `path`, to disk, and renames: a kill at any instant leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", **(metadata or {})}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, unfinished, metadata=metadata | {"crc32": _checksum(tensors, metadata)})
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


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
