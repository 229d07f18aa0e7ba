import json

import numpy as np
import pytest

from diffusers_fvg.media import read_video
from diffusers_fvg.shapes import dataset
from diffusers_fvg.shapes.dataset import lossless_video, write_dataset
from diffusers_fvg.shapes.prompts import is_held_out
from diffusers_fvg.shapes.train_models import training_scene
from diffusers_fvg.shapes.world import render


def rows(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_decoded_pixels_are_the_rendered_ones(tmp_path):
    write_dataset(tmp_path, 5, seed=3)
    written = rows(tmp_path)
    assert len(written) == 5 and not any(is_held_out(row["text"]) for row in written)
    for index, row in enumerate(written):
        scene = training_scene(np.random.default_rng((3, index)))
        frames, frame_rate = read_video(tmp_path / row["file_name"])
        assert row["text"] == scene.prompt and frame_rate == 8
        assert frames.shape == (17, 64, 64, 3) and np.array_equal(frames, render(scene.objects))


def test_noise_survives_too(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), np.uint8)
    (tmp_path / "noise.mp4").write_bytes(lossless_video(frames, 24))
    decoded, frame_rate = read_video(tmp_path / "noise.mp4")
    assert np.array_equal(decoded, frames) and frame_rate == 24


def test_a_broken_off_call_continues(tmp_path, monkeypatch):
    drawn = []

    def counting(objects):
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append(objects)
        return render(objects)

    monkeypatch.setattr(dataset, "render", counting)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, 5)
    assert not (tmp_path / "metadata.jsonl").exists()
    drawn[:] = drawn[:1]
    write_dataset(tmp_path, 5)
    assert len(drawn) == 3
    # A longer one begins with the shorter one, and no scene comes twice.
    short = rows(tmp_path)
    monkeypatch.setattr(dataset, "render", render)
    write_dataset(tmp_path, 7)
    assert rows(tmp_path)[:5] == short and len({row["file_name"] for row in rows(tmp_path)}) == 7


def test_another_seed_gives_other_clips(tmp_path):
    write_dataset(tmp_path / "a", 3, seed=1)
    write_dataset(tmp_path / "b", 3, seed=2)
    assert {row["file_name"] for row in rows(tmp_path / "a")}.isdisjoint(
        row["file_name"] for row in rows(tmp_path / "b")
    )
    with pytest.raises(ValueError, match="`num_clips=0` must be at least 1"):
        write_dataset(tmp_path, 0)
