"""The plan of a first frame, which a model writes before its caption, and the check of the caption against the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .binding import Kept, Read, swapped_problem
from .start import start_of
from .words import COLOURS, NOT_NAMES, STOPS, is_english, is_word, root, words


TEXT = {"type": "string"}
_TEXTS = {"type": "array", "items": TEXT}
_SUBJECT_FIELDS = {
    "name": TEXT,
    "count": {"type": "integer", "minimum": 1},
    "attributes": _TEXTS,
    "state": TEXT,
    "place": TEXT,
}


def object_schema(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the JSON schema of an object that has exactly these fields."""
    return {"type": "object", "properties": dict(fields), "required": list(fields), "additionalProperties": False}


# JSON schema of an answer. The caption is last, so that the model writes it after the plan.
PLAN_SCHEMA = object_schema(
    {
        "subjects": {"type": "array", "items": object_schema(_SUBJECT_FIELDS), "maxItems": 8},
        "relations": {**_TEXTS, "maxItems": 6},
        "setting": TEXT,
        "later": TEXT,
        "first_frame": TEXT,
    }
)


@dataclass(frozen=True)
class Subject:
    """A person or thing of a first frame.

    Args:
        name (`str`): its name.
        count (`int`, *optional*): how many of it there are, at least 1.
        attributes (`tuple[str, ...]`, *optional*): colour, material, clothes.
        state (`str`, *optional*): its state at the start.
        place (`str`, *optional*): its place in the picture.
    """

    name: str
    count: int = 1
    attributes: tuple[str, ...] = ()
    state: str = ""
    place: str = ""

    def __str__(self) -> str:
        number = str(self.count) if self.count > 1 else ""
        return ", ".join(filter(None, (" ".join(filter(None, (number, *self.attributes, self.name))), self.state)))


@dataclass(frozen=True)
class Plan:
    """A first frame as a model planned it.

    Args:
        subjects (`tuple[Subject, ...]`): persons and things that are there at the start.
        relations (`tuple[str, ...]`, *optional*): short texts on where subjects are relative to each other.
        setting (`str`, *optional*): the surroundings.
        later (`str`, *optional*): what changes or comes after the first frame.
    """

    subjects: tuple[Subject, ...] = ()
    relations: tuple[str, ...] = ()
    setting: str = ""
    later: str = ""


@dataclass(frozen=True)
class PlannedCaption:
    """A caption and, if the answer had one, the plan that it was written from."""

    caption: str
    plan: Plan | None


def plan_of(value: Mapping[str, Any]) -> Plan | None:
    """Returns the plan in a JSON object, or `None` if it has no list of subjects. Malformed entries are left out."""
    listed = value.get("subjects")
    if not isinstance(listed, list):
        return None
    subjects = tuple(_subject(item) for item in listed if isinstance(item, dict) and _text(item, "name"))
    relations = value.get("relations")
    return Plan(subjects, _texts(relations), _text(value, "setting"), _text(value, "later"))


def _subject(item: Mapping[str, Any]) -> Subject:
    count = item.get("count")
    count = count if isinstance(count, int) and not isinstance(count, bool) and 1 <= count <= 100 else 1
    return Subject(
        _text(item, "name"), count, _texts(item.get("attributes")), _text(item, "state"), _text(item, "place")
    )


def _text(value: Mapping[str, Any], key: str) -> str:
    return " ".join(value[key].split()) if isinstance(value.get(key), str) else ""


def _texts(value: Any) -> tuple[str, ...]:
    listed = value if isinstance(value, list) else []
    return tuple(" ".join(item.split()) for item in listed if isinstance(item, str) and item.strip())


def plan_problem(prompt: str, caption: str, plan: Plan, read: Read = str) -> str | None:
    """Returns what a caption loses of its plan, or which word of the plan's `later` it shows, or `None`.

    One word of a subject's name is enough. All words of its colours and state must be there, or three in four if they are
    more than three.
    """
    texts = [str(subject) for subject in plan.subjects]
    if not is_english(" ".join((prompt, caption, *texts))):
        return None
    here = Kept(caption, read)
    for subject in plan.subjects:
        names = _content(subject.name)
        if names and not any(word in here for word in names):
            return f'"{subject.name}" of the plan is missing'
        colours = [word for text in subject.attributes for word in words(text) if word in COLOURS]
        state = [*colours, *_content(subject.state)]
        lost = [word for word in state if word not in here]
        if len(lost) > (len(state) // 4 if len(state) > 3 else 0):
            return f'"{" ".join(lost)}" of the plan is missing'
        if subject.count > 1 and not here.holds(str(subject.count), tuple(names)):
            return f'"{subject.count} {subject.name}" of the plan is missing'
    start = start_of(prompt)
    said = {root(word) for text in (*texts, plan.setting, *plan.relations) for word in _content(text)}
    said |= {root(word) for word in (*start.words, *start.old) if is_word(word)}
    for word in _content(caption):
        if root(word) in {root(later) for later in _content(plan.later)} - said:
            return f'"{word}" comes only later'
    return swapped_problem(". ".join(texts), caption)


def _content(text: str) -> list[str]:
    return [
        word
        for word in words(text)
        if is_word(word) and word not in STOPS and (word not in NOT_NAMES or word in _SIZES)
    ]


_SIZES = frozenset("small big large tiny huge little tall short long old new bright dark".split())
