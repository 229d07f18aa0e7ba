"""Record of how stage 1 wrote a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .plan import Plan


@dataclass(frozen=True)
class RewriteOutcome:
    """What a rewriter wrote for one prompt, and how it got there.

    Args:
        status (`str`): `"accepted"`: the first answer was valid. `"repaired"`: a later one was. `"fallback"`: none was, and
            `made` is the best of them or the prompt's words about its start.
        made (`Any`): the result: a caption, a list of moments or a motion caption.
        reasons (`tuple[str, ...]`): what was wrong with each refused answer, in order.
        attempts (`int`): number of answers that the model was asked for.
        seconds (`float`): time from the first question to the result; of a batch, the prompt's share.
        judged (`int`): number of yes-or-no questions that the model was asked about its captions.
        judge_seconds (`float`): the part of `seconds` that these questions took.
        plan ([`Plan`], *optional*): plan of an accepted or repaired caption.
    """

    status: str
    made: Any
    reasons: tuple[str, ...] = ()
    attempts: int = 0
    seconds: float = 0.0
    judged: int = 0
    judge_seconds: float = 0.0
    plan: Plan | None = None
