"""Trains the shapes world's judge by contrast: on a caption, the image of its scene, and images with one fault.

The fault of an image is known, because the scene from which it is rendered was changed. So the labels do not depend on
`scorer.py`, which reads the pixels in the benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from .held_out import held_out_scenes
from .judge import ShapesJudge
from .loop import train, training_device
from .prompts import (
    CAPTION_START,
    CATEGORIES,
    brief_caption,
    make_scene,
    place_centre,
    place_name,
    planned_caption,
)
from .train_models import TEXT_ENCODER_CONFIG, count, optimizers
from .world import COLOURS, SHAPES, Change, Scene, ShapeObject, render


# Shares of the categories. Those that composers often get wrong have more: counts, and one object in front of another.
JUDGE_WEIGHTS = dict.fromkeys((*CATEGORIES, "placement"), 0.05) | {
    "generative_numeracy": 0.42,
    "spatial_relationships": 0.28,
}
NUM_KINDS = len(COLOURS) * len(SHAPES)
# The smallest of 0.5, 0.7, 0.8, 0.9, 0.95 and 0.99 with which the image chosen among up to 8 is as often right as the image with the
# highest score of all 8, on 60 training prompts of counts.
THRESHOLD = 0.9
Objects = tuple[ShapeObject, ...]


def stated(scene: Scene, rng: np.random.Generator) -> tuple[Objects, str]:
    """Returns the objects of a scene's first frame and a caption of them, with or without places."""
    objects = tuple(replace(item, changes=()) for item in scene.objects)
    if scene.category == "generative_numeracy":
        if rng.random() < 0.35:
            return objects, brief_caption(scene)
        if rng.random() < 0.6:
            return _laid_out(objects, planned_caption(scene), rng), planned_caption(scene)
    return objects, brief_caption(scene) if rng.random() < 0.2 else scene.caption


def _laid_out(objects: Objects, caption: str, rng: np.random.Generator) -> Objects:
    """Moves objects to the places that a caption lists, in its order, with small random shifts."""
    places = [place_centre(part.rpartition(" at the ")[2]) for part in caption.removeprefix(CAPTION_START).split(", ")]
    shifts = rng.uniform(-0.06, 0.06, size=(len(objects), 2))
    return tuple(
        replace(item, x=x + dx, y=y + dy) for item, (x, y), (dx, dy) in zip(objects, places, shifts, strict=True)
    )


# -- faults -----------------------------------------------------------------------------------------------------------
# Each function takes the objects of an image and returns those of a wrong one, or `None` if the fault does not apply.


def _free_place(objects: Objects, radius: float, rng: np.random.Generator) -> tuple[float, float] | None:
    for _ in range(40):
        x, y = rng.uniform(radius + 0.02, 0.98 - radius, size=2)
        if all(np.hypot(x - item.x, y - item.y) > 1.15 * (radius + item.radius) for item in objects):
            return float(x), float(y)
    return None


def one_missing(objects: Objects, rng: np.random.Generator) -> Objects | None:
    drop = int(rng.integers(len(objects)))
    return objects[:drop] + objects[drop + 1 :]


def one_more(objects: Objects, rng: np.random.Generator) -> Objects | None:
    """Repeats one object at another place."""
    item = objects[int(rng.integers(len(objects)))]
    place = _free_place(objects, item.radius, rng)
    return None if place is None else (*objects, replace(item, x=place[0], y=place[1]))


def one_strange(objects: Objects, rng: np.random.Generator) -> Objects | None:
    """Adds an object of another kind, which may be small or touch others."""
    small = rng.random() < 0.4
    radius = float(rng.uniform(0.035, 0.06) if small else rng.uniform(0.08, 0.13))
    near = objects[int(rng.integers(len(objects)))]
    place = rng.normal((near.x, near.y), near.radius) if small else _free_place(objects, radius, rng)
    if place is None:
        return None
    colours = [colour for colour in COLOURS if colour != near.colour]
    x, y = np.clip(place, radius, 1 - radius)
    kind = str(rng.choice(colours)), str(rng.choice(SHAPES))
    return (*objects, ShapeObject(*kind, float(x), float(y), radius))


def count_off_by_one(objects: Objects, rng: np.random.Generator) -> Objects | None:
    """Adds or removes one object of a kind, and moves all objects, so that no gap or overlap reveals the change."""
    kinds = list(dict.fromkeys((item.colour, item.shape) for item in objects))
    kind = kinds[int(rng.integers(len(kinds)))]
    own = next(item for item in objects if (item.colour, item.shape) == kind)
    wrong = list(one_more((own,), rng) or ()) if rng.random() < 0.6 or len(objects) == 1 else []
    others = list(objects) + wrong[1:]
    if not wrong:
        others.remove(own)
    placed: list[ShapeObject] = []
    for item in others:
        place = _free_place(tuple(placed), 1.08 * item.radius, rng)
        if place is None:
            return None
        placed.append(replace(item, x=place[0], y=place[1]))
    return tuple(placed)


