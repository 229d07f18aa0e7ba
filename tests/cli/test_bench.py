"""`fvg bench` from the command line. The whole way with a model is in `evaluation/README.md`, whose commands are run."""

import csv
import json
import zipfile

import pytest
from published_files import compbench_prompts, dimension_file, vbench2_prompts

from diffusers_fvg.cli import main
from diffusers_fvg.cli.bench import SUITE_NAMES, suites
from diffusers_fvg.evaluation.plan import plan_facts, read_plan


def failed(capsys, *words) -> str:
    assert main(["bench", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_every_suite_is_named():
    assert tuple(suites()) == SUITE_NAMES


def test_a_plan_says_what_it_is_of(tmp_path, capsys):
    prompts, run = compbench_prompts(tmp_path / "prompts"), tmp_path / "run"
    arguments = [
        "bench",
        "plan",
        str(run),
        "--suite",
        "t2v-compbench-v2",
        "--prompts",
        str(prompts),
        "--seeds",
        "0",
        "5",
    ]
    assert main([*arguments, "--arms", "direct@full-50", "factorized", "--steps", "8", "4", "--num-frames", "17"]) == 0
    printed = capsys.readouterr().out
    # Two prompts of each category, four conditions, two seeds. These prompts are made up.
    assert "videos:             112" in printed and "they differ from the checked version" in printed
    facts = plan_facts(run)
    assert facts["suite"] == "t2v-compbench-v2" and facts["prompts_as_checked"] is False
    row = next(read_plan(run))
    assert row.arguments == {"mode": "direct", "preset": "full-50", "num_inference_steps": 8, "num_frames": 17}
    assert f"--lmms-eval is only for vbench-2.0, but {run} is a run of t2v-compbench-v2" in failed(
        capsys, "layout", run, tmp_path / "layout", "--lmms-eval"
    )
    # Nothing is made yet.
    assert "112 videos are missing, the first direct_full-50_8-steps/seed-0/consistent_attr/0001.mp4" in failed(
        capsys, "layout", run, tmp_path / "layout"
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--arms", "fast"], "--arms fast: give one of direct,"),
        (["--arms", "image"], "--arms image is not for vbench-2.0"),
        (["--arms", "direct_upsampled"], "needs --upsampled FILE"),
        (["--ratio", "1-1"], "--ratio 1-1 has no effect without --suite vbench-i2v"),
        (["--num-candidates", "4"], "--num-candidates 4 has no effect without --arms factorized_judged"),
        (["--num-frames", "17"], "--num-frames 17: the evaluator of vbench-2.0 needs 21 at least"),
        (["--categories", "Colour"], "--categories Colour must be of "),
        (["--prompts", "nowhere"], "--prompts nowhere holds no "),
    ],
)
def test_what_cannot_be_planned_is_one_line(words, told, tmp_path, capsys):
    prompts = ["--prompts", vbench2_prompts(tmp_path / "prompts")]
    error = failed(capsys, "plan", tmp_path / "run", "--suite", "vbench-2.0", *prompts, *words)
    assert told in error and error.count("\n") == 1
    assert not (tmp_path / "run" / "plan.jsonl").exists()


def test_results_are_read_and_packed(tmp_path, capsys):
    results = tmp_path / "results" / "ours"
    dimension_file(results, "Material", 0.5, [0.5] * 150)
    assert main(["bench", "read", str(tmp_path / "results"), "--suite", "vbench-2.0"]) == 0
    printed = capsys.readouterr().out
    assert "Material                            0.5000    150 videos" in printed
    assert "no total: Mechanics: there is no score." in printed and "total   " not in printed
    scores = json.loads((tmp_path / "results" / "scores.json").read_text())
    assert scores["ours"]["complete"] is False and scores["ours"]["totals"] == {}
    packing = ["bench", "pack", str(results), str(tmp_path / "ours.zip"), "--suite", "vbench-2.0", "--name", "ours"]
    assert main(packing) == 0
    assert "not in it:          Composition, Diversity, " in capsys.readouterr().out
    with zipfile.ZipFile(tmp_path / "ours.zip") as archive:
        assert [name.split("/")[0] for name in archive.namelist()] == ["Material"]
    told = failed(capsys, "pack", results, tmp_path / "ours.zip", "--suite", "evalcrafter", "--name", "ours")
    assert "evalcrafter has no leaderboard that accepts files" in told


def test_what_is_no_layout_no_result_and_no_run_is_told(tmp_path, capsys):
    assert "holds no layout of videos: run fvg bench layout" in failed(
        capsys, "commands", tmp_path, tmp_path, tmp_path / "results"
    )
    assert "does not name the suite of its results: give --suite" in failed(capsys, "read", tmp_path)
    assert "holds no folder of results; run its evaluate.sh first" in failed(
        capsys, "read", tmp_path, "--suite", "shapes"
    )
    assert "holds no plan" in failed(capsys, "report", tmp_path, tmp_path / "report")


def test_shapes_prompts_are_a_benchmarks_files(tmp_path, capsys):
    assert main(["shapes", "prompts", str(tmp_path / "shapes"), "--per-category", "2"]) == 0
    assert "generative_numeracy         2 prompts" in capsys.readouterr().out
    arguments = ["bench", "plan", str(tmp_path / "run"), "--suite", "shapes", "--prompts", str(tmp_path / "shapes")]
    assert main([*arguments, "--per-category", "1"]) == 0
    assert "prompts:            7 of 14\n" in capsys.readouterr().out
    # A category without any video has a table without a score row.
    assert main(["shapes", "score", str(tmp_path), str(tmp_path / "shapes"), str(tmp_path / "results")]) == 0
    with open(tmp_path / "results" / "shapes_motion_score.csv", newline="") as file:
        assert [row[-1] for row in csv.reader(file)] == ["Score", "no video", "no video"]
