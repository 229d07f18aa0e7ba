"""The check of a caption without a model: form, then binding."""

from __future__ import annotations

from .binding import binding_problem
from .form import form_problem
from .start import start_of
from .prompts import EXAMPLES
from .plan import Plan,Subject,plan_problem
Plan.of_state=staticmethod(lambda s: Plan((Subject("",state=s),)))
SHOWN = tuple(c for _, c in EXAMPLES)

def start_text(prompt):
    return start_of(prompt).text
def caption_problem(prompt, caption, plan=None):
    return form_problem(prompt, caption, SHOWN) or binding_problem(prompt, caption) or (plan and plan_problem(prompt,caption,plan))
