"""Validation videos during training, made by a callable that `fvg train` passes to the trainer."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers.hooks import apply_group_offloading

from ..animate.anchor import Anchor, resolve_anchors
from ..animate.frames import first_frame
from ..lora.anchor_lora import ADAPTER_NAME, AnchorLora
from ..lora.export import read_lora
from ..lora.loader import EXPERTS, load_lora
from ..media import write_video
from ..pipelines.pipeline_factorized_cogvideox import FactorizedCogVideoXPipeline
from ..pipelines.pipeline_factorized_video import FactorizedVideoPipeline
from ..training.config import TrainConfig
from ..training.data import model_folder
from ..training.families import Wan, family_of, text_pipeline
from ..training.initial import of_expert
from ..training.loop import Validation
from ..training.output import sampling_facts
from ..training.processes import make_accelerator


def make_validate(config: TrainConfig) -> Callable[[Validation], None]:
    """Returns a callable for [`training.trainer.main_train`] that makes a video of each validation prompt, with its anchor if
    it has one.

    Videos have the size of the first bucket with more than one frame, the steps of the default preset, and the same noise at
    every validation. They are written to `output_dir/validation/<expert>_step_<step>/` and to the tracker. The prompts are
    encoded here, while nothing else is on the device. During a validation the VAE is on the device, too. If the model has two
    experts, the one that is not trained is loaded with the run's LoRA for it, if any, and moves to the device block by block.

    Args:
        config (`TrainConfig`): training config; `validation_prompts`, `validation_anchors` and `validation_frame_indices` say
            what to make.

    Raises:
        `ValueError`: there are no prompts, or an anchor cannot be read or is outside the video.
    """
    if not config.validation_prompts:
        raise ValueError(
            f"`validation_every={config.validation_every}` needs `validation_prompts`; give some, or set it to 0."
        )
    paths = config.validation_anchors or ("",) * len(config.validation_prompts)
    pictures = [first_frame(path) if path else None for path in paths]
    places = config.validation_frame_indices or (0,) * len(paths)
    num_frames, height, width = next(bucket for bucket in config.all_buckets if bucket[0] > 1)
    size = {"num_frames": num_frames, "height": height, "width": width}
    for picture, place in zip(pictures, places):
        resolve_anchors([] if picture is None else [Anchor(picture, place)], num_frames)
    # The run's own accelerator, because the first one that is created settles the timeout between processes.
    accelerator, folder = make_accelerator(config), model_folder(config)
    embeds = _embeds(config, folder, accelerator.device) if accelerator.is_main_process else []

    def validate(validation: Validation) -> None:
        started = time.perf_counter()
        pipe, guidance = _pipeline(validation, folder)
        for number, prompt in enumerate(config.validation_prompts):
            picture, place = pictures[number], places[number] % num_frames
            frames = pipe.animate(
                prompt_embeds=embeds[number][0],
                negative_prompt_embeds=embeds[number][1],
                anchors=None if picture is None else pipe._moment_anchor(picture, place),
                generator=torch.Generator().manual_seed(config.seed),
                **size,
                **guidance,
            )[0]
            path = validation.folder / f"{number}.mp4"
            write_video(path, frames, config.frame_rate, {"prompt": prompt, "step": validation.step})
            validation.log_video(f"validation/{number}", path)
        validation.log({"validation_seconds": time.perf_counter() - started})

    return validate


@torch.no_grad()
def _embeds(config: TrainConfig, folder: Path, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns for each prompt its embeddings and those of the empty prompt, `(1, L, D)` each, on the CPU."""
    family = family_of(config, folder)
    pipe = text_pipeline(family, folder, _dtype(config), device)
    return [
        tuple(part.cpu() for part in pipe.encode_prompt(prompt, max_sequence_length=config.max_sequence_length))
        for prompt in config.validation_prompts
    ]


def _dtype(config: TrainConfig) -> torch.dtype:
    return torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32


def _pipeline(
    validation: Validation, folder: Path
) -> tuple[FactorizedVideoPipeline | FactorizedCogVideoXPipeline, dict[str, float]]:
    """Builds the pipeline around the trained transformer; returns it and the guidance scales that a distilled LoRA needs."""
    config, device = validation.config, PartialState().device
    kind = FactorizedVideoPipeline if isinstance(family_of(config, folder), Wan) else FactorizedCogVideoXPipeline
    absent = ("rewriter", "composer", "anchor_lora", "schedulers", "text_encoder", "tokenizer")
    parts = {validation.expert: validation.transformer} | dict.fromkeys(absent)
    pipe = kind.from_pretrained(folder, dtype=_dtype(config), **parts)
    pipe.set_progress_bar_config(disable=True)
    # The LoRA's weights are already in the transformer, so only its facts are set, such as the form of its anchors.
    pipe.anchor_lora = AnchorLora({}, sampling_facts(config))
    # The pipeline as a whole is not moved: blocks that training keeps off the device stay off it.
    pipe.vae.to(device)
    learnt = [validation.expert]
    for name in set(EXPERTS) - {validation.expert}:
        other = getattr(pipe, name, None)
        if other is not None:
            learnt += [name] if _load_other(other, name, config) else []
            if device.type != "cpu":
                apply_group_offloading(other, device, offload_type="block_level", num_blocks_per_group=1)
    # Pipelines switch the anchor LoRA off without an anchor. Validation keeps it on, to show what was learnt.
    scales = pipe._adapter_scales
    pipe._adapter_scales = lambda attention_kwargs, anchored: scales(attention_kwargs, anchored=True)
    names = {"transformer": "guidance_scale", "transformer_2": "guidance_scale_2"}
    return pipe, {names[name]: 1.0 for name in learnt} if config.distill_guidance else {}


def _load_other(transformer: torch.nn.Module, expert: str, config: TrainConfig) -> bool:
    """Loads into the expert that is not trained its latest LoRA of this run, or its initial one; returns whether the run has
    trained one."""
    saved = sorted((Path(config.output_dir) / "checkpoints" / expert).glob("step_*.safetensors"))
    source: Any = None
    options: dict[str, Any] = {}
    if saved:
        source, _ = read_lora(saved[-1])
    elif config.initial_lora and expert in config.experts:
        source, options = of_expert(config.initial_lora, expert)
    if source is not None:
        experts, sources = ([part if name == expert else None for name in EXPERTS] for part in (transformer, source))
        load_lora(experts, sources, ADAPTER_NAME, strict=True, **options)
    return bool(saved)
