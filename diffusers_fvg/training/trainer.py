"""The training of an anchor LoRA for each expert of a video model, from a config to a file: see [`loop`] for the loop."""

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
    """Everything from a TOML file to a LoRA file: fills the cache, trains each expert, continues where it stopped.

    Args:
        path (`str` or `Path`): of the config, see [`TrainConfig`].
        validate (`Callable`, *optional*): called every `validation_every` steps with a [`Validation`].

    Returns:
        `Path`: the LoRA file.

    Raises:
        `ValueError`, `OSError`, `FloatingPointError`, `SystemExit`: bad config or data; see [`train`].
    """
    config = TrainConfig.load(path)
    accelerator = make_accelerator(config)
    folder = model_folder(config)
    family = family_of(config, folder)
    boundary_ratio = json.loads((folder / "model_index.json").read_text()).get("boundary_ratio")
    # Encoding can take hours: what train() would refuse after it is refused now.
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

    The file is `output_dir/weights/pytorch_lora_weights.safetensors`, with a model card beside it, so that
    `AnchorLora.from_pretrained(output_dir)` and `WanPipeline.load_lora_weights(output_dir / "weights")` read it and the
    folder `weights` can be a repository. The stock pipeline puts the keys of one expert into `transformer_2` only if they
    carry the first one's prefix: with two experts there is also `weights/transformer_2.safetensors` for
    `load_lora_weights(..., load_into_transformer_2=True)`.

    Args:
        config (`TrainConfig`): of the run.
        clips ([`Clips`]): cached latents and embeddings.
        load_expert (`Callable`): `load_expert("transformer")` gives a model that may be changed.
        boundary_ratio (`float`, *optional*): noise level from which up `"transformer"` works and below it
            `"transformer_2"`, as in the pipeline; `None` for a model of one expert.
        validate (`Callable`, *optional*): called every `validation_every` steps with a [`Validation`].
        objective (`FlowMatching` or `VPrediction`, *optional*): of the model.

    Returns:
        `Path`: the LoRA file.

    Raises:
        `ValueError`: targets that match no module, checkpoints of another config, an option without its counterpart, a
            `teacher_lora` that cannot be distilled, a folder that another run writes to.
        `FloatingPointError`: loss, gradient or weights that are not finite. Nothing of them is written.
        `OSError`: a file that cannot be written, as on a full disk.
        `SystemExit`: stopped by Ctrl-C or SIGTERM, after a checkpoint.
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
    """[`train`] within the run's folder."""
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
    """Options against what they need: see [`train`]."""
    if bool(config.validation_every) != (validate is not None):
        raise ValueError(
            f"`validation_every={config.validation_every}` and `validate={validate}` go together: give both or neither."
        )
    if validate is not None and accelerator.distributed_type is DistributedType.FSDP:
        raise ValueError(
            f"`validation_every={config.validation_every}` needs a whole model on one process, and FSDP shards it; set it to "
            "0 and look at the finished LoRA's videos."
        )
    if "transformer_2" in config.experts and boundary_ratio is None:
        raise ValueError(f"`experts={config.experts}`, but the model has no `boundary_ratio`: it has one expert.")
    for expert in config.experts:
        if config.distill_guidance:
            GuidedTeacher(config, expert)
        if config.initial_lora:
            of_expert(config.initial_lora, expert)


def sigma_ranges(boundary_ratio: float | None) -> dict[str, tuple[float, float]]:
    """The noise levels that each expert is asked for at sampling."""
    boundary = boundary_ratio or 0.0
    return {"transformer": (boundary, 1.0), "transformer_2": (0.0, boundary)}
