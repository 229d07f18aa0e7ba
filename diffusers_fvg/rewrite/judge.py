"""The third layer of the check: the model that wrote a caption is asked yes or no about it.

A caption is refused on a sure answer only. Local models answer with the probabilities of one token, servers with JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .answers import find_in_answer
from .plan import Plan, Subject
from .start import start_of
from .words import is_english


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# From this probability on an answer is sure.
SURE = 0.9
_MOST_QUESTIONS = 8


@dataclass(frozen=True)
class Question:
    """One question about a caption.

    Args:
        text (`str`): ends with a question mark.
        wanted (`bool`): whether yes is the right answer.
        reason (`str`): what is wrong where the answer is not the wanted one.
    """

    text: str
    wanted: bool
    reason: str


def questions(prompt: str, plan: Plan | None) -> list[Question]:
    """What a caption of a prompt's first frame is asked: each subject and relation of the start, and nothing of later."""
    asked = []
    if plan is not None and plan.subjects:
        named = [str(subject) + f", {subject.place}" * bool(subject.place) for subject in plan.subjects] + [
            *plan.relations
        ]
    elif is_english(prompt):
        named = [
            str(Subject(" ".join(thing.names), int(thing.number or 1), thing.colours))
            for thing in start_of(prompt).things
            if thing.names and not thing.is_optional
        ]
    else:
        named = []
    for name in named[: _MOST_QUESTIONS - 1]:
        asked.append(Question(f"Does the description have this: {name}?", True, f'"{name}" is missing'))
    later = f" ({plan.later})" if plan is not None and plan.later else ""
    text = f"Does the description show or tell anything that happens only later in the video{later}?"
    return [*asked, Question(text, False, f"it shows what happens only later{later}")]


def chat_of(prompt: str, caption: str, question: Question) -> list[dict[str, str]]:
    """The chat that asks one question, to be answered with one word."""
    text = f"Prompt of a video: {prompt}\nDescription of its first frame: {caption}\n{question.text} Answer yes or no."
    return [{"role": "user", "content": text}]


def chat_of_all(prompt: str, caption: str, asked: Sequence[Question]) -> list[dict[str, str]]:
    """The chat that asks all questions at once, to be answered with JSON."""
    listed = "\n".join(f"{number}. {question.text}" for number, question in enumerate(asked, start=1))
    form = json.dumps({"answers": ["yes or no"] * len(asked)})
    text = (
        f"Prompt of a video: {prompt}\nDescription of its first frame: {caption}\n{listed}\nAnswer with JSON: {form}"
    )
    return [{"role": "user", "content": text}]


def answers_schema(count: int) -> dict:
    """JSON schema of the answers to so many questions."""
    item = {"type": "string", "enum": ["yes", "no"]}
    listed = {"type": "array", "items": item, "minItems": count, "maxItems": count}
    return {
        "type": "object",
        "properties": {"answers": listed},
        "required": ["answers"],
        "additionalProperties": False,
    }


def read_answers(answer: str, count: int) -> list[float]:
    """The probability of yes of each question: 1 or 0, and 0.5 for all where the answer does not say."""
    try:
        said = find_in_answer(answer, lambda value: _listed(value, count), "list of answers")
    except ValueError:
        return [0.5] * count
    return [{"yes": 1.0, "no": 0.0}.get(text, 0.5) for text in said]


def _listed(value: dict, count: int) -> list[str] | None:
    said = value.get("answers")
    if not isinstance(said, list) or len(said) != count:
        return None
    return [_word(text) for text in said]


def _word(text: str | bool) -> str:
    return ("no", "yes")[text] if isinstance(text, bool) else str(text).strip(" .").lower()


def choice_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids of the tokens that yes and no begin with."""
    forms = [[word, f" {word}"] for word in ("yes", "Yes", "YES", "no", "No", "NO")]
    ids = [[tokenizer(form, add_special_tokens=False).input_ids for form in pair] for pair in forms]
    first = [{tokens[0] for tokens in pair if tokens} for pair in ids]
    yes, no = set().union(*first[:3]), set().union(*first[3:])
    # A token that begins both, such as a blank, tells nothing.
    return sorted(yes - no), sorted(no - yes)


def verdict(asked: Sequence[Question], yes: Sequence[float]) -> str | None:
    """What is wrong by the answers' probabilities of yes, or `None` where none is surely against the caption."""
    wrong = [q.reason for q, share in zip(asked, yes) if (1 - share if q.wanted else share) >= SURE]
    return "; ".join(wrong) or None
