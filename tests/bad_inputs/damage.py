"""Files that are damaged at random, from good ones: cut, with bits turned, and with bytes put in or taken out."""

from __future__ import annotations

from hypothesis import strategies


@strategies.composite
def damaged(draw: strategies.DrawFn, good: bytes) -> bytes:
    """The file after one to three of the ways in which files are damaged."""
    content = bytearray(good)
    for _ in range(draw(strategies.integers(1, 3))):
        place = draw(strategies.integers(0, max(len(content) - 1, 0)))
        kind = draw(strategies.sampled_from(("cut", "flip", "overwrite", "insert", "remove", "head")))
        if kind == "cut":
            del content[place:]
        elif kind == "flip" and content:
            content[place] ^= 1 << draw(strategies.integers(0, 7))
        elif kind == "overwrite":
            piece = draw(strategies.sampled_from((bytes(8), b"\xff" * 8, b"\x7f" * 4)))
            content[place : place + len(piece)] = piece
        elif kind == "insert":
            content[place:place] = draw(strategies.binary(min_size=1, max_size=16))
        elif kind == "remove":
            del content[place : place + draw(strategies.integers(1, 64))]
        else:
            # Most of what a reader decides by stands at the beginning.
            start = place % min(64, len(content) or 1)
            content[start : start + 1] = draw(strategies.binary(min_size=1, max_size=1))
    return bytes(content)
