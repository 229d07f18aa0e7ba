"""The text side of stage 1: what the language model is told, and what its answer must look like. Pure functions on strings.

This is about captions of first frames; `tasks.py` has the other questions. The checks know English. In a prompt of
another language they see digits only, so an answer is then judged by its form.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar


Value = TypeVar("Value")

# Why the instruction says what it says:
# * Only the start. A text-to-image model draws everything it is told, so a word about a later event puts the end of the
#   video into its first frame, and the video model has nothing left to do. This is where prompt upsampling fails: it lowers
#   the dynamic-attribute scores of all four video models that the FVG paper (arXiv 2512.16371) measures.
# * The prompt's own words. The video model reads the prompt and must find in the anchor what the prompt speaks of; a
#   lost object, another colour or another count cannot be mended after the picture is drawn.
# * The cause, not the effect. "A chicken tasting the sauce" becomes a roast chicken if nobody says that it is alive.
# * Where a movement begins. Something that moves to the left and starts at the left edge leaves the frame at once.
# * JSON. Chat models like to comment; what stands around the object is thrown away.
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

# Pairs of a video prompt and its first frame, shown to the model as earlier turns of the chat: change of colour, motion,
# two objects with opposite ways, a count, something that is made, an action with a consequence.
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

# Characters of a caption. Below, there is no picture in it; above, it is longer than the 512 tokens that the text encoders
# of current text-to-image models read.
MIN_CAPTION_CHARACTERS, MAX_CAPTION_CHARACTERS = 3, 1200


def _word_set(words: str) -> frozenset[str]:
    return frozenset(words.split())


COLOURS = _word_set(
    """red orange yellow green blue purple violet magenta cyan pink brown black white grey gray gold golden silver beige
    turquoise teal crimson scarlet"""
)
_NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
NUMBERS = {word: str(value) for value, word in enumerate(_NUMBERS, start=2)}
_SAME_WORD = {
    **{"gray": "grey", "golden": "gold", "men": "man", "women": "woman", "people": "person", "children": "child"},
    **{"feet": "foot", "teeth": "tooth", "mice": "mouse", "geese": "goose"},
}

# leaf and leaves, fly and flies, potato and potatoes, box and boxes, bench and benches, glass and glasses; the -s is off.
_COMMON_ENDINGS = (("ve", ""), ("fe", ""), ("f", ""), ("ie", "y"), ("oe", "o"), ("xe", "x"), ("he", "h"), ("se", "s"))

# A number before one of these counts no objects.
_NO_COUNT = _word_set("second seconds minute minutes hour hours day days year years times fps frames")

# A prompt tells of the first frame up to the first of these words; "while" begins something that is there from the start.
_CHANGE_VERBS = _word_set(
    """turn turns turned turning become becomes became becoming change changes changed changing transform transforms
    transformed transforming morph morphs morphing evolve evolves evolving convert converts converting grow grows growing
    shrink shrinks shrinking fade fades fading melt melts melting dissolve dissolves dissolving"""
)
_RESULT_VERBS = _word_set(
    """appear appears appearing disappear disappears disappearing vanish vanishes vanishing emerge emerges emerging reveal
    reveals revealing create creates creating build builds building make makes making draw draws drawing paint paints
    painting sketch sketches sketching write writes writing bake bakes baking form forms forming assemble assembles
    assembling explode explodes exploding shatter shatters shattering burst bursts bursting break breaks breaking"""
)
_TIME_WORDS = _word_set("then after before until finally eventually later afterwards subsequently")
_END_OF_START = _CHANGE_VERBS | _RESULT_VERBS | _TIME_WORDS

# Words that tell of change or time, which a caption of a still picture has no use for.
LATER_WORDS = _word_set(
    """turn turns turning becomes becoming changes changing transforms transforming morphs morphing moves moving begins starts then
    gradually slowly suddenly eventually finally afterwards later subsequently while until grows growing shrinks shrinking
    disappears disappearing vanishes vanishing fades fading melts melting dissolves explodes shatters will"""
)

_ARTICLES = _word_set("a an the his her its their my our your some this that these those both each every")
_PHRASE_ENDS = _word_set(
    """of in on at to from into onto by with without over under above below behind beside between near next through across
    along around against towards toward off out up down and or but as while when where who which that is are was were be
    been has have had can does do it he she they them him one ones not so for"""
)
# Adjectives and names of views and places that a good caption may replace.
_NOT_NAMES = _word_set(
    """small big large tiny huge giant little tall short long old young new bright dark light deep pale shiny nice
    beautiful same other another single plain left right top bottom middle centre center side edge corner front back upper
    lower background foreground distance direction scene camera video clip shot view frame image picture timelapse time
    lapse moment way motion close upwards downwards"""
)
_GROUPS = _word_set("group pair couple lot bit kind series set row bunch herd flock crowd pile number")
_ING_NAMES = _word_set(
    """king ring wing string spring swing thing ceiling morning evening sibling painting building pudding duckling
    wedding railing clothing lightning"""
)
_LY_NAMES = _word_set("family butterfly dragonfly lily jelly belly bully fly assembly")
_LONGEST_PHRASE = 5
# May stand between a verb of change and its colours, besides adverbs and adjectives of size.
_BEFORE_COLOUR = _word_set("from to a an the it its colour color")


def format_answer(caption: str) -> str:
    """The answer that a rewriter is asked for, and that a special-purpose one is trained to give."""
    return json.dumps({"first_frame": caption}, ensure_ascii=False)


def parse_answer(answer: str) -> str:
    """Reads the caption out of an answer: the first JSON object with a text under `first_frame`, whatever stands around it.

    Raises:
        `ValueError`: the answer holds no such object; the message says what it lacks.
    """
    return find_in_answer(answer, lambda value: text_under(value, "first_frame"), 'text under "first_frame"')


def text_under(value: dict, key: str) -> str | None:
    """The text of a JSON object under a key, in one line."""
    return " ".join(value[key].split()) if isinstance(value.get(key), str) else None


def find_in_answer(answer: str, read: Callable[[dict], Value | None], wanted: str) -> Value:
    """What `read` makes of the first JSON object in an answer of which it makes anything.

    Raises:
        `ValueError`: there is no such object; the message says that `wanted` is lacking.
    """
    # Reasoning models think aloud first, sometimes in JSON.
    answer = re.sub(r"<think>.*?</think>", "", answer, flags=re.DOTALL)
    decoder = json.JSONDecoder(strict=False)
    found = False
    for match in re.finditer(r"\{", answer):
        try:
            value, _ = decoder.raw_decode(answer, match.start())
        except json.JSONDecodeError:
            continue
        found = True
        made = read(value)
        if made is not None:
            return made
    raise ValueError(f"the JSON object has no {wanted}" if found else "it holds no JSON object")


def caption_problem(prompt: str, caption: str, read: Callable[[str], str] = str) -> str | None:
    """Says why a caption is no first frame of a prompt, or returns `None` where nothing speaks against it.

    What the prompt names before its first word of change or time must be there: each colour, each number (or as many things one
    by one), and each thing that has an article or a number ("a wooden table": one of its words). What it changes into must not
    be, nor words of change and time. Verbs, places and directions are not compared, since a good caption has others.

    Args:
        prompt (`str`): what should happen in the video.
        caption (`str`): description of its first frame.
        read (`Callable`, *optional*): how the language model reads a word: a tokenizer that maps words to its own ("ball" to
            "circle") makes the model answer in those. A word may be kept as written or as read.
    """
    problem = picture_problem(caption)
    if problem is not None:
        return problem
    missing = missing_problem(start_requirements(prompt), caption, read)
    if missing is not None:
        return missing
    here = {_stem(word) for word in _words(caption)}
    for word in result_words(prompt):
        if _stem(word) in here:
            return f'"{word}" comes only later'
    return None


def picture_problem(caption: str) -> str | None:
    """Says why a caption is none of a still picture, whatever it shows."""
    if not MIN_CAPTION_CHARACTERS <= len(caption) <= MAX_CAPTION_CHARACTERS:
        limits = f"{MIN_CAPTION_CHARACTERS} to {MAX_CAPTION_CHARACTERS}"
        return f"the description has {len(caption)} characters, not {limits}"
    told = [word for word in _words(caption) if word in LATER_WORDS]
    return f'"{told[0]}" tells of change or time' if told else None


def missing_problem(required: Iterable[tuple[str, ...]], text: str, read: Callable[[str], str]) -> str | None:
    """Says which of the tuples of words, of which one is enough, a text has none of. "two cats" is there if "cat" is twice."""
    here = Counter(_stem(word) for word in _words(text))
    for alternatives in required:
        if not any(_is_kept(word, here, read) for word in alternatives):
            named = " ".join(word for word in alternatives if " " not in word)
            return f'"{named}" of the prompt is missing'
    return None


def result_words(prompt: str) -> list[str]:
    """The colours and things that a prompt changes something into, and that it does not have from the start."""
    words = _words(prompt)
    at_start = {_stem(word) for word in _start_words(words)}
    at_start |= {_stem(word) for word, is_old in _changes(words) if is_old}
    return [word for word, is_old in _changes(words) if not is_old and _stem(word) not in at_start]


def start_requirements(prompt: str) -> list[tuple[str, ...]]:
    """What a prompt names at its start, as tuples of words of which one is enough."""
    words = _words(prompt)
    return list(_required(_start_words(words), words))


def lasting_requirements(prompt: str) -> list[tuple[str, ...]]:
    """What a prompt names that is there from the first frame to the last, as tuples of words of which one is enough.

    Of a clause (they begin with "while" and end with a full stop) without a word of change, result or time that is
    everything; of one in which nothing but colours change, all but the colours; of any other nothing is certain.
    """
    lasting: list[tuple[str, ...]] = []
    clause: list[str] = []
    for word in (*_words(prompt), "."):
        if word not in ("while", "."):
            clause.append(word)
            continue
        start = _start_words(clause)
        changes = [name for name, _ in _changes(clause)]
        # A full stop stands where such a word was.
        if "." not in start:
            lasting += _required(clause, clause)
        elif changes and COLOURS.issuperset(changes) and not {*clause} & (_RESULT_VERBS | _TIME_WORDS):
            lasting += (names for names in _required(start, []) if not COLOURS.issuperset(names))
        clause = []
    return lasting


def _words(text: str) -> list[str]:
    """Lower-case words and marks of punctuation; "cat's" counts as "cat", "red-hot" as two words."""
    return re.findall(r"\w+|[.,;:!?]", re.sub(r"['\u2019]s\b", "", text.lower()))


def _is_plural(word: str) -> bool:
    return len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is"))


def _stem(word: str) -> str:
    """What singular and plural of a word have in common ("leaf" and "leaves": "lea"); colours and numbers in one spelling."""
    word = _SAME_WORD.get(word, NUMBERS.get(word, word))
    word = word[:-1] if _is_plural(word) else word
    for ending, common in _COMMON_ENDINGS:
        if word.endswith(ending) and len(word) > 3:
            return word.removesuffix(ending) + common
    return word


def _is_kept(word: str, here: Counter[str], read: Callable[[str], str]) -> bool:
    number, _, name = word.partition(" ")
    if name:
        # A number and what it counts: "two cats" may be listed, a cat here and a cat there.
        return int(_stem(number)) in (here[_stem(name)], here[_stem(read(name).lower())])
    # Only letters and digits make a word: a tokenizer's `<unk>` would otherwise be one.
    as_read = [_stem(part) for part in read(word).lower().split()]
    return _stem(word) in here or (bool(as_read) and all(part in here for part in as_read))


def _start_words(words: list[str]) -> list[str]:
    """The words about the start: up to the first word of change or time, and again from "while" on."""
    kept, at_start = [], True
    for previous, word in zip(["", *words], words):
        # "a building", "a growing tree": behind an article such a word tells of no event.
        if word == "while" or (word in _END_OF_START and previous not in _ARTICLES):
            at_start = word == "while"
            kept.append(".")
        elif at_start:
            kept.append(word)
    return kept


def _required(start: list[str], words: list[str]) -> Iterator[tuple[str, ...]]:
    """What a caption must keep, as tuples of words of which one is enough."""
    for index, word in enumerate(start):
        is_count = _is_number(word) and not {*start[index + 1 : index + 2]} & _NO_COUNT
        counts_or_points = word in _ARTICLES or is_count
        names = _names(start, index + 1, word in ("a", "an"), is_count) if counts_or_points else ()
        if word in COLOURS:
            yield (word,)
        if is_count:
            yield (word, *(f"{word} {name}" for name in names[-2:]))
        if names:
            yield names[-2:]
    # "turns from red to blue": the old colour stands behind the verb.
    for word, is_old in _changes(words):
        if is_old:
            yield (word,)


def _is_number(word: str) -> bool:
    return word in NUMBERS or word in NUMBERS.values()


def _names(words: list[str], begin: int, singular: bool, counted: bool) -> tuple[str, ...]:
    """The words of a noun phrase that may be its noun, its adjectives of size and colour left out.

    Without a dictionary the verb behind the noun is not always told from it ("five fish swim"): `_required` takes the last
    two. After "a" a word in -s is a verb, after a number it is the noun.
    """
    names: list[str] = []
    for index, word in enumerate(words[begin : begin + _LONGEST_PHRASE]):
        is_participle = word.endswith("ing") and word not in _ING_NAMES
        if is_participle and index == 0:
            continue
        if word in _ARTICLES or word in _PHRASE_ENDS or word in NUMBERS or not word.isalpha() or is_participle:
            break
        if word.endswith("ly") and word not in _LY_NAMES:
            break
        if singular and _is_plural(word) and names:
            break
        if word in _GROUPS:
            following = words[begin + index + 1 : begin + index + 2]
            return _names(words, begin + index + 2, False, False) if following == ["of"] else ()
        if word not in _NOT_NAMES and word not in COLOURS:
            names.append(word)
            if counted and _is_plural(word):
                break
    return tuple(names)


def _changes(words: list[str]) -> Iterator[tuple[str, bool]]:
    """Colours and things behind a verb of change, with whether something changes from them or into them."""
    for verb in (index for index, word in enumerate(words) if word in _CHANGE_VERBS):
        is_old = False
        for index in range(verb + 1, len(words)):
            word = words[index]
            if word in ("from", "to", "into"):
                is_old = word == "from"
            if word == "into":
                article = index + 1 < len(words) and words[index + 1] in _ARTICLES
                yield from ((name, False) for name in _names(words, index + 1 + article, True, False)[-1:])
            elif word in COLOURS:
                yield word, is_old
            elif word in ("and", ",") and {words[index - 1], *words[index + 1 : index + 2]} <= COLOURS:
                # "yellow and blue" goes on with the colours, "yellow and a blue bird" with another thing.
                continue
            elif not (word in _BEFORE_COLOUR or word in _NOT_NAMES or word.endswith("ly")):
                break
