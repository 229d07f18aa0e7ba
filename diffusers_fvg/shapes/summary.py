"""Computes means, spreads and claims from the records of a study. All numbers are synthetic.

A record is a dict with `arm`, `steps`, `category`, `prompt`, `seed` and measured values. An average is the unweighted mean of
the categories' means, so that a category with fewer prompts has the same weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


# Categories whose score measures motion or actions.
MOTION_CATEGORIES = ("motion_binding", "action_binding", "interaction")
VALUES = ("score", "motion", "first_frame", "anchor_iou", "caption_score", "anchor_score", "stage_seconds")


def select(records: Sequence[dict], arm: str, steps: int) -> list[dict]:
    return [record for record in records if record["arm"] == arm and record["steps"] == steps]


def _groups(records: Sequence[dict], *names: str) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in names), []).append(record)
    return groups


def _mean(records: Sequence[dict], value: str) -> float:
    return float(np.mean([record[value] for record in records]))


def category_means(records: Sequence[dict], value: str = "score") -> dict[str, float]:
    return {category: _mean(group, value) for (category,), group in _groups(records, "category").items()}


def average(records: Sequence[dict], value: str = "score") -> float:
    """Returns the mean of the categories' means."""
    return float(np.mean(list(category_means(records, value).values())))


def seed_spread(records: Sequence[dict], value: str = "score") -> float:
    """Returns the standard deviation of a prompt's score over seeds (denominator n - 1), averaged over the prompts of each
    category and then over categories. NaN with one seed."""
    spreads: dict[str, list[float]] = {}
    for (category, _), group in _groups(records, "category", "prompt").items():
        values = [record[value] for record in group]
        spreads.setdefault(category, []).append(float(np.std(values, ddof=1)) if len(values) > 1 else math.nan)
    return float(np.mean([np.mean(values) for values in spreads.values()]))


def standard_error(records: Sequence[dict], value: str = "score") -> float:
    """Returns the standard error of `average` over prompts; a sample is a prompt's mean over seeds. NaN if a category has one
    prompt."""
    variances = []
    for group in _groups(records, "category").values():
        means = [_mean(same, value) for same in _groups(group, "prompt").values()]
        variances.append(float(np.var(means, ddof=1)) / len(means) if len(means) > 1 else math.nan)
    return math.sqrt(sum(variances)) / len(variances)


def difference(ours: Sequence[dict], theirs: Sequence[dict], value: str = "score") -> dict[str, float | None]:
    """Returns the average of `ours` minus that of `theirs` on the same prompts and seeds: `value`, and `error` over the prompts'
    differences."""
    differences = [
        {name: our[name] for name in ("category", "prompt")} | {value: our[value] - their[value]}
        for our, their in zip(ours, theirs, strict=True)
    ]
    return {"value": rounded(average(differences, value)), "error": rounded(standard_error(differences, value))}


def kept_share(records: Sequence[dict]) -> float:
    """Returns the share of videos of static-attribute prompts whose first and last frame show exactly the prompt's objects."""
    return _mean([record for record in records if "kept" in record], "kept")


def rounded(number: float) -> float | None:
    """Rounds to four decimals; returns `None` for NaN, which JSON does not have."""
    return None if math.isnan(number) else round(number, 4)


def summarize(records: Sequence[dict]) -> list[dict]:
    """Returns one row for each arm and number of steps: averages, spread over seeds, standard error, means per category."""
    rows = []
    for (arm, steps), group in _groups(records, "arm", "steps").items():
        row = {"arm": arm, "steps": steps, "videos": len(group), "seconds": round(_mean(group, "seconds"), 3)}
        for value in VALUES:
            chosen = [record for record in group if value in record]
            if chosen:
                row[value] = rounded(average(chosen, value))
        row["kept"] = rounded(kept_share(group))
        row |= {"spread": rounded(seed_spread(group)), "standard_error": rounded(standard_error(group))}
        row["categories"] = {
            category: {"score": round(_mean(same, "score"), 4), "motion": round(_mean(same, "motion"), 4)}
            for (category,), same in _groups(group, "category").items()
        }
        rows.append(row)
    return rows


