"""Third check of a caption: the model that wrote it answers yes-or-no questions about it. The first two are `form.py` and
`binding.py`.

Only an answer with a probability of at least `SURE` refuses a caption. Local models answer with the probabilities of one token,
servers with JSON.
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

# Least probability at which an answer refuses a caption.
SURE = 0.9
_MOST_QUESTIONS = 8


@dataclass(frozen=True)
class Question:
    """One yes-or-no question about a caption.

    Args:
        text (`str`): the question, with its question mark.
        wanted (`bool`): whether yes is the right answer.
        reason (`str`): what is wrong with the caption if the answer is the other one.
    """

    text: str
    wanted: bool
    reason: str


def questions(prompt: str, plan: Plan | None) -> list[Question]:
    """Returns the questions about a caption: one for each subject and relation of the start, and one about later events."""
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
    """Builds the chat that asks one question, to be answered with one word."""
    text = f"Prompt of a video: {prompt}\nDescription of its first frame: {caption}\n{question.text} Answer yes or no."
    return [{"role": "user", "content": text}]


def chat_of_all(prompt: str, caption: str, asked: Sequence[Question]) -> list[dict[str, str]]:
    """Builds the chat that asks all questions at once, to be answered with JSON."""
    listed = "\n".join(f"{number}. {question.text}" for number, question in enumerate(asked, start=1))
    form = json.dumps({"answers": ["yes or no"] * len(asked)})
    text = (
        f"Prompt of a video: {prompt}\nDescription of its first frame: {caption}\n{listed}\nAnswer with JSON: {form}"
    )
    return [{"role": "user", "content": text}]


def answers_schema(count: int) -> dict:
    """Returns the JSON schema of the answers to `count` questions."""
    item = {"type": "string", "enum": ["yes", "no"]}
    listed = {"type": "array", "items": item, "minItems": count, "maxItems": count}
    return {
        "type": "object",
        "properties": {"answers": listed},
        "required": ["answers"],
        "additionalProperties": False,
    }


def read_answers(answer: str, count: int) -> list[float]:
    """Returns the probability of yes for each question: 1 for yes, 0 for no, 0.5 for anything else."""
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
    """Returns the ids of the first tokens of "yes" and of "no" in several spellings."""
    forms = [[word, f" {word}"] for word in ("yes", "Yes", "YES", "no", "No", "NO")]
    ids = [[tokenizer(form, add_special_tokens=False).input_ids for form in pair] for pair in forms]
    first = [{tokens[0] for tokens in pair if tokens} for pair in ids]
    yes, no = set().union(*first[:3]), set().union(*first[3:])
    # A token that both words begin with, such as a blank, is left out.
    return sorted(yes - no), sorted(no - yes)


def verdict(asked: Sequence[Question], yes: Sequence[float]) -> str | None:
    """Returns the reasons of all questions whose wrong answer has a probability of at least `SURE`, or `None`.

    `yes` holds the probability of yes for each question.
    """
    wrong = [q.reason for q, share in zip(asked, yes) if (1 - share if q.wanted else share) >= SURE]
    return "; ".join(wrong) or None
