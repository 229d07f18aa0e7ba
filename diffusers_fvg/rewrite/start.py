"""Splits an English prompt, by its words alone, into what it says about the start of its video and about later.

The start is described by the first sentence that shows anything, up to the first word of change or time. No grammar is used: a
thing is what follows an article, a number or the beginning of a clause. Uncertain cases are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from .words import (
    ARTICLES,
    COLOURS,
    GENERIC,
    GROUPS,
    NO_COUNT,
    NOT_NAMES,
    PLACES,
    PREPOSITIONS,
    STOPS,
    is_number,
    is_plural,
    is_word,
    number_of,
    root,
    roots,
    word_set,
    words,
)


# Roots of verbs that give a thing another state: "turns yellow", "melts into", "is restored to".
_CHANGES = word_set(
    """turn becom chang transform transition morph evolv convert shift grow shrink fad melt dissolv ripen dark wilt yellow
    bloom carv construct demolish assembl collaps crumbl expand develop progress advanc refin weather tarnish swel wax wan
    diminish restor return harden freez thaw decay rot rust"""
)
# Those of them that need no preposition before the new state.
_BECOME = word_set("turn becom")
# Roots of verbs by which something comes into being, into view, or to its end.
_MAKES = word_set(
    """appear disappear vanish emerg reveal creat build mak draw paint sketch writ write bak form explod shater burst break"""
)
# Roots of nouns that are verbs, too, by which something covers a thing: "clouds over", "fogging up".
_COVERS = word_set("cloud fog mist frost steam ice")
_TIME = word_set("then after before until finally eventually later afterwards subsequently suddenly")
_MEANWHILE = word_set("while")
_ING_NAMES = word_set(
    """king ring wing string spring swing thing ceiling morning evening sibling painting building pudding duckling
    wedding railing clothing lightning"""
)
_LY_NAMES = word_set("family butterfly dragonfly lily jelly belly bully fly assembly")
_DIRECTIONS = word_set("left right up down top bottom side front back")
# Words before settings, parts and means, which a picture of the start may leave out.
_OPTIONAL = word_set("in with of at by for during to from through across per about into as when if onto")
_AUXILIARIES = word_set(
    "is are was were be being been has have had that which who it they he she begins starts to and"
)
_LONGEST_PHRASE = 7
# A prompt with more words counts as a story, of which the first frame shows only a part.
STORY_WORDS = 40


@dataclass(frozen=True)
class Thing:
    """A phrase of a text that names something.

    Args:
        names (`tuple[str, ...]`): words that may be the name. A verb that follows may be among them, as there is no grammar.
        colours (`tuple[str, ...]`): colours of the thing.
        number (`str`, *optional*): number of things, as digits.
        is_optional (`bool`): whether it is a setting, a part or a means, which a caption may leave out.
    """

    names: tuple[str, ...]
    colours: tuple[str, ...] = ()
    number: str | None = None
    is_optional: bool = False


@dataclass(frozen=True)
class Start:
    """What a prompt says about the start of its video.

    Args:
        text (`str`): the prompt's own words about the start.
        scene (`str`): the first sentence up to its first word of change or time, including things that are made later.
        words (`tuple[str, ...]`): words about the start in lower case, with "." in place of later events.
        old (`tuple[str, ...]`): words of states that something changes from.
        later (`tuple[str, ...]`): words of states that something changes into and that are not there from the start.
        happening (`frozenset[str]`): verbs of the first sentence, whose action is not finished at the start.
        covering (`frozenset[str]`): those of them that tell what covers a thing in the end ("clouding over").
        free (`frozenset[str]`): words of the first sentence that are names or adjectives and no events ("a growing tree").
        things (`tuple[Thing, ...]`): things that the start names.
        is_story (`bool`): whether the prompt has more than `STORY_WORDS` words.
    """

    text: str
    scene: str
    words: tuple[str, ...]
    old: tuple[str, ...]
    later: tuple[str, ...]
    happening: frozenset[str]
    covering: frozenset[str]
    free: frozenset[str]
    things: tuple[Thing, ...]
    is_story: bool


@lru_cache(maxsize=1024)
def start_of(prompt: str) -> Start:
    """Analyses a prompt and returns its start."""
    sentence = first_sentence(prompt)
    tokens = words(sentence)
    kept = [word for span in _start_spans(tokens) for word in (*(tokens[index] for index in span), ".")]
    changes = [index for index in range(len(tokens)) if _changes(tokens, index)]
    old = tuple(word for index in changes for word in _old_state(tokens, index))
    there = roots(word for word in (*kept, *old) if word not in STOPS)
    later = dict.fromkeys(word for index in changes for word in _new_state(tokens, index) if root(word) not in there)
    return Start(
        text=_start_text(sentence),
        scene=" ".join(tokens[: next((n for n, word in enumerate(tokens) if word in _TIME or n in changes), None)]),
        words=tuple(kept),
        old=old,
        later=tuple(later),
        happening=frozenset(word for index, word in enumerate(tokens) if _is_verb(word) and is_event(tokens, index)),
        covering=frozenset(word for index, word in enumerate(tokens) if _covers(tokens, index)),
        free=frozenset(word for index, word in enumerate(tokens) if not is_event(tokens, index)),
        things=tuple(things(kept)),
        is_story=len(prompt.split()) > STORY_WORDS,
    )


def lasting_things(prompt: str) -> list[Thing]:
    """Returns the things of a prompt that are certain to be there from the first frame to the last.

    A clause begins with "while" or ends with a full stop. If nothing is made or changed in a clause, all its things last. If
    only colours change, its things last without their colours. From other clauses nothing is returned.
    """
    lasting: list[Thing] = []
    clause: list[str] = []
    for word in (*words(prompt), "."):
        if word not in _MEANWHILE | {"."}:
            clause.append(word)
            continue
        ends = [index for index in range(len(clause)) if _ends_start(clause, index)]
        changes = [index for index in ends if _changes(clause, index)]
        states = [name for index in changes for name in (*_old_state(clause, index), *_new_state(clause, index))]
        if not ends:
            lasting += things(clause)
        elif states and COLOURS.issuperset(states) and not any(_is_final(word) for word in clause):
            lasting += (replace(thing, colours=()) for thing in things(clause[: ends[0]]) if thing.names)
        clause = []
    return lasting


def _is_final(word: str) -> bool:
    return word in _TIME or root(word) in _MAKES


def first_sentence(prompt: str) -> str:
    """Returns the first sentence or line that names a thing, and not only views and movements of the camera."""
    found = re.split(r"(?<=[.!?])[\"'\u201d]?\s+(?=[\"'\u201c(]?[A-Z0-9])|\n+", prompt.strip())
    for sentence in found:
        if any(thing.names for thing in things(words(sentence))):
            return sentence.strip()
    return found[0]


def is_event(tokens: Sequence[str], index: int) -> bool:
    """Returns whether a word of change is an event; after an article or a preposition it is a name ("a growing tree")."""
    previous = tokens[index - 1] if index else ""
    return previous not in ARTICLES - {"that"} and not (
        tokens[index].endswith("ing") and previous in PREPOSITIONS - {"by", "of"}
    )


def _is_verb(word: str) -> bool:
    return word not in STOPS and (word.endswith("ing") or (word.endswith("s") and not word.endswith("ss")))


def _covers(tokens: Sequence[str], index: int) -> bool:
    """Returns whether a verb tells that a thing gets covered, as "clouding over" or "fogging up"."""
    word, behind = tokens[index], [*tokens[index + 1 : index + 3], ".", "."]
    # "Clouds over a town" and "clouds up in the sky" have no verb.
    has_object = is_word(behind[1]) and behind[1] not in STOPS - ARTICLES
    is_verb = root(word) in _COVERS and is_event(tokens, index) and (word.endswith("ing") or behind[0] == "over")
    return is_verb and behind[0] in ("over", "up") and not has_object


def _ends_start(tokens: Sequence[str], index: int) -> bool:
    """Returns whether the words about later events begin at this word."""
    word = tokens[index]
    if word in _TIME:
        return True
    if root(word) in _MAKES or _changes(tokens, index):
        return is_event(tokens, index)
    # ", forming a leaf pattern" is a result.
    before = [token for token in tokens[max(0, index - 2) : index] if not token.endswith("ly")][-1:]
    return word.endswith("ing") and word not in _ING_NAMES and before == [","]


def _start_spans(tokens: Sequence[str]) -> list[list[int]]:
    """Returns the indices of the words about the start: up to the first later event, and again from "while" on."""
    spans: list[list[int]] = [[]]
    at_start = True
    for index, word in enumerate(tokens):
        begins_again = word in _MEANWHILE or (
            word == "as" and not {*tokens[index + 1 : index + 2]}.isdisjoint(("a", "an"))
        )
        if begins_again or _ends_start(tokens, index):
            at_start = begins_again
            spans.append([])
        elif at_start:
            spans[-1].append(index)
    return spans


def _start_text(sentence: str) -> str:
    """Returns a sentence's words about the start, with the old state of what changes."""
    found = list(re.finditer(r"\w+|[.,;:!?]", sentence))
    tokens = [match[0].lower() for match in found]
    parts = []
    for span in _start_spans(tokens):
        while span and (
            not is_word(tokens[span[-1]]) or tokens[span[-1]] in _AUXILIARIES or tokens[span[-1]].endswith("ly")
        ):
            span = span[:-1]
        if span:
            # A quotation mark may open the sentence.
            part = sentence[found[span[0]].start() if span[0] else 0 : found[span[-1]].end()]
            behind = [index for index in range(span[-1], min(span[-1] + 4, len(tokens))) if _changes(tokens, index)]
            old = [word for index in behind for word in _old_state(tokens, index)]
            parts.append(", ".join((part, *dict.fromkeys(old))))
    return re.sub(r"\b(slowly|gradually|suddenly) | (slowly|gradually|suddenly)\b", "", " and ".join(parts))


