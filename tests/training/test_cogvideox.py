"""Training of a CogVideoX model: v-prediction, two latent frames to a patch."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline
from safetensors.torch import load_file
from tiny_cogvideox import tiny_cogvideox_components, tiny_cogvideox_pipeline, tiny_cogvideox_transformer
from training_runs import (
    OPTIONS,
    losses,
    moving_square,
    save_cogvideox_model,
    save_config,
    save_videos,
    tiny_config,
)

from diffusers_fvg import Anchor
from diffusers_fvg.animate.anchor import crop_and_resize
from diffusers_fvg.animate.anchor_cogvideox import encode_anchor
from diffusers_fvg.schedules.cogvideox import COGVIDEOX_1_5_SCHEDULE, times_of, training_sigmas
from diffusers_fvg.schedules.presets import SchedulerPresets, timestep_preset
from diffusers_fvg.training.config import TrainConfig
from diffusers_fvg.training.draws import draw, draw_loss, generator_for
from diffusers_fvg.training.families import CogVideoX, family_of
from diffusers_fvg.training.objectives import VPrediction
from diffusers_fvg.training.trainer import main_train


COGVIDEOX = {
    "targets": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"],
    "timestep_density": "uniform",
    "flow_shift": 1.0,
}
SCHEDULER = CogVideoXDDIMScheduler(**COGVIDEOX_1_5_SCHEDULE)


def objective() -> VPrediction:
    return VPrediction(training_sigmas(SCHEDULER), frames_per_patch=2)


def config(**options) -> TrainConfig:
    return TrainConfig(model="m", data="d", cache_dir="c", output_dir="o", **OPTIONS | COGVIDEOX | options)


def generators(count: int) -> list[torch.Generator]:
    return [generator_for("test", index) for index in range(count)]


class Recorder:
    """Replaces the transformer: records its inputs and predicts zero."""

    def __call__(self, hidden_states, timestep, encoder_hidden_states, return_dict):
        self.hidden_states, self.timestep = hidden_states, timestep
        return (torch.zeros_like(hidden_states),)


@pytest.mark.parametrize("frame_times", ["shared", "independent"])
@pytest.mark.parametrize("anchor_noise", [0.0, 0.3])
def test_latents_and_times_are_those_of_the_scheduler(frame_times, anchor_noise):
    """Every frame is noised as diffusers' scheduler noises it at its time, and the target is the scheduler's velocity."""
    train = config(frame_times=frame_times, anchor_noise=anchor_noise, anchor_probability=0.5, mask_anchor_loss=False)
    clean = torch.randn(32, 2, 6, 2, 2, generator=torch.Generator().manual_seed(1))
    drawn, model = draw(clean, generators(32), train, objective=objective()), Recorder()
    draw_loss(model, clean, drawn, torch.zeros(32, 1, 1), objective=objective())
    target = objective().model_input(clean, drawn.noise, drawn.sigmas, drawn.anchors)[1]

    given = drawn.anchors.strength * drawn.sigmas[:, None] > 0
    pairs = model.timestep.unflatten(1, (3, 2))
    assert torch.equal(pairs[..., 0], pairs[..., 1])
    # Without anchor noise every level that is not an anchor's stands in the table.
    for sample in range(32):
        for frame in range(6):
            time = model.timestep[sample, frame]
            own = (clean[sample, :, frame], drawn.noise[sample, :, frame])
            if frame_times == "shared" and not given[sample, frame]:
                step = time.round().long()
                assert abs(time - step) < 1e-6
                expected = SCHEDULER.add_noise(own[0][None], own[1][None], step[None])[0]
                torch.testing.assert_close(model.hidden_states[sample, :, frame], expected, rtol=1e-4, atol=1e-5)
                velocity = SCHEDULER.get_velocity(own[0][None], own[1][None], step[None])[0]
                torch.testing.assert_close(target[sample, :, frame], velocity, rtol=1e-4, atol=1e-5)
            if drawn.anchors.strength[sample, frame] == 1:
                assert time == 0 and torch.equal(model.hidden_states[sample, :, frame], own[0])
    # Whatever the level, latents and target turn back into the clean ones: alpha^2 + sigma^2 = 1.
    level = ((1 - drawn.anchors.strength.double()) * drawn.sigmas[:, None])[:, None, :, None, None]
    alpha = ((1 - level) * (1 + level)).sqrt()
    torch.testing.assert_close(
        alpha * model.hidden_states.double() - level * target.double(), clean.double(), rtol=0, atol=1e-5
    )
    table = training_sigmas(SCHEDULER)
    torch.testing.assert_close(model.timestep, times_of(level[:, 0, :, 0, 0], table))


def test_a_whole_patch_is_anchored_and_masked():
    clean = torch.randn(40, 2, 6, 2, 2)
    drawn = draw(clean, generators(40), config(), objective=objective())
    anchored = drawn.counted == 0
    assert torch.equal(anchored, drawn.anchors.strength == 1)
    assert torch.equal(anchored[:, 0::2], anchored[:, 1::2]) and (anchored.sum(1) == 2).all()
    assert anchored.any(0).all()
    # Times are uniform over the thousand: a quarter of the clips lies below the 250th, give or take three deviations.
    many = draw(torch.zeros(400, 1, 4, 1, 1), generators(400), config(), objective=objective())
    times = times_of(many.sigmas, training_sigmas(SCHEDULER))
    assert abs((times < 250).float().mean() - 0.25) < 3 * (0.25 * 0.75 / 400) ** 0.5


@torch.no_grad()
def test_model_inputs_are_bit_equal_to_those_of_the_pipeline():
    frames = moving_square(0)
    preset = timestep_preset("one", "CogVideoXDDIMScheduler", COGVIDEOX_1_5_SCHEDULE, 4, 1.0)
    pipe = tiny_cogvideox_pipeline(schedulers=SchedulerPresets.of(preset))
    pipe.set_progress_bar_config(disable=True)
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    noise = torch.randn(1, 4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    options = {"num_frames": 9, "height": 32, "width": 32, "preset": "one", "max_sequence_length": 16}
    # A picture anchors the first patch: the first frame and the padding before it.
    pipe.animate(
        "a red circle", anchors=Anchor(frames[0]), latents=noise.transpose(1, 2), output_type="latent", **options
    )

    pixels = torch.stack([crop_and_resize(frame, 32, 32) for frame in frames], dim=1)
    train, model = objective(), Recorder()
    clean = train.padded(CogVideoX.encode(pipe.vae, pixels[None]))
    # This VAE normalises over all frames: a picture's latent is not quite the first one of its clip.
    clean[:, :, :2] = encode_anchor(pipe.vae, pixels[None, :, 0])
    drawn = draw(clean, generators(1), config(anchor_position="first"), objective=train)
    # The first step starts from pure noise, at the last time of the table.
    drawn = replace(drawn, noise=noise, sigmas=train.sigmas[-1:])
    draw_loss(model, clean, drawn, torch.zeros(1, 1, 1), objective=train)
    assert torch.equal(seen[0]["timestep"].to(model.timestep), model.timestep)
    assert seen[0]["timestep"].tolist() == [[0, 0, 999, 999]]
    assert torch.equal(seen[0]["hidden_states"], model.hidden_states.transpose(1, 2))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("cogvideox")
    train = tiny_config(save_cogvideox_model(root / "model"), save_videos(root / "data"), root / "out", **COGVIDEOX)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        torch.set_num_threads(1)
        main_train(save_config(train, root / "run.toml"))
    return train, root / "out"


def test_a_run_ends_in_a_lora_that_stock_diffusers_loads(finished):
    _, output = finished
    assert len(losses(output)) == 7
    generator = torch.Generator().manual_seed(0)
    transformer = tiny_cogvideox_transformer()
    rotary = tiny_cogvideox_transformer(anchored=True).rotary_embedding(4, 4, 4)
    inputs = {
        "hidden_states": torch.randn(1, 4, 4, 4, 4, generator=generator),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 16, 32, generator=generator),
        "image_rotary_emb": rotary,
        "return_dict": False,
    }
    tensors = load_file(output / "checkpoints" / "transformer" / "step_00000007.safetensors")
    with torch.no_grad():
        base = transformer(**inputs)[0]
        for name, down in tensors.items():
            if name.startswith("average.") and ".lora_A." in name:
                up = tensors[name.replace(".lora_A.", ".lora_B.")]
                module = transformer.get_submodule(name.removeprefix("average.").split(".lora_A.")[0])
                module.weight += 2 * up @ down
        expected = transformer(**inputs)[0]
        assert (expected - base).abs().max() > 1e-3
        pipe = CogVideoXPipeline(**tiny_cogvideox_components(), scheduler=SCHEDULER)
        pipe.load_lora_weights(output / "weights", weight_name="pytorch_lora_weights.safetensors")
        torch.testing.assert_close(pipe.transformer(**inputs)[0], expected, rtol=1e-4, atol=1e-5)


def test_the_family_follows_the_models_own_config(finished, tmp_path):
    train, _ = finished
    folder = Path(train.model)
    assert isinstance(family_of(train, folder), CogVideoX)
    for bucket, message in (
        ([13, 32, 32], "`num_frames=13` must be 8k"),
        ([9, 32, 40], "`width=40` must be a positive"),
    ):
        with pytest.raises(ValueError, match=message):
            family_of(tiny_config(folder, tmp_path, tmp_path, **COGVIDEOX | {"buckets": [bucket]}), folder)
    with pytest.raises(ValueError, match="larger than the 8 x 8 of this model"):
        family_of(tiny_config(folder, tmp_path, tmp_path, **COGVIDEOX | {"buckets": [[9, 80, 32]]}), folder)
    other = tmp_path / "transformer" / "config.json"
    other.parent.mkdir()
    with pytest.raises(ValueError, match="has no transformer/config.json"):
        family_of(train, tmp_path / "nowhere")
    other.write_text(json.dumps({"_class_name": "LTXVideoTransformer3DModel"}))
    with pytest.raises(
        ValueError, match="belongs to a LTXVideoTransformer3DModel; classes that can be trained are Wan"
    ):
        family_of(train, tmp_path)
