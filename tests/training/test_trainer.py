import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from diffusers import WanPipeline
from forked import finish
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import tiny_transformer, tiny_wan_components
from training_runs import kill_after, losses, save_config, save_model, save_videos, start, tiny_config

from diffusers_fvg import AnchorLora
from diffusers_fvg.lora.anchor_lora import WEIGHT_NAME
from diffusers_fvg.training import loop, processes
from diffusers_fvg.training.config import WAN_TARGETS
from diffusers_fvg.training.loop import learning_rate
from diffusers_fvg.training.trainer import main_train, sigma_ranges


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    return save_model(root / "model"), save_videos(root / "data")


@pytest.fixture(scope="module")
def finished(places, tmp_path_factory):
    """A run of seven steps, never stopped: its config and its folder."""
    output = tmp_path_factory.mktemp("finished")
    config = tiny_config(*places, output)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        torch.set_num_threads(1)
        assert run(config) == output / WEIGHT_NAME
    return config, output


def run(config, validate=None) -> Path:
    return main_train(save_config(config, Path(config.output_dir) / "run.toml"), validate)


def checkpoint(output: Path, step: int = 7, expert: str = "transformer") -> dict[str, torch.Tensor]:
    return load_file(output / "checkpoints" / expert / f"step_{step:08d}.safetensors")


def log_lines(output: Path) -> list[str]:
    return (output / "log_transformer.jsonl").read_text().splitlines()


def assert_same_run(first: Path, second: Path) -> None:
    """Losses, weights, averages and optimizer states, bit for bit."""
    assert losses(first) == losses(second) and len(losses(first)) == 7
    tensors, others = checkpoint(first), checkpoint(second)
    assert {name.split(".")[0] for name in tensors} == {"weights", "average", "optimizer"}
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    ours, theirs = load_file(first / WEIGHT_NAME), load_file(second / WEIGHT_NAME)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


# -- learning ---------------------------------------------------------------------------------------------------------


def test_overfitting_one_clip_lowers_the_loss(places, tmp_path):
    model, data = places
    config = tiny_config(model, save_videos(tmp_path / "one", 1), tmp_path / "out", steps=60, batch_size=4)
    # The random base cannot even pass on its input: the last layer is tuned too.
    run(replace(config, rank=12, targets=[*WAN_TARGETS, "proj_out"], timestep_density="uniform", flow_shift=1.0))
    values = [loss for _, loss in losses(tmp_path / "out")]
    assert sum(values[-10:]) < 0.8 * sum(values[:10]), values


def test_every_step_draws_anew(places, tmp_path):
    """With one clip and weights that stand still, only the draws can change the loss."""
    options = {"steps": 5, "learning_rate": 1e-12, "prompt_dropout": 0.0}
    run(tiny_config(places[0], save_videos(tmp_path / "one", 1), tmp_path / "out", **options))
    values = sorted(loss for _, loss in losses(tmp_path / "out"))
    assert all(after - before > 1e-4 for before, after in zip(values, values[1:])), values


def test_learning_rate_schedules(places, tmp_path):
    constant = tiny_config(*places, tmp_path, steps=12, warmup_steps=2, learning_rate=0.3)
    assert [learning_rate(constant, step) for step in (0, 1, 2, 11)] == pytest.approx([0.1, 0.2, 0.3, 0.3])
    cosine = replace(constant, learning_rate_schedule="cosine")
    # Half way from step 2 to step 12 the cosine is at a half.
    assert [learning_rate(cosine, step) for step in (1, 2, 7, 12)] == pytest.approx([0.2, 0.3, 0.15, 0.0])


def test_accumulated_forwards_are_one_larger_batch(places, tmp_path, monkeypatch):
    """One step on a clip as 1 x 4 and 4 x 1 forwards of the same draws: the same gradient up to rounding."""
    draws = lambda kind, seed, expert, number, place: torch.Generator().manual_seed(number + place)  # noqa: E731
    monkeypatch.setattr(loop, "generator_for", draws)
    data, outcomes = save_videos(tmp_path / "one", 1), []
    for batch_size, forwards in ((4, 1), (1, 4)):
        output = tmp_path / f"out{batch_size}"
        config = tiny_config(places[0], data, output, steps=1, warmup_steps=0, ema_decay=0.0)
        run(replace(config, batch_size=batch_size, gradient_accumulation_steps=forwards))
        outcomes.append((losses(output)[0][1], checkpoint(output, 1)))
    (loss, tensors), (other_loss, others) = outcomes
    assert loss == pytest.approx(other_loss, rel=1e-5)
    # The first moments are a tenth of the gradient.
    moments = [name for name in tensors if name.startswith("optimizer.exp_avg.") and ".lora_B." in name]
    assert moments and all(tensors[name].abs().max() > 1e-5 for name in moments)
    for name in moments:
        torch.testing.assert_close(tensors[name], others[name], rtol=1e-3, atol=1e-6)


