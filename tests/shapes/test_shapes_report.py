"""The shapes study: its prompts, its arithmetic, what it writes, and that it continues where it stopped."""

import json
import math

import numpy as np
import pytest

from diffusers_fvg.cli import main
from diffusers_fvg.shapes import plots
from diffusers_fvg.shapes.ablation import write_ablation
from diffusers_fvg.shapes.held_out import (
    attributes_stay,
    held_out_scenes,
    score_written_caption,
    settled_caption,
    split_scenes,
)
from diffusers_fvg.shapes.prompts import CATEGORIES, is_held_out, make_scene
from diffusers_fvg.shapes.report import claims_table, evaluate, quick_table, training_table, write_study
from diffusers_fvg.shapes.scorer import score_anchor
from diffusers_fvg.shapes.study import (
    ARMS,
    FORMS,
    Cell,
    Journal,
    StudySettings,
    best_settings,
    joined_text,
    measure,
    study_cells,
    tuning_cells,
)
from diffusers_fvg.shapes.summary import average, claims, kept_share, seed_spread, standard_error, summarize
from diffusers_fvg.shapes.world import render


TINY = StudySettings(1, 1, (2, 1), 1, tuning_per_category=1, tuning_seeds=1, guidance=(1.0,))


def scenes_of(category, count=30):
    rng = np.random.default_rng(5)
    return [make_scene(category, rng) for _ in range(count)]


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("per_category", "tuning_per_category"), [(9, 4), (2, 1)])
def test_no_reported_prompt_is_tuned_on_or_trained_on(per_category, tuning_per_category):
    reported, tuning = split_scenes(per_category, tuning_per_category)
    prompts, others = ({scene.prompt for scene in scenes} for scenes in (reported, tuning))
    assert len(prompts) == len(reported) and len(others) == len(tuning)
    assert not prompts & others
    assert all(is_held_out(prompt) for prompt in prompts | others)
    for category in CATEGORIES:
        assert 1 <= sum(scene.category == category for scene in reported) <= per_category
        assert 1 <= sum(scene.category == category for scene in tuning) <= tuning_per_category
    # Dynamic attributes have fewer held-out prompts than 13: none is lost, a third is for tuning.
    assert sum(scene.category == "interaction" for scene in reported) == per_category


@pytest.mark.parametrize("category", CATEGORIES)
def test_truth_satisfies_what_a_prompt_settles(category):
    for scene in scenes_of(category):
        assert score_written_caption(scene.caption, scene) == 1
        anchor = score_anchor(render(scene.objects)[0], settled_caption(scene))
        assert anchor == 1 or category in ("spatial_relationships", "generative_numeracy")


def test_open_places_are_free_and_settled_ones_are_not():
    scene = next(s for s in scenes_of("dynamic_attr") if "turns" in s.prompt)
    item = scene.objects[0]
    assert settled_caption(scene) == f"a {item.colour} {item.shape}"
    for place in ("top left", "centre", "bottom right"):
        assert score_written_caption(f"a {item.colour} {item.shape} at the {place}", scene) == 1
    scene = next(s for s in scenes_of("motion_binding", 80) if len(s.objects) == 2 and s.meta["d_1"] == "left")
    (c1, s1), (c2, s2) = ((item.colour, item.shape) for item in scene.objects)
    assert settled_caption(scene) == f"a {c1} {s1} at the right, a {c2} {s2} at the left"
    assert score_written_caption(f"a {c1} {s1} at the top right, a {c2} {s2} at the bottom left", scene) == 1
    # What moves left and begins on the left is wrong: one of two objects, so F1 is a half.
    assert score_written_caption(f"a {c1} {s1} at the top left, a {c2} {s2} at the bottom left", scene) == 0.5


# --- measures ---------------------------------------------------------------------------------------------------------


def test_kept_on_rendered_clips():
    kinds = set()
    for category in CATEGORIES:
        for scene in scenes_of(category, 3):
            frames = render(scene.objects)
            found = measure(frames, scene, (8, frames[8]), True)
            assert found["score"] == 1 and found["anchor_iou"] == 1
            assert ("kept" in found) == attributes_stay(scene)
            assert found.get("kept", 1) == 1, scene.prompt
            kinds.add((category, attributes_stay(scene)))
            # A clip whose last frame lost its objects, or that has an object too many, is not kept.
            if attributes_stay(scene):
                assert measure(np.concatenate([frames[:-1], render(())[-1:]]), scene, None, True)["kept"] == 0
    assert {category for category, stays in kinds if stays} == set(CATEGORIES) - {"dynamic_attr"}
    assert ("interaction", False) in kinds and ("dynamic_attr", False) in kinds


