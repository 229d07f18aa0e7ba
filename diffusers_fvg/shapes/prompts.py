"""The prompt grammar of the world of coloured shapes: seven benchmark categories, their clips and first-frame captions.

The categories, their names and the fields of `meta` follow T2V-CompBench V2 (arXiv 2407.14505). `placement` is an extra
one with a single object, used in training and for smoke tests.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ..rewrite.storyboard import Moment
from .world import COLOURS, SHAPES, Change, Scene, ShapeObject


# First words of every caption. Captions of real first-frame rewriters, too, begin with the kind of picture.
CAPTION_START = "A still picture on a plain grey background:"
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
# Actions of the action-binding category, as written in a prompt.
ACTIONS = ("grows", "shrinks", "blinks", "bounces", "stays still")
DIRECTIONS = {
    "left": ("to the left", -1, 0),
    "right": ("to the right", 1, 0),
    "up": ("upwards", 0, -1),
    "down": ("downwards", 0, 1),
}
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
RELATIONS = ("on the left of", "on the right of", "above", "below", "in front of", "behind")
EFFECTS = ("knocking it away to the right", "making it disappear", "turning it")
# Categories whose prompts determine what is seen later. `consistent_attr` leaves open how far an object drifts.
SETTLED_LATER = ("dynamic_attr", "motion_binding", "action_binding", "interaction")
_ROWS = ("top", "middle", "bottom")
_COLUMNS = ("left", "centre", "right")
_PLACES = tuple("centre" if (r, c) == ("middle", "centre") else f"{r} {c}" for r in _ROWS for c in _COLUMNS)
# Which of the nine places zero to nine objects take, as the spots on dice.
_SPOTS = tuple(
    tuple(map(int, spots))
    for spots in ("", "4", "08", "048", "0268", "02468", "023568", "0234568", "01235678", "012345678")
)


_OVERLAP_SIDE = re.compile(r"((?:in front of|behind) )the [a-z ]+ of (?=a )")


def place_name(x: float, y: float) -> str:
    """Returns the name of the place that holds a point, on a grid of 3 x 3: `"top left"`, `"middle right"`, `"centre"`, ..."""
    return _PLACES[_place(x, y)]


def _place(x: float, y: float) -> int:
    return 3 * min(int(y * 3), 2) + min(int(x * 3), 2)


def side_name(dx: float, dy: float) -> str:
    """Returns the name of a vector's direction, one of eight: `"left"`, `"top left"`, `"top"`, ..."""
    sector = round(float(np.arctan2(dy, dx)) / (np.pi / 4)) % 8
    return ("right", "bottom right", "bottom", "bottom left", "left", "top left", "top", "top right")[sector]


def place_centre(name: str) -> tuple[float, float]:
    """Returns the centre of a place of `place_name`, as fractions of width and height."""
    row, column = ("middle", "centre") if name == "centre" else name.split()
    return (_COLUMNS.index(column) + 0.5) / 3, (_ROWS.index(row) + 0.5) / 3


def first_frame_caption(objects: tuple[ShapeObject, ...]) -> str:
    """Returns the true caption of the first frame: colour, shape and place of every object, and nothing about later frames."""
    return _caption([(item.colour, item.shape, place_name(item.x, item.y)) for item in objects])


def _caption(named: list[tuple[str, str, str]]) -> str:
    parts = [f"a {colour} {shape} at the {place}" for colour, shape, place in named]
    return f"{CAPTION_START} {', '.join(parts)}"


def overlap_caption(first: str, relation: str, side: str, second: str) -> str:
    """Returns the caption of two overlapping objects: `"a red circle in front of the top left of a blue square at the centre"`."""
    return f"{CAPTION_START} a {first} {relation} the {side} of a {second} at the centre"


def brief_caption(scene: Scene) -> str:
    """Returns the caption of a scene without what its prompt leaves open: the places of objects that it only counts, and the
    side on which one object covers another."""
    if scene.category == "generative_numeracy":
        return f"{CAPTION_START} {re.sub(r' rests? on .*', '', scene.prompt.lower())}"
    return _OVERLAP_SIDE.sub(r"\1", scene.caption)


def planned_caption(scene: Scene) -> str:
    """Returns the caption of a scene as stage 1 writes it: objects that the prompt only counts are placed like the spots on a
    die, and of two overlapping objects the first is on the left."""
    if scene.category != "generative_numeracy":
        return _OVERLAP_SIDE.sub(r"\1the left of ", scene.caption)
    spots = _SPOTS[len(scene.objects)]
    return _caption([(item.colour, item.shape, _PLACES[spot]) for item, spot in zip(scene.objects, spots)])


