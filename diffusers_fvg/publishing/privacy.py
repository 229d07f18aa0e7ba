"""Finds what must not leave this machine: keys and local paths. Imports neither torch nor diffusers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..loading.reading import check_link


# Forms of keys: first letters -> regular expression of the whole key. Searching for the letters first is fast in large files.
_KEYS = {
    rb"hf_": rb"hf_[A-Za-z0-9]{30,}",
    rb"sk-": rb"sk-[A-Za-z0-9_-]{20,}",
    rb"sk_live_": rb"sk_live_[A-Za-z0-9]{20,}",
    rb"rk_live_": rb"rk_live_[A-Za-z0-9]{20,}",
    rb"Bearer ": rb"Bearer [A-Za-z0-9._-]{16,}",
    rb"AKIA": rb"AKIA[A-Z2-7]{16}(?![A-Za-z0-9])",
    rb"ASIA": rb"ASIA[A-Z2-7]{16}(?![A-Za-z0-9])",
    rb"AIza": rb"AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])",
    rb"AccountKey=": rb"AccountKey=[A-Za-z0-9+/]{60,}={0,2}",
    rb"ghp_": rb"ghp_[A-Za-z0-9]{36,}",
    rb"gho_": rb"gho_[A-Za-z0-9]{36,}",
    rb"ghu_": rb"ghu_[A-Za-z0-9]{36,}",
    rb"ghs_": rb"ghs_[A-Za-z0-9]{36,}",
    rb"ghr_": rb"ghr_[A-Za-z0-9]{36,}",
    rb"github_pat_": rb"github_pat_[A-Za-z0-9_]{40,}",
    rb"glpat-": rb"glpat-[A-Za-z0-9_-]{20,}",
    rb"xox": rb"xox[abeprs]-[A-Za-z0-9-]{20,}",
    rb"npm_": rb"npm_[A-Za-z0-9]{36}(?![A-Za-z0-9])",
    rb"pypi-AgE": rb"pypi-AgE[A-Za-z0-9_-]{40,}",
    rb"r8_": rb"r8_[A-Za-z0-9]{37}(?![A-Za-z0-9])",
    # A JSON web token: three parts, of which the first two are objects.
    rb"eyJ": rb"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    rb"-----BEGIN ": rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----",
    rb"://": rb"://[^\s/:@\"'<>{}$]{1,64}:(?P<value>[^\s/:@\"'<>{}$]{4,128})@[A-Za-z0-9]",
    # "DB_PASSWORD=...", also as YAML or JSON.
    **dict.fromkeys(
        (
            rb"PASSWORD",
            rb"PASSWD",
            rb"SECRET",
            rb"API_KEY",
            rb"ACCESS_KEY",
            rb"API_TOKEN",
            rb"AUTH_TOKEN",
            rb"HF_TOKEN",
        ),
        rb"[A-Z_]{6,24}[\"']?[ \t]{0,8}[=:][ \t]{0,8}[\"']?(?P<value>[^\s\"'#,;]{8,200})",
    ),
}
_SHAPES = {letters: re.compile(shape) for letters, shape in _KEYS.items()}
# Placeholders for a value in documentation, such as "<your key>" or "$KEY", or code that reads it; and for a whole key.
_EXAMPLE = re.compile(
    rb"(?i)[<{$%*(\[\\]|your|example|placeholder|change|none|null|password$|passwd$|pass$|secret$|token$|redacted|.*\.\.\.|"
    rb"[a-z_]\w*(\(|[.\[][a-z_(\"'])"
)
_STAND_IN = re.compile(rb"(?i)x{6}")
_HOMES = re.compile(rb"/(?:home|Users)/[\w.-]+/|/root/|[A-Z]:\\{1,2}Users\\")
# Files are read in parts that overlap by more than the longest key.
_PART, _SHARED = 1 << 22, 1 << 12
PATH = re.compile(r"(?<![\w./:-])/[\w.-]+(?:/[\w.-]+)+")


def hub_name(name: str) -> str:
    """Returns `name` if it can be a Hub repository and is not a local path, else an empty text."""
    return name if is_repository(name) and not Path(name).exists() else ""


def is_repository(name: str) -> bool:
    """Returns whether `name` has the form of a Hub repository, `"org/name"`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def without_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values of a config for publication: of local paths only the last name, and no options that are `None`."""
    shown = {name: value for name, value in values.items() if value is not None}
    for name in shown.keys() & {"model", "data"}:
        if isinstance(shown[name], str):
            shown[name] = _public(shown[name])
        else:
            # Several sources, each with its own options.
            shown[name] = [source | {"path": _public(source["path"])} for source in shown[name]]
    for name in shown.keys() & {"cache_dir", "output_dir", "teacher_lora", "initial_lora"}:
        shown[name] = Path(shown[name]).name
    if "validation_anchors" in shown:
        shown["validation_anchors"] = [Path(path).name for path in shown["validation_anchors"]]
    return shown


def _public(name: str) -> str:
    return hub_name(name) or Path(name).name


def check_nothing_private(folder: Path, token: str | bool | None = None) -> None:
    """Raises an error if a file of a folder contains a key or a local path, or is a link out of the folder.

    Of a safetensors file the header is searched, of other files everything.

    Raises:
        `ValueError`: names the files.
    """
    token = token if isinstance(token, str) else get_token()
    # Keys of other services, such as the rewriter's endpoint, are recognized by the names of their environment variables.
    secrets = [value for name, value in os.environ.items() if re.search("KEY|TOKEN|SECRET", name) and len(value) >= 16]
    secrets += [token] if token else []
    # In the Hub's cache, files are links within the repository's folder.
    place = folder.resolve()
    root = place.parents[1] if place.parent.name == "snapshots" else place
    found = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        check_link(file, root)
        problem = _problem(file, [secret.encode() for secret in secrets])
        if problem is not None:
            found.append(f"{file.relative_to(folder)} ({problem})")
    if found:
        raise ValueError(f"Not pushed: {', '.join(found)}. Remove it from the file and push again.")


def _problem(file: Path, secrets: list[bytes]) -> str | None:
    has_path = False
    for part in _parts(file):
        if has_key(part) or any(secret in part for secret in secrets):
            return "a key"
        has_path = has_path or bool(_HOMES.search(part)) or any(os.path.exists(path) for path in _paths(file, part))
    return "a local path" if has_path else None


def has_key(data: bytes) -> bool:
    """Returns whether `data` contains something in the form of a key that is not a placeholder in documentation."""
    for letters, shape in _SHAPES.items():
        place = data.find(letters)
        while place >= 0:
            found = shape.match(data, place)
            is_word = letters[:1].isalnum() and not letters[:1].isupper() and data[max(place, 1) - 1 : place].isalnum()
            value = found.groupdict().get("value", b"") if found else b""
            if found and not (is_word or _STAND_IN.search(found[0]) or _EXAMPLE.match(value)):
                return True
            place = data.find(letters, place + 1)
    return False


def _paths(file: Path, data: bytes) -> set[str]:
    """Returns absolute paths in files that programs write; text and vocabularies may contain paths such as `/usr/bin`."""
    if file.suffix not in (".json", ".safetensors") or file.name in ("tokenizer.json", "vocab.json"):
        return set()
    return set(PATH.findall(data.decode(errors="replace")))


def _parts(file: Path) -> Iterator[bytes]:
    """Yields the contents of a file in overlapping parts; of a safetensors file only the header."""
    with file.open("rb") as data:
        left = int.from_bytes(data.read(8), "little") if file.suffix == ".safetensors" else file.stat().st_size
        shared = b""
        while left > 0 and (part := data.read(min(left, _PART))):
            left -= len(part)
            yield shared + part
            shared = part[-_SHARED:]
