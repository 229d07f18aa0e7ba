"""The three kinds of question of stage 1 as data: first frame, storyboard and motion. `rewriter.py` asks them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .answers import find_in_answer, text_under
from .binding import Kept, Read, missing_problem, told_problem
from .caption_check import check_caption, start_clause
from .form import MAX_CAPTION_CHARACTERS, MIN_CAPTION_CHARACTERS, copied_text
from .plan import PLAN_SCHEMA, TEXT, object_schema
from .prompts import EXAMPLES, INSTRUCTION, PLAN_INSTRUCTION, format_answer, parse_answer, parse_planned
from .start import Thing, lasting_things, start_of
from .storyboard import Moment
from .words import is_english


@dataclass(frozen=True)
class RewriterTask:
    """One kind of question about a prompt.

    Args:
        name (`str`): key under which a rewriter's `instruction` may hold another instruction.
        subject (`str`): name of the result in warnings.
        instruction (`str`): system turn of the chat.
        examples (`tuple`): pairs of a prompt and its answer, for earlier turns of the chat.
        write (`Callable`): formats an example's answer as text.
        read (`Callable`): parses a model's text to an answer; raises a `ValueError` that says what is missing.
        problem (`Callable`): `problem(prompt, answer, read_word, shown)` returns why the answer is wrong for the prompt, or
            `None`; `shown` are the texts that the model was shown.
        fallback (`Callable`): makes the result from the prompt if no answer is valid.
        result (`Callable`): converts an answer to the result for the caller.
        first_frame (`Callable`, *optional*): returns the caption of the first frame in an answer, for the judge.
        captions (`int`): most captions in an answer.
        extra_tokens (`int`): most tokens of an answer besides its captions.
        schema (`dict`, *optional*): JSON schema of the answer, for runtimes that enforce it.
        simpler (`RewriterTask`, *optional*): task that is asked next after an answer of the wrong form.
    """

    name: str
    subject: str
    instruction: str
    examples: tuple[tuple[str, Any], ...]
    write: Callable[[Any], str]
    read: Callable[[str], Any]
    problem: Callable[[str, Any, Read, Sequence[str]], str | None]
    fallback: Callable[[str], Any]
    result: Callable[[Any], Any] = lambda made: made
    first_frame: Callable[[Any], str] | None = None
    captions: int = 1
    extra_tokens: int = 0
    schema: dict[str, Any] | None = None
    simpler: RewriterTask | None = None


FIRST_FRAME = RewriterTask(
    "first_frame",
    "first-frame prompt",
    INSTRUCTION,
    EXAMPLES,
    format_answer,
    parse_answer,
    lambda prompt, caption, read, shown: check_caption(prompt, caption, None, read, shown),
    start_clause,
    first_frame=str,
    schema=object_schema({"first_frame": TEXT}),
)
# The question for a first frame with a plan before the caption. Small models often fail to give this form.
PLANNED_FRAME = replace(
    FIRST_FRAME,
    instruction=PLAN_INSTRUCTION,
    read=parse_planned,
    problem=lambda prompt, made, read, shown: check_caption(prompt, made.caption, made.plan, read, shown),
    result=lambda made: made.caption,
    first_frame=lambda made: made.caption,
    extra_tokens=256,
    schema=PLAN_SCHEMA,
    simpler=FIRST_FRAME,
)

# -- storyboard -------------------------------------------------------------------------------------------------------

# Reasons for the rules of the instruction, besides those for the first frame:
# * As few moments as possible. Each picture becomes a fixed frame of the video. One that the prompt does not ask for stops a
#   motion or invents an end that the video model would not have made.
# * Complete captions in equal words. Each picture is drawn from its own caption alone, and all must show the same scene.
STORYBOARD_INSTRUCTION = """\
You write the storyboard of a video: prompts of still pictures, each of what is seen at one moment. The user gives the prompt \
of the video. Answer with one JSON object and nothing else: {"moments": [{"time": 0.0, "frame": "..."}, {"time": 1.0, \
"frame": "..."}]}
Rules:
1. Time 0 is the very first frame, before anything has happened. Time 1 is the last frame, when everything has happened. Give \
at most {num_moments} moments, in the order of time and well apart.
2. Give a later moment only if the prompt settles what is seen then: what has another colour, shape, place or number, what has \
come or is gone. If nothing of the kind changes, or if the prompt leaves open how it ends, give the first moment alone.
3. A moment is one or two plain sentences in the language of the prompt, complete in itself: its picture is drawn by somebody \
who does not know the others. Name the same things and the same surroundings in the same words, and change only what the \
video changes.
4. Keep every object, colour and number that the prompt has at the start in the first moment, in the prompt's own words. It \
shows the cause, never the effect: what will change still has its old colour and shape; what will be made is not there yet; \
something that goes left starts on the right.
5. Tell what is, not what happens. Do not use words of change or time such as turns, becomes, moves, starts, then, while, \
gradually."""

STORYBOARD_EXAMPLES = tuple(
    (prompt, [Moment(caption, time) for time, caption in moments])
    for prompt, *moments in (
        (
            "A white paper lantern gradually turns deep red.",
            (0.0, "A plain white paper lantern hanging in still evening air."),
            (1.0, "A deep red paper lantern hanging in still evening air."),
        ),
        (
            "A brown dog runs to the right across a snowy field.",
            (0.0, "A brown dog at the left edge of a wide snowy field, standing and facing right."),
            (1.0, "A brown dog at the right edge of a wide snowy field, standing and facing right."),
        ),
        (
            "Three sheep graze on a green hill.",
            (0.0, "Three sheep on a green hill, heads down in the grass."),
        ),
        (
            "A girl builds a tower of wooden blocks.",
            (0.0, "A girl sitting on a carpet with loose wooden blocks spread in front of her."),
            (1.0, "A girl sitting on a carpet with a tall tower of wooden blocks in front of her."),
        ),
        (
            "A ginger cat knocks a glass of water off a shelf.",
            (0.0, "A ginger cat on a shelf, one paw raised beside a full glass of water."),
            (1.0, "A ginger cat on an empty shelf, looking down at a broken glass in a puddle of water on the floor."),
        ),
        (
            "A boy in a yellow coat waves while the bus behind him drives away.",
            (0.0, "A boy in a yellow coat with a raised hand, a bus close behind him."),
        ),
    )
)


def storyboard_task(num_moments: int) -> RewriterTask:
    """Returns the task that asks for the first frame and up to `num_moments - 1` later moments."""
    moment = object_schema({"time": {"type": "number"}, "frame": TEXT})
    return RewriterTask(
        "storyboard",
        "storyboard",
        STORYBOARD_INSTRUCTION,
        STORYBOARD_EXAMPLES,
        write_moments,
        read_moments,
        partial(storyboard_problem, num_moments=num_moments),
        lambda prompt: [Moment(start_clause(prompt), 0.0)],
        first_frame=lambda moments: moments[0].caption,
        captions=num_moments,
        schema=object_schema({"moments": {"type": "array", "items": moment, "maxItems": num_moments}}),
    )


def write_moments(moments: list[Moment]) -> str:
    """Formats moments as the answer of a rewriter: `{"moments": [{"time": 0.0, "frame": "..."}, ...]}`."""
    listed = [{"time": moment.time, "frame": moment.caption} for moment in moments]
    return json.dumps({"moments": listed}, ensure_ascii=False)


def read_moments(answer: str) -> list[Moment]:
    """Returns the moments in an answer and ignores text around the JSON object.

    Raises:
        `ValueError`: the answer has no such object; the message says what is missing.
    """
    return find_in_answer(answer, _moments_of, 'list "moments" of objects with "time" (0 to 1) and "frame" (a text)')


def _moments_of(value: dict) -> list[Moment] | None:
    listed = value.get("moments")
    if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
        return None
    try:
        return [Moment(text_under(item, "frame") or "", item.get("time")) for item in listed]
    except ValueError:
        return None


def storyboard_problem(
    prompt: str, moments: list[Moment], read: Read = str, shown: Sequence[str] = (), *, num_moments: int
) -> str | None:
    """Returns why moments are no valid storyboard of a prompt, or `None`.

    The first moment must be valid by `caption_problem`. Each later moment must describe a still picture, name the things that
    last from the first frame to the last, and share at least one word with the prompt. One of them must name the new states
    that the prompt asks for. The times must begin with 0 and be at least half as far apart as evenly spaced ones.

    Args:
        prompt (`str`): what should happen in the video.
        moments (`list[Moment]`): moments in the order of the answer.
        read (`Callable`, *optional*): as in `binding_problem`.
        shown (`Sequence[str]`, *optional*): texts that the captions must not copy.
        num_moments (`int`): most moments that were asked for.
    """
    if not 1 <= len(moments) <= num_moments:
        return f"there are {len(moments)} moments, not 1 to {num_moments}"
    times = [moment.time for moment in moments]
    apart = 0.5 / (num_moments - 1)
    if times[0] != 0:
        return f"the first moment has time {times[0]}, not 0"
    if any(later - earlier < apart for earlier, later in zip(times, times[1:])):
        return f"the times {times} are not in order and at least {apart:.2g} apart"
    problem = check_caption(prompt, moments[0].caption, None, read, shown)
    if problem is not None:
        return f"in the first moment {problem}"
    for moment in moments[1:]:
        problem = _later_moment_problem(prompt, moment.caption, read, shown)
        if problem is not None:
            return f"at time {moment.time} {problem}"
    results = Thing(start_of(prompt).later) if is_english(prompt) else Thing(())
    if missing_problem(results, Kept(" ".join(moment.caption for moment in moments[1:]), read)) is not None:
        return f'"{" ".join(results.names)}" of the prompt is in no later moment'
    return None


def _later_moment_problem(prompt: str, caption: str, read: Read, shown: Sequence[str]) -> str | None:
    if not MIN_CAPTION_CHARACTERS <= len(caption) <= MAX_CAPTION_CHARACTERS:
        return f"the description has {len(caption)} characters"
    copied = copied_text(caption, shown, prompt)
    if copied is not None:
        return f'"{copied}" is copied from the instruction or its examples'
    if not (is_english(prompt) and is_english(caption)):
        return None
    here = Kept(caption, read)
    lost = (missing_problem(thing, here) for thing in lasting_things(prompt))
    return told_problem(caption) or next(filter(None, lost), None) or _unrelated_problem(prompt, here)


def _unrelated_problem(prompt: str, here: Kept) -> str | None:
    """Returns a message if a text shares no name, colour or new state with a prompt, or `None`."""
    start = start_of(prompt)
    named = [name for thing in start.things for name in (*thing.names, *thing.colours)] + [*start.later]
    return "nothing of the prompt is there" if named and not any(name in here for name in named) else None


# -- motion -----------------------------------------------------------------------------------------------------------

# An image-to-video model reads the motion caption beside the picture (Factorized-Dreamer, arXiv 2408.10119: "image plus a
# concise caption of the motion"). The caption leaves out what the picture already shows.
MOTION_INSTRUCTION = """\
You write the motion caption of a video: one short sentence of what happens after its first frame. The user gives the prompt \
of the video. The first frame is given as a picture, so do not describe what it shows. Answer with one JSON object and \
nothing else: {"motion": "..."}
Rules:
1. Say what each thing that moves or changes does: how, where to, into what, in which order. Keep the movement of the camera.
2. Name a thing with the few words that tell it apart in the picture; where the text of the first frame is given, with its \
words. Leave out what stays as it is.
3. At most 25 words, in the language of the prompt, in the prompt's own words.
4. If nothing moves or changes, say that the picture stays still."""

MOTION_EXAMPLES = (
    ("A white paper lantern gradually turns deep red.", "The lantern gradually turns deep red."),
    ("A brown dog runs to the right across a snowy field.", "The dog runs to the right across the field."),
    (
        "A yellow taxi drives to the left while a black bicycle rolls to the right.",
        "The taxi drives to the left while the bicycle rolls to the right.",
    ),
    ("Three penguins jump into the sea one after another.", "The penguins jump into the sea one after another."),
    ("An old wooden boat on a calm lake under grey mountains.", "The picture of the boat stays still."),
    ("A ginger cat knocks a glass of water off a shelf.", "The cat knocks the glass off the shelf."),
)
# A motion caption of 25 words has about 150 characters.
MAX_MOTION_CHARACTERS = 300


def motion_question(prompt: str, caption: str) -> str:
    """Returns the user's turn for a prompt whose first frame has a caption."""
    return f"{prompt}\n(First frame: {caption})"


