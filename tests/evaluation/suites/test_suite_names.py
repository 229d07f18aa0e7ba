"""Prompts and official names of the benchmarks, and the plans made of them."""

import os
from pathlib import Path

import pytest
from published_files import LONG, compbench_prompts, evalcrafter_prompts, i2v_prompts, vbench2_prompts

from diffusers_fvg.evaluation.plan import read_plan, write_plan
from diffusers_fvg.evaluation.suites import PUBLISHED
from diffusers_fvg.evaluation.suites.arms import (
    chosen_prompts,
    conditions_of,
    plan_videos,
    read_upsampled,
    suite_facts,
)
from diffusers_fvg.evaluation.suites.suite import prompt_digest


SUITES = {suite.name: suite for suite in PUBLISHED}
PUBLISHED_FILES = os.environ.get("FVG_PROMPT_SUITES")
needs_published = pytest.mark.skipif(
    PUBLISHED_FILES is None, reason="needs FVG_PROMPT_SUITES, a folder of prompt suites"
)


def names(suite, folder):
    return [name for prompt in SUITES[suite].read_prompts(folder) for name in prompt.names]


def plan(suite, folder, arms, **options):
    prompts = chosen_prompts(SUITES[suite].read_prompts(folder))
    steps = options.pop("steps", ())
    return list(plan_videos(SUITES[suite], prompts, conditions_of(SUITES[suite], arms, steps), **options))


# -- the published files ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_published
@pytest.mark.parametrize(
    ("suite", "place", "prompts", "videos"),
    [
        ("t2v-compbench-v1", "t2v_compbench/v1_main", 700, 700),
        ("t2v-compbench-v2", "t2v_compbench/v2", 1400, 1400),
        ("vbench-2.0", "vbench2", 1013, 3209),
        ("evalcrafter", "evalcrafter", 700, 700),
    ],
)
def test_published_prompts_are_the_ones_that_were_checked(suite, place, prompts, videos):
    read = SUITES[suite].read_prompts(Path(PUBLISHED_FILES) / place)
    own = [name for prompt in read for name in prompt.names]
    assert (len(read), len(own), len(set(own))) == (prompts, videos, videos)
    assert prompt_digest(read) == SUITES[suite].prompt_digest
    assert suite_facts(SUITES[suite], read)["prompts_as_checked"] is True


@pytest.mark.slow
@needs_published
def test_vbench2_names_are_the_published_list():
    folder = Path(PUBLISHED_FILES) / "vbench2"
    listed = (folder / "sampled_videos.txt").read_text(encoding="utf-8").split("\n")
    assert names("vbench-2.0", folder) == [name for name in listed if name]


@pytest.mark.slow
@needs_published
def test_evalcrafter_and_compbench_names_are_numbered_as_their_prompts_are():
    folder = Path(PUBLISHED_FILES)
    assert names("evalcrafter", folder / "evalcrafter") == [f"{number:04d}.mp4" for number in range(700)]
    for version, place, count in (("v1", "v1_main", 100), ("v2", "v2", 200)):
        own = names(f"t2v-compbench-{version}", folder / "t2v_compbench" / place)
        wanted = [
            f"{category}/{number:04d}.mp4"
            for category in "consistent_attr dynamic_attr spatial_relationships motion_binding action_binding interaction "
            "generative_numeracy".split()
            for number in range(1, count + 1)
        ]
        assert own == wanted


# -- names ------------------------------------------------------------------------------------------------------------


def test_compbench_counts_from_one_in_each_category(tmp_path):
    own = names("t2v-compbench-v2", compbench_prompts(tmp_path))
    assert (
        own[:3] == ["consistent_attr/0001.mp4", "consistent_attr/0002.mp4", "dynamic_attr/0001.mp4"] and len(own) == 14
    )
    # The files of a category are also found in a copy of meta_data/ only.
    assert names("t2v-compbench-v1", tmp_path / "meta_data") == own


def test_vbench2_cuts_prompts_and_keeps_the_blank_at_the_cut(tmp_path):
    own = names("vbench-2.0", vbench2_prompts(tmp_path))
    assert own[:20] == [f"moving toy-{sample}.mp4" for sample in range(20)]
    assert own[20:23] == [f"falling stone-{sample}.mp4" for sample in range(3)]
    cut = own[23].removesuffix("-0.mp4")
    assert len(cut) == 180 and LONG.startswith(cut)
    assert len(own) == 26


def test_a_video_of_diversity_lies_in_its_other_dimensions_up_to_the_third(tmp_path):
    suite = SUITES["vbench-2.0"]
    (toy, *_) = suite.read_prompts(vbench2_prompts(tmp_path))
    assert suite.places(toy.category, toy.names[2]) == ["Mechanics/moving toy-2.mp4", "Diversity/moving toy-2.mp4"]
    assert suite.places(toy.category, toy.names[3]) == ["Diversity/moving toy-3.mp4"]


def test_evalcrafter_counts_from_zero(tmp_path):
    assert names("evalcrafter", evalcrafter_prompts(tmp_path)) == ["0000.mp4", "0001.mp4", "0002.mp4"]


