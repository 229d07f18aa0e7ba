import multiprocessing
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
from filelock import FileLock
from fsspec.core import url_to_fs
from fsspec.implementations.memory import MemoryFileSystem
from stub import StubLoad

from diffusers_fvg.cli import main
from diffusers_fvg.evaluation import storage
from diffusers_fvg.evaluation.check import check_folder
from diffusers_fvg.evaluation.manifest import read_manifest
from diffusers_fvg.evaluation.plan import PlannedVideo, derive_seed, write_plan
from diffusers_fvg.evaluation.run import run_plan
from diffusers_fvg.media import read_video_metadata


ROWS = [PlannedVideo(f"videos/{i}.mp4", "a", derive_seed(0, i), {"mode": "direct"}) for i in range(4)]


@pytest.fixture(params=["memory", "local"])
def url(request, tmp_path, monkeypatch):
    """A storage in memory and one of files; the tested code gets only the URL."""
    monkeypatch.setattr(storage.constants, "HF_HOME", str(tmp_path / "cache"))
    # Once with the first video, however long the others take.
    monkeypatch.setattr(storage, "RECORD_SECONDS", 3600.0)
    return f"{request.param}://{tmp_path}/out"


def run(url, load, made_by=None):
    with storage.opened(url) as (folder, there):
        write_plan(folder, ROWS)
        there.add_facts()
        return run_plan(folder, load, made_by, quiet=True, storage=there)


def files(url) -> dict[str, int]:
    system, root = url_to_fs(url)
    return {name.removeprefix(f"{root}/"): size for name, size in system.du(root, total=False).items()}


def calls(load) -> Counter:
    return Counter(map(int, load.calls.read_text().split()))


def test_a_run_goes_to_the_storage_and_on_from_what_it_lists(url, tmp_path):
    load, (system, root) = StubLoad(tmp_path / "calls"), url_to_fs(url)
    assert run(url, load).finished == 4
    there = files(url)
    assert {row.path for row in ROWS} | {"plan.json", "plan.jsonl", "run.json"} < there.keys()
    assert len(there) == 8 and not list((tmp_path / "cache" / "diffusers_fvg").glob("*/"))
    for row in ROWS:
        system.get_file(f"{root}/{row.path}", str(tmp_path / "one.mp4"))
        assert read_video_metadata(tmp_path / "one.mp4")["seeds"]["video"] == row.seed
    # On another machine: a video that was lost, and one without a line, which another's kill came between.
    system.rm(f"{root}/{ROWS[0].path}")
    (name,) = (name for name in there if name.startswith("manifest/"))
    lines = system.cat_file(f"{root}/{name}").decode().splitlines(keepends=True)
    system.pipe_file(f"{root}/{name}", "".join(line for line in lines if ROWS[1].path not in line).encode())
    assert run(url, load).made == 1
    assert calls(load) == {row.seed: 2 if row is ROWS[0] else 1 for row in ROWS}
    assert files(url)[ROWS[0].path] == there[ROWS[0].path]
    assert run(url, load).made == 0
    with pytest.raises(
        ValueError, match=f"{url}/run.json belongs to another plan or model: `model` was None and is now 'b'"
    ):
        run(url, load, {"model": "b"})


@pytest.mark.parametrize("url", ["local"], indirect=True)
def test_a_killed_run_goes_on(url, tmp_path):
    load, began = StubLoad(tmp_path / "calls", seconds=0.3), time.monotonic()
    process = multiprocessing.get_context("fork").Process(target=run, args=(url, load))
    process.start()
    # One video is there, and another is being written.
    while time.monotonic() < began + 60 and not (tmp_path / "out" / ROWS[0].path).exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    there = set(files(url))
    assert ROWS[0].path in there and ROWS[3].path not in there
    assert run(url, load).finished == 4
    assert calls(load)[ROWS[0].seed] == 1 and calls(load).total() <= 5
    with storage.opened(url) as (folder, _):
        assert Counter(line["path"] for line in read_manifest(folder)) == {row.path: 1 for row in ROWS}