def _claim(claim: str, measure: str, value: float, relation: str, bar: float | None, beside: str = "") -> dict:
    """Returns a row of the claims table. The rounded value decides whether the target (`bar`) is met."""
    value = rounded(value)
    met = None
    if bar is not None and value is not None:
        met = value >= bar if relation == ">=" else value <= bar
    return {"claim": claim, "measure": measure, "value": value, "relation": relation, "bar": bar, "met": met} | (
        {"beside": beside} if beside else {}
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def claims(records: Sequence[dict], few: int, full: int) -> list[dict]:
    """Returns the claims of the study, each with its value, its target (`bar`) and `met`.

    `met` is `None` for a value without a target, and for one that cannot be computed, such as a spread of one seed.

    Args:
        records (`Sequence[dict]`): records of the study.
        few, full (`int`): reduced and full number of steps.
    """
    direct = {steps: select(records, "direct", steps) for steps in (few, full)}
    factorized = {steps: select(records, "factorized", steps) for steps in (few, full)}
    score = {
        name: {steps: average(arm[steps]) for steps in arm}
        for name, arm in (("direct", direct), ("factorized", factorized))
    }
    rows = []

    here = score["factorized"][few]
    both = f"factorized {here:.3f} at {few} steps, direct {score['direct'][full]:.3f} at {full}"
    if score["direct"][full] > 0.85:
        rows.append(_claim("the anchor pays", "factorized, as direct leaves less than 0.15", here, ">=", 0.95, both))
    else:
        gain = here - score["direct"][full]
        rows.append(_claim("the anchor pays", "factorized minus direct", gain, ">=", 0.15, both))

    loss = {name: values[full] - values[few] for name, values in score.items()}
    beside = f"direct loses {loss['direct']:.3f}"
    rows.append(
        _claim("steps can go", f"factorized loses from {full} to {few} steps", loss["factorized"], "<=", 0.02, beside)
    )
    motion = {steps: average(factorized[steps], "motion") for steps in (few, full)}
    change = abs(_ratio(motion[few], motion[full]) - 1)
    beside = f"{motion[full]:.3f} of the frame at {full} steps, {motion[few]:.3f} at {few}"
    rows.append(_claim("steps can go", "change of factorized's motion amount", change, "<=", 0.1, beside))

    first, without = (select(records, arm, few) for arm in ("true_anchor", "true_anchor_no_lora"))
    claim = "the LoRA teaches the anchor"
    rows.append(_claim(claim, "frame 0 with the true anchor", average(first, "first_frame"), ">=", 0.95))
    rows.append(_claim(claim, "share that keeps colour and shape", kept_share(first), ">=", 0.9))
    for measure, value in (
        ("frame 0 without the LoRA", average(without, "first_frame")),
        ("share that keeps colour and shape without it", kept_share(without)),
        ("score without the LoRA", average(without)),
    ):
        rows.append(_claim(claim, measure, value, "", None, "reported"))

    moving = [record for record in first if record["category"] in MOTION_CATEGORIES]
    for arm, place in (("true_middle", "middle"), ("true_last", "last")):
        other = select(records, arm, few)
        other_moving = [record for record in other if record["category"] in MOTION_CATEGORIES]
        for what, here, there in (
            ("motion score", average(moving), average(other_moving)),
            ("share kept", kept_share(first), kept_share(other)),
        ):
            beside = f"first {here:.3f}, {place} {there:.3f}"
            rows.append(
                _claim("any position", f"{what} lost by the true {place} frame", here - there, "<=", 0.05, beside)
            )

    spread = {steps: seed_spread(direct[steps]) for steps in (few, full)}
    own = seed_spread(factorized[few])
    beside = f"factorized {own:.3f} at {few} steps, direct {spread[few]:.3f} at {few} and {spread[full]:.3f} at {full}"
    ratio = _ratio(own, min(spread.values()))
    rows.append(_claim("seeds", "factorized's spread over direct's smaller one", ratio, "<=", 0.5, beside))

    rows.append(_claim("stage 1", "caption F1", average(factorized[few], "caption_score"), ">=", 0.95))
    rows.append(_claim("the whole", f"factorized at {few} steps", score["factorized"][few], ">=", 0.8))
    return rows + judge_claims(records, few)


def judge_claims(records: Sequence[dict], few: int) -> list[dict]:
    """Returns the claims about anchors that the judge chose, none if there are no such records."""
    judged, without, true = (select(records, arm, few) for arm in ("factorized_judged", "factorized", "true_anchor"))
    if not judged:
        return []
    claim, here, beside = "anchors are chosen", average(judged), f"without the judge {average(without):.3f}"
    rows = [_claim(claim, f"factorized with the judge at {few} steps", here, ">=", 0.965, beside)]

    def counts(group: Sequence[dict]) -> float:
        return category_means(group)["generative_numeracy"]

    rows.append(_claim(claim, "counting", counts(judged), ">=", 0.96, f"without the judge {counts(without):.3f}"))
    overlaps = [
        [r for r in group if any(f" {word} " in r["prompt"] for word in ("in front of", "behind"))]
        for group in (judged, true)
    ]
    if all(overlaps):
        ours, theirs = (_mean(group, "score") for group in overlaps)
        beside = f"{ours:.3f}, with true anchors {theirs:.3f}"
        rows.append(_claim(claim, "in front / behind lost to true anchors", theirs - ours, "<=", 0.01, beside))
    return rows
