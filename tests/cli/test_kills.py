"""Kills and full disks at random moments of what `fvg` writes: nothing half is taken as whole, and all goes on afterwards."""

import contextlib
import io
import json
import math
import random
import resource
import shutil
from collections import Counter
from pathlib import Path

import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline
from killing import kills
from tiny import tiny_pipeline, tiny_transformer

from diffusers_fvg import atomic, load_embedded, push
from diffusers_fvg.cli import main, pipeline
from diffusers_fvg.evaluation.check import check_folder
from diffusers_fvg.evaluation.manifest import read_manifest
from diffusers_fvg.media import read_video, read_video_metadata


KILLS, FULL_DISKS = 20, 10
PROMPT = "A red circle moves to the right"
SEED = ["--seed", "3", "--steps", "1", "--height", "32", "--width", "32", "--num-frames", "9", "--quiet"]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """Each run is a fork of this process, which has the model already."""
    torch.set_num_threads(1)
    pipe = load_embedded()
    pipe.set_progress_bar_config(disable=True)
    # A picture and a video as small and as quick as they can be.
    pipe.register_to_config(call_defaults=pipe.config.call_defaults | {"composer_num_candidates": 1})
    pipe.composer.call_defaults["num_inference_steps"] = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.Model, "load", lambda self, *size: pipe)
        patch.setattr(pipeline.Model, "load_part", lambda self, part: pipe)
        yield pipe


