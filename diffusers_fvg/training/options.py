"""Formats the options of a training run from the docstrings of its config. Importing this module is fast."""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import MISSING, Field, fields

from ..publishing.toml import toml_value
from .config import DataSource, TrainConfig


# An entry such as "rank, alpha (`int`, `float`, *optional*): rank and alpha of the LoRA".
_ENTRY = re.compile(r"^    (\w+(?:, \w+)*) \(.*?\): ", re.MULTILINE | re.DOTALL)


def options_text(width: int = 100) -> str:
    """Returns all options of `fvg train` with type, default and description.

    Args:
        width (`int`, *optional*): most characters of a line.
    """
    return f"{_options(TrainConfig, width)}\n\nOf each [[data]]:\n\n{_options(DataSource, width)}"


def _options(kind: type, width: int) -> str:
    reasons, shown = _reasons(kind), []
    for field in fields(kind):
        names, reason = reasons[field.name]
        if names.index(field.name) > 0:
            reason = f"See {names[0]}."
        indented = textwrap.fill(
            reason, width, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
        )
        shown.append(f"{field.name}: {_type(field)}, {_default(field)}\n{indented}")
    return "\n".join(shown)


def _reasons(kind: type) -> dict[str, tuple[list[str], str]]:
    """Returns for each option the names that share its entry in the docstring, and the text of that entry."""
    documentation = (inspect.getdoc(kind) or "").split("Args:\n")[1].split("\nRaises:")[0]
    entries = list(_ENTRY.finditer(documentation))
    reasons: dict[str, tuple[list[str], str]] = {}
    for entry, following in zip(entries, [*entries[1:], None]):
        text = documentation[entry.end() : following.start() if following else None]
        names = entry[1].split(", ")
        reasons |= dict.fromkeys(names, (names, " ".join(text.split())))
    return reasons


def _type(field: Field) -> str:
    # Annotations are strings in this package. Those of `Literal` list the values.
    return re.sub(r"Literal\[(.*)\]", r"one of \1", str(field.type))


def _default(field: Field) -> str:
    if field.default is MISSING:
        return "required"
    return "left out" if field.default is None else f"default {toml_value(field.default)}"
