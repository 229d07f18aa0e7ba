"""Stage 2 of a pipeline with a judge, in which composer and judge alternate on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch

from ..checks import MAX_COUNT, check_at_least_one
from ..compose.candidates import AnchorCandidate, best_candidate, draw_candidates
from ..rewrite.storyboard import Moment


if TYPE_CHECKING:
    from .request import VideoRequest
    from .stages import FactorizedStages

NO_COMPOSER = (
    "This pipeline has no `composer`, which draws the anchor: pass `image=` or `anchors=`, use "
    '`mode="direct"`, or load a composer.'
)
NO_JUDGE = (
    "`{name}={value}` needs an `anchor_judge` to choose among the images: load or pass one, or leave the argument out."
)


def candidate_count(pipe: FactorizedStages, asked: int | None, name: str = "num_candidates") -> int:
    """Returns the largest number of images to draw per caption: the requested or the pipeline's; 1 without a judge.

    Raises:
        `ValueError`: the number is not a whole number from 1 to `MAX_COUNT`, or is above 1 without a judge.
    """
    check_at_least_one(name, asked, MAX_COUNT)
    if pipe.anchor_judge is None:
        if (asked or 1) > 1:
            raise ValueError(NO_JUDGE.format(name=name, value=asked))
        return 1
    return asked or pipe.call_defaults.get("composer_num_candidates", 1)


def compose_candidates(
    pipe: FactorizedStages,
    captions: Sequence[str],
    plans: Sequence[Any] | None,
    seeds: Sequence[int],
    count: int,
    height: int | None,
    width: int | None,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    negative_prompt: str | list[str] | None,
) -> list[list[AnchorCandidate]]:
    """Runs [`~compose.candidates.draw_candidates`] with the pipeline's composer and judge, only one of them on the device."""

    def draw(numbers: list[int], seeds: list[int]) -> list:
        leave_device(pipe, "anchor_judge")
        negative = [negative_prompt[k] for k in numbers] if isinstance(negative_prompt, list) else negative_prompt
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        texts, options = [captions[k] for k in numbers], (height, width, num_inference_steps, guidance_scale)
        if len(captions) > 1:
            return pipe._draw(None, texts, *options, negative, generators)
        # In a batch the last bit of an image can change, and a replay draws the chosen image alone.
        negative = negative[:1] if isinstance(negative, list) else negative
        drawn = [pipe._draw(None, texts[:1], *options, negative, [generator]) for generator in generators]
        return [image for images in drawn for image in images]

    def judging(work: Callable[[], list]) -> list:
        leave_device(pipe, "composer")
        with pipe._running() as progress, progress.stage("judge"):
            return work()

    with pipe._running():
        found = draw_candidates(draw, pipe.anchor_judge, captions, plans, seeds, count, judging)
        leave_device(pipe, "anchor_judge")
    return found


def leave_device(pipe: FactorizedStages, name: str) -> None:
    """Offloads a component under model offload. A hook only offloads the component before it in the order of stages, but
    composer and judge alternate.
    """
    for hook in getattr(pipe, "_all_hooks", ()):
        if hook.model is getattr(pipe, name):
            hook.offload()


class ChosenPictures:
    """Stage 2 of a [`VideoRequest`], which inherits from this class."""

    def draw_pictures(
        self: VideoRequest, pipe: FactorizedStages, moments: list[list[Moment]], seeds: list[dict[str, int]]
    ) -> tuple[list[list[PIL.Image.Image]], list[list[AnchorCandidate]] | None]:
        """Draws the images of each video: that of its first moment, then those derived from it with the same seed.

        Args:
            pipe ([`FactorizedStages`]): the pipeline.
            moments (`list[list[Moment]]`): moments of each video.
            seeds (`list[dict]`): seeds of each video; `"anchor"` is set to the seed of the best candidate.

        Returns:
            `tuple`: the images of each video's moments, and the candidates for the first moment, or `None` if there is only
            one.
        """
        names = ("num_inference_steps", "guidance_scale", "negative_prompt")
        options = {name: getattr(self, f"composer_{name}") for name in names}
        options |= {"height": self.height, "width": self.width}

        def inputs_of(videos: list[int]) -> dict[str, Any]:
            negative = options["negative_prompt"]
            if isinstance(negative, list) and len(negative) == len(moments):
                negative = [negative[video] for video in videos]
            generators = [torch.Generator().manual_seed(seeds[video]["anchor"]) for video in videos]
            return options | {"generator": generators, "negative_prompt": negative}

        firsts, candidates = [video[0] for video in moments], None
        captions, count = [first.caption for first in firsts], self.composer_num_candidates
        if count > 1:
            plans = [None if first.rewrite is None else first.rewrite.plan for first in firsts]
            candidates = compose_candidates(
                pipe, captions, plans, [seed["anchor"] for seed in seeds], count=count, **options
            )
            kept = [best_candidate(drawn) for drawn in candidates if drawn]
            for seed, candidate in zip(seeds, kept):
                seed["anchor"] = candidate.seed
            pictures = [[candidate.image] for candidate in kept]
        else:
            pictures = [
                [image] for image in pipe.compose(captions, num_candidates=1, **inputs_of(list(range(len(moments)))))
            ]
        later = [(video, moment.caption) for video, (_, *rest) in enumerate(moments) for moment in rest]
        if later and not pipe.interrupt:
            videos, captions = map(list, zip(*later))
            derived = pipe.derive([pictures[video][0] for video in videos], captions, **inputs_of(videos))
            for video, picture in zip(videos, derived):
                pictures[video].append(picture)
        return pictures, candidates