@contextlib.contextmanager
def room(count: int):
    """No file may grow beyond some bytes: what a full disk does. What a test prints goes to a file as well."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        with contextlib.redirect_stderr(io.StringIO()) as told, contextlib.redirect_stdout(io.StringIO()):
            yield told
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def limits(folder: Path, count: int):
    """Bytes between 1 and the largest file that a run writes, of all orders of size."""
    draw, largest = random.Random(0), max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return [int(math.exp(draw.uniform(0, math.log(largest)))) for _ in range(count)]


def report(capsys, text: str) -> None:
    with capsys.disabled():
        print(f"\n{text}", flush=True)


# -- generate with stages ---------------------------------------------------------------------------------------------


def generate(folder: Path) -> int:
    words = ["generate", PROMPT, *SEED, "--output", str(folder / "video.mp4"), "--strip", str(folder / "strip.png")]
    return main([*words, "--save-stages", str(folder / "stages"), "--overwrite"])


def check_generated(folder: Path, whole: Path) -> dict[str, bool]:
    """What is there is whole: the bytes of a run that was not disturbed. Returns what is there."""
    there = {}
    for name in ("video.mp4", "strip.png"):
        there[name] = (folder / name).exists()
        assert not there[name] or (folder / name).read_bytes() == (whole / name).read_bytes(), name
    there["stages"] = (folder / "stages" / "stages.json").exists()
    if there["stages"]:
        names = {path.name for path in (folder / "stages").iterdir() if not path.name.startswith(".fvg-")}
        assert names == {path.name for path in (whole / "stages").iterdir()}
        for name in names - {"stages.json"}:
            assert (folder / "stages" / name).read_bytes() == (whole / "stages" / name).read_bytes()
        assert json.loads((folder / "stages" / "stages.json").read_text())["prompt"] == PROMPT
    return there


@pytest.fixture(scope="module")
def generated(loaded_once, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated")
    assert generate(folder) == 0
    frames, _ = read_video(folder / "video.mp4")
    assert len(frames) == len(list((folder / "stages").glob("frame_*.png"))) == 9
    assert read_video_metadata(folder / "video.mp4")["prompt"] == PROMPT
    return folder


def test_kills_of_generate_with_stages(generated, tmp_path, capsys):
    counts = dict.fromkeys(("video.mp4", "strip.png", "stages"), 0)
    for count in kills(lambda: generate(tmp_path), KILLS):
        for name, is_there in check_generated(tmp_path, generated).items():
            counts[name] += is_there
        if count % 4 == 0:
            # From the beginning again.
            shutil.rmtree(tmp_path)
            tmp_path.mkdir()
    assert generate(tmp_path) == 0 and all(check_generated(tmp_path, generated).values())
    left = list(tmp_path.rglob(".fvg-*"))
    report(capsys, f"generate with stages: {KILLS} kills, whole after them {counts}, half 0, left over {len(left)}")
    assert left == []


def test_full_disks_of_generate_with_stages(generated, tmp_path, capsys):
    for limit in limits(generated, FULL_DISKS):
        with room(limit) as told:
            status = generate(tmp_path)
        lines = told.getvalue().strip().splitlines()
        assert status == 2 and len(lines) == 1 and "cannot be written: File too large" in lines[0], (status, lines)
        check_generated(tmp_path, generated)
        assert not list(tmp_path.rglob(".fvg-*"))
    assert generate(tmp_path) == 0 and all(check_generated(tmp_path, generated).values())
    report(capsys, f"generate with stages: {FULL_DISKS} full disks, each one line")


# -- compose ----------------------------------------------------------------------------------------------------------


def compose(path: Path) -> int:
    caption = "A still picture on a plain grey background: a red circle at the middle left"
    words = ["compose", caption, "--seed", "3", "--num-inference-steps", "1", "--num-candidates", "1", "--quiet"]
    return main([*words, "--output", str(path), "--overwrite"])


def test_kills_and_full_disks_of_compose(loaded_once, tmp_path, capsys):
    assert compose(tmp_path / "whole.png") == 0
    whole, seen = (tmp_path / "whole.png").read_bytes(), 0
    folder = tmp_path / "killed"
    for count in kills(lambda: compose(folder / "anchor.png"), KILLS):
        if (folder / "anchor.png").exists():
            assert (folder / "anchor.png").read_bytes() == whole
            seen += 1
        if count % 4 == 0:
            shutil.rmtree(folder, ignore_errors=True)
    for limit in (0, 100, len(whole) // 2, len(whole) - 1):
        with room(limit) as told:
            assert compose(folder / "full.png") == 2
        assert told.getvalue().count("\n") == 1 and "full.png cannot be written: File too large" in told.getvalue()
        assert not (folder / "full.png").exists()
    assert compose(folder / "anchor.png") == 0 and (folder / "anchor.png").read_bytes() == whole
    PIL.Image.open(folder / "anchor.png").verify()
    assert {path.name for path in folder.iterdir()} == {"anchor.png"}
    report(capsys, f"compose: {KILLS} kills, whole after {seen} of them, half 0; 4 full disks, each one line")


# -- save over an old repository --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """The old and the new one, and the pipeline that the new one is of."""
    root = tmp_path_factory.mktemp("repositories")
    for seed, name in enumerate(("old", "new")):
        pipe = tiny_pipeline(transformer=tiny_transformer(anchored=True, seed=seed))
        pipe.save_pretrained(root / name)
    return root, pipe


def state_of(folder: Path, root: Path) -> str:
    """Whether a repository is the old or the new one, all of it; what was complete is put in its place before."""
    atomic.finish(folder)
    files = {path.relative_to(root / "new").as_posix() for path in (root / "new").rglob("*") if path.is_file()}
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {name for name in there if ".fvg-" not in name} == files
    for name in ("old", "new"):
        if all((folder / file).read_bytes() == (root / name / file).read_bytes() for file in files):
            return name
    raise AssertionError("old and new together")


def test_kills_of_a_save_over_an_old_repository(repositories, tmp_path, capsys):
    root, pipe = repositories
    folder, counts = tmp_path / "repository", {"old": 0, "new": 0, "told to finish": 0}
    shutil.copytree(root / "old", folder)
    for _ in kills(lambda: pipe.save_pretrained(folder), KILLS):
        if not (folder / "model_index.json").exists():
            with pytest.raises(OSError, match="killed while it moved files"):
                DiffusionPipeline.from_pretrained(folder)
            counts["told to finish"] += 1
        counts[state_of(folder, root)] += 1
        DiffusionPipeline.from_pretrained(folder, rewriter=None, composer=None)
        shutil.rmtree(folder)
        shutil.copytree(root / "old", folder)
    pipe.save_pretrained(folder)
    assert state_of(folder, root) == "new" and not list(folder.rglob(".fvg-*"))
    report(capsys, f"save over an old repository: {KILLS} kills, {counts}, mixed 0")


def test_full_disks_of_a_save_over_an_old_repository(repositories, tmp_path, capsys):
    root, pipe = repositories
    folder = tmp_path / "repository"
    shutil.copytree(root / "old", folder)
    for limit in limits(root / "new", FULL_DISKS):
        with pytest.raises(OSError, match="repository cannot be written: File too large") as told, room(limit):
            pipe.save_pretrained(folder)
        assert "\n" not in str(told.value)
        assert state_of(folder, root) == "old" and not list(folder.rglob(".fvg-*"))
    pipe.save_pretrained(folder)
    assert state_of(folder, root) == "new"
    report(capsys, f"save over an old repository: {FULL_DISKS} full disks, the old one stays, each one line")


# -- push ------------------------------------------------------------------------------------------------------------


def on_hub(hub, name: str) -> set[str]:
    return hub.files(name) if name in hub.repositories else set()


def test_kills_of_a_push(hub, repositories, tmp_path, capsys):
    """The Hub has none of a push, or all of it; what arrived is not sent again."""
    root, _ = repositories
    shutil.copytree(root / "new", tmp_path / "saved")
    (tmp_path / "saved" / "README.md").write_text("A model.")
    files = {
        path.relative_to(tmp_path / "saved").as_posix() for path in (tmp_path / "saved").rglob("*") if path.is_file()
    }
    counts = {"nothing": 0, "whole": 0}
    for _ in kills(lambda: push(tmp_path / "saved", "org/new", token=hub.token), KILLS):
        there = on_hub(hub, "org/new") - {".gitattributes"}
        assert there in (set(), files)
        counts["whole" if there else "nothing"] += 1
        if there:
            # From the beginning again.
            del hub.repositories["org/new"]
            for stored in hub.folder.iterdir():
                stored.unlink()
    push(tmp_path / "saved", "org/new", token=hub.token)
    assert on_hub(hub, "org/new") - {".gitattributes"} == files
    report(capsys, f"push: {KILLS} kills, on the Hub {counts}, half 0")


def test_a_full_disk_of_a_push(hub, repositories, tmp_path):
    """The card is written before; the tests' Hub runs in this process, and its own small files fit."""
    root, _ = repositories
    shutil.copytree(root / "new", tmp_path / "saved")
    with pytest.raises(OSError, match="README.md cannot be written: File too large"), room(2000):
        push(tmp_path / "saved", "org/new", token=hub.token)
    assert on_hub(hub, "org/new") in (set(), {".gitattributes"})
    push(tmp_path / "saved", "org/new", token=hub.token)
    assert WEIGHTS in on_hub(hub, "org/new") and "README.md" in on_hub(hub, "org/new")


