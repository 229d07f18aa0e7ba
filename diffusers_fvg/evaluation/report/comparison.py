"""Computes the numbers of a report: each condition's scores over seeds, and its paired differences from the baseline."""

from __future__ import annotations

from dataclasses import dataclass

from .gather import Condition, Gathered
from .statistics import Difference, Spread, category_spread, differences, total_spread


@dataclass
class Comparison:
    """Comparison of a run's conditions.

    Args:
        baseline (`str`): condition that the others are compared with.
        total (`str`, *optional*): name of the official total; `None` if no condition is complete.
        spreads (`dict[str, dict[str, Spread | None]]`): for each row, the score of each condition. The rows are the
            categories, followed by the aggregates.
        differences (`dict[str, dict[str, Difference | None]]`): for each category and the total, the difference of each
            condition from the baseline.
        problems (`dict[str, list[str]]`): for each condition and seed, the reasons why its totals are not official.
        notes (`dict[str, list[str]]`): for each condition and seed, other remarks.
    """

    baseline: str
    total: str | None
    spreads: dict[str, dict[str, Spread | None]]
    differences: dict[str, dict[str, Difference | None]]
    problems: dict[str, list[str]]
    notes: dict[str, list[str]]

    def best(self, row: str) -> list[str]:
        """Returns the conditions with the highest score in a row, compared as printed; an empty list if all are equal."""
        scored = {name: round(own.mean, 3) for name, own in self.spreads[row].items() if own is not None}
        best = [name for name, value in scored.items() if value == max(scored.values())]
        return best if len(best) < len(scored) else []


def compare(gathered: Gathered, baseline: str | None) -> Comparison:
    """Compares the conditions that have scores.

    Raises:
        `ValueError`: the baseline is unknown or has no scores.
    """
    scored = {name: own for name, own in gathered.conditions.items() if own.scores}
    if baseline is not None and baseline not in scored:
        raise ValueError(f"--baseline {baseline} must be one of {', '.join(scored) or 'conditions with scores'}.")
    baseline = baseline or next(iter(scored), "")
    told = {
        f"{name}, seed {seed}": own for name, condition in scored.items() for seed, own in condition.scores.items()
    }
    aggregates = list(dict.fromkeys(name for own in told.values() for name in own.totals))
    spreads = {
        category: {name: category_spread(own.scores, category) for name, own in scored.items()}
        for category in (gathered.suite.weights if scored else ())
    }
    spreads |= {total: {name: total_spread(own.scores, total) for name, own in scored.items()} for total in aggregates}
    total = aggregates[-1] if aggregates else None
    return Comparison(
        baseline,
        total,
        spreads,
        _differences(gathered, scored, baseline, total),
        {name: own.problems for name, own in told.items() if own.problems},
        {name: own.notes for name, own in told.items() if own.notes},
    )


def _differences(
    gathered: Gathered, scored: dict[str, Condition], baseline: str, total: str | None
) -> dict[str, dict[str, Difference | None]]:
    """Returns the differences of each category, and of the total if both sides are complete."""
    rows: dict[str, dict[str, Difference | None]] = {}
    for name, own in scored.items():
        if name == baseline:
            continue
        theirs = scored[baseline].scores
        found = differences(own.scores, theirs, gathered.suite.weights, gathered.prompt_of)
        whole = all(scores.complete for seeds in (own.scores, theirs) for scores in seeds.values())
        overall = found.pop(None)
        for category, difference in found.items():
            assert category is not None
            rows.setdefault(category, {})[name] = difference
        if total is not None:
            rows.setdefault(total, {})[name] = overall if whole else None
    return {category: rows[category] for category in (*gathered.suite.weights, total) if category in rows}


def steps_series(gathered: Gathered, comparison: Comparison) -> dict[str, dict[int, Spread]]:
    """Returns the total of each arm by number of steps. Of several conditions with the same arm and steps, the first counts."""
    series: dict[str, dict[int, Spread]] = {}
    for name, condition in gathered.conditions.items():
        own = comparison.spreads.get(comparison.total or "", {}).get(name)
        if own is not None and condition.steps is not None:
            series.setdefault(condition.arm, {}).setdefault(condition.steps, own)
    return series