@pytest.fixture
def another_precision():
    """Accelerate lets a process have one precision."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def test_no_wide_copy_of_a_layers_input_is_kept(another_precision, places, tmp_path, monkeypatch):
    """In mixed precision the backward keeps less than with PEFT's copies, and computes the same bits."""
    kept = {}

    def counting(name):
        def measured(*args):
            storages = {}

            def pack(tensor):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = draw_loss(*args)
            kept[name] = sum(storages.values())
            return loss

        return measured

    draw_loss = loop.draw_loss
    for name in ("narrow", "wide"):
        monkeypatch.setattr(loop, "draw_loss", counting(name))
        if name == "wide":
            monkeypatch.setattr(loop, "disable_input_dtype_casting", lambda model: contextlib.nullcontext())
        options = {"mixed_precision": "bf16", "gradient_checkpointing": False, "cache_dir": str(tmp_path / "cache")}
        run(tiny_config(*places, tmp_path / name, **options))
    assert_same_run(tmp_path / "narrow", tmp_path / "wide")
    assert kept["narrow"] < 0.95 * kept["wide"], kept


@pytest.mark.parametrize(("ema_decay", "decay"), [(0.9, 3 / 12), (0.2, 0.2)], ids=["warms up", "warm"])
def test_the_average_follows_quickly_at_first(ema_decay, decay, places, tmp_path):
    """After step n it keeps (1 + n) / (10 + n) of itself, and `ema_decay` at most."""
    run(tiny_config(*places, tmp_path, steps=2, warmup_steps=0, checkpoint_every=1, ema_decay=ema_decay))
    before, after = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    averages = [name for name in after if name.startswith("average.")]
    assert averages and any(not torch.equal(before[name], after[name]) for name in averages)
    for name in averages:
        expected = decay * before[name] + (1 - decay) * after[name.replace("average.", "weights.")]
        torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-6)


# -- stopping and going on --------------------------------------------------------------------------------------------


def test_a_killed_run_continues_to_the_same_bits(finished, tmp_path):
    # All three run in separate processes, because earlier work of a process can change the last bit of a matrix product.
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    paths = {}
    for output in (whole, stopped):
        output.mkdir()
        paths[output] = save_config(replace(finished[0], output_dir=str(output)), output / "run.toml")
    finish(start(paths[whole]))
    processes = start(paths[stopped], seconds_per_step=0.1)
    kill_after(processes, stopped, step=5)
    assert processes[0].exitcode == -9 and not (stopped / WEIGHT_NAME).exists()
    before = log_lines(stopped)
    finish(start(paths[stopped]))
    assert_same_run(whole, stopped)
    # From the checkpoint of step 3, not from the beginning: the same seconds stand there.
    assert log_lines(stopped)[:3] == before[:3]


def test_two_processes_killed_continue_to_the_same_bits(places, tmp_path):
    outputs = []
    for name in ("whole", "killed"):
        output = tmp_path / name
        path = save_config(tiny_config(*places, output), output / "run.toml")
        if name == "killed":
            processes = start(path, num_processes=2, seconds_per_step=0.1)
            kill_after(processes, output, step=4)
            assert not (output / WEIGHT_NAME).exists()
        finish(start(path, num_processes=2))
        outputs.append(output)
    assert_same_run(*outputs)

    # Two processes of one clip are one process of two: the same order and draws, sums in another order.
    run(tiny_config(*places, tmp_path / "one", batch_size=2))
    expected = [loss for _, loss in losses(tmp_path / "one")]
    assert [loss for _, loss in losses(outputs[0])] == pytest.approx(expected, rel=1e-4)


