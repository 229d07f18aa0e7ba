"""Whether a caption is the first frame of a prompt, as far as words tell: form, then binding. No model is asked."""

from __future__ import annotations

from collections.abc import Iterable

from .binding import Read, binding_problem
from .form import form_problem
from .plan import Plan, plan_problem
from .prompts import EXAMPLES, INSTRUCTION, PLAN_INSTRUCTION
from .start import first_sentence, start_of
from .words import is_english


# What a caption may have copied, when a caller does not say what its model was shown.
SHOWN = (INSTRUCTION, PLAN_INSTRUCTION, *(caption for _, caption in EXAMPLES))


def caption_problem(prompt: str, caption: str, plan: Plan | None = None) -> str | None:
    """Says why a caption is no first frame of a prompt, or returns `None` where nothing speaks against it.

    Form is checked in any language: words, one picture, no placeholder, refusal or copy of an example. Of English texts also
    what the prompt says of its start, up to its first word of change or time: things, numbers and colours with their things,
    places, what is said not to be there. What comes later must not be shown. What words leave open is accepted.

    Args:
        prompt (`str`): what should happen in the video.
        caption (`str`): description of its first frame.
        plan ([`Plan`], *optional*): the scene that the caption was written by: it must hold its subjects in their states.

    Returns:
        `str` or `None`: one reason, in words that a model can mend the caption by.
    """
    return check_caption(prompt, caption, plan)


def check_caption(
    prompt: str, caption: str, plan: Plan | None = None, read: Read = str, shown: Iterable[str] = SHOWN
) -> str | None:
    """[`caption_problem`] for a model that reads words its own way and was shown `shown`."""
    problem = form_problem(prompt, caption, shown) or binding_problem(prompt, caption, read)
    return problem if problem is not None or plan is None else plan_problem(prompt, caption, plan, read)


def start_clause(prompt: str) -> str:
    """What a prompt says of its start, in its own words, for a caption that no model wrote: its first sentence without what
    comes later. Of a prompt in another language than English it is the first sentence."""
    return (start_of(prompt).text if is_english(prompt) else "") or first_sentence(prompt)