def object_at(item: ShapeObject, time: float) -> ShapeObject | None:
    """Returns the state of an object at a time in [0, 1], without its changes, if a caption can describe it.

    Returns:
        `ShapeObject`, or `None` for an object that is hidden or gone.

    Raises:
        `ValueError`: the object is between two colours or shapes, half gone, or of another size, for which captions have no
            words.
    """
    state = replace(item, changes=())
    for change in item.changes:
        amount = float(change.progress(np.array(time)))
        if change.kind == "move":
            state = replace(state, x=state.x + change.value[0] * amount, y=state.y + change.value[1] * amount)
        elif change.kind == "bounce":
            hop, count = change.value
            state = replace(state, y=state.y - hop * abs(np.sin(np.pi * count * amount)))
        elif change.kind == "blink":
            # The same condition as in `render`; -0.01 allows for rounding at the end of a period.
            if np.sin(2 * np.pi * change.value * amount) <= -0.01:
                return None
        elif amount > 0 and (amount < 1 or change.kind == "scale"):
            raise ValueError(f"No caption can describe the change {change.kind!r} at time {time}.")
        elif amount == 1:
            if change.kind == "vanish":
                return None
            state = replace(state, **{{"recolour": "colour", "reshape": "shape"}[change.kind]: change.value})
    return state


def _at_its_side(item: ShapeObject, way: tuple[float, float]) -> ShapeObject:
    """Moves an object to the outer third that it heads for. Its prompt determines no more, though some objects stop earlier."""
    dx, dy = np.sign(way)
    return replace(item, x=0.5 + dx / 3 if dx else item.x, y=0.5 + dy / 3 if dy else item.y)


def moment_caption(scene: Scene, time: float) -> str | None:
    """Returns the true caption of a scene at a time in [0, 1], or `None` if no caption can describe what is seen.

    Captions cannot describe a change under way, another size, an empty frame, or two objects in one place.
    """
    if not any(item.changes for item in scene.objects):
        return scene.caption
    try:
        states = [object_at(item, time) for item in scene.objects]
    except ValueError:
        return None
    if scene.category == "motion_binding" and time == 1:
        states = [_at_its_side(state, item.changes[0].value) for state, item in zip(states, scene.objects)]
    seen = tuple(state for state in states if state is not None)
    places = {place_name(state.x, state.y) for state in seen}
    return first_frame_caption(seen) if seen and len(places) == len(seen) else None


def storyboard(scene: Scene, num_moments: int = 2) -> list[Moment]:
    """Returns the true storyboard of a scene: evenly spaced moments.

    Moments are left out if the prompt does not determine them, if no caption can describe them, or if nothing has changed. The
    first moment is always there.
    """
    moments = [Moment(scene.caption, 0.0)]
    if scene.category in SETTLED_LATER:
        for time in np.linspace(0, 1, num_moments)[1:]:
            caption = moment_caption(scene, float(time))
            if caption is not None and caption != moments[-1].caption:
                moments.append(Moment(caption, float(time)))
    return moments


def motion_caption(scene: Scene) -> str:
    """Returns the true motion caption of a scene: what happens after the first frame, in the words of its prompt."""
    if not any(item.changes for item in scene.objects):
        return "the picture stays still"
    clauses = re.sub(r"\b(slowly|gradually) ", "", scene.prompt.lower()).split(" while ")
    text = " while ".join(clause for clause in clauses if not clause.endswith("stays still"))
    # Objects are known from the first frame, so "a" becomes "the", except for what an object transforms into.
    return re.sub(r"(?<!transforms into )\ba\b", "the", text)


def is_held_out(prompt: str) -> bool:
    """Returns whether a prompt belongs to the held-out eighth that no part of the shapes model sees in training."""
    return hashlib.sha256(prompt.lower().encode()).digest()[0] % 8 == 0


def _pick(rng: np.random.Generator, values, count: int | None = None):
    index = rng.permutation(len(values))[: count or 1]
    return values[index[0]] if count is None else [values[i] for i in index]


def _radius(rng: np.random.Generator, low: float = 0.11, high: float = 0.15) -> float:
    return float(rng.uniform(low, high))


