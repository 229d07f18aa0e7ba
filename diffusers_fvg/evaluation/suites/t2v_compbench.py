"""T2V-CompBench (arXiv 2407.14505): seven categories, with 100 prompts each in V1 and 200 in V2.

Source: github.com/KaiyueSun98/T2V-CompBench. V1 is branch `main` at 116f996, V2 (the CVPR 2025 paper and the leaderboard) is
branch `V2`. Their scores cannot be compared: V2 has other prompts and asks its judge models other questions.
"""

from __future__ import annotations

import csv
import math
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .scores import TOLERANCE, CategoryScore, Scores, check_present, mean
from .suite import Suite, SuitePrompt, published_file, read_json


@dataclass(frozen=True)
class Category:
    """A category of T2V-CompBench.

    Args:
        folder (`str`): folder of its videos.
        tables (`tuple[str, ...]`): suffixes of the names of its result files. The first file has the score row.
        value (`Callable`): maps a row's `Score` to the value that the mean is taken of.
    """

    folder: str
    tables: tuple[str, ...]
    value: Callable[[float], float]


def scaled(lowest: float, highest: float) -> Callable[[float], float]:
    return lambda score: (score - lowest) / (highest - lowest)


def adjusted_motion(score: float) -> float:
    """Returns the value of a raw score in V1's motion file; a score below 0 means that no object was found."""
    return 0.0 if score < 0 else 0.2 + 0.8 * score


def as_it_is(score: float) -> float:
    return score


# Folder of a category's videos, and its file in `meta_data/` with prompts and the evaluator's questions.
META = {
    "consistent_attr": "consistent_attribute_binding.json",
    "dynamic_attr": "dynamic_attribute_binding.json",
    "spatial_relationships": "spatial_relationships.json",
    "motion_binding": "motion_binding.json",
    "action_binding": "action_binding.json",
    "interaction": "object_interactions.json",
    "generative_numeracy": "generative_numeracy.json",
}
# `model_score` of `MLLM_eval/*.py`, `motion_binding_score_cal.py`, `combine_csv_and_cal_model_score`, `combine_frame`.
TABLES_V1 = {
    "consistent_attr": (("_consistent_attr_score.csv",), scaled(1, 5)),
    "dynamic_attr": (("_dynamic_attr_score.csv",), as_it_is),
    "spatial_relationships": (("_3dvideo.csv", "_2dvideo.csv"), as_it_is),
    "motion_binding": (("_score.csv",), adjusted_motion),
    "action_binding": (("_action_binding_score.csv",), scaled(0, 5)),
    "interaction": (("_object_interactions_score.csv",), scaled(1, 5)),
    "generative_numeracy": (("_numeracy_video.csv",), as_it_is),
}
# V2: `LLaVA/llava/eval/compbench_*.py`, `dot/compbench_*.py` and `Grounded-Segment-Anything/**/compbench_*.py`.
TABLES_V2 = {
    "consistent_attr": (("_consistent_attr_score.csv",), scaled(1, 15)),
    "dynamic_attr": (("_dynamic_attr_score.csv",), as_it_is),
    "spatial_relationships": (("_spatial_score.csv",), as_it_is),
    "motion_binding": (("_motion_score.csv",), as_it_is),
    "action_binding": (("_action_binding_score.csv",), scaled(1, 10)),
    "interaction": (("_object_interactions_score.csv",), scaled(1, 10)),
    "generative_numeracy": (("_numeracy_video.csv",), as_it_is),
}
# The judge models see grids of 16 frames, and the scripts read tables of frames 16 rows at a time.
MIN_FRAMES = 16
# Suffix of a further file that the leaderboard accepts.
MOTION_DETAILS = "_motion_back_fore.csv"


def categories(tables: dict) -> tuple[Category, ...]:
    return tuple(Category(name, *tables[name]) for name in META)


WEIGHTS = dict.fromkeys(META, 1 / len(META))
V1, V2 = categories(TABLES_V1), categories(TABLES_V2)


# -- prompts ----------------------------------------------------------------------------------------------------------