def test_joined_texts():
    assert all(count is None or name.endswith(f", {count} tokens") for name, (_, count) in FORMS.items())
    caption = "A still picture on a plain grey background: a red circle at the centre"
    assert joined_text("prompt, objects", "A red circle grows", caption) == (
        "A red circle grows, a red circle at the centre"
    )
    assert (
        joined_text("caption. prompt, 104 tokens", "A red circle grows", caption) == f"{caption}. A red circle grows"
    )


# --- arithmetic -------------------------------------------------------------------------------------------------------


def planted(scores, arm="direct", steps=15, category="interaction", **values):
    """Records of prompts p0, p1, ...: one row of `scores` is one prompt's scores by seed."""
    return [
        {"arm": arm, "steps": steps, "category": category, "prompt": f"p{index}", "seed": seed, "score": score}
        | {"motion": 0.2, "seconds": 1.0, "first_frame": 1.0, "kept": 1}
        | values
        for index, row in enumerate(scores)
        for seed, score in enumerate(row)
    ]


def test_an_average_is_the_mean_of_category_means():
    records = planted([[1.0], [0.0], [0.5]]) + planted([[1.0]], category="dynamic_attr")
    assert average(records) == pytest.approx((0.5 + 1) / 2)


def test_spread_over_seeds():
    # Standard deviations with n - 1: of (0, 1) sqrt(1/2), of (0, 0.5, 1) a half, of equal scores 0.
    assert seed_spread(planted([[0.0, 1.0]])) == pytest.approx(math.sqrt(0.5))
    assert seed_spread(planted([[0.0, 0.5, 1.0], [0.3, 0.3, 0.3]])) == pytest.approx(0.25)
    two = planted([[0.0, 0.5, 1.0]]) + planted([[0.2, 0.2, 0.2], [0.9, 0.9, 0.9]], category="dynamic_attr")
    assert seed_spread(two) == pytest.approx(0.25)
    assert math.isnan(seed_spread(planted([[0.5]])))


def test_standard_error_is_over_prompts():
    # Prompt means 0.2 and 0.6: variance 0.08, of their mean 0.04.
    assert standard_error(planted([[0.1, 0.3], [0.6, 0.6]])) == pytest.approx(0.2)
    both = planted([[0.2], [0.6]]) + planted([[0.2], [0.6]], category="dynamic_attr")
    assert standard_error(both) == pytest.approx(math.sqrt(0.08) / 2)


def test_summary_row():
    rows = summarize(planted([[0.0, 1.0], [1.0, 1.0]], kept=0) + planted([[0.25]], category="dynamic_attr"))
    assert len(rows) == 1
    row = rows[0]
    assert (row["arm"], row["steps"], row["videos"], row["score"]) == ("direct", 15, 5, 0.5)
    # Kept is the share of all static-attribute videos, not a mean of categories.
    assert row["kept"] == 0.2 and row["spread"] is None and "caption_score" not in row
    assert row["categories"]["interaction"] == {"score": 0.75, "motion": 0.2}


def study_records(**changes):
    """Records of a study in which every claim meets its target, some exactly; `changes` replace records of single arms."""
    arms = {
        "direct_50": planted([[0.3, 0.7]], "direct", 50),
        "direct_15": planted([[0.2, 0.6]], "direct", 15),
        "factorized_50": planted([[0.81, 0.91]], "factorized", 50, motion=0.2),
        "factorized_15": planted([[0.8, 0.9]], "factorized", 15, motion=0.19, caption_score=0.97),
        "true_anchor": planted([[0.9, 0.9]], "true_anchor", 15, first_frame=0.95),
        "true_anchor_no_lora": planted([[0.4, 0.4]], "true_anchor_no_lora", 15, first_frame=0.5, kept=0),
        "true_middle": planted([[0.86, 0.86]], "true_middle", 15),
        "true_last": planted([[0.85, 0.85]], "true_last", 15),
    }
    return [record for records in (arms | changes).values() for record in records]


