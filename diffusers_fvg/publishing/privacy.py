"""What must not leave this machine: keys, and its paths. Light to import."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


_SECRETS = re.compile(rb"\bhf_[A-Za-z]{30,}|\bsk-[A-Za-z0-9_-]{20,}|\bBearer [A-Za-z0-9._-]{16,}")
_HOMES = re.compile(rb"/(?:home|Users)/[\w.-]+/|/root/|[A-Z]:\\{1,2}Users\\")
PATH = re.compile(r"(?<![\w./:-])/[\w.-]+(?:/[\w.-]+)+")


def hub_name(name: str) -> str:
    """`name` if it can be a repository on the Hub and is no folder here, else nothing."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return ""
    return name if "/" in name and not Path(name).exists() else ""


def without_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config, or some of them, for other people: of a place on this machine its last name alone, and
    nothing of an option that is left out."""
    shown = {name: value for name, value in values.items() if value is not None}
    for name in shown.keys() & {"model", "data"}:
        if isinstance(shown[name], str):
            shown[name] = _public(shown[name])
        else:
            # Several sources, each with options of its own.
            shown[name] = [source | {"path": _public(source["path"])} for source in shown[name]]
    for name in shown.keys() & {"cache_dir", "output_dir", "teacher_lora", "initial_lora"}:
        shown[name] = Path(shown[name]).name
    if "validation_anchors" in shown:
        shown["validation_anchors"] = [Path(path).name for path in shown["validation_anchors"]]
    return shown


def _public(name: str) -> str:
    return hub_name(name) or Path(name).name


def check_nothing_private(folder: Path, token: str | bool | None = None) -> None:
    """Refuses a folder in which a file holds a key, or a path of this machine.

    Raises:
        `ValueError`: naming the files.
    """
    token = token if isinstance(token, str) else get_token()
    # A key of another service, such as the rewriter's endpoint, is only known by the name of its variable.
    secrets = [value for name, value in os.environ.items() if re.search("KEY|TOKEN|SECRET", name) and len(value) >= 16]
    secrets += [token] if token else []
    found = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = _text(file)
        if _SECRETS.search(data) or any(secret.encode() in data for secret in secrets):
            found.append(f"{file.relative_to(folder)} (a key)")
        elif _HOMES.search(data) or any(os.path.exists(path) for path in _paths(file, data)):
            found.append(f"{file.relative_to(folder)} (a path of this machine)")
    if found:
        raise ValueError(f"Not pushed: {', '.join(found)}. Take it out of the file and push again.")


def _paths(file: Path, data: bytes) -> set[str]:
    """Absolute paths in what programs write; in prose `/usr/bin` is a word, as it is in a vocabulary."""
    if file.suffix not in (".json", ".safetensors") or file.name in ("tokenizer.json", "vocab.json"):
        return set()
    return set(PATH.findall(data.decode(errors="replace")))


def _text(file: Path) -> bytes:
    """What a person could read in a file: all of it, or the header of a safetensors file."""
    with file.open("rb") as data:
        if file.suffix != ".safetensors":
            return data.read() if file.stat().st_size < 100_000_000 else b""
        return data.read(int.from_bytes(data.read(8), "little"))
