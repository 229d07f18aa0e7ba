"""Reads prompt files: text, CSV, JSON lines or Parquet, with a prompt and its arguments in each row."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .plan import PlannedVideo, derive_seed


# Arguments of the pipeline's call that a row may give, by type.
TEXTS = (
    "mode",
    "preset",
    "first_frame_prompt",
    "negative_prompt",
    "motion_prompt",
    "anchor_decode",
    "composer_negative_prompt",
)
# Integers and their maximum, the same as that of the command line's flags. A larger number is a mistake, and even checking it
# could use up the memory.
WHOLES = {
    "height": 16_384,
    "width": 16_384,
    "num_frames": 100_000,
    "num_inference_steps": 1000,
    "num_moments": 100,
    "max_sequence_length": 8192,
    "rewriter_max_new_tokens": 8192,
    "composer_num_inference_steps": 1000,
    "composer_num_candidates": 1024,
    "motion_retries": 1024,
}
NUMBERS = ("guidance_scale", "guidance_scale_2", "guidance_rescale", "fps", "composer_guidance_scale")
BOOLEANS = ("use_dynamic_cfg", "rewriter_motion")
ARGUMENTS = (*TEXTS, *WHOLES, *NUMBERS, *BOOLEANS, "image", "anchors", "storyboard")
# Columns of a row besides arguments and labels.
OWN = ("prompt", "name", "seed")
FORMATS = (".txt", ".csv", ".jsonl", ".parquet")
# Columns whose fields hold JSON in a CSV file.
_JSON = ("anchors", "storyboard")


@dataclass(frozen=True)
class PromptRow:
    """A row of a prompt file.

    Args:
        place (`str`): file and line, for error messages.
        prompt (`str`): what should happen in the video.
        arguments (`dict`): arguments of the pipeline's call as JSON values; paths of images are absolute.
        name (`str`, *optional*): name of the video's file, without `.mp4`.
        seed (`int`, *optional*): seed of the row's first video.
        labels (`dict[str, str]`): values of the columns that the caller named as labels.
    """

    place: str
    prompt: str
    arguments: dict[str, Any]
    name: str | None
    seed: int | None
    labels: dict[str, str]


def read_prompts(path: str | Path, labels: Collection[str] = ()) -> Iterator[PromptRow]:
    """Yields the rows of a prompt file.

    A text file has one prompt per line; empty lines are skipped. The other formats have a column `prompt`, and may have
    `name`, `seed` and arguments of the pipeline's call (`ARGUMENTS`). `image` is the path of an image or video, `anchors` a
    list of objects with `image`, `frame_index` and `strength`. Paths are relative to the file. Empty fields are ignored.

    Args:
        path (`str` or `Path`): `.txt`, `.csv`, `.jsonl` (all UTF-8) or `.parquet`.
        labels (collection of `str`): further columns, by which reports group videos.

    Raises:
        `ValueError`: a row, a column or the file is not valid; the message gives file and line.
        `OSError`: the file does not exist or cannot be read.
        `ImportError`: the file is `.parquet` and pyarrow is not installed.
    """
    path = Path(path)
    reader = {".txt": _texts, ".csv": _table, ".jsonl": _objects, ".parquet": _parquet}.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path} must end in one of {', '.join(FORMATS)}.")
    count, missing = 0, set(labels)
    try:
        for line, values in reader(path):
            place = f"{path}, {'row' if path.suffix == '.parquet' else 'line'} {line}"
            try:
                row = _row(place, values, labels, path.parent)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
            count += 1
            missing -= row.labels.keys()
            yield row
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not in UTF-8 ({error.reason} at byte {error.start}); save it in UTF-8."
        ) from error
    if not count:
        raise ValueError(f"{path} holds no prompts.")
    if missing:
        raise ValueError(f"{path} has no values in a column {min(missing)!r}, which was named as a label.")


def planned_videos(
    rows: Iterator[PromptRow], seed: int = 0, num_videos_per_prompt: int = 1, defaults: Mapping[str, Any] | None = None
) -> Iterator[PlannedVideo]:
    """Yields the videos of prompt rows.

    Args:
        rows (iterator of [`PromptRow`]): output of [`read_prompts`].
        seed (`int`): seed of the plan.
        num_videos_per_prompt (`int`): number of videos for each row, each with its own seed and anchor.
        defaults (mapping, *optional*): arguments of the call for rows that do not give them.
    """
    for index, row in enumerate(rows):
        name = row.name or f"{index + 1:06d}"
        for sample in range(num_videos_per_prompt):
            base = seed if row.seed is None else row.seed
            is_given = row.seed is not None and sample == 0
            video_seed = base if is_given else derive_seed(base, index, sample)
            path = f"videos/{name}{f'-{sample}' * (num_videos_per_prompt > 1)}.mp4"
            labels = {**row.labels, "prompt": name, "sample": str(sample)}
            yield PlannedVideo(path, row.prompt, video_seed, {**(defaults or {}), **row.arguments}, labels)


# -- formats ----------------------------------------------------------------------------------------------------------


def _texts(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, {"prompt": line.strip()}


def _table(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            names = reader.fieldnames or []
            if len(set(names)) != len(names) or "prompt" not in names:
                raise ValueError(
                    f"{path}, line 1: the first line must name the columns, each once and `prompt` among them, but is {names}."
                )
            for values in reader:
                if None in values:
                    raise ValueError(
                        f"{path}, line {reader.line_num}: there are more fields than columns, from {values[None][0]!r} on; "
                        "put a field with commas in double quotes."
                    )
                yield reader.line_num, {name: _value(name, text) for name, text in values.items() if text}
        except csv.Error as error:
            # `DictReader` still has the number of the row before.
            raise ValueError(f"{path}, line {reader.reader.line_num}: {error}.") from error


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # Only a line feed ends a line: prompts may hold other line separators.
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: the line is not JSON ({str(error)[:200]}).") from error
            if not isinstance(values, dict):
                raise ValueError(
                    f'{path}, line {number}: the line must be an object like {{"prompt": "..."}}, but is {line[:40]!r}.'
                )
            yield number, {name: value for name, value in values.items() if value is not None}


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"{path} needs pyarrow: pip install pyarrow") from error
    number = 0
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                number += 1
                yield number, {name: value for name, value in values.items() if value is not None}


def _value(name: str, text: str) -> Any:
    """Converts a field of a CSV file to its column's type, or returns the text if that fails; the row is checked later."""
    kind = int if name in (*WHOLES, "seed") else float if name in NUMBERS else None
    if kind is not None:
        try:
            return kind(text)
        except ValueError:
            return text
    if name in BOOLEANS:
        return {"true": True, "false": False}.get(text.strip().lower(), text)
    if name in _JSON:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    return text


