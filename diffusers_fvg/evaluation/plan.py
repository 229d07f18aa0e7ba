"""The plan of a run: a file with one line per video, written before anything is computed and read line by line."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..atomic import replacing


PLAN, PLAN_FACTS, RUN_FACTS = "plan.jsonl", "plan.json", "run.json"
VERSION = 1
# Names in an output folder that hold no videos.
RESERVED = {"captions", "manifest", "stages", "temporary", PLAN, PLAN_FACTS, RUN_FACTS}
# Limit of a file name on Linux, macOS and Windows.
MAX_NAME_BYTES = 255
_FIELDS = {"path": str, "prompt": str, "seed": int, "arguments": dict, "labels": dict}
_DRIVE = re.compile(r"[A-Za-z]:")


@dataclass(frozen=True)
class PlannedVideo:
    """One video of a plan.

    Args:
        path (`str`): path of the video, relative to the output folder, with `/` between folders, ending in `.mp4`; unique in
            a plan.
        prompt (`str`): what should happen in the video.
        seed (`int`): seed of the video, from [`derive_seed`]. It does not depend on which worker computes the video, and when.
        arguments (`dict`): arguments of the pipeline's call as JSON values: mode, preset, num_frames, height, width, image (a
            path), composer_num_candidates and so on.
        labels (`dict[str, str]`): labels by which reports group videos: suite, category, arm (the compared variant), sample
            and the like.
    """

    path: str
    prompt: str
    seed: int
    arguments: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Returns the video's line without a line feed; equal videos give equal lines."""
        values = {name: getattr(self, name) for name in _FIELDS}
        for name in ("arguments", "labels"):
            values[name] = dict(sorted(values[name].items()))
        return json.dumps(values, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> PlannedVideo:
        """Parses a line of a plan.

        Raises:
            `ValueError`: the line is not a JSON object, or its fields are not those of a video.
        """
        values = json.loads(line)
        if not isinstance(values, dict) or values.keys() != _FIELDS.keys():
            raise ValueError(f"the line must be an object of {', '.join(_FIELDS)}")
        for name, kind in _FIELDS.items():
            if not isinstance(values[name], kind) or isinstance(values[name], bool):
                raise ValueError(f"`{name}` must be {kind.__name__}, but is {values[name]!r}")
        video = cls(**values)
        check_path(video.path)
        return video


def derive_seed(seed: int, prompt_index: int, sample: int = 0) -> int:
    """Returns the seed of one video of a plan, in [0, 2^53), a range that every JSON parser represents exactly.

    Args:
        seed (`int`): seed of the plan.
        prompt_index (`int`): index of the prompt in its file or suite, the same in all variants that are compared.
        sample (`int`): index among the prompt's videos.
    """
    digest = hashlib.sha256(f"{seed}|{prompt_index}|{sample}".encode()).digest()
    return int.from_bytes(digest[:7], "big") >> 3


def check_path(path: str) -> None:
    """Checks that a planned video's path stays in the output folder and is a valid file name.

    Raises:
        `ValueError`: the path is not valid; the message names it.
    """
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in path or "\0" in path or _DRIVE.match(path):
        raise ValueError(f"`path` {path!r} must be relative to the output folder, such as 'videos/0001.mp4'")
    if not path.endswith(".mp4"):
        raise ValueError(f"`path` {path!r} must end in .mp4")
    if parts[0] in RESERVED:
        raise ValueError(f"`path` {path!r} begins with {parts[0]!r}, where the run keeps its own files")
    long = next((part for part in parts if len(part.encode(errors="surrogatepass")) > MAX_NAME_BYTES), None)
    if long is not None:
        raise ValueError(f"`path` has a name of more than {MAX_NAME_BYTES} bytes, starting {long[:40]!r}; shorten it")


def write_plan(
    folder: str | os.PathLike, rows: Iterable[PlannedVideo], made_by: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Writes `plan.jsonl`, a line for each video, and then `plan.json`, the facts about the plan.

    Rows are written one at a time; only 16 bytes of each stay in memory, to detect duplicate paths. Equal rows give an equal
    file. If the folder already holds the same plan, it is kept.

    Args:
        folder (`str` or `os.PathLike`): the output folder; created if it does not exist.
        rows (iterable of [`PlannedVideo`]): the videos.
        made_by (mapping, *optional*): JSON values for `plan.json`: model, revision, versions, seed.

    Returns:
        `dict`: content of `plan.json`: `plan_version`, `videos` (their number), `sha256` of `plan.jsonl`, and `made_by`'s
        items.

    Raises:
        `ValueError`: there are no rows, a path is not valid or occurs twice, or the folder holds another plan.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if (folder / PLAN_FACTS).is_file():
            # The existing plan is kept, and the rows are compared with it.
            count, digest = _write_rows(Path(os.devnull), rows)
        else:
            with replacing(folder / PLAN) as draft:
                count, digest = _write_rows(draft, rows)
        facts = {"plan_version": VERSION, "videos": count, "sha256": digest, **(made_by or {})}
        return keep_facts(folder / PLAN_FACTS, facts)
    finally:
        if is_new and not any(folder.iterdir()):
            # The rows were refused, so the new folder is removed.
            folder.rmdir()


def keep_facts(path: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a file of facts, or checks that an existing file holds the same facts; only `versions` may differ.

    Raises:
        `ValueError`: the existing file holds other facts.
    """
    if path.is_file():
        there = json.loads(path.read_text(encoding="utf-8"))
        differ = [name for name in {**there, **facts} if name != "versions" and there.get(name) != facts.get(name)]
        if differ:
            # A changed argument is more telling than the checksum or the number of videos, which follow from it.
            name = min(differ, key=("sha256", "videos").__contains__)
            raise ValueError(
                f"{path} belongs to another plan or model: `{name}` was {there.get(name)!r} and is now "
                f"{facts.get(name)!r}; choose another folder."
            )
        return there
    text = json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8", newline="\n")
    return dict(facts)


def _write_rows(draft: Path, rows: Iterable[PlannedVideo]) -> tuple[int, str]:
    """Writes the rows to a file; returns their number and the SHA-256 of the file."""
    seen: set[bytes] = set()
    whole = hashlib.sha256()
    with open(draft, "wb") as file:
        for row in rows:
            check_path(row.path)
            key = hashlib.blake2b(row.path.encode(), digest_size=16).digest()
            if key in seen:
                raise ValueError(f"the plan has two videos with the path {row.path!r}; give each its own.")
            seen.add(key)
            line = row.to_json().encode() + b"\n"
            whole.update(line)
            file.write(line)
    if not seen:
        raise ValueError("the plan has no videos.")
    return len(seen), whole.hexdigest()


def read_plan(folder: str | os.PathLike) -> Iterator[PlannedVideo]:
    """Yields the videos of the plan in an output folder.

    Raises:
        `ValueError`: the folder has no plan, or a line is damaged; the message gives its number.
    """
    plan_facts(folder)
    path = Path(folder) / PLAN
    # Only a line feed ends a line: prompts may hold other line separators.
    with open(path, encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            try:
                yield PlannedVideo.from_json(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}.") from error


def plan_facts(folder: str | os.PathLike) -> dict[str, Any]:
    """Returns the content of `plan.json`.

    Raises:
        `ValueError`: the folder has no plan, or one of another version.
    """
    path = Path(folder) / PLAN_FACTS
    if not path.is_file():
        raise ValueError(f"{folder} holds no plan ({PLAN_FACTS}).")
    facts = json.loads(path.read_text(encoding="utf-8"))
    if facts.get("plan_version") != VERSION:
        raise ValueError(
            f"{path} has `plan_version` {facts.get('plan_version')}, but this program reads version {VERSION}; make the plan "
            "again in another folder."
        )
    return facts
