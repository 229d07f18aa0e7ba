"""Spreads and paired differences, against scipy's own intervals and by hand."""

import math
import re

import numpy as np
import pytest
from scipy import stats

from diffusers_fvg.evaluation.report.charts import PALETTE, colours, differences_chart, ticks
from diffusers_fvg.evaluation.report.statistics import (
    Difference,
    Sample,
    differences,
    interval,
    prompt_differences,
    spread,
    total_spread,
)
from diffusers_fvg.evaluation.suites.scores import CategoryScore, Scores


VALUES = np.random.default_rng(0).normal(0.1, 0.3, (2, 12)).tolist()


def scores(**videos):
    return Scores("s", {name: CategoryScore(float(np.mean(list(own.values()))), own) for name, own in videos.items()})


def test_an_interval_of_one_category_is_the_paired_t_interval():
    own = interval([(1.0, Sample.of(VALUES[0]))])
    wanted = stats.ttest_1samp(VALUES[0], 0).confidence_interval(0.95)
    assert (own.mean, own.low, own.high) == pytest.approx((np.mean(VALUES[0]), wanted.low, wanted.high))
    assert own.prompts == 12 and own.is_clear == (wanted.low > 0 or wanted.high < 0)


def test_an_interval_of_two_categories_is_welchs():
    """The difference of two means is their sum with weights 1 and -1."""
    short = VALUES[1][:5]
    own = interval([(1.0, Sample.of(VALUES[0])), (-1.0, Sample.of(short))])
    wanted = stats.ttest_ind(VALUES[0], short, equal_var=False).confidence_interval(0.95)
    assert (own.low, own.high) == pytest.approx((wanted.low, wanted.high))


def test_no_interval_where_there_is_none():
    alone = interval([(1.0, Sample.of([0.25]))])
    assert (alone.mean, alone.low, alone.high, alone.is_clear) == (0.25, None, None, False)
    same = interval([(1.0, Sample.of([0.25, 0.25]))])
    assert (same.low, same.high, same.is_clear) == (0.25, 0.25, True)
    below = interval([(1.0, Sample.of([-0.25, -0.25]))])
    assert (below.low, below.high, below.is_clear) == (-0.25, -0.25, True)
    assert interval([]) is None


def test_videos_of_a_prompt_are_averaged_before_prompts_are_compared():
    """Prompt 0 has two videos, and both have two seeds: its four differences are one."""
    prompt_of = {"a-0": "0", "a-1": "0", "b-0": "1"}
    ours = {"0": scores(c={"a-0": 1.0, "a-1": 0.5, "b-0": 0.2}), "1": scores(c={"a-0": 0.5, "a-1": 0.5, "b-0": 0.4})}
    theirs = {"0": scores(c={"a-0": 0.5, "a-1": 0.5, "b-0": 0.1}), "1": scores(c={"a-0": 0.5, "a-1": 0.0, "b-0": 0.1})}
    own = prompt_differences(ours, theirs, "c", prompt_of)
    assert own == pytest.approx([(0.5 + 0.0 + 0.0 + 0.5) / 4, (0.1 + 0.3) / 2])
    # A seed or a video that one side lacks is in no pair.
    del theirs["1"], theirs["0"].categories["c"].videos["a-1"]
    assert prompt_differences(ours, theirs, "c", prompt_of) == pytest.approx([0.5, 0.1])


def test_the_total_is_weighted_and_needs_every_category():
    prompt_of = {name: name for name in "abcd"}
    ours = {"0": scores(first={"a": 0.9, "b": 0.7}, second={"c": 0.5, "d": 0.1})}
    theirs = {"0": scores(first={"a": 0.5, "b": 0.5}, second={"c": 0.4, "d": 0.4})}
    own = differences(ours, theirs, {"first": 0.25, "second": 0.75}, prompt_of)
    assert own["first"].mean == pytest.approx(0.3) and own["second"].mean == pytest.approx(-0.1)
    assert own[None].mean == pytest.approx(0.25 * 0.3 - 0.75 * 0.1)
    theirs["0"].categories["second"].videos.clear()
    own = differences(ours, theirs, {"first": 0.25, "second": 0.75}, prompt_of)
    assert own["second"] is None and own[None] is None and own["first"] is not None


def test_the_spread_is_over_seeds():
    own = spread([0.2, 0.4])
    assert (own.mean, own.deviation, own.seeds) == pytest.approx((0.3, math.sqrt(0.02), 2))
    assert spread([0.2]).deviation is None and spread([]) is None
    complete, incomplete = Scores("s", totals={"total": 0.4}), Scores("s", problems=["c: there is no score."])
    assert total_spread({"0": complete, "1": complete}, "total").mean == 0.4
    assert total_spread({"0": complete, "1": incomplete}, "total") is None


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (-0.37, 0.42), (0.91, 0.95), (12.0, 260.0), (0.3, 0.3), (0.0, 0.0)]
)
def test_ticks_are_round_and_hold_all_values(low, high):
    own = ticks(low, high)
    steps = {round(b - a, 9) for a, b in zip(own, own[1:])}
    assert own[0] <= low and own[-1] >= high and own[-1] > own[0] and len(steps) == 1 and len(own) <= 9
    assert f"{steps.pop():.9e}".replace(".", "").rstrip("0").split("e")[0].strip("0") in {"1", "2", "5"}


def test_every_arm_has_a_colour_of_its_own():
    found = list(colours([str(number) for number in range(14)]).values())
    assert found[:7] == list(PALETTE) and len(set(found)) == 14
    # Half way to white: (0 + 255) / 2, (114 + 255) / 2, (178 + 255) / 2.
    assert found[7] == "#80B8D8"


def test_the_axis_of_differences_spans_what_it_shows_and_zero():
    rows = {"motion": {"a": Difference(0.02, 0.01, 0.03, 9), "b": Difference(0.04, 0.03, 0.05, 9)}}
    for sign in (1, -1):
        turned = {
            "motion": {
                name: Difference(*(sign * end for end in (own.mean, own.low, own.high)), 9)
                for name, own in rows["motion"].items()
            }
        }
        chart = differences_chart(turned, {"a": "red", "b": "blue"}, "ours against theirs")
        marks = [float(text) for text in re.findall(r">([+-]?[\d.]+)</text>", chart)]
        assert sorted(sign * mark for mark in marks) == [0.0, 0.01, 0.02, 0.03, 0.04, 0.05]
