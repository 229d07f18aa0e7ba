"""The stages of Factorized-Dreamer's training."""

import importlib.util
import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from forked import start_processes
from safetensors.torch import load_file
from tiny_dreamer import (
    clip_tokenizer,
    tiny_clip_text,
    tiny_clip_vision,
    tiny_dreamer_pipeline,
    tiny_image_vae,
    tiny_motion_encoder,
    tiny_tokenizer,
    tiny_unet2d,
)
from training_runs import CAPTIONS, save_videos

from diffusers_fvg import Anchor
from diffusers_fvg.cli import main
from diffusers_fvg.dreamer.objective import dreamer_loss
from diffusers_fvg.dreamer.schedule import dreamer_schedule
from diffusers_fvg.dreamer.unet import FactorizedDreamerUNet
from diffusers_fvg.schedules.cogvideox import training_sigmas
from diffusers_fvg.training.data import build_cache
from diffusers_fvg.training.dreamer import (
    DreamerClips,
    DreamerRun,
    StableDiffusion,
    main_train_dreamer,
    make_trainee,
    text_encoding,
)
from diffusers_fvg.training.dreamer_config import DreamerConfig
from diffusers_fvg.training.dreamer_dry_run import dreamer_dry_run
from diffusers_fvg.training.metadata import read_examples


