"""The questions of stage 1: the first frame, the storyboard, the motion. Each is data; `rewriter.py` asks them all alike."""

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
        name (`str`): under which a rewriter's config may hold another instruction.
        subject (`str`): what is written, for the warning that it was not.
        instruction (`str`): the system turn.
        examples (`tuple`): pairs of a prompt and its answer, earlier turns of the chat.
        write (`Callable`): an example's answer as text.
        read (`Callable`): finds the answer in what a model says or raises `ValueError` with what it lacks.
        problem (`Callable`): `problem(prompt, answer, read_word, shown)`: why the answer is wrong for the prompt, or `None`;
            `shown` are the texts that the model was shown.
        fallback (`Callable`): from a prompt to what stands in for an answer.
        result (`Callable`): what the caller gets of an answer.
        first_frame (`Callable`, *optional*): the caption of the first frame in an answer, which a judge is asked about.
        captions (`int`): number of captions in the longest answer.
        extra_tokens (`int`): tokens of the longest answer beside its captions.
        schema (`dict`, *optional*): JSON schema of the answer, for runtimes that enforce it.
        simpler (`RewriterTask`, *optional*): asked in its place where an answer had not the form.
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
# The same with a plan before the caption, which small models do not manage.
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

# Why the instruction says what it says, beside the reasons for that of the first frame:
# * Fewer moments than allowed. Each picture becomes a fixed frame of the video. One that the prompt does not ask for stops a
#   motion or invents an end, where the video model would have gone on from the start.
# * Complete captions in equal words. Every picture is drawn from its own caption, and must show the same scene.
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
    """The question for the first frame and up to `num_moments - 1` later moments."""
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
    """The answer that a rewriter is asked for: `{"moments": [{"time": 0.0, "frame": "..."}, ...]}`."""
    listed = [{"time": moment.time, "frame": moment.caption} for moment in moments]
    return json.dumps({"moments": listed}, ensure_ascii=False)


def read_moments(answer: str) -> list[Moment]:
    """Reads the moments out of an answer, whatever stands around the JSON object.

    Raises:
        `ValueError`: the answer holds no such object; the message says what it lacks.
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
    """Says why moments are no storyboard of a prompt, or returns `None` where nothing speaks against it.

    The first moment must be a first frame by the rules of `caption_problem`. Each later one must be of a still picture, name
    what the prompt has from beginning to end, and share something with it in any case; what the prompt changes things into
    must be in one of them. Times must begin with 0 and lie at least half as far apart as evenly spread ones would.

    Args:
        prompt (`str`): what should happen in the video.
        moments (`list[Moment]`): in the order of the answer.
        read (`Callable`, *optional*): as in `binding_problem`.
        shown (`Sequence[str]`, *optional*): texts of which nothing may be copied.
        num_moments (`int`): the most that were asked for.
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
    """Says so if a text has nothing of what a prompt names."""
    start = start_of(prompt)
    named = [name for thing in start.things for name in (*thing.names, *thing.colours)] + [*start.later]
    return "nothing of the prompt is there" if named and not any(name in here for name in named) else None


# -- motion -----------------------------------------------------------------------------------------------------------

# What an image-to-video system reads beside the picture (Factorized-Dreamer, arXiv 2408.10119: "image plus a concise caption
# of the motion"). What the picture shows already would only take words from what it cannot show.
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
# A motion caption of 25 words has some 150 characters.
MAX_MOTION_CHARACTERS = 300


def motion_question(prompt: str, caption: str) -> str:
    """The user's turn for a prompt whose first frame is written."""
    return f"{prompt}\n(First frame: {caption})"


def write_motion(motion: str) -> str:
    """The answer that a rewriter is asked for: `{"motion": "..."}`."""
    return json.dumps({"motion": motion}, ensure_ascii=False)


def read_motion(answer: str) -> str:
    """Reads the motion caption out of an answer, whatever stands around the JSON object.

    Raises:
        `ValueError`: the answer holds no such object; the message says what it lacks.
    """
    return find_in_answer(answer, lambda value: text_under(value, "motion"), 'text under "motion"')


def motion_problem(prompt: str, motion: str, read: Read = str, shown: Sequence[str] = ()) -> str | None:
    """Says why a text is no motion caption of a prompt, or returns `None` where nothing speaks against it.

    It must be short, speak of something that the prompt has, and name what the prompt changes things into.

    Args:
        prompt (`str`): what should happen in the video.
        motion (`str`): what happens after the first frame.
        read (`Callable`, *optional*): as in `binding_problem`.
        shown (`Sequence[str]`, *optional*): texts of which nothing may be copied.
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
    # A picture that stays still needs no names.
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
