"""How stage 1 came to what it wrote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .plan import Plan


@dataclass(frozen=True)
class RewriteOutcome:
    """What a rewriter made of one prompt, and how.

    Args:
        status (`str`): `"accepted"`, the first answer; `"repaired"`, a later one; `"fallback"`, no answer was valid, and the
            best of them, or what the prompt says of its start, stands in.
        made (`Any`): what was asked for: a caption, a list of moments, a motion caption.
        reasons (`tuple[str, ...]`): what was wrong with each answer that was refused, in order.
        attempts (`int`): answers that were asked for.
        seconds (`float`): from the first question to the end; of a batch, its share.
        judged (`int`): yes-or-no questions that the model was asked about its captions.
        judge_seconds (`float`): the part of `seconds` that they took.
        plan ([`Plan`], *optional*): by which a caption was written that was not refused.
    """

    status: str
    made: Any
    reasons: tuple[str, ...] = ()
    attempts: int = 0
    seconds: float = 0.0
    judged: int = 0
    judge_seconds: float = 0.0
    plan: Plan | None = None
