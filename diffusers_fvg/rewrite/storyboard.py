"""Moments of a video: what a storyboard is made of, and which frames its pictures stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..checks import check_texts
from .outcome import RewriteOutcome


@dataclass(frozen=True)
class Moment:
    """What is seen at one time of a video.

    Args:
        caption (`str`): description of the still picture at that time.
        time (`float`): share of the video, 0 for its first frame and 1 for its last.
        rewrite ([`RewriteOutcome`], *optional*): of a first moment, how a rewriter came to it. It does not count when moments
            are compared.
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
    """Moments of one video: the first at time 0, the others later and later.

    Raises:
        `ValueError`: no moments, something else among them, or times out of order.
    """
    wrong = [type(moment).__name__ for moment in moments if not isinstance(moment, Moment)]
    if wrong or not moments:
        raise ValueError(f"A storyboard must hold `Moment`s, but holds {wrong[0] if wrong else 'nothing'}.")
    times = [moment.time for moment in moments]
    if times[0] != 0 or any(later <= earlier for earlier, later in zip(times, times[1:])):
        raise ValueError(f"The times of a storyboard must begin with 0 and increase, but are {times}.")


def moment_frames(times: Sequence[float], num_frames: int, frame_step: int) -> list[int]:
    """Pixel frame of each moment of one video, the nearest to its time.

    Args:
        times (`Sequence[float]`): shares of the video, increasing from 0.
        num_frames (`int`): length of the video.
        frame_step (`int`): frames that have one time in the model; frame 0 has one to itself.

    Raises:
        `ValueError`: two moments fall on frames that have one time.
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
    """One list of moments for each prompt, from one for all or one per prompt; checked.

    Raises:
        `ValueError`: another number of lists than of prompts, or as in [`check_moments`].
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
