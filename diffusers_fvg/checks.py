"""Checks of what a caller passes, made before any model runs. All raise `ValueError` naming the value and the fix."""

from __future__ import annotations

import torch

from .anchor import Anchor


# Text encoders read 512 tokens; a prompt longer than this many characters is a mistake (a file, a log), not a prompt.
MAX_PROMPT_CHARACTERS = 10_000


def check_texts(name: str, texts: list[str]) -> None:
    """A non-empty list of texts, each a string with something in it and of bounded length."""
    if not isinstance(texts, (list, tuple)) or not texts:
        raise ValueError(f"`{name}` must be a string or a non-empty list of strings, but is {texts!r}.")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"`{name}` must hold strings, but holds {type(text).__name__}.")
        if not text.strip():
            raise ValueError(f"`{name}` is empty: {text!r}; describe what should be seen.")
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise ValueError(
                f"`{name}` has {len(text)} characters, starting {text[:40]!r}; keep it under {MAX_PROMPT_CHARACTERS}."
            )


def check_size(name: str, value: int, multiple: int) -> None:
    """Pixels: a positive multiple of what a patch of the video model covers."""
    if not isinstance(value, int) or value < multiple or value % multiple:
        below = max(multiple, int(value) // multiple * multiple)
        raise ValueError(
            f"`{name}={value}` must be a positive multiple of {multiple}; nearest: {below} and {below + multiple}."
        )


def check_num_frames(num_frames: int, step: int) -> None:
    """Frames: 1, then `step` for every further latent."""
    if not isinstance(num_frames, int) or num_frames < 1 or (num_frames - 1) % step:
        below = max(1, (int(num_frames) - 1) // step * step + 1)
        raise ValueError(f"`num_frames={num_frames}` must be {step}k + 1; nearest: {below} and {below + step}.")


def check_at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"`{name}={value}` must be at least 1.")


def check_generators(generator: torch.Generator | list[torch.Generator] | None, count: int, things: str) -> None:
    if isinstance(generator, list) and len(generator) != count:
        raise ValueError(
            f"`generator` is a list of {len(generator)} for {count} {things}; give one generator or {count}."
        )


def pair_anchors(anchors, num_prompts: int, num_videos_per_prompt: int) -> list[list[Anchor]]:
    """One list of anchors for each video, from an anchor or a list for all, or lists per prompt or per video."""
    anchors = [anchors] if isinstance(anchors, Anchor) else list(anchors)
    for item in anchors:
        members = item if isinstance(item, (list, tuple)) else [item]
        wrong = [type(member).__name__ for member in members if not isinstance(member, Anchor)]
        if wrong:
            raise ValueError(
                f"`anchors` must hold `Anchor`s or lists of them, but holds {wrong[0]}; use `Anchor(image)`."
            )
    num_videos = num_prompts * num_videos_per_prompt
    if all(isinstance(item, Anchor) for item in anchors):
        return [anchors] * num_videos
    if len(anchors) == num_videos:
        return [list(item) for item in anchors]
    if len(anchors) == num_prompts:
        return [list(item) for item in anchors for _ in range(num_videos_per_prompt)]
    raise ValueError(
        f"`anchors` has {len(anchors)} lists for {num_prompts} prompts and {num_videos} videos; give one list for all, one "
        "per prompt or one per video."
    )
