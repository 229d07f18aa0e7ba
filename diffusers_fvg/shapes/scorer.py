"""Scores clips, images and captions of the world of coloured shapes.

The scores follow the rules and scales of T2V-CompBench V2 (arXiv 2407.14505), with the pixel reader `blobs.py` in place of the
judge models. They say nothing about realism and are called synthetic wherever they are printed. Positions are fractions of the
width and the height from the top left corner, as in `world.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from .blobs import Blob, find_blobs, find_objects, label_maps
from .prompts import NUMBERS, place_name
from .world import COLOURS, SHAPES, ShapeObject


# Least IoU of a complete object with its template.
_COMPLETE = 0.85
# Boxes at most this far apart count as touching: two pixels of 64, as blending colours make objects smaller by that much.
_CONTACT = 2 / 64


# --- rules of the categories -----------------------------------------------------------------------------------------


def _kind(text: str) -> tuple[str, str]:
    """Returns (colour, shape) of `"a red circle"` or `"red circle"`."""
    colour, shape = text.split()[-2:]
    return colour, shape


def _pick(blobs: list[Blob], kind: tuple[str, str]) -> Blob | None:
    """Returns the largest blob of a colour and a shape, or `None`."""
    return next((blob for blob in blobs if (blob.colour, blob.shape) == kind), None)


def _track(frames: list[list[Blob]], kind: tuple[str, str]) -> list[Blob | None]:
    """Returns for each frame the largest blob of the kind's colour, preferably of its shape, or `None`."""
    by_colour = [next((blob for blob in blobs if blob.colour == kind[0]), None) for blobs in frames]
    return [_pick(blobs, kind) or other for blobs, other in zip(frames, by_colour)]


def _share(flags) -> float:
    return float(np.mean([bool(flag) for flag in flags]))


def _subset(frames: list, count: int) -> list:
    """Returns `count` evenly spaced frames, including the first and the last."""
    return [frames[k] for k in np.round(np.linspace(0, len(frames) - 1, count)).astype(int)]


_PAIR_POINTS = {"AA": 15, "AB": 14, "BB": 13, "AD": 10, "BD": 9, "AE": 8, "BE": 7, "DD": 4, "DE": 2, "EE": 1}


def _score_consistent(frames: list[list[Blob]], meta: dict) -> float:
    """Grades each object: A if it is in (nearly) all frames, B in some, D if its colour or shape is on something else, E absent.

    The score depends on the pair of grades.
    """
    frames = _subset(frames, 16)
    kinds = [_kind(phrase) for phrase in meta["phrases"].split(";")]
    letters = []
    for kind in kinds:
        seen = _share(_pick(blobs, kind) for blobs in frames)
        others = [[blob for blob in blobs if (blob.colour, blob.shape) not in kinds] for blobs in frames]
        mixed = _share(any(blob.colour == kind[0] or blob.shape == kind[1] for blob in blobs) for blobs in others)
        letters.append("A" if seen >= 0.9 else "B" if seen >= 0.3 else "D" if mixed >= 0.5 else "E")
    return (_PAIR_POINTS["".join(sorted(letters))] - 1) / 14


def _score_dynamic(frames: list[list[Blob]], meta: dict) -> float:
    """Scores that the first frame shows state 0 and not state 1, the last one the reverse, and the object stays in between."""
    frames = _subset(frames, 8)
    states = _kind(meta["state 0"]), _kind(meta["state 1"])

    def match(blobs: list[Blob], state: tuple[str, str]) -> float:
        total = sum(blob.area for blob in blobs)
        return sum(blob.area for blob in blobs if (blob.colour, blob.shape) == state) / total if blobs else 0.0

    # The shape stays while the colour changes, and the colour while the shape changes.
    same_shape = states[0][1] == states[1][1]
    there = _share(
        any(blob.shape == states[0][1] if same_shape else blob.colour == states[0][0] for blob in blobs)
        for blobs in frames[1:-1]
    )
    first = match(frames[0], states[0]) * (1 - match(frames[0], states[1]))
    last = (1 - match(frames[-1], states[0])) * match(frames[-1], states[1])
    return first * last if there > 0.65 else 0.0


