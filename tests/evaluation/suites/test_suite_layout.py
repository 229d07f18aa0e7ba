"""Layout of videos for official evaluators, and the scripts that run these."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from published_files import compbench_prompts, evalcrafter_prompts, i2v_prompts, vbench2_prompts

from diffusers_fvg.evaluation.plan import write_plan
from diffusers_fvg.evaluation.suites import PUBLISHED
from diffusers_fvg.evaluation.suites.arms import chosen_prompts, conditions_of, plan_videos
from diffusers_fvg.evaluation.suites.commands import results_of, write_commands
from diffusers_fvg.evaluation.suites.layout import lay_out, lmms_eval_places
from diffusers_fvg.media import write_video


SUITES = {suite.name: suite for suite in PUBLISHED}
PROMPTS = {
    "t2v-compbench-v1": compbench_prompts,
    "t2v-compbench-v2": compbench_prompts,
    "vbench-2.0": vbench2_prompts,
    "evalcrafter": evalcrafter_prompts,
    "vbench-i2v": i2v_prompts,
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A video of 33 frames at 16 a second."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, np.zeros((33, 16, 16, 3), np.uint8), 16)
    return path.read_bytes()


def finished_run(suite, folder, clip, arms=("factorized",), seeds=(0,)):
    """A run with all videos, each one byte longer than the one before, so that no two are equal."""
    own = SUITES[suite]
    prompts = chosen_prompts(own.read_prompts(PROMPTS[suite](folder / "prompts")))
    rows = list(plan_videos(own, prompts, conditions_of(own, ["image"] if own.has_images else arms), seeds))
    write_plan(folder / "run", rows)
    for number, row in enumerate(rows):
        path = folder / "run" / row.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(clip + b"\0" * number)
    return folder / "run", rows


def laid_out(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.mp4"))


def test_each_arm_and_seed_is_a_model_of_its_own(tmp_path, clip):
    run, rows = finished_run("t2v-compbench-v2", tmp_path, clip, ["direct", "factorized@anchored-15"], (0, 3))
    counts = lay_out(run, tmp_path / "layout", SUITES)
    models = ["direct_seed-0", "direct_seed-3", "factorized_anchored-15_seed-0", "factorized_anchored-15_seed-3"]
    assert sorted(counts) == models and set(counts.values()) == {14}
    assert laid_out(tmp_path / "layout" / models[3] / "video") == sorted({row.labels["name"] for row in rows})
    file = tmp_path / "layout" / models[3] / "video" / "interaction" / "0002.mp4"
    assert file.samefile(run / "factorized_anchored-15" / "seed-3" / "interaction" / "0002.mp4")
    assert json.loads((tmp_path / "layout" / "layout.json").read_text())["folders"] == models


def test_vbench2_videos_lie_in_every_dimension_that_asks_for_them(tmp_path, clip):
    run, _ = finished_run("vbench-2.0", tmp_path, clip)
    lay_out(run, tmp_path / "layout", SUITES)
    model = tmp_path / "layout" / "factorized_seed-0"
    assert laid_out(model / "Diversity") == sorted(f"moving toy-{sample}.mp4" for sample in range(20))
    own = [f"{name}-{sample}.mp4" for name in ("falling stone", "moving toy") for sample in range(3)]
    assert laid_out(model / "Mechanics") == own and len(laid_out(model / "Material")) == 3
    assert (model / "Mechanics" / own[4]).samefile(model / "Diversity" / own[4])
    # One flat folder of all, where lmms-eval looks for the outputs of its task.
    lay_out(run, tmp_path / "export", SUITES, places=lmms_eval_places)
    assert len(laid_out(tmp_path / "export" / "factorized_seed-0" / "vbench2")) == 26


def test_a_run_that_is_not_finished_is_not_laid_out(tmp_path, clip):
    run, rows = finished_run("t2v-compbench-v2", tmp_path, clip)
    (run / rows[5].path).unlink()
    with pytest.raises(ValueError, match=f"1 videos are missing, the first {rows[5].path}: .* fvg bench run {run}"):
        lay_out(run, tmp_path / "layout", SUITES)
    assert lay_out(run, tmp_path / "layout", SUITES, skip_missing=True) == {"factorized_seed-0": 13}
    # V1 would score the next file in its place.
    run, rows = finished_run("t2v-compbench-v1", tmp_path / "v1", clip)
    (run / rows[5].path).unlink()
    with pytest.raises(ValueError, match="the evaluator of t2v-compbench-v1 needs every video"):
        lay_out(run, tmp_path / "other", SUITES, skip_missing=True)


def test_nothing_but_videos_of_the_run_lies_in_a_layout(tmp_path, clip):
    run, rows = finished_run("evalcrafter", tmp_path, clip)
    layout = tmp_path / "layout"
    lay_out(run, layout, SUITES)
    # A video that was made again takes the place of the old one.
    (run / rows[0].path).unlink()
    (run / rows[0].path).write_bytes(clip + b"new")
    lay_out(run, layout, SUITES)
    videos = layout / "factorized_seed-0" / "videos"
    assert laid_out(videos) == ["0000.mp4", "0001.mp4", "0002.mp4"]
    assert (videos / "0000.mp4").read_bytes() == clip + b"new"
    (videos / ".DS_Store").touch()
    with pytest.raises(ValueError, match=".DS_Store is not a video of this run"):
        lay_out(run, layout, SUITES)
    with pytest.raises(ValueError, match="is in the run's own folder"):
        lay_out(run, run / "layout", SUITES)


# -- scripts ----------------------------------------------------------------------------------------------------------

STUB = """#!/usr/bin/env bash
printf '%s\\n' "$(basename "$0") $*" >> "$CALLS"
if [ "$(basename "$0")" = conda ]; then
  mkdir -p "$4/bin" && cp "$0" "$4/bin/python"
