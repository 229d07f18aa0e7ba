"""Writes an answer with a plan, as a chat model would."""

import json
from dataclasses import asdict

from diffusers_fvg.rewrite.plan import PlannedCaption


def format_planned(made: PlannedCaption) -> str:
    return json.dumps(asdict(made.plan) | {"first_frame": made.caption}, ensure_ascii=False)
