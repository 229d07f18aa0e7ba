"""Official totals of hand-made files in the official formats, computed by hand, and the reasons why totals are not official."""

import csv
import json
import zipfile
from dataclasses import asdict

import numpy as np
import pytest
from published_files import (
    compbench_prompts,
    dimension_file,
    evalcrafter_results,
    i2v_results,
    record,
    vbench2_results,
    write_json,
    write_table,
)

from diffusers_fvg.evaluation.suites import PUBLISHED
from diffusers_fvg.evaluation.suites.scores import read_scores, write_scores
from diffusers_fvg.evaluation.suites.t2v_compbench import read_table


SUITES = {suite.name: suite for suite in PUBLISHED}


def read(name, folder):
    return SUITES[name].read_scores(folder)


def problems(name, folder):
    scores = read(name, folder)
    assert not scores.totals and not scores.complete
    return " ".join(scores.problems)


# -- T2V-CompBench ----------------------------------------------------------------------------------------------------


def compbench_v2(folder, model="mymodel"):
    """200 rows for each category, and the score that the official script writes behind them."""
    half = lambda low, high: [low] * 100 + [high] * 100  # noqa: E731
    seeds = ["a", "b", "c", 15] * 3
    tables = {
        # Of 15 points, (15 - 1) / 14 and (1 - 1) / 14.
        "csv_consistent_attr/{}_consistent_attr_score.csv": (
            [*seeds, "[15, 15, 15]"],
            half(15, 1),
            0.5,
            ".png",
            "score: ",
        ),
        "csv_dynamic_attr/{}_dynamic_attr_score.csv": (["x"] * 12, half(1.0, 0.0), 0.5, "", "score: "),
        "csv_spatial/{}_spatial_score.csv": (["[0.4]"], half(0.4, 0.8), 0.6, "", "Score: "),
        "csv_motion_binding/{}_motion_score.csv": (["cat", "left", "", "", 0.25], half(0.4, 0.0), 0.2, "", "score: "),
        # Of 10 points, (10 - 1) / 9 and (5.5 - 1) / 9.
        "csv_action_binding/{}_action_binding_score.csv": (
            [*seeds, "[10, 10, 10]"],
            half(10, 5.5),
            0.75,
            ".png",
            "score: ",
        ),
        "csv_object_interactions/{}_object_interactions_score.csv": (seeds, half(1, 10), 0.5, ".png", "score: "),
        "csv_numeracy/{}_numeracy_video.csv": (["[1.0, 0.5]"], half(0.25, 0.75), 0.5, "", "score: "),
    }
    for name, (cells, values, score, ending, said) in tables.items():
        rows = [[f"{number:04d}{ending}", *cells, value] for number, value in enumerate(values, 1)]
        write_table(folder / name.format(model), ["name", *["cell"] * len(cells), "Score"], rows, score, said)
    # The folder also holds files about frames.
    write_table(folder / f"csv_spatial/{model}_2dvideo.csv", ["id", "Score_1"], [["0001", 0.1]])
    write_table(folder / f"csv_motion_binding/{model}_motion_back_fore.csv", ["id"], [["0001"]])
    return folder


def test_compbench_v2_is_the_plain_mean_of_seven(tmp_path):
    scores = read("t2v-compbench-v2", compbench_v2(tmp_path))
    assert scores.problems == scores.notes == []
    own = {name: category.score for name, category in scores.categories.items()}
    assert own == pytest.approx(
        {
            "consistent_attr": 0.5,
            "dynamic_attr": 0.5,
            "spatial_relationships": 0.6,
            "motion_binding": 0.2,
            "action_binding": 0.75,
            "interaction": 0.5,
            "generative_numeracy": 0.5,
        }
    )
    assert scores.totals == pytest.approx({"average": 3.55 / 7})
    assert scores.categories["action_binding"].videos["action_binding/0200.mp4"] == pytest.approx(0.5)


def test_compbench_v2_leaves_bad_replies_out_of_the_mean(tmp_path):
    rows = [[f"{number:04d}.png", "p", 15 if number <= 50 else "bad reply"] for number in range(1, 201)]
    path = compbench_v2(tmp_path) / "csv_consistent_attr" / "mymodel_consistent_attr_score.csv"
    write_table(path, ["name", "prompt", "Score"], rows, 1.0)
    scores = read("t2v-compbench-v2", tmp_path)
    assert scores.categories["consistent_attr"].score == 1.0 and scores.totals == pytest.approx({"average": 4.05 / 7})
    assert scores.notes == ["consistent_attr: 150 of 200 rows have no score and are left out of the mean."]


