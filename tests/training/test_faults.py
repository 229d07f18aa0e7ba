"""What goes wrong in a long run: weights that break, files that change, disks that fill, signals, a second run."""

import contextlib
import io
import math
import os
import random
import resource
import signal
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from filelock import FileLock
from forked import finish
from safetensors.torch import load_file
from training_runs import CAPTIONS, losses, save_config, save_model, save_videos, start, tiny_config

from diffusers_fvg.lora.anchor_lora import WEIGHT_NAME
from diffusers_fvg.training import loop, processes
from diffusers_fvg.training.config import MOST
from diffusers_fvg.training.files import read_whole, write_whole
from diffusers_fvg.training.loop import Run
from diffusers_fvg.training.trainer import main_train


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults")
    return save_model(root / "model"), save_videos(root / "data")


@pytest.fixture(scope="module")
def whole(places, tmp_path_factory):
    """A run of seven steps without a fault: its config and its folder."""
    output = tmp_path_factory.mktemp("whole")
    config = tiny_config(*places, output)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        torch.set_num_threads(1)
        run(config)
    return config, output


@pytest.fixture
def config(whole, tmp_path):
    return replace(whole[0], output_dir=str(tmp_path / "out"))


def run(config, validate=None) -> Path:
    return main_train(save_config(config, Path(config.output_dir) / "run.toml"), validate)


def checkpoints(config) -> list[int]:
    folder = Path(config.output_dir) / "checkpoints" / "transformer"
    return sorted(int(path.stem.removeprefix("step_")) for path in folder.glob("*.safetensors"))


def assert_as_whole(config, whole) -> None:
    """Checks that the finished LoRA is bit-identical, and that the log has one line per step."""
    ours, theirs = (load_file(output / WEIGHT_NAME) for output in (Path(config.output_dir), whole[1]))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert losses(Path(config.output_dir)) == losses(whole[1])


# -- weights that break -----------------------------------------------------------------------------------------------


def nan_gradient(loss: torch.Tensor) -> torch.Tensor:
    """Returns the loss unchanged but with a gradient of NaN, from a square root of zero."""
    return loss + (loss - loss.detach()).sqrt()


@pytest.mark.parametrize(
    "broken",
    [lambda loss: loss * float("nan"), nan_gradient, lambda loss: loss * 1e30],
    ids=["loss", "gradient", "huge"],
)
def test_a_step_that_would_break_the_weights_is_not_taken(config, whole, monkeypatch, broken):
    """A fault at the last step writes nothing, and without the fault the run ends as usual."""
    draw_loss, calls = loop.draw_loss, []

    def planted(*args):
        calls.append(args)
        return broken(draw_loss(*args)) if len(calls) == 7 else draw_loss(*args)

    monkeypatch.setattr(loop, "draw_loss", planted)
    with pytest.raises(FloatingPointError, match="Step 7 has a loss of .* and is not taken. Lower `learning_rate`"):
        run(config)
    assert len(losses(Path(config.output_dir))) == 6 and checkpoints(config) == [3, 6]
    assert not (Path(config.output_dir) / "weights").exists()
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run(config)
    assert_as_whole(config, whole)


def test_a_base_that_is_broken_is_told_as_such(config, monkeypatch):
    draw_loss = loop.draw_loss
    monkeypatch.setattr(loop, "draw_loss", lambda *args: draw_loss(*args) * float("inf"))
    with pytest.raises(
        FloatingPointError, match="Step 1 .* No weight has changed yet: the base model's weights are broken"
    ):
        run(config)


def test_weights_that_have_exploded_are_not_written(config, monkeypatch):
    monkeypatch.setitem(MOST, "learning_rate", 1e6)
    with pytest.raises(FloatingPointError, match="step 1 is not written: `weights.* has the value"):
        run(replace(config, learning_rate=1e6, steps=1, warmup_steps=0))
    assert checkpoints(config) == [] and not (Path(config.output_dir) / "weights").exists()


def test_an_average_that_only_breaks_as_it_is_written_is_refused(config, monkeypatch):
    """The weights are finite, but not after multiplication by the LoRA's scale."""
    monkeypatch.setattr(loop, "check_weights", lambda *args: None)
    train = Run.train
    monkeypatch.setattr(Run, "train", lambda self: {name: p * 1e20 for name, p in train(self).items()})
    with pytest.raises(FloatingPointError, match="The LoRA of transformer is not written"):
        run(replace(config, steps=3))
    assert not (Path(config.output_dir) / "weights").exists()


