"""Writes values as TOML, for which Python has only a reader."""

from __future__ import annotations

import json
from typing import Any


def toml_value(value: Any) -> str:
    """Returns a string, number, boolean, list or table as TOML; the first three have the same form in JSON."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {toml_value(item)}" for name, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
