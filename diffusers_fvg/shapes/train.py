"""Trains the whole shapes model from scratch, part by part. Each part must reach a target score on held-out prompts before the
next one starts.

A further call skips finished parts and resumes an interrupted one. `training.json` lists parameters, steps, samples, seconds
and held-out score of each finished part.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from ..lora.anchor_lora import WEIGHT_NAME
from ..rewrite.rewriter import FirstFrameRewriter
from ..training.config import TrainConfig
from . import train_judge, train_models, train_rewriter, train_vae
from .assemble import CALL_DEFAULTS, SHAPES_PRESETS, assemble, build_composer, build_pipeline
from .held_out import held_out_scenes
from .loop import trained
from .prompts import CATEGORIES
from .report import SINGLE_OBJECT, evaluate
from .scorer import score_anchor
from .study import Cell, FirstFrames, run_cell
from .world import Scene


LORA_CLIPS = 10_000
# Options that differ from the trainer's defaults for real models: sizes, and a rank that fits them.
LORA_SETTINGS: dict[str, Any] = {
    "buckets": ((17, 64, 64),),
    "frame_rate": CALL_DEFAULTS["frame_rate"],
    "max_sequence_length": CALL_DEFAULTS["max_sequence_length"],
    "rank": 16,
    "alpha": 16.0,
    "anchor_position": "start-middle-last",
    "flow_shift": train_models.CLIP_SHIFT,
    "timestep_std": 1.2,
    "steps": 3000,
    "batch_size": 24,
    "learning_rate": 1e-3,
    "learning_rate_schedule": "cosine",
    "warmup_steps": 100,
    "weight_decay": 0.0,
    "ema_decay": 0.999,
    "mixed_precision": "no",
    "gradient_checkpointing": False,
}


def lora_config(folder: Path, name: str = "lora", **changes: Any) -> TrainConfig:
    """Returns the config of the anchor LoRA's run in `folder/<name>`; `changes` are options of [`TrainConfig`]."""
    paths = {"model": folder / "base_repository", "data": folder / "clips", "cache_dir": folder / "lora_cache"}
    return TrainConfig(
        **{key: str(path) for key, path in paths.items()}, output_dir=str(folder / name), **LORA_SETTINGS | changes
    )


def distilled_config(folder: Path, name: str = "distilled", **changes: Any) -> TrainConfig:
    """Returns the config of the run that distills the default preset's guidance into the LoRA in `folder/anchor_lora`."""
    guidance = next(iter(SHAPES_PRESETS.values())).guidance_scale
    teacher = {"distill_guidance": (guidance,), "teacher_lora": str(folder / "anchor_lora"), "prompt_dropout": 0.0}
    return lora_config(folder, name, **teacher | {"steps": 1500, "warmup_steps": 50} | changes)


def train_lora(folder: Path, scenes: Sequence[Scene] | None = None, **changes: Any) -> dict[str, int]:
    """Trains the anchor LoRA on the frozen base; writes `folder/anchor_lora`.

    Args:
        folder (`Path`): folder with the parts trained before.
        scenes (`Sequence[Scene]`, *optional*): scenes of the training clips; left out, `LORA_CLIPS` random ones.
        changes: options of [`TrainConfig`].
    """
    from .dataset import write_dataset, write_scenes

    if scenes is None:
        write_dataset(folder / "clips", LORA_CLIPS)
    else:
        write_scenes(folder / "clips", scenes)
    if not (folder / "base_repository").is_dir():
        build_pipeline(folder).save_pretrained(folder / "base_repository.tmp")
        (folder / "base_repository.tmp").rename(folder / "base_repository")
    return run_trainer(folder, lora_config(folder, **changes), "anchor_lora")


def train_distilled(folder: Path) -> dict[str, int]:
    """Trains the guidance-distilled anchor LoRA; writes `folder/distilled_lora`."""
    return run_trainer(folder, distilled_config(folder), "distilled_lora")


def run_trainer(folder: Path, config: TrainConfig, target: str) -> dict[str, int]:
    """Trains a LoRA with [`training.trainer`], as for any model, and copies it to `folder/<target>`."""
    from ..training.trainer import main_train

    name = Path(config.output_dir).name
    (folder / f"{name}.toml").write_text(config.to_toml(), encoding="utf-8")
    weights = main_train(folder / f"{name}.toml")
    path = folder / target / WEIGHT_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(weights, path)
    records = [json.loads(line) for line in (folder / name / "log_transformer.jsonl").read_text().splitlines()]
    # Converts the log to the format of the other parts, with one line for fifty steps.
    with open(folder / f"{name}_log.jsonl", "w") as log:
        for chunk in (records[start : start + 50] for start in range(0, len(records), 50)):
            means = {key: float(np.mean([record[key] for record in chunk])) for key in ("seconds", "loss")}
            line = {"step": chunk[-1]["step"], "seconds_per_step": means["seconds"], "loss_clip": means["loss"]}
            log.write(json.dumps(line) + "\n")
    parameters = sum(tensor.numel() for tensor in load_file(path).values())
    return {"samples": config.steps * config.batch_size, "parameters": parameters}


