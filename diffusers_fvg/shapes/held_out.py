"""Held-out prompts: their split into reporting and tuning, and scores of captions against what a prompt determines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..rewrite.storyboard import Moment
from .prompts import CATEGORIES, brief_caption, make_scene, moment_caption, motion_caption, storyboard
from .scorer import parse_caption, score_caption
from .world import Scene


# Categories whose prompts do not determine places. In `motion_binding` the direction determines an object's side.
OPEN_PLACES = ("consistent_attr", "dynamic_attr", "action_binding", "motion_binding")
START_SIDE = {"left": "right", "right": "left", "up": "bottom", "down": "top"}
END_SIDE = {"left": "left", "right": "right", "up": "top", "down": "bottom"}
# Kinds of change after which an object's colour, shape or presence is different.
ATTRIBUTE_CHANGES = ("recolour", "reshape", "vanish")


def held_out_scenes(
    per_category: int, seed: int = 0, categories: Sequence[str] = (*CATEGORIES, "placement")
) -> list[Scene]:
    """Returns scenes whose prompts no part of the model saw in training: up to `per_category` distinct ones per category."""
    rng = np.random.default_rng((2024, seed))
    scenes = []
    for category in categories:
        chosen: dict[str, Scene] = {}
        for _ in range(60 * per_category):
            scene = make_scene(category, rng, held_out=True)
            chosen.setdefault(scene.prompt, scene)
            if len(chosen) == per_category:
                break
        scenes += chosen.values()
    return scenes


def split_scenes(per_category: int, tuning_per_category: int) -> tuple[list[Scene], list[Scene]]:
    """Returns held-out scenes of the seven categories for reporting, and others for tuning, without a common prompt.

    In a category with too few held-out prompts, a third of them is for tuning and the rest for reporting.
    """
    reported, tuning = [], []
    for category in CATEGORIES:
        scenes = held_out_scenes(per_category + tuning_per_category, categories=(category,))
        enough = len(scenes) == per_category + tuning_per_category
        count = tuning_per_category if enough else len(scenes) // 3
        tuning += scenes[:count]
        reported += scenes[count:][:per_category]
    return reported, tuning


def settled_caption(scene: Scene, time: float = 0.0) -> str:
    """Returns the true caption of a moment without the places that the prompt leaves open.

    Args:
        scene (`Scene`): the scene.
        time (`float`, *optional*): time of the moment, one in the scene's true storyboard; left out, the first frame.
    """
    caption = brief_caption(scene) if time == 0 else moment_caption(scene, time)
    if scene.category not in OPEN_PLACES:
        return caption
    sides = {}
    if scene.category == "motion_binding" and time in (0, 1):
        side = END_SIDE if time else START_SIDE
        sides = {scene.meta[f"object_{k}"]: side[scene.meta[f"d_{k}"]] for k in (1, 2) if scene.meta[f"d_{k}"]}
    names = [f"{colour} {shape}" for _, colour, shape, _ in parse_caption(caption)]
    return ", ".join(f"a {name}" + (f" at the {sides[name]}" if name in sides else "") for name in names)


def score_written_caption(caption: str, scene: Scene) -> float:
    """Returns `score_caption` against [`settled_caption`], so that places which the prompt leaves open do not count."""
    return score_caption(caption, settled_caption(scene))


def _row_and_column(place: str | None) -> tuple[str, str]:
    row, _, column = (place or "").partition(" ")
    return ("middle", "centre") if row == "centre" else (row, column)


def _in_one_scene(first: str, later: str, scene: Scene) -> bool:
    """Returns whether two captions agree in what the prompt leaves open: the object's place in `dynamic_attr`, the objects'
    lanes in `motion_binding`. In `interaction` the prompt determines every place."""
    places = [[_row_and_column(place) for *_, place in parse_caption(caption)] for caption in (first, later)]
    if scene.category == "dynamic_attr":
        return places[0] == places[1]
    if scene.category == "motion_binding":
        across = 0 if scene.meta["d_1"] in ("left", "right") else 1
        lanes = [[place[across] for place in row] for row in places]
        return lanes[0] == lanes[1]
    return True


def score_written_storyboard(moments: Sequence[Moment], scene: Scene, num_moments: int = 2) -> float:
    """Returns the mean of `score_caption` over the moments of the true storyboard, against [`settled_caption`] of each.

    A moment that is missing or shows another scene than the first one scores 0. A storyboard with a moment too many scores 0.
    """
    written = {moment.time: moment.caption for moment in moments}
    times = [moment.time for moment in storyboard(scene, num_moments)]
    if not written.keys() <= set(times):
        return 0.0
    scores = [
        score_caption(written[time], settled_caption(scene, time))
        if time in written and _in_one_scene(moments[0].caption, written[time], scene)
        else 0.0
        for time in times
    ]
    return float(np.mean(scores))


def score_written_motion(caption: str, scene: Scene) -> float:
    """Returns the F1 score of a motion caption over its clauses; each says what moves or changes, and how."""
    said, true = ({*text.lower().strip(" .").split(" while ")} for text in (caption, motion_caption(scene)))
    return 2 * len(said & true) / (len(said) + len(true))


def attributes_stay(scene: Scene) -> bool:
    """Returns whether every object keeps its colour, its shape and its presence through the clip."""
    return not any(change.kind in ATTRIBUTE_CHANGES for item in scene.objects for change in item.changes)
