"""Reads the JSON config files of this package's components."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Any

from .reading import read_json


def read_config(path: Path, known: Set[str], repository: str, of_repository: Set[str]) -> dict[str, Any]:
    """Reads a component's config file and refuses unknown keys.

    Args:
        path (`Path`): the file.
        known (`Set[str]`): all keys that the file may have.
        repository (`str`): the key that names a repository.
        of_repository (`Set[str]`): keys that are valid only together with `repository`, such as the revision.

    Raises:
        `ValueError`: the file is not a JSON object, has an unknown key, or has a key of `of_repository` without `repository`.
    """
    config = read_json(path)
    if not config.keys() <= known:
        raise ValueError(
            f"{str(path)!r} has the unknown keys {sorted(config.keys() - known)}; remove them. Known keys: {sorted(known)}."
        )
    if repository not in config and config.keys() & of_repository:
        raise ValueError(
            f"{str(path)!r} has a {_either(of_repository)} but names no `{repository}`; add or remove it."
        )
    return config


def _either(names: Set[str]) -> str:
    return " or ".join(f"`{name}`" for name in sorted(names, reverse=True))
