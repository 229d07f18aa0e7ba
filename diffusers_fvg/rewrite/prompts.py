"""Instructions and examples for a language model that writes first frames, and the parsing of its answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .answers import find_in_answer, text_under
from .plan import PlannedCaption, plan_of
from .words import NOT_NAMES, STOPS, roots, words


# Reasons for the rules of the instruction:
# * Only the start. A text-to-image model draws everything that its prompt names. A word about a later event puts the end of
#   the video into its first frame, and the video model has nothing left to do. This is where prompt upsampling fails: it
#   lowers the dynamic-attribute scores of all four video models that the FVG paper (arXiv 2512.16371) measures.
# * The prompt's own words. The video model reads the prompt and must find its objects in the anchor. A lost object, another
#   colour or another count cannot be corrected after the picture is drawn.
# * The cause, not the effect. "A chicken tasting the sauce" becomes a roast chicken unless the caption says that it is alive.
# * Where a movement begins. Something that moves to the left and starts at the left edge leaves the frame at once.
# * JSON. Chat models often add comments; text outside the object is ignored.
INSTRUCTION = """\
You write the prompt of a still picture: the very first frame of a video, before anything has happened. The user gives the \
prompt of the video. Answer with one JSON object and nothing else: {"first_frame": "..."}
Rules:
1. One or two plain sentences about what is seen at the first moment, in the language of the prompt.
2. Keep every object, colour and number that the prompt has at the start, in the prompt's own words. Add little.
3. Show the cause, never the effect. What will change colour or shape still has the old one. What will be made is not there \
yet. What will move stands still where its way begins: something that goes left starts on the right. What will act is ready \
to act.
4. Never tell what happens later. Do not use words of change or time such as turns, becomes, moves, starts, then, while, \
gradually."""

# Reasons for a plan, besides those above:
# * The plan lists what the caption must hold, so that the caption can be compared with it, and keeps later events apart.
# * Like the authors of the FVG paper, it asks only for what the prompt states, the initial state, one or two sentences, and
#   subjects at the start of their action.
PLAN_INSTRUCTION = """\
You write the prompt of a still picture: the very first frame of a video. The user gives the prompt of the video. Answer with \
one JSON object and nothing else:
{"subjects": [{"name": "...", "count": 1, "attributes": ["..."], "state": "...", "place": "..."}], "relations": ["..."], \
"setting": "...", "later": "...", "first_frame": "..."}
- "subjects": who or what the prompt has at the start, with its number, its colours and materials, the state that it has \
before anything has changed, and its place in the picture. Leave a text empty that the prompt does not settle.
- "relations": where subjects are to each other, if the prompt says so.
- "setting": the surroundings, if the prompt says so.
- "later": what changes, appears or happens after the first moment.
- "first_frame": one or two plain sentences about what is seen at the first moment, in the language of the prompt.
Rules for "first_frame":
1. Keep the subjects, colours, numbers and places of the start in the prompt's own words. Add little.
2. Nothing of "later" is in it. What will change still has its old state. What will be made is not there yet.
3. Who or what acts is shown at the start of the action. What moves stands where its way begins: something that goes left \
starts on the right.
4. No words of change or time such as turns, becomes, then, gradually."""

# Pairs of a video prompt and its first frame, shown to the model as earlier turns of the chat: a change of colour, a motion,
# two objects in opposite directions, a count, something that is made, an action with a consequence.
EXAMPLES = (
    (
        "A white paper lantern gradually turns deep red.",
        "A plain white paper lantern hanging in still evening air.",
    ),
    (
        "A brown dog runs to the right across a snowy field.",
        "A brown dog at the left edge of a wide snowy field, standing and facing right.",
    ),
    (
        "A yellow taxi drives to the left while a black bicycle rolls to the right.",
        "A yellow taxi on the right side of a street, facing left, and a black bicycle on the left side, facing right.",
    ),
    (
        "Three penguins jump into the sea one after another.",
        "Three penguins standing close together at the edge of an ice floe above the calm sea.",
    ),
    (
        "A girl builds a tower of wooden blocks.",
        "A girl sitting on a carpet with loose wooden blocks spread in front of her.",
    ),
    (
        "A ginger cat knocks a glass of water off a shelf.",
        "A ginger cat on a shelf, one paw raised beside a full glass of water.",
    ),
)


def choose_examples(prompt: str, examples: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Selects the examples that share no word with a prompt; a model would mix the words of others into its caption."""
    own = roots(word for word in words(prompt) if word not in STOPS | NOT_NAMES)
    return [
        pair for pair in examples if own.isdisjoint(roots(w for w in words(pair[0]) if w not in STOPS | NOT_NAMES))
    ]


def format_answer(caption: str) -> str:
    """Formats a caption as the JSON answer without a plan; rewriters that are trained for it alone give this answer."""
    return json.dumps({"first_frame": caption}, ensure_ascii=False)


def parse_answer(answer: str) -> str:
    """Returns the caption in an answer: that of the last JSON object with a text under `first_frame`.

    Raises:
        `ValueError`: the answer has no such object; the message says what is missing.
    """
    return parse_planned(answer).caption


def parse_planned(answer: str) -> PlannedCaption:
    """Returns the caption and the plan in an answer; see [`parse_answer`]. The plan may be missing."""
    return find_in_answer(answer, _planned_in, 'text under "first_frame"')


def _planned_in(value: Mapping[str, Any]) -> PlannedCaption | None:
    caption = text_under(value, "first_frame")
    return None if caption is None else PlannedCaption(caption, plan_of(value))
