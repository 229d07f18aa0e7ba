import PIL.Image
import pytest

from diffusers_fvg.compose.candidates import AnchorCandidate, best_candidate, candidate_seeds, draw_candidates
from diffusers_fvg.compose.judge import AnchorJudge


class Drawing:
    """Draws pictures whose red is the last digit of their seed, and notes what it was asked for."""

    def __init__(self, stop_after=None):
        self.rounds, self.stop_after = [], stop_after

    def __call__(self, numbers, seeds):
        self.rounds.append(list(numbers))
        kept = seeds if self.stop_after is None or len(self.rounds) < self.stop_after else seeds[:1]
        return [PIL.Image.new("RGB", (2, 2), (seed % 10, 0, 0)) for seed in kept]


def by_red(images, caption, plan):
    return [image.getpixel((0, 0))[0] for image in images]


def test_the_first_candidate_has_the_seed_of_a_single_picture():
    seeds = candidate_seeds(7, 4)
    assert seeds[0] == 7 and len(set(seeds)) == 4
    # More of them go on from fewer.
    assert candidate_seeds(7, 2) == seeds[:2] and candidate_seeds(7, 1) == [7]


@pytest.mark.parametrize(
    ("threshold", "rounds"),
    [
        # Good enough at once; drawn in vain 1, then 1, then 2; no threshold: all at once.
        (0, [[0, 1]]),
        (10, [[0, 1], [0, 1], [0, 0, 1, 1]]),
        (None, [[0, 0, 0, 0, 1, 1, 1, 1]]),
    ],
)
def test_rounds_draw_as_many_as_there_are(threshold, rounds):
    draw = Drawing()
    found = draw_candidates(draw, AnchorJudge(function=by_red, threshold=threshold), ["a", "b"], None, [3, 4], 4)
    assert draw.rounds == rounds
    for seed, candidates in zip((3, 4), found):
        assert [candidate.seed for candidate in candidates] == candidate_seeds(seed, len(candidates))
        assert [candidate.score for candidate in candidates] == [candidate.seed % 10 for candidate in candidates]


def test_only_captions_without_a_good_picture_are_drawn_again():
    seeds = {seed: candidate_seeds(seed, 8) for seed in range(40)}
    poor = next(
        seed for seed, drawn in seeds.items() if max(each % 10 for each in drawn[:2]) < 9 and drawn[2] % 10 == 9
    )
    draw = Drawing()
    found = draw_candidates(draw, AnchorJudge(function=by_red, threshold=9), ["a", "b"], None, [9, poor], 8)
    assert draw.rounds == [[0, 1], [1], [1, 1]]
    assert [len(candidates) for candidates in found] == [1, 4] and best_candidate(found[1]).score == 9


def test_the_best_is_kept_and_the_first_of_equals():
    image = PIL.Image.new("RGB", (1, 1))
    candidates = [AnchorCandidate(image, seed, score) for seed, score in enumerate((0.2, 0.7, 0.7))]
    assert best_candidate(candidates).seed == 1


@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_stop_keeps_what_was_drawn_and_judged(stop_after):
    draw = Drawing(stop_after)
    found = draw_candidates(draw, AnchorJudge(function=by_red, threshold=10), ["a", "b"], None, [3, 4], 4)
    assert len(draw.rounds) == stop_after and [len(candidates) for candidates in found] == [stop_after, stop_after - 1]


def test_plans_go_to_the_judge_with_their_captions():
    seen = []

    def function(images, caption, plan):
        seen.append((len(images), caption, plan))
        return [0.0] * len(images)

    draw_candidates(Drawing(), AnchorJudge(function=function), ["a", "b"], ["plan of a", None], [1, 2], 2)
    assert seen == [(2, "a", "plan of a"), (2, "b", None)]


def test_judging_is_done_by_who_asked():
    order = []

    def judging(work):
        order.append("judge")
        return work()

    draw = Drawing()
    draw_candidates(draw, AnchorJudge(function=by_red, threshold=10), ["a"], None, [1], 2, judging)
    assert order == ["judge"] * 2


def test_nothing_is_judged_where_nothing_was_drawn():
    judge = AnchorJudge(function=lambda images, caption, plan: 1 / 0)
    judge.judge = lambda *given: 1 / 0
    assert draw_candidates(lambda numbers, seeds: [], judge, ["a", "b"], None, [3, 4], 4) == [[], []]