def test_two_processes_that_share_the_model_are_as_one(places, tmp_path):
    """FSDP2: the same losses and weights as one process, whether stopped in between or not."""
    outputs = []
    for name in ("whole", "killed"):
        output = tmp_path / name
        path = save_config(tiny_config(*places, output), output / "run.toml")
        if name == "killed":
            processes = start(path, num_processes=2, seconds_per_step=0.1, sharded=True)
            kill_after(processes, output, step=4)
            assert not (output / WEIGHT_NAME).exists()
        finish(start(path, num_processes=2, sharded=True))
        outputs.append(output)
    assert_same_run(*outputs)

    run(tiny_config(*places, tmp_path / "one", batch_size=2))
    expected = [loss for _, loss in losses(tmp_path / "one")]
    assert [loss for _, loss in losses(outputs[0])] == pytest.approx(expected, rel=1e-4)
    tensors, others = checkpoint(outputs[0]), checkpoint(tmp_path / "one")
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[name], rtol=1e-2, atol=1e-4)


def test_a_damaged_checkpoint_is_passed_over(finished, tmp_path):
    config, output = finished
    config = replace(config, output_dir=str(tmp_path), steps=6)
    run(config)
    newest = tmp_path / "checkpoints" / "transformer" / "step_00000006.safetensors"
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content)
    before = log_lines(tmp_path)
    # A constant learning rate does not depend on `steps`, so the run may be made longer.
    run(replace(config, steps=7))
    assert_same_run(output, tmp_path)
    after = log_lines(tmp_path)
    assert after[:3] == before[:3] and after[3] != before[3]


def test_keep_checkpoints(finished):
    saved = sorted(path.name for path in (finished[1] / "checkpoints" / "transformer").iterdir())
    assert saved == ["step_00000006.safetensors", "step_00000007.safetensors"]


def test_a_checkpoint_of_other_settings_is_an_error(finished):
    config, _ = finished
    with pytest.raises(ValueError, match=r"changed: rank 4 to 8\); change them back, or choose another `output_dir`"):
        run(replace(config, rank=8))


# -- what comes out ---------------------------------------------------------------------------------------------------


def inputs(seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(1, 16, 3, 4, 4, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 8, 32, generator=generator),
        "return_dict": False,
    }


def merged(output: Path, expert: str = "transformer", seed: int = 0):
    """The expert with the average merged by hand: `weight + alpha / rank * B @ A`, alpha 8 and rank 4."""
    tensors, transformer = checkpoint(output, expert=expert), tiny_transformer(seed=seed)
    with torch.no_grad():
        for name, down in tensors.items():
            if name.startswith("average.") and ".lora_A." in name:
                up = tensors[name.replace(".lora_A.", ".lora_B.")]
                transformer.get_submodule(name.removeprefix("average.").split(".lora_A.")[0]).weight += 2 * up @ down
    return transformer


def test_output_loads_in_stock_pipeline_and_as_a_component(finished):
    _, output = finished
    with torch.no_grad():
        expected, base = merged(output)(**inputs())[0], tiny_transformer()(**inputs())[0]
        assert (expected - base).abs().max() > 1e-2

        pipe = WanPipeline(**tiny_wan_components())
        pipe.load_lora_weights(output / "weights", weight_name="pytorch_lora_weights.safetensors")
        torch.testing.assert_close(pipe.transformer(**inputs())[0], expected, rtol=1e-4, atol=1e-5)

        transformer = tiny_transformer(anchored=True)
        AnchorLora.from_pretrained(output).load_into(transformer, "transformer")
        torch.testing.assert_close(transformer(**inputs())[0], expected, rtol=1e-4, atol=1e-5)


def test_output_has_a_card_of_its_run(finished):
    _, output = finished
    card = (output / WEIGHT_NAME).with_name("README.md").read_text()
    assert "rank = 4" in card and 'anchor_position = "uniform"' in card
    # Seven steps: the first and the last tenth are one step each.
    first, last = losses(output)[0][1], losses(output)[-1][1]
    assert f"{first:.4f}" in card and f"{last:.4f}" in card


def test_output_carries_its_config(finished):
    config, output = finished
    with safe_open(output / WEIGHT_NAME, "pt") as file:
        metadata = file.metadata()
    stored = json.loads(metadata["training_config"])
    # Paths of this machine are shortened to their last part.
    names = {name: Path(getattr(config, name)).name for name in ("model", "data", "cache_dir", "output_dir")}
    assert type(config)(**stored) == replace(config, **names)
    assert str(output.parent) not in str(metadata) and metadata["base_model"] == names["model"]
    assert type(config).load(output / "config.toml") == config


