"""The shapes world's judge: its faults, its training, and how it stands in the embedded model."""

import json

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_fvg.embedded import EMBEDDED_FOLDER, load_embedded
from diffusers_fvg.shapes.blobs import find_objects
from diffusers_fvg.shapes.held_out import held_out_scenes
from diffusers_fvg.shapes.judge import ShapesJudge
from diffusers_fvg.shapes.judge_report import COUNTS, count_scenes, judge_claims
from diffusers_fvg.shapes.prompts import is_held_out
from diffusers_fvg.shapes.train_judge import (
    FAULTS,
    NUM_KINDS,
    draw_batch,
    faulty,
    pictures,
    scene_group,
    tally,
)
from diffusers_fvg.shapes.world import COLOURS, PALETTE, SHAPES, ShapeObject, render


def item(colour="red", shape="circle", x=0.5, y=0.5, radius=0.1) -> ShapeObject:
    return ShapeObject(colour, shape, x, y, radius)


APART = (item(x=0.2), item("blue", "square", x=0.8))
OVERLAPPING = (item(x=0.45), item("blue", "square", x=0.55))
THREE = (item(x=0.2, y=0.2), item(x=0.5), item(x=0.8, y=0.8))


def kinds(objects) -> list[tuple[str, str]]:
    return sorted((each.colour, each.shape) for each in objects)


def test_pictures_are_soft_and_noisy_and_as_bright_as_they_were():
    """The middle of a large object has nothing but its own colour around it."""
    large, colour = item("green", "square", radius=0.3), torch.tensor(PALETTE["green"]) / 127.5 - 1
    drawn = pictures([(large,)] * 8, np.random.default_rng(0))
    assert drawn.shape == (8, 3, 64, 64)
    for picture in drawn:
        bright = (picture[:, 28:36, 28:36].mean((1, 2)) * colour).sum() / colour.square().sum()
        assert 0.9 < bright < 1.05
    edges = [len(picture[0].unique()) for picture in drawn]
    assert min(edges) > 100


@pytest.mark.parametrize(
    ("fault", "objects", "expected"),
    [
        ("swapped_colours", APART, [("blue", "circle"), ("red", "square")]),
        ("swapped_shapes", APART, [("blue", "circle"), ("red", "square")]),
        ("one_missing", THREE, [("red", "circle")] * 2),
        ("one_more", THREE, [("red", "circle")] * 4),
    ],
)
def test_a_fault_changes_what_it_says(fault, objects, expected):
    assert kinds(FAULTS[fault](objects, np.random.default_rng(0))) == expected


def test_relations_turn_round():
    rng = np.random.default_rng(0)
    left, right = FAULTS["opposite_relation"](APART, rng)
    assert (left.x, right.x) == (0.8, 0.2) and kinds((left, right)) == kinds(APART)
    # What is drawn last is in front.
    assert FAULTS["opposite_relation"](OVERLAPPING, rng) == OVERLAPPING[::-1]
    assert FAULTS["opposite_side"](APART, rng) is None and FAULTS["opposite_relation"](THREE, rng) is None


@pytest.mark.parametrize("seed", range(3))
def test_a_count_is_off_by_one_in_the_picture(seed):
    """Read back from pixels: labels come from scenes, and this compares the two."""
    wrong = FAULTS["count_off_by_one"](THREE, np.random.default_rng(seed))
    assert len(wrong) in (2, 4) and len(find_objects(render(wrong, 1)[0])) == len(wrong)
    merged = FAULTS["merged"](THREE, np.random.default_rng(seed))
    assert len(find_objects(render(merged, 1)[0])) == 2


def test_a_misshapen_object_counts_as_a_part_of_each_shape():
    """One of three red circles is partly another shape; the parts of what is shown are three objects all the same."""
    (*whole, _), wrong = THREE, FAULTS["misshapen"](THREE, np.random.default_rng(0))
    assert kinds(wrong) == kinds(THREE) and sum(item in wrong for item in whole) >= 1
    counted = tally(wrong)[:NUM_KINDS]
    assert counted.sum() == pytest.approx(3) and 2.35 < counted[0] < 2.65 and 0.35 < max(counted[1:]) < 0.65


def test_every_wrong_picture_is_unlike_the_right_one():
    rng, met = np.random.default_rng(0), set()
    for scene in held_out_scenes(6, seed=3):
        caption, faults, (right, *wrong) = scene_group(scene, rng, 6, relations=0.3)
        met |= set(faults[1:])
        for name, objects in zip(faults[1:], wrong):
            apart = np.abs(render(objects, 1)[0].astype(int) - render(right, 1)[0]).max(-1) > 60
            assert apart.sum() >= 6, (name, caption)
    assert met == set(FAULTS)