def swapped_colours(objects: Objects, rng: np.random.Generator) -> Objects | None:
    """Exchanges the colours of two kinds: "a red circle, a blue square" becomes "a blue circle, a red square"."""
    return _swapped(objects, "colour", rng)


def swapped_shapes(objects: Objects, rng: np.random.Generator) -> Objects | None:
    return _swapped(objects, "shape", rng)


def _swapped(objects: Objects, name: str, rng: np.random.Generator) -> Objects | None:
    values = list(dict.fromkeys(getattr(item, name) for item in objects))
    if len(values) < 2 or len({(item.colour, item.shape) for item in objects}) < 2:
        return None
    a, b = rng.permutation(values)[:2]
    other = {a: b, b: a}
    return tuple(replace(item, **{name: str(other.get(getattr(item, name), getattr(item, name)))}) for item in objects)


def one_changed(objects: Objects, rng: np.random.Generator) -> Objects | None:
    """Gives one object another colour or another shape."""
    index, item = (k := int(rng.integers(len(objects)))), objects[k]
    name, values = ("colour", COLOURS) if rng.random() < 0.4 else ("shape", SHAPES)
    value = str(rng.choice([value for value in values if value != getattr(item, name)]))
    return (*objects[:index], replace(item, **{name: value}), *objects[index + 1 :])


def misshapen(objects: Objects, rng: np.random.Generator) -> Objects | None:
    """Gives one object a shape halfway between a triangle and another shape. Circle and square differ too little for this."""
    index, item = (k := int(rng.integers(len(objects)))), objects[k]
    shape = "triangle" if item.shape != "triangle" else str(rng.choice(("circle", "square")))
    amount = float(rng.uniform(0.35, 0.65))
    change = Change("reshape", shape, -amount, 1 - amount)
    return (*objects[:index], replace(item, changes=(change,)), *objects[index + 1 :])


def opposite_relation(objects: Objects, rng: np.random.Generator) -> Objects | None:
    """Exchanges the places of two objects; if they overlap, brings the other one to the front."""
    if len(objects) != 2:
        return None
    a, b = objects
    return (b, a) if _overlap(objects) else (replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y))


def opposite_side(objects: Objects, rng: np.random.Generator) -> Objects | None:
    """Moves the front one of two overlapping objects to the other side."""
    if not _overlap(objects):
        return None
    a, b = objects
    return replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)


def _overlap(objects: Objects) -> bool:
    return len(objects) == 2 and np.hypot(objects[0].x - objects[1].x, objects[0].y - objects[1].y) < 0.9 * sum(
        item.radius for item in objects
    )


def merged(objects: Objects, rng: np.random.Generator) -> Objects | None:
    """Merges two objects of one kind: they overlap, or one large object takes the place of both."""
    pairs = [
        (i, j)
        for i, a in enumerate(objects)
        for j, b in enumerate(objects[:i])
        if (a.colour, a.shape) == (b.colour, b.shape)
    ]
    if not pairs:
        return None
    i, j = pairs[int(rng.integers(len(pairs)))]
    a, b = objects[i], objects[j]
    rest = tuple(item for k, item in enumerate(objects) if k not in (i, j))
    if rng.random() < 0.3:
        return (*rest, replace(a, x=(a.x + b.x) / 2, y=(a.y + b.y) / 2, radius=1.3 * a.radius))
    angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 0.9) * a.radius
    x, y = b.x + reach * np.cos(angle), b.y + reach * np.sin(angle)
    return (*rest, b, replace(a, x=float(np.clip(x, 0.08, 0.92)), y=float(np.clip(y, 0.08, 0.92))))


def displaced(objects: Objects, rng: np.random.Generator) -> Objects | None:
    """Moves one object far away, to another place of the 3 x 3 grid."""
    index = int(rng.integers(len(objects)))
    item, rest = objects[index], (*objects[:index], *objects[index + 1 :])
    for _ in range(10):
        place = _free_place(rest, item.radius, rng)
        far = place is not None and np.hypot(place[0] - item.x, place[1] - item.y) > 0.28
        if far and place_name(*place) != place_name(item.x, item.y):
            return (*objects[:index], replace(item, x=place[0], y=place[1]), *objects[index + 1 :])
    return None


Fault = Callable[[Objects, np.random.Generator], Objects | None]
FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        one_missing,
        one_more,
        one_strange,
        count_off_by_one,
        swapped_colours,
        swapped_shapes,
        one_changed,
        misshapen,
        opposite_relation,
        opposite_side,
        merged,
        displaced,
    )
}
# Relations of two objects are learnt last, because they depend on shapes and places. After the share `LATE` of the steps, the
# share `RELATIONS` of the faults of two objects are of this kind.
OF_RELATIONS, LATE, RELATIONS = ("opposite_relation", "opposite_side", "displaced"), 0.75, 0.5


