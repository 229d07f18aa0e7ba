"""Checks that a caption keeps things, counts, colours, places and negations of a prompt's start, and shows nothing of later.

Each check reports a contradiction or a loss only if the words prove it. Doubtful cases are accepted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator

from .start import Start, Thing, is_event, start_of, things
from .words import (
    ARTICLES,
    COLOURS,
    GENERIC,
    NOT_NAMES,
    STOPS,
    is_english,
    is_word,
    root,
    roots,
    word_set,
    words,
)


Read = Callable[[str], str]


def binding_problem(prompt: str, caption: str, read: Read = str) -> str | None:
    """Returns how a caption fails a prompt: it loses or contradicts a part of the start, or shows a later event.

    Args:
        prompt (`str`): what should happen in the video.
        caption (`str`): description of its first frame.
        read (`Callable`, *optional*): maps a word to the word that the language model sees. Some tokenizers map words to
            their own vocabulary ("ball" to "circle"), and the model answers with these. The caption may use either word.

    Returns:
        `str` or `None`: the first problem found; `None` for none, or if a text is not English.
    """
    if not (is_english(prompt) and is_english(caption)):
        return None
    start = start_of(prompt)
    return (
        told_problem(caption, start.free)
        or _later_problem(start, caption)
        or _negation_problem(prompt, caption)
        or swapped_problem(prompt, caption)
        or _place_problem(start, caption)
        or _loss_problem(start, Kept(caption, read))
    )


class Kept:
    """Word roots of a caption, for looking up the words of a prompt."""

    def __init__(self, caption: str, read: Read = str):
        self.read = read
        self.counts = Counter(root(word) for word in words(caption) if is_word(word))

    def __contains__(self, word: str) -> bool:
        if root(word) in self.counts:
            return True
        # Split at blanks and not by `words`: a tokenizer's `<unk>` would otherwise count as the word "unk".
        as_read = [root(part) for part in self.read(word).lower().split()]
        return bool(as_read) and all(part in self.counts for part in as_read)

    def holds(self, number: str, names: tuple[str, ...]) -> bool:
        """Returns whether the caption has that number of things; it may list them ("a cat here and a cat there")."""
        if number in self.counts or number == "1" or (number == "2" and not _PAIRS.isdisjoint(self.counts)):
            return True
        return any(
            int(number) in (self.counts[root(name)], self.counts[root(self.read(name).lower())]) for name in names
        )


_PAIRS = roots(("pair", "couple", "both", "twin"))

# -- later ------------------------------------------------------------------------------------------------------------

# Words of change or time, which do not belong in the caption of a still picture.
_TELLING = word_set(
    """turns becomes becoming changes transforms transforming transitions morphs morphing then gradually slowly suddenly
    eventually finally afterwards later subsequently disappears vanishes"""
)
# Verbs whose adjective is the same word.
_STATES = word_set("dry empty open clear dull cool warm")
# Words before the noun that names what covers a thing.
_COVERED = word_set("covered full filled hidden obscured veiled shrouded wrapped blanketed coated layer")
_PARTICIPLES = word_set("frozen broken burnt grown torn worn lit written drawn built sewn bent")


def told_problem(text: str, free: frozenset[str] = frozenset()) -> str | None:
    """Returns a message about a word of change or time in a text, or `None`.

    Words in `free` are allowed: the prompt uses them as names or adjectives.
    """
    tokens = words(text)
    for index, word in enumerate(tokens):
        tells = word in _TELLING or (
            root(word) in ("turn", "melt", "chang") and tokens[index + 1 : index + 2] == ["into"]
        )
        if tells and word not in free and is_event(tokens, index):
            return f'"{word}" tells of change or time'
    return None


def _later_problem(start: Start, caption: str) -> str | None:
    said = {*start.words, *start.old} - start.covering
    covers = roots(start.covering)
    tokens = words(caption)
    for index, word in enumerate(tokens):
        if word in said or not is_word(word) or tokens[index - 1 : index] == ["non"]:
            continue
        name = root(word)
        # "Spherical" counts as a form of "sphere".
        comes = any(name == later or (len(later) > 4 and name.startswith(later)) for later in map(root, start.later))
        before = {*tokens[max(0, index - 5) : index]}
        covered = name in covers and not _COVERED.isdisjoint(before) and _NEGATIONS.isdisjoint(before)
        if comes or covered or any(root(verb) == name and _is_done(verb, word) for verb in start.happening):
            return f'"{word}" comes only later'
    return None


def _is_done(verb: str, word: str) -> bool:
    """Returns whether a word is the state that a verb leads to, as "melted" for "melting"."""
    # "Beds" and "skies" are plurals, not verbs.
    plurals = {word, f"{word}s", f"{word}es", f"{word[:-1]}ies"}
    return word in _PARTICIPLES | _STATES or (word.endswith(("ed", "y")) and verb not in plurals)


# -- negations --------------------------------------------------------------------------------------------------------

_NEGATIONS = word_set("without no not never")


def _negated(tokens: list[str]) -> set[str]:
    """Returns the roots of the words that a text negates."""
    found = set()
    for index, word in enumerate(tokens):
        if word in _NEGATIONS:
            behind = [token for token in tokens[index + 1 : index + 4] if token not in ARTICLES | {"any"}]
            if behind and is_word(behind[0]) and behind[0] not in STOPS and not behind[0].endswith("ing"):
                found.add(root(behind[0]))
    return found


def _negation_problem(prompt: str, caption: str) -> str | None:
    # Quoted and upper-case text is left out: a sign may say "NO PARKING".
    spoken = re.sub(r"\"[^\"]*\"|'[^']*'|\u201c[^\u201d]*\u201d|\b[A-Z]{2,}\b", " ", prompt)
    absent = _negated(list(start_of(spoken).words)) if spoken.strip() else set()
    tokens = words(caption)
    there = roots(tokens) - _negated(tokens)
    for word in tokens:
        if is_word(word) and root(word) in absent & there:
            return f'the prompt says that there is no "{word}"'
    return None


# -- counts and colours -----------------------------------------------------------------------------------------------


def _bound(text: str) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Returns the colours and the numbers of each name in a text, all as roots."""
    colours: dict[str, set[str]] = {}
    numbers: dict[str, set[str]] = {}
    for thing in things(words(text)):
        for name in thing.names:
            if thing.colours:
                colours.setdefault(root(name), set()).update(map(root, thing.colours))
            if thing.number:
                numbers.setdefault(root(name), set()).add(thing.number)
    return colours, numbers