fi
"""


def run_scripts(folder: Path, paths) -> list[str]:
    """Runs the scripts with programs that record their arguments."""
    programs, calls = folder / "programs", folder / "calls"
    programs.mkdir()
    for name in ("conda", "git", "curl", "docker", "sed", "mv"):
        (programs / name).write_text(STUB)
        (programs / name).chmod(0o755)
    calls.touch()
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(calls)}
    environment.pop("CONDA", None)
    for path in paths:
        done = subprocess.run(["bash", str(path)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return calls.read_text().splitlines()


def prepared_checkout(folder: Path) -> Path:
    """Folders and files of the evaluators that their scripts go into or copy."""
    own = """LLaVA/llava/eval Depth-Anything Grounded-Segment-Anything/GroundingDINO/demo dot/dot/utils/options MLLM_eval
        Detection_eval Tracking_eval VBench-2.0/vbench2/third_party/Instance_detector checkpoints vbench2_beta_i2v/data/crop results"""
    for name in own.split():
        (folder / name).mkdir(parents=True)
    files = """MLLM_eval/eval_x.py Detection_eval/run_depth.py Detection_eval/eval_spatial_relationships.py.py
        Detection_eval/eval_numeracy.py Tracking_eval/motion_binding_seg.py Tracking_eval/eval_motion_binding_foreground.py
        Tracking_eval/motion_binding_score_cal.py Tracking_eval/demo_options.py"""
    for name in files.split():
        (folder / name).touch()
    (folder / "checkpoints" / "download.sh").touch()
    return folder


@pytest.mark.parametrize("suite", PROMPTS)
def test_scripts_run_the_official_evaluator_on_what_is_laid_out(suite, tmp_path, clip):
    own = tmp_path / "it's a folder"  # Names of folders are quoted.
    run, rows = finished_run(suite, own, clip, ("direct", "factorized"))
    layout, results = own / "layout", own / "results"
    lay_out(run, layout, SUITES)
    paths = write_commands(SUITES[suite], layout, prepared_checkout(tmp_path / "checkout"), results)
    calls = run_scripts(tmp_path, paths)
    models = sorted({f"{row.labels['condition']}_seed-0" for row in rows})
    for model in models:
        wanted = {path.parent for path in (layout / model).rglob("*.mp4")}
        scored = [call for call in calls if f"{layout / model}" in call]
        # The evaluator also tracks motion on a copy of the videos, which it makes beside them.
        assert wanted == {folder for folder in wanted if any(str(folder) in call for call in scored)}
        assert all(str(results / model) in call or call.startswith("docker") for call in scored)
    if suite.startswith("t2v-compbench"):
        assert sum("--total_frame 33 --fps 16" in call for call in calls) == 2
        assert all(f"--t2v-model {m}" in " ".join(calls) for m in models)
    if suite == "vbench-i2v":
        assert all("--ratio 16-9" in call for call in calls if "evaluate_i2v.py" in call)
    assert any(call.startswith(("conda create", "docker pull")) for call in calls)
    for model in models:
        (results / model).mkdir(exist_ok=True)
    assert results_of(results, None) == (suite, {model: results / model for model in models})


def test_an_evaluator_that_adds_to_its_files_is_not_started_on_old_ones(tmp_path, clip):
    run, _ = finished_run("t2v-compbench-v2", tmp_path, clip)
    lay_out(run, tmp_path / "layout", SUITES)
    _, evaluate = write_commands(
        SUITES["t2v-compbench-v2"], tmp_path / "layout", tmp_path / "checkout", tmp_path / "results"
    )
    (tmp_path / "results" / "factorized_seed-0").mkdir()
    (tmp_path / "results" / "factorized_seed-0" / "old.csv").touch()
    done = subprocess.run(["bash", str(evaluate)], capture_output=True, text=True)
    assert done.returncode == 1 and "factorized_seed-0 is not empty: move it away first" in done.stderr


def test_results_say_what_they_are_of(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="give --suite"):
        results_of(tmp_path, None)
    assert results_of(tmp_path, "evalcrafter") == ("evalcrafter", {"mine": tmp_path / "mine"})