def _box_iou(a: Blob, b: Blob) -> float:
    width = min(a.box[2], b.box[2]) - max(a.box[0], b.box[0])
    height = min(a.box[3], b.box[3]) - max(a.box[1], b.box[1])
    both = max(width, 0.0) * max(height, 0.0)
    areas = [(blob.box[2] - blob.box[0]) * (blob.box[3] - blob.box[1]) for blob in (a, b)]
    return both / (sum(areas) - both)


def _spatial_frame(blobs: list[Blob], kinds: list[tuple[str, str]], relation: str) -> float:
    first, second = (_pick(blobs, kind) for kind in kinds)
    if first is None or second is None:
        return 0.2 if first or second else 0.0
    if relation in ("in front of", "behind"):
        front, back = (first, second) if relation == "in front of" else (second, first)
        complete = front.fits[SHAPES.index(front.shape)]
        cut = back.fits[SHAPES.index(back.shape)] * back.squareness
        return 1.0 if _gap(first, second) <= _CONTACT and complete > _COMPLETE and complete > cut else 0.4
    dx, dy = first.place[0] - second.place[0], first.place[1] - second.place[1]
    seen = ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
    return 0.4 + 0.6 * (1 - _box_iou(first, second)) if seen == relation else 0.4


def _score_spatial(frames: list[list[Blob]], meta: dict) -> float:
    kinds = [_kind(meta["object_1"]), _kind(meta["object_2"])]
    return float(np.mean([_spatial_frame(blobs, kinds, meta["spatial"]) for blobs in _subset(frames, 16)]))


def _starts_with(frames: list[list[Blob]], kind: tuple[str, str]) -> bool:
    return any(_pick(blobs, kind) for blobs in frames[:2])


def _score_motion(frames: list[list[Blob]], meta: dict, full_travel: float = 0.25) -> float:
    """Gives 0.2 for presence, and up to 0.8 for motion in the right main direction; `full_travel` of the frame is the most."""
    travels, found = [], False
    for number in (1, 2):
        if not meta[f"object_{number}"]:
            continue
        kind = _kind(meta[f"object_{number}"])
        travel = 0.0
        if _starts_with(frames, kind):
            found = True
            track = [blob for blob in _track(frames, kind) if blob]
            dx, dy = track[-1].x - track[0].x, track[-1].y - track[0].y
            seen = ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("up" if dy < 0 else "down")
            distance = max(abs(dx), abs(dy))
            if seen == meta[f"d_{number}"] and distance > 0.02:
                travel = min(1.0, distance / full_travel)
        travels.append(travel)
    return 0.2 + 0.8 * float(np.mean(travels)) if found else 0.0


def _reversals(values: np.ndarray, hysteresis: float) -> int:
    """Counts how often a sequence changes direction, ignoring changes smaller than `hysteresis`."""
    count, direction, extreme = 0, 0, values[0]
    for value in values:
        if direction == 0:
            if abs(value - extreme) > hysteresis:
                direction, extreme = np.sign(value - extreme), value
        elif (value - extreme) * direction > 0:
            extreme = value
        elif (extreme - value) * direction > hysteresis:
            count, direction, extreme = count + 1, -direction, value
    return count


def _seen_action(track: list[Blob | None]) -> str:
    """Returns which of the grammar's actions a track shows, or `""`."""
    visible = np.array([blob is not None for blob in track])
    if np.abs(np.diff(visible.astype(int))).sum() >= 2:
        return "blinks"
    blobs = [blob for blob in track if blob]
    growth = np.mean([blob.area for blob in blobs[-2:]]) / np.mean([blob.area for blob in blobs[:2]])
    if growth >= 1.5 or growth <= 0.67:
        return "grows" if growth > 1 else "shrinks"
    x, y = np.array([blob.place for blob in blobs]).T
    if _reversals(y, 0.05) >= 2:
        return "bounces"
    return "stays still" if max(np.ptp(x), np.ptp(y)) < 0.05 and growth >= 0.8 and growth <= 1.25 else ""