def _spoken(value: str, text: str) -> str:
    """Returns the word of the text that has the root `value`; a number is returned unchanged."""
    return value if value.isdigit() else next((word for word in words(text) if root(word) == value), value)


def swapped_problem(prompt: str, caption: str) -> str | None:
    """Returns a message if a caption gives a thing another colour or number than the prompt does, or `None`."""
    for mine, others in zip(_bound(caption), _bound(prompt)):
        everywhere = {value for values in others.values() for value in values}
        for name, values in mine.items():
            wrong = values - others.get(name, values)
            # A prompt that also says "one", as in "five leaves, one of them apart", settles no number.
            miscounted = any(value.isdigit() and value != "1" for value in wrong) and "1" not in others[name]
            if wrong & everywhere or miscounted:
                word = _spoken(name, prompt)
                said, right = _spoken(sorted(wrong)[0], caption), _spoken(sorted(others[name])[0], prompt)
                return f'"{said} {word}" contradicts "{right} {word}" of the prompt'
    return None


# -- places -----------------------------------------------------------------------------------------------------------

_PLACES = (
    (r"(?:on|at|to) (?:the|its|his|her) (?:far )?left(?:-hand)?(?: side)? of|left of", "left"),
    (r"(?:on|at|to) (?:the|its|his|her) (?:far )?right(?:-hand)?(?: side)? of|right of", "right"),
    (r"in (?:the )?front of", "front"),
    (r"behind|at the back of", "behind"),
    (r"above|over|on top of|atop", "above"),
    (r"below|under|underneath|beneath", "below"),
    (r"on(?! (?:the|its|his|her) (?:far )?(?:left|right|top)| top)", "on"),
)
_OPPOSITE = {
    "left": "right",
    "right": "left",
    "front": "behind",
    "behind": "front",
    "above": "below",
    "below": "above",
    "on": "below",
}


