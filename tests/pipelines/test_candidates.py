"""The choice among pictures as a part of a pipeline: what is kept, told and drawn again; loading, moving, offload, saving."""

import json

import accelerate
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import DiffusionPipeline
from tiny import tiny_pipeline
from tiny_judges import tiny_chat_judge, tiny_clip_judge

from diffusers_fvg import Anchor, AnchorJudge, FactorizedVideoPipeline, Moment, Plan, RewriteOutcome, Subject, replay


SIZE = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16, "num_inference_steps": 1}
PROMPTS = ["a red circle", "a blue star"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_blue(images, caption, plan):
    return [float(np.asarray(image)[..., 2].mean()) for image in images]


def with_judge(judge, **changes) -> FactorizedVideoPipeline:
    pipe = tiny_pipeline(anchor_judge=judge, **changes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return with_judge(by_blue)


def call(pipe, **arguments):
    options = {"first_frame_prompt": PROMPTS, "generator": [seeded(3), seeded(4)]} | SIZE
    return pipe(PROMPTS, **options | arguments)


def test_the_best_candidate_is_the_anchor(pipe):
    output = call(pipe, composer_num_candidates=3)
    assert [len(candidates) for candidates in output.candidates] == [3, 3]
    for candidates, image, seeds in zip(output.candidates, output.anchor_images, output.seeds):
        scores = by_blue([candidate.image for candidate in candidates], "", None)
        assert [candidate.score for candidate in candidates] == scores and len(set(scores)) == 3
        best = candidates[int(np.argmax(scores))]
        assert image is best.image and seeds["anchor"] == best.seed
    # The first candidate is the picture of a call that draws one.
    alone = call(pipe, composer_num_candidates=1)
    assert alone.candidates is None
    for candidates, image in zip(output.candidates, alone.anchor_images):
        assert candidates[0].image.tobytes() == image.tobytes()
    assert set(output.timings) == {"compose", "judge", "encode", "denoise", "decode"}


def test_a_candidate_s_seed_draws_it_again(pipe):
    output = call(pipe, composer_num_candidates=2)
    for caption, candidates in zip(PROMPTS, output.candidates):
        for candidate in candidates:
            (image,) = pipe.compose(caption, 32, 32, generator=seeded(candidate.seed), num_candidates=1)
            assert image.tobytes() == candidate.image.tobytes()


def test_compose_gives_one_picture_of_each_caption(pipe):
    output = call(pipe, composer_num_candidates=3)
    generators = [seeded(candidates[0].seed) for candidates in output.candidates]
    images = pipe.compose(PROMPTS, 32, 32, generator=generators, num_candidates=3)
    assert [image.tobytes() for image in images] == [image.tobytes() for image in output.anchor_images]


def test_candidates_are_drawn_until_one_is_good_enough(pipe):
    one, several = (
        call(with_judge(AnchorJudge(function=by_blue, threshold=floor)), composer_num_candidates=4)
        for floor in (0, 256)
    )
    assert [len(candidates) for candidates in one.candidates] == [1, 1]
    assert [len(candidates) for candidates in several.candidates] == [4, 4]


def test_the_pipeline_s_own_number_needs_a_judge():
    defaults = {"composer_num_candidates": 2}
    pipe = with_judge(by_blue, call_defaults=defaults)
    assert [len(candidates) for candidates in call(pipe).candidates] == [2, 2]
    assert call(with_judge(None, call_defaults=defaults)).candidates is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"composer_num_candidates": 2}, "`composer_num_candidates=2` needs an `anchor_judge`"),
        ({"composer_num_candidates": 0}, "`composer_num_candidates=0` must be at least 1"),
        ({"composer_num_candidates": 2, "first_frame_prompt": None, "mode": "direct"}, "has no effect"),
        ({"motion_retries": -1}, "`motion_retries=-1` must be at least 1"),
        ({"motion_retries": 1, "output_type": "latent"}, "no effect"),
    ],
)
def test_what_cannot_be_done_is_refused_before_a_model_runs(arguments, message):
    with pytest.raises(ValueError, match=message):
        call(with_judge(None), **arguments)


