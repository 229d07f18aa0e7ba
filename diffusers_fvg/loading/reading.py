"""Reads files of a repository safely: links must stay within it, and JSON must be an object. Does not import torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def check_link(path: Path, root: Path) -> None:
    """Raises `ValueError` for a symbolic link that leads out of `root`, or that forms a loop."""
    try:
        place = path.resolve()
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is a symbolic link that leads to no file ({error}): delete it.") from error
    if not place.is_relative_to(root):
        raise ValueError(
            f"{path} is a link to {place}, outside of its repository: replace it by the files, or pass the component itself "
            "to `from_pretrained`."
        )


def read_json(path: Path, title: str = "") -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path (`Path`): the file.
        title (`str`): name of the file in messages; its path when left out.

    Raises:
        `ValueError`: the file is not valid JSON, is nested too deeply, or is not an object.
        `OSError`: the file cannot be read.
    """
    title = title or repr(str(path))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{title} is nested too deeply to be read.") from error
    except ValueError as error:
        raise ValueError(f"{title} is not valid JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"{title} must be a JSON object, but is a {type(values).__name__}.")
    return values