def read_meta(folder: Path, category: str) -> list[dict]:
    """Reads a category's file for the evaluators; the item at index i belongs to video i + 1."""
    return read_json(published_file(folder, f"meta_data/{META[category]}", META[category]), list)


def read_prompts(folder: Path, ratio: str | None = None) -> list[SuitePrompt]:
    """Reads the `prompt` of each item in `meta_data/`, which the evaluators use; `prompts/*.txt` differ in a few places."""
    return [
        SuitePrompt(str(item["prompt"]).strip(), category, (f"{category}/{number:04d}.mp4",))
        for category in META
        for number, item in enumerate(read_meta(folder, category), 1)
    ]


def places(category: str, name: str) -> list[str]:
    """Returns the place of a video. It is below `video/`, because the evaluators write other folders beside the categories."""
    return [f"video/{name}"]


# -- results ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A result file: the rows of videos, and the rows that begin with `score`."""

    path: Path
    rows: list[list[str]]
    score_rows: list[list[str]]


def read_table(path: Path) -> Table:
    # A judge model's answer may exceed the default field limit of `csv`, 128 KiB. The limit is that of the whole process.
    limit = csv.field_size_limit(2**31 - 1)
    try:
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            lines = [line for line in csv.reader(file) if line]
    finally:
        csv.field_size_limit(limit)
    is_score = [line[0].strip().lower().startswith("score") for line in lines]
    return Table(
        path,
        [line for line, found in zip(lines[1:], is_score[1:]) if not found],
        [line for line, found in zip(lines[1:], is_score[1:]) if found],
    )


def find_tables(folder: Path, category: Category, others: Sequence[Category]) -> dict[str, list[Path]]:
    """Returns for each file suffix of a category the files with this suffix, in the folder and below it."""
    longer = {end for other in others if other is not category for end in other.tables}
    found: dict[str, list[Path]] = {end: [] for end in category.tables}
    for path in sorted(folder.rglob("*.csv")):
        for end in category.tables:
            # The suffix of V1's motion file is also the end of other suffixes.
            if path.name.endswith(end) and not any(path.name.endswith(e) for e in longer if len(e) > len(end)):
                found[end].append(path)
    return found


def video_name(category: str, cell: str, row: int) -> str:
    """Returns the official name of a row's video: 7 for `0007.png` and `0007`; without a number, the row's position counts."""
    number = re.match(r"\d+", cell.strip().rsplit("/", 1)[-1])
    return f"{category}/{int(number[0]) if number else row:04d}.mp4"


def number_in(cell: str) -> float | None:
    """Parses a cell as a finite number; returns `None` for other texts such as `bad reply`."""
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def read_category(
    folder: Path, category: Category, known: Sequence[Category], expected: int | None, scores: Scores
) -> CategoryScore:
    """Reads the score of a category; adds problems and notes to `scores`."""
    result, name = CategoryScore(None, expected=expected), category.folder
    tables = []
    for end, paths in find_tables(folder, category, known).items():
        if len(paths) != 1:
            files = ", ".join(str(path.relative_to(folder)) for path in paths)
            problem = f"of {files}, keep one" if paths else f"no file *{end} in {folder}"
            scores.problems.append(f"{name}: {problem}.")
            return result
        tables.append(read_table(paths[0]))
    rows, unread = [row for table in tables for row in table.rows], 0
    for position, row in enumerate(rows, 1):
        video, cell = video_name(name, row[0], position), number_in(row[-1])
        if video in result.videos:
            scores.problems.append(f"{name}: {tables[0].path.name} has {video} twice.")
        if cell is None:
            unread += 1
        else:
            result.videos[video] = category.value(cell)
    if expected is not None and len(rows) != expected:
        scores.problems.append(f"{name}: {len(rows)} of {expected} videos are in {tables[0].path.name}.")
    if unread:
        scores.notes.append(f"{name}: {unread} of {len(rows)} rows have no score and are left out of the mean.")
    if result.videos:
        result.score = mean(result.videos.values())
    _check_score_row(name, tables[0], result, scores)
    return result


