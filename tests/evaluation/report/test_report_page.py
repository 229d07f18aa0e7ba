"""The report of a small run whose numbers are known."""

import json
import re

import numpy as np
import PIL.Image
import pytest

from diffusers_fvg.evaluation.manifest import Manifest
from diffusers_fvg.evaluation.plan import read_plan, write_plan
from diffusers_fvg.evaluation.report.gather import gather
from diffusers_fvg.evaluation.report.page import _resources, write_report
from diffusers_fvg.evaluation.suites.arms import chosen_prompts, conditions_of, plan_videos, suite_facts
from diffusers_fvg.evaluation.suites.scores import CategoryScore, Scores, write_scores
from diffusers_fvg.evaluation.suites.suite import SuitePrompt
from diffusers_fvg.evaluation.worker import stages_folder
from diffusers_fvg.media import write_video
from diffusers_fvg.shapes.benchmark import SHAPES


CATEGORIES = list(SHAPES.weights)
SUITES = {"shapes": SHAPES}
# Scores of the baseline. The other arm has 0.1 more in the first prompt and 0.3 more in the second.
SCORE = 0.5


def scores(gain: tuple[float, float], seed: int) -> Scores:
    """Seed 1 scores 0.02 more than seed 0."""
    own = Scores("shapes", synthetic=True)
    for category in CATEGORIES:
        videos = {f"{category}/{k + 1:04d}.mp4": SCORE + gain[k] + 0.02 * seed for k in range(2)}
        own.categories[category] = CategoryScore(sum(videos.values()) / 2, videos)
    return own.aggregate({"average": SCORE + sum(gain) / 2 + 0.02 * seed})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two arms with two seeds; a video of the second arm is missing, and its first has pictures of stage 2 and a judge."""
    prompts = [
        SuitePrompt(f"A <circle> & {category} {k}", category, (f"{category}/{k:04d}.mp4",))
        for category in CATEGORIES
        for k in (1, 2)
    ]
    conditions = conditions_of(SHAPES, ["direct@full-50", "factorized_judged@anchored-15"])
    folder = tmp_path_factory.mktemp("report") / "run"
    write_plan(folder, plan_videos(SHAPES, chosen_prompts(prompts), conditions, (0, 1)), suite_facts(SHAPES, prompts))
    manifest, frames = Manifest(folder), np.zeros((9, 32, 32, 3), np.uint8)
    for row in read_plan(folder):
        judged = row.labels["arm"] == "factorized_judged"
        if judged and row.labels["name"] == "interaction/0002.mp4" and row.labels["seed"] == "1":
            manifest.add({"path": row.path, "status": "failed", "error": "ValueError: not finite"})
            continue
        frames[:] = 200 if judged else 90
        caption = f"A still <circle> of {row.labels['category']}" if judged else None
        record = {
            "prompt": row.prompt,
            "first_frame_prompt": caption,
            "model": "embedded",
            "versions": {"torch": "2.9"},
        }
        record |= {"num_inference_steps": 15 if judged else 50, "num_frames": 9, "height": 32, "width": 32}
        write_video(folder / row.path, frames, 8, record)
        line = {
            "path": row.path,
            "status": "made",
            "seed": row.seed,
            "bytes": 1,
            "seconds": {"animate": 2.0, "total": 3.5},
        }
        manifest.add(line | {"memory_bytes": 300 * 2**20, "motion": 0.25})
        if judged:
            stages = stages_folder(folder, row)
            stages.mkdir(parents=True)
            for name in ("anchor.png", "candidate_1.png", "candidate_2.png"):
                PIL.Image.new("RGB", (32, 32), "red").save(stages / name)
            listed = [{"file": f"candidate_{k}.png", "seed": k, "score": k / 4, "answers": []} for k in (1, 2)]
            (stages / "stages.json").write_text(
                json.dumps({"anchors": ["anchor.png"], "candidates": listed, "seconds": 1.25})
            )
    manifest.close()
    return folder


@pytest.fixture
def scored(tmp_path):
    names = {"direct_full-50": (0.0, 0.0), "factorized_judged_anchored-15": (0.1, 0.3)}
    found = {f"{name}_seed-{seed}": scores(gain, seed) for name, gain in names.items() for seed in (0, 1)}
    write_scores(tmp_path / "scores.json", found)
    return tmp_path / "scores.json", found


def written(run, folder, *given):
    page, table = write_report(run, folder, SUITES, *given)
    return page.read_text(encoding="utf-8"), table.read_text(encoding="utf-8")


def test_the_report_tells_scores_spreads_and_paired_differences(run, scored, tmp_path):
    page, table = written(run, tmp_path / "report", scored[0])
    for text in (page, table):
        # Mean of both seeds, and the deviation of two numbers that are 0.02 apart.
        assert "0.510 ± 0.014" in text and "0.710 ± 0.014" in text
        assert "synthetic" in text.lower() and "ValueError: not finite" in page
    # The differences of two prompts are 0.1 and 0.3; t with one degree of freedom is 12.706.
    assert "0.710 ± 0.014<br>+0.200 [-1.071, +1.471]" in table
    # Over seven categories of that variance, with seven degrees of freedom, t is 2.365.
    assert "| **average** | 0.510 ± 0.014 | 0.710 ± 0.014<br>+0.200 [+0.111, +0.289] |" in table
    assert "| factorized_judged_anchored-15 | 27 of 28 | 1.25 | 2.00 | 4.75 | 300 | 1 |" in table
    assert "Score against steps" in page and "Difference from direct_full-50" in page


def test_the_page_is_one_file_that_opens_from_disk(run, scored, tmp_path):
    page, _ = written(run, tmp_path / "report", *scored[:1], None, 3)
    assert set(re.findall(r'src="([^"]{0,22})', page)) == {"data:image/jpeg;base64"}
    assert not re.search(
        r"""(https?:)?//(?!\s)[\w.]+/|<script|<link|@import|url\(""", re.sub(r'src="[^"]*"', "", page)
    )
    # Prompts and captions are texts, not markup.
    assert (
        page.count("<blockquote>A &lt;circle&gt; &amp; ") == 3 and "A still &lt;circle&gt; of consistent_attr" in page
    )
    shown = [kind for kind in CATEGORIES if f"&amp; {kind} 1</blockquote>" in page]
    assert shown == CATEGORIES[:3]
    # Of three prompts two candidates each, of which the better is framed, and six frames in each of two arms.
    assert page.count("<img ") == 3 * (2 + 2 * 6) and page.count('class="chosen"') == 3
    assert page.count("judge 0.25") == page.count("judge 0.50") == 2 * 3


