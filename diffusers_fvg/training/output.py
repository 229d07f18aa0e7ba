"""Writes the output of a run: a LoRA in diffusers' key format with the config in its metadata, and a model card."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from ..lora.anchor_lora import ADAPTER_NAME, WEIGHT_NAME
from ..publishing.privacy import without_paths
from .checkpoints import check_weights
from .config import TrainConfig
from .files import naming, write_whole


def lora_state_dict(weights: dict[str, torch.Tensor], config: TrainConfig) -> dict[str, torch.Tensor]:
    """Converts the parameters of one expert to diffusers' keys without a prefix, `blocks.0.attn1.to_q.lora_A.weight`.

    `lora_B` is multiplied by `alpha / rank`, because loaders interpret alpha differently, but agree on a LoRA without alpha.
    """
    scale, dtype = config.alpha / config.rank, torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    state = {}
    for name, tensor in weights.items():
        key = name.replace(f".{ADAPTER_NAME}.weight", ".weight")
        state[key] = (tensor * scale if ".lora_B." in key else tensor).to(dtype)
    return state


def sampling_facts(config: TrainConfig) -> dict[str, str]:
    """Returns the metadata that sampling with the LoRA needs: the guidance scale that is distilled into it, so that it is used
    with `guidance_scale=1`; its attention window; and the form of its anchors, unless that is `"slot"`."""
    names = {"transformer": "guidance_scale", "transformer_2": "guidance_scale_2"}
    facts = {names[expert]: str(scale) for expert, scale in zip(config.experts, config.distill_guidance)}
    if config.anchor_window is not None:
        facts["anchor_window"] = str(config.anchor_window)
    return facts if config.anchor_form == "slot" else facts | {"anchor_form": config.anchor_form}


def write_lora(config: TrainConfig, weights: dict[str, dict[str, torch.Tensor]]) -> None:
    """Writes `output_dir/weights`: all experts in one file, and a second expert also in a separate file."""
    shown = without_paths(asdict(config))
    metadata = {"training_config": json.dumps(shown), "base_model": shown["model"]} | sampling_facts(config)
    states = {expert: lora_state_dict(tensors, config) for expert, tensors in weights.items()}
    path = Path(config.output_dir) / WEIGHT_NAME
    for expert, state in states.items():
        # Checked again as written, because dtype and scale have changed.
        check_weights(f"The LoRA of {expert}", state)
    both = {f"{expert}.{key}": tensor for expert, state in states.items() for key, tensor in state.items()}
    write_whole(path, both, metadata)
    if "transformer_2" in states:
        second = {f"transformer.{key}": tensor for key, tensor in states["transformer_2"].items()}
        write_whole(path.with_name("transformer_2.safetensors"), second, metadata)


def write_intermediate(config: TrainConfig, expert: str, step: int, average: dict[str, torch.Tensor]) -> None:
    """Writes the LoRA of one expert to `output_dir/loras/<expert>_step_<step>.safetensors`, in the format of [`write_lora`]."""
    state = {f"{expert}.{key}": tensor for key, tensor in lora_state_dict(average, config).items()}
    check_weights(f"The LoRA of step {step}", state)
    metadata = {"step": str(step), "base_model": without_paths({"model": config.model})["model"]} | sampling_facts(
        config
    )
    write_whole(Path(config.output_dir) / "loras" / f"{expert}_step_{step:08d}.safetensors", state, metadata)


def write_card(config: TrainConfig) -> None:
    """Writes the model card of the run beside its LoRA, with values from its log."""
    # Imported here because this import loads all models of the package, which training does not need.
    from ..publishing.cards import training_card

    output = Path(config.output_dir)
    log = {
        expert: [json.loads(line) for line in (output / f"log_{expert}.jsonl").read_text().splitlines()]
        for expert in config.experts
    }
    path = (output / WEIGHT_NAME).with_name("README.md")
    with naming(path):
        training_card(config, log).save(path)