def _scattered(rng: np.random.Generator, radii: list[float]) -> list[tuple[float, float]]:
    """Draws random places for discs of these radii, inside the frame and apart from each other."""
    while True:
        places: list[tuple[float, float]] = []
        for radius in radii:
            for _ in range(60):
                x, y = rng.uniform(radius + 0.03, 0.97 - radius, size=2)
                if all(np.hypot(x - u, y - v) > 1.25 * (radius + r) + 0.05 for (u, v), r in zip(places, radii)):
                    places.append((float(x), float(y)))
                    break
        if len(places) == len(radii):
            return places


def _consistent(rng: np.random.Generator) -> Scene:
    (c1, c2), (s1, s2) = _pick(rng, COLOURS, 2), _pick(rng, SHAPES, 2)
    r1, r2 = _radius(rng), _radius(rng)
    side = _pick(rng, (-1, 1))
    x2, x1 = 0.5 + side * rng.uniform(0.2, 0.3), 0.5 - side * rng.uniform(0.2, 0.3)
    y1, y2 = rng.uniform(0.25, 0.75, size=2)
    reach = rng.uniform(0.15, 0.2)
    objects = (
        ShapeObject(c1, s1, x1, y1, r1, (Change("move", (side * reach, reach * 0.5 * np.sign(y2 - y1))),)),
        ShapeObject(c2, s2, x2, y2, r2),
    )
    prompt = f"A {c1} {s1} drifts slowly towards a {c2} {s2}"
    return Scene(
        "consistent_attr", prompt, first_frame_caption(objects), objects, {"phrases": f"{c1} {s1}; {c2} {s2}"}
    )


def _dynamic(rng: np.random.Generator) -> Scene:
    x, y, radius = *rng.uniform(0.3, 0.7, size=2), _radius(rng, 0.14, 0.2)
    if rng.random() < 0.5:
        start = int(rng.integers(6))
        # Hues at most 120 degrees apart: a cross-fade of complementary colours passes through the grey background.
        c0, c1 = COLOURS[start], COLOURS[(start + _pick(rng, (-2, -1, 1, 2))) % 6]
        shape = _pick(rng, SHAPES)
        change, prompt = Change("recolour", c1, 0.2, 0.8), f"A {shape} gradually turns from {c0} to {c1}"
        states = (f"a {c0} {shape}", f"a {c1} {shape}")
        objects = (ShapeObject(c0, shape, x, y, radius, (change,)),)
    else:
        colour, (s0, s1) = _pick(rng, COLOURS), _pick(rng, SHAPES, 2)
        change, prompt = Change("reshape", s1, 0.2, 0.8), f"A {colour} {s0} transforms into a {colour} {s1}"
        states = (f"a {colour} {s0}", f"a {colour} {s1}")
        objects = (ShapeObject(colour, s0, x, y, radius, (change,)),)
    meta = {"state 0": states[0], "state 1": states[1]}
    return Scene("dynamic_attr", prompt, first_frame_caption(objects), objects, meta)


def _spatial(rng: np.random.Generator) -> Scene:
    (c1, c2), (s1, s2) = _pick(rng, COLOURS, 2), _pick(rng, SHAPES, 2)
    relation = _pick(rng, RELATIONS)
    r1, r2 = _radius(rng), _radius(rng)
    if relation in ("in front of", "behind"):
        r1, r2 = r1 + 0.03, r2 + 0.03
        x2, y2 = rng.uniform(0.42, 0.58, size=2)
        angle = rng.uniform(0, 2 * np.pi)
        x1, y1 = x2 + 1.05 * max(r1, r2) * np.cos(angle), y2 + 1.05 * max(r1, r2) * np.sin(angle)
        first, second = ShapeObject(c1, s1, x1, y1, r1), ShapeObject(c2, s2, x2, y2, r2)
        objects = (second, first) if relation == "in front of" else (first, second)
        caption = overlap_caption(f"{c1} {s1}", relation, side_name(x1 - x2, y1 - y2), f"{c2} {s2}")
    else:
        axis, sign = {"on the left of": (0, -1), "on the right of": (0, 1), "above": (1, -1), "below": (1, 1)}[
            relation
        ]
        gap, across = rng.uniform(0.22, 0.28), rng.uniform(-0.06, 0.06, size=2)
        middle = rng.uniform(0.45, 0.55)
        ends = [(0.5 + sign * gap, middle + across[0]), (0.5 - sign * gap, middle + across[1])]
        (x1, y1), (x2, y2) = [end if axis == 0 else end[::-1] for end in ends]
        objects = (ShapeObject(c1, s1, x1, y1, r1), ShapeObject(c2, s2, x2, y2, r2))
        caption = first_frame_caption(objects)
    words = {"on the left of": "left", "on the right of": "right"}
    meta = {"spatial": words.get(relation, relation), "object_1": f"{c1} {s1}", "object_2": f"{c2} {s2}"}
    return Scene("spatial_relationships", f"A {c1} {s1} {relation} a {c2} {s2}", caption, objects, meta)


