"""Description of a benchmark: its prompts, official file names, its evaluator's folders, and readers of its results."""

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
        text (`str`): the published prompt.
        category (`str`): category in which its scores count, or several, joined by `+`.
        names (`tuple[str, ...]`): official name of each of its videos, with `/` between folders.
        image (`str`, *optional*): path of the image that the video starts from.
    """

    text: str
    category: str
    names: tuple[str, ...]
    image: str | None = None


@dataclass(frozen=True)
class Suite:
    """A benchmark.

    Args:
        name (`str`): name on the command line and in results, including the version.
        title (`str`): name in reports.
        read_prompts (`Callable`): `read_prompts(folder, ratio)` reads the prompts from a folder with the published files, in
            published order. `ratio` selects the images of a suite that has images.
        read_scores (`Callable`): `read_scores(folder)` reads [`Scores`] from a folder with the evaluator's files.
        places (`Callable`): `places(category, name)` returns the paths where the evaluator expects a video, one for each
            category in which it counts.
        source (`str`): repository and commit of the published files that this package was checked with.
        weights (`Mapping[str, float]`): weights of the categories in the last of the official totals, which is linear in them.
        min_frames (`int`): least number of frames that the evaluator needs.
        skips_missing (`bool`): whether the evaluator leaves out missing videos. Others stop or score the wrong video.
        prompt_digest (`str`, *optional*): [`prompt_digest`] of the published prompts.
        has_images (`bool`): whether videos start from published images, so that stages 1 and 2 are not used.
        pack (`Callable`, *optional*): `pack(folder, output, model)` writes the file for the suite's leaderboard, and returns
            the categories that are missing in it.
        synthetic (`bool`): whether the videos show the drawn shapes world, so that scores compare with no other benchmark.
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
    """Returns the SHA-256 of the texts, categories and names of the prompts, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.text, prompt.category, *prompt.names]).encode())
    return digest.hexdigest()


def published_file(folder: Path, *places: str) -> Path:
    """Returns the first existing file of `places`, which are relative to a checkout or to a part of it.

    Raises:
        `ValueError`: none exists.
    """
    found = next((folder / place for place in places if (folder / place).is_file()), None)
    if found is None:
        raise ValueError(f"--prompts {folder} holds no {places[0]}; name the checkout of the benchmark's repository.")
    return found


def read_json(path: Path, kind: type) -> Any:
    """Reads a JSON file.

    Raises:
        `ValueError`: the file is not JSON, or its value is not of type `kind`; the message names the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download or create it again.") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a {kind.__name__}; download or create it again.")
    return value