def test_two_experts_train_on_their_own_noise_levels(tmp_path, monkeypatch):
    seen, draw_loss = {"transformer": [], "transformer_2": []}, loop.draw_loss

    def recording(model, clean_latents, drawn, *args):
        def call(timestep, **inputs):
            expert = "transformer" if torch.equal(model.proj_out.weight, first) else "transformer_2"
            seen[expert].append(timestep.max())
            return model(timestep=timestep, **inputs)

        return draw_loss(call, clean_latents, drawn, *args)

    first = tiny_transformer(seed=0).proj_out.weight
    monkeypatch.setattr(loop, "draw_loss", recording)
    model, data = save_model(tmp_path / "model", experts=2), save_videos(tmp_path / "data")
    config = tiny_config(model, data, tmp_path / "out", experts=["transformer", "transformer_2"])
    assert sigma_ranges(0.875) == {"transformer": (0.875, 1.0), "transformer_2": (0.0, 0.875)}
    run(config)
    # The times of the free frames in every step of an expert.
    assert len(seen["transformer"]) == len(seen["transformer_2"]) == 7
    assert torch.stack(seen["transformer"]).min() > 875 and torch.stack(seen["transformer_2"]).max() < 875
    keys = load_file(tmp_path / "out" / WEIGHT_NAME)
    assert {key.split(".")[0] for key in keys} == {"transformer", "transformer_2"}

    pipe = WanPipeline.from_pretrained(model)
    folder = tmp_path / "out" / "weights"
    pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    name = "transformer_2.safetensors"
    pipe.load_lora_weights(folder, weight_name=name, adapter_name="second", load_into_transformer_2=True)
    with torch.no_grad():
        for seed, expert in enumerate(("transformer", "transformer_2")):
            expected = merged(tmp_path / "out", expert, seed)(**inputs())[0]
            torch.testing.assert_close(getattr(pipe, expert)(**inputs())[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["to_q", "to_w", "q"]}, r"`targets` \['to_w', 'q'\] match no linear layer .* attn1.to_q"),
        ({"experts": ["transformer", "transformer_2"]}, "the model has one expert, as it has no `boundary_ratio`"),
        ({"validation_every": 3}, "`validation_every=3` and `validate=None` go together"),
    ],
)
def test_what_does_not_fit_the_model_is_said_before_encoding(places, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tiny_config(*places, tmp_path / "out", cache_dir=str(tmp_path / "cache"), **options))
    assert not (tmp_path / "cache").exists()


def test_validate_sees_the_average_and_changes_nothing(finished, tmp_path):
    config, output = finished
    seen = []

    def validate(validation):
        assert not validation.transformer.training and not torch.is_grad_enabled()
        torch.randn(3)
        values = {name: p.clone() for name, p in validation.transformer.named_parameters() if "lora" in name}
        seen.append((validation.expert, validation.step, validation.folder, values))

    run(replace(config, output_dir=str(tmp_path), validation_every=3), validate)
    assert [(expert, step) for expert, step, _, _ in seen] == [("transformer", 3), ("transformer", 6)]
    _, _, folder, values = seen[-1]
    assert folder == tmp_path / "validation" / "transformer_step_00000006"
    assert all(torch.equal(p, checkpoint(output, 6)[f"average.{name}"]) for name, p in values.items())
    assert_same_run(output, tmp_path)


# -- accelerate's own settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "plugin", "message"),
    [
        ("DEEPSPEED", None, "set up for DEEPSPEED; use MULTI_GPU, or FSDP with `fsdp_version: 2`"),
        ("FSDP", {"fsdp_version": 1}, "set up for FSDP1; set `fsdp_version: 2`"),
        ("FSDP", {"fsdp_version": 2, "activation_checkpointing": True}, "and `gradient_checkpointing = true`"),
    ],
)
def test_settings_that_are_refused(places, tmp_path, monkeypatch, kind, plugin, message):
    made = Accelerator()
    monkeypatch.setattr(made.state, "distributed_type", DistributedType[kind])
    plugin = FullyShardedDataParallelPlugin(**plugin) if plugin else None
    monkeypatch.setattr(made.state, "fsdp_plugin", plugin, raising=False)
    monkeypatch.setattr(processes, "Accelerator", lambda **options: made)
    with pytest.raises(ValueError, match=message):
        processes.make_accelerator(tiny_config(*places, tmp_path))
