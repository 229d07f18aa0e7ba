"""The initial LoRA of a run, and the intermediate LoRAs that it writes."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file
from tiny import tiny_transformer, tiny_wan_components
from training_runs import save_config, save_lora, save_model, save_videos, tiny_config

from diffusers_fvg.lora.anchor_lora import WEIGHT_NAME
from diffusers_fvg.lora.export import export_lora
from diffusers_fvg.training.trainer import main_train


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("initial")
    return save_model(root / "model"), save_videos(root / "data")


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    """Of rank 2 and random."""
    return Path(save_lora(tmp_path_factory.mktemp("lora"), {"transformer": tiny_transformer()}))


def run(config) -> dict[str, torch.Tensor]:
    main_train(save_config(config, Path(config.output_dir) / "run.toml"))
    return load_file(Path(config.output_dir) / WEIGHT_NAME)


def delta(state: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    return state[f"transformer.{module}.lora_B.weight"] @ state[f"transformer.{module}.lora_A.weight"]


@pytest.mark.parametrize("form", ["folder", "comfyui"])
def test_a_run_starts_from_a_lora(places, lora, tmp_path, form):
    source = lora
    if form == "comfyui":
        (source,) = export_lora(lora, tmp_path / "a.safetensors")
    # A step that changes nothing: what comes out is what it started from.
    options = {"steps": 1, "warmup_steps": 0, "learning_rate": 1e-12, "weight_decay": 0.0}
    learnt = run(tiny_config(*places, tmp_path / "out", initial_lora=str(source), **options))
    given = load_file(lora / WEIGHT_NAME)
    modules = {key.removeprefix("transformer.").split(".lora_")[0] for key in given}
    assert len(modules) == 20
    for module in modules:
        torch.testing.assert_close(delta(learnt, module), delta(given, module), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_each_expert_starts_from_its_own(places, tmp_path):
    source = save_lora(
        tmp_path / "two", {"transformer": tiny_transformer(), "transformer_2": tiny_transformer(seed=1)}
    )
    model = save_model(tmp_path / "model", experts=2)
    options = {"steps": 1, "warmup_steps": 0, "learning_rate": 1e-12, "weight_decay": 0.0, "initial_lora": source}
    config = tiny_config(model, places[1], tmp_path / "out", experts=["transformer", "transformer_2"], **options)
    learnt, given = run(config), load_file(Path(source) / WEIGHT_NAME)
    for expert in ("transformer", "transformer_2"):
        pair = [f"{expert}.blocks.1.ffn.net.2.lora_{half}.weight" for half in "BA"]
        products = [state[pair[0]] @ state[pair[1]] for state in (learnt, given)]
        torch.testing.assert_close(*products, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("experts", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_it_may_be_a_repository_on_the_hub(places, lora, tmp_path, hub, experts):
    names = ["transformer", "transformer_2"][:experts]
    source, model = lora, places[0]
    if experts == 2:
        source = Path(save_lora(tmp_path / "two", {name: tiny_transformer(seed=3) for name in names}))
        model = save_model(tmp_path / "model", experts=2)
    # As `fvg push` uploads it, beside a model in a folder of its own, which is not read.
    shutil.copytree(source / "weights", tmp_path / "repository")
    (tmp_path / "repository" / "transformer").mkdir()
    (tmp_path / "repository" / "transformer" / "model.safetensors").write_bytes(b"0")
    hub.add("org/lora", tmp_path / "repository")
    options = {"steps": 1, "warmup_steps": 0, "learning_rate": 1e-12, "weight_decay": 0.0, "experts": names}
    config = tiny_config(model, places[1], tmp_path / "out", initial_lora="org/lora", **options)
    learnt, given = run(config), load_file(source / WEIGHT_NAME)
    assert "transformer/model.safetensors" not in hub.downloaded("org/lora")
    for name in names:
        pair = [f"{name}.blocks.1.ffn.net.2.lora_{half}.weight" for half in "BA"]
        products = [state[pair[0]] @ state[pair[1]] for state in (learnt, given)]
        torch.testing.assert_close(*products, rtol=1e-5, atol=1e-6)
    # The LoRA is compared by its weights: the run resumes with a copy of it.
    run(replace(config, steps=2, initial_lora=str(source)))


def test_a_repository_that_is_not_there_is_told_of_before_anything_is_encoded(places, tmp_path, hub):
    for name in ("org/nothing", "no such place", "a/b/c"):
        config = tiny_config(*places, tmp_path / "out", initial_lora=name, cache_dir=str(tmp_path / "cache"))
        with pytest.raises(ValueError, match=f"`initial_lora='{name}'` is not a readable file, folder or repository"):
            run(config)
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_it_goes_on_with_the_same_one(places, lora, tmp_path):
    config = tiny_config(*places, tmp_path / "out", initial_lora=str(lora))
    run(replace(config, steps=4))
    moved = tmp_path / "moved.safetensors"
    state = load_file(lora / WEIGHT_NAME)
    save_file(state, moved)
    stopped = run(replace(config, initial_lora=str(moved)))
    whole = run(replace(config, output_dir=str(tmp_path / "whole")))
    assert all(torch.equal(stopped[key], whole[key]) for key in whole)
    save_file({key: 2 * tensor for key, tensor in state.items()}, moved)
    with pytest.raises(ValueError, match="changed: initial "):
        run(replace(config, initial_lora=str(moved)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 1, "alpha": 2.0}, r"has rank 2, above `rank=1` of the new LoRA: set `rank` to 2 or more"),
        ({"targets": ["to_q"]}, "has weights for blocks.0.attn1.to_k, which `targets` leave out: add it"),
    ],
)
def test_loras_that_do_not_fit_are_refused(places, lora, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tiny_config(*places, tmp_path / "out", initial_lora=str(lora), **options))


def test_a_lora_of_more_than_pairs_is_refused(places, lora, tmp_path):
    state = load_file(lora / WEIGHT_NAME)
    state = {key.replace("transformer.", "diffusion_model.", 1): tensor for key, tensor in state.items()}
    save_file(state | {"diffusion_model.blocks.0.attn1.to_q.diff_b": torch.ones(24)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="has weights of norms, biases or modulation"):
        run(tiny_config(*places, tmp_path / "out", initial_lora=str(tmp_path / "a.safetensors")))


def test_loras_are_kept_on_the_way(places, tmp_path):
    config = tiny_config(*places, tmp_path / "out", lora_every=2, keep_checkpoints=1)
    finished = run(config)
    folder = tmp_path / "out" / "loras"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"transformer_step_{step:08d}.safetensors" for step in (2, 4, 6)
    ]
    # The same as the end of a run of so many steps, and no other: its average.
    expected = run(replace(config, output_dir=str(tmp_path / "six"), steps=6))
    kept = load_file(folder / "transformer_step_00000006.safetensors")
    assert kept.keys() == expected.keys() and all(torch.equal(kept[key], expected[key]) for key in kept)
    assert any(not torch.equal(kept[key], finished[key]) for key in kept)
    WanPipeline(**tiny_wan_components()).load_lora_weights(folder, weight_name="transformer_step_00000006.safetensors")