# -- things -----------------------------------------------------------------------------------------------------------


def things(tokens: Sequence[str]) -> Iterator[Thing]:
    """Yields the phrases that name something: those after an article, a number or a colour, and at the start of a clause."""
    index, clause = 0, True
    while index < len(tokens):
        word = tokens[index]
        if not is_word(word):
            clause, index = True, index + 1
        elif "camera" in tokens[index : index + 2]:
            # Skips the camera and the verb after it.
            index = tokens.index("camera", index) + 2
        elif word in ARTICLES or _counts(tokens, index) or word in COLOURS or (clause and word not in STOPS):
            length, thing = _thing(tokens, index)
            if thing.names or thing.colours or thing.number:
                yield thing
            index, clause = index + length, False
        else:
            index, clause = index + 1, clause and word in ("and", "as")


def _counts(tokens: Sequence[str], index: int) -> bool:
    return is_number(tokens[index]) and not {*tokens[index + 1 : index + 2]} & NO_COUNT


def _thing(tokens: Sequence[str], begin: int) -> tuple[int, Thing]:
    """Returns the length in words of the phrase at index `begin`, and the phrase."""
    names: list[str] = []
    colours: list[str] = []
    number = None
    length = 0
    for length, word in enumerate(tokens[begin : begin + _LONGEST_PHRASE]):
        following = {*tokens[begin + length + 1 : begin + length + 2]}
        if word in PLACES:
            length += 1
            break
        if word in NOT_NAMES or (word in ARTICLES and length == 0):
            continue
        if word in COLOURS:
            colours.append(word)
        elif word in ("and", ",") and colours and not names and following & COLOURS:
            continue
        elif is_number(word) and number is None and not names and _counts(tokens, begin + length):
            number = number_of(word)
        elif word in GROUPS and following == {"of"}:
            return length + 2, Thing(())
        elif word.endswith("ly") and word not in _LY_NAMES and not names:
            continue
        elif not word.isalpha() or word in STOPS or is_number(word) or _ends_phrase(word, bool(names), tokens[begin]):
            break
        else:
            names.append(word)
            if number is not None and is_plural(word):
                length += 1
                break
    else:
        length += 1
    return max(1, length), Thing(tuple(names), tuple(colours), number, _is_optional(tokens, begin))