def test_compbench_says_what_keeps_its_total_from_being_official(tmp_path):
    folder = compbench_v2(tmp_path)
    path = folder / "csv_dynamic_attr" / "mymodel_dynamic_attr_score.csv"
    header, rows = ["name", "Score"], [[f"{number:04d}", 0.25] for number in range(1, 201)]
    write_table(path, header, rows[:199], 0.25)
    assert "dynamic_attr: 199 of 200 videos" in problems("t2v-compbench-v2", folder)
    write_table(path, header, rows)
    assert "has no score row, so its script did not finish" in problems("t2v-compbench-v2", folder)
    write_table(path, header, rows, 0.3)
    assert "says 0.3, but its rows give 0.25" in problems("t2v-compbench-v2", folder)
    # A second run takes the first score row for a video of score 0.25.
    write_table(path, header, [*rows, ["score: ", 0.25]], 0.25)
    assert "has 2 score rows: its script ran again" in problems("t2v-compbench-v2", folder)
    write_table(path, header, [*rows[:199], rows[0]], 0.25)
    assert "has dynamic_attr/0001.mp4 twice" in problems("t2v-compbench-v2", folder)
    write_table(path, header, rows, 0.25)
    write_table(folder / "other_dynamic_attr_score.csv", header, rows, 0.25)
    assert (
        "dynamic_attr: of csv_dynamic_attr/mymodel_dynamic_attr_score.csv, other_dynamic_attr_score.csv, keep one"
        in (problems("t2v-compbench-v2", folder))
    )
    (folder / "other_dynamic_attr_score.csv").unlink()
    path.unlink()
    assert "dynamic_attr: no file *_dynamic_attr_score.csv" in problems("t2v-compbench-v2", folder)


def test_compbench_v1_has_scales_of_its_own(tmp_path):
    """Five points for attributes and interactions, a fifth for actions, motion that is not adjusted yet, two spatial files."""

    def table(name, values, score=None):
        rows = [[f"{number:04d}.png", "p", value] for number, value in enumerate(values, 1)]
        write_table(tmp_path / name, ["name", "prompt", "Score"], rows, score)

    table("m_consistent_attr_score.csv", [4.5] * 100, 3.5 / 4)
    table("m_dynamic_attr_score.csv", [0.3] * 100, 0.3)
    table("m_action_binding_score.csv", [4] * 100, 0.8)
    table("m_object_interactions_score.csv", [2] * 100, 0.25)
    table("m_numeracy_video.csv", [0.5] * 100, 0.5)
    # Half have no object, 0; half have 0.2 + 0.8 * 0.25.
    table("m_score.csv", [-1, 0.25] * 50, 0.2)
    # 60 in two dimensions of 0.4 and 40 in three of 0.9, with one score behind the second file.
    two = [[f"{number:04d}", "[]", 0.4] for number in range(1, 61)]
    three = [[f"{number:04d}", "[]", 0.9] for number in range(61, 101)]
    write_table(tmp_path / "m_2dvideo.csv", ["id", "frames", "Score_1"], two)
    write_table(tmp_path / "m_3dvideo.csv", ["id", "frames", "Score_1"], three, 0.6)
    scores = read("t2v-compbench-v1", tmp_path)
    assert scores.problems == []
    assert scores.totals == pytest.approx({"average": (0.875 + 0.3 + 0.8 + 0.25 + 0.5 + 0.2 + 0.6) / 7})


def test_compbench_v2_packs_eight_tables_under_the_models_name(tmp_path):
    folder = compbench_v2(tmp_path / "results", "factorized_seed-0")
    assert SUITES["t2v-compbench-v2"].pack(folder, tmp_path / "a.zip", "ours") == []
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        packed = set(archive.namelist())
        last = archive.read("ours/ours_spatial_score.csv").decode().splitlines()[-1]
    ends = "consistent_attr_score dynamic_attr_score spatial_score motion_score motion_back_fore action_binding_score "
    ends += "object_interactions_score numeracy_video"
    assert packed == {f"ours/ours_{end}.csv" for end in ends.split()} and last.startswith("Score: ")
    # Categories may be left out, damaged files not.
    (folder / "csv_numeracy" / "factorized_seed-0_numeracy_video.csv").unlink()
    assert SUITES["t2v-compbench-v2"].pack(folder, tmp_path / "b.zip", "ours") == ["generative_numeracy"]
    write_table(folder / "csv_spatial" / "factorized_seed-0_spatial_score.csv", ["id", "Score"], [["0001", 0.5]])
    with pytest.raises(ValueError, match="cannot be submitted. spatial_relationships: .* has no score row"):
        SUITES["t2v-compbench-v2"].pack(folder, tmp_path / "c.zip", "ours")