def test_of_many_missing_videos_fifty_are_listed(run):
    gathered = gather(run, SUITES, None, 0)
    gathered.conditions["direct_full-50"].failures |= {f"{k}.mp4": "ValueError: <none>" for k in range(60)}
    text = _resources(gathered)
    assert text.count("<li>") == 50 and "11 more are missing" in text
    assert text.count(".mp4: ValueError: &lt;none&gt;</li>") == 50


def test_scores_that_miss_something_have_no_total(run, scored, tmp_path):
    path, found = scored
    found["direct_full-50_seed-0"].problems.append("interaction: there is no score.")
    found["direct_full-50_seed-0"].aggregate({})
    write_scores(path, found)
    page, table = written(run, tmp_path / "report", path)
    assert "| **average** | - | 0.710 ± 0.014 |" in table and "* interaction: there is no score." in table
    assert "direct_full-50, seed 0 has no official total" in page
    assert "interaction</th>" in page


def test_a_report_needs_no_scores_and_takes_none_of_another_run(run, scored, tmp_path):
    page, table = written(run, tmp_path / "report")
    assert "<h2>Gallery</h2>" in page and "<h2>Scores</h2>" not in page and "| direct_full-50 | 28 of 28 |" in table
    with pytest.raises(ValueError, match="--baseline factorized must be one of direct_full-50,"):
        written(run, tmp_path / "report", scored[0], "factorized")
    write_scores(scored[0], scored[1] | {"other_seed-0": scores((0, 0), 0)})
    with pytest.raises(ValueError, match="scores of other_seed-0, which the plan of .* does not have"):
        written(run, tmp_path / "report", scored[0])
    write_scores(scored[0], {"direct_full-50_seed-0": Scores("evalcrafter")})
    with pytest.raises(ValueError, match="holds scores of evalcrafter"):
        written(run, tmp_path / "report", scored[0])
