"""JSON files of settings in the folders of our components."""

from __future__ import annotations

import json
from collections.abc import Set
from pathlib import Path
from typing import Any


def read_config(path: Path, known: Set[str], repository: str, of_repository: Set[str]) -> dict[str, Any]:
    """Reads a component's settings and refuses what this version does not know.

    Args:
        path (`Path`): the file.
        known (`Set[str]`): all keys that it may have.
        repository (`str`): the key that names a repository.
        of_repository (`Set[str]`): keys that say more about the repository, and mean nothing without it.

    Raises:
        `ValueError`: no JSON object, an unknown key, or one of a repository that is not named.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no valid JSON ({error}).") from error
    if not isinstance(config, dict) or not config.keys() <= known:
        unknown = sorted(config.keys() - known) if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{str(path)!r} must be an object with keys of {sorted(known)}, but has {unknown}.")
    if repository not in config and config.keys() & of_repository:
        raise ValueError(f"{str(path)!r} has a {_either(of_repository)} but names no `{repository}`.")
    return config


def _either(names: Set[str]) -> str:
    return " or ".join(f"`{name}`" for name in sorted(names, reverse=True))