def test_a_judge_changes_nothing_where_stage_2_does_not_run():
    """And the pipeline's own number of candidates is not asked for there."""
    pipe = with_judge(by_blue, call_defaults={"composer_num_candidates": 2})
    output = call(pipe, mode="direct", first_frame_prompt=None)
    assert output.candidates is None and np.array_equal(
        output.frames, call(with_judge(None), mode="direct", first_frame_prompt=None).frames
    )


def test_a_storyboard_s_first_picture_is_chosen(pipe):
    board = [Moment("a red circle", 0.0), Moment("a blue circle", 1.0)]
    options = {"mode": "storyboard", "storyboard": board, "composer_num_candidates": 2, **SIZE}
    output = pipe("a red circle", generator=seeded(), **options)
    (candidates,), (pictures,) = output.candidates, output.anchor_images
    assert pictures[0] is max(candidates, key=lambda candidate: candidate.score).image and len(pictures) == 2


def test_the_judge_sees_the_plan_of_stage_1(monkeypatch):
    plan, seen = Plan((Subject("circle", attributes=("red",)),)), []

    def score(images, caption, plan):
        seen.append((caption, plan))
        return by_blue(images, caption, plan)

    pipe = with_judge(score)
    outcomes = [RewriteOutcome("accepted", "a red circle", plan=plan), RewriteOutcome("fallback", "a blue star")]
    monkeypatch.setattr(pipe.rewriter, "rewrite_outcomes", lambda *args, **options: outcomes)
    call(pipe, first_frame_prompt=None, composer_num_candidates=2)
    assert seen == [("a red circle", plan), ("a blue star", None)]


@pytest.mark.parametrize("own", [0, "3", 2.5, True])
def test_a_repository_s_own_number_is_checked(own):
    with pytest.raises(ValueError, match="`composer_num_candidates=.*must be"):
        with_judge(by_blue, call_defaults={"composer_num_candidates": own})


@pytest.mark.parametrize("count", [None, 3])
def test_an_interrupt_between_pictures_gives_those_that_are_there(pipe, count):
    def stop(running, stage, step, steps):
        # Each picture takes several steps, and is drawn by itself.
        running._interrupt = stage == "compose" and step > steps // 2

    output = call(pipe, composer_num_candidates=count, callback_on_stage_step=stop)
    assert len(output.frames) == 0 and len(output.anchor_images) < 2 == len(output.records)
    kept = [record["anchors"] != [] for record in output.records]
    assert kept == [number < len(output.anchor_images) for number in range(2)]


def test_an_interrupt_keeps_what_was_judged(pipe):
    def stop(running, stage, step, steps):
        running._interrupt = stage == "judge"

    output = call(pipe, composer_num_candidates=2, callback_on_stage_step=stop)
    assert output.frames == [] and [len(candidates) for candidates in output.candidates] == [2, 2]


# -- made again -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["factorized", "storyboard"])
def test_a_chosen_picture_is_drawn_again_from_its_record(mode, pipe):
    board = [Moment("a red circle", 0.0), Moment("a blue circle", 1.0)]
    caption = {"storyboard": board} if mode == "storyboard" else {"first_frame_prompt": "a red circle"}
    options = {"mode": mode, "generator": seeded(3), "composer_num_candidates": 4, **caption, **SIZE}
    output = pipe("a red circle", **options)
    (candidates,), record = output.candidates, json.loads(json.dumps(output.records[0]))
    # A choice that the video's seed alone does not give.
    assert (
        record["seeds"]
        == {"video": 3, "anchor": output.seeds[0]["anchor"]}
        != {
            "video": 3,
            "anchor": candidates[0].seed,
        }
    )
    for again in (replay(pipe, record, output_type="np"), replay(with_judge(None), record, output_type="np")):
        assert np.array_equal(again.frames, output.frames)
        assert again.seeds == output.seeds and again.records[0]["anchors"] == record["anchors"]
        assert again.candidates is None
    chosen_anew = replay(pipe, record, composer_num_candidates=2, generator=seeded(3))
    assert [each.seed for each in chosen_anew.candidates[0]] == [each.seed for each in candidates[:2]]


