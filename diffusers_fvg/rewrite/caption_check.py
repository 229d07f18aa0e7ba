"""Checks by words alone whether a caption describes the first frame of a prompt: its form, then its content."""

from __future__ import annotations

from collections.abc import Iterable

from .binding import Read, binding_problem
from .form import form_problem
from .plan import Plan, plan_problem
from .prompts import EXAMPLES, INSTRUCTION, PLAN_INSTRUCTION
from .start import first_sentence, start_of
from .words import is_english


# Texts that a caption must not copy, when the caller does not say what its model was shown.
SHOWN = (INSTRUCTION, PLAN_INSTRUCTION, *(caption for _, caption in EXAMPLES))


def caption_problem(prompt: str, caption: str, plan: Plan | None = None) -> str | None:
    """Returns why a caption does not describe the first frame of a prompt, or `None` if no problem is found.

    The form is checked in any language: the caption has words, describes one picture, and is not a placeholder, refusal or copy
    of an example. English captions must also keep what the prompt says about the start, up to its first word of change or
    time: the things with their numbers and colours, their places, and what is said to be absent. They must not show what
    comes later. Doubtful cases are accepted.

    Args:
        prompt (`str`): what should happen in the video.
        caption (`str`): description of its first frame.
        plan ([`Plan`], *optional*): the plan that the caption was written from. The caption must keep its subjects and their
            states.

    Returns:
        `str` or `None`: the first problem, in words from which a model can correct the caption.
    """
    return check_caption(prompt, caption, plan)


def check_caption(
    prompt: str, caption: str, plan: Plan | None = None, read: Read = str, shown: Iterable[str] = SHOWN
) -> str | None:
    """[`caption_problem`] for one model: `read` maps a word to its vocabulary, `shown` are the texts of its question."""
    problem = form_problem(prompt, caption, shown) or binding_problem(prompt, caption, read)
    return problem if problem is not None or plan is None else plan_problem(prompt, caption, plan, read)


def start_clause(prompt: str) -> str:
    """Returns the prompt's words about its start, as a caption when no model's answer is valid.

    This is the first sentence without what comes later, or the whole first sentence if the prompt is not English.
    """
    return (start_of(prompt).text if is_english(prompt) else "") or first_sentence(prompt)
