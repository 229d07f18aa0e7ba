"""Normalizes words for the checks of captions: lower case, without endings, numbers as digits.

The word lists are English and short on purpose: closed classes (articles, prepositions, numbers, colours), and the few open
words with which prompts describe their pictures and their camera. A word in no list counts as the possible name of a thing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable


def word_set(words: str) -> frozenset[str]:
    return frozenset(words.split())


COLOURS = word_set(
    """red orange yellow green blue purple violet magenta cyan pink brown black white grey gray gold golden silver beige
    turquoise teal crimson scarlet"""
)
_NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()
NUMBERS = {word: str(value) for value, word in enumerate(_NUMBERS, start=1)} | {"twenty": "20"}
# A number before one of these counts no objects.
NO_COUNT = word_set(
    "second seconds minute minutes hour hours day days year years times fps frames of d k after by another"
)

ARTICLES = word_set("a an the his her its their my our your some this that these those both each every")
PREPOSITIONS = word_set(
    """of in on at to from into onto by with without over under above below behind beside besides between near next through
    across along alongside around against towards toward off out up down upon inside outside beneath underneath atop among
    amongst amid during onto past for about via per"""
)
_LINKS = word_set(
    """and or but nor as while when where who which that than so if because whose is are was were be been being has have had
    having can could does do did doing he she it they them him one ones not no there then it's"""
)
STOPS = ARTICLES | PREPOSITIONS | _LINKS
# Adjectives that a good caption may replace, and words with which a prompt describes its pictures.
_LOOSE = word_set(
    """small big large tiny huge giant little tall short long old young new bright dark light deep pale shiny nice
    beautiful same other another single upper lower plain time lapse moment way motion close upwards downwards start starts begin
    begins started began process reaction transformation captures capturing shows showing style slow fast pan zoom tilt
    orbits clockwise aerial cinematic footage photography viewpoint"""
)
# Words of views and places, which end a phrase.
PLACES = word_set(
    """left right top bottom middle centre center side edge corner front back background foreground distance
    direction scene surface camera video clip shot view frame image picture photo timelapse"""
)
NOT_NAMES = _LOOSE | PLACES
# Words that name somebody but do not distinguish one prompt from another.
GENERIC = word_set("person people someone somebody")
GROUPS = word_set(
    "group pair couple lot bit kind series set row bunch herd flock crowd pile number piece photo painting"
)

_IRREGULAR = {
    **{"gray": "grey", "golden": "gold", "men": "man", "women": "woman", "people": "person", "children": "child"},
    **{"feet": "foot", "teeth": "tooth", "mice": "mouse", "geese": "goose", "frozen": "freeze", "froze": "freeze"},
    **{"broken": "break", "broke": "break", "burnt": "burn", "grown": "grow", "torn": "tear", "worn": "wear"},
    **{
        "lit": "light",
        "written": "write",
        "drawn": "draw",
        "built": "build",
        "ran": "run",
        "sat": "sit",
        "sewn": "sew",
    },
    **{"worn": "wear", "shaken": "shake", "fallen": "fall", "bent": "bend", "swum": "swim", "flown": "fly"},
    **{"icing": "ice"},
}
_VOWELS = frozenset("aeiouy")


def words(text: str) -> list[str]:
    """Splits a text into lower-case words and punctuation marks; "cat's" counts as "cat", "red-hot" as two words."""
    return re.findall(r"\w+|[.,;:!?]", re.sub(r"['\u2019]s\b", "", text.lower()))


def is_word(token: str) -> bool:
    return token[0].isalnum()


def is_number(word: str) -> bool:
    return word in NUMBERS or word in NUMBERS.values()


def number_of(word: str) -> str:
    return NUMBERS.get(word, word)


def is_plural(word: str) -> bool:
    return len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is"))


def _without(word: str, ending: str, letters: int = 3) -> str:
    """Removes an ending from a word if the rest has a vowel and at least `letters` letters."""
    rest = word.removesuffix(ending)
    return rest if rest != word and len(rest) >= letters and not _VOWELS.isdisjoint(rest) else word


def root(word: str) -> str:
    """Returns the common root of a word's forms: leaf, leaves; fly, flying; rust, rusted, rusty; wood, wooden."""
    word = number_of(_IRREGULAR.get(word, word))
    word = word[:-1] if is_plural(word) else word
    if not word.endswith("eed"):
        word = next((short for ending in ("ing", "ed") if (short := _without(word, ending)) != word), word)
    word = _without(word, "en", 4)
    word = word[:-1] if len(word) > 3 and word[-1] == "e" else word
    word = word[:-1] + "i" if len(word) > 2 and word[-1] == "y" else word
    word = word[:-1] if len(word) > 4 and word[-1] == "i" else word
    word = word[:-1] if len(word) > 3 and word[-1] == word[-2] and word[-1] not in _VOWELS else word
    return word[:-1] + "v" if len(word) > 3 and word[-1] == "f" else word


def roots(tokens: Iterable[str]) -> set[str]:
    return {root(token) for token in tokens if is_word(token)}


# Frequent function words of other languages in Latin script that are no English words.
_FOREIGN = word_set(
    """un una uno el la los las le les des du der die das dem den ein eine einen und mit auf im zu et y con sobre sur dans
    avec il lo gli uma um os em com het een op och en er av na w z del della di que por para est ist sind por"""
)
_ENGLISH = word_set("the of with and is are on in at to from its his her an as while by into")


def is_english(text: str) -> bool:
    """Returns whether a text counts as English: 90% of its letters are ASCII, and most of its function words are English."""
    letters = [letter for letter in text if letter.isalpha()]
    if not letters or sum(letter.isascii() for letter in letters) < 0.9 * len(letters):
        return False
    tokens = words(text)
    foreign = sum(token in _FOREIGN for token in tokens)
    return foreign == 0 or sum(token in _ENGLISH for token in tokens) > foreign