OPTIONS = {
    "system": "factorized-dreamer",
    "buckets": [[4, 32, 32]],
    "frame_rate": 8.0,
    "max_sequence_length": 16,
    "flow_teacher": "dis",
    "flow_weight": 0.1,
    "steps": 7,
    "warmup_steps": 2,
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "ema_decay": 0.9,
    "mixed_precision": "no",
    "checkpoint_every": 3,
    "seed": 5,
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Models and videos on disk: options that say where."""
    root = tmp_path_factory.mktemp("dreamer")
    StableDiffusionPipeline(
        vae=tiny_image_vae(),
        text_encoder=tiny_clip_text(),
        tokenizer=clip_tokenizer(),
        unet=tiny_unet2d(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(root / "model")
    for part in (tiny_motion_encoder(), tiny_tokenizer()):
        part.save_pretrained(root / "t5")
    tiny_clip_vision().save_pretrained(root / "clip")
    data = save_videos(root / "data", 2, num_frames=4)
    folders = {"model": root / "model", "data": data, "cache_dir": data / "cache"}
    folders |= {"motion_encoder": root / "t5", "image_encoder": root / "clip"}
    return {name: str(path) for name, path in folders.items()}


def tiny_config(places, output, **options) -> DreamerConfig:
    return DreamerConfig(**places | {"output_dir": str(output)} | OPTIONS | options)


def run(config: DreamerConfig) -> Path:
    path = Path(config.output_dir) / "run.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(config.to_toml(), encoding="utf-8")
    return main_train_dreamer(path)


def log(output: Path) -> list[tuple[int, float]]:
    lines = (output / "log_unet.jsonl").read_text().splitlines()
    return [(record["step"], record["loss"]) for record in map(json.loads, lines)]


def checkpoint(output: Path, step: int = 7) -> dict[str, torch.Tensor]:
    return load_file(output / "checkpoints" / "unet" / f"step_{step:08d}.safetensors")


@pytest.fixture(scope="module")
def finished(places, tmp_path_factory):
    """The last stage, seven steps without a stop: its config and its folder."""
    output = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        torch.set_num_threads(1)
        config = tiny_config(places, output)
        assert run(config) == output / "unet"
    return config, output


def test_the_image_unet_stays_as_it_was_and_all_that_is_new_moves(finished):
    config, output = finished
    trained = FactorizedDreamerUNet.from_pretrained(output / "unet").state_dict()
    stock = tiny_unet2d().state_dict()
    assert all(torch.equal(trained[name], tensor) for name, tensor in stock.items())
    trainee = make_trainee(config, Path(config.model), StableDiffusion(config, Path(config.model)))
    start = dict(trainee.named_parameters())
    tensors = checkpoint(output)
    tuned = {name.removeprefix("weights.") for name in tensors if name.startswith("weights.")}
    assert tuned == {name for name in start if name.removeprefix("unet.") not in stock}
    assert any(name.startswith("predict_net.") for name in tuned)
    for name in tuned:
        assert not torch.equal(tensors[f"weights.{name}"], start[name]), name
        assert tensors[f"optimizer.exp_avg_sq.{name}"].any(), name


def test_spatial_weights_are_trained_if_asked_for(places, tmp_path):
    output = run(tiny_config(places, tmp_path, train_spatial=True, steps=3, ema_decay=0.0))
    trained, stock = FactorizedDreamerUNet.from_pretrained(output).state_dict(), tiny_unet2d().state_dict()
    assert all(not torch.equal(trained[name], tensor) for name, tensor in stock.items())


def _worker(path: str, seconds_per_step: float) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    step = DreamerRun._optimizer_step

    def slow_step(self, batches):
        time.sleep(seconds_per_step)
        return step(self, batches)

    DreamerRun._optimizer_step = slow_step
    main_train_dreamer(path)


def test_a_killed_run_ends_in_the_same_bits(finished, tmp_path):
    config, output = finished
    config = replace(config, output_dir=str(tmp_path))
    (tmp_path / "run.toml").write_text(config.to_toml(), encoding="utf-8")
    (process,) = start_processes(_worker, [(str(tmp_path / "run.toml"), 0.3)])
    deadline = time.monotonic() + 240
    while not ((tmp_path / "log_unet.jsonl").exists() and len(log(tmp_path)) >= 5):
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join()
    assert not (tmp_path / "unet").exists()
    run(config)
    assert log(tmp_path) == log(output) and len(log(output)) == 7
    tensors, others = checkpoint(tmp_path), checkpoint(output)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    ours, theirs = (
        FactorizedDreamerUNet.from_pretrained(folder / "unet").state_dict() for folder in (tmp_path, output)
    )
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_what_is_cached_is_what_sampling_computes(places, finished):
    config, _ = finished
    folder = Path(config.model)
    family = StableDiffusion(config, folder)
    examples = read_examples(config)
    clips = DreamerClips(build_cache(config, examples, folder, family, text_encoding))
    pipe = tiny_dreamer_pipeline()
    batch = clips.load([0, 1])
    assert batch["latents"].shape == (2, 4, 4, 8, 8) and batch["flow"].shape == (2, 2, 3, 8, 8)
    embeds = torch.cat([pipe.encode_prompt(text, "cpu", 1, False)[0] for text in (*CAPTIONS[:2], "")])
    assert torch.equal(batch["embeds"], embeds)
    motion = pipe.encode_motion([*CAPTIONS[:2], ""], 16)
    assert (batch["motion"] - motion).abs().max() < 1e-5
    frame = pipe.decode(batch["latents"], "pil")[0][0]
    assert isinstance(frame, PIL.Image.Image)
    # The first frame of the video, as an anchor: lossy video, so read it the way the cache did.
    import av

    with av.open(str(examples[0].path)) as container:
        first = next(container.decode(video=0)).to_ndarray(format="rgb24")
    conditions = pipe.encode_anchors([[Anchor(PIL.Image.fromarray(first))]], 32, 32)
    assert (conditions["image_latents"][0] - batch["latents"][0, :, 0]).abs().max() < 1e-4
    assert (conditions["image_embeds"][0] - batch["image_embeds"][0]).abs().max() < 1e-4
    # The square moves two pixels to the right a frame, half a latent's pixel; around it nothing moves.
    assert batch["flow"][:, 0].max() > 0.2 and batch["flow"][:, 1].abs().max() < 0.2


def test_dropped_conditions(places, tmp_path):
    config = tiny_config(places, tmp_path, prompt_dropout=0.2, motion_dropout=0.3, image_dropout=0.4)
    batch = {"latents": torch.randn(3, 4, 4, 8, 8), "image_embeds": torch.randn(3, 12)}
    batch |= {"embeds": torch.randn(4, 5, 32), "motion": torch.randn(4, 6, 24)}
    # All below their share, the motion's alone, none.
    dropped = torch.tensor([[0.1, 0.9, 0.3], [0.9, 0.2, 0.9], [0.2, 0.3, 0.4]])
    made = DreamerRun._conditions(SimpleNamespace(config=config), batch, dropped)
    for name, cached, rows in (("encoder_hidden_states", "embeds", (3, 1, 2)), ("motion_embeds", "motion", (3, 3, 2))):
        assert torch.equal(made[name], batch[cached][list(rows)]), name
    assert made["image_mask"].tolist() == [0, 1, 1]
    assert torch.equal(made["image_latents"], batch["latents"][:, :, 0])
    plain = replace(
        config,
        t2i_adapter="none",
        image_encoder="",
        paca="none",
        motion_encoder="",
        motion_dropout=0.0,
        image_dropout=0.0,
    )
    made = DreamerRun._conditions(SimpleNamespace(config=plain), batch, dropped)
    assert list(made) == ["encoder_hidden_states"]


def test_loss_is_that_of_the_velocity_and_of_the_flow():
    """By hand in numpy: sigma 0.6, alpha 0.8."""
    rng = np.random.default_rng(0)
    clean, noise, said = rng.normal(size=(3, 1, 2, 3, 4, 4))
    flow, wanted = 0.5 * rng.uniform(-1, 1, size=(2, 1, 2, 2, 4, 4))
    seen = {}

    def trainee(**inputs):
        seen.update(inputs)
        return torch.from_numpy(said), torch.from_numpy(flow)

    tensors = [torch.from_numpy(array) for array in (clean, noise)]
    sigmas = torch.tensor([0.1, 0.6], dtype=torch.float64)
    inputs = (trainee, *tensors, torch.tensor([1]), sigmas, {"fps": 8}, torch.from_numpy(wanted), 0.3)
    loss = dreamer_loss(*inputs).item()
    velocity = np.square(said - (0.8 * noise - 0.6 * clean)).mean()
    # Within one pixel the flow's loss is half the square.
    assert loss == pytest.approx(velocity + 0.3 * np.square(flow - wanted).mean() / 2, rel=1e-5)
    assert np.abs(seen["sample"].numpy() - (0.8 * clean + 0.6 * noise)).max() < 1e-9
    assert seen["timestep"].tolist() == [1] and seen["fps"] == 8


def test_a_stage_continues_the_one_before(places, finished, tmp_path):
    config, output = finished
    second = replace(config, output_dir=str(tmp_path), video_unet=str(output / "unet"), buckets=[[4, 64, 64]])
    second = replace(second, cache_dir=str(tmp_path / "cache"))
    folder = Path(config.model)
    trainee = make_trainee(second, folder, StableDiffusion(second, folder))
    average = {
        name.removeprefix("average."): t for name, t in checkpoint(output).items() if name.startswith("average.")
    }
    state = trainee.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in average.items())
    run(replace(second, steps=3))
    assert len(log(tmp_path)) == 3
    with pytest.raises(ValueError, match="paca all to up"):
        make_trainee(replace(second, paca="up"), folder, StableDiffusion(second, folder))


def test_overfitting_lowers_the_loss_and_the_result_samples(places, tmp_path):
    options = {"steps": 20, "batch_size": 2, "learning_rate": 5e-3, "train_spatial": True, "ema_decay": 0.9}
    output = run(tiny_config(places, tmp_path, **options))
    values = [loss for _, loss in log(tmp_path)]
    assert sum(values[-8:]) < 0.8 * sum(values[:8]), values
    pipe = tiny_dreamer_pipeline(unet=FactorizedDreamerUNet.from_pretrained(output))
    frame = PIL.Image.new("RGB", (32, 32), "red")
    video = pipe.animate(
        "a red circle moves right", Anchor(frame), height=32, width=32, num_frames=4, num_inference_steps=2
    )
    assert video.shape == (1, 4, 32, 32, 3)


def test_mixed_precision(finished, tmp_path):
    """The frozen half is rounded to bfloat16, what is trained is not."""
    config, output = finished
    AcceleratorState._reset_state()
    try:
        cache = str(tmp_path / "cache")
        made = run(replace(config, output_dir=str(tmp_path), mixed_precision="bf16", cache_dir=cache))
    finally:
        AcceleratorState._reset_state()
    assert [loss for _, loss in log(tmp_path)] == pytest.approx([loss for _, loss in log(output)], rel=0.05)
    state = FactorizedDreamerUNet.from_pretrained(made).state_dict()
    stock = tiny_unet2d().state_dict()
    assert all(torch.equal(state[name], tensor.bfloat16().float()) for name, tensor in stock.items())
    assert checkpoint(tmp_path)["weights.unet.image_pyramid.convs.0.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_encoder": ""}, "image_encoder=.*t2i_adapter"),
        ({"motion_encoder": ""}, "motion_dropout=0.05"),
        ({"flow_teacher": "none"}, "flow_teacher='none'"),
        ({"power": 3}, "power=3"),
        ({"buckets": [[1, 32, 32]]}, r"\[1, 32, 32\]"),
        ({"image_dropout": 1.0}, "image_dropout=1.0"),
        ({"system": "dreamer"}, "system='dreamer'"),
    ],
)
def test_bad_values_are_refused(places, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(places, tmp_path, **options)


def test_sizes_that_the_vae_does_not_divide_are_refused(places, tmp_path):
    with pytest.raises(ValueError, match="width=30"):
        run(tiny_config(places, tmp_path, buckets=[[4, 32, 30]]))


def test_the_example_stages_follow_each_other():
    paths = sorted((Path(__file__).parents[2] / "examples" / "training" / "dreamer").glob("*.toml"))
    low, high, last = (DreamerConfig.load(path) for path in paths)
    assert [stage.num_frames for stage in (low, high, last)] == [16] * 3
    assert not low.video_unet and [stage.flow_weight > 0 for stage in (low, high, last)] == [False, False, True]
    for before, stage in ((low, high), (high, last)):
        assert stage.video_unet == f"{before.output_dir}/unet"
        for name in (
            "model",
            "motion_encoder",
            "image_encoder",
            "t2i_adapter",
            "paca",
            "shift",
            "power",
            "frame_rate",
        ):
            assert getattr(stage, name) == getattr(before, name), name
    # One cache for both: what it depends on is the same.
    for name in ("cache_dir", "buckets", "clips_per_video", "max_sequence_length", "flow_teacher"):
        assert getattr(high, name) == getattr(last, name), name
    assert low.cache_dir != high.cache_dir


# -- before a stage ---------------------------------------------------------------------------------------------------


def test_the_dry_run_tells_what_the_stage_does(finished, places, tmp_path, capsys):
    config = finished[0]
    data = save_videos(tmp_path / "data", 3, num_frames=4)
    (data / "2.mp4").write_text("no video")
    changed = replace(config, data=str(data), max_rejected_share=0.5, batch_size=2)
    (tmp_path / "c.toml").write_text(changed.to_toml())
    assert main(["train", str(tmp_path / "c.toml"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    # Four frames of 8 x 8 latents, two clips.
    assert re.search(r"4x32x32: +2 +2 +512\n", text)
    assert re.search(r"Rejected files: 1\n  .*2\.mp4: is not a video", text)
    assert "step_00000007.safetensors is there" in text and "s a step in its log" in text

    # What is trained is what a checkpoint holds.
    trained = sum(p.numel() for name, p in checkpoint(finished[1]).items() if name.startswith("weights."))
    assert f"Parameters: {trained:,} are trained, " in text
    frozen = sum(p.numel() for p in UNet2DConditionModel.from_pretrained(Path(config.model) / "unet").parameters())
    assert f"are trained, {frozen:,} are frozen" in text
    drawn = training_sigmas(CogVideoXDDIMScheduler(**dreamer_schedule(config.shift)))
    share = float(((drawn >= 0.9) & (drawn <= 1)).float().mean())
    assert f"  0.9 to 1.0 {share:6.1%}" in text


def test_the_dry_run_counts_what_is_trained_and_in_how_many_bits(places, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    # In bytes: it is a tiny model.
    monkeypatch.setattr("diffusers_fvg.training.dreamer_dry_run.GIB", 1)
    config = tiny_config(places, tmp_path)
    memory = {}
    for name, options in {"plain": {}, "all": {"train_spatial": True}, "8bit": {"optimizer": "adamw-8bit"}}.items():
        text = dreamer_dry_run(replace(config, **options))
        sizes = [
            int(number.replace(",", "")) for number in re.search(r": ([\d,]+) are trained, ([\d,]+)", text).groups()
        ]
        memory[name] = (*sizes, float(re.search(r"computed: ([\d.]+) GiB", text)[1]))
    # The last stage has PredictNet, which is trained too.
    assert memory["all"][:2] == (sum(memory["plain"][:2]), 0)
    trained, frozen, plain = memory["plain"]
    # Weight, gradient, average and two moments, or those in a byte each with four for 256 of them.
    assert plain == 4 * frozen + (4 + 4 + 4 + 8) * trained
    assert memory["8bit"][2] == pytest.approx(plain - (8 - 2 * (1 + 4 / 256)) * trained, abs=1)
