import contextlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import threading
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline
from killing import count_steps, kill_at_step
from safetensors.torch import save_file
from tiny import tiny_pipeline, tiny_transformer

from diffusers_fvg import AnchorLora, atomic
from diffusers_fvg.cli.output import save_stages, stages_draft
from diffusers_fvg.media import write_video


def entries(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


@contextlib.contextmanager
def room(count: int):
    """Limits the size of files, which acts like a full disk. Output that a test prints goes to a file, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with atomic.replacing(path) as draft:
        draft.write_text("old")
    with pytest.raises(RuntimeError), atomic.replacing(path) as draft:
        draft.write_text("n")
        assert path.read_text() == "old"
        raise RuntimeError
    assert path.read_text() == "old" and entries(path.parent) == {"a.txt"}
    with atomic.replacing(path) as draft:
        draft.write_text("new")
    assert path.read_text() == "new" and entries(path.parent) == {"a.txt"}


def test_the_draft_of_a_killed_process_is_removed_and_that_of_one_that_runs_is_not(tmp_path):
    def work():
        with atomic.replacing(tmp_path / "a.txt") as draft:
            draft.write_text("half")
            (tmp_path / "b.txt").write_text("the next step")

    # Its steps: the folder is made, the draft is opened, and this.
    assert kill_at_step(work, 3)
    (left,) = entries(tmp_path)
    assert left.startswith(".fvg-") and atomic.is_empty(tmp_path)
    with atomic.replacing(tmp_path / "c.txt") as running:
        running.write_text("whole")
        atomic.remove_drafts(tmp_path)
        assert entries(tmp_path) == {running.name}
    assert entries(tmp_path) == {"c.txt"} and not atomic.is_empty(tmp_path)


WRITERS = {
    "tensors": lambda path: AnchorLora({"a.weight": torch.zeros(10_000)}).save_pretrained(path),
    "video": lambda path: write_video(path / "a.mp4", np.random.default_rng(0).random((5, 64, 64, 3)), 8),
    "repository": lambda path: tiny_pipeline(rewriter=None, composer=None).save_pretrained(path),
    "rewriter": lambda path: tiny_pipeline().rewriter.save_pretrained(path),
}


@pytest.mark.parametrize("count", [0, 2000])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_one_line_with_the_name_and_leaves_nothing(write, count, tmp_path):
    with pytest.raises(OSError, match=rf"{tmp_path}.* cannot be written: File too large\.$") as told, room(count):
        write(tmp_path / "new")
    assert "\n" not in str(told.value) and ".fvg" not in str(told.value)
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left == []


def test_what_is_no_matter_of_the_disk_is_told_as_it_is():
    with pytest.raises(FileNotFoundError), atomic.naming("x"):
        Path("/nowhere/at/all").read_text()
    with pytest.raises(ValueError, match="a tensor"), atomic.naming("x"):
        raise ValueError("a tensor")


# -- folders ----------------------------------------------------------------------------------------------------------


def test_entries_are_replaced_and_others_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for text, names in (("old", ["a.txt", "b/c.txt", "b/d.txt"]), ("new", ["a.txt", "b/c.txt"])):
        with atomic.replacing_entries(tmp_path, "index.json") as draft:
            for name in names:
                (draft / name).parent.mkdir(exist_ok=True)
                (draft / name).write_text(text)
            (draft / "index.json").write_text(text)
    files = {
        path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.*") if path.is_file()
    }
    assert files == {"notes.txt": "mine", "a.txt": "new", "b/c.txt": "new", "index.json": "new"}


def test_a_link_is_replaced_and_not_followed(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()
    folder.mkdir()
    (outside / "kept.txt").write_text("mine")
    (folder / "part").symlink_to(outside)
    with atomic.replacing_entries(folder, "index.json") as draft:
        (draft / "part").mkdir()
        (draft / "index.json").write_text("")
    assert (outside / "kept.txt").read_text() == "mine" and not (folder / "part").is_symlink()


def test_a_second_writer_waits_or_is_told(tmp_path):
    order = []

    def second():
        with atomic.replacing_entries(tmp_path, "index.json") as draft:
            order.append("second")
            (draft / "index.json").write_text("second")

    with atomic.replacing_entries(tmp_path, "index.json") as draft:
        waiting = threading.Thread(target=second)
        waiting.start()
        with (
            pytest.raises(BlockingIOError, match="Another process writes to"),
            atomic.replacing_entries(tmp_path, "index.json", wait=False),
        ):
            pass
        (draft / "index.json").write_text("first")
        order.append("first")
    waiting.join(60)
    assert order == ["first", "second"] and (tmp_path / "index.json").read_text() == "second"


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """Two folders of one pipeline with different weights, the first also with a file of the user."""
    root = tmp_path_factory.mktemp("repositories")
    for seed, name in enumerate(("old", "new")):
        transformer = tiny_transformer(anchored=True, seed=seed)
        tiny_pipeline(rewriter=None, composer=None, transformer=transformer).save_pretrained(root / name)
    (root / "old" / "README.md").write_text("mine")
    return root


def test_a_save_that_is_killed_at_any_step_leaves_the_old_repository_or_the_new_one(repositories, tmp_path):
    new = DiffusionPipeline.from_pretrained(repositories / "new")
    truth = [
        (repositories / name / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
        for name in ("old", "new")
    ]
    folder, seen = tmp_path / "repository", set()

    def save():
        new.save_pretrained(folder)

    shutil.copytree(repositories / "old", folder)
    steps = count_steps(save)
    # Most are of the change itself, which comes last.
    for step in [3, steps // 2, *range(steps - 28, steps + 1, 3)]:
        shutil.rmtree(folder)
        shutil.copytree(repositories / "old", folder)
        assert kill_at_step(save, step)
        assert (folder / "README.md").read_text() == "mine"
        if not (folder / "model_index.json").exists():
            with pytest.raises(OSError, match="killed while it moved files.*finish"):
                DiffusionPipeline.from_pretrained(folder)
            atomic.finish(folder)
            seen.add("finished")
        atomic.remove_drafts(folder)
        (state,) = {
            index
            for index, data in enumerate(truth)
            if data == (folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
        }
        seen.add(("old", "new")[state])
        expected = {path.relative_to(repositories / "new") for path in (repositories / "new").rglob("*")}
        there = {path.relative_to(folder) for path in folder.rglob("*") if ".fvg" not in str(path)}
        assert {path.as_posix() for path in there ^ expected} == {"README.md"}
        atomic.finish(folder)
    assert seen == {"old", "new", "finished"}
    DiffusionPipeline.from_pretrained(folder)


def test_weights_that_are_mapped_from_a_folder_are_saved_into_it(repositories, tmp_path):
    """safetensors maps the weights from the file that is replaced."""
    shutil.copytree(repositories / "old", tmp_path / "repository")
    for _ in range(2):
        pipe = DiffusionPipeline.from_pretrained(tmp_path / "repository")
        pipe.save_pretrained(tmp_path / "repository")
    weights = tiny_transformer(anchored=True, seed=0).state_dict()
    for name, weight in pipe.transformer.state_dict().items():
        assert torch.equal(weight, weights[name])


# -- stages -----------------------------------------------------------------------------------------------------------


def save(folder, colour, count, overwrite=True):
    with stages_draft(folder, overwrite) as draft:
        image = PIL.Image.new("RGB", (8, 8), (colour, 0, 0))
        save_stages(draft, {"prompt": str(colour)}, [image] * count, np.full((count, 8, 8, 3), colour / 255))


def test_a_shorter_run_leaves_nothing_of_a_longer_one(tmp_path):
    save(tmp_path, 9, 5)
    (tmp_path / "notes.txt").write_text("mine")
    save(tmp_path, 7, 2)
    assert entries(tmp_path) == {
        "stages.json",
        "anchor.png",
        "anchor_2.png",
        "frame_0000.png",
        "frame_0001.png",
        "notes.txt",
    }
    with pytest.raises(ValueError, match="not empty.*--overwrite"):
        save(tmp_path, 9, 1, overwrite=False)
    assert json.loads((tmp_path / "stages.json").read_text()) == {"prompt": "7"}


def test_two_processes_do_not_mix_their_stages(tmp_path):
    context = multiprocessing.get_context("fork")
    begun, done = context.Event(), context.Event()

    def first():
        with stages_draft(tmp_path / "stages", False) as draft:
            begun.set()
            assert done.wait(60)
            save_stages(draft, {"prompt": "first"}, None, np.zeros((2, 8, 8, 3)))

    process = context.Process(target=first)
    process.start()
    assert begun.wait(60)
    with pytest.raises(BlockingIOError, match="Another process"):
        save(tmp_path / "stages", 7, 3)
    done.set()
    process.join(60)
    assert process.exitcode == 0
    assert entries(tmp_path / "stages") == {"stages.json", "frame_0000.png", "frame_0001.png"}
    with pytest.raises(ValueError, match="not empty"):
        save(tmp_path / "stages", 7, 3, overwrite=False)


def test_a_run_that_fails_leaves_the_stages_that_are_there(tmp_path):
    with pytest.raises(RuntimeError), stages_draft(tmp_path / "new", False):
        raise RuntimeError
    assert not (tmp_path / "new").exists()
    save(tmp_path, 9, 1)
    with pytest.raises(RuntimeError), stages_draft(tmp_path, True):
        raise RuntimeError
    assert entries(tmp_path) == {"stages.json", "anchor.png", "frame_0000.png"}


# -- temporary files --------------------------------------------------------------------------------------------------


def test_what_a_killed_push_left_in_the_temporary_folder_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def work():
        with atomic.temporary_folder() as folder:
            save_file({"a": torch.zeros(1)}, folder / "a.safetensors")
            (folder / "b.txt").write_text("the next step")

    assert kill_at_step(work, 2)
    assert len(entries(tmp_path)) == 1
    with atomic.temporary_folder() as folder:
        assert entries(tmp_path) == {folder.name} and oct(os.stat(folder).st_mode)[-3:] == "700"
    assert entries(tmp_path) == set()
