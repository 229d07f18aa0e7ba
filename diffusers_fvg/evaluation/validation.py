"""Videos during training: the callable that `fvg train` hands to the trainer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import numpy as np
import torch

from ..animate.anchor import Anchor
from ..animate.frames import first_frame
from ..animate.transformer_anchor import AnchorConditionedTransformer3D
from ..media import write_video
from ..pipelines.pipeline_factorized_cogvideox import FactorizedCogVideoXPipeline
from ..pipelines.pipeline_factorized_video import FactorizedVideoPipeline
from ..training.config import TrainConfig
from ..training.data import model_folder
from ..training.loop import Validation


def make_validate(config: TrainConfig) -> Callable[[Validation], None]:
    """A callable for [`training.trainer.main_train`] that makes a video of each validation prompt from its anchor.

    Videos have the size of the first bucket and the steps of the default preset, and always the same noise. They go to
    `output_dir/validation/<expert>_step_<step>/` and, frame by frame, to the tracker. While it lasts, text encoder and VAE
    are on the device too.

    Args:
        config (`TrainConfig`): `validation_prompts` and `validation_anchors`.

    Raises:
        `ValueError`: no prompts, an anchor that cannot be read, a model of two experts.
    """
    if not config.validation_prompts:
        raise ValueError(
            f"`validation_every={config.validation_every}` needs `validation_prompts` and `validation_anchors`; give some, or "
            "set it to 0."
        )
    folder = model_folder(config)
    index = json.loads((folder / "model_index.json").read_text())
    if index.get("boundary_ratio") is not None:
        raise ValueError(
            f"`validation_every={config.validation_every}`, but {config.model} samples with two experts, and training holds "
            "one; set it to 0 and look at the finished LoRA's videos."
        )
    pictures = [first_frame(path) for path in config.validation_anchors]

    def validate(validation: Validation) -> None:
        transformer, started = validation.transformer, time.perf_counter()
        kind = (
            FactorizedVideoPipeline
            if isinstance(transformer, AnchorConditionedTransformer3D)
            else FactorizedCogVideoXPipeline
        )
        absent = dict.fromkeys(("rewriter", "composer", "anchor_lora", "schedulers"))
        pipe = kind.from_pretrained(folder, transformer=transformer, dtype=transformer.dtype, **absent)
        pipe.to(transformer.device).set_progress_bar_config(disable=True)
        num_frames, height, width = config.buckets[0]
        for number, (prompt, picture) in enumerate(zip(config.validation_prompts, pictures)):
            frames = pipe.animate(
                prompt,
                anchors=Anchor(picture),
                num_frames=num_frames,
                height=height,
                width=width,
                max_sequence_length=config.max_sequence_length,
                generator=torch.Generator().manual_seed(config.seed),
            )[0]
            metadata = {"prompt": prompt, "step": validation.step}
            write_video(validation.folder / f"{number}.mp4", frames, config.frame_rate, metadata)
            validation.log_frames(f"validation/{number}", np.asarray(frames))
        validation.log({"validation_seconds": time.perf_counter() - started})

    return validate
