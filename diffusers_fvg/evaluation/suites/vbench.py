"""Code that VBench-2.0 and VBench-I2V share: names of videos, result files, and the zip for the leaderboard.

Source: github.com/Vchitect/VBench at bc76d35, `VBench-2.0/vbench2/__init__.py`, `vbench2_beta_i2v/__init__.py`,
`VBench-2.0/scripts/cal_final_score.py` and `scripts/cal_i2v_final_score.py`.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .scores import CategoryScore, Scores
from .suite import read_json


# The evaluator truncates a prompt to this many characters, keeps blanks at the end, and adds the sample's number.
CUT = 180


def video_names(prompt: str, samples: int) -> tuple[str, ...]:
    return tuple(f"{prompt[:CUT]}-{sample}.mp4" for sample in range(samples))


def find_results(folder: Path, dimensions: Mapping[str, int], scores: Scores) -> dict[str, tuple[Path, list[Any]]]:
    """Returns the result file and the entry of each dimension, from all JSON files below a folder that hold an object.

    If a dimension has several files, the official script takes the last one of a directory listing, whose order is
    undefined. Here this is a problem.
    """
    found: dict[str, list[tuple[Path, list[Any]]]] = {}
    for path in sorted(folder.rglob("*.json")):
        content = read_json(path, object)
        for dimension, entry in content.items() if isinstance(content, dict) else ():
            if dimension in dimensions and isinstance(entry, list) and entry:
                found.setdefault(dimension, []).append((path, entry))
    for dimension, entries in found.items():
        if len(entries) > 1:
            files = ", ".join(str(path.relative_to(folder)) for path, _ in entries)
            scores.problems.append(f"{dimension}: of {files}, keep one.")
    return {dimension: entries[0] for dimension, entries in found.items() if len(entries) == 1}


def read_dimensions(folder: Path, dimensions: Mapping[str, int], scores: Scores) -> None:
    """Adds a category for each dimension to `scores`, with the score in its file.

    Args:
        folder (`Path`): folder with the evaluator's files.
        dimensions (`Mapping[str, int]`): number of results that each dimension must have.
        scores ([`Scores`]): receives categories and problems.
    """
    results = find_results(folder, dimensions, scores)
    for dimension, expected in dimensions.items():
        category = scores.categories[dimension] = CategoryScore(None, expected=expected)
        if dimension not in results:
            continue
        path, entry = results[dimension]
        if isinstance(entry[0], (int, float)) and math.isfinite(entry[0]):
            category.score = float(entry[0])
        # The entry of camera motion in VBench-I2V has means per kind of motion before the list.
        listed = entry[-1] if isinstance(entry[-1], list) else []
        try:
            videos = [(Path(item["video_path"]).name, float(item["video_results"])) for item in listed]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a result of {dimension} ({error!r}); evaluate this dimension again."
            ) from error
        category.videos = dict(videos)
        if len(category.videos) != len(videos):
            scores.problems.append(f"{dimension}: {path.name} has a video twice.")
        if len(listed) != expected:
            scores.problems.append(f"{dimension}: {len(listed)} of {expected} results are in {path.name}.")


def pack(folder: Path, output: Path, dimensions: Mapping[str, int]) -> list[str]:
    """Writes the zip for the leaderboard, with each dimension's file directly in a folder of its name.

    `evaluate.sh` of VBench-2.0 puts the file into a further folder with the model's name. The scoring script does not open
    that folder and would count the dimension as 0.

    Returns:
        `list[str]`: missing dimensions, which the leaderboard counts as 0.

    Raises:
        `ValueError`: a dimension has several files, or there is no file.
    """
    scores = Scores("")
    results = find_results(folder, dimensions, scores)
    if scores.problems or not results:
        raise ValueError(f"{folder} cannot be submitted. {' '.join(scores.problems) or 'It holds no result.'}")
    with zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED) as archive:
        for dimension, (path, _) in results.items():
            archive.write(path, f"{dimension}/{path.name}")
    return [dimension for dimension in dimensions if dimension not in results]