def _is_optional(tokens: Sequence[str], begin: int) -> bool:
    """Returns whether the phrase at index `begin` is a setting, a part or a means, or a word of style after a comma."""
    before = tokens[begin - 1] if begin else "."
    if before == ",":
        return tokens[begin] not in ARTICLES | COLOURS and not is_number(tokens[begin])
    # In "a photo of a dog" the dog is required.
    return before in _OPTIONAL and {*tokens[max(0, begin - 2) : begin - 1]}.isdisjoint(NOT_NAMES | GROUPS)


def _ends_phrase(word: str, named: bool, first: str) -> bool:
    """Returns whether a word is probably a verb or an adverb, and not a further name."""
    if word.endswith("ing") and word not in _ING_NAMES or word.endswith("ly") and word not in _LY_NAMES:
        return named
    return first in ("a", "an") and named and is_plural(word)


# -- changes ----------------------------------------------------------------------------------------------------------

_NEAR = word_set("next close parallel due up")
# After these words "from ... to" is a range and no change.
_SPANS = word_set("ranging ranges varying varies everything all")
# Words that end the phrase of a new state.
_AFTER_STATE = PREPOSITIONS - {"of", "to", "into"} | word_set("as while when where then next until")


def _changes(tokens: Sequence[str], index: int) -> bool:
    """Returns whether a change begins at a word: a verb of change, or "from" before an old and a new state."""
    word = tokens[index]
    if root(word) in _CHANGES and word not in COLOURS:
        return is_event(tokens, index)
    return word == "from" and {*tokens[index - 1 : index]}.isdisjoint(_SPANS) and bool(_old_state(tokens, index))


