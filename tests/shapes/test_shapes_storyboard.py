"""The world's storyboards and motion captions, their scores, and the study of storyboards."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tiny import tiny_pipeline

from diffusers_fvg.rewrite.storyboard import Moment
from diffusers_fvg.rewrite.tasks import MOTION, read_moments, read_motion, storyboard_task
from diffusers_fvg.shapes import storyboard as study
from diffusers_fvg.shapes.held_out import score_written_motion, score_written_storyboard, settled_caption
from diffusers_fvg.shapes.prompts import (
    CAPTION_START,
    CATEGORIES,
    first_frame_caption,
    make_scene,
    moment_caption,
    motion_caption,
    planned_caption,
    storyboard,
)
from diffusers_fvg.shapes.scorer import score_anchor, score_video
from diffusers_fvg.shapes.tokenizer import MOMENT_TIMES, chat_tokenizer
from diffusers_fvg.shapes.train_rewriter import INSTRUCTIONS, TASKS, training_pair, true_answer
from diffusers_fvg.shapes.world import Change, Scene, ShapeObject, render


def scenes(category: str, count: int = 12) -> list[Scene]:
    rng = np.random.default_rng(3)
    return [make_scene(category, rng) for _ in range(count)]


def scene(*changes: Change, category: str = "interaction") -> Scene:
    objects = (ShapeObject("red", "circle", 0.2, 0.2, 0.12, changes), ShapeObject("blue", "square", 0.8, 0.8, 0.12))
    return Scene(category, "A red circle and a blue square", first_frame_caption(objects), objects)


@pytest.mark.parametrize(
    "changes",
    [
        (),
        (Change("move", (0.5, 0.3)),),
        (Change("recolour", "green", 0.2, 0.4),),
        (Change("reshape", "triangle", 0.0, 0.5),),
        (Change("vanish", None, 0.3, 0.7),),
        (Change("blink", 2),),
        (Change("bounce", (-0.3, 2)),),
    ],
    ids=lambda changes: changes[0].kind if changes else "still",
)
def test_moment_captions_say_what_is_rendered(changes):
    clip = render(scene(*changes).objects, 33)
    told = {time: moment_caption(scene(*changes), time) for time in np.linspace(0, 1, 33)}
    assert told[0.0] is not None and told[1.0] is not None
    for frame, caption in zip(clip, told.values()):
        assert caption is None or score_anchor(frame, caption) == 1.0


def test_what_no_caption_tells_has_none():
    assert moment_caption(scene(Change("recolour", "green")), 0.5) is None
    assert moment_caption(scene(Change("scale", 2.0)), 1.0) is None
    assert moment_caption(scene(Change("move", (0.6, 0.6))), 1.0) is None
    gone = scene(Change("vanish"))
    assert moment_caption(Scene(gone.category, gone.prompt, gone.caption, gone.objects[:1]), 1.0) is None


@pytest.mark.parametrize(
    ("category", "numbers"),
    [
        ("consistent_attr", {1}),
        ("dynamic_attr", {2}),
        ("spatial_relationships", {1}),
        ("motion_binding", {2}),
        ("action_binding", {1}),
        # What takes the other's colour lies too close to it to be told from it.
        ("interaction", {1, 2}),
        ("generative_numeracy", {1}),
    ],
)
def test_storyboards_have_later_moments_where_the_prompt_settles_them(category, numbers):
    made = [(item, storyboard(item)) for item in scenes(category, 30)]
    assert {len(moments) for _, moments in made} == numbers
    for item, moments in made:
        assert moments[0] == Moment(item.caption, 0.0)
        assert all(moment.time == 1.0 for moment in moments[1:])
        assert (len(moments) == 1) == ("turning it" in item.prompt) or category != "interaction"


def test_the_end_of_a_way_is_the_side_it_leads_to():
    for item in scenes("motion_binding", 30):
        first, last = storyboard(item)
        sides = {"left": " left", "right": " right", "up": "top ", "down": "bottom "}
        for number in (1, 2):
            if item.meta[f"d_{number}"]:
                place = last.caption.split(f"{item.meta[f'object_{number}']} at the ")[1].split(",")[0]
                assert sides[item.meta[f"d_{number}"]].strip() in place.split()
        assert len(storyboard(item, 3)) == 3


@pytest.mark.parametrize("category", [*CATEGORIES, "placement"])
def test_true_answers_pass_the_checks_and_score_1(category):
    for item in scenes(category):
        for number in (2, 3):
            moments = storyboard(item, number)
            assert storyboard_task(number).problem(item.prompt, moments, str) is None
            assert score_written_storyboard(moments, item, number) == 1.0
        assert MOTION.problem(item.prompt, motion_caption(item), str) is None
        assert score_written_motion(motion_caption(item).capitalize() + ".", item) == 1.0


def test_motion_captions():
    words = {
        "A square gradually turns from red to blue": "the square turns from red to blue",
        "A red circle transforms into a red square": "the red circle transforms into a red square",
        "A red circle stays still while a blue square grows": "the blue square grows",
        "A red circle slides into a blue square, turning it red": "the red circle slides into the blue square, turning it red",
    }
    for prompt, motion in words.items():
        item = scene(Change("move", (0.1, 0.0)))
        assert motion_caption(Scene(item.category, prompt, item.caption, item.objects)) == motion
    assert motion_caption(scene()) == "the picture stays still"
    item = Scene("", "A red circle grows while a blue square shrinks", "", scene(Change("scale", 2.0)).objects)
    assert score_written_motion("the red circle grows while the blue square blinks", item) == 0.5
    assert score_written_motion("the red circle grows", item) == pytest.approx(2 / 3)


def test_a_written_storyboard_shows_one_scene():
    item = next(item for item in scenes("dynamic_attr") if "turns" in item.prompt)
    old, new = (item.meta[f"state {k}"] for k in (0, 1))

    def score(*moments):
        return score_written_storyboard([Moment(f"{CAPTION_START} {text}", time) for text, time in moments], item)

    assert score((f"{old} at the top left", 0.0), (f"{new} at the top left", 1.0)) == 1.0
    assert score((f"{old} at the top left", 0.0), (f"{new} at the top right", 1.0)) == 0.5
    assert score((f"{old} at the top left", 0.0), (f"{old} at the top left", 1.0)) == 0.5
    assert score((f"{old} at the top left", 0.0)) == 0.5
    assert score((f"{old} at the centre", 0.0), (f"{new} at the centre", 0.5), (f"{new} at the centre", 1.0)) == 0.0
    movers = (item for item in scenes("motion_binding", 40) if not item.meta["d_2"])
    mover = next(item for item in movers if item.meta["d_1"] == "right")
    name = mover.meta["object_1"]
    ends = [f"a {name} at the {place}" for place in ("top left", "top right", "bottom right")]
    made = [[Moment(ends[0], 0.0), Moment(ends[k], 1.0)] for k in (1, 2)]
    assert settled_caption(mover, 1.0) == f"a {name} at the right"
    assert [score_written_storyboard(moments, mover) for moments in made] == [1.0, 0.5]


def test_training_pairs_ask_every_question_in_known_tokens():
    tokenizer, rng = chat_tokenizer(), np.random.default_rng(0)
    questions = set()
    for _ in range(200):
        ids, begin = training_pair(tokenizer, rng)
        assert tokenizer.unk_token_id not in ids[begin:] and len(ids) < 100
        questions.add(tokenizer.decode(ids[:begin]).split("<|user|>")[0])
    assert questions == {
        "",
        *(f"<|system|><|storyboard|> {number}</s>" for number in ("two", "three")),
        (f"<|system|>{INSTRUCTIONS['motion']}</s>"),
    }


def test_answers_survive_the_tokenizer():
    tokenizer = chat_tokenizer()
    for category in CATEGORIES:
        for drawn in scenes(category, 4):
            item = replace(drawn, caption=planned_caption(drawn))
            for task in TASKS[1:]:
                ids = tokenizer(true_answer(task, drawn), add_special_tokens=False).input_ids
                text = tokenizer.decode(ids, skip_special_tokens=True)
                if task is MOTION:
                    assert read_motion(text) == motion_caption(item)
                else:
                    assert read_moments(text) == storyboard(item, task.captions)
                    # The frame of an answer is one token for each moment and one for its end.
                    frame = [tokenizer.convert_ids_to_tokens(k) for k in ids]
                    assert sum("frame" in token or token == '"}]}' for token in frame) == (
                        len(storyboard(item, task.captions)) + 1
                    )
    assert {moment.time for moment in storyboard(scenes("motion_binding")[0], 3)[1:]} == set(MOMENT_TIMES)


# -- the study ------------------------------------------------------------------------------------------------------------


def test_unseen_changes_are_scored_right_when_rendered_and_wrong_when_still():
    made = study.unseen_changes()
    assert len({item.prompt for item in made}) == 18
    for item in made:
        assert score_video(render(item.objects), item.category, item.meta) == 1.0
        still = (ShapeObject(*[getattr(item.objects[0], name) for name in ("colour", "shape", "x", "y", "radius")]),)
        assert score_video(render(still), item.category, item.meta) == 0.0
        assert len(storyboard(item)) == 2


def test_true_moments_are_frames_of_the_clip():
    items = [scenes("motion_binding")[0], scenes("generative_numeracy")[0]]
    size = (17, 64, 64)
    moving, still = study.arm_inputs("true_moments", items, size)["anchors"]
    assert [anchor.frame_index for anchor in moving] == [0, 16] and [anchor.frame_index for anchor in still] == [0]
    assert np.array_equal(np.asarray(moving[1].image), render(items[0].objects, *size)[-1])
    assert [len(row) for row in study.arm_inputs("true_first", items, size)["anchors"]] == [1, 1]


def test_claims_follow_the_scores():
    single = dict.fromkeys((*CATEGORIES, study.UNSEEN), 0.8)
    board = single | {"dynamic_attr": 0.85, study.UNSEEN: 0.84, "interaction": 0.79, "motion_binding": 0.75}
    rows = study.storyboard_claims({"single": single, "storyboard": board})
    assert [(row["value"], row["met"]) for row in rows] == [(0.05, True), (0.04, False), (0.05, False)]
    assert rows[2]["beside"] == "motion_binding: single 0.800, storyboard 0.750"


def test_the_report_runs_and_continues(tmp_path, monkeypatch):
    """On a pipeline of random weights: every arm of every set, then from the records alone."""
    pipe = tiny_pipeline(call_defaults={"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16})
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(study, "unseen_changes", lambda: scenes("dynamic_attr", 1))
    options = {"per_category": 1, "seeds": 1, "steps": (1,), "batch_size": 8}
    text = study.write_storyboard_report(pipe, tmp_path, **options)
    assert text.startswith("All numbers are synthetic") and text.count("synthetic") >= 4
    made = json.loads((tmp_path / "storyboard.json").read_text())
    assert made["synthetic"] and [row["arm"] for row in made["rows"]] == list(study.ARMS)
    assert all(row["score"].keys() == {*CATEGORIES, study.UNSEEN} for row in made["rows"])
    by_arm = {row["arm"]: row for row in made["rows"]}
    assert by_arm["single"]["moments"] == {} and by_arm["true_captions"]["moments"]["dynamic_attr"] == 2
    records = (tmp_path / "storyboard.jsonl").read_text()
    monkeypatch.setattr(study, "run_arm", lambda *args: pytest.fail("a video was made again"))
    assert study.write_storyboard_report(pipe, tmp_path, **options) == text
    assert (tmp_path / "storyboard.jsonl").read_text() == records