def _score_action(frames: list[list[Blob]], meta: dict) -> float:
    """Gives 10, 8 or 5 points for two, one or no right action of two objects; 4 or 2 if one object is missing; 1 if both are."""
    found, right = 0, 0
    for name, action in (meta["phrase_0"], meta["phrase_1"]):
        kind = _kind(name)
        if _share(_pick(blobs, kind) for blobs in frames) >= 0.3:
            found += 1
            right += _seen_action(_track(frames, kind)) == action
    points = {2: (5, 8, 10), 1: (2, 4), 0: (1,)}[found][right]
    return (points - 1) / 9


def _gap(a: Blob | None, b: Blob | None) -> float:
    """Returns the distance of two boxes, infinite if one of the blobs is missing."""
    if a is None or b is None:
        return float("inf")
    dx = max(a.box[0] - b.box[2], b.box[0] - a.box[2], 0.0)
    dy = max(a.box[1] - b.box[3], b.box[1] - a.box[3], 0.0)
    return float(np.hypot(dx, dy))


def _score_interaction(frames: list[list[Blob]], labels: np.ndarray, meta: dict) -> float:
    """Gives 6 points for both objects, +1 if they approach, +1 for contact, +2 for the effect after it; at most 7 if the second
    object moves before contact; 2 and 1 for one and no object."""
    cause, effect = _kind(meta["cause"]), _kind(meta["effect"])
    present = sum(_starts_with(frames, kind) for kind in (cause, effect))
    if present < 2:
        return present / 9
    causes, effects = _track(frames, cause), _track(frames, effect)
    gaps = np.array([_gap(a, b) for a, b in zip(causes, effects)])
    start = next(k for k, gap in enumerate(gaps) if np.isfinite(gap)) if np.isfinite(gaps).any() else None
    if start is None:
        return 5 / 9
    points = 6 + int(gaps.min() <= 0.5 * gaps[start])
    contact = next((k for k, gap in enumerate(gaps) if gap <= _CONTACT), None)
    if contact is None:
        return (points - 1) / 9
    points += 1
    before = [blob.place for blob in effects[: contact + 1] if blob]
    after = [blob.place for blob in effects[contact:] if blob]
    if meta["verb"] == "making it disappear":
        tail = effects[-max(1, round(0.2 * len(effects))) :]
        happened = contact < len(effects) - len(tail) and not any(tail)
    elif meta["verb"] == "turning it":
        # At the end both objects have the same colour and may touch, so the pixels of the second object's place are checked.
        spot = labels[contact] == 1 + COLOURS.index(effect[0])
        happened = bool((labels[-1][spot] == 1 + COLOURS.index(cause[0])).mean() >= 0.6)
    else:
        happened = np.hypot(*(np.array(after[-1]) - after[0])) >= 0.08
    points += 2 * int(happened)
    if np.hypot(*(np.array(before[-1]) - before[0])) >= 0.05:
        points = min(points, 7)
    return (points - 1) / 9


def _score_numeracy(frames: list[list[Blob]], meta: dict) -> float:
    kinds = [_kind(name) for name in meta["objects"].split(",")]
    numbers = [int(number) for number in meta["numbers"].split(",")]
    exact = [
        np.mean([sum((blob.colour, blob.shape) == kind for blob in blobs) == n for kind, n in zip(kinds, numbers)])
        for blobs in _subset(frames, 16)
    ]
    return float(np.mean(exact))


def _score_placement(frames: list[list[Blob]], meta: dict) -> float:
    """Returns the share of frames with the object in its place, or 0 if it is not there in the first frame."""
    kind = _kind(meta["object"])
    there = [
        any((blob.colour, blob.shape) == kind and _lies_at(blob, meta["place"]) for blob in blobs) for blobs in frames
    ]
    return _share(there) if there[0] else 0.0


