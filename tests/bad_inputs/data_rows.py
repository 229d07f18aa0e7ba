"""Data sets of a training run, prompt files of a batch, videos and the records in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from bad_rows import Row, Shared

from diffusers_fvg.evaluation.prompts import read_prompts
from diffusers_fvg.media.reading import read_video, read_video_metadata
from diffusers_fvg.media.writing import write_video
from diffusers_fvg.pipelines.replay import read_record
from diffusers_fvg.training.config import DataSource
from diffusers_fvg.training.metadata import read_examples


CONFIG = {"video_column": "file_name", "caption_column": "text", "cache_dir": "cache"}


def data(title: str, name: str, content: str | bytes, *words: str) -> Row:
    """A folder to train on with this file in it."""

    def give(shared: Shared) -> None:
        shared.write(f"data/{name}", content)
        read_examples(SimpleNamespace(**CONFIG, sources=(DataSource(str(shared.folder / "data")),)))

    return Row(f"data: {name}: {title}", give, words)


def prompts(title: str, name: str, content: str | bytes, *words: str) -> Row:
    return Row(f"prompts: {name}: {title}", lambda shared: list(read_prompts(shared.write(name, content))), words)


ROW = '{"file_name": "a.mp4", "text": "a red circle"}'
JSONL = [
    ("empty", "", "has no rows"),
    ("half an object", ROW[:20], "line 1", "is not JSON"),
    ("a list", "[1]", "line 1", "must be an object"),
    ("no caption", '{"file_name": "a.mp4"}', "line 1", "has no `text`", "its columns are"),
    ("a caption of nothing", '{"file_name": "a.mp4", "text": ""}', "line 1", "has no `text`"),
    ("a caption of spaces", '{"file_name": "a.mp4", "text": "  "}', "line 1", "is empty"),
    ("a caption that is a number", '{"file_name": "a.mp4", "text": 3}', "line 1", "must be a text in quotes"),
    ("a caption of 20000 letters", json.dumps({"file_name": "a.mp4", "text": "x" * 20_000}), "line 1", "20000 char"),
    ("a control character", json.dumps({"file_name": "a.mp4", "text": "a \x1b[31m"}), "line 1", "control character"),
    ("half a character", '{"file_name": "a.mp4", "text": "\\ud800"}', "line 1", "half a character"),
    ("a name that is a number", '{"file_name": 3, "text": "a"}', "line 1", "must be a text in quotes"),
    ("a null in a name", '{"file_name": "a\\u0000.mp4", "text": "a"}', "line 1", "file_name", "null"),
    ("a key twice", '{"file_name": "a", "file_name": "b", "text": "c"}', "line 1", "occurs twice"),
    ("deep lists", '{"a": ' + "[" * 50_000 + "]" * 50_000 + "}", "line 1", "is not JSON"),
    ("a number of 5000 digits", '{"a": ' + "9" * 5000 + "}", "line 1", "is not JSON"),
    ("the third line", f"{ROW}\n{ROW}\n{{", "line 3", "is not JSON"),
    ("Latin-1", '{"file_name": "a.mp4", "text": "caf\xe9"}'.encode("latin-1"), "line 1", "no UTF-8", "0xe9"),
    ("UTF-16", ROW.encode("utf-16-le"), "line 1", "U+0000", "save the file as UTF-8"),
    ("lost characters", '{"file_name": "a.mp4", "text": "caf\ufffd"}', "line 1", "U+FFFD", "save the file as UTF-8"),
]
CSV = [
    ("a header alone", "file_name,text\n", "has no rows"),
    ("another header", "name,caption\na,b\n", "line 2", "has no `file_name`", "its columns are"),
    ("a column twice", "file_name,file_name\na,b\n", "line 1", "names a column twice"),
    ("a comma too many", "file_name,text\na.mp4,a red, circle\n", "line 2", "3 columns", "in quotes"),
    ("a cell too few", "file_name,text\na.mp4\n", "line 2", "1 columns"),
    ("an open quote", 'file_name,text\na.mp4,"a red circle\n', "line 2", "cannot be read"),
    ("zeros", b"\0" * 100, "line 1", "U+0000"),
]
FOLDER = [
    ("a video without a text", "a.mp4", b"", "1 of its 1 files lack a text file", "a.mp4"),
    ("nothing that is known", "notes.md", "hello", "metadata.jsonl", "write one of them"),
]
ROWS = [data(title, "metadata.jsonl", content, *words) for title, content, *words in JSONL]
ROWS += [data(title, "metadata.csv", content, *words) for title, content, *words in CSV]
ROWS += [data(title, name, content, *words) for title, name, content, *words in FOLDER]
PROMPTS = [
    ("empty", "p.txt", "", "holds no prompts"),
    ("empty lines", "p.txt", "\n\n \n", "holds no prompts"),
    ("Latin-1", "p.txt", "caf\xe9\n".encode("latin-1"), "is not in UTF-8", "save it in UTF-8"),
    ("another suffix", "p.xls", "a", "must end in one of .txt"),
    ("no header", "p.csv", "a red circle\n", "line 1", "must name the columns"),
    ("a field too many", "p.csv", "prompt,seed\na,1,2\n", "line 2", "more fields than columns"),
    ("an unknown column", "p.csv", "prompt,colour\na,red\n", "line 2", "unknown column `colour`"),
    ("no JSON", "p.jsonl", "{", "line 1", "not JSON"),
    ("a list", "p.jsonl", "[]", "line 1", "must be an object"),
    ("deep lists", "p.jsonl", "[" * 50_000 + "]" * 50_000, "line 1", "not JSON"),
    ("no prompt", "p.jsonl", '{"seed": 1}', "line 1", "`prompt`"),
    ("a prompt of spaces", "p.jsonl", '{"prompt": " "}', "line 1", "`prompt`"),
    ("a prompt that is a number", "p.jsonl", '{"prompt": 3}', "line 1", "`prompt` must be a text"),
    *(
        (f"{name}={value}", "p.jsonl", f'{{"prompt": "a", "{name}": {value}}}', "line 1", f"`{name}`", words)
        for name, value, words in (
            ("seed", "-1", "whole number from 0"),
            ("seed", "1.5", "whole number from 0"),
            ("seed", "true", "whole number from 0"),
            ("num_frames", "1.5", "must be a whole number"),
            ("num_frames", "true", "must be a whole number"),
            ("height", '"64"', "must be a whole number"),
            ("num_inference_steps", "NaN", "must be a whole number"),
            ("guidance_scale", '"x"', "must be a finite number"),
            ("guidance_scale", "NaN", "must be a finite number"),
            ("guidance_scale", "true", "must be a finite number"),
            ("preset", "3", "must be a text"),
            ("image", "3", "must be a text"),
            ("image", '""', "must be the path of a file"),
            ("anchors", "3", "must be a list of objects"),
            ("anchors", '[{"frame_index": 1}]', "must be a list of objects"),
            ("anchors", '[{"image": "a.png", "colour": 1}]', "must be a list of objects"),
        )
    ),
]
ROWS += [prompts(title, name, content, *words) for title, name, content, *words in PROMPTS]

# -- videos and what they record --------------------------------------------------------------------------------------

FRAMES = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)


def video(title: str, change: Callable[[bytes], bytes], read: Callable[[Path], Any], *words: str) -> Row:
    def give(shared: Shared) -> None:
        path = shared.folder / "video.mp4"
        write_video(path, FRAMES, 8)
        path.write_bytes(change(path.read_bytes()))
        read(path)

    return Row(f"video: {title}", give, ("video.mp4", *words))


def recorded(title: str, record: Any, *words: str) -> Row:
    def give(shared: Shared) -> None:
        path = shared.folder / "video.mp4"
        write_video(path, FRAMES, 8, metadata=record)
        read_record(path)

    return Row(f"record: {title}", give, words)


ROWS += [
    video("0 bytes", lambda content: b"", read_video, "cannot be decoded"),
    video("half of it", lambda content: content[: len(content) // 2], read_video, ""),
    video("text", lambda content: b"no video\n" * 100, read_video, "cannot be decoded"),
    video("zeros", lambda content: bytes(len(content)), read_video, "cannot be decoded"),
    video("without a record", lambda content: content, read_video_metadata, "no generation metadata"),
    video("text for a record", lambda content: b"no video\n" * 100, read_video_metadata, "cannot be decoded"),
    recorded("of another program", {"a": 1}, "video.mp4"),
    recorded("of a later version", {"version": 10**9}, "video.mp4"),
    recorded("of a version that is a text", {"version": "x"}, "video.mp4"),
    recorded("of nothing", {}, "video.mp4"),
]


def written(title: str, *words: str, **given: Any) -> Row:
    def give(shared: Shared) -> None:
        write_video(**{"frames": FRAMES, "path": shared.folder / "video.mp4", "frame_rate": 8} | given)

    return Row(f"video: write {title}", give, words)


ROWS += [
    written("another suffix", "video.avi", "use 'video.mp4'", path=Path("video.avi")),
    written("frame_rate=nan", "frame_rate=nan", "24", frame_rate=float("nan")),
    written("frame_rate=0", "frame_rate=0", "24", frame_rate=0),
    written("frame_rate='x'", "frame_rate", "24", frame_rate="x"),
    written("frame_rate=True", "frame_rate=True", "24", frame_rate=True),
    written("frame_rate=1e9", "frame_rate=1000000000.0", "24", frame_rate=1e9),
    written("scale=1.5", "scale=1.5", "whole number", scale=1.5),
    written("scale=True", "scale=True", "whole number", scale=True),
    written("scale=10**6", "scale=1000000", "whole number", scale=10**6),
    written("odd sides", "even height and width", "31x32", "scale=2", frames=FRAMES[:, :31]),
    written("no frames", "frame", frames=FRAMES[:0]),
    written("NaN", "[0, 1]", "nan", frames=np.full((1, 32, 32, 3), float("nan"))),
    written("a picture", "(32, 32, 3)", frames=FRAMES[0]),
    written("None", "frames", "NoneType", frames=None),
]
