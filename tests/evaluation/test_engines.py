"""Every engine makes the same plan and the same videos. Processes take long to start, so these tests are slow."""

import argparse
import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from diffusers_fvg.cli.batch import ModelLoad
from diffusers_fvg.evaluation.manifest import read_manifest
from diffusers_fvg.evaluation.plan import PlannedVideo, derive_seed, write_plan
from diffusers_fvg.evaluation.run import run_plan
from diffusers_fvg.media import read_video, read_video_metadata


pytestmark = pytest.mark.slow

PROMPTS = ("A red circle moves to the right", "A blue square moves upwards")


@pytest.fixture(scope="module")
def load():
    from diffusers_fvg.cli import parser

    arguments = parser().parse_args(["batch", "a", "b", "--quiet"])
    return ModelLoad(argparse.Namespace(**{name: value for name, value in vars(arguments).items() if name != "run"}))


# Videos without stages 1 and 2, with them, and with a judge that chooses between two images.
ARMS = {
    "direct": {"mode": "direct"},
    "factorized": {"mode": "factorized", "composer_num_inference_steps": 2},
    "judged": {"mode": "factorized", "composer_num_inference_steps": 2, "composer_num_candidates": 2},
}
ROWS = [
    PlannedVideo(
        f"videos/{arm}-{index}-{sample}.mp4",
        prompt,
        derive_seed(0, index, sample),
        {"num_inference_steps": 1, **arguments},
    )
    for arm, arguments in ARMS.items()
    for index, prompt in enumerate(PROMPTS)
    for sample in range(2)
]


# Keys of captions and stages.json with durations.
_TIME = re.compile(rb'"\w*seconds": [\d.e+-]+')


def made(folder: Path, load, engine: str, rows=ROWS) -> dict[str, bytes]:
    """Plan, captions, pictures and scores of stage 2, and videos."""
    write_plan(folder, rows)
    summary = run_plan(folder, load, engine=engine, num_processes=2, quiet=True)
    assert (summary.finished, summary.made) == (len(rows), len(rows))
    assert Counter(line["status"] for line in read_manifest(folder)) == {"made": len(rows)}
    assert len(list((folder / "captions").glob("*.json"))) == 2
    patterns = ("plan.*", "captions/*.json", "stages/**/*.*", "videos/*.mp4")
    files = [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
    return {str(path.relative_to(folder)): _content(path) for path in files}


def _content(path: Path) -> bytes:
    """Of a video its pixels and record; which models a process holds, `dtypes`, is the engine's own."""
    if path.suffix != ".mp4":
        return _TIME.sub(b"", path.read_bytes())
    record = {name: value for name, value in read_video_metadata(path).items() if name != "dtypes"}
    return json.dumps(record).encode() + read_video(path)[0].tobytes()


@pytest.fixture(scope="module")
def expected(tmp_path_factory, load):
    return made(tmp_path_factory.mktemp("in-process"), load, "in-process")


def test_place_and_company_of_a_video_do_not_matter(tmp_path, load, expected):
    """Makes every other video in reverse order; the judge's scores must be the same."""
    few = made(tmp_path, load, "in-process", ROWS[::-2])
    # The judge accepts the first of two images, or has seen both.
    assert {f"stages/videos/judged-{index}-1.mp4/candidate_1.png" for index in range(2)} < few.keys()
    assert len({expected[row.path] for row in ROWS if "judged" not in row.path}) == 8
    assert {name for name, data in few.items() if data != expected[name]} == {"plan.json", "plan.jsonl"}


def test_processes_of_accelerate_make_the_same_files(tmp_path, load, expected):
    assert made(tmp_path, load, "accelerate") == expected
    assert len({line["worker"] for line in read_manifest(tmp_path)}) == 2


def test_workers_of_ray_make_the_same_files(tmp_path, load, expected, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert made(tmp_path, load, "ray") == expected


def test_a_killed_run_goes_on(tmp_path, run_python):
    """Kills and resumes a run, as `kill_runs.py` does twenty times."""
    script = Path(__file__).parent / "kill_runs.py"
    os.makedirs(tmp_path / "runs")
    code = f"import sys, runpy; sys.argv = {[str(script), str(tmp_path / 'runs' / 'a'), '--kills', '2', '--videos', '20']}; "
    assert "faults: []" in run_python(
        code + f"runpy.run_path({str(script)!r}, run_name='__main__')", new_interpreter=True
    )