@pytest.mark.parametrize("change", [{"generator": 4}, {"first_frame_prompt": "a blue circle"}, {"mode": "factorized"}])
def test_a_picture_that_is_another_is_chosen_anew(change):
    """As in a call of the pipeline's own number of pictures; a record's choice is for its own picture alone."""
    pipe = with_judge(by_blue, call_defaults={"composer_num_candidates": 3})
    mode = "direct" if "mode" in change else "factorized"
    caption = {"first_frame_prompt": "a red circle"} if mode == "factorized" else {}
    record = pipe("a red circle", mode=mode, generator=seeded(3), **caption, **SIZE).records[0]
    given = {name: seeded(value) if name == "generator" else value for name, value in change.items()}
    again = replay(pipe, record, **given, **({} if caption else {"first_frame_prompt": "a red circle"}))
    assert len(again.candidates[0]) == 3
    if "generator" in change:
        plain = pipe("a red circle", generator=seeded(4), **caption, **SIZE)
        assert np.array_equal(again.frames, plain.frames) and again.seeds == plain.seeds


def test_a_video_that_was_made_again_keeps_its_picture(pipe, monkeypatch):
    """Its seed is another than that from which the seed of the picture was derived."""
    amounts = iter([[0.0], [0.5], [0.5]])
    monkeypatch.setattr("diffusers_fvg.pipelines.motion.motion_amounts", lambda frames: next(amounts))
    output = pipe("a red circle", generator=seeded(3), motion_retries=1, **SIZE)
    again = replay(pipe, output.records[0], output_type="np")
    assert output.seeds[0]["video"] != 3 and again.seeds == output.seeds
    assert np.array_equal(again.frames, output.frames)


# -- as a component ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_clip_judge, tiny_chat_judge])
def test_a_judge_is_loaded_cast_and_saved_with_its_pipeline(make, tmp_path):
    with_judge(make()).save_pretrained(tmp_path / "pipe")
    expected = call(FactorizedVideoPipeline.from_pretrained(tmp_path / "pipe"), composer_num_candidates=2)
    half = DiffusionPipeline.from_pretrained(tmp_path / "pipe", dtype=torch.bfloat16)
    assert isinstance(half.anchor_judge, AnchorJudge) and half.anchor_judge.dtype == torch.bfloat16
    again = call(half.to(torch.float32), composer_num_candidates=2)
    assert half.anchor_judge.model.dtype == torch.float32
    for ours, theirs in zip(again.candidates, expected.candidates):
        assert [each.score for each in ours] == pytest.approx([each.score for each in theirs], abs=0.05)
    assert again.candidates[0][0].answers is None or make is tiny_chat_judge
    # And it may be left out, or be replaced by something else.
    assert DiffusionPipeline.from_pretrained(tmp_path / "pipe", anchor_judge=None).anchor_judge is None
    assert DiffusionPipeline.from_pretrained(tmp_path / "pipe", anchor_judge=by_blue).anchor_judge.function is by_blue


def test_a_function_is_not_saved(tmp_path, caplog):
    with_judge(by_blue).save_pretrained(tmp_path)
    assert (
        not (tmp_path / "anchor_judge").exists() and "`anchor_judge` is your function and is not saved" in caplog.text
    )
    assert DiffusionPipeline.from_pretrained(tmp_path).anchor_judge is None


