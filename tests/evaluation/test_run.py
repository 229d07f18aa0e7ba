import errno
import json
import multiprocessing
import os
import resource
import time
from collections import Counter

import pytest
from filelock import FileLock
from stub import StubLoad

import diffusers_fvg.evaluation.worker as worker
from diffusers_fvg.evaluation import manifest
from diffusers_fvg.evaluation.job import fair_share
from diffusers_fvg.evaluation.manifest import finished_sizes, is_turn, read_manifest
from diffusers_fvg.evaluation.plan import PlannedVideo, derive_seed, write_plan
from diffusers_fvg.evaluation.run import run_plan
from diffusers_fvg.media import read_video, read_video_metadata


def planned(folder, prompts=("a", "b", "c", "d")):
    rows = [
        PlannedVideo(f"videos/{i}.mp4", text, derive_seed(0, i), {"mode": "direct"}) for i, text in enumerate(prompts)
    ]
    write_plan(folder, rows)
    return rows


def lines(folder):
    return Counter((line["path"], line["status"]) for line in read_manifest(folder))


def test_a_run_makes_what_is_missing_and_nothing_twice(tmp_path):
    out, load = tmp_path / "out", StubLoad(tmp_path / "calls")
    rows = planned(out)
    summary = run_plan(out, load, {"model": "a"}, quiet=True)
    assert (summary.planned, summary.finished, summary.made, summary.failures) == (4, 4, 4, ())
    for row in rows:
        assert read_video_metadata(out / row.path)["seeds"]["video"] == row.seed
    assert lines(out) == {(row.path, "made"): 1 for row in rows}
    # One video is lost with its line, which a kill cuts off; another is damaged.
    (out / rows[0].path).unlink()
    (out / rows[1].path).write_bytes(b"half")
    (lines_file,) = (out / "manifest").glob("*.jsonl")
    text = lines_file.read_text()
    lines_file.write_text(text[: text.rindex('"seed"')])
    assert run_plan(out, load, {"model": "a"}, quiet=True).made == 2
    calls = Counter(map(int, load.calls.read_text().split()))
    assert calls == {rows[0].seed: 2, rows[1].seed: 2, rows[2].seed: 1, rows[3].seed: 1}
    assert lines(out)[rows[3].path, "found"] == 1 and len(read_video(out / rows[1].path)[0]) == 2
    assert run_plan(out, load, {"model": "a"}, quiet=True).made == 0
    assert not (out / "temporary").exists() and [path.name for path in (out / "manifest").glob("*.lock")] == [
        "run.lock"
    ]
    with pytest.raises(ValueError, match="`model` was 'a' and is now 'b'"):
        run_plan(out, load, {"model": "b"}, quiet=True)