def test_a_checkpoint_that_is_not_finite_is_passed_over(config, whole, caplog):
    run(replace(config, steps=6, keep_checkpoints=1, checkpoint_every=3))
    newest = Path(config.output_dir) / "checkpoints" / "transformer" / "step_00000006.safetensors"
    tensors, metadata = read_whole(newest)
    tensors[min(tensors)].view(-1)[3] = float("-inf")
    write_whole(newest, tensors, metadata)
    # There is a valid checkpoint of an earlier step.
    run(replace(config, output_dir=config.output_dir + "3", steps=3))
    sound = Path(config.output_dir + "3") / "checkpoints" / "transformer" / "step_00000003.safetensors"
    (newest.parent / sound.name).write_bytes(sound.read_bytes())
    with caplog.at_level("WARNING"):
        run(replace(config, keep_checkpoints=1, checkpoint_every=4))
    assert "step_00000006.safetensors holds values that are not finite" in caplog.text
    assert_as_whole(config, whole)
    # That of step 6 did not take the place of the one of step 4 meanwhile.
    assert checkpoints(config) == [7]


# -- what may change when a run goes on -------------------------------------------------------------------------------


def test_options_that_change_no_bit_may_change(config, whole):
    run(replace(config, steps=4))
    run(replace(config, max_rejected_share=0.5, gradient_checkpointing=False, process_group_timeout=60.0))
    assert_as_whole(config, whole)


def test_what_a_diverging_run_is_told_to_do_is_possible(config, caplog):
    run(replace(config, steps=4))
    with caplog.at_level("WARNING"):
        run(replace(config, learning_rate=5e-3, max_grad_norm=0.5))
    assert "is continued with steps 4 to 7, learning_rate 0.01 to 0.005, max_grad_norm 1.0 to 0.5" in caplog.text
    assert [step for step, _ in losses(Path(config.output_dir))] == list(range(1, 8))


@pytest.mark.slow
def test_a_cosine_may_be_made_longer(config):
    cosine = replace(config, learning_rate_schedule="cosine", steps=4)
    run(cosine)
    run(replace(cosine, steps=6))
    assert checkpoints(config)[-1] == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 2e-2}, r"changed: learning_rate 0.01 to 0.02\); change them back"),
        ({"rank": 8, "learning_rate": 1e-3}, r"changed: rank 4 to 8\)"),
        ({"steps": 3}, "`steps=3`, but .*step_00000007.safetensors has done 7 already; set it to 7 or more"),
    ],
)
def test_options_that_may_not_change(whole, options, message):
    with pytest.raises(ValueError, match=message):
        run(replace(whole[0], **options))


@pytest.mark.parametrize("what", ["videos", "captions"])
def test_exchanged_data_is_noticed(config, tmp_path, what):
    data = save_videos(tmp_path / "data")
    config = replace(config, data=str(data), cache_dir=str(tmp_path / "cache"), steps=3)
    run(config)
    if what == "videos":
        (data / "0.mp4").write_bytes((data / "1.mp4").read_bytes())
    else:
        text = (data / "metadata.jsonl").read_text()
        (data / "metadata.jsonl").write_text(text.replace(CAPTIONS[0], "a dog"))
    with pytest.raises(ValueError, match=rf"changed: other {what}, or in another order\)"):
        run(replace(config, steps=4))


# -- long runs --------------------------------------------------------------------------------------------------------


def test_a_validation_that_fails_changes_nothing(config, whole, caplog):
    def validate(validation):
        for parameter in validation.transformer.parameters():
            if parameter.requires_grad:
                parameter.zero_()
        raise torch.OutOfMemoryError("out of memory")

    with caplog.at_level("WARNING"):
        run(replace(config, validation_every=2), validate)
    assert caplog.text.count("failed, and training continues: OutOfMemoryError: out of memory") == 3
    assert_as_whole(config, whole)


def signal_after(monkeypatch, step: int, number: int) -> None:
    """Sends a signal to this process while it takes the step."""
    take = Run._optimizer_step

    def stepping(self, batches):
        if self.step == step - 1:
            os.kill(os.getpid(), number)
        return take(self, batches)

    monkeypatch.setattr(Run, "_optimizer_step", stepping)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_leaves_a_checkpoint(config, whole, monkeypatch, number):
    before = signal.getsignal(number)
    signal_after(monkeypatch, 5, number)
    with pytest.raises(SystemExit) as left:
        run(config)
    assert left.value.code == 128 + number and signal.getsignal(number) is before
    assert checkpoints(config) == [3, 5] and not (Path(config.output_dir) / WEIGHT_NAME).exists()
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run(config)
    assert_as_whole(config, whole)


def test_a_signal_ends_a_validation(config, whole):
    ended = []

    def validate(validation):
        if validation.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
            ended.append(validation.step)

    with pytest.raises(SystemExit):
        run(replace(config, validation_every=2), validate)
    assert checkpoints(config) == [2] and not ended
    run(config)
    assert_as_whole(config, whole)


def test_a_second_ctrl_c_stops_at_once(config, monkeypatch):
    take = Run._optimizer_step

    def stepping(self, batches):
        for _ in range(1 + (self.step == 4)):
            os.kill(os.getpid(), signal.SIGINT)
        return take(self, batches)

    monkeypatch.setattr(
        Run, "_optimizer_step", lambda self, batches: stepping(self, batches) if self.step > 3 else take(self, batches)
    )
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert checkpoints(config) == [3]


