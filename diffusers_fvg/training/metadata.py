"""What there is to train on: captioned files, as tables, folders and data sets of the Hub have them.

A caption is read whole or not at all: what a table cannot mean is an error with file and line.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..atomic import replacing
from ..checks import check_texts
from .config import TomlConfig


TABLES = ("metadata.jsonl", "metadata.csv")
# What a folder without a table is searched for; whether a file can be decoded is found out later.
SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".webp", ".avif", ".png", ".jpg", ".jpeg"}


@dataclass(frozen=True)
class Example:
    """A video file and what it shows.

    Args:
        path (`Path`): of a video or a picture.
        caption (`str`): what it shows.
        repeats (`float`, *optional*): how often an epoch goes through it.
        buckets (`tuple`, *optional*): for it alone; empty for those of the config.
    """

    path: Path
    caption: str
    repeats: float = 1.0
    buckets: tuple[tuple[int, int, int], ...] = ()


def read_examples(config: TomlConfig) -> list[Example]:
    """What each of `config.sources` holds: the rows of `metadata.jsonl` or `metadata.csv` in a folder; without these its
    videos, each with a text file of its name beside it; or the rows of the data set of that name.

    Raises:
        `ValueError`: no such folder or data set, a row that is no caption of a file, an empty caption, a table that is no
            UTF-8.
    """
    examples = []
    for source in config.sources:
        for path, caption in _rows(source.path, config):
            caption = source.caption_prefix + caption + source.caption_suffix
            examples.append(Example(path, caption, source.repeats, source.buckets))
    return examples


def _rows(data: str, config: TomlConfig) -> list[tuple[Path, str]]:
    """Files and captions of one source."""
    folder = Path(data)
    if not folder.is_dir():
        return _hub_rows(data, config)
    tables = [folder / name for name in TABLES if (folder / name).is_file()]
    if len(tables) > 1:
        raise ValueError(f"{folder} has {' and '.join(TABLES)}; keep one of them.")
    rows = _table_rows(tables[0], config) if tables else _text_rows(folder)
    if not rows:
        raise ValueError(f"{tables[0] if tables else folder} has no rows.")
    return rows


def _table_rows(table: Path, config: TomlConfig) -> list[tuple[Path, str]]:
    found = []
    for line, row in _jsonl_rows(table) if table.suffix == ".jsonl" else _csv_rows(table):
        values = []
        for name in (config.video_column, config.caption_column):
            value = row.get(name)
            if value is None or value == "":
                raise ValueError(f"{table}, line {line} has no {[name]}; its columns are {sorted(row)}.")
            if not isinstance(value, str):
                raise ValueError(f"{table}, line {line}: `{name}` must be a text in quotes, but is {value!r}.")
            values.append(value)
        if "\0" in values[0]:
            raise ValueError(
                f"{table}, line {line}: `{config.video_column}` holds a null character: {values[0]!r:.80}."
            )
        check_texts(f"{table.name}, line {line}", values[1:])
        found.append((table.parent / values[0], values[1]))
    return found


def _text_rows(folder: Path) -> list[tuple[Path, str]]:
    """Files of a folder with the text files beside them."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(
            f"{folder} has 0 of {' and '.join(TABLES)}, and no video with a text file beside it: write one of them."
        )
    bare = [path.name for path in paths if not path.with_suffix(".txt").is_file()]
    if bare:
        raise ValueError(
            f"{folder} has no {' or '.join(TABLES)}, and {len(bare)} of its {len(paths)} files lack a text file of their name "
            f"with the caption: {', '.join(bare[:10])}."
        )
    found = []
    for path in paths:
        caption = _read_text(path.with_suffix(".txt")).strip()
        check_texts(path.with_suffix(".txt").name, [caption])
        found.append((path, caption))
    return found


def _read_text(path: Path) -> str:
    """A file of UTF-8, with a byte order mark or without.

    Raises:
        `ValueError`: another encoding, or text that was lost in an earlier conversion, with the line.
    """
    content, advice = path.read_bytes(), "save the file as UTF-8"
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line} is no UTF-8 (byte {content[error.start]:#04x}): {advice}.") from error
    for character, meaning in (("\0", "which UTF-16 is full of"), ("\ufffd", "which stands for lost characters")):
        if character in text:
            line = text[: text.index(character)].count("\n") + 1
            raise ValueError(f"{path}, line {line} holds U+{ord(character):04X}, {meaning}: {advice}.")
    return text


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects."""
    # Only a line feed ends a line: captions may hold what `str.splitlines` takes for an end.
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is no JSON: {str(error)[:200]}.") from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, line {number} must be an object, {{...}}, but is {type(row).__name__}: {line[:80]}"
            )
        yield number, row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"a key stands twice among {[key for key, _ in pairs]}")
    return row


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Numbers of the lines where rows begin, and rows by the header's names."""
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True, skipinitialspace=True)
    header: list[str] | None = None
    line = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {line}: the row that begins there cannot be read ({error}); a quote within quotes is written "
                "twice, and each that is opened is closed."
            ) from error
        if cells is None:
            return
        if header is None and cells:
            header = cells
            if len(set(header)) < len(header):
                raise ValueError(f"{path}, line {line} names a column twice: {header}.")
        elif header is not None and cells:
            if len(cells) != len(header):
                raise ValueError(
                    f"{path}, line {line} has {len(cells)} columns, and the header {len(header)}: put a caption with commas in "
                    f'quotes, "a red circle, moving right".'
                )
            _check_closed(path, line, cells)
            yield line, dict(zip(header, cells))
        line = reader.line_num + 1


def _check_closed(path: Path, line: int, cells: list[str]) -> None:
    """A quote that is not closed swallows rows up to the next quote: their files' names stand within a caption."""
    for text in (part for cell in cells for part in cell.splitlines()[1:]):
        for part in text.split(","):
            name = part.strip(' "')
            if name and len(name) < 256 and (path.parent / name).is_file():
                raise ValueError(f"{path}, line {line}: a quote is not closed, and the row goes on to that of {name}.")


def _hub_rows(data: str, config: TomlConfig) -> list[tuple[Path, str]]:
    """The train split of a data set on the Hub, its videos as files in the cache."""
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(
            f"`data={data!r}` is no folder; for the name of a Hugging Face data set `pip install datasets`."
        )
    from datasets import Video, load_dataset

    with PartialState().main_process_first():
        rows = load_dataset(data, split="train")
    missing = {config.video_column, config.caption_column} - set(rows.column_names)
    if missing:
        raise ValueError(f"{data} has no columns {sorted(missing)}; it has {rows.column_names}.")
    found = []
    for row in rows.cast_column(config.video_column, Video(decode=False)):
        video, caption = row[config.video_column], row[config.caption_column]
        check_texts(f"a caption of {data}", [caption])
        path = video["path"]
        if video["bytes"] is not None:
            path = Path(config.cache_dir) / "videos" / f"{hashlib.sha256(video['bytes']).hexdigest()}.mp4"
            if not path.exists():
                with replacing(path) as draft:
                    draft.write_bytes(video["bytes"])
        found.append((Path(path), caption))
    return found