def _mover(
    rng: np.random.Generator, colour: str, shape: str, direction: str, lane: float, radius: float
) -> ShapeObject:
    """Makes an object that moves over 0.4 to 0.48 of the frame along `direction`; `lane` is its other coordinate."""
    _, dx, dy = DIRECTIONS[direction]
    travel, start = rng.uniform(0.4, 0.48), rng.uniform(0.22, 0.27)
    along = start if dx + dy > 0 else 1 - start
    x, y = (along, lane) if dx else (lane, along)
    return ShapeObject(colour, shape, x, y, radius, (Change("move", (dx * travel, dy * travel)),))


def _motion(rng: np.random.Generator) -> Scene:
    c1, c2 = _pick(rng, COLOURS, 2)
    s1, s2 = _pick(rng, SHAPES, 2)
    d1 = _pick(rng, tuple(DIRECTIONS))
    meta = {"object_1": f"{c1} {s1}", "d_1": d1, "object_2": "", "d_2": ""}
    prompt = f"A {c1} {s1} moves {DIRECTIONS[d1][0]}"
    if rng.random() < 0.7:
        objects = (_mover(rng, c1, s1, d1, rng.uniform(0.25, 0.75), _radius(rng, 0.13, 0.18)),)
    else:
        d2 = OPPOSITE[d1]
        lanes = _pick(rng, (rng.uniform(0.22, 0.28), rng.uniform(0.72, 0.78)), 2)
        objects = (_mover(rng, c1, s1, d1, lanes[0], _radius(rng)), _mover(rng, c2, s2, d2, lanes[1], _radius(rng)))
        prompt += f" while a {c2} {s2} moves {DIRECTIONS[d2][0]}"
        meta |= {"object_2": f"{c2} {s2}", "d_2": d2}
    return Scene("motion_binding", prompt, first_frame_caption(objects), objects, meta)


def _actor(rng: np.random.Generator, colour: str, shape: str, action: str, x: float) -> ShapeObject:
    y, radius = rng.uniform(0.45, 0.6), _radius(rng, 0.12, 0.14)
    if action == "grows":
        radius, changes = 0.1, (Change("scale", 1.8),)
    elif action == "shrinks":
        radius, changes = 0.18, (Change("scale", 0.55),)
    elif action == "blinks":
        changes = (Change("blink", 2),)
    elif action == "bounces":
        y, changes = rng.uniform(0.65, 0.75), (Change("bounce", (0.28, 2)),)
    else:
        changes = ()
    return ShapeObject(colour, shape, x, y, radius, changes)


def _action(rng: np.random.Generator) -> Scene:
    (c1, c2), (s1, s2), (a1, a2) = _pick(rng, COLOURS, 2), _pick(rng, SHAPES, 2), _pick(rng, ACTIONS, 2)
    x1, x2 = _pick(rng, (rng.uniform(0.24, 0.28), rng.uniform(0.72, 0.76)), 2)
    objects = (_actor(rng, c1, s1, a1, x1), _actor(rng, c2, s2, a2, x2))
    prompt = f"A {c1} {s1} {a1} while a {c2} {s2} {a2}"
    meta = {f"phrase_{k}": [f"{c} {s}", a] for k, (c, s, a) in enumerate(((c1, s1, a1), (c2, s2, a2)))}
    return Scene("action_binding", prompt, first_frame_caption(objects), objects, meta)