def score_video(frames: np.ndarray, category: str, meta: dict) -> float:
    """Scores a clip against its prompt's `meta` by the rules of one category.

    Args:
        frames (`np.ndarray` of shape `(num_frames, height, width, 3)`, `uint8`): the whole clip.
        category (`str`): one of `prompts.CATEGORIES`, or `"placement"`.
        meta (`dict`): `Scene.meta` of the prompt.

    Returns:
        `float` in [0, 1].

    Raises:
        `ValueError`: the category is unknown.
    """
    rules = {
        "consistent_attr": _score_consistent,
        "dynamic_attr": _score_dynamic,
        "spatial_relationships": _score_spatial,
        "motion_binding": _score_motion,
        "action_binding": _score_action,
        "interaction": _score_interaction,
        "generative_numeracy": _score_numeracy,
        "placement": _score_placement,
    }
    if category not in rules:
        raise ValueError(f"Unknown category {category!r}; use one of {tuple(rules)}.")
    labels = label_maps(frames)
    blobs = find_blobs(labels, complete_cut=meta.get("spatial") in ("in front of", "behind"))
    if category == "interaction":
        return _score_interaction(blobs, labels, meta)
    return rules[category](blobs, meta)


def motion_amount(frames: np.ndarray) -> float:
    """Returns the mean length of the objects' paths through a clip, as a fraction of the frame.

    Each object of the first frame is followed to the nearest blob of its colour. It counts as still if there is none within a
    quarter of the frame. A clip that begins empty has 0.
    """
    blobs = find_blobs(label_maps(frames))
    paths = []
    for item in blobs[0]:
        position, length = np.array([item.x, item.y]), 0.0
        for others in blobs[1:]:
            places = np.array([(blob.x, blob.y) for blob in others if blob.colour == item.colour]).reshape(-1, 2)
            steps = np.hypot(*(places - position).T)
            if steps.size and steps.min() < 0.25:
                length += steps.min()
                position = places[steps.argmin()]
        paths.append(length)
    return float(np.mean(paths)) if paths else 0.0


def label_iou(image: np.ndarray, other: np.ndarray) -> float:
    """Returns the anchor fidelity: of the pixels coloured in either of two images, the share with equal colour in both.

    Args:
        image, other (`np.ndarray` of shape `(height, width, 3)`, `uint8`): images of equal size.

    Raises:
        `ValueError`: the images differ in size.
    """
    if image.shape != other.shape:
        raise ValueError(f"The images differ in shape: {image.shape} and {other.shape}; resize one of them.")
    a, b = label_maps(np.stack([image, other]))
    union = ((a > 0) | (b > 0)).sum()
    return float(((a == b) & (a > 0)).sum() / union) if union else 1.0


# --- captions --------------------------------------------------------------------------------------------------------

_PLACES = rf"(?:top|middle|bottom) (?:left|centre|right)|{'|'.join(('centre', 'left', 'right', 'top', 'bottom'))}"
_ENTRY = re.compile(
    rf"\b(?:(?P<count>a|an|the|\d+|{'|'.join(NUMBERS)}) )?(?:(?!{'|'.join(COLOURS)})\w+ )?"
    rf"(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})s?\b(?: at the (?P<place>{_PLACES})\b)?"
)
# Words for what a first frame cannot show. The stems cover "moves", "moving", "turned", "gradually", ...
_LATER = re.compile(
    r"\b(?:turn|becom|mov|grow|shrink|blink|bounc|drift|slid|transform|disappear|vanish|knock|chang|mak|roll|fall|rise"
    r"|stay|still(?! picture)|slow|gradual|then|while|after|before|towards?|into|upwards?|downwards?|away|later|start"
    r"|begin|end)\w*"
)