def faulty(objects: Objects, caption: str, rng: np.random.Generator, relations: float = 0.0) -> tuple[str, Objects]:
    """Makes a wrong image for a caption; returns the name of its fault, and its objects.

    Args:
        objects (`tuple[ShapeObject, ...]`): objects of the right image.
        caption (`str`): caption of the right image.
        rng (`np.random.Generator`): generator of all random choices.
        relations (`float`): share of the faults of two objects that concern their relation.
    """
    names = dict.fromkeys(FAULTS)
    if " at the " not in caption:
        # Places are not faults if the caption does not name them.
        del names["displaced"], names["opposite_relation"]
    if " in front of a " in caption or " behind a " in caption:
        del names["opposite_side"]
    if len(objects) == 2 and "displaced" in names and rng.random() < relations:
        names = {name: None for name in names if name in OF_RELATIONS} or names
    while True:
        name = str(rng.choice(list(names)))
        found = FAULTS[name](objects, rng)
        if found is not None and (name == "opposite_relation" and _overlap(objects) or _seen(found) != _seen(objects)):
            return name, found


def _seen(objects: Objects) -> list[tuple]:
    return sorted((item.colour, item.shape, round(item.x, 3), round(item.y, 3), item.changes) for item in objects)


# -- pictures ---------------------------------------------------------------------------------------------------------


def pictures(shown: Sequence[Objects], rng: np.random.Generator) -> torch.Tensor:
    """Renders objects as a composer may draw them, `(B, 3, 64, 64)` in about [-1, 1]: slightly moved, blurred and noisy."""
    drawn = []
    for objects in shown:
        scale, shift = rng.uniform(0.9, 1.12), rng.normal(0, 0.012, size=(len(objects), 2))
        moved = [
            replace(item, x=item.x + dx, y=item.y + dy, radius=item.radius * scale)
            for item, (dx, dy) in zip(objects, shift)
        ]
        drawn.append(render(moved, 1)[0])
    pixels = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 127.5 - 1
    blur, bright, rough = (
        torch.from_numpy(rng.uniform(low, high, (len(drawn), 1, 1, 1))).float()
        for low, high in ((0.05, 0.8), (0.92, 1.03), (0.0, 0.03))
    )
    taps = torch.exp(-(torch.arange(-2, 3).view(1, 5, 1, 1) ** 2) / (2 * blur**2))
    taps = taps / taps.sum(1, keepdim=True)
    for axis in (2, 3):
        pixels = sum(taps[:, k : k + 1] * pixels.roll(k - 2, axis) for k in range(5))
    noise = torch.from_numpy(rng.standard_normal(pixels.shape, dtype=np.float32))
    return bright * pixels + rough * noise


def tally(objects: Objects) -> np.ndarray:
    """Counts the objects of each kind, `(18,)`, and of each kind at each place of the 3 x 3 grid, `(162,)`, in one array."""
    kinds, placed = np.zeros(NUM_KINDS, np.float32), np.zeros((NUM_KINDS, 3, 3), np.float32)
    for item in objects:
        row, column = (min(max(int(value * 3), 0), 2) for value in (item.y, item.x))
        shares = {item.shape: 1.0} | {change.value: float(change.progress(np.zeros(()))) for change in item.changes}
        shares[item.shape] -= sum(shares.values()) - 1
        for shape, share in shares.items():
            kind = len(SHAPES) * COLOURS.index(item.colour) + SHAPES.index(shape)
            kinds[kind] += share
            placed[kind, row, column] += share
    return np.concatenate([kinds, placed.reshape(-1)])


class RoundTrip:
    """Encodes and decodes images with the composer's VAE and adds noise to the latents, as composed images are decoded, too."""

    def __init__(self, folder: Path):
        from diffusers import AutoencoderKLWan

        vae = AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32)
        self.vae = vae.to(training_device()).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        latents = self.vae.encode(pixels[:, :, None]).latent_dist.mode()
        off = 0.25 * torch.rand(len(latents), 1, 1, 1, 1).to(latents) * latents.std((0, 2, 3, 4), keepdim=True)
        return self.vae.decode(latents + off * torch.randn_like(latents)).sample[:, :, 0].clamp(-1, 1)


# -- training ---------------------------------------------------------------------------------------------------------


def scene_group(
    scene: Scene, rng: np.random.Generator, size: int, relations: float = 0.0
) -> tuple[str, list[str], list[Objects]]:
    """Returns a caption, the fault of each of `size` images (`""` for the first, which is right), and their objects."""
    objects, caption = stated(scene, rng)
    wrong = [faulty(objects, caption, rng, relations) for _ in range(size - 1)]
    return caption, ["", *(name for name, _ in wrong)], [objects, *(found for _, found in wrong)]