EXPECTED = [
    ("the anchor pays", 0.35),
    ("steps can go", 0.01),
    ("steps can go", 0.05),
    ("the LoRA teaches the anchor", 0.95),
    ("the LoRA teaches the anchor", 1.0),
    ("the LoRA teaches the anchor", 0.5),
    ("the LoRA teaches the anchor", 0.0),
    ("the LoRA teaches the anchor", 0.4),
    ("any position", 0.04),
    ("any position", 0.0),
    ("any position", 0.05),
    ("any position", 0.0),
    ("seeds", 0.25),
    ("stage 1", 0.97),
    ("the whole", 0.85),
]


def test_claims_that_are_met():
    rows = claims(study_records(), few=15, full=50)
    assert [(row["claim"], row["value"]) for row in rows] == EXPECTED
    # Reported alone: the three numbers without the LoRA.
    assert [row["met"] for row in rows] == [True] * 5 + [None] * 3 + [True] * 7
    assert rows[1]["beside"] == "direct loses 0.100"
    assert "MISSED" not in claims_table(rows) and claims_table(rows).count(" met") == 12


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"direct_50": planted([[0.5, 0.91]], "direct", 50)}, {0}),
        ({"factorized_50": planted([[0.84, 0.94]], "factorized", 50)}, {1}),
        ({"factorized_50": planted([[0.8, 0.9]], "factorized", 50, motion=0.3)}, {2}),
        ({"true_anchor": planted([[0.9, 0.9]], "true_anchor", 15, first_frame=0.9499)}, {3}),
        ({"true_anchor": planted([[0.9]] * 9, "true_anchor", 15) + planted([[0.9]] * 2, "true_anchor", kept=0)}, {4}),
        ({"true_middle": planted([[0.84, 0.84]], "true_middle", 15)}, {8}),
        ({"true_last": planted([[0.9, 0.9]], "true_last", 15, kept=0)}, {11}),
        ({"direct_15": planted([[0.3, 0.4]], "direct", 15)}, {12}),
        ({"factorized_15": planted([[0.8, 0.9]], "factorized", 15, motion=0.19, caption_score=0.9)}, {13}),
        ({"factorized_15": planted([[0.7, 0.8]], "factorized", 15, motion=0.19, caption_score=1.0)}, {1, 14}),
    ],
)
def test_claims_that_are_missed(changes, missed):
    rows = claims(study_records(**changes), few=15, full=50)
    assert {number for number, row in enumerate(rows) if row["met"] is False} == missed
    assert claims_table(rows).count("MISSED") == len(missed)


def test_where_direct_leaves_no_room_the_bar_is_absolute():
    high = {"direct_50": planted([[0.8, 0.96]], "direct", 50)}
    row = claims(study_records(**high), few=15, full=50)[0]
    assert (row["value"], row["bar"], row["met"]) == (0.85, 0.95, False)
    top = planted([[0.95, 0.97]], "factorized", 15, caption_score=1.0)
    row = claims(study_records(**high, factorized_15=top), few=15, full=50)[0]
    assert (row["value"], row["bar"], row["met"]) == (0.96, 0.95, True)


def test_one_seed_has_no_spread_to_claim():
    one = {f"{arm}_{steps}": planted([[0.5]], arm, steps) for arm in ("direct",) for steps in (15, 50)}
    row = next(row for row in claims(study_records(**one), few=15, full=50) if row["claim"] == "seeds")
    assert row["value"] is None and row["met"] is None
    assert "unknown" in claims_table([row])


def test_kept_share_counts_static_prompts_only():
    records = planted([[1.0]], kept=0) + planted([[1.0]] * 3)
    assert kept_share(records) == 0.75
    assert kept_share([*records, {"score": 0.0}]) == 0.75


def test_the_best_guidance_and_form_are_chosen_for_each_arm():
    def grid(arm, form, scores):
        cells = [planted([[score]], arm, guidance=guidance) for guidance, score in scores.items()]
        return [record | ({"form": form} if form else {}) for cell in cells for record in cell]

    records = grid("direct", None, {1.0: 0.2, 3.0: 0.4, 5.0: 0.3})
    records += grid("direct_rewritten", "a", {1.0: 0.1, 3.0: 0.2})
    records += grid("direct_rewritten", "b", {1.0: 0.25, 3.0: 0.15})
    chosen = best_settings(records)
    assert (chosen["direct"]["guidance"], chosen["direct"]["form"]) == (3.0, None)
    assert (chosen["direct_rewritten"]["guidance"], chosen["direct_rewritten"]["form"]) == (1.0, "b")
    assert chosen["direct"]["grid"][1] == {"guidance": 3.0, "form": None, "score": 0.4}