def parse_caption(text: str) -> list[tuple[int, str, str, str | None]]:
    """Returns the objects that a caption names, in order: (count, colour, shape, place or `None`)."""
    words = {word: number for number, word in enumerate(NUMBERS)}
    found = []
    for match in _ENTRY.finditer(text.lower()):
        count = match["count"] or "a"
        number = int(count) if count.isdigit() else words.get(count, 1)
        found.append((number, match["colour"], match["shape"], match["place"]))
    return found


def later_words(caption: str) -> list[str]:
    """Returns the words of motion, change or time in a caption, which a first frame cannot show."""
    return _LATER.findall(caption.lower())


def _place_fits(place: str | None, wanted: str | None) -> bool:
    """Returns whether a named place satisfies the wanted one. `None` accepts any, `"left"` each of the three on the left."""
    return wanted is None or place == wanted or (wanted != "centre" and place is not None and wanted in place.split())


def _lies_at(blob: Blob, place: str, tolerance: float = 0.03) -> bool:
    """Returns whether a blob is at a named place, with some tolerance at the place's borders."""
    names = {
        place_name(np.clip(blob.place[0] + dx, 0, 1), np.clip(blob.place[1] + dy, 0, 1))
        for dx in (-tolerance, 0, tolerance)
        for dy in (-tolerance, 0, tolerance)
    }
    return any(_place_fits(name, place) for name in names)


def _gathered(named: list[tuple], kinds: set[tuple[str, str]]) -> list[tuple]:
    """Merges a caption's entries of each given kind (colour, shape) into one, with the sum of their counts and no place."""
    totals = {kind: sum(item[0] for item in named if item[1:3] == kind) for kind in kinds}
    merged = [(total, *kind, None) for kind, total in totals.items() if total]
    return [item for item in named if item[1:3] not in kinds] + merged


def _f1(matches: int, named: int, wanted: int) -> float:
    return 2 * matches / (named + wanted) if named + wanted else 1.0


def score_caption(caption: str, true_caption: str) -> float:
    """Returns the F1 score over (count, colour, shape, place) of a caption's objects, minus 0.25 for each word about later.

    A place counts only if the true caption names one; `"left"` accepts each of the three places on the left. Objects of a kind
    without a place count as one entry, whether the caption lists or counts them.
    """
    wanted = parse_caption(true_caption)
    placed = {item[1:3] for item in wanted if item[3] is not None}
    named = _gathered(parse_caption(caption), {item[1:3] for item in wanted} - placed)
    rest, matches = list(named), 0
    for item in wanted:
        hit = next((other for other in rest if other[:3] == item[:3] and _place_fits(other[3], item[3])), None)
        if hit is not None:
            rest.remove(hit)
            matches += 1
    return max(0.0, _f1(matches, len(named), len(wanted)) - 0.25 * len(later_words(caption)))


def score_anchor(image: np.ndarray, caption: str | Sequence[ShapeObject]) -> float:
    """Returns the F1 score over the multiset of (colour, shape), times the share of named places that hold their object.

    Args:
        image (`np.ndarray` of shape `(height, width, 3)`, `uint8`): the anchor.
        caption (`str` or `Sequence[ShapeObject]`): first-frame caption, or the objects themselves.
    """
    if isinstance(caption, str):
        wanted = [item[1:] for item in parse_caption(caption) for _ in range(item[0])]
    else:
        wanted = [(item.colour, item.shape, place_name(item.x, item.y)) for item in caption]
    blobs = find_objects(image)
    rest, matches, placed, places = list(blobs), 0, 0, 0
    for colour, shape, place in sorted(wanted, key=lambda item: item[2] is None):
        same = [blob for blob in rest if (blob.colour, blob.shape) == (colour, shape)]
        right = [blob for blob in same if place is not None and _lies_at(blob, place)]
        places += place is not None
        placed += bool(right)
        if same:
            rest.remove((right or same)[0])
            matches += 1
    return _f1(matches, len(blobs), len(wanted)) * (placed / places if places else 1.0)
