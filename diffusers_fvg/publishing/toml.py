"""Configs as TOML, which Python reads and does not write. Light to import."""

from __future__ import annotations

import json
from typing import Any


def toml_value(value: Any) -> str:
    """A string, number, boolean, list or table of them; the first three are the same in JSON."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {toml_value(item)}" for name, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
