"""The shapes world as a benchmark in the format of T2V-CompBench V2, with a scorer that reads pixels. Scores are synthetic.

The prompts are held out from training. `fvg shapes prompts` writes `prompts/` and `meta_data/`, `fvg shapes score` the result
files. Their names, scales and last rows are those of the official files, so that the same readers apply.
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


# Minimum and maximum of the official `Score`, for the categories where they are not 0 and 1.
SCALES = {"consistent_attr": (1, 15), "action_binding": (1, 10), "interaction": (1, 10)}


def write_prompts(folder: Path, per_category: int = 9, seed: int = 0) -> dict[str, int]:
    """Writes prompts of all categories, and the facts that the scorer needs.

    Args:
        folder (`Path`): folder for `prompts/1_consistent_attr.txt` and so on, and `meta_data/`.
        per_category (`int`): prompts of each category; some have fewer.
        seed (`int`): seed of the choice of prompts.

    Returns:
        `dict[str, int]`: number of prompts of each category.
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
    """Writes the result file of each category. The row of a missing video has no score.

    Args:
        videos (`Path`): folder with a folder for each category, such as `video/` of `fvg bench layout`.
        prompts (`Path`): output folder of [`write_prompts`].
        output (`Path`): folder for `<model>_consistent_attr_score.csv` and the other files.
        model (`str`): name of the model in the file names.

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
    """Reads frames `(F, H, W, 3)`, uint8, at the size in which they were generated; files are enlarged by integer factors."""
    frames, _ = read_video(path)
    factor = frames.shape[1] // (read_video_metadata(path).get("height") or frames.shape[1])
    return frames[:, factor // 2 :: factor, factor // 2 :: factor]


def read_scores(folder: Path) -> Scores:
    """Reads the scores that [`score_videos`] wrote. A row without a score is a missing video, and so a problem."""
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
