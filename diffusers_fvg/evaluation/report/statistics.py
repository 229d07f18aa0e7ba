"""Computes means over seeds and paired differences between conditions.

The unit of a difference is the prompt. Two conditions use the same seeds for a prompt's videos, and the differences of these
videos are averaged first. So an interval describes the variation over prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ..suites.scores import Scores


CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Mean over seeds and the standard deviation (with denominator n - 1; `None` for one seed)."""

    mean: float
    deviation: float | None
    seeds: int


@dataclass(frozen=True)
class Difference:
    """Paired difference over `prompts` prompts. `low` and `high` are the ends of its 95 % confidence interval, or `None`."""

    mean: float
    low: float | None
    high: float | None
    prompts: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Sample:
    """Differences of prompts: their mean, the variance of that mean, and their number."""

    mean: float
    variance: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Sample:
        count = len(values)
        variance = float(np.var(values, ddof=1)) / count if count > 1 else math.nan
        return cls(float(np.mean(values)), variance, count)


def spread(values: Sequence[float]) -> Spread | None:
    """Returns mean and standard deviation of one value per seed; `None` without values."""
    if not values:
        return None
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(float(np.mean(values)), deviation, len(values))


def category_spread(seeds: Mapping[str, Scores], category: str) -> Spread | None:
    """Returns the spread of a category's score over the seeds that have one."""
    own = [scores.categories[category] for scores in seeds.values() if category in scores.categories]
    return spread([value.score for value in own if value.score is not None])


def total_spread(seeds: Mapping[str, Scores], total: str) -> Spread | None:
    """Returns the spread of an official total; `None` if a seed is incomplete."""
    values = [scores.totals[total] for scores in seeds.values() if total in scores.totals]
    return spread(values) if len(values) == len(seeds) else None


def prompt_differences(
    ours: Mapping[str, Scores], theirs: Mapping[str, Scores], category: str, prompt_of: Mapping[str, str]
) -> list[float]:
    """Returns for each prompt the mean of ours minus theirs over the videos that have a score in both.

    Args:
        ours, theirs (`Mapping[str, Scores]`): scores of two conditions by seed.
        category (`str`): category of the videos.
        prompt_of (`Mapping[str, str]`): index of the prompt by a video's official name.
    """
    values: dict[str, list[float]] = {}
    for seed, scores in ours.items():
        other = theirs.get(seed)
        if other is None or category not in scores.categories or category not in other.categories:
            continue
        there = other.categories[category].videos
        for name, value in scores.categories[category].videos.items():
            if name in there:
                values.setdefault(prompt_of.get(name, name), []).append(value - there[name])
    return [float(np.mean(same)) for same in values.values()]


def interval(weighted: Sequence[tuple[float, Sample]]) -> Difference | None:
    """Returns a weighted sum of independent means, with Student's t interval and Welch-Satterthwaite degrees of freedom.

    For one sample of weight 1 this is the usual paired t interval.

    Args:
        weighted (`Sequence[tuple[float, Sample]]`): weight and sample of each mean.
    """
    if not weighted:
        return None
    centre = math.fsum(weight * sample.mean for weight, sample in weighted)
    parts = [(weight**2 * sample.variance, sample.count) for weight, sample in weighted]
    variance, count = math.fsum(part for part, _ in parts), sum(sample.count for _, sample in weighted)
    if math.isnan(variance):
        return Difference(centre, None, None, count)
    if variance == 0:
        return Difference(centre, centre, centre, count)
    freedom = variance**2 / math.fsum(part**2 / (number - 1) for part, number in parts)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(variance)
    return Difference(centre, centre - half, centre + half, count)


def differences(
    ours: Mapping[str, Scores],
    theirs: Mapping[str, Scores],
    weights: Mapping[str, float],
    prompt_of: Mapping[str, str],
) -> dict[str | None, Difference | None]:
    """Returns the paired difference of each category, and under `None` that of the weighted total if every category has one."""
    samples = {}
    for category in weights:
        values = prompt_differences(ours, theirs, category, prompt_of)
        if values:
            samples[category] = Sample.of(values)
    found: dict[str | None, Difference | None] = {
        category: interval([(1.0, samples[category])]) if category in samples else None for category in weights
    }
    whole = len(samples) == len(weights)
    found[None] = interval([(weights[name], sample) for name, sample in samples.items()]) if whole else None
    return found
