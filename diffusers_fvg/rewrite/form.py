"""Checks in any language whether a text is a caption at all, whatever it should show."""

from __future__ import annotations

import re
from collections.abc import Iterable
from string import punctuation

from .words import NOT_NAMES, STOPS, root, roots, words


# Characters of a caption. A shorter one describes no picture; a longer one exceeds the 512 tokens that the text encoders of
# current text-to-image models read.
MIN_CAPTION_CHARACTERS, MAX_CAPTION_CHARACTERS = 3, 1200
# Texts that models write in place of a caption.
_PLACEHOLDERS = frozenset("null none nil n/a undefined caption description text string empty todo tbd".split())
_REFUSALS = re.compile(
    r"^\W*(i['\u2019]?m (really |very |so )?sorry|sorry\b|i (can(no|['\u2019])?t|cannot|am unable|am not able|won['\u2019]t)\b|as an ai\b|"
    r"unfortunately, i\b|i apologi[sz]e|lo siento|je suis d\u00e9sol|d\u00e9sol\u00e9|es tut mir leid|\u62b1\u6b49|\u5bf9\u4e0d\u8d77|\u7533\u3057\u8a33|\u0639\u0630\u0631\u0627)",
    re.IGNORECASE,
)
# Marks of a list of frames or scenes. A caption describes one picture.
_SEVERAL = re.compile(r"\b(frame|scene|shot|panel|image)\s*#?\s*[2-9]\b|(^|\n)\s*2[.)]\s", re.IGNORECASE)
# A caption copies an example if both share so many words in a row, so many of which name something: "at the left edge of a"
# names too little.
_COPIED = ((4, 2), (8, 1))


def form_problem(prompt: str, caption: str, shown: Iterable[str] = ()) -> str | None:
    """Returns why a text cannot be the caption of one picture, whatever the prompt asks for, or `None`.

    Args:
        prompt (`str`): what should happen in the video. Text that the caption shares with it does not count as copied.
        caption (`str`): text to check.
        shown (iterable of `str`): instruction and examples that the model was shown, which a caption must not copy.
    """
    if any("\ud800" <= letter <= "\udfff" for letter in caption):
        return "the description holds a lone surrogate"
    if not MIN_CAPTION_CHARACTERS <= len(caption) <= MAX_CAPTION_CHARACTERS:
        limits = f"{MIN_CAPTION_CHARACTERS} to {MAX_CAPTION_CHARACTERS}"
        return f"the description has {len(caption)} characters, not {limits}"
    letters = [letter for letter in caption if letter.isalpha()]
    if len(letters) < 2 and not any(letter > "\u2e80" for letter in letters):
        return "the description has no words"
    if sum(letter.isdigit() or letter in punctuation for letter in caption) > len(letters):
        return "the description has more digits and marks than letters"
    plain = caption.strip(" .\"'`<>[](){}*_").lower()
    if plain in _PLACEHOLDERS or (re.fullmatch(r"[<\[{].*[>\]}]", caption.strip()) and len(plain.split()) <= 6):
        return f"{caption[:40]!r} is a placeholder"
    if _REFUSALS.match(caption):
        return "it is a refusal, not a description"
    if _SEVERAL.search(caption) and not _SEVERAL.search(prompt):
        return "it describes several pictures"
    copied = copied_text(caption, shown, prompt)
    return None if copied is None else f'"{copied}" is copied from the instruction or its examples'


def copied_text(caption: str, shown: Iterable[str], prompt: str = "") -> str | None:
    """Returns consecutive words that a caption copies from a shown text and whose names are not the prompt's, or `None`."""
    tokens = re.findall(r"\w+", caption.lower())
    own, texts = roots(words(prompt)), [_one_line(text) for text in shown]
    for length, least in _COPIED:
        for begin in range(len(tokens) - length + 1):
            row = tokens[begin : begin + length]
            names = [word for word in row if word not in STOPS | NOT_NAMES]
            if len(names) < least or own.issuperset(map(root, names)):
                continue
            if any(f" {' '.join(row)} " in text for text in texts):
                return " ".join(row)
    return None


def _one_line(text: str) -> str:
    return " ".join(["", *re.findall(r"\w+", text.lower()), ""])
