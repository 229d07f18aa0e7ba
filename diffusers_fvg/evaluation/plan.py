"""The plan of a run: one line for each video, written before anything is computed and read as a stream."""

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
# In an output folder these hold no videos.
RESERVED = {"captions", "manifest", "stages", "temporary", PLAN, PLAN_FACTS, RUN_FACTS}
# Of a name on Linux, macOS and Windows.
MAX_NAME_BYTES = 255
_FIELDS = {"path": str, "prompt": str, "seed": int, "arguments": dict, "labels": dict}
_DRIVE = re.compile(r"[A-Za-z]:")


@dataclass(frozen=True)
class PlannedVideo:
    """One video of a plan.

    Args:
        path (`str`): of the video, relative to the output folder, with `/` between folders, ending in `.mp4`; unique in a plan.
        prompt (`str`): what should happen.
        seed (`int`): of the video, as [`derive_seed`] makes it: the same whichever worker computes the video, and when.
        arguments (`dict`): for the pipeline's call, values of JSON: mode, preset, num_frames, height, width, image (a path),
            composer_num_candidates and so on.
        labels (`dict[str, str]`): suite, category, arm, sample and the like; reports group by them.
    """

    path: str
    prompt: str
    seed: int
    arguments: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line, without the end of line; the same for equal videos."""
        values = {name: getattr(self, name) for name in _FIELDS}
        for name in ("arguments", "labels"):
            values[name] = dict(sorted(values[name].items()))
        return json.dumps(values, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> PlannedVideo:
        """The video of a line.

        Raises:
            `ValueError`: no JSON, or not the fields of a video.
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
    """The seed of one video of a plan, in [0, 2^53), which every reader of JSON keeps exactly.

    Args:
        seed (`int`): of the plan.
        prompt_index (`int`): of the prompt in its file or suite. Arms that are compared take the same.
        sample (`int`): of the prompt's videos.
    """
    digest = hashlib.sha256(f"{seed}|{prompt_index}|{sample}".encode()).digest()
    return int.from_bytes(digest[:7], "big") >> 3


def check_path(path: str) -> None:
    """A planned video's path stays in the output folder and can be a file's name.

    Raises:
        `ValueError`: naming the path.
    """
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in path or "\0" in path or _DRIVE.match(path):
        raise ValueError(f"`path` {path!r} must be relative to the output folder, as 'videos/0001.mp4' is")
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
    """Writes `plan.jsonl`, a line for each video, and then `plan.json`, which says what made it.

    The rows are never held together: of each only 16 bytes stay, so that no path comes twice. The same rows give the same
    bytes. A plan that is there stays where it is the same.

    Args:
        folder (`str` or `os.PathLike`): the output folder; made if it is not there.
        rows (iterable of [`PlannedVideo`]): the videos.
        made_by (mapping, *optional*): values of JSON for `plan.json`: model, revision, versions, seed.

    Returns:
        `dict`: what `plan.json` holds: `made_by`, `videos` (how many) and `sha256` of `plan.jsonl`.

    Raises:
        `ValueError`: a path twice or one that leaves the folder, no rows, or another plan that is there.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if (folder / PLAN_FACTS).is_file():
            # It stays; the rows are compared with it.
            count, digest = _write_rows(Path(os.devnull), rows)
        else:
            with replacing(folder / PLAN) as draft:
                count, digest = _write_rows(draft, rows)
        facts = {"plan_version": VERSION, "videos": count, "sha256": digest, **(made_by or {})}
        return keep_facts(folder / PLAN_FACTS, facts)
    finally:
        if is_new and not any(folder.iterdir()):
            # Of rows that were refused nothing stays.
            folder.rmdir()


def keep_facts(path: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a file of facts, or finds the same in the one that is there; packages may have been updated since.

    Raises:
        `ValueError`: it says something else.
    """
    if path.is_file():
        there = json.loads(path.read_text(encoding="utf-8"))
        differ = [name for name in {**there, **facts} if name != "versions" and there.get(name) != facts.get(name)]
        if differ:
            # Of a plan that differs in more than its bytes, the cause.
            name = min(differ, key=("sha256", "videos").__contains__)
            raise ValueError(
                f"{path} says that the videos there are of another plan or model: `{name}` was {there.get(name)!r} and is now "
                f"{facts.get(name)!r}; choose another folder."
            )
        return there
    text = json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8", newline="\n")
    return dict(facts)


def _write_rows(draft: Path, rows: Iterable[PlannedVideo]) -> tuple[int, str]:
    """Number of rows, and SHA-256 of the file."""
    seen: set[bytes] = set()
    whole = hashlib.sha256()
    with open(draft, "wb") as file:
        for row in rows:
            check_path(row.path)
            key = hashlib.blake2b(row.path.encode(), digest_size=16).digest()
            if key in seen:
                raise ValueError(f"the plan has two videos called {row.path!r}; each needs a path of its own.")
            seen.add(key)
            line = row.to_json().encode() + b"\n"
            whole.update(line)
            file.write(line)
    if not seen:
        raise ValueError("the plan has no videos.")
    return len(seen), whole.hexdigest()


def read_plan(folder: str | os.PathLike) -> Iterator[PlannedVideo]:
    """The videos of the plan in an output folder, one at a time.

    Raises:
        `ValueError`: no plan there, or a line that is damaged, with its number.
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
    """What `plan.json` holds.

    Raises:
        `ValueError`: no plan there, or one of another version.
    """
    path = Path(folder) / PLAN_FACTS
    if not path.is_file():
        raise ValueError(f"{folder} holds no plan ({PLAN_FACTS}).")
    facts = json.loads(path.read_text(encoding="utf-8"))
    if facts.get("plan_version") != VERSION:
        raise ValueError(f"{path} is of version {facts.get('plan_version')}, and this program reads {VERSION}.")
    return facts
