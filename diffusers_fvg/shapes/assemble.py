"""Assembles the trained parts of the shapes model into one repository, in float16."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..lora.anchor_lora import WEIGHT_NAME
from ..schedules.presets import SchedulerPresets, unipc_preset
from .train_models import MAX_CAPTION_LENGTH, MAX_SEQUENCE_LENGTH


if TYPE_CHECKING:
    from ..compose.composer import AnchorComposer
    from ..pipelines.pipeline_factorized_video import FactorizedVideoPipeline

SHAPES_SOURCE = "chosen on the shapes world's held-out prompts (synthetic)"
# Guidance and shift for the tiny model; the steps are those of arXiv 2512.16371.
SHAPES_PRESETS = SchedulerPresets.of(
    unipc_preset("anchored-15", 15, 3.0, 2.5, source=SHAPES_SOURCE),
    unipc_preset("full-50", 50, 3.0, 2.5, source=SHAPES_SOURCE),
    unipc_preset(
        "distilled-15", 15, 3.0, 1.0, weights="distilled_lora", source="anchored-15, its guidance put into the LoRA"
    ),
)
COMPOSER_DEFAULTS = {
    "num_frames": 1,
    "num_inference_steps": 20,
    "guidance_scale": 3.0,
    "max_sequence_length": MAX_CAPTION_LENGTH,
}
CALL_DEFAULTS = {
    "height": 64,
    "width": 64,
    "num_frames": 17,
    "frame_rate": 8,
    "max_sequence_length": MAX_SEQUENCE_LENGTH,
}
# Call defaults that are added if there is a judge.
JUDGE_DEFAULTS = {"composer_num_candidates": 8}


def build_composer(folder: Path) -> AnchorComposer:
    """Builds stage 2 from the parts `tokenizer`, `text_encoder`, `vae` and `composer` in `folder`."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import AutoTokenizer, UMT5EncoderModel

    from ..compose.composer import AnchorComposer

    text_to_image = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder"),
        vae=AutoencoderKLWan.from_pretrained(folder / "vae"),
        transformer=WanTransformer3DModel.from_pretrained(folder / "composer"),
        # New noise at every step corrects images that started with one object too many or too few. More counts are right than
        # with UniPC.
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.5, stochastic_sampling=True),
    )
    return AnchorComposer(text_to_image, COMPOSER_DEFAULTS, batch_size=16)


def build_pipeline(folder: Path) -> FactorizedVideoPipeline:
    """Builds the pipeline from the parts in `folder`: `vae`, `text_encoder`, `tokenizer` and `base`, and if they exist
    `rewriter`, `composer`, `anchor_judge` and `anchor_lora`."""
    from diffusers import AutoencoderKLWan
    from transformers import AutoTokenizer, UMT5EncoderModel

    from ..animate.transformer_anchor import AnchorConditionedTransformer3D
    from ..lora.anchor_lora import AnchorLora
    from ..pipelines.pipeline_factorized_video import FactorizedVideoPipeline
    from ..rewrite.rewriter import FirstFrameRewriter
    from .judge import ShapesJudge

    def optional(name: str, load: Callable[[Path], Any]) -> Any:
        return load(folder / name) if (folder / name).is_dir() else None

    judge = optional("anchor_judge", ShapesJudge.from_pretrained)
    return FactorizedVideoPipeline(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder"),
        vae=AutoencoderKLWan.from_pretrained(folder / "vae"),
        scheduler=next(iter(SHAPES_PRESETS.values())).make_scheduler(),
        transformer=AnchorConditionedTransformer3D.from_pretrained(folder / "base"),
        transformer_2=None,
        rewriter=optional("rewriter", FirstFrameRewriter.from_pretrained),
        composer=optional("composer", lambda path: build_composer(folder)),
        anchor_judge=judge,
        anchor_lora=optional("anchor_lora", AnchorLora.from_pretrained),
        schedulers=SHAPES_PRESETS,
        call_defaults=CALL_DEFAULTS | ({} if judge is None else JUDGE_DEFAULTS),
    )


def assemble(folder: Path, output: Path) -> None:
    """Writes the repository that is shipped with the package."""
    build_pipeline(folder).to(torch.float16).save_pretrained(output)
    if (folder / "distilled_lora").is_dir():
        (output / "distilled_lora").mkdir()
        shutil.copy(folder / "distilled_lora" / WEIGHT_NAME, output / "distilled_lora")
    # diffusers saves the path from which a part was loaded, which means nothing on other machines.
    for path in Path(output).rglob("*.json"):
        config = json.loads(path.read_text())
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n")
