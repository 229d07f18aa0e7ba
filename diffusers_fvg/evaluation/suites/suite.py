"""What a benchmark is to this package: prompts, official names, places of its evaluator, and readers of its results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .scores import Scores


@dataclass(frozen=True)
class SuitePrompt:
    """A prompt of a suite.

    Args:
        text (`str`): what the video is made from, as it is published.
        category (`str`): where its scores count; several, joined by `+`, where its videos count in each.
        names (`tuple[str, ...]`): one official name for each of its videos, with `/` between folders.
        image (`str`, *optional*): path of the picture that the video starts from.
    """

    text: str
    category: str
    names: tuple[str, ...]
    image: str | None = None


@dataclass(frozen=True)
class Suite:
    """A benchmark.

    Args:
        name (`str`): on the command line and in every result, the version in it.
        title (`str`): in reports.
        read_prompts (`Callable`): the prompts of a folder with the published files, in published order. `ratio` of pictures
            where the suite has pictures.
        read_scores (`Callable`): [`Scores`] of a folder with the evaluator's files.
        places (`Callable`): where the evaluator looks for the video of a category and a name; several, where it counts in
            several categories.
        source (`str`): where the published files are from that this was checked with.
        weights (`Mapping[str, float]`): of the categories in the last of the official totals, which is linear in them.
        min_frames (`int`): that its evaluator takes from a video.
        skips_missing (`bool`): the evaluator leaves out a video that is not there. Others stop, or take the next for it.
        prompt_digest (`str`, *optional*): of those prompts, as [`prompt_digest`] makes it.
        has_images (`bool`): videos start from published pictures; stages 1 and 2 have nothing to do.
        pack (`Callable`, *optional*): writes what its leaderboard takes from an evaluator's files, and returns the names of the
            categories that are not in it.
        synthetic (`bool`): scores are of a drawn world and compare with nothing else.
    """

    name: str
    title: str
    read_prompts: Callable[..., list[SuitePrompt]]
    read_scores: Callable[[Path], Scores]
    places: Callable[[str, str], list[str]]
    source: str
    weights: Mapping[str, float]
    min_frames: int = 1
    skips_missing: bool = False
    prompt_digest: str | None = None
    has_images: bool = False
    pack: Callable[[Path, Path, str], list[str]] | None = None
    synthetic: bool = False


def prompt_digest(prompts: Sequence[SuitePrompt]) -> str:
    """SHA-256 of the texts, categories and names, one prompt after the other."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.text, prompt.category, *prompt.names]).encode())
    return digest.hexdigest()


def published_file(folder: Path, *places: str) -> Path:
    """The first of `places` that is there, relative to a checkout or to a part of it.

    Raises:
        `ValueError`: none is.
    """
    found = next((folder / place for place in places if (folder / place).is_file()), None)
    if found is None:
        raise ValueError(f"--prompts {folder} holds no {places[0]}; name the checkout of the benchmark's repository.")
    return found


def read_json(path: Path, kind: type) -> Any:
    """The value of a JSON file.

    Raises:
        `ValueError`: no JSON, or of another kind, naming the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a {kind.__name__}.")
    return value
