"""The yes-or-no questions that a vision-language model is asked about an image."""

from __future__ import annotations

from typing import Any


# The question of VQAScore (arXiv 2404.01291), and its request for a one-word answer.
WHOLE_CAPTION = 'Does this figure show "{caption}"?'
YES_OR_NO = "{question} Please answer yes or no."


def questions_about(caption: str, plan: Any = None) -> list[str]:
    """Returns one question for each requirement of stage 1's plan, or one about the whole caption without a plan.

    Args:
        caption (`str`): caption of the image.
        plan (*optional*): has `subjects`, each with `name`, `count`, `attributes`, `state` and `place`; `relations`, as short
            texts; and a `setting`. Empty entries give no question.
    """
    asked = []
    for subject in plan.subjects if plan is not None else ():
        thing = " ".join([*subject.attributes, subject.name])
        asked.append(f"Does this figure show {f'exactly {subject.count} ' if subject.count > 1 else ''}{thing}?")
        asked += [
            f"Does this figure show the {subject.name} {text}?" for text in (subject.state, subject.place) if text
        ]
    asked += [
        f"Does this figure show that {text.rstrip('.')}?" for text in (plan.relations if plan is not None else ())
    ]
    if plan is not None and plan.setting:
        asked.append(f'Is "{plan.setting}" the setting of this figure?')
    return asked or [WHOLE_CAPTION.format(caption=caption)]