# -- VBench-2.0 -------------------------------------------------------------------------------------------------------


def test_vbench2_is_the_mean_of_five_groups(tmp_path):
    given = {"Composition": 0.1, "Multi-View_Consistency": 0.9, "Camera_Motion": 0.15, "Human_Identity": 0.2}
    scores = read("vbench-2.0", vbench2_results(tmp_path, given))
    assert scores.problems == []
    # By hand, of dimensions that are 0.5 otherwise.
    groups = [0.3, 0.5, (0.15 + 6 * 0.5) / 7, 0.4, 0.6]
    names = ["Creativity", "Commonsense", "Controllability", "Human Fidelity", "Physics"]
    assert scores.totals == pytest.approx(dict(zip(names, groups)) | {"total": 0.2 * sum(groups)})
    assert sum(len(own.videos) for own in scores.categories.values()) == 3 * (1230 - 10) + 10


def test_vbench2_leaves_out_what_could_not_be_judged(tmp_path):
    folder = vbench2_results(tmp_path, {})
    dimension_file(folder, "Human_Identity", 0.75, [0.5, 1.0] * 10 + [-1] * 118)
    # Of more than nine tenths, this dimension is 0.
    dimension_file(folder, "Motion_Order_Understanding", 0, [1] * 10 + [-1] * 287)
    scores = read("vbench-2.0", folder)
    assert scores.problems == [] and scores.categories["Motion_Order_Understanding"].score == 0
    assert scores.totals["Human Fidelity"] == pytest.approx((0.5 + 0.5 + 0.75) / 3)
    assert "Human_Identity: 118 of 138 videos could not be judged and are left out." in scores.notes
    assert len(scores.categories["Human_Identity"].videos) == 20


def test_vbench2_says_what_keeps_its_total_from_being_official(tmp_path):
    folder = vbench2_results(tmp_path, {})
    dimension_file(folder, "Material", 0.5, [0.5] * 149)
    assert (
        problems("vbench-2.0", folder)
        == "Material: 149 of 150 results are in results_2026-01-01-00:00:00_eval_results.json."
    )
    dimension_file(folder, "Material", 0.6, [0.5] * 150)
    assert problems("vbench-2.0", folder) == "Material: the file says 0.6, but its videos give 0.5."
    path = dimension_file(folder, "Material", 0.5, [0.5] * 150)
    other = dimension_file(folder, "Material", 0.4, [0.4] * 150, timestamp="2026-02-02-00:00:00")
    assert "Material: of " in problems("vbench-2.0", folder) and "keep one" in problems("vbench-2.0", folder)
    other.unlink()
    assert read("vbench-2.0", folder).complete
    path.unlink()
    # The official script counts it as 0 and prints a total.
    assert problems("vbench-2.0", folder) == "Material: there is no score."
    write_json(folder / "Material" / "results.json", {"Material": [0.5, [{"video_path": "a.mp4"}]]})
    with pytest.raises(ValueError, match="is not a result of Material"):
        read("vbench-2.0", folder)


def scored_by_listing_one_level(path, folder):
    """What `cal_final_score.py` finds in a zip: it looks into the folders at the top, and not into folders in them."""
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    found = {}
    for own in folder.iterdir():
        for file in own.glob("*.json") if own.is_dir() else [own]:
            content = json.loads(file.read_text())
            if isinstance(content, dict):
                found |= {dimension: entry[0] for dimension, entry in content.items()}
    return found


def test_vbench2_is_packed_so_that_the_official_script_finds_every_dimension(tmp_path):
    folder = vbench2_results(tmp_path / "results", {"Composition": 0.1})
    assert SUITES["vbench-2.0"].pack(folder, tmp_path / "packed.zip", "ours") == []
    found = scored_by_listing_one_level(tmp_path / "packed.zip", tmp_path / "extracted")
    assert len(found) == 18 and found["Composition"] == 0.1
    # Packed as the README says, nothing is found.
    with zipfile.ZipFile(tmp_path / "readme.zip", "w") as archive:
        for file in folder.rglob("*.json"):
            archive.write(file, file.relative_to(folder))
    assert scored_by_listing_one_level(tmp_path / "readme.zip", tmp_path / "empty") == {}
    with pytest.raises(ValueError, match="It holds no result"):
        SUITES["vbench-2.0"].pack(tmp_path / "none", tmp_path / "none.zip", "ours")


