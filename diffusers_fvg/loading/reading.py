"""Files of a repository as they are read: links stay within it, and JSON is an object. Light to import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def check_link(path: Path, root: Path) -> None:
    """Raises `ValueError` for a link that leads out of a folder, or in a circle."""
    try:
        place = path.resolve()
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} is a link that leads to no file ({error}): delete it.") from error
    if not place.is_relative_to(root):
        raise ValueError(
            f"{path} is a link to {place}, outside of its repository: put the files in its place, or pass the component "
            "itself to `from_pretrained`."
        )


def read_json(path: Path, title: str = "") -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path (`Path`): the file.
        title (`str`): for messages, its path when left out.

    Raises:
        `ValueError`: no JSON, one that is nested too deep, or no object.
        `OSError`: the file cannot be read.
    """
    title = title or repr(str(path))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{title} is nested too deep to be read.") from error
    except ValueError as error:
        raise ValueError(f"{title} is no valid JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"{title} must be an object of JSON, but is a {type(values).__name__}.")
    return values
