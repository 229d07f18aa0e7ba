"""Guidance distillation: target and initial weights of the student, and metadata of the finished LoRA."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from forked import finish
from safetensors.torch import load_file
from tiny import tiny_pipeline, tiny_transformer
from tiny_cogvideox import tiny_cogvideox_transformer
from training_runs import (
    SCALE,
    distilled_config,
    kill_after,
    losses,
    moving_square,
    save_cogvideox_model,
    save_config,
    save_lora,
    save_model,
    save_videos,
    start,
)

from diffusers_fvg import Anchor, AnchorLora, SchedulerPreset, SchedulerPresets
from diffusers_fvg.lora.anchor_lora import ADAPTER_NAME, WEIGHT_NAME
from diffusers_fvg.training.config import WAN_TARGETS
from diffusers_fvg.training.distillation import GuidedTeacher
from diffusers_fvg.training.trainer import main_train


COGVIDEOX = {"targets": ("to_q", "ff.net.2"), "timestep_density": "uniform", "flow_shift": 1.0}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("distillation")
    return save_model(root / "model"), save_videos(root / "data", 1)


@pytest.fixture(scope="module")
def teacher_lora(tmp_path_factory):
    return save_lora(tmp_path_factory.mktemp("teacher"), {"transformer": tiny_transformer()})


def run(config) -> Path:
    return main_train(save_config(config, Path(config.output_dir) / "run.toml"))


def with_teacher(config) -> tuple[GuidedTeacher, torch.nn.Module]:
    teacher, transformer = GuidedTeacher(config, "transformer"), tiny_transformer(anchored=True)
    teacher.load_into(transformer)
    return teacher, transformer


# -- what is taught ---------------------------------------------------------------------------------------------------


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 16, 3, 4, 4, generator=generator),
        "timestep": torch.tensor([[0.0, 700.0, 700.0], [300.0, 0.0, 300.0]]),
        "prompt_embeds": torch.randn(2, 8, 32, generator=generator),
        "negative_embeds": torch.randn(2, 8, 32, generator=generator),
    }


@torch.no_grad()
def test_the_target_is_the_guided_prediction_of_the_stock_class(places, teacher_lora, tmp_path):
    """Stock transformer, one time per token, the LoRA merged into its weights by hand."""
    teacher, transformer = with_teacher(distilled_config(places, tmp_path, teacher_lora))
    transformer.add_adapter(_random_adapter(), adapter_name=ADAPTER_NAME)
    given = inputs()
    model_input = {name: given[name] for name in ("hidden_states", "timestep")}
    target = teacher.predict(transformer, transformer, given["negative_embeds"], model_input, given["prompt_embeds"])

    stock, state = tiny_transformer(), load_file(Path(teacher_lora) / WEIGHT_NAME)
    for key, down in state.items():
        if ".lora_A." in key:
            name = key.removeprefix("transformer.").split(".lora_A.")[0]
            stock.get_submodule(name).weight += state[key.replace(".lora_A.", ".lora_B.")] @ down
    # 2 x 2 patches in a frame.
    times = given["timestep"].repeat_interleave(4, dim=1)
    cond, uncond = (
        stock(given["hidden_states"], times, given[name], return_dict=False)[0]
        for name in ("prompt_embeds", "negative_embeds")
    )
    assert (cond - uncond).abs().max() > 1e-3
    torch.testing.assert_close(target, uncond + SCALE * (cond - uncond), rtol=1e-4, atol=1e-5)
    # The student is active again, and nothing of the teacher's is trained.
    assert transformer.active_adapters() == [ADAPTER_NAME]
    trained = [name for name, p in transformer.named_parameters() if p.requires_grad and "lora" in name]
    assert trained and all(f".{ADAPTER_NAME}." in name for name in trained)


def _random_adapter():
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules=list(WAN_TARGETS), init_lora_weights=False)


def test_the_target_is_bit_equal_to_what_the_pipeline_hands_to_its_scheduler(
    places, teacher_lora, tmp_path, monkeypatch
):
    preset = SchedulerPreset("one", "FlowMatchEulerDiscreteScheduler", {"shift": 1.0}, (0.7,), 1.0, SCALE)
    pipe = tiny_pipeline(schedulers=SchedulerPresets.of(preset), anchor_lora=AnchorLora.from_pretrained(teacher_lora))
    pipe.set_progress_bar_config(disable=True)
    calls, guided, step = [], [], FlowMatchEulerDiscreteScheduler.step
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)

    def recorded_step(self, model_output, *args, **kwargs):
        guided.append(model_output)
        return step(self, model_output, *args, **kwargs)

    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "step", recorded_step)
    options = {"num_frames": 9, "height": 32, "width": 32, "preset": "one", "max_sequence_length": 16}
    options |= {"generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    pipe.animate("a red circle", anchors=Anchor(moving_square(0)[0]), negative_prompt="a picture", **options)

    cond, uncond = calls
    teacher, transformer = with_teacher(distilled_config(places, tmp_path, teacher_lora))
    model_input = {name: cond[name] for name in ("hidden_states", "timestep")}
    embeds = uncond["encoder_hidden_states"], model_input, cond["encoder_hidden_states"]
    target = teacher.predict(transformer, transformer, *embeds)
    # Frame 0 is the anchor: the pipeline holds it, and the loss leaves it out.
    assert torch.equal(target[:, :, 1:], guided[0][:, :, 1:])


# -- what the student starts from -------------------------------------------------------------------------------------


def first_loss(places, output: Path, teacher_lora: str, **options) -> float:
    run(distilled_config(places, output, teacher_lora, steps=1, warmup_steps=0, **options))
    return losses(output)[0][1]


def test_the_student_starts_as_the_teacher_without_guidance(places, teacher_lora, tmp_path):
    """Then `target - student` is `(scale - 1) * (cond - uncond)`: the first loss grows with the square of `scale - 1`."""
    one = first_loss(places, tmp_path / "one", teacher_lora, distill_guidance=[2.0])
    two = first_loss(places, tmp_path / "two", teacher_lora, distill_guidance=[3.0])
    assert one > 1e-4 and two == pytest.approx(4 * one, rel=1e-4)
    # The initial prediction does not depend on rank and alpha.
    wide = first_loss(places, tmp_path / "wide", teacher_lora, distill_guidance=[2.0], rank=6, alpha=3.0)
    assert wide == pytest.approx(one, rel=1e-4)
    # The same prompt on both sides leaves nothing to learn.
    same = first_loss(places, tmp_path / "same", teacher_lora, negative_prompt="a red circle moves right")
    assert same < 1e-9 < one


def test_distillation_lowers_the_loss(places, teacher_lora, tmp_path):
    run(distilled_config(places, tmp_path, teacher_lora, steps=40, batch_size=2, learning_rate=2e-2, rank=8))
    values = [loss for _, loss in losses(tmp_path)]
    assert sum(values[-8:]) < 0.5 * sum(values[:8]), values


# -- what comes out ---------------------------------------------------------------------------------------------------


def test_both_experts_are_taught_and_say_so(tmp_path):
    model, data = save_model(tmp_path / "model", experts=2), save_videos(tmp_path / "data", 1)
    experts = {"transformer": tiny_transformer(), "transformer_2": tiny_transformer(seed=1)}
    teacher_lora = save_lora(tmp_path / "lora", experts)
    options = {"experts": list(experts), "distill_guidance": [4.0, 3.0], "steps": 3}
    run(distilled_config((model, data), tmp_path / "out", teacher_lora, **options))
    lora = AnchorLora.from_pretrained(tmp_path / "out")
    assert lora.metadata["guidance_scale"] == "4.0" and lora.metadata["guidance_scale_2"] == "3.0"
    assert str(tmp_path) not in str(lora.metadata)
    assert {key.split(".")[0] for key in lora.state_dict} == set(experts)
    for name, transformer in experts.items():
        fresh = type(transformer).from_config(transformer.config)
        lora.load_into(fresh, name)

    # Distilling a distilled LoRA is refused: its guidance would be applied twice.
    with pytest.raises(ValueError, match="has a guidance of 4.0 in it; distil the LoRA that it was made from"):
        run(distilled_config((model, data), tmp_path / "again", str(tmp_path / "out"), **options))


def test_cogvideox_is_taught_too(tmp_path):
    places = save_cogvideox_model(tmp_path / "model"), save_videos(tmp_path / "data", 1)
    lora = save_lora(tmp_path / "lora", {"transformer": tiny_cogvideox_transformer()}, COGVIDEOX["targets"])
    one, two = (
        first_loss(places, tmp_path / str(scale), lora, distill_guidance=[scale], **COGVIDEOX) for scale in (2.0, 3.0)
    )
    assert one > 1e-6 and two == pytest.approx(4 * one, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_lora": "nowhere"}, "nowhere has no weights/pytorch_lora_weights.safetensors"),
        ({"rank": 1}, "`rank=1` is below that of `teacher_lora`, .* set `rank` to 2 or more"),
        (
            {"targets": ["to_q", "to_k"]},
            r"leave out transformer.blocks.0.attn1.to_out.0, which `teacher_lora` has weights for",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_before_encoding(places, teacher_lora, tmp_path, options, message):
    options = {"teacher_lora": teacher_lora, "cache_dir": str(tmp_path / "cache")} | options
    with pytest.raises(ValueError, match=message):
        run(distilled_config(places, tmp_path / "out", **options))
    assert not (tmp_path / "cache").exists()


def test_a_teacher_of_one_expert_cannot_teach_two(teacher_lora, tmp_path):
    places = save_model(tmp_path / "model", experts=2), tmp_path
    options = {"experts": ["transformer", "transformer_2"], "distill_guidance": [4.0, 3.0]}
    with pytest.raises(ValueError, match="has no weights for the expert 'transformer_2'"):
        run(distilled_config(places, tmp_path / "out", teacher_lora, **options))


# -- stopping and going on, processes ---------------------------------------------------------------------------------


def checkpoint(output: Path, step: int = 7) -> dict[str, torch.Tensor]:
    return load_file(output / "checkpoints" / "transformer" / f"step_{step:08d}.safetensors")


def test_a_killed_run_continues_to_the_same_bits_with_the_same_teacher(places, teacher_lora, tmp_path):
    paths = {}
    for name in ("whole", "stopped"):
        config = distilled_config(places, tmp_path / name, teacher_lora)
        paths[name] = save_config(config, tmp_path / name / "run.toml")
    finish(start(paths["whole"]))
    processes = start(paths["stopped"], seconds_per_step=0.1)
    kill_after(processes, tmp_path / "stopped", step=5)
    # The teacher is compared by its weights, not by their location.
    moved = save_lora(tmp_path / "moved", {"transformer": tiny_transformer()})
    save_config(replace(config, teacher_lora=moved), paths["stopped"])
    finish(start(paths["stopped"]))
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped") and len(losses(tmp_path / "whole")) == 7
    tensors, others = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "stopped")
    assert tensors.keys() == others.keys() and not any("teacher" in name for name in tensors)
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())

    other = save_lora(tmp_path / "other", {"transformer": tiny_transformer()}, rank=1)
    with pytest.raises(ValueError, match=r"changed: teacher \w+ to \w+\)"):
        run(replace(config, teacher_lora=other))


def test_two_processes_that_share_the_model_are_as_one(places, teacher_lora, tmp_path):
    """FSDP2 shards both adapters and the base."""
    config = distilled_config(places, tmp_path / "two", teacher_lora)
    finish(start(save_config(config, tmp_path / "two" / "run.toml"), num_processes=2, sharded=True))
    run(replace(config, output_dir=str(tmp_path / "one"), batch_size=2))
    expected = [loss for _, loss in losses(tmp_path / "one")]
    assert [loss for _, loss in losses(tmp_path / "two")] == pytest.approx(expected, rel=1e-4)
    tensors, others = checkpoint(tmp_path / "two"), checkpoint(tmp_path / "one")
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[name], rtol=1e-2, atol=1e-4)