def test_a_video_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Lines of many in a short time are written to it together."""
    rows, fsync, forced = planned(tmp_path), os.fsync, []

    def force(descriptor):
        there = [row.path for row in rows if (tmp_path / row.path).exists()]
        forced.append((os.fstat(descriptor).st_ino, there))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", force)
    monkeypatch.setattr(manifest, "SYNC_SECONDS", 60.0)
    run_plan(tmp_path, StubLoad(), quiet=True)
    for index, row in enumerate(rows):
        assert ((tmp_path / row.path).stat().st_ino, [row.path for row in rows[:index]]) in forced
    (lines_file,) = (tmp_path / "manifest").glob("*.jsonl")
    assert [there for inode, there in forced if inode == lines_file.stat().st_ino] == [
        [rows[0].path],
        [row.path for row in rows],
    ]


def test_a_worker_that_is_given_what_another_finished_leaves_it_as_it_is(tmp_path):
    row, *_ = planned(tmp_path)
    (tmp_path / "temporary").mkdir()
    for times in range(3):
        one = worker.Worker(tmp_path, StubLoad(tmp_path / "calls"), {"video"})
        one.make(row)
        one.close()
        if times == 1:
            # The state after a kill between the video and its line.
            for path in (tmp_path / "manifest").glob("*.jsonl"):
                path.write_text("")
    assert lines(tmp_path) == {(row.path, "found"): 1} and len((tmp_path / "calls").read_text().split()) == 1


def test_a_video_that_cannot_be_made_stops_no_other_and_is_tried_again(tmp_path):
    rows = planned(tmp_path, ("a", "impossible", "c"))
    summary = run_plan(tmp_path, StubLoad(), quiet=True)
    assert (summary.finished, summary.made) == (2, 2)
    assert summary.failures == (("videos/1.mp4", "ValueError: 'impossible' cannot be shown"),)
    (tmp_path / rows[1].path).write_bytes(b"a video of another program")
    assert "videos/1.mp4" in run_plan(tmp_path, StubLoad(), quiet=True).failures[0][1]
    assert (tmp_path / rows[1].path).read_bytes() == b"a video of another program"
    assert lines(tmp_path)["videos/1.mp4", "failed"] == 2


@pytest.mark.parametrize("where", ["write_video", "add"])
def test_a_full_disk_stops_in_one_line_and_goes_on_when_there_is_room(tmp_path, monkeypatch, where):
    rows, count = planned(tmp_path), iter(range(100))

    def full(original):
        def call(*arguments, **options):
            if next(count) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*arguments, **options)

        return call

    owner = worker if where == "write_video" else worker.Manifest
    with monkeypatch.context() as patch:
        patch.setattr(owner, where, full(getattr(owner, where)))
        with pytest.raises(OSError, match="no space is left in .*: 2 of 4 videos are finished and whole. Make room"):
            run_plan(tmp_path, StubLoad(), quiet=True)
    assert not (tmp_path / "temporary").exists()
    assert run_plan(tmp_path, StubLoad(), quiet=True).finished == 4
    assert all(sum(count for (path, _), count in lines(tmp_path).items() if path == row.path) == 1 for row in rows)


def test_a_disk_that_is_full_before_the_first_video_is_told_with_its_folder(tmp_path):
    planned(tmp_path / "there")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        with pytest.raises(OSError, match="new/plan.jsonl cannot be written: File too large"):
            planned(tmp_path / "new")
        with pytest.raises(OSError, match=r"there \(File too large\): 0 of 4 videos are finished and whole"):
            run_plan(tmp_path / "there", StubLoad(), quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "new").exists()
    assert run_plan(tmp_path / "there", StubLoad(), quiet=True).made == 4


def hold(path, ready):
    with FileLock(path):
        ready.set()
        time.sleep(1.5)


@pytest.mark.parametrize("name", ["run.lock", "worker-1.lock"])
def test_one_run_at_a_time_works_in_a_folder_and_waits_for_workers_of_a_killed_one(tmp_path, name, capsys):
    planned(tmp_path, ("a",))
    (tmp_path / "manifest").mkdir()
    ready = multiprocessing.Event()
    process = multiprocessing.Process(target=hold, args=(tmp_path / "manifest" / name, ready))
    process.start()
    try:
        assert ready.wait(60)
        began = time.perf_counter()
        if name == "run.lock":
            (tmp_path / "manifest" / "run.id").write_text("1")
            (tmp_path / "temporary").mkdir()
            assert is_turn(tmp_path, "1") and not is_turn(tmp_path, "2")
            (tmp_path / "temporary" / "stopped.json").write_text("{}")
            assert not is_turn(tmp_path, "1")
            os.kill(process.pid, 19)
            with pytest.raises(ValueError, match="another run works in"):
                run_plan(tmp_path, StubLoad(), quiet=True)
            process.kill()
            process.join()
            assert not is_turn(tmp_path, "1")
            assert run_plan(tmp_path, StubLoad(), quiet=True).finished == 1
        else:
            assert run_plan(tmp_path, StubLoad(), quiet=True).finished == 1
            assert time.perf_counter() - began > 0.5 and "waiting for worker worker-1" in capsys.readouterr().out
    finally:
        process.kill()
        process.join()


def test_what_a_run_needs_follows_from_its_rows():
    parts = {
        "{}": {"rewriter", "composer", "lora", "video"},
        '{"mode": "direct"}': {"video"},
        '{"image": "a.png"}': {"lora", "video"},
        '{"first_frame_prompt": "a"}': {"composer", "lora", "video"},
        '{"mode": "storyboard"}': {"rewriter", "composer", "lora", "video"},
    }
    assert {text: set(worker.parts_of(json.loads(text))) for text in parts} == parts


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("arms", [1, 2, 3, 4, 6, 9])
def test_workers_share_every_arm_of_a_plan(count, arms):
    """Arms take turns; of 1000 videos of each, a worker has its part but for four standard deviations, and of all an equal one."""
    shares = Counter((number % arms, fair_share(number, count)) for number in range(1000 * arms))
    deviation = (1000 * (1 / count) * (1 - 1 / count)) ** 0.5
    parts = [shares[arm, worker] for arm in range(arms) for worker in range(count)]
    assert max(abs(part - 1000 / count) for part in parts) <= 4 * deviation
    assert Counter(fair_share(number, count) for number in range(count * 100)) == dict.fromkeys(range(count), 100)


def test_of_two_lines_the_later_counts(tmp_path):
    """A video that was lost and made again has a line of each worker; their files come in any order."""
    (tmp_path / "manifest").mkdir()
    for name, when, size in (("a", 3.0, 30), ("b", 2.0, 20), ("c", 1.0, 10)):
        line = {"path": "videos/1.mp4", "status": "made", "bytes": size, "time": when, "seed": 0, "worker": name}
        (tmp_path / "manifest" / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    assert list(finished_sizes(tmp_path).values()) == [30]