# -- VBench-I2V -------------------------------------------------------------------------------------------------------


def test_i2v_normalizes_and_weighs_its_dimensions(tmp_path):
    # Normalized, each is a half, but for 0.7, 0.9 and 0.6.
    middle = {
        "i2v_subject": 0.5731,
        "i2v_background": 0.63075,
        "subject_consistency": 0.5731,
        "background_consistency": 0.63075,
    }
    middle |= {"motion_smoothness": 0.706 + 0.9 * 0.2915, "aesthetic_quality": 0.5, "imaging_quality": 0.6}
    scores = read("vbench-i2v", i2v_results(tmp_path, middle | {"camera_motion": 0.7, "dynamic_degree": 0.5}))
    assert scores.problems == []
    i2v = (0.1 * 0.7 + 0.5 + 0.5) / 2.1
    quality = (0.5 + 0.5 + 0.9 + 0.5 * 0.5 + 0.5 + 0.6) / 5.5
    assert scores.totals == pytest.approx({"I2V": i2v, "Quality": quality, "total": (i2v + quality) / 2})
    assert list(scores.categories["imaging_quality"].videos.values()) == pytest.approx([0.6] * 355 * 5)
    (tmp_path / "camera_motion" / "results_2026_eval_results.json").unlink()
    assert problems("vbench-i2v", tmp_path) == "camera_motion: there is no score."


# -- EvalCrafter ------------------------------------------------------------------------------------------------------


def test_evalcrafter_intercepts(tmp_path):
    """With every metric at the end of its scale only intercepts are left, of which that of alignment is not times five."""
    means = dict.fromkeys(("warping_error", "ocr_score", "celebrity_id_score"), 1.0)
    scores = read("evalcrafter", evalcrafter_results(tmp_path, means))
    assert scores.problems == []
    wanted = {
        "Visual Quality": 43.537313484,
        "Text-Video Alignment": -30.683181902,
        "Motion Quality": 64.878101045,
        "Temporal Consistency": -1711.370254499,
    }
    assert scores.totals == pytest.approx(wanted | {"total": sum(wanted.values())}, abs=1e-6)


MEANS = {
    "VQA_A": 61.0,
    "VQA_T": 55.0,
    "IS": 17.5,
    "clip_temp_score": 0.998,
    "warping_error": 0.013,
    "face_consistency_score": 0.99,
    "action_score": 0.7,
    "motion_ac_score": 0.54,
    "flow_score": 4.8,
    "clip_score": 0.21,
    "blip_bleu": 0.23,
    "sd_score": 0.69,
    "detection_score": 0.67,
    "color_score": 0.46,
    "count_score": 0.57,
    "ocr_score": 0.71,
    "celebrity_id_score": 0.36,
}


def official_evalcrafter(m):
    """`eval_from_metrics.py`, group by group, as products of vectors."""
    quality = np.dot(
        np.array([0.03004555, 0.02887537, -0.01382558]) * 5, [m["VQA_A"] / 100, m["VQA_T"] / 100, m["IS"] / 100]
    )
    temporal = np.dot(
        np.array([2.92492244, 0.45475678, 0.17561504]) * 5,
        [m["clip_temp_score"], 1 - m["warping_error"], m["face_consistency_score"]],
    )
    motion = np.dot(
        np.array([-0.01641512, -0.01340959, -0.10517075]) * 5,
        [m["action_score"], m["motion_ac_score"], m["flow_score"] / 100],
    )
    align = np.dot(
        np.array([-0.0701577, 0.02561424, 0.05566109, 0.0173974, -0.020954, 0.03069167, 0.00372351, 0.22686202]) * 5,
        [
            *(m[name] for name in "clip_score blip_bleu sd_score detection_score color_score count_score".split()),
            1 - m["ocr_score"],
            1 - m["celebrity_id_score"],
        ],
    )
    return {
        "Visual Quality": 100 * (quality + 0.08707462696457707 * 5),
        "Text-Video Alignment": 100 * (align - 0.30683181901390977),
        "Motion Quality": 100 * (motion + 0.1297562020899355 * 5),
        "Temporal Consistency": 100 * (temporal - 3.42274050899774 * 5),
    }


