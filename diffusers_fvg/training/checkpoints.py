"""Checkpoints of a run: which one it goes on from, what may have changed meanwhile, and that no file holds broken weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from ..checks import is_finite
from .batches import Clips
from .config import TomlConfig
from .files import read_whole, write_whole


logger = logging.get_logger(__name__)

# May differ when a run is continued: they do not touch what is computed up to a step.
FREE_ON_RESUME = {"experts", "checkpoint_every", "keep_checkpoints", "validation_every", "tracker"}
FREE_ON_RESUME |= {"model", "data", "cache_dir", "output_dir"}
FREE_ON_RESUME |= {"validation_prompts", "validation_anchors", "validation_frame_indices"}
FREE_ON_RESUME |= {"max_rejected_share", "gradient_checkpointing", "process_group_timeout"}
FREE_ON_RESUME |= {"lora_every", "activation_offload", "block_offload"}
# These are known by their weights, not by where they are.
FREE_ON_RESUME |= {"teacher_lora", "initial_lora"}
# Of Factorized-Dreamer: a start, and encoders that the cache knows by their content.
FREE_ON_RESUME |= {"video_unet", "motion_encoder", "image_encoder"}
# May be lower: what a run that diverged is told to do.
LOWERED_ON_RESUME = {"learning_rate", "max_grad_norm"}

# Neither a weight of a model that works nor its loss, which is about 1 at the start, comes near it.
EXPLODED = 1e4


def run_settings(config: TomlConfig, clips: Clips, more: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint was made with, as JSON holds it.

    Args:
        config ([`TrainConfig`]): of the run.
        clips ([`Clips`]): which are known by their content, not by their names.
        more (`Mapping`): beside the config.
    """
    values = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in FREE_ON_RESUME}
    return json.loads(json.dumps(values | clips.digests | {"num_clips": len(clips)} | dict(more)))


class Checkpoints:
    """The checkpoints of one expert.

    Args:
        folder (`Path`): where they lie.
        config ([`TrainConfig`]): of the run.
        settings (`dict`): from [`run_settings`].
    """

    def __init__(self, folder: Path, config: TomlConfig, settings: dict[str, Any]):
        self.folder, self.config, self.settings = folder, config, settings

    def saved(self) -> list[Path]:
        """Files, the newest first."""
        return sorted(self.folder.glob("step_*.safetensors"), reverse=True)

    def write(self, step: int, tensors: dict[str, torch.Tensor]) -> None:
        """Writes that of a step and removes those that are not kept any more.

        Raises:
            `FloatingPointError`: weights that are broken, see [`check_weights`].
            `OSError`: as on a full disk.
        """
        check_weights(f"The checkpoint of step {step}", tensors)
        path = self.folder / f"step_{step:08d}.safetensors"
        write_whole(path, tensors, {"step": str(step), "settings": json.dumps(self.settings)})
        others = self.saved()
        # Those of later steps were passed over when the run was continued.
        later = others[: others.index(path)]
        for stale in later + others[len(later) :][self.config.keep_checkpoints :]:
            stale.unlink()

    def newest(self) -> tuple[int, dict[str, torch.Tensor]] | None:
        """Step and tensors of the newest that is whole and finite.

        Raises:
            `ValueError`: it was made with other settings.
        """
        for path in self.saved():
            content = read_whole(path)
            if content is None:
                logger.warning(f"{path} is damaged and is passed over.")
                continue
            tensors, metadata = content
            if not all(is_finite(tensor) for tensor in tensors.values()):
                logger.warning(f"{path} holds values that are not finite (NaN or infinity) and is passed over.")
                continue
            step = int(metadata["step"])
            self._check_settings(path, step, json.loads(metadata["settings"]))
            return step, tensors
        return None

    def _check_settings(self, path: Path, step: int, found: dict[str, Any]) -> None:
        # What an earlier version did not write down was as it is by default; it did not know its videos and captions.
        defaults = {field.name: field.default for field in fields(self.config) if field.default is not MISSING}
        found = json.loads(json.dumps(defaults)) | found
        changed = {name: (found.get(name, now), now) for name, now in self.settings.items()}
        changed = {name: pair for name, pair in changed.items() if pair[0] != pair[1]}
        allowed = {name for name, (before, now) in changed.items() if name in LOWERED_ON_RESUME and now < before}
        if "steps" in changed:
            self._check_steps(path, step)
            # A cosine ends at `steps`; a constant rate does not know where it ends.
            if self.config.learning_rate_schedule == "constant" or changed["steps"][1] > changed["steps"][0]:
                allowed.add("steps")
        told = {name: f"{name} {before} to {now}" for name, (before, now) in changed.items()}
        told |= {name: f"other {name}, or in another order" for name in told.keys() & {"videos", "captions"}}
        refused = [told[name] for name in changed if name not in allowed]
        if refused:
            raise ValueError(
                f"{path} belongs to a run of other settings (changed: {', '.join(refused)}); change them back, or choose "
                "another `output_dir`."
            )
        if allowed - ({"steps"} if self.config.learning_rate_schedule == "constant" else set()):
            logger.warning(f"{path} is continued with {', '.join(told[name] for name in changed)}.")

    def _check_steps(self, path: Path, step: int) -> None:
        if self.config.steps < step:
            raise ValueError(
                f"`steps={self.config.steps}`, but {path} has done {step} already; set it to {step} or more, or choose another "
                "`output_dir`."
            )


def check_weights(what: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """No weight is NaN, infinite or so large that it can be of no use.

    Raises:
        `FloatingPointError`: naming the tensor.
    """
    for name, tensor in tensors.items():
        largest = float(tensor.detach().abs().max()) if tensor.numel() else 0.0
        # The optimizer's moments may be anything that is finite.
        if not largest < (float("inf") if name.startswith("optimizer.") else EXPLODED):
            raise FloatingPointError(
                f"{what} is not written: `{name}` has the value {largest:.3g}. Lower `learning_rate` or `max_grad_norm` and "
                "start again: the run goes on from its last sound checkpoint."
            )


def check_step(step: int, loss: float, gradient_norm: float) -> None:
    """Loss and gradient are such that a step can be taken.

    Args:
        step (`int`): steps taken so far.
        loss (`float`): over all processes.
        gradient_norm (`float`): before it is clipped.

    Raises:
        `FloatingPointError`: NaN, infinity, or a loss that has exploded.
    """
    if abs(loss) < EXPLODED and gradient_norm < float("inf"):
        return
    cause = "Lower `learning_rate` or `max_grad_norm` and start again: the run goes on from its last checkpoint."
    if step == 0:
        # A loss of the base model alone.
        cause = (
            "No weight has changed yet: the base model's weights are broken, or a `targets` layer leaves its range."
        )
    raise FloatingPointError(
        f"Step {step + 1} has a loss of {loss:.4g} and a gradient of norm {gradient_norm:.4g}, and is not taken. {cause}"
    )