def draw_batch(
    rng: np.random.Generator, groups: int, size: int, relations: float = 0.0
) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Draws a batch: captions of `groups`, images `(groups * size, 3, 64, 64)` in about [-1, 1], and the tallies of objects."""

    def scene() -> Scene:
        category = str(rng.choice(list(JUDGE_WEIGHTS), p=list(JUDGE_WEIGHTS.values())))
        return make_scene(category, rng, held_out=False)

    drawn = [scene_group(scene(), rng, size, relations) for _ in range(groups)]
    shown = [objects for *_, group in drawn for objects in group]
    tallies = torch.from_numpy(np.stack([tally(objects) for objects in shown]))
    return [caption for caption, *_ in drawn], pictures(shown, rng), tallies


def train_judge(
    folder: Path,
    steps: int = 1000,
    groups: int = 48,
    size: int = 4,
    round_trips: int = 2,
    peak: float = 2e-3,
) -> dict[str, int]:
    """Trains the judge on rendered images; writes `folder/anchor_judge` (float16).

    Args:
        folder (`Path`): folder with `text_encoder` and `vae`.
        steps (`int`): training steps.
        groups (`int`): captions per batch.
        size (`int`): images per caption, of which the first is right.
        round_trips (`int`): captions per batch whose images are encoded and decoded by the VAE.
        peak (`float`): highest learning rate.
    """
    from transformers import UMT5EncoderModel

    torch.manual_seed(0)
    text_encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    words = {"vocab_size": text_encoder.config.vocab_size}
    judge = ShapesJudge(TEXT_ENCODER_CONFIG | words, threshold=THRESHOLD)
    judge.text_encoder.load_state_dict(text_encoder.encoder.state_dict())
    judge.text_encoder.requires_grad_(False)
    # Both encoders also predict the tally of objects. From pairs alone, they would need far longer to agree on features.
    counts, through = torch.nn.Linear(judge.config.sum_width, 10 * NUM_KINDS), RoundTrip(folder / "vae")

    def loss_of(step: int) -> tuple[str, torch.Tensor]:
        relations = RELATIONS if step >= LATE * steps else 0.0
        captions, pixels, tallies = draw_batch(np.random.default_rng((3, step)), groups, size, relations)
        pixels, tallies = pixels.to(training_device()), tallies.to(training_device())
        pixels[: round_trips * size] = through(pixels[: round_trips * size])
        said = judge.read_captions(judge.tokenize(captions).to(training_device()))
        shown = judge.read_pictures(pixels)
        logits = judge.compare(shown, said.repeat_interleave(size, dim=0)).view(groups, size)
        rank = torch.nn.functional.cross_entropy(logits, logits.new_zeros(groups, dtype=torch.long))
        right = torch.zeros_like(logits)
        right[:, 0] = 1
        # Right and wrong images have the same total weight, so that a probability of 0.5 means equal likelihood.
        weight = torch.where(right > 0, 0.5, 0.5 / (size - 1)) * size
        known = torch.nn.functional.binary_cross_entropy_with_logits(logits, right, weight)
        told = torch.ones_like(tallies[::size])
        told[[" at the " not in caption for caption in captions], NUM_KINDS:] = 0
        counted = (counts(shown) - tallies).square().sum(-1).mean()
        counted = counted + ((counts(said) - tallies[::size]).square() * told).sum(-1).mean()
        return "pair", rank + known + 0.2 * counted

    modules = {"judge": judge, "counts": counts}
    train(folder, "judge", steps, modules, lambda: optimizers(list(modules.values()), peak), loss_of, peak=peak)
    judge.to(torch.float16).save_pretrained(folder / "anchor_judge")
    return {"samples": steps * groups * size, **count(judge)}


@torch.no_grad()
def held_out_pairs(judge: ShapesJudge, per_category: int = 60, seed: int = 1, size: int = 6) -> dict[str, list[bool]]:
    """Returns for each fault, on held-out prompts, whether the judge prefers the right image to the wrong one, pair by pair."""
    rng, found = np.random.default_rng((4, seed)), {}
    for scene in held_out_scenes(per_category, seed):
        caption, faults, objects = scene_group(scene, rng, size)
        right, *wrong = judge(pictures(objects, rng), judge.tokenize([caption] * size)).tolist()
        for name, logit in zip(faults[1:], wrong):
            found.setdefault(name, []).append(right > logit)
    return found


def judge_score(folder: Path) -> float:
    """Returns the share of held-out pairs in which the judge prefers the right image."""
    judge = ShapesJudge.from_pretrained(folder / "anchor_judge", torch_dtype=torch.float32)
    return float(np.mean([right for pairs in held_out_pairs(judge).values() for right in pairs]))
