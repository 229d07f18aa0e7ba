"""Scores of one arm on one suite, as its official evaluator wrote them, and what keeps their aggregate from being official."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ...atomic import replacing


# An evaluator writes all digits of a float; a sum in another order changes the last few.
TOLERANCE = 1e-6


@dataclass
class CategoryScore:
    """The score of a category.

    Args:
        score (`float`, *optional*): by the official formula; `None` where it cannot be had.
        videos (`dict[str, float]`): official name of a video to its part in that score.
        expected (`int`, *optional*): how many the evaluator must have looked at; `None` where no list says so.
    """

    score: float | None
    videos: dict[str, float] = field(default_factory=dict)
    expected: int | None = None


@dataclass
class Scores:
    """Scores of one arm on one suite.

    Args:
        suite (`str`): its name, the version in it.
        categories (`dict[str, CategoryScore]`): in the suite's order.
        totals (`dict[str, float]`): official aggregates, groups first; empty unless the scores are complete.
        problems (`list[str]`): what keeps an aggregate from being official, a sentence each.
        notes (`list[str]`): what a reader should know besides.
        synthetic (`bool`): of a drawn world.
    """

    suite: str
    categories: dict[str, CategoryScore] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    synthetic: bool = False

    @property
    def means(self) -> dict[str, float]:
        """The scores of the categories that have one, which are all of them where the scores are complete."""
        return {name: own.score for name, own in self.categories.items() if own.score is not None}

    @property
    def complete(self) -> bool:
        return not self.problems

    def aggregate(self, totals: Mapping[str, float]) -> Scores:
        """Keeps the totals where nothing is missing, and drops them otherwise."""
        self.totals = {name: float(value) for name, value in totals.items()} if self.complete else {}
        return self


def mean(values: Iterable[float]) -> float:
    """NaN of none."""
    values = list(values)
    return math.fsum(values) / len(values) if values else math.nan


def check_present(scores: Scores) -> None:
    """A problem for each category without a score."""
    for name, category in scores.categories.items():
        if category.score is None and not any(problem.startswith(f"{name}: ") for problem in scores.problems):
            scores.problems.append(f"{name}: there is no score.")


def write_scores(path: Path, scores: Mapping[str, Scores]) -> None:
    """Writes the scores of several arms, whole or not at all."""
    values = {arm: asdict(own) | {"complete": own.complete} for arm, own in scores.items()}
    with replacing(path) as draft:
        draft.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_scores(path: Path) -> dict[str, Scores]:
    """The scores that [`write_scores`] wrote.

    Raises:
        `ValueError`: another file.
    """
    try:
        arms = json.loads(path.read_text(encoding="utf-8"))
        for values in arms.values():
            values.pop("complete")
            values["categories"] = {name: CategoryScore(**own) for name, own in values["categories"].items()}
        return {arm: Scores(**values) for arm, values in arms.items()}
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{path} is no file of `fvg bench read` ({error!r}).") from error
