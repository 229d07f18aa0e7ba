"""Parses the answers of chat models: skips their thinking and finds the last JSON object of the wanted form."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar


Value = TypeVar("Value")

_TAGS = "think|thinking|thought|thoughts|reasoning|reflection|analysis|seed:think"
# Marks of thinking: tags in several kinds of brackets, and the channels of gpt-oss.
_BEGIN = re.compile(
    rf"<(?:{_TAGS})>|\[THINK\]|\u25c1think\u25b7|<\|begin_of_thought\|>|<\|START_THINKING\|>|"
    r"<\|channel\|>(?:analysis|commentary)[^<]*<\|message\|>",
    re.IGNORECASE,
)
_END = re.compile(
    rf"</(?:{_TAGS})>|\[/THINK\]|\u25c1/think\u25b7|<\|end_of_thought\|>|<\|END_THINKING\|>|<\|channel\|>final[^<]*<\|message\|>",
    re.IGNORECASE,
)

_SENTENCE = re.compile(r"\S.*?(?:[.!?](?=\s)|[\u3002\uff01\uff1f])", re.DOTALL)


def without_thinking(answer: str) -> str:
    """Returns an answer without its thinking: drops all up to the last end mark, and all from a begin mark without an end."""
    ends = list(_END.finditer(answer))
    answer = answer[ends[-1].end() :] if ends else answer
    begin = _BEGIN.search(answer)
    return answer[: begin.start()] if begin else answer


def is_thinking(text: str) -> bool:
    """Returns whether a text ends with a begin mark of thinking, as the chat templates of some models do."""
    begins = list(_BEGIN.finditer(text))
    return bool(begins) and _END.search(text, begins[-1].end()) is None and not text[begins[-1].end() :].strip()


def marks_thinking(tokens: list[str]) -> bool:
    """Returns whether a special token marks thinking; decoding must keep such tokens to show where thinking ends."""
    return any(_BEGIN.search(token) or _END.search(token) or token == "<|channel|>" for token in tokens)


def text_under(value: Mapping[str, Any], key: str) -> str | None:
    """Returns the text under a key of a JSON object, on one line, or `None` for a text without letters and digits ("...")."""
    text = " ".join(value[key].split()) if isinstance(value.get(key), str) else None
    return text if text is None or any(letter.isalnum() for letter in text) else None


class CutAnswer(ValueError):
    """An answer ends within its JSON object, and the part that is there cannot be used."""


def find_in_answer(answer: str, read: Callable[[dict], Value | None], wanted: str) -> Value:
    """Returns what `read` makes of the last JSON object in an answer that it accepts.

    The last one counts, because models repeat the form and correct themselves. If the answer was cut off within a text, the
    first two whole sentences of that text are used.

    Args:
        answer (`str`): the model's answer.
        read (`Callable`): takes a JSON object and returns a value, or `None` if the object has another form.
        wanted (`str`): name of the value, for the message of an error.

    Raises:
        `ValueError`: `read` accepts no object of the answer; [`CutAnswer`] if the answer was cut off.
    """
    answer = without_thinking(answer)
    decoder = json.JSONDecoder(strict=False)
    made, found, place = None, False, answer.find("{")
    while place >= 0:
        end = place + 1
        try:
            value, end = decoder.raw_decode(answer, place)
        except (json.JSONDecodeError, RecursionError):
            pass
        else:
            found = True
            last = read(value)
            made = made if last is None else last
        place = answer.find("{", end)
    if made is None:
        is_cut, value = _read_cut(answer)
        made = None if value is None else read(value)
        if made is None and is_cut:
            raise CutAnswer("it is too long and was cut off")
    if made is None:
        raise ValueError(f"the JSON object has no {wanted}" if found else "it holds no JSON object")
    return made


def _read_cut(answer: str) -> tuple[bool, dict | None]:
    """Returns whether an answer ends within a JSON object; and if it ends in a text, the object with two sentences of it."""
    opened: list[int] = []
    begin, escaped = None, False
    for place, letter in enumerate(answer):
        if escaped or letter == "\\":
            escaped = not escaped
        elif letter == '"':
            begin = place + 1 if begin is None else None
        elif begin is None and (letter == "{" or letter == "[" and opened):
            opened.append(place)
        elif begin is None and letter in "}]" and opened:
            opened.pop()
    # A model that does not stop repeats its sentences.
    said = [] if begin is None else [*dict.fromkeys(_SENTENCE.findall(f"{answer[begin:]} "))][:2]
    if not opened or not said:
        return bool(opened), None
    ends = "".join("}" if answer[place] == "{" else "]" for place in reversed(opened))
    try:
        return True, json.loads(f'{answer[opened[0] : begin]}{" ".join(said)}"{ends}', strict=False)
    except (json.JSONDecodeError, RecursionError):
        return True, None
