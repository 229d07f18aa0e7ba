"""What a tracker receives, and that a failing or hanging tracker changes nothing."""

import importlib.util
import io
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest
import torch
from accelerate.utils import LoggerType
from safetensors.torch import load_file
from training_runs import losses, moving_square, save_config, save_model, save_videos, tiny_config

from diffusers_fvg.lora.anchor_lora import WEIGHT_NAME
from diffusers_fvg.media import write_video
from diffusers_fvg.training import tracking
from diffusers_fvg.training.trainer import main_train


# A package named wandb that records its calls.
STAND_IN = """
import json, os

def _write(*call):
    with open(os.path.join(os.path.dirname(__file__), "calls.jsonl"), "a") as file:
        file.write(json.dumps(call) + chr(10))

class Video:
    def __init__(self, path, format):
        self.path = path

class Run:
    def log(self, values, step):
        _write("log", {key: getattr(value, "path", value) for key, value in values.items()}, step)

    def finish(self):
        _write("finish")

class Config:
    def update(self, values, allow_val_change):
        _write("config", values)

config = Config()

def init(**options):
    _write("init", options)
    return Run()
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("tracking")
    return save_model(root / "model"), save_videos(root / "data")


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Replaces the package wandb; returns the recorded calls."""
    folder = tmp_path / "packages"
    (folder / "wandb").mkdir(parents=True)
    (folder / "wandb" / "__init__.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(folder)
    # It looks for packages once, when it is imported.
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    return lambda: [json.loads(line) for line in (folder / "wandb" / "calls.jsonl").read_text().splitlines()]


def run(config, validate=None) -> dict[str, torch.Tensor]:
    main_train(save_config(config, Path(config.output_dir) / "run.toml"), validate)
    return load_file(Path(config.output_dir) / WEIGHT_NAME)


def with_video(validation) -> None:
    path = validation.folder / "0.mp4"
    write_video(path, moving_square(0), 8)
    validation.log({"score": 0.5})
    validation.log_video("clip", path)


def test_wandb_gets_numbers_and_videos(places, calls, tmp_path):
    config = tiny_config(*places, tmp_path / "out", steps=3, validation_every=2, tracker="wandb")
    run(config, with_video)
    (first, options), (second, shown), *told, last = calls()
    assert (first, second, last) == ("init", "config", ["finish"])
    assert options == {"project": "out", "name": "transformer", "dir": str(tmp_path / "out")}
    # The tracker is an external service, so it must not get paths of this computer.
    assert shown["rank"] == "4" and str(tmp_path) not in json.dumps(shown)
    numbers = [(step, values["loss"]) for _, values, step in told if "loss" in values]
    assert numbers == losses(tmp_path / "out")
    assert ["log", {"score": 0.5}, 2] in told
    video = tmp_path / "out" / "validation" / "transformer_step_00000002" / "0.mp4"
    assert ["log", {"clip": str(video)}, 2] in told and video.is_file()


@pytest.mark.parametrize("how", ["fails", "hangs"])
def test_a_tracker_that_fails_or_hangs_is_left_out(how, places, calls, tmp_path, monkeypatch, caplog):
    import wandb

    def log(self, values, step):
        if step == 3:
            time.sleep(600) if how == "hangs" else 1 / 0

    monkeypatch.setattr(wandb.Run, "log", log)
    monkeypatch.setattr(tracking, "TIMEOUT", 0.5)
    config = tiny_config(*places, tmp_path / "tracked", tracker="wandb")
    began = time.monotonic()
    with caplog.at_level("WARNING"):
        tracked = run(config)
    assert time.monotonic() - began < 60
    reason = "has been busy with one call for more than 0.5 seconds" if how == "hangs" else "failed: ZeroDivisionError"
    assert caplog.text.count("The tracker 'wandb'") == 1 and reason in caplog.text
    # Nothing but the tracker has noticed.
    if how == "fails":
        plain = run(replace(config, output_dir=str(tmp_path / "plain"), tracker="none"))
        assert all(torch.equal(tracked[key], plain[key]) for key in plain)
    assert [step for step, _ in losses(tmp_path / "tracked")] == list(range(1, 8))


@pytest.mark.slow
def test_tensorboard_gets_what_the_log_has(places, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(tiny_config(*places, tmp_path / "out", steps=3, validation_every=2, tracker="tensorboard"), with_video)
    (file,) = (tmp_path / "out" / "transformer").glob("events.*")
    events = event_accumulator.EventAccumulator(str(file))
    events.Reload()
    assert [(event.step, pytest.approx(event.value)) for event in events.Scalars("loss")] == losses(tmp_path / "out")
    assert [(event.step, event.value) for event in events.Scalars("score")] == [(2, 0.5)]
    ((step, content),) = [(event.step, event.encoded_image_string) for event in events.Images("clip")]
    shown = PIL.Image.open(io.BytesIO(content))
    assert step == 2 and shown.format == "GIF" and shown.n_frames == 9 and shown.size == (32, 32)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs the package wandb")
def test_wandb_itself_takes_it_without_a_network(places, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with caplog.at_level("WARNING"):
        run(tiny_config(*places, tmp_path / "out", steps=3, validation_every=2, tracker="wandb"), with_video)
    assert "The tracker" not in caplog.text
    (folder,) = (tmp_path / "out" / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb")) and list(folder.rglob("media/videos/*.mp4"))
