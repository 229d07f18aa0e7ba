"""Files that are whole or not there, and tensors that are known to be: for caches, checkpoints and logs."""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def write_whole(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes safetensors beside `path`, to disk, and renames: a kill at any instant leaves the old file or the new one.

    Raises:
        `OSError`: as on a full disk, naming the file.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", **(metadata or {})}
    with _replacing(path) as unfinished:
        save_file(tensors, unfinished, metadata=metadata | {"crc32": _checksum(tensors, metadata)})


def write_text_whole(path: Path, text: str) -> None:
    """[`write_whole`] of a text."""
    with _replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """What fails within it while writing is told in one line with the file's name.

    Raises:
        `OSError`: of any failure to write.
    """
    try:
        yield
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"{path} cannot be written: {reason}. With room on the disk the same run goes on from what is whole."
        ) from error


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            yield unfinished
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
