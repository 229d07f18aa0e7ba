"""Pictures and videos that are given as first frames: as objects, and as files on the command line."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import PIL.Image
import torch
from bad_rows import PROMPT, CommandRefused, Row, Shared, short


PICTURE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))
NAN = float("nan")


def encoded(form: str, picture: PIL.Image.Image = PICTURE, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def opened(content: bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(content))


def closed() -> PIL.Image.Image:
    picture = PIL.Image.new("RGB", (8, 8))
    picture.close()
    return picture


def damaged(content: bytes) -> bytes:
    """The same with the middle of its pixels overwritten."""
    middle = len(content) // 2
    return content[:middle] + bytes(64) + content[middle + 64 :]


PNG, JPEG, GIF, BMP = (encoded(form) for form in ("PNG", "JPEG", "GIF", "BMP"))
ANIMATED = encoded("GIF", save_all=True, append_images=[PICTURE.rotate(90)])
PAGES = encoded("TIFF", save_all=True, append_images=[PICTURE.rotate(90)])
LIKE, VALUES = "must be a PIL image, an array or a tensor", "must be"
OBJECTS = [
    ("a number", lambda: 3, (LIKE, "int")),
    ("a name", lambda: "picture.png", (LIKE, "str")),
    ("bytes", lambda: PNG, (LIKE, "bytes")),
    ("None in a list", lambda: [None], (LIKE, "NoneType")),
    ("a dictionary", lambda: {"image": PICTURE}, (LIKE, "dict")),
    ("a class", lambda: PIL.Image.Image, (LIKE, "type")),
    ("an empty list", lambda: [], ("`image` has 0 pictures for 1 prompts", "give one")),
    ("two pictures", lambda: [PICTURE, PICTURE], ("`image` has 2 pictures for 1 prompts", "give one")),
    ("12000 x 12000", lambda: PIL.Image.new("RGB", (12_000, 12_000)), ("12000 x 12000", "scale it down")),
    ("a line of 1e8 pixels", lambda: PIL.Image.new("L", (10**8, 1)), ("100000000 x 1", "scale it down")),
    ("an array of 12000 x 12000", lambda: np.zeros((12_000, 12_000, 3), np.uint8), ("12000 x 12000", "scale it down")),
    (
        "a view of 1e18 pixels",
        lambda: np.broadcast_to(np.uint8(0), (10**9, 10**9, 3)),
        ("1000000000 x 1000000000", "scale it down"),
    ),
    ("floats up to 2", lambda: np.full((8, 8, 3), 2.0), ("[0, 1]", "from 2 to 2", "scale")),
    ("floats below 0", lambda: np.full((8, 8, 3), -1.0), ("[0, 1]", "scale")),
    ("NaN", lambda: np.full((8, 8, 3), NAN), ("finite", "nan")),
    ("infinity", lambda: torch.full((3, 8, 8), float("inf")), ("finite", "inf")),
    ("an array (3, H, W)", lambda: np.zeros((3, 8, 9)), ("(H, W, 3)", "(3, 8, 9)")),
    ("an array (H, W)", lambda: np.zeros((8, 8)), ("(H, W, 3)", "(8, 8)")),
    ("an array (H, W, 4)", lambda: np.zeros((8, 8, 4)), ("(H, W, 3)", "(8, 8, 4)")),
    ("an array of no pixels", lambda: np.zeros((0, 8, 3)), ("no pixels", "(3, 0, 8)")),
    ("a tensor (H, W, 3)", lambda: torch.zeros(8, 8, 3), ("(3, H, W)", "(8, 8, 3)")),
    ("a tensor of int64", lambda: torch.zeros(3, 8, 8, dtype=torch.int64), ("uint8, or float", "int64", "convert")),
    ("a tensor of bool", lambda: torch.zeros(3, 8, 8, dtype=torch.bool), ("uint8, or float", "bool", "convert")),
    ("a tensor without values", lambda: torch.zeros(3, 8, 8, device="meta"), ("hold values", "meta")),
    ("a sparse tensor", lambda: torch.zeros(3, 8, 8).to_sparse(), ("hold values", "sparse")),
    ("an array of objects", lambda: np.zeros((8, 8, 3), dtype=object), ("uint8 or uint16", "object", "convert")),
    ("an array of complex", lambda: np.zeros((8, 8, 3), dtype=complex), ("uint8 or uint16", "complex", "convert")),
    ("an array of texts", lambda: np.full((8, 8, 3), "a"), ("uint8 or uint16", "convert")),
    ("8 bits as 16", lambda: np.full((8, 8, 3), 200, np.uint16), ("16-bit", "up to 200", "uint8")),
    ("a closed picture", closed, ("cannot be decoded", "closed", "save it again")),
    ("mode I", lambda: PIL.Image.new("I", (8, 8)), ("mode I, ", "convert it to RGB")),
    ("mode LAB", lambda: PIL.Image.new("LAB", (8, 8)), ("mode LAB", "convert it to RGB")),
    ("an animated GIF", lambda: opened(ANIMATED), ("animated", "2 in all", "image.seek(index)")),
    ("a TIFF of two pages", lambda: opened(PAGES), ("several pages", "2 in all", "image.seek(index)")),
    *(
        (
            f"half a {form}",
            lambda content=content: opened(content[: len(content) // 2]),
            ("cannot be decoded", "save it"),
        )
        for form, content in (("PNG", PNG), ("JPEG", JPEG), ("BMP", BMP), ("GIF", GIF))
    ),
    ("a damaged PNG", lambda: opened(damaged(PNG)), ("cannot be decoded", "save it again")),
]


def picture(title: str, make: Any, words: tuple[str, ...]) -> Row:
    return Row(f"picture: {title}", lambda shared: shared.pipe(PROMPT, image=make()), words)


def file(title: str, name: str, content: str | bytes, *words: str) -> Row:
    """`fvg animate --image` of a file."""

    def give(shared: Shared) -> None:
        shared.write(name, content)
        shared.command("animate", PROMPT, "--image", f"{{}}/{name}")

    return Row(f"picture: file {title}", give, words, CommandRefused)


def bomb() -> bytes:
    """A PNG of 60000 x 60000 in a few bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


