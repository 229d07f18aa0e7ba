"""The shapes world as a benchmark: files like those of T2V-CompBench V2, and a scorer that reads pixels. Scores are synthetic.

Prompts are held out from training. `fvg shapes prompts` writes `prompts/` and `meta_data/`, `fvg shapes score` the result files, with
the names, scales and last rows of the official ones, so that the readers of those read these.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

from ..evaluation.suites.scores import Scores
from ..evaluation.suites.suite import Suite
from ..evaluation.suites.t2v_compbench import (
    META,
    TABLES_V2,
    V2,
    WEIGHTS,
    places,
    read_meta,
    read_prompts,
    read_results,
)
from ..media import read_video, read_video_metadata
from .held_out import held_out_scenes
from .prompts import CATEGORIES
from .scorer import score_video


# Of the official `Score`, of those that are not in [0, 1] already.
SCALES = {"consistent_attr": (1, 15), "action_binding": (1, 10), "interaction": (1, 10)}


def write_prompts(folder: Path, per_category: int = 9, seed: int = 0) -> dict[str, int]:
    """Writes prompts of all categories and what their scorer has to know.

    Args:
        folder (`Path`): gets `prompts/1_consistent_attr.txt` and so on, and `meta_data/`.
        per_category (`int`): prompts of each; some categories have fewer.
        seed (`int`): other prompts for another.

    Returns:
        `dict[str, int]`: category to the number of its prompts.
    """
    counts = {}
    for number, category in enumerate(META, 1):
        scenes = held_out_scenes(per_category, seed, (category,))
        counts[category] = len(scenes)
        items = [{"prompt": scene.prompt, **scene.meta} for scene in scenes]
        for path, text in (
            (folder / "prompts" / f"{number}_{category}.txt", "\n".join(scene.prompt for scene in scenes) + "\n"),
            (folder / "meta_data" / META[category], json.dumps(items, indent=1) + "\n"),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return counts


def score_videos(videos: Path, prompts: Path, output: Path, model: str) -> dict[str, float]:
    """Writes the result file of each category; a video that is not there has no number in its row.

    Args:
        videos (`Path`): with a folder for each category, as `fvg bench layout` makes `video/`.
        prompts (`Path`): as [`write_prompts`] wrote it.
        output (`Path`): for `<model>_consistent_attr_score.csv` and the others.
        model (`str`): in the files' names.

    Returns:
        `dict[str, float]`: mean score of each category that has videos.
    """
    items_of = {category: read_meta(prompts, category) for category in CATEGORIES}
    output.mkdir(parents=True, exist_ok=True)
    means = {}
    for category, items in items_of.items():
        (end,), value = TABLES_V2[category]
        low, high = SCALES.get(category, (0, 1))
        rows: list[list] = [["name", "prompt", "Score"]]
        for number, item in enumerate(items, 1):
            path = videos / category / f"{number:04d}.mp4"
            score = "no video"
            if path.is_file():
                score = low + (high - low) * score_video(_frames(path), category, item)
            rows.append([path.stem, item["prompt"], score])
        scores = [value(row[-1]) for row in rows[1:] if row[-1] != "no video"]
        if scores:
            means[category] = sum(scores) / len(scores)
            rows.append(["score: ", means[category]])
        with open(output / f"{model}{end}", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    return means


def _frames(path: Path) -> np.ndarray:
    """`(F, H, W, 3)` uint8, at the size that the video was made in: small ones are written enlarged by whole factors."""
    frames, _ = read_video(path)
    factor = frames.shape[1] // (read_video_metadata(path).get("height") or frames.shape[1])
    return frames[:, factor // 2 :: factor, factor // 2 :: factor]


def read_scores(folder: Path) -> Scores:
    """Scores of what [`score_videos`] wrote: a row without a number is a video that is missing."""
    scores = read_results(folder, "shapes", V2, expected=None, synthetic=True)
    scores.problems, scores.notes = [*scores.problems, *scores.notes], []
    return scores.aggregate(scores.totals)


SHAPES = Suite(
    name="shapes",
    title="Coloured shapes (synthetic)",
    read_prompts=read_prompts,
    read_scores=read_scores,
    places=places,
    weights=WEIGHTS,
    source="fvg shapes prompts",
    skips_missing=True,
    synthetic=True,
)