@pytest.mark.slow
def test_of_two_processes_one_that_is_told_stops_both(places, tmp_path):
    config = tiny_config(*places, tmp_path / "out", steps=500, checkpoint_every=1000)
    running = start(save_config(config, tmp_path / "run.toml"), num_processes=2, seconds_per_step=0.05)
    log, deadline = tmp_path / "out" / "log_transformer.jsonl", time.monotonic() + 240
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert time.monotonic() < deadline and all(process.is_alive() for process in running)
        time.sleep(0.02)
    os.kill(running[1].pid, signal.SIGTERM)
    for process in running:
        process.join(timeout=240)
    assert [process.exitcode for process in running] == [143, 143]
    assert len(checkpoints(config)) == 1 and 3 <= checkpoints(config)[0] < 500


def test_a_second_run_in_a_folder_is_refused(config):
    folder = Path(config.output_dir)
    folder.mkdir()
    with FileLock(folder / ".lock"), pytest.raises(ValueError, match="is written to by another run; wait for its end"):
        run(config)
    assert not (folder / "checkpoints").exists()
    run(replace(config, steps=3))


@pytest.mark.parametrize(
    "room", [pytest.param(200, marks=pytest.mark.slow), 20_000], ids=["no config", "no checkpoint"]
)
def test_a_full_disk_is_one_line_and_the_run_goes_on(config, whole, room):
    """Limits the size of files, which acts like a full disk."""
    path = save_config(config, Path(config.output_dir) / "run.toml")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(
            OSError, match=r"(config.toml|jsonl|safetensors) cannot be written: .*[Ff]ile too large"
        ) as told:
            main_train(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(told.value)
    assert not [left for left in Path(config.output_dir).rglob("*") if left.name.endswith(".tmp")]
    run(config)
    assert_as_whole(config, whole)


@pytest.mark.slow
def test_30_kills_at_random_moments_cost_no_bit(places, tmp_path):
    """From the start of the process to its last step, while latents are encoded too."""
    options = {"steps": 300, "checkpoint_every": 2}
    whole, killed = (
        tiny_config(*places, tmp_path / name, cache_dir=str(tmp_path / f"{name}_cache"), **options)
        for name in ("whole", "killed")
    )
    finish(start(save_config(whole, tmp_path / "whole.toml")))
    path, moments, kills = save_config(killed, tmp_path / "killed.toml"), random.Random(0), 0
    while kills < 30:
        (process,) = start(path, seconds_per_step=0.2)
        process.join(timeout=moments.uniform(0.0, 4.0))
        assert process.is_alive(), "it was through before it was killed often enough"
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    finish(start(path))
    assert_as_whole(killed, (whole, tmp_path / "whole"))
    assert [step for step, _ in losses(tmp_path / "killed")] == list(range(1, 301))


@pytest.mark.slow
def test_10_full_disks_at_random_moments_cost_no_bit(places, tmp_path):
    """Files may grow to a number of bytes that is drawn anew: the config, the log at some step, a checkpoint, a latent."""
    options = {"steps": 30, "checkpoint_every": 2, "warmup_steps": 0}
    whole, filled = (
        tiny_config(*places, tmp_path / name, cache_dir=str(tmp_path / f"{name}_cache"), **options)
        for name in ("whole", "filled")
    )
    run(whole)
    path, room, told = save_config(filled, tmp_path / "filled.toml"), random.Random(0), []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(file.stat().st_size for file in (tmp_path / "whole").rglob("step_*"))
    while len(told) < 10:
        limit = int(math.exp(room.uniform(math.log(300), math.log(largest))))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with (
                pytest.raises(OSError, match="cannot be written: .*[Ff]ile too large") as error,
                # What it shows goes to a file too, in a test.
                contextlib.redirect_stderr(io.StringIO()),
            ):
                main_train(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        told.append(str(error.value))
        # The disk has room for a while, until some further steps are done.
        done = max([0, *checkpoints(filled)])
        if done < 28 and room.random() < 0.5:
            run(replace(filled, steps=done + 2))
    assert len({text.split(" cannot")[0] for text in told}) > 2, told
    run(filled)
    assert_as_whole(filled, (whole, tmp_path / "whole"))
    assert [step for step, _ in losses(tmp_path / "filled")] == list(range(1, 31))


def test_a_full_disk_while_videos_are_encoded_is_no_fault_of_theirs(config, tmp_path, monkeypatch):
    config = replace(config, cache_dir=str(tmp_path / "cache"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr("diffusers_fvg.training.data._cache_texts", lambda *args: None)
    path = save_config(config, Path(config.output_dir) / "run.toml")
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(OSError, match=r"latents.*safetensors cannot be written"):
            main_train(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_processes_wait_as_long_as_they_are_told(config, monkeypatch):
    given, made = {}, Accelerator()
    monkeypatch.setattr(processes, "Accelerator", lambda **options: given.update(options) or made)
    processes.make_accelerator(replace(config, process_group_timeout=5400.0))
    (handler,) = given["kwargs_handlers"]
    assert handler.to_kwargs() == {"timeout": timedelta(minutes=90)}
    assert config.process_group_timeout >= 3600
