import hashlib
import json
from functools import partial

import pytest
from killing import count_steps, kill_at_step

from diffusers_fvg.evaluation.plan import PlannedVideo, derive_seed, plan_facts, read_plan, write_plan


ROW = PlannedVideo(
    "videos/1.mp4", "Ein Kreis\u2028\x85 rückt", 5, {"width": 64, "height": 32}, {"suite": "a", "arm": "direct"}
)


def test_a_plan_is_read_as_it_was_written_and_the_same_rows_are_the_same_bytes(tmp_path):
    rows = [ROW, PlannedVideo("videos/2.mp4", "b", 6)]
    facts = write_plan(tmp_path / "a", rows, {"seed": 3})
    assert list(read_plan(tmp_path / "a")) == rows
    # With another order of keys, from a generator, and into a folder that has the plan already.
    other = PlannedVideo(*ROW.__dict__.values())
    other.arguments.clear()
    other.arguments.update(height=32, width=64)
    assert write_plan(tmp_path / "b", iter([other, rows[1]]), {"seed": 3}) == facts
    assert write_plan(tmp_path / "b", rows, {"seed": 3}) == facts
    data = (tmp_path / "a" / "plan.jsonl").read_bytes()
    assert (tmp_path / "b" / "plan.jsonl").read_bytes() == data
    assert (
        facts["videos"] == 2
        and facts["sha256"] == hashlib.sha256(data).hexdigest() == plan_facts(tmp_path / "a")["sha256"]
    )
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["plan.json", "plan.jsonl"]


def test_a_plan_that_is_killed_at_any_step_is_written_by_the_next_call(tmp_path):
    steps = count_steps(lambda: write_plan(tmp_path / "whole", [ROW]))
    for step in range(1, steps + 1):
        folder = tmp_path / str(step)
        assert kill_at_step(partial(write_plan, folder, [ROW]), step)
        write_plan(folder, [ROW])
        assert list(read_plan(folder)) == [ROW]
        assert sorted(path.name for path in folder.iterdir()) == ["plan.json", "plan.jsonl"], step


def test_seeds_are_those_of_their_formula():
    digest = hashlib.sha256(b"7|2|1").hexdigest()
    assert derive_seed(7, 2, 1) == int(digest[:14], 16) // 8 < 2**53
    assert len({derive_seed(0, index, sample) for index in range(100) for sample in range(5)}) == 500


@pytest.mark.parametrize(
    "path, told",
    [
        ("../1.mp4", "relative to the output folder"),
        ("/1.mp4", "relative"),
        ("a//1.mp4", "relative"),
        ("C:/1.mp4", "relative"),
        ("a\\1.mp4", "relative"),
        ("a/1.avi", "must end in .mp4"),
        ("manifest/1.mp4", "own files"),
        ("a/" + "é" * 126 + ".mp4", "255 bytes"),
    ],
)
def test_a_path_that_is_none_is_refused_and_nothing_is_written(tmp_path, path, told):
    with pytest.raises(ValueError, match=told):
        write_plan(tmp_path, [ROW, PlannedVideo(path, "a", 0)])
    assert list(tmp_path.iterdir()) == []


def test_what_would_mix_two_plans_is_refused(tmp_path):
    with pytest.raises(ValueError, match="two videos with the path 'videos/1.mp4'"):
        write_plan(tmp_path, [ROW, ROW])
    with pytest.raises(ValueError, match="no videos"):
        write_plan(tmp_path, [])
    write_plan(tmp_path, [ROW], {"seed": 1, "versions": {"torch": "1"}})
    assert write_plan(tmp_path, [ROW], {"seed": 1, "versions": {"torch": "2"}})["versions"] == {"torch": "1"}
    with pytest.raises(ValueError, match="`seed` was 1 and is now 2"):
        write_plan(tmp_path, [ROW], {"seed": 2})
    with pytest.raises(ValueError, match="another plan"):
        write_plan(tmp_path, [PlannedVideo("videos/2.mp4", "a", 0)], {"seed": 1})


@pytest.mark.parametrize(
    "line, told",
    [
        ("{", "Expecting"),
        ("[]", "must be an object"),
        ('{"path": "1.mp4"}', "must be an object"),
        (None, "`seed` must be int"),
    ],
)
def test_a_damaged_line_is_told_with_its_number(tmp_path, line, told):
    write_plan(tmp_path, [ROW])
    text = ROW.to_json()
    line = json.dumps(json.loads(text) | {"seed": True}) if line is None else line
    (tmp_path / "plan.jsonl").write_text(f"{text}\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"plan.jsonl, line 2: .*{told}"):
        list(read_plan(tmp_path))


def test_no_plan_is_told(tmp_path):
    with pytest.raises(ValueError, match="holds no plan"):
        list(read_plan(tmp_path))