def test_composer_and_judge_are_on_the_device_in_turn(monkeypatch):
    """By what the hooks of model offload bring and take back; the video model comes when both are gone."""
    pipe = with_judge(tiny_clip_judge(threshold=2.0))
    expected = call(pipe, composer_num_candidates=3)
    names = {id(getattr(pipe, name)): name for name in ("composer", "anchor_judge", "text_encoder", "transformer")}
    here, seen = set(), []
    # "cpu:0" passes for an accelerator.
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.get_device", lambda: "cpu:0")
    bring, take = CpuOffload.pre_forward, CpuOffload.init_hook

    def pre_forward(hook, module, *args, **kwargs):
        if hook.prev_module_hook is not None:
            # accelerate leaves out one that "is on the CPU" already.
            hook.prev_module_hook.offload()
        here.add(names.get(id(module)))
        seen.append(here - {None})
        return bring(hook, module, *args, **kwargs)

    def init_hook(hook, module):
        here.discard(names.get(id(module)))
        return take(hook, module)

    monkeypatch.setattr(CpuOffload, "pre_forward", pre_forward)
    monkeypatch.setattr(CpuOffload, "init_hook", init_hook)
    pipe.enable_model_cpu_offload()
    output = call(pipe, composer_num_candidates=3)
    assert np.array_equal(output.frames, expected.frames)
    turns = [event for index, event in enumerate(seen) if event and event != seen[index - 1]]
    # Rounds of one, one and one more.
    assert turns[:7] == [{"composer"}, {"anchor_judge"}] * 3 + [{"text_encoder"}]
    assert all(len(event) == 1 for event in turns)


def test_a_judge_that_is_offloaded_layer_by_layer_says_the_same():
    judge, images = tiny_clip_judge(), by_colour()
    expected = judge.judge(images, PROMPTS)
    accelerate.cpu_offload(judge, torch.device("cpu"), offload_buffers=True)
    assert {parameter.device.type for parameter in judge.parameters()} == {"meta"}
    assert judge.judge(images, PROMPTS) == expected


def by_colour() -> list[PIL.Image.Image]:
    return [PIL.Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]


# -- motion -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output_type", ["np", "uint8", "pt", "pil"])
def test_motion_is_told_for_every_form_of_frames(pipe, output_type):
    assert call(pipe, output_type=output_type).motion == pytest.approx(call(pipe).motion, abs=0.02)
    assert call(pipe, output_type="latent").motion is None


def test_a_video_that_stands_still_is_told_of_and_made_again(pipe, caplog, monkeypatch):
    first = call(pipe)
    assert "hardly moves" not in caplog.text and min(first.motion) > 0.02
    seen = []

    def frozen_at_first(frames):
        seen.append(len(frames))
        return [0.001, 0.5] if len(seen) == 1 else [0.0005] if len(seen) == 2 else [0.3]

    monkeypatch.setattr("diffusers_fvg.pipelines.motion.motion_amounts", frozen_at_first)
    output = call(pipe, motion_retries=3)
    # Only the video that stood still, and only until it moves.
    assert seen == [2, 1, 1] and output.motion == [0.3, 0.5] and "hardly moves" not in caplog.text
    assert np.array_equal(output.frames[1], first.frames[1]) and (output.frames[0] != first.frames[0]).any()
    assert output.seeds[1] == first.seeds[1] and output.seeds[0]["video"] != first.seeds[0]["video"]
    monkeypatch.undo()
    again = pipe.animate(
        PROMPTS[:1],
        [[Anchor(output.anchor_images[0])]],
        generator=[seeded(output.seeds[0]["video"])],
        **SIZE,
    )
    assert np.array_equal(again[0], output.frames[0])


def test_a_video_that_stays_still_is_told_of(pipe, caplog, monkeypatch):
    monkeypatch.setattr("diffusers_fvg.pipelines.motion.motion_amounts", lambda frames: [0.0] * len(frames))
    output = call(pipe, num_videos_per_prompt=2, generator=seeded(3))
    assert "Video 0 of 'a red circle' hardly moves: 0.0% of the picture changes, less than 2.0%" in caplog.text
    assert "Video 1 of 'a red circle'" in caplog.text and "Video 3 of 'a blue star'" in caplog.text
    assert output.motion == [0.0] * 4
