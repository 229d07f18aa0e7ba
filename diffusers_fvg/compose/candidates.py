"""The choice among pictures: candidates are drawn until the judge finds one good enough, and the best is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import PIL.Image
import torch

from .judge import Judge


@dataclass(frozen=True)
class AnchorCandidate:
    """A picture that was drawn for a caption.

    Args:
        image (`PIL.Image.Image`): the picture.
        seed (`int`): draws it again: `compose(caption, generator=torch.Generator().manual_seed(seed), num_candidates=1)`.
        score (`float`): of the judge, the higher the better.
        answers (`dict[str, float]` or `None`): question -> probability of a yes, of a judge that asks.
    """

    image: PIL.Image.Image
    seed: int
    score: float
    answers: dict[str, float] | None = None


def candidate_seeds(seed: int, count: int) -> list[int]:
    """Seeds of the candidates of one picture: its own seed, and others that follow from it."""
    generator = torch.Generator().manual_seed(seed)
    return [seed, *torch.randint(2**31, (count - 1,), generator=generator).tolist()]


def best_candidate(candidates: Sequence[AnchorCandidate]) -> AnchorCandidate:
    """The one with the highest score, the first of equals."""
    return max(candidates, key=lambda candidate: candidate.score)


def draw_candidates(
    draw: Callable[[list[int], list[int]], list[PIL.Image.Image]],
    judge: Judge,
    captions: Sequence[str],
    plans: Sequence[Any] | None,
    seeds: Sequence[int],
    num_candidates: int,
    judging: Callable[[Callable[[], list]], list] = lambda work: work(),
) -> list[list[AnchorCandidate]]:
    """Draws and judges pictures of each caption until one is good enough.

    A round draws, for each caption that has no such picture yet, as many as it has by then: at the most as many in vain as
    there were before, and composer and judge take few turns on the device. A judge without a threshold sees all in one round.

    Args:
        draw (`Callable`): `draw(numbers, seeds)` gives a picture of each of the captions with these numbers; fewer when stopped.
        judge ([`Judge`]): scores them.
        captions (`Sequence[str]`): what is drawn.
        plans (`Sequence`, *optional*): of stage 1, one for each caption.
        seeds (`Sequence[int]`): of the first candidate of each caption.
        num_candidates (`int`): the most for each caption.
        judging (`Callable`, *optional*): runs the judge's work.

    Returns:
        `list[list[AnchorCandidate]]`: of each caption in the order of drawing; none of those that were not drawn when stopped.
    """
    all_seeds = [candidate_seeds(seed, num_candidates) for seed in seeds]
    found: list[list[AnchorCandidate]] = [[] for _ in captions]
    pending = list(range(len(captions)))
    while pending:
        wanted = {
            number: num_candidates if judge.threshold is None else max(1, len(found[number])) for number in pending
        }
        numbers, chosen = [], []
        for number in pending:
            begin = len(found[number])
            drawn = all_seeds[number][begin : begin + wanted[number]]
            numbers += [number] * len(drawn)
            chosen += drawn
        images = draw(numbers, chosen)
        if not images:
            break
        numbers = numbers[: len(images)]
        texts = [captions[number] for number in numbers]
        given = None if plans is None else [plans[number] for number in numbers]
        judgements = judging(partial(judge.judge, images, texts, given))
        for number, seed, image, judgement in zip(numbers, chosen, images, judgements):
            found[number].append(AnchorCandidate(image, seed, judgement.score, judgement.answers))
        if len(images) < len(chosen):
            break
        pending = [
            number
            for number in pending
            if len(found[number]) < num_candidates and not _is_good_enough(found[number], judge.threshold)
        ]
    return found


def _is_good_enough(candidates: Sequence[AnchorCandidate], threshold: float | None) -> bool:
    return threshold is not None and best_candidate(candidates).score >= threshold
