"""The shapes world as a benchmark: clips that are rendered from its prompts' own scenes score full marks."""

import pytest

from diffusers_fvg.cli import main
from diffusers_fvg.evaluation.suites.scores import read_scores
from diffusers_fvg.evaluation.suites.t2v_compbench import META
from diffusers_fvg.media import write_video
from diffusers_fvg.shapes.benchmark import SHAPES, score_videos, write_prompts
from diffusers_fvg.shapes.held_out import held_out_scenes
from diffusers_fvg.shapes.world import render


SIZE = (17, 64, 64)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Prompts, one of each category, and the videos that they describe, written as small videos are: enlarged."""
    folder = tmp_path_factory.mktemp("shapes")
    assert write_prompts(folder / "prompts", 1) == dict.fromkeys(META, 1)
    for category in META:
        (scene,) = held_out_scenes(1, 0, (category,))
        path = folder / "layout" / "true_seed-0" / "video" / category / "0001.mp4"
        write_video(path, render(scene.objects, *SIZE), 8, {"height": SIZE[1]}, scale=6)
    return folder


def test_true_videos_score_full_marks_through_the_official_readers(files, capsys):
    videos = files / "layout" / "true_seed-0" / "video"
    results = files / "results" / "true_seed-0"
    assert main(["shapes", "score", str(videos), str(files / "prompts"), str(results), "--name", "true"]) == 0
    assert main(["bench", "read", str(files / "results"), "--suite", "shapes"]) == 0
    assert "true_seed-0 (synthetic)" in capsys.readouterr().out
    own = read_scores(files / "results" / "scores.json")["true_seed-0"]
    assert own.complete and own.synthetic
    found = {name: category.score for name, category in own.categories.items()}
    # A move of 25 % of the frame is full marks; this clip's is measured on pixels.
    assert found == pytest.approx(dict.fromkeys(META, 1.0), abs=0.05)
    assert own.totals["average"] == pytest.approx(sum(found.values()) / 7)


def test_another_prompts_video_and_none_at_all_score_little(files, tmp_path):
    videos = files / "layout" / "true_seed-0" / "video"
    for category, other in zip(META, [*META][1:]):
        (tmp_path / "video" / category).mkdir(parents=True)
        (tmp_path / "video" / category / "0001.mp4").hardlink_to(videos / other / "0001.mp4")
    means = score_videos(tmp_path / "video", files / "prompts", tmp_path / "results", "swapped")
    assert set(means) == set(META) - {"generative_numeracy"} and max(means.values()) < 0.5
    scores = SHAPES.read_scores(tmp_path / "results")
    assert not scores.totals
    assert scores.problems[:1] == [
        "generative_numeracy: swapped_numeracy_video.csv has no score row, so its script did not finish."
    ]
    # One of two videos is missing: there is a mean, and no total.
    write_prompts(tmp_path / "two", 2)
    assert set(score_videos(videos, tmp_path / "two", tmp_path / "part", "part")) == set(META)
    scores = SHAPES.read_scores(tmp_path / "part")
    assert not scores.totals and len(scores.problems) == 7 and "1 of 2 rows have no score" in scores.problems[0]


def test_prompts_are_held_out_and_are_those_of_the_files(files):
    prompts = SHAPES.read_prompts(files / "prompts")
    lines = [path.read_text().splitlines() for path in sorted((files / "prompts" / "prompts").glob("*.txt"))]
    assert [prompt.text for prompt in prompts] == [line for own in lines for line in own]
    scenes = [scene.prompt for category in META for scene in held_out_scenes(1, 0, (category,))]
    assert [prompt.text for prompt in prompts] == scenes