def _places(text: str) -> Iterator[tuple[set[str], str, set[str]]]:
    """Yields each relation in a text: roots of a thing, the place word, roots of the landmark that the place refers to."""
    for clause in re.split(r"[.;:!?]|, (?=and |then |while )|\bwhile\b|\bthen\b", text.lower()):
        for pattern, kind in _PLACES:
            for match in re.finditer(rf"\b(?:{pattern})\b", clause):
                subject = next(
                    (roots(thing.names) for thing in things(words(clause[: match.start()])) if thing.names), set()
                )
                landmark = _landmark(words(clause[match.end() :]))
                if subject and landmark:
                    yield subject, kind, landmark


def _landmark(tokens: list[str]) -> set[str]:
    """Returns the roots of the thing that a text begins with."""
    if not tokens or not is_word(tokens[0]) or tokens[0] in STOPS - ARTICLES:
        return set()
    thing = next(things(tokens), None)
    return set() if thing is None else roots(thing.names)


def _place_problem(start: Start, caption: str) -> str | None:
    told = list(_places(start.scene))
    shown = list(_places(caption)) if told else []
    for subject, kind, landmark in told:
        for here, found, there in shown:
            is_same = bool(here & subject and there & landmark and not there & subject)
            is_turned = bool(here & landmark and there & subject and not there & landmark)
            if is_same and found == _OPPOSITE[kind]:
                return f'"{found}" contradicts "{kind}" of the prompt'
            if is_turned and found == kind:
                return f'"{kind}" of the prompt is turned round'
    return None


# -- loss -------------------------------------------------------------------------------------------------------------


def missing_problem(thing: Thing, here: Kept) -> str | None:
    """Returns a message if a caption lacks a thing's name, one of its colours or its number, or `None`."""
    if thing.names and not any(name in here for name in thing.names):
        return _missing(*thing.names)
    for colour in thing.colours:
        if colour not in here:
            return _missing(colour)
    if thing.number and not here.holds(thing.number, thing.names):
        return _missing(thing.number, *thing.names)
    return None


def _missing(*lost: str) -> str:
    return f'"{" ".join(lost)}" of the prompt is missing'


def _loss_problem(start: Start, here: Kept) -> str | None:
    """Returns a message about a part of the start that a caption lacks, or `None`."""
    needed = [thing for thing in start.things if thing.names and not thing.is_optional]
    # "The landscape transforms from a desert": naming the desert is enough.
    lost = [thing for thing in needed if not any(name in here for name in (*thing.names, *start.old))]
    spared = len(needed) // 2 if len(needed) > 2 else 0
    spared = max(spared, len(needed) - 1) if start.is_story else spared
    if len(lost) > spared:
        return _missing(*lost[0].names)
    kept = [thing for thing in start.things if not thing.names or any(name in here for name in thing.names)]
    problem = next(filter(None, (missing_problem(thing, here) for thing in kept)), None)
    if problem is not None:
        return problem
    old = [colour for colour in start.old if colour in COLOURS and colour not in here]
    if old:
        return _missing(old[0])
    # "Person" does not distinguish one prompt from another, so the caption must keep another word.
    telling = [word for word in start.words if is_word(word) and word not in STOPS | NOT_NAMES | GENERIC]
    return _missing(*telling[:3]) if telling and not any(word in here for word in (*telling, *start.old)) else None
