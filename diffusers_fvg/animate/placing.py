"""Where anchors stand in a clip: pixel frames, and the latent frames that hold them.

A picture becomes an anchor in one of two forms, that of the anchor LoRA's training. `"slot"`: it takes the latent frame that
it falls into, and stands still over the four frames of that (Factorized Video Generation). `"appended"`: it is a latent frame
of its own behind the clip's, one frame long and at its exact place in time (LTX-2). Frame 0 and runs of whole latent frames
are exact in the clip itself, and stay there in both.
"""

from __future__ import annotations

from collections.abc import Sequence

from .anchor import Anchor, pictures_of


FORMS = ("slot", "appended")


def latent_index(frame_index: int, temporal: int = 4) -> int:
    """Latent that holds a pixel frame: 0 for frame 0, then one for every `temporal` frames."""
    return 0 if frame_index == 0 else 1 + (frame_index - 1) // temporal


def frame_position(frame_index: int, temporal: int = 4) -> float:
    """Where a pixel frame lies among the latent frames in time: 0 for frame 0, which is latent 0.

    Latent k > 0 holds `temporal` frames, the last of them frame `temporal * k`, and is at k in the rotary embedding: their
    middle. Frames are `1 / temporal` apart, so those of latent 1 are at 0.625, 0.875, 1.125 and 1.375. (LTX's positions are
    middles as well.)
    """
    return 0.0 if frame_index == 0 else (frame_index + (temporal - 1) / 2) / temporal


def is_appended(anchor: Anchor, num_frames: int) -> bool:
    """Whether the form `"appended"` puts an anchor behind the clip: one picture, not of frame 0."""
    return anchor.frame_index % num_frames != 0 and len(pictures_of(anchor.image)) == 1


def covered_latents(anchor: Anchor, num_frames: int, temporal: int = 4) -> range:
    """Latents that an anchor of a clip of `num_frames` frames stands for.

    Raises:
        `ValueError`: outside the clip, or a run that covers a part of a latent frame.
    """
    if not -num_frames <= anchor.frame_index < num_frames:
        raise ValueError(
            f"Anchor at `frame_index={anchor.frame_index}` lies outside the clip of {num_frames} frames; use "
            f"{-num_frames} to {num_frames - 1}."
        )
    count, frame = len(pictures_of(anchor.image)), anchor.frame_index % num_frames
    first = latent_index(frame, temporal)
    if count == 1:
        return range(first, first + 1)
    run = f"A run of {count} frames at `frame_index={anchor.frame_index}` in a clip of {num_frames} frames"
    alone = int(frame == 0)
    if not alone and (frame - 1) % temporal:
        starts = [1 + (first - 1) * temporal, 1 + first * temporal]
        # Counted as the caller did.
        starts = [start + anchor.frame_index - frame for start in starts if start < num_frames]
        raise ValueError(
            f"{run} begins within a latent frame, which stands for {temporal} frames; nearest `frame_index`: "
            f"{' and '.join(map(str, starts))}."
        )
    longest = num_frames - frame
    if not 0 < count <= longest or (count - alone) % temporal:
        below = alone + (min(count, longest) - alone) // temporal * temporal
        counts = [fitting for fitting in (below, below + temporal) if 0 < fitting <= longest]
        raise ValueError(
            f"{run} must cover whole latent frames, {temporal}k{' + 1' * alone} frames that end within the clip; nearest: "
            f"{' and '.join(map(str, counts))}."
        )
    return range(first, first + (count - alone) // temporal + alone)


def resolve_anchors(
    anchors: Sequence[Anchor], num_frames: int, temporal: int = 4, form: str = "slot"
) -> list[tuple[range, Anchor]]:
    """Checks the anchors of one clip and returns `(latents, anchor)` pairs in time order.

    Args:
        anchors (`Sequence[Anchor]`): of the clip.
        num_frames (`int`): of the clip.
        temporal (`int`, *optional*): frames of a latent frame.
        form (`str`, *optional*): `"slot"` or `"appended"`; see the head of this module.

    Raises:
        `ValueError`: as in `covered_latents`; a strength outside (0, 1], or two anchors on one latent frame, or on one frame
            where they are appended.
    """
    placed: dict[int, Anchor] = {}
    pairs = []
    for anchor in anchors:
        latents = covered_latents(anchor, num_frames, temporal)
        if not 0 < anchor.strength <= 1:
            raise ValueError(f"Anchor `strength={anchor.strength}` must lie in (0, 1]; leave the anchor out for 0.")
        first = anchor.frame_index % num_frames
        for place in latents if form == "slot" else range(first, first + len(pictures_of(anchor.image))):
            if place in placed:
                frames = sorted(item.frame_index % num_frames for item in (placed[place], anchor))
                _refuse_shared(place, frames, temporal, form)
            placed[place] = anchor
        pairs.append((latents, anchor))
    return sorted(pairs, key=lambda pair: (pair[0].start, pair[1].frame_index % num_frames))


def _refuse_shared(place: int, frames: list[int], temporal: int, form: str) -> None:
    if form == "appended":
        raise ValueError(f"Anchors at frames {frames[0]} and {frames[1]} both give frame {place}; keep one of them.")
    raise ValueError(
        f"Anchors at frames {frames[0]} and {frames[1]} fall on the same latent frame {place}; keep one of them or move one "
        f"away. Frame 0 is a latent frame of its own, then each stands for {temporal} frames."
    )
