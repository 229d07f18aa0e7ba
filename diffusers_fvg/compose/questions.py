"""What a vision-language model is asked about a picture, with answers of one word."""

from __future__ import annotations

from typing import Any


# The question of VQAScore (arXiv 2404.01291), and how it asks for the answer.
WHOLE_CAPTION = 'Does this figure show "{caption}"?'
YES_OR_NO = "{question} Please answer yes or no."


def questions_about(caption: str, plan: Any = None) -> list[str]:
    """One question for each requirement of stage 1's plan; of the whole caption where there is none.

    Args:
        caption (`str`): of the picture.
        plan (*optional*): has `subjects`, each with `name`, `count`, `attributes`, `state` and `place`; `relations`, as short
            texts; and a `setting`. What is empty is not asked for.
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