def test_plan_of_a_whole_study():
    settings = StudySettings()
    tuned = {name: {"guidance": 2.0, "form": None} for name in ARMS}
    cells = [(cell.arm, cell.steps) for cell in study_cells(settings, tuned)]
    for arm in ("direct", "direct_rewritten", "factorized"):
        assert [steps for name, steps in cells if name == arm] == [50, 25, 15, 8, 4]
    assert [steps for name, steps in cells if name == "true_anchor"] == [50, 15]
    # With a judge, which a model may lack, one more.
    assert len(cells) == 3 * 5 + 2 + 4 + 1 and settings.seeds == 3
    assert {cell.steps for cell in tuning_cells(settings)} == {15}
    assert {cell.arm for cell in tuning_cells(settings)} == set(ARMS)


def test_training_table_leaves_out_what_is_not_known():
    text = training_table({"base": {"parameters": 1690000, "samples": 373000}, "vae": {"held_out": 0.97}})
    lines = text.splitlines()
    assert lines[1].split() == ["base", "1,690,000", "373,000", "-", "-", "-"]
    assert lines[2].split() == ["vae", "-", "-", "-", "-", "0.97"]


# --- files ------------------------------------------------------------------------------------------------------------


def test_journal_continues_after_a_torn_line(tmp_path):
    path, header = tmp_path / "records.jsonl", {"model": "a", "prompts": ["x"]}
    cells = [Cell("study", "direct", 4, 2.0), Cell("study", "direct_rewritten", 4, 2.0, "form")]
    journal = Journal(path, header)
    batches = [
        [cell.facts() | {"scene": k, "seed": 0, "score": 0.5} | ({"kept": 1} if k else {}) for k in (0, 1)]
        for cell in cells
    ]
    for batch in batches:
        journal.append(batch)
    whole = path.read_text()
    path.write_text(whole[:-20])
    again = Journal(path, header)
    assert [again.find(cells[0], k, 0) for k in (0, 1)] == batches[0]
    assert again.find(cells[1], 0, 0) is None and again.find(cells[0], 2, 0) is None
    again.append(batches[1])
    assert path.read_text() == whole
    path.write_text(whole[:10])
    assert Journal(path, header).records == {}
    with pytest.raises(ValueError, match="another model"):
        Journal(path, header | {"model": "b"})


def test_a_study_writes_everything_and_continues(pipe, tmp_path, monkeypatch, capsys):
    reported, tuning = split_scenes(1, 1)
    monkeypatch.setattr("diffusers_fvg.shapes.study.split_scenes", lambda *counts: (reported, tuning[:1]))
    figures, save = [], plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure) or save(figure, path))
    training = {"base": {"parameters": 1, "samples": 2, "steps": 3, "seconds": 4, "held_out": 0.5}}
    (tmp_path / "training.json").write_text(json.dumps(training))
    text = write_study(pipe, tmp_path, TINY)
    study = json.loads((tmp_path / "study.json").read_text())
    assert study["synthetic"] is True and "synthetic" in text and study["training"] == training
    assert {(row["arm"], row["steps"]) for row in study["results"]} == {
        *((arm, steps) for arm in ("direct", "direct_rewritten", "factorized", "true_anchor") for steps in (2, 1)),
        *(
            (arm, 1)
            for arm in ("factorized_judged", "true_caption", "true_middle", "true_last", "true_anchor_no_lora")
        ),
    }
    assert all(row["videos"] == 7 and set(row["categories"]) == set(CATEGORIES) for row in study["results"])
    assert set(study["tuning"]) == set(ARMS) and len(study["captions"]) == 7
    assert study["made_with"]["versions"].keys() >= {"torch", "diffusers"} and study["made_with"]["device"]
    for claim in ("anchor pays", "steps can go", "any position", "seeds", "stage 1", "the whole"):
        assert claim in text
    files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert {"study.txt", "records.jsonl", "steps.png", "categories.png", "motion.png"} <= set(files)
    # Bars hide the lines of the grid.
    assert [figure.axes[0].get_axisbelow() for figure in figures][1] is True
    # The same noise: only the text can tell the two direct arms apart, only the anchor's place the true ones.
    rows = {row["arm"]: row for row in study["results"] if row["steps"] == 1}
    arms = ("direct", "direct_rewritten", "true_anchor", "true_middle", "true_last")
    assert len({rows[arm]["motion"] for arm in arms}) == len(arms)
    assert rows["true_anchor"]["first_frame"] > rows["direct"]["first_frame"]

    # Half of the lines are gone: only those are made again, and they come out the same.
    path = tmp_path / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]))
    calls, animate = [], pipe.animate
    monkeypatch.setattr(pipe, "animate", lambda *given, **options: calls.append(1) or animate(*given, **options))
    write_study(pipe, tmp_path, TINY)
    assert len(calls) == 2 and capsys.readouterr().out.count("already there") == len(lines) - 3
    fresh = json.loads((tmp_path / "study.json").read_text())
    timed = [[{**row, "seconds": 0} for row in made["results"]] for made in (study, fresh)]
    assert timed[0] == timed[1]