def test_i2v_videos_start_from_the_pictures_of_a_ratio(tmp_path):
    suite, folder = SUITES["vbench-i2v"], i2v_prompts(tmp_path)
    assert names("vbench-i2v", folder)[:6] == [
        *(f"a still lake-{k}.mp4" for k in range(5)),
        "a still lake, camera pans left-0.mp4",
    ]
    pictures = [Path(prompt.image) for prompt in suite.read_prompts(folder, "1-1")]
    assert [picture.relative_to(folder.resolve()).as_posix() for picture in pictures][1:] == [
        "vbench2_beta_i2v/data/crop/1-1/lake.jpg",
        "vbench2_beta_i2v/data/crop/1-1/dog.jpg",
    ]
    with pytest.raises(ValueError, match="--ratio 4-3"):
        suite.read_prompts(folder, "4-3")
    pictures[2].unlink()
    with pytest.raises(ValueError, match="download_data.sh"):
        suite.read_prompts(folder, "1-1")


def test_a_folder_of_something_else_is_refused_by_name(tmp_path):
    for name in SUITES:
        with pytest.raises(ValueError, match=f"--prompts {tmp_path} holds no "):
            SUITES[name].read_prompts(tmp_path)


# -- plans ------------------------------------------------------------------------------------------------------------


def test_arms_are_paired(tmp_path):
    """A prompt's videos have the same seed in every arm, and another for each prompt, sample and seed of the plan."""
    folder = vbench2_prompts(tmp_path)
    rows = plan("vbench-2.0", folder, ["direct@full-50", "factorized@anchored-15"], seeds=(0, 7), steps=(50, 15))
    assert len(rows) == 26 * 2 * 2 * 2
    seeds = {}
    for row in rows:
        seeds.setdefault((row.labels["seed"], row.labels["name"]), set()).add(row.seed)
    assert all(len(own) == 1 for own in seeds.values()) and len(set().union(*seeds.values())) == 26 * 2
    assert rows[0].arguments == {"mode": "direct", "preset": "full-50", "num_inference_steps": 50}
    assert rows[0].path == "direct_full-50_50-steps/seed-0/moving toy-0.mp4"


def test_the_plan_is_the_same_for_part_of_a_suite(tmp_path):
    suite, folder = SUITES["t2v-compbench-v2"], compbench_prompts(tmp_path)
    prompts, conditions = suite.read_prompts(folder), conditions_of(suite, ["factorized"])
    whole = {row.path: row for row in plan_videos(suite, chosen_prompts(prompts), conditions)}
    part = list(plan_videos(suite, chosen_prompts(prompts, ["interaction", "dynamic_attr"], 1), conditions))
    assert [row.labels["name"] for row in part] == ["dynamic_attr/0001.mp4", "interaction/0001.mp4"]
    assert all(whole[row.path] == row for row in part)
    with pytest.raises(ValueError, match="--categories colour must be of consistent_attr"):
        chosen_prompts(prompts, ["colour"])


def test_stage_1_reads_the_prompt_alone_and_an_arm_says_how_many_pictures_are_drawn(tmp_path):
    folder = compbench_prompts(tmp_path)
    arms = ["direct_upsampled", "factorized", "factorized_judged"]
    upsampled = [f"a far longer prompt {number}" for number in range(14)]
    rows = plan("t2v-compbench-v2", folder, arms, upsampled=upsampled, num_candidates=6, call={"num_frames": 17})
    assert [row.prompt for row in rows[:3]] == [upsampled[0], "consistent_attr number 1", "consistent_attr number 1"]
    assert [row.arguments.get("composer_num_candidates") for row in rows[:3]] == [None, 1, 6]
    assert all(row.arguments["num_frames"] == 17 and "first_frame_prompt" not in row.arguments for row in rows)
    with pytest.raises(ValueError, match="--num-frames 13: the evaluator of t2v-compbench-v2 needs 16 at least"):
        plan("t2v-compbench-v2", folder, ["direct"], call={"num_frames": 13})
    with pytest.raises(ValueError, match="--upsampled FILE"):
        plan("t2v-compbench-v2", folder, arms)


def test_arms_that_a_suite_cannot_have_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--arms image is not for t2v-compbench-v2"):
        conditions_of(SUITES["t2v-compbench-v2"], ["image"])
    with pytest.raises(ValueError, match="vbench-i2v, which has image alone"):
        conditions_of(SUITES["vbench-i2v"], ["direct"])
    with pytest.raises(ValueError, match="--arms fast: give one of direct,"):
        conditions_of(SUITES["evalcrafter"], ["fast"])


def test_upsampled_prompts_are_as_many_as_the_suite_has(tmp_path):
    path = tmp_path / "upsampled.txt"
    path.write_text("one\ntwo\n\n")
    assert read_upsampled(path, 2) == ["one", "two"]
    with pytest.raises(ValueError, match="has 2 prompts, and the suite has 3"):
        read_upsampled(path, 3)


def test_a_plan_with_official_names_is_written_and_read(tmp_path):
    rows = plan("vbench-2.0", vbench2_prompts(tmp_path / "files"), ["factorized"])
    write_plan(tmp_path / "run", rows)
    assert list(read_plan(tmp_path / "run")) == rows
