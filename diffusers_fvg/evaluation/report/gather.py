"""Collects the data of a report: a run's conditions with times, memory and failures, and some of its videos."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...media import read_video_metadata
from ..manifest import read_manifest
from ..plan import PlannedVideo, plan_facts, read_plan
from ..suites.layout import condition_folder
from ..suites.scores import Scores, read_scores
from ..suites.suite import Suite
from ..worker import STAGES_FILE, stages_folder


# Statuses of manifest lines. If a video has several lines, the one whose status comes last here counts.
TELLING = ("failed", "found", "made")


@dataclass
class Condition:
    """Data of one condition of a run.

    Args:
        name, arm (`str`): names of the condition and of its arm in the plan.
        planned, finished (`int`): number of planned and of finished videos.
        steps (`int`, *optional*): number of sampling steps by the metadata of a video.
        all_seconds (`dict[str, list[float]]`): for each stage, the seconds of each video that recorded them.
        memory_bytes (`int`): most memory that a worker used.
        failures (`dict[str, str]`): for each missing video, the reason.
        motion (`list[float]`): for each video, the share of the picture that changes.
        scores (`dict[str, Scores]`): scores by seed.
        made_with (`dict`): metadata of one of its videos: model, preset and versions.
    """

    name: str
    arm: str
    planned: int = 0
    finished: int = 0
    steps: int | None = None
    all_seconds: dict[str, list[float]] = field(default_factory=dict)
    memory_bytes: int = 0
    motion: list[float] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)
    made_with: dict[str, Any] = field(default_factory=dict)


@dataclass
class Shown:
    """A video of the gallery: its condition, file and caption, and the images of stage 2 with the judge's scores."""

    condition: str
    path: Path
    caption: str | None
    anchors: list[Path]
    candidates: list[tuple[Path, float | None]]


@dataclass
class Exhibit:
    """A prompt of the gallery, with its video in each condition."""

    category: str
    index: str
    prompt: str
    videos: list[Shown]


@dataclass
class Gathered:
    """All data of a report."""

    suite: Suite
    facts: dict[str, Any]
    conditions: dict[str, Condition]
    prompt_of: dict[str, str]
    gallery: list[Exhibit]


def gather(run: Path, suites: Mapping[str, Suite], scores_file: Path | None, gallery: int) -> Gathered:
    """Reads plan, manifest and scores.

    Args:
        run (`Path`): output folder of the run.
        suites (`Mapping[str, Suite]`): suites by name.
        scores_file (`Path`, *optional*): output file of [`write_scores`].
        gallery (`int`): number of prompts to show, taken from the categories in turn.

    Raises:
        `ValueError`: the folder holds no run of a suite, or the scores belong to another suite or run.
    """
    facts = plan_facts(run)
    if facts.get("suite") not in suites:
        raise ValueError(f"{run} holds no run of a suite: begin one with `fvg bench plan`.")
    suite = suites[facts["suite"]]
    scores = {} if scores_file is None else read_scores(scores_file)
    other = next((own.suite for own in scores.values() if own.suite != suite.name), None)
    if other is not None:
        raise ValueError(
            f"{scores_file} holds scores of {other}, but {run} is a run of {suite.name}; name the scores of this run."
        )
    lines: dict[str, dict[str, Any]] = {}
    for line in sorted(read_manifest(run), key=lambda line: TELLING.index(line["status"])):
        lines[line["path"]] = line
    conditions: dict[str, Condition] = {}
    prompt_of: dict[str, str] = {}
    first: dict[str, dict[str, PlannedVideo]] = {}
    unused = dict(scores)
    for video in read_plan(run):
        name = video.labels["condition"]
        condition = conditions.setdefault(name, Condition(name, video.labels["arm"]))
        prompt_of[video.labels["name"]] = video.labels["index"]
        _count(condition, video, run, lines.get(video.path, {}))
        folder = condition_folder(video)
        if folder in unused:
            condition.scores[video.labels["seed"]] = unused.pop(folder)
        if video.labels["sample"] == "0":
            first.setdefault(video.labels["index"], {}).setdefault(condition.name, video)
    if unused:
        raise ValueError(
            f"{scores_file} holds scores of {min(unused)}, which the plan of {run} does not have; name the scores of this run."
        )
    shown = _spread_out(list(first.values()))[:gallery]
    return Gathered(suite, facts, conditions, prompt_of, [_exhibit(run, videos) for videos in shown])


def _count(condition: Condition, video: PlannedVideo, run: Path, line: Mapping[str, Any]) -> None:
    condition.planned += 1
    path = run / video.path
    if not path.is_file():
        condition.failures[video.path] = line.get("error", "not made yet")
        return
    condition.finished += 1
    condition.motion += [] if line.get("motion") is None else [line["motion"]]
    condition.memory_bytes = max(condition.memory_bytes, line.get("memory_bytes") or 0)
    seconds = dict(line.get("seconds") or {})
    if "total" in seconds:
        composed = _stages(run, video).get("seconds") or 0.0
        seconds = {"compose": composed} | seconds if composed else seconds
        seconds["total"] += composed
    for stage, spent in seconds.items():
        condition.all_seconds.setdefault(stage, []).append(spent)
    if not condition.made_with:
        record = read_video_metadata(path)
        condition.made_with, condition.steps = record, record.get("num_inference_steps")


def _stages(run: Path, video: PlannedVideo) -> dict[str, Any]:
    """Returns the record of stage 2 for a video, empty if stage 2 did not draw for it."""
    path = stages_folder(run, video) / STAGES_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _spread_out(prompts: Sequence[dict[str, PlannedVideo]]) -> list[dict[str, PlannedVideo]]:
    """Orders prompts so that the first of each category come first, then the second of each, and so on."""
    ranks: dict[str, int] = {}
    ranked = []
    for videos in prompts:
        category = next(iter(videos.values())).labels["category"]
        ranks[category] = ranks.get(category, 0) + 1
        ranked.append((ranks[category], videos))
    return [videos for _, videos in sorted(ranked, key=lambda pair: pair[0])]


def _exhibit(run: Path, videos: Mapping[str, PlannedVideo]) -> Exhibit:
    shown = []
    for condition, video in videos.items():
        path = run / video.path
        if not path.is_file():
            continue
        caption, stages = read_video_metadata(path).get("first_frame_prompt"), stages_folder(run, video)
        values = _stages(run, video)
        anchors = [stages / name for name in values.get("anchors") or ()]
        candidates = [(stages / own["file"], own["score"]) for own in values.get("candidates") or ()]
        shown.append(Shown(condition, path, caption, anchors, candidates))
    first = next(iter(videos.values()))
    return Exhibit(first.labels["category"], first.labels["index"], first.prompt, shown)