# -- batch ------------------------------------------------------------------------------------------------------------


ROWS = [{"prompt": PROMPT}, {"prompt": PROMPT, "mode": "direct"}, {"prompt": "A blue square moves to the left"}]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def batch(rows: Path, out: Path) -> int:
    size = ["--steps", "1", "--height", "32", "--width", "32", "--num-frames", "9", "--quiet"]
    return main(["batch", str(rows), str(out), *size])


def check_batch(out: Path, whole: Path) -> tuple[int, int]:
    """What has its name is whole, and has one line at most. Returns how many videos and how many lines there are."""
    videos = sorted(out.glob("videos/*"))
    assert all(path.read_bytes() == (whole / path.relative_to(out)).read_bytes() for path in videos)
    for path in (path for part in ("captions", "stages") for path in (out / part).rglob("*.*") if path.is_file()):
        if path.suffix == ".png":
            assert path.read_bytes() == (whole / path.relative_to(out)).read_bytes()
        elif path.suffix == ".json":
            assert (
                json.loads(path.read_text()).keys() == json.loads((whole / path.relative_to(out)).read_text()).keys()
            )
    lines = Counter(line["path"] for line in read_manifest(out) if line["status"] != "failed")
    assert lines.keys() <= {path.relative_to(out).as_posix() for path in videos} and set(lines.values()) <= {1}
    return len(videos), len(lines)


def check_batch_is_done(out: Path, whole: Path) -> None:
    assert check_batch(out, whole) == (len(ROWS), len(ROWS))
    names = [
        {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()} for root in (out, whole)
    ]
    # A worker's file of the manifest is named by chance.
    assert {name for name in names[0] ^ names[1] if not name.endswith(".jsonl")} == set()
    assert not [finding for finding in check_folder(out) if finding.is_fault]


@pytest.fixture(scope="module")
def batched(loaded_once, rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("batched") / "out"
    assert batch(rows, out) == 0
    assert check_batch(out, out) == (len(ROWS), len(ROWS))
    return out


def test_kills_of_a_batch(rows, batched, tmp_path, capsys):
    """Each begins where the one before it was killed, until all is there."""
    out, videos, lines = tmp_path / "out", 0, 0
    for _ in kills(lambda: batch(rows, out), KILLS, undo=lambda: shutil.rmtree(out)):
        there = check_batch(out, batched)
        videos, lines = videos + there[0], lines + there[1]
    assert batch(rows, out) == 0
    check_batch_is_done(out, batched)
    report(
        capsys, f"batch: {KILLS} kills, {videos} videos and {lines} lines there after them, half 0, none is made twice"
    )


def test_full_disks_of_a_batch(rows, batched, tmp_path, capsys):
    out, told = tmp_path / "out", Counter()
    for number, limit in enumerate(limits(batched, FULL_DISKS)):
        if number % 2:
            # From the beginning again.
            shutil.rmtree(out, ignore_errors=True)
        with room(limit) as text:
            status = batch(rows, out)
        (line,) = text.getvalue().strip().splitlines()
        assert status == 2 and ("no space is left in" in line or "cannot be written" in line), line
        told["the plan" if "plan.json" in line else "the run"] += 1
        check_batch(out, batched)
    assert batch(rows, out) == 0
    check_batch_is_done(out, batched)
    report(capsys, f"batch: {FULL_DISKS} full disks, each one line: {dict(told)}")
