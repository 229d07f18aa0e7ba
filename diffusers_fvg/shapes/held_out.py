"""Held-out prompts: which are reported, which serve to tune, and what such a prompt settles of its first frame."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .prompts import CATEGORIES, make_scene
from .scorer import score_caption
from .world import Scene


# Categories whose prompts do not settle where things are. A mover's side is settled by its direction.
OPEN_PLACES = ("consistent_attr", "dynamic_attr", "action_binding", "motion_binding")
START_SIDE = {"left": "right", "right": "left", "up": "bottom", "down": "top"}
# What takes an object's colour, shape or presence away.
ATTRIBUTE_CHANGES = ("recolour", "reshape", "vanish")


def held_out_scenes(
    per_category: int, seed: int = 0, categories: Sequence[str] = (*CATEGORIES, "placement")
) -> list[Scene]:
    """Scenes whose prompts no part of the model saw in training, distinct within a category where there are enough."""
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
    """Held-out scenes of the seven categories to report on, and others to tune on: no prompt is in both.

    A category with too few held-out prompts gives a third of them to tuning and reports on the rest.
    """
    reported, tuning = [], []
    for category in CATEGORIES:
        scenes = held_out_scenes(per_category + tuning_per_category, categories=(category,))
        enough = len(scenes) == per_category + tuning_per_category
        count = tuning_per_category if enough else len(scenes) // 3
        tuning += scenes[:count]
        reported += scenes[count:][:per_category]
    return reported, tuning


def settled_caption(scene: Scene) -> str:
    """What the prompt alone settles of the first frame: the true caption without the places that the prompt leaves open."""
    if scene.category not in OPEN_PLACES:
        return scene.caption
    sides = {}
    if scene.category == "motion_binding":
        sides = {scene.meta[f"object_{k}"]: START_SIDE[scene.meta[f"d_{k}"]] for k in (1, 2) if scene.meta[f"d_{k}"]}
    names = [f"{item.colour} {item.shape}" for item in scene.objects]
    return ", ".join(f"a {name}" + (f" at the {sides[name]}" if name in sides else "") for name in names)


def score_written_caption(caption: str, scene: Scene) -> float:
    """`score_caption` against what the prompt settles: no place that it leaves open counts against a caption."""
    return score_caption(caption, settled_caption(scene))


def attributes_stay(scene: Scene) -> bool:
    """Whether every object keeps its colour, its shape and its presence through the clip."""
    return not any(change.kind in ATTRIBUTE_CHANGES for item in scene.objects for change in item.changes)