TEXT = b"this is no picture\n" * 10
ROWS = [picture(*row) for row in OBJECTS]
ROWS += [
    file(f"of text by the name .{suffix}", f"picture.{suffix}", TEXT, f"picture.{suffix}")
    for suffix in ("png", "jpg", "webp", "gif", "mp4", "mov", "tiff")
]
ROWS += [
    file(f"of 0 bytes by the name .{suffix}", f"picture.{suffix}", b"", f"picture.{suffix}")
    for suffix in ("png", "mp4")
]
ROWS += [
    file("half a PNG", "half.png", PNG[: len(PNG) // 2], "half.png"),
    file("a PNG of 60000 x 60000", "bomb.png", bomb(), "bomb.png"),
    file("animated", "animated.gif", ANIMATED, "animated.gif"),
    file("a script in SVG", "picture.svg", "<svg><script/></svg>", "picture.svg"),
    file("a playlist by the name .mp4", "list.mp4", "#EXTM3U\n/etc/passwd\n", "list.mp4"),
    file("a list of ffmpeg by the name .mp4", "list.mp4", "ffconcat version 1.0\nfile /etc/passwd\n", "list.mp4"),
]
for value, words in (
    ("{}/none.png", ("none.png",)),
    ("{}", ()),
    ("/dev/null", ("/dev/null",)),
    ("", ("image",)),
    ("{}/no\0name.png", ("image", "null")),
):
    ROWS.append(
        Row(
            f"picture: --image {short(value)}",
            lambda shared, value=value: shared.command("animate", PROMPT, f"--image={value}"),
            words or ("--image",),
            CommandRefused,
        )
    )