def test_a_study_of_another_model_is_refused(pipe, tmp_path):
    (tmp_path / "records.jsonl").write_text(json.dumps({"synthetic": True, "model": "other"}) + "\n")
    with pytest.raises(ValueError, match="another model: delete it"):
        write_study(pipe, tmp_path, TINY)


def test_quick_evaluation_equals_a_call(pipe):
    """The quick report's video is that of a plain call with the rendered first frame as image."""
    import PIL.Image
    import torch

    from diffusers_fvg.shapes.scorer import motion_amount

    scene = held_out_scenes(1, categories=("motion_binding",))[0]
    record = evaluate(pipe, [scene], arms=("true_anchor",), seed=2, num_inference_steps=3)[0]
    image = PIL.Image.fromarray(render(scene.objects, 1, 32, 32)[0])
    call = {"num_inference_steps": 3, "output_type": "np"}
    output = pipe(scene.prompt, image=image, generator=torch.Generator().manual_seed(2000), **call)
    frames = np.round(output.frames[0] * 255).astype(np.uint8)
    assert record["motion"] == round(motion_amount(frames), 4) and record["category"] == "motion_binding"
    table = quick_table([record]).splitlines()
    assert table[1].split() == ["motion_binding", f"{record['score']:.3f}", "1"]


def test_ablation_tells_loras_apart(pipe, few_scenes, tmp_path):
    from diffusers_fvg.embedded import EMBEDDED_FOLDER

    folder = EMBEDDED_FOLDER / "anchor_lora" / "weights"
    text = write_ablation(pipe, tmp_path, {"copy": folder}, per_category=1, seeds=1, strengths=(0.5, 1.0), steps=1)
    rows = {
        (row["lora"], row["strength"]): row["inputs"]
        for row in json.loads((tmp_path / "ablation.json").read_text())["rows"]
    }
    assert list(rows) == [("own", 0.5), ("own", 1.0), ("copy", 0.5), ("copy", 1.0)] and "copy" in text

    def scores(name, strength):
        return {arm: (row["score"], row["motion"]) for arm, row in rows[name, strength].items()}

    # The same weights from a folder give the same videos; half the strength gives others.
    assert scores("own", 1.0) == scores("copy", 1.0) and scores("own", 0.5) == scores("copy", 0.5)
    assert scores("own", 1.0) != scores("own", 0.5)
    assert set(pipe.get_active_adapters()) == {"anchor"}


def test_bad_arguments_of_the_report(capsys, tmp_path):
    folder = str(tmp_path / "out")
    assert main(["shapes", "report", folder, "--ablation", "masked"]) == 2
    assert "give NAME=DIR" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["shapes", "report", folder, "--seeds", "0"])
    assert "argument --seeds: '0'" in capsys.readouterr().err
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").touch()
    assert main(["shapes", "report", folder, "--ablation", f"own={tmp_path / 'lora'}", "--quiet"]) == 2
    assert "'own' is the row" in capsys.readouterr().err
    assert main(["shapes", "report", folder, "--ablation", f"masked={tmp_path}", "--quiet"]) == 2
    assert "No pytorch_lora_weights.safetensors" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["shapes", "report", folder, "--ablation", "a=b", "--quick"])
    assert "not allowed with" in capsys.readouterr().err