def _states(tokens: Sequence[str], index: int) -> tuple[list[str], list[str]]:
    """Returns the words of the old state, between "from" and "to", and those of the new state, after "to"."""
    behind = list(tokens[index : index + 16])
    stop = next((place for place, word in enumerate(behind) if word in ".;:!?"), len(behind))
    if not (behind := behind[:stop]):
        return [], []
    marks = [place for place, word in enumerate(behind) if word in ("to", "into") and behind[place - 1] not in _NEAR]
    if "from" in behind[:6]:
        begin = behind.index("from")
        marks = [place for place in marks if place > begin]
        if not marks or {*behind[begin : marks[0] + 3]} & _DIRECTIONS:
            return [], []
        return behind[begin + 1 : marks[0]], behind[marks[0] + 1 :]
    verb = root(behind[0])
    if (
        marks
        and marks[0] < 6
        and not (verb == "turn" and behind[marks[0]] == "to" and not {*behind[marks[0] + 1 : marks[0] + 2]} & COLOURS)
    ):
        return [], behind[marks[0] + 1 :]
    if verb not in _BECOME:
        # "fades pale", "growing moldy"
        return [], [word for word in behind[1:2] if word in COLOURS or word.endswith("y")]
    # "Turns the page" is no change, but "turns the water blue" is one.
    takes_object = verb == "turn" and bool({*behind[1:2]} & (ARTICLES - {"a", "an"} | PREPOSITIONS))
    return [], [word for word in behind[1:] if word in COLOURS] if takes_object else behind[1:]


def _old_state(tokens: Sequence[str], index: int) -> list[str]:
    return [word for word in _states(tokens, index)[0] if is_word(word) and word not in STOPS]


def _new_state(tokens: Sequence[str], index: int) -> Iterator[str]:
    for place, word in enumerate(_states(tokens, index)[1]):
        if place and word in _AFTER_STATE:
            return
        if is_word(word) and word not in STOPS | GENERIC:
            yield word
            if word.endswith("er"):
                yield word[:-2]
