"""The study of few distinct clips: which clips a run sees, and that it continues."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_fvg.cli import parser
from diffusers_fvg.shapes import clips, train_models
from diffusers_fvg.shapes.clips import build_shared_cache, cached_scenes, run_folder, train_run
from diffusers_fvg.shapes.train import LORA_SETTINGS


NUM_CLIPS = 8


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A cache of which all clips but the first `NUM_CLIPS` are poison, and runs of two steps: pictures, then clips."""
    monkeypatch.setattr(clips, "NUM_CLIPS", (NUM_CLIPS, 12))
    monkeypatch.setattr(clips, "build_cache", partial(train_models.build_cache, num_images=1))
    monkeypatch.setattr(clips, "BASE_STEPS", 2)
    monkeypatch.setattr(clips, "LORA_STEPS", 2)
    monkeypatch.setattr(train_models, "train", partial(train_models.train, save_every=1))
    small = partial(train_models.train_transformer, clip_batch=12, image_batch=2)
    monkeypatch.setattr(train_models, "train_transformer", small)
    for name, value in {"warmup_steps": 1, "batch_size": 2}.items():
        monkeypatch.setitem(LORA_SETTINGS, name, value)
    (tmp_path / "cache").mkdir()
    build_shared_cache(tmp_path / "cache")
    path = tmp_path / "cache" / "latents.safetensors"
    latents = load_file(path)
    # Not the first: the pictures are of all clips.
    latents["clips"][NUM_CLIPS:, :, 1:] = torch.nan
    save_file(latents, path)
    return tmp_path


def base_weights(folder):
    return load_file(folder / "base" / "diffusion_pytorch_model.safetensors")


def test_a_run_sees_the_named_clips_and_continues_to_the_bit(tiny, monkeypatch):
    loss_of_flow, calls = train_models.anchored_flow_loss, []

    def stopping(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return loss_of_flow(*args)

    monkeypatch.setattr(train_models, "anchored_flow_loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        train_run(tiny, NUM_CLIPS)
    train_run(tiny, NUM_CLIPS)
    # One step before the stop, the one that was stopped, and that again.
    assert len(calls) == 3
    run, cache = run_folder(tiny, NUM_CLIPS), tiny / "cache"
    train_models.train_base(cache, num_clips=NUM_CLIPS, steps=2)
    stopped, whole = base_weights(run), base_weights(cache)
    assert all(torch.equal(tensor, stopped[name]) and tensor.isfinite().all() for name, tensor in whole.items())

    rows = [json.loads(line) for line in (run / "clips" / "metadata.jsonl").read_text().splitlines()]
    texts = json.loads((cache / "texts.json").read_text())["clips"]
    assert [row["text"] for row in rows] == [prompt for prompt, _ in texts[:NUM_CLIPS]]
    assert len({row["file_name"] for row in rows}) == NUM_CLIPS == len(list((run / "lora_cache/latents").iterdir()))
    lora = load_file(run / "anchor_lora" / "weights" / "pytorch_lora_weights.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in lora.items() if "lora_B" in name)
    assert list(json.loads((run / "training.json").read_text())) == ["base", "lora"]

    # One clip more would have met the poison.
    (cache / "base.ckpt").unlink()
    train_models.train_base(cache, num_clips=NUM_CLIPS + 1, steps=2)
    assert any(tensor.isnan().any() for tensor in base_weights(cache).values())
    with pytest.raises(ValueError, match="`num_clips=13` must be 1 to 12"):
        train_models.train_base(cache, num_clips=13, steps=2)


def test_a_longer_list_begins_with_the_shorter_one():
    scenes = cached_scenes(40)
    assert scenes[:10] == cached_scenes(10) and len({repr(scene.objects) for scene in scenes}) == 40


def test_the_command_names_a_folder():
    assert parser().parse_args(["shapes", "clips", "runs"]).folder.name == "runs"
