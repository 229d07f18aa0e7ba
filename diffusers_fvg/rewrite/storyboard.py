"""Moments of a video, which make up a storyboard, and the frames that their pictures become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..checks import check_texts
from .outcome import RewriteOutcome


@dataclass(frozen=True)
class Moment:
    """Description of what is seen at one time of a video.

    Args:
        caption (`str`): description of the still picture at that time.
        time (`float`): relative time from 0 (first frame) to 1 (last frame).
        rewrite ([`RewriteOutcome`], *optional*): how a rewriter wrote the storyboard, at its first moment only. Comparisons of
            moments ignore it.

    Raises:
        `ValueError`: an empty caption, or a time that is not from 0 to 1.
    """

    caption: str
    time: float
    rewrite: RewriteOutcome | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.caption, str) or not self.caption.strip():
            raise ValueError(f"A moment's `caption` must be a text, but is {self.caption!r:.80}.")
        check_texts("caption", [self.caption])
        if isinstance(self.time, bool) or not isinstance(self.time, (int, float)) or not 0 <= self.time <= 1:
            raise ValueError(
                f"A moment's `time={self.time!r}` must be a number from 0 (first frame) to 1 (last frame)."
            )


def check_moments(moments: Sequence[Moment]) -> None:
    """Checks that a storyboard's times begin with 0 and increase.

    Raises:
        `ValueError`: the storyboard is empty, holds something else than moments, or has other times.
    """
    wrong = [type(moment).__name__ for moment in moments if not isinstance(moment, Moment)]
    if wrong or not moments:
        raise ValueError(f"A storyboard must hold `Moment`s, but holds {wrong[0] if wrong else 'nothing'}.")
    times = [moment.time for moment in moments]
    if times[0] != 0 or any(later <= earlier for earlier, later in zip(times, times[1:])):
        raise ValueError(f"The times of a storyboard must begin with 0 and increase, but are {times}.")


def moment_frames(times: Sequence[float], num_frames: int, frame_step: int) -> list[int]:
    """Returns the index of the frame nearest to each moment of a video.

    Args:
        times (`Sequence[float]`): relative times from 0 to 1, increasing from 0.
        num_frames (`int`): number of frames of the decoded video.
        frame_step (`int`): number of frames that share a latent frame; frame 0 has its own.

    Raises:
        `ValueError`: two moments fall on the same latent frame.
    """
    frames = [round(time * (num_frames - 1)) for time in times]
    groups = [-(-frame // frame_step) for frame in frames]
    if len(set(groups)) < len(groups):
        raise ValueError(
            f"Moments at the times {list(times)} cannot all be anchored in {num_frames} frames: some fall on the same latent "
            f"frame, which stands for {frame_step} frames after frame 0. Use fewer moments or more frames."
        )
    return frames


def pair_storyboards(
    storyboard: Sequence[Moment] | Sequence[Sequence[Moment]], num_prompts: int
) -> list[list[Moment]]:
    """Checks a storyboard, one for all prompts or one per prompt, and returns one list of moments per prompt.

    Raises:
        `ValueError`: there are neither one nor `num_prompts` storyboards, or as in [`check_moments`].
    """
    if not isinstance(storyboard, (list, tuple)) or not storyboard:
        raise ValueError(f"`storyboard` must be a list of `Moment`s or of lists of them, but is {storyboard!r}.")
    if not isinstance(storyboard[0], (list, tuple)):
        storyboard = [storyboard] * num_prompts
    if len(storyboard) != num_prompts:
        raise ValueError(
            f"`storyboard` has {len(storyboard)} lists of moments for {num_prompts} prompts; give one or {num_prompts}."
        )
    for moments in storyboard:
        check_moments(moments)
    return [list(moments) for moments in storyboard]