def _row(place: str, values: Mapping[str, Any], labels: Collection[str], folder: Path) -> PromptRow:
    unknown = sorted(name for name in values.keys() - {*OWN, *ARGUMENTS, *labels} if name is not None)
    if unknown:
        raise ValueError(
            f"unknown column `{unknown[0]}`; a row has {', '.join((*OWN, *ARGUMENTS))}, and the columns that --label names."
        )
    for name, value in values.items():
        _check_value(name, value, labels)
    if not (values.get("prompt") or "").strip():
        raise ValueError("`prompt` is empty.")
    arguments = {name: value for name, value in values.items() if name in ARGUMENTS and name not in labels}
    if "image" in arguments:
        arguments["image"] = _place(folder, arguments["image"])
    if "anchors" in arguments:
        arguments["anchors"] = [anchor | {"image": _place(folder, anchor["image"])} for anchor in arguments["anchors"]]
    told = {name: str(values[name]) for name in labels if name in values}
    return PromptRow(place, values["prompt"], arguments, values.get("name"), values.get("seed"), told)


def _check_value(name: str, value: Any, labels: Collection[str]) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name in labels:
        return
    if name in (*TEXTS, "prompt", "name", "image") and not isinstance(value, str):
        raise ValueError(f"`{name}` must be a text, but is {value!r}.")
    if name == "seed" and not (isinstance(value, int) and is_number and 0 <= value < 2**63):
        raise ValueError(f"`seed` must be a whole number from 0 to 2^63 - 1, but is {value!r}.")
    if name in WHOLES and not (isinstance(value, int) and is_number):
        raise ValueError(f"`{name}` must be a whole number, but is {value!r}.")
    if name in WHOLES and value > WHOLES[name]:
        raise ValueError(f"`{name}={value}` must be at most {WHOLES[name]}.")
    if name in NUMBERS and not (is_number and math.isfinite(value)):
        raise ValueError(f"`{name}` must be a finite number, but is {value!r}.")
    if name in BOOLEANS and not isinstance(value, bool):
        raise ValueError(f"`{name}` must be true or false, but is {value!r}.")
    needed, known = {"anchors": ({"image"}, {"image", "frame_index", "strength"})}.get(
        name, ({"caption", "time"}, {"caption", "time"})
    )
    if name in _JSON and not (
        isinstance(value, list)
        and value
        and all(isinstance(item, dict) and needed <= item.keys() <= known for item in value)
    ):
        raise ValueError(f"`{name}` must be a list of objects with {', '.join(sorted(known))}, but is {value!r}.")


def _place(folder: Path, path: Any) -> str:
    if not isinstance(path, str) or not path:
        raise ValueError(f"`image` must be the path of a file, but is {path!r}.")
    return (folder / path).absolute().as_posix()
