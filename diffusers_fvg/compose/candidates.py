"""Draws anchor candidates until the judge accepts one, and keeps the best."""

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
    """An image that was drawn for a caption, with its score.

    Args:
        image (`PIL.Image.Image`): the image.
        seed (`int`): reproduces the image:
            `compose(caption, generator=torch.Generator().manual_seed(seed), num_candidates=1)`.
        score (`float`): score of the judge; higher is better.
        answers (`dict[str, float]` or `None`): question -> probability of "yes", if the judge asks questions.
    """

    image: PIL.Image.Image
    seed: int
    score: float
    answers: dict[str, float] | None = None


def candidate_seeds(seed: int, count: int) -> list[int]:
    """Returns the seeds of `count` candidates: `seed` itself, and others that are derived from it."""
    generator = torch.Generator().manual_seed(seed)
    return [seed, *torch.randint(2**31, (count - 1,), generator=generator).tolist()]


def best_candidate(candidates: Sequence[AnchorCandidate]) -> AnchorCandidate:
    """Returns the candidate with the highest score; the first one if several have it."""
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
    """Draws and judges images of each caption until one reaches the judge's threshold.

    Each round doubles the number of candidates of the captions without such an image (1, 2, 4, ...). So at most as many
    images are drawn in vain as were needed, and composer and judge alternate on the device only a few times. For a judge
    without a threshold, all candidates are drawn in one round.

    Args:
        draw (`Callable`): `draw(numbers, seeds)` returns one image for each of these caption numbers; fewer when stopped.
        judge ([`Judge`]): scores the images.
        captions (`Sequence[str]`): captions to draw.
        plans (`Sequence`, *optional*): plan of stage 1 for each caption.
        seeds (`Sequence[int]`): seed of the first candidate of each caption.
        num_candidates (`int`): largest number of candidates for each caption.
        judging (`Callable`, *optional*): `judging(work)` calls `work()`, which runs the judge, and returns its result.

    Returns:
        `list[list[AnchorCandidate]]`: candidates of each caption in the order of drawing; empty for captions that were not
            drawn because of a stop.
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