def test_a_caption_without_places_is_not_broken_by_places():
    rng = np.random.default_rng(0)
    names = {faulty(THREE, "three red circles", rng)[0] for _ in range(60)}
    assert not names & {"displaced", "opposite_relation"} and len(names) > 3


def test_batches_repeat_and_never_show_a_held_out_prompt(monkeypatch):
    captions, pixels, tallies = draw_batch(np.random.default_rng(5), 3, 2)
    again = draw_batch(np.random.default_rng(5), 3, 2)
    assert captions == again[0] and torch.equal(pixels, again[1]) and pixels.shape == (6, 3, 64, 64)
    assert tallies.shape == (6, 10 * NUM_KINDS) and len(COLOURS) * len(SHAPES) == NUM_KINDS
    seen = []
    monkeypatch.setattr("diffusers_fvg.shapes.train_judge.make_scene", _noted(seen))
    draw_batch(np.random.default_rng(6), 8, 2)
    assert len(seen) == 8 and not any(map(is_held_out, seen))


def _noted(seen):
    from diffusers_fvg.shapes.prompts import make_scene

    def noted(*args, **kwargs):
        scene = make_scene(*args, **kwargs)
        seen.append(scene.prompt)
        return scene

    return noted


def test_a_tally_counts_kinds_and_thirds():
    counted = tally(THREE + APART)
    assert counted[:NUM_KINDS].tolist() == [4, *[0] * 12, 1, *[0] * 4]
    placed = counted[NUM_KINDS:].reshape(NUM_KINDS, 3, 3)
    assert placed[0].tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]] and placed[13, 1, 2] == 1


# -- the judge that ships ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge() -> ShapesJudge:
    return ShapesJudge.from_pretrained(EMBEDDED_FOLDER / "anchor_judge")


def image_of(objects) -> PIL.Image.Image:
    return PIL.Image.fromarray(render(objects, 1)[0])


def test_it_is_small(judge):
    files = list((EMBEDDED_FOLDER / "anchor_judge").iterdir())
    assert sum(file.stat().st_size for file in files) <= 2_000_000
    assert judge.dtype == torch.float32 or judge.dtype == torch.float16


def test_it_prefers_the_right_picture(judge):
    caption = "A still picture on a plain grey background: three red circles"
    images = [
        image_of(objects)
        for objects in (THREE, THREE[:2], (*THREE, item(x=0.8, y=0.2)), (*THREE[:2], item("blue", x=0.8, y=0.8)))
    ]
    right, *wrong = (judgement.score for judgement in judge.judge(images, [caption] * 4))
    assert right > judge.threshold > max(wrong)


def test_a_picture_of_another_size_is_read_alike(judge):
    caption = "a red circle at the middle left, a blue square at the middle right"
    large = PIL.Image.fromarray(render(APART, 1, 256, 256)[0])
    small, big = (
        judgement.score for judgement in judge.judge([image_of(APART)], [caption]) + judge.judge([large], [caption])
    )
    assert small > judge.threshold and big > judge.threshold


def test_the_embedded_model_chooses_its_anchors():
    pipe = load_embedded()
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.anchor_judge, ShapesJudge) and pipe.call_defaults["composer_num_candidates"] == 8
    output = pipe(
        "Three red circles rest on a plain background",
        num_inference_steps=2,
        composer_num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
    )
    (candidates,) = output.candidates
    assert 1 <= len(candidates) <= 8 and output.anchor_images[0] is max(candidates, key=lambda each: each.score).image
    assert pipe("A red circle", mode="direct", num_inference_steps=2).candidates is None


def test_prompts_of_every_count_are_new_and_distinct():
    scenes = count_scenes(4)
    assert len({scene.prompt for scene in scenes}) == 4 * len(COUNTS) and all(
        is_held_out(scene.prompt) for scene in scenes
    )
    assert [int(scene.meta["numbers"].split(",")[0]) for scene in scenes] == sorted(COUNTS * 4)


def test_claims_are_decided_by_their_bars():
    report = {
        "pairs": {"all": 0.98},
        "counts": {"1": {"all": 0.8}, "4": {"all": 0.94}},
        "relations": {"1": {"both": 0.9}, "4": {"both": 0.95}},
        "seconds": {"1": {"call": 1.0, "pictures": 1.0}, "4": {"call": 1.7, "pictures": 1.5}},
        "motion": {"moving": [0.1, 0.01], "frozen": [0.0, 0.03], "still prompts": [0.0]},
    }
    rows = judge_claims(report, 4)
    assert [row["met"] for row in rows] == [True, False, True, False, False, True, None]
    assert [row["value"] for row in rows] == [0.98, 0.94, 0.95, 1.7, 1, 1, 1] and json.dumps(rows)