def write_motion(motion: str) -> str:
    """Formats a motion caption as the answer of a rewriter: `{"motion": "..."}`."""
    return json.dumps({"motion": motion}, ensure_ascii=False)


def read_motion(answer: str) -> str:
    """Returns the motion caption in an answer and ignores text around the JSON object.

    Raises:
        `ValueError`: the answer has no such object; the message says what is missing.
    """
    return find_in_answer(answer, lambda value: text_under(value, "motion"), 'text under "motion"')


def motion_problem(prompt: str, motion: str, read: Read = str, shown: Sequence[str] = ()) -> str | None:
    """Returns why a text is not a valid motion caption of a prompt, or `None`.

    A motion caption must be short, share a word with the prompt, and name the new states that the prompt asks for.

    Args:
        prompt (`str`): what should happen in the video.
        motion (`str`): what happens after the first frame.
        read (`Callable`, *optional*): as in `binding_problem`.
        shown (`Sequence[str]`, *optional*): texts that the caption must not copy.
    """
    if not 3 <= len(motion) <= MAX_MOTION_CHARACTERS:
        return f"the motion caption has {len(motion)} characters, not 3 to {MAX_MOTION_CHARACTERS}"
    copied = copied_text(motion, shown, prompt)
    if copied is not None:
        return f'"{copied}" is copied from the instruction or its examples'
    if not (is_english(prompt) and is_english(motion)):
        return None
    here = Kept(motion, read)
    lost = next(filter(None, (missing_problem(Thing((word,)), here) for word in start_of(prompt).later)), None)
    # "The picture stays still" needs no names.
    return lost if lost is not None or "still" in motion.lower() else _unrelated_problem(prompt, here)


MOTION = RewriterTask(
    "motion",
    "motion caption",
    MOTION_INSTRUCTION,
    MOTION_EXAMPLES,
    write_motion,
    read_motion,
    motion_problem,
    str,
    schema=object_schema({"motion": TEXT}),
)
TASK_NAMES = (FIRST_FRAME.name, "storyboard", MOTION.name)