def rewriter_score(folder: Path) -> float:
    """Returns the mean score of first-frame captions over the categories."""
    scores = train_rewriter.held_out_score(FirstFrameRewriter.from_pretrained(folder / "rewriter"))
    return float(np.mean(list(scores.values())))


def composer_score(folder: Path, per_category: int = 24) -> float:
    """Returns the mean `score_anchor` over the seven categories, of images drawn from true captions."""
    composer, scores = build_composer(folder), []
    scenes = held_out_scenes(per_category, seed=1, categories=CATEGORIES)
    generators = [torch.Generator().manual_seed(index) for index in range(len(scenes))]
    pictures = composer.compose([scene.caption for scene in scenes], 64, 64, generator=generators)
    for scene, picture in zip(scenes, pictures):
        scores.append(score_anchor(np.asarray(picture), scene.caption))
    return float(np.mean(scores))


def video_score(folder: Path, arm: str, categories: Sequence[str], per_category: int = 12) -> float:
    """Returns the mean `score_video` of an arm at 15 steps."""
    pipe = build_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    records = evaluate(pipe, held_out_scenes(per_category, seed=1, categories=categories), arms=(arm,))
    return float(np.mean([record["score"] for record in records]))


def distilled_score(folder: Path, per_category: int = 12) -> float:
    """Returns the mean `score_video` of the distilled LoRA with true anchors and without guidance, one forward per step."""
    pipe = build_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(folder / "distilled_lora" / "weights", adapter_name="distilled")
    scenes = held_out_scenes(per_category, seed=1, categories=CATEGORIES)
    cell = Cell("quick", "true_anchor", 15, guidance=1.0, lora="distilled")
    batches = run_cell(pipe, cell, FirstFrames(pipe, scenes), [(index, 0) for index in range(len(scenes))])
    return float(np.mean([record["score"] for records in batches for record in records]))


@dataclass(frozen=True)
class Part:
    """A part of the model.

    Args:
        train (`Callable`): trains it in a folder and returns facts for the summary.
        score (`Callable`, *optional*): returns its score on held-out prompts.
        bar (`float`): target of this score, which it must reach before the next part starts.
    """

    train: Callable[[Path], dict[str, Any] | None]
    score: Callable[[Path], float] | None = None
    bar: float = 0.0


PARTS: dict[str, Part] = {
    "vae": Part(train_vae.train_vae, train_vae.held_out_score, 0.95),
    "rewriter": Part(train_rewriter.train_rewriter, rewriter_score, 0.95),
    "cache": Part(train_models.build_cache),
    "text": Part(train_models.train_text, train_models.text_score, 0.99),
    "base": Part(train_models.train_base, lambda folder: video_score(folder, "direct", SINGLE_OBJECT), 0.6),
    "composer": Part(train_models.train_composer, composer_score, 0.8),
    "judge": Part(train_judge.train_judge, train_judge.judge_score, 0.97),
    "lora": Part(train_lora, lambda folder: video_score(folder, "true_anchor", CATEGORIES), 0.8),
    "distilled": Part(train_distilled, distilled_score, 0.8),
}


def train_all(folder: Path, parts: Sequence[str] = tuple(PARTS)) -> None:
    """Trains `parts` in order and, once all of `PARTS` are finished, writes the model to `folder/repository`.

    Args:
        folder (`Path`): folder for checkpoints, logs, weights and `training.json`.
        parts (`Sequence[str]`): names in `PARTS`, in their order.

    Raises:
        `ValueError`: a part misses its target score.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train_parts(folder, {name: PARTS[name] for name in parts})
    summary = json.loads((folder / "training.json").read_text())
    if summary.keys() >= PARTS.keys():
        assemble(folder, folder / "repository")
        print(f"repository: {folder / 'repository'}")


def train_parts(folder: Path, parts: dict[str, Part]) -> None:
    """Trains the parts that `folder/training.json` does not list, checks their target scores, and lists them there."""
    path = folder / "training.json"
    summary = json.loads(path.read_text()) if path.exists() else {}
    for name, part in parts.items():
        if name in summary:
            continue
        print(f"training {name}", flush=True)
        facts = part.train(folder) or {}
        if (folder / f"{name}_log.jsonl").exists():
            facts |= trained(folder, name)
        if part.score is not None:
            facts |= {"held_out": round(part.score(folder), 4), "bar": part.bar}
            print(f"{name}: {facts['held_out']} on held-out prompts (synthetic), target {part.bar}", flush=True)
            if facts["held_out"] < part.bar:
                raise ValueError(
                    f"{name} scored {facts['held_out']}, below its target of {part.bar}, so training stops here."
                )
        summary[name] = facts
        path.write_text(json.dumps(summary, indent=2) + "\n")
