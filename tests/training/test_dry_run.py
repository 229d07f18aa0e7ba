"""The dry run's report, compared with the run itself."""

import re
from dataclasses import fields, replace

import pytest
import torch
from training_runs import save_cogvideox_model, save_config, save_model, save_videos, tiny_config

from diffusers_fvg.cli import main
from diffusers_fvg.training.config import DataSource, TrainConfig
from diffusers_fvg.training.draws import drawn_times
from diffusers_fvg.training.dry_run import dry_run
from diffusers_fvg.training.options import options_text
from diffusers_fvg.training.trainer import main_train


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model and five videos: one is long, one upright and one no video."""
    root = tmp_path_factory.mktemp("dry")
    videos = save_videos(root / "data", 5)
    save_videos(root / "long", 1, num_frames=20)
    save_videos(root / "upright", 1, height=64)
    (videos / "1.mp4").write_bytes((root / "long" / "0.mp4").read_bytes())
    (videos / "2.mp4").write_bytes((root / "upright" / "0.mp4").read_bytes())
    (videos / "3.mp4").write_text("no video")
    return save_model(root / "model", experts=2), videos


@pytest.fixture
def config(places, tmp_path):
    options = {"buckets": [[9, 32, 32], [9, 64, 32]], "clips_per_video": 2, "batch_size": 2, "max_rejected_share": 0.5}
    options |= {"experts": ["transformer", "transformer_2"], "cache_dir": str(tmp_path / "cache")}
    return tiny_config(*places, tmp_path / "out", **options)


def test_the_dry_run_tells_what_the_run_does(config, tmp_path, monkeypatch):
    text = dry_run(config)
    assert not list(tmp_path.iterdir())
    # Three latent frames of 2 x 2 patches, two clips of each step; the upright one has twice as many.
    assert re.search(r"9x32x32: +4 +4 +24\n +9x64x32: +1 +1 +48\n", text)
    assert re.search(r"Rejected files: 1\n  .*3\.mp4: is not a video", text)
    assert "Steps: 7 of 2 clips on each process, 2 expert(s)\n  2.8 epochs of 5 clips" in text
    for part in ("weights", "lora", "optimizer", "block_inputs", "block"):
        assert re.search(rf"^  {part} +\d+\.\d\d GiB$", text, re.MULTILINE)

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config = replace(config, steps=3, warmup_steps=0)
    main_train(save_config(config, tmp_path / "c.toml"))
    clips = list((tmp_path / "cache" / "latents").iterdir())
    assert len(clips) == 4 + 1
    text = dry_run(config)
    assert "transformer_2: step_00000003.safetensors is there" in text and "s a step in its log" in text


def test_an_anchor_behind_the_clip_is_counted(config):
    def text(**options):
        return dry_run(replace(config, anchor_form="appended", **options))

    # A latent frame more, if a picture behind the first frame can be drawn.
    assert re.search(r"tokens at the most of a step\):\n +9x32x32: +4 +4 +32\n +9x64x32: +1 +1 +64\n", text())
    for options in ({"anchor_position": "first"}, {"anchor_probability": 0.0, "frame_times": "independent"}):
        assert re.search(r"9x32x32: +4 +4 +24\n", text(**options))


def test_what_is_off_the_device_is_told_of(config):
    assert "In CPU memory" not in dry_run(config)
    text = dry_run(replace(config, block_offload=True, activation_offload=True))
    assert re.search(r"pinned for the device: \d+\.\d\d GiB\n  weights +\d.*\n  block_inputs +\d", text)


def test_targets_are_counted(config):
    text = dry_run(config)
    found = re.search(r"Targets, of rank 4: ([\d,]+) parameters for each expert", text)
    # Two blocks, 24 wide, with feed-forwards of 32: eight square layers, and in and out of a feed-forward.
    per_block = 8 * 4 * (24 + 24) + 2 * 4 * (24 + 32)
    assert int(found[1].replace(",", "")) == 2 * per_block
    assert re.search(r"  to_q +4 layers +768 parameters", text)


def test_times_are_those_that_are_drawn(config):
    text = dry_run(config)
    for expert, (low, high) in {"transformer": (0.875, 1.0), "transformer_2": (0.0, 0.875)}.items():
        part = text[text.index(f"Times of {expert}, ") :].split("\n")[1:11]
        shares = [float(re.search(r"([\d.]+)%", line)[1]) / 100 for line in part]
        drawn = drawn_times(torch.rand(20_000, generator=torch.Generator().manual_seed(0)), config, (low, high))
        expected = torch.histogram(drawn, 10, range=(0.0, 1.0)).hist / len(drawn)
        assert shares == pytest.approx(expected.tolist(), abs=0.01)


def test_the_command_line_tells_it(config, tmp_path, capsys):
    path = save_config(config, tmp_path / "c.toml")
    assert main(["train", str(path), "--dry-run"]) == 0
    assert capsys.readouterr().out == dry_run(config) + "\n"


def test_cogvideox_is_told_of_too(config, tmp_path):
    save_cogvideox_model(tmp_path / "model")
    options = {"experts": ("transformer",), "targets": ("to_q",), "timestep_density": "uniform", "flow_shift": 1.0}
    text = dry_run(replace(config, model=str(tmp_path / "model"), **options))
    # Two patches of three latent frames, 2 x 2 of them each, two clips.
    assert re.search(r"9x32x32: +4 +4 +16\n", text)


def test_every_option_is_told_with_its_default(capsys):
    assert main(["train", "--help-options"]) == 0
    text = capsys.readouterr().out
    assert text == options_text() + "\n"
    for kind in (TrainConfig, DataSource):
        for field in fields(kind):
            entry = re.search(rf"^{field.name}: (.*)\n    (.+)", text, re.MULTILINE)
            assert entry and len(entry[2]) > 5, field.name
    assert "steps: int, default 2000\n    optimizer steps for each expert. Pusa: best at 900" in text
    assert "frame_times: one of 'shared', 'independent', default \"shared\"\n" in text
    assert "anchor_window: int | None, left out\n" in text and "model: str, required\n" in text
