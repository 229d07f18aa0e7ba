"""Scores of a suite's official evaluator for one condition and seed, and the reasons why their total is not official."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ...atomic import replacing


# Tolerance between an evaluator's mean and ours. Evaluators write all digits of a float; summation order changes the last few.
TOLERANCE = 1e-6


@dataclass
class CategoryScore:
    """The score of a category.

    Args:
        score (`float`, *optional*): score by the official formula; `None` if it is missing.
        videos (`dict[str, float]`): value of each video in that score, by its official name.
        expected (`int`, *optional*): number of videos that the evaluator must have scored; `None` if it is not known.
    """

    score: float | None
    videos: dict[str, float] = field(default_factory=dict)
    expected: int | None = None


@dataclass
class Scores:
    """Scores of one condition and seed on one suite.

    Args:
        suite (`str`): name of the suite, including its version.
        categories (`dict[str, CategoryScore]`): scores of the categories, in the suite's order.
        totals (`dict[str, float]`): official aggregates, groups first and the total last; empty unless the scores are
            complete.
        problems (`list[str]`): reasons why the aggregates are not official, one sentence each.
        notes (`list[str]`): other remarks for the reader.
        synthetic (`bool`): whether the videos show the drawn shapes world.
    """

    suite: str
    categories: dict[str, CategoryScore] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    synthetic: bool = False

    @property
    def means(self) -> dict[str, float]:
        """Score of each category that has one. If the scores are complete, all categories have one."""
        return {name: own.score for name, own in self.categories.items() if own.score is not None}

    @property
    def complete(self) -> bool:
        return not self.problems

    def aggregate(self, totals: Mapping[str, float]) -> Scores:
        """Sets the totals if the scores are complete, and clears them otherwise."""
        self.totals = {name: float(value) for name, value in totals.items()} if self.complete else {}
        return self


def mean(values: Iterable[float]) -> float:
    """Returns the mean of values, NaN if there are none."""
    values = list(values)
    return math.fsum(values) / len(values) if values else math.nan


def check_present(scores: Scores) -> None:
    """Adds a problem for each category without a score."""
    for name, category in scores.categories.items():
        if category.score is None and not any(problem.startswith(f"{name}: ") for problem in scores.problems):
            scores.problems.append(f"{name}: there is no score.")


def write_scores(path: Path, scores: Mapping[str, Scores]) -> None:
    """Writes the scores of several conditions and seeds to a file, completely or not at all."""
    values = {arm: asdict(own) | {"complete": own.complete} for arm, own in scores.items()}
    with replacing(path) as draft:
        draft.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_scores(path: Path) -> dict[str, Scores]:
    """Reads the scores that [`write_scores`] wrote.

    Raises:
        `ValueError`: the file has another form.
    """
    try:
        arms = json.loads(path.read_text(encoding="utf-8"))
        for values in arms.values():
            values.pop("complete")
            values["categories"] = {name: CategoryScore(**own) for name, own in values["categories"].items()}
        return {arm: Scores(**values) for arm, values in arms.items()}
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"{path} is not a file that `fvg bench read` wrote ({error!r}); run that command again."
        ) from error