def _check_score_row(name: str, table: Table, result: CategoryScore, scores: Scores) -> None:
    """Adds a problem unless a table has one score row and this equals the mean of its rows.

    If an evaluator's script runs again in the same folder, it takes its own score row for a video's row.
    """
    if len(table.score_rows) > 1:
        scores.problems.append(
            f"{name}: {table.path.name} has {len(table.score_rows)} score rows: its script ran again in the same folder and "
            "took the first of them for a video. Run it once in an empty folder."
        )
        return
    said = number_in(table.score_rows[0][1]) if table.score_rows and len(table.score_rows[0]) > 1 else None
    if said is None:
        scores.problems.append(f"{name}: {table.path.name} has no score row, so its script did not finish.")
    elif result.score is None or not math.isclose(said, result.score, abs_tol=TOLERANCE):
        scores.problems.append(f"{name}: {table.path.name} says {said}, but its rows give {result.score}.")


def read_results(
    folder: Path, suite: str, known: Sequence[Category], expected: int | None, synthetic: bool = False
) -> Scores:
    """Reads the scores from the CSV files below a folder; the total is the unweighted mean of the seven categories."""
    scores = Scores(suite, synthetic=synthetic)
    for category in known:
        scores.categories[category.folder] = read_category(folder, category, known, expected, scores)
    check_present(scores)
    return scores.aggregate(
        {"average": mean(own.score for own in scores.categories.values() if own.score is not None)}
    )


def pack(folder: Path, output: Path, model: str) -> list[str]:
    """Writes the zip for the leaderboard: one folder with at most eight CSV files whose names begin with the model's name.

    Args:
        folder (`Path`): folder with the evaluator's CSV files.
        output (`Path`): path of the zip.
        model (`str`): name of the model.

    Returns:
        `list[str]`: missing categories, which the leaderboard allows.

    Raises:
        `ValueError`: the reader of a file reports a problem, or there is no file.
    """
    scores = Scores("t2v-compbench-v2")
    chosen, missing = {}, []
    for category in V2:
        (end,) = category.tables
        if not find_tables(folder, category, V2)[end]:
            missing.append(category.folder)
            continue
        read_category(folder, category, V2, None, scores)
        chosen[end] = next(iter(find_tables(folder, category, V2)[end]))
    if scores.problems:
        raise ValueError(f"{folder} cannot be submitted. {' '.join(scores.problems)}")
    if not chosen:
        raise ValueError(f"{folder} holds no result of T2V-CompBench V2; run its evaluate.sh first.")
    details = sorted(folder.rglob(f"*{MOTION_DETAILS}"))
    if "_motion_score.csv" in chosen and len(details) == 1:
        chosen[MOTION_DETAILS] = details[0]
    with zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED) as archive:
        for end, path in chosen.items():
            archive.write(path, f"{model}/{model}{end}")
    return missing


T2V_COMPBENCH_V1 = Suite(
    name="t2v-compbench-v1",
    title="T2V-CompBench V1",
    read_prompts=read_prompts,
    read_scores=partial(read_results, suite="t2v-compbench-v1", known=V1, expected=100),
    places=places,
    weights=WEIGHTS,
    min_frames=MIN_FRAMES,
    source="github.com/KaiyueSun98/T2V-CompBench, branch main, 116f996",
    prompt_digest="dfcfb5d6891ea06c0102d0077376d5f46cbd5db108cb394545d2f3ca96f939ff",
)
T2V_COMPBENCH_V2 = Suite(
    name="t2v-compbench-v2",
    title="T2V-CompBench V2",
    read_prompts=read_prompts,
    read_scores=partial(read_results, suite="t2v-compbench-v2", known=V2, expected=200),
    places=places,
    weights=WEIGHTS,
    min_frames=MIN_FRAMES,
    source="github.com/KaiyueSun98/T2V-CompBench, branch V2",
    prompt_digest="dbd2f1ae8ac61a765392c6761ffe2156d090db84f7961b43fe879da81a66733c",
    # V2's scripts find a prompt by the four digits of a file name, V1's by the position of the name in the sorted list.
    skips_missing=True,
    pack=pack,
)