@pytest.mark.parametrize("is_same_machine", [True, False])
def test_a_storage_that_breaks_keeps_whole_files_and_the_run_goes_on(url, tmp_path, monkeypatch, is_same_machine):
    load, count, copy = StubLoad(tmp_path / "calls"), iter(range(100)), shutil.copyfileobj

    def breaking(here, there, size):
        # Behind plan (2), model, the first two videos and, with the first, the manifest.
        if next(count) == 6:
            there.write(here.read(100))
            raise ConnectionError("the line is cut")
        copy(here, there, size)

    with monkeypatch.context() as patch:
        patch.setattr(storage.shutil, "copyfileobj", breaking)
        with pytest.raises(
            OSError, match=f"{url}: videos/2.mp4 cannot be written: ConnectionError: the line is cut. "
        ):
            run(url, load)
    assert [name for name in files(url) if name.endswith(".mp4")] == ["videos/0.mp4", "videos/1.mp4"]
    if not is_same_machine:
        shutil.rmtree(tmp_path / "cache")
    assert run(url, load).finished == 4
    # Videos that exist are not computed again.
    assert (
        calls(load)[ROWS[2].seed] == (1 if is_same_machine else 2)
        and calls(load).total() == (4, 5)[not is_same_machine]
    )
    with storage.opened(url) as (folder, there):
        assert Counter(line["path"] for line in read_manifest(folder)) == {row.path: 1 for row in ROWS}
        assert not [finding for finding in check_folder(folder, storage=there) if finding.is_fault]


def test_faults_on_a_storage_are_found(url):
    run(url, StubLoad())
    system, root = url_to_fs(url)
    system.rm(f"{root}/videos/0.mp4")
    system.pipe_file(f"{root}/videos/1.mp4", system.cat_file(f"{root}/videos/1.mp4")[:500])
    system.pipe_file(f"{root}/videos/extra.mp4", b"a")
    with storage.opened(url) as (folder, there):
        found = [(finding.kind, finding.path) for finding in check_folder(folder, storage=there)]
    assert found == [("missing", "videos/0.mp4"), ("truncated", "videos/1.mp4"), ("stray", "videos/extra.mp4")]


def test_what_the_plan_did_not_make_is_left_as_it_is(url):
    system, root = url_to_fs(url)
    system.makedirs(f"{root}/videos")
    system.pipe_file(f"{root}/videos/1.mp4", b"a video of another program")
    with pytest.raises(ValueError, match=f"{url}/videos/1.mp4 was not made by this plan"):
        run(url, StubLoad())
    assert system.cat_file(f"{root}/videos/1.mp4") == b"a video of another program"


@pytest.mark.parametrize(
    "url, told",
    [
        ("nowhere://a/b", "Protocol not known: nowhere"),
        ("memory://", "names no folder"),
        ("s3://bucket/a", "another run of this machine works in s3://bucket/a"),
    ],
)
def test_what_is_no_storage_is_told(tmp_path, monkeypatch, capsys, url, told):
    monkeypatch.setattr(storage.constants, "HF_HOME", str(tmp_path))
    if "s3" in url:
        # Its package is not installed here.
        monkeypatch.setattr(storage, "url_to_fs", lambda url: (MemoryFileSystem(), "bucket/a"))
        held = FileLock(f"{storage.Storage(url).folder}.lock")
        (tmp_path / "diffusers_fvg").mkdir()
        held.acquire()
    (tmp_path / "a.txt").write_text("A red circle moves to the right\n")
    assert main(["batch", str(tmp_path / "a.txt"), url, "--plan-only", "--quiet"]) == 2
    assert told in capsys.readouterr().err


def test_what_cannot_work_on_a_storage_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(storage.constants, "HF_HOME", str(tmp_path))
    for action in (["run", "memory://a"], ["layout", "memory://a", "b"], ["report", "memory://a", "b"]):
        with pytest.raises(SystemExit):
            main(["bench", *action])
        assert "'memory://a' is not a local folder" in capsys.readouterr().err
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with storage.opened("memory://ray/out") as (folder, there):
        write_plan(folder, ROWS)
        with pytest.raises(ValueError, match="a folder that all of them share, but memory://ray/out is no"):
            run_plan(folder, StubLoad(), engine="ray", storage=there)
    assert main(["bench", "check", "memory://nothing/there"]) == 2
    assert "memory://nothing/there holds no plan" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("A red circle moves to the right\n")
    assert main(["batch", str(tmp_path / "a.txt"), f"file://{tmp_path}/b", "--plan-only", "--quiet"]) == 0
    assert Path(tmp_path / "b" / "plan.jsonl").is_file()