def test_evalcrafter_groups(tmp_path):
    folder, wanted = evalcrafter_results(tmp_path, MEANS), official_evalcrafter(MEANS)
    said = ", ".join(f"{name} {value:.2f}" for name, value in wanted.items())
    final = folder / "final_result.txt"
    final.write_text(
        f"2026-01-01 00:00:00 Metrics: {{}}\n2026-01-01 00:00:00 Results: {said}, Total {sum(wanted.values()):.0f} \n"
    )
    scores = read("evalcrafter", folder)
    assert scores.problems == scores.notes == []
    assert scores.totals == pytest.approx(wanted | {"total": sum(wanted.values())})
    assert scores.categories["clip_score"].videos == {"0000.mp4": 0.21, "0001.mp4": 0.21}
    assert scores.categories["VQA_A"].videos["0699.mp4"] == 61.0
    final.write_text(final.read_text().replace("Visual Quality ", "Visual Quality 1"))
    assert "Visual Quality: final_result.txt says 1" in problems("evalcrafter", folder)


def test_evalcrafter_says_what_keeps_its_total_from_being_official(tmp_path):
    folder = evalcrafter_results(tmp_path, MEANS)
    record(folder, "clip_score", 0.2, 699)
    assert problems("evalcrafter", folder) == "clip_score: 699 of 700 videos are in its record."
    record(folder, "clip_score", 0.2, 700)
    # What an attribute is not found in is left out officially.
    record(folder, "celebrity_id_score", 0.4, 51)
    assert "celebrity_id_score: 51 of the 54 relevant videos have a score." in read("evalcrafter", folder).notes
    (folder / "sd_score_record.txt").write_text("2026-01-01 00:00:00 Vid: 0000.mp4,  Current sd_score: 0.5, Current")
    assert problems("evalcrafter", folder) == "sd_score: there is no score."
    record(folder, "sd_score", float("nan"), 700)
    assert problems("evalcrafter", folder) == "sd_score: there is no score."
    record(folder, "sd_score", 0.5, 700)
    lines = (folder / "dover.csv").read_text().splitlines()
    (folder / "dover.csv").write_text("\n".join(lines[1:]))
    assert "VQA_A: 699 of 700 videos are in dover.csv." in problems("evalcrafter", folder)
    (folder / "dover.csv").write_text("\n".join(lines[:-1]))
    assert "does not end with its means" in problems("evalcrafter", folder)


# -- all --------------------------------------------------------------------------------------------------------------


def test_totals_are_linear_in_their_categories(tmp_path):
    """The weights that paired differences of a total are made of: a category that is 0.01 higher raises it by weight / 100."""
    middle = dict.fromkeys(SUITES["vbench-i2v"].weights, 0.8)
    cases = {
        "vbench-2.0": (vbench2_results, dict.fromkeys(SUITES["vbench-2.0"].weights, 0.5)),
        "vbench-i2v": (i2v_results, middle),
        "evalcrafter": (evalcrafter_results, MEANS),
    }
    for name, (make, means) in cases.items():
        before = read(name, make(tmp_path / name / "before", means)).totals["total"]
        for category in ("Composition", "dynamic_degree", "motion_smoothness", "flow_score", "ocr_score", "VQA_A"):
            if category in means:
                after = read(name, make(tmp_path / name / category, means | {category: means[category] + 0.01}))
                assert after.totals["total"] - before == pytest.approx(SUITES[name].weights[category] / 100)
    for version in ("v1", "v2"):
        weights = SUITES[f"t2v-compbench-{version}"].weights
        assert sum(weights.values()) == pytest.approx(1) and len(set(weights.values())) == 1


def test_scores_are_written_and_read(tmp_path):
    scores = {"direct": read("t2v-compbench-v2", compbench_v2(tmp_path / "results"))}
    write_scores(tmp_path / "scores.json", scores)
    assert {name: asdict(own) for name, own in read_scores(tmp_path / "scores.json").items()} == {
        name: asdict(own) for name, own in scores.items()
    }
    assert json.loads((tmp_path / "scores.json").read_text())["direct"]["complete"] is True
    other = compbench_prompts(tmp_path / "prompts") / "meta_data" / "action_binding.json"
    with pytest.raises(ValueError, match="is not a file that `fvg bench read` wrote"):
        read_scores(other)


def test_a_long_answer_is_read_and_the_limit_of_csv_stays(tmp_path):
    limit, answer = csv.field_size_limit(), "a" * 200_000
    (tmp_path / "table.csv").write_text(f"name,answer\n0001,{answer}\nscore: ,0.5\n")
    table = read_table(tmp_path / "table.csv")
    assert table.rows == [["0001", answer]] and csv.field_size_limit() == limit
