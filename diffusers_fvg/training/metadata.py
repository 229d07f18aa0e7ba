"""Reads the training data: files with captions, from tables, folders and datasets of the Hub.

A malformed row is an error with file and line, so that no caption is read in part.
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
# Suffixes of the files that are used in a folder without a table. They are decoded later.
SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".webp", ".avif", ".png", ".jpg", ".jpeg"}


@dataclass(frozen=True)
class Example:
    """A video or image file with its caption.

    Args:
        path (`Path`): path of the video or image.
        caption (`str`): description of what it shows.
        repeats (`float`, *optional*): how often an epoch contains it.
        buckets (`tuple`, *optional*): its own buckets; empty for those of the config.
    """

    path: Path
    caption: str
    repeats: float = 1.0
    buckets: tuple[tuple[int, int, int], ...] = ()


def read_examples(config: TomlConfig) -> list[Example]:
    """Reads the examples of all `config.sources`.

    A source is a folder with `metadata.jsonl` or `metadata.csv`, a folder of files with a text file of the same name beside
    each, or the name of a dataset.

    Raises:
        `ValueError`: a folder or dataset does not exist, a row or caption is missing or malformed, or a file is no UTF-8.
    """
    examples = []
    for source in config.sources:
        for path, caption in _rows(source.path, config):
            caption = source.caption_prefix + caption + source.caption_suffix
            examples.append(Example(path, caption, source.repeats, source.buckets))
    return examples


def _rows(data: str, config: TomlConfig) -> list[tuple[Path, str]]:
    """Returns files and captions of one source."""
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
                raise ValueError(
                    f"{table}, line {line} has no `{name}`, or an empty one; its columns are {sorted(row)}."
                )
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
    """Returns the files of a folder with the captions in the text files beside them."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(
            f"{folder} has neither {' nor '.join(TABLES)}, nor videos with text files beside them: write one of them."
        )
    bare = [path.name for path in paths if not path.with_suffix(".txt").is_file()]
    if bare:
        raise ValueError(
            f"{folder} has no {' or '.join(TABLES)}, and {len(bare)} of its {len(paths)} files lack a text file of the same name "
            f"with the caption: {', '.join(bare[:10])}."
        )
    found = []
    for path in paths:
        caption = _read_text(path.with_suffix(".txt")).strip()
        check_texts(path.with_suffix(".txt").name, [caption])
        found.append((path, caption))
    return found


def _read_text(path: Path) -> str:
    """Reads a UTF-8 file with or without a byte order mark.

    Raises:
        `ValueError`: the file has another encoding, or characters that an earlier conversion lost; the message gives the line.
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
    """Yields line numbers and objects."""
    # Only a line feed ends a line: captions may hold other characters at which `str.splitlines` would split.
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not JSON: {str(error)[:200]}.") from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, line {number} must be an object, {{...}}, but is {type(row).__name__}: {line[:80]}"
            )
        yield number, row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"a key occurs twice among {[key for key, _ in pairs]}")
    return row


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields the number of the line where each row begins, and the row as a dict with the header's names."""
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True, skipinitialspace=True)
    header: list[str] | None = None
    line = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {line}: the row that begins there cannot be read ({error}); close each quote, and write a quote "
                "within quotes twice."
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
    """Raises a `ValueError` if a caption holds the name of another row's file.

    That happens if a quote is not closed: the caption then extends over further rows, up to the next quote.
    """
    for text in (part for cell in cells for part in cell.splitlines()[1:]):
        for part in text.split(","):
            name = part.strip(' "')
            if name and len(name) < 256 and (path.parent / name).is_file():
                raise ValueError(
                    f"{path}, line {line}: a quote is not closed, so the row extends into that of {name}."
                )


def _hub_rows(data: str, config: TomlConfig) -> list[tuple[Path, str]]:
    """Returns files and captions of the train split of a dataset on the Hub; writes embedded videos into the cache."""
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(
            f"`data={data!r}` is not a folder; if it names a Hugging Face dataset, `pip install datasets`."
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
