"""Trains an anchor LoRA for each expert of a video model, from a config to a file. The training loop is in [`loop`]."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType

from ..lora.anchor_lora import WEIGHT_NAME
from .batches import Clips
from .config import TrainConfig
from .data import build_cache, model_folder
from .distillation import GuidedTeacher
from .families import family_of
from .initial import of_expert
from .loop import Run, Validate, check_model
from .metadata import read_examples
from .objectives import FLOW_MATCHING, FlowMatching, VPrediction
from .output import write_card, write_lora
from .processes import make_accelerator, on_main_process
from .stopping import only_run_in


def main_train(path: str | Path, validate: Validate | None = None) -> Path:
    """Trains a LoRA from a TOML file: fills the cache and trains each expert. A further call resumes an interrupted run.

    Args:
        path (`str` or `Path`): path of the config, see [`TrainConfig`].
        validate (`Callable`, *optional*): called every `validation_every` steps with a [`Validation`].

    Returns:
        `Path`: path of the LoRA file.

    Raises:
        `ValueError`: the config or the data are not valid, or as in [`train`].
        `OSError`, `FloatingPointError`, `SystemExit`: as in [`train`].
    """
    config = TrainConfig.load(path)
    accelerator = make_accelerator(config)
    folder = model_folder(config)
    family = family_of(config, folder)
    boundary_ratio = json.loads((folder / "model_index.json").read_text()).get("boundary_ratio")
    # Checked here, because encoding can take hours and `train` checks only after it.
    check_run(config, boundary_ratio, validate, accelerator)
    check_model(family.empty, config)

    def load_expert(name: str) -> torch.nn.Module:
        dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
        return family.transformer.from_pretrained(folder, subfolder=name, torch_dtype=dtype)

    with only_run_in(Path(config.output_dir), accelerator):
        clips = build_cache(config, read_examples(config), folder, family)
        path = _train_experts(config, clips, load_expert, boundary_ratio, validate, family.objective, accelerator)
    accelerator.end_training()
    return path


def train(
    config: TrainConfig,
    clips: Clips,
    load_expert: Callable[[str], torch.nn.Module],
    boundary_ratio: float | None = None,
    validate: Validate | None = None,
    objective: FlowMatching | VPrediction = FLOW_MATCHING,
) -> Path:
    """Trains a LoRA for each of `config.experts`, one after the other, and writes them to one file.

    The file is `output_dir/weights/pytorch_lora_weights.safetensors`, with a model card beside it. Both
    `AnchorLora.from_pretrained(output_dir)` and `WanPipeline.load_lora_weights(output_dir / "weights")` read it, and the
    folder `weights` can be uploaded as a repository. diffusers' pipeline loads keys into `transformer_2` only if they have the
    prefix of the first expert. So with two experts there is also `weights/transformer_2.safetensors` for
    `load_lora_weights(..., load_into_transformer_2=True)`.

    Args:
        config (`TrainConfig`): config of the run.
        clips ([`Clips`]): cached latents and embeddings.
        load_expert (`Callable`): `load_expert("transformer")` returns a model that training may change.
        boundary_ratio (`float`, *optional*): noise level at and above which `"transformer"` is used, and below which
            `"transformer_2"` is used, as in the pipeline; `None` for a model with one expert.
        validate (`Callable`, *optional*): called every `validation_every` steps with a [`Validation`].
        objective (`FlowMatching` or `VPrediction`, *optional*): objective of the model.

    Returns:
        `Path`: path of the LoRA file.

    Raises:
        `ValueError`: `targets` match no layer, checkpoints belong to another config, an option lacks its counterpart,
            `teacher_lora` cannot be distilled, or another run writes to the folder.
        `FloatingPointError`: loss, gradient or weights are not finite or too large. They are not written.
        `OSError`: a file cannot be written, as on a full disk.
        `SystemExit`: the run was stopped by Ctrl-C or SIGTERM, after a checkpoint.
    """
    accelerator = make_accelerator(config)
    check_run(config, boundary_ratio, validate, accelerator)
    with only_run_in(Path(config.output_dir), accelerator):
        return _train_experts(config, clips, load_expert, boundary_ratio, validate, objective, accelerator)


def _train_experts(
    config: TrainConfig,
    clips: Clips,
    load_expert: Callable[[str], torch.nn.Module],
    boundary_ratio: float | None,
    validate: Validate | None,
    objective: FlowMatching | VPrediction,
    accelerator: Accelerator,
) -> Path:
    """Trains the experts as [`train`], in a folder that the caller has locked."""
    ranges = sigma_ranges(boundary_ratio)
    output = Path(config.output_dir)
    weights = {
        name: Run(config, clips, name, load_expert(name), ranges[name], accelerator, validate, objective).train()
        for name in config.experts
    }

    def write() -> None:
        write_lora(config, weights)
        write_card(config)

    on_main_process(accelerator, write)
    return output / WEIGHT_NAME


def check_run(
    config: TrainConfig, boundary_ratio: float | None, validate: Validate | None, accelerator: Accelerator
) -> None:
    """Checks that options fit the model, `validate`, the processes and other LoRAs. Raises the `ValueError`s of [`train`]."""
    if bool(config.validation_every) != (validate is not None):
        raise ValueError(
            f"`validation_every={config.validation_every}` and `validate={validate}` go together: give both or neither."
        )
    if validate is not None and accelerator.distributed_type is DistributedType.FSDP:
        raise ValueError(
            f"`validation_every={config.validation_every}` needs a whole model on one process, but FSDP shards it; set it to "
            "0 and sample with the finished LoRA."
        )
    if "transformer_2" in config.experts and boundary_ratio is None:
        raise ValueError(
            f"`experts={config.experts}`, but the model has one expert, as it has no `boundary_ratio`; leave `transformer_2` out."
        )
    for expert in config.experts:
        if config.distill_guidance:
            GuidedTeacher(config, expert)
        if config.initial_lora:
            of_expert(config.initial_lora, expert)


def sigma_ranges(boundary_ratio: float | None) -> dict[str, tuple[float, float]]:
    """Returns the range of noise levels at which sampling uses each expert."""
    boundary = boundary_ratio or 0.0
    return {"transformer": (boundary, 1.0), "transformer_2": (0.0, boundary)}