def _interaction(rng: np.random.Generator) -> Scene:
    (c1, c2), (s1, s2) = _pick(rng, COLOURS, 2), _pick(rng, SHAPES, 2)
    effect = _pick(rng, EFFECTS)
    r1, r2 = _radius(rng, 0.11, 0.14), _radius(rng, 0.11, 0.14)
    y, x1, x2 = rng.uniform(0.35, 0.65), rng.uniform(0.17, 0.2), rng.uniform(0.58, 0.62)
    # Objects overlap a little, so that contact is visible: squares have 0.9 of the radius, and triangles get narrow at the top.
    reach = x2 - x1 - 0.9 * (r1 + r2)
    after = {
        "knocking it away to the right": Change("move", (0.97 - r2 - x2, 0.0), 0.5, 0.9),
        "making it disappear": Change("vanish", None, 0.55, 0.7),
        "turning it": Change("recolour", c1, 0.55, 0.75),
    }[effect]
    objects = (
        ShapeObject(c1, s1, x1, y, r1, (Change("move", (reach, 0.0), 0.0, 0.5),)),
        ShapeObject(c2, s2, x2, y, r2, (after,)),
    )
    prompt = f"A {c1} {s1} slides into a {c2} {s2}, {effect}" + (f" {c1}" if effect == "turning it" else "")
    meta = {"cause": f"{c1} {s1}", "effect": f"{c2} {s2}", "verb": effect}
    return Scene("interaction", prompt, first_frame_caption(objects), objects, meta)


def _numeracy(rng: np.random.Generator) -> Scene:
    (c1, c2), (s1, s2) = _pick(rng, COLOURS, 2), _pick(rng, SHAPES, 2)
    n, m = int(rng.integers(1, 7)), int(rng.integers(1, 4)) if rng.random() < 0.35 else 0
    radius = 0.12 if n + m <= 3 else 0.1 if n + m <= 6 else 0.085
    radii = [radius * float(rng.uniform(0.95, 1.08)) for _ in range(n + m)]
    kinds = [(c1, s1)] * n + [(c2, s2)] * m
    objects = tuple(ShapeObject(c, s, x, y, r) for (c, s), (x, y), r in zip(kinds, _scattered(rng, radii), radii))
    groups = [(n, c1, s1)] + ([(m, c2, s2)] if m else [])
    names = " and ".join(f"{NUMBERS[k]} {c} {s}{'s' * (k > 1)}" for k, c, s in groups)
    verb = "rests" if n + m == 1 else "rest"
    meta = {
        "objects": ", ".join(f"{c} {s}" for _, c, s in groups),
        "numbers": ", ".join(str(k) for k, _, _ in groups),
    }
    prompt = f"{names.capitalize()} {verb} on a plain background"
    # Listed group by group, each in reading order.
    listed = sorted(objects, key=lambda item: ((item.colour, item.shape) != (c1, s1), _place(item.x, item.y)))
    return Scene("generative_numeracy", prompt, first_frame_caption(tuple(listed)), objects, meta)


def _placement(rng: np.random.Generator) -> Scene:
    colour, shape, radius = _pick(rng, COLOURS), _pick(rng, SHAPES), _radius(rng, 0.12, 0.16)
    name = place_name(*rng.uniform(0, 1, size=2))
    centre = np.array(place_centre(name)) + rng.uniform(-0.05, 0.05, size=2)
    x, y = np.clip(centre, radius + 0.02, 0.98 - radius)
    objects = (ShapeObject(colour, shape, float(x), float(y), radius),)
    prompt = f"A {colour} {shape} rests at the {name}"
    return Scene(
        "placement", prompt, first_frame_caption(objects), objects, {"object": f"{colour} {shape}", "place": name}
    )


_MAKERS: dict[str, Callable[[np.random.Generator], Scene]] = {
    "consistent_attr": _consistent,
    "dynamic_attr": _dynamic,
    "spatial_relationships": _spatial,
    "motion_binding": _motion,
    "action_binding": _action,
    "interaction": _interaction,
    "generative_numeracy": _numeracy,
    "placement": _placement,
}
# The seven categories of the benchmark, in T2V-CompBench's order.
CATEGORIES = tuple(name for name in _MAKERS if name != "placement")


def make_scene(category: str, rng: np.random.Generator, held_out: bool | None = None) -> Scene:
    """Draws a scene of a category.

    Args:
        category (`str`): one of `CATEGORIES`, or `"placement"`.
        rng (`np.random.Generator`): generator of all random choices.
        held_out (`bool`, *optional*): `True` for prompts of the held-out eighth only, `False` for others only; left out, any.

    Raises:
        `ValueError`: the category is unknown.
    """
    if category not in _MAKERS:
        raise ValueError(f"Unknown category {category!r}; use one of {(*CATEGORIES, 'placement')}.")
    while True:
        scene = _MAKERS[category](rng)
        if held_out is None or is_held_out(scene.prompt) == held_out:
            return scene
