"""Checkpoints of a run: writes them, finds the one to resume from, and checks settings and weights."""

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

# Options that may differ when a run is resumed, because they do not change what is computed up to a step.
FREE_ON_RESUME = {"experts", "checkpoint_every", "keep_checkpoints", "validation_every", "tracker"}
FREE_ON_RESUME |= {"model", "data", "cache_dir", "output_dir"}
FREE_ON_RESUME |= {"validation_prompts", "validation_anchors", "validation_frame_indices"}
FREE_ON_RESUME |= {"max_rejected_share", "gradient_checkpointing", "process_group_timeout"}
FREE_ON_RESUME |= {"lora_every", "activation_offload", "block_offload"}
# LoRAs are compared by a digest of their weights, not by their location.
FREE_ON_RESUME |= {"teacher_lora", "initial_lora"}
# Options of Factorized-Dreamer: initial weights, and encoders, which the cache compares by content.
FREE_ON_RESUME |= {"video_unet", "motion_encoder", "image_encoder"}
# Options that may be lowered when a run is resumed, as the error after a divergence advises.
LOWERED_ON_RESUME = {"learning_rate", "max_grad_norm"}

# Upper limit of weights and loss. In a run that works they stay far below it; the loss starts at about 1.
EXPLODED = 1e4


def run_settings(config: TomlConfig, clips: Clips, more: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that a checkpoint records, as JSON values.

    Args:
        config ([`TrainConfig`]): config of the run.
        clips ([`Clips`]): training clips, recorded by digests of their content.
        more (`Mapping`): further settings.
    """
    values = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in FREE_ON_RESUME}
    return json.loads(json.dumps(values | clips.digests | {"num_clips": len(clips)} | dict(more)))


class Checkpoints:
    """The checkpoints of one expert.

    Args:
        folder (`Path`): folder of the checkpoints.
        config ([`TrainConfig`]): config of the run.
        settings (`dict`): output of [`run_settings`].
    """

    def __init__(self, folder: Path, config: TomlConfig, settings: dict[str, Any]):
        self.folder, self.config, self.settings = folder, config, settings

    def saved(self) -> list[Path]:
        """Returns the checkpoint files, the newest first."""
        return sorted(self.folder.glob("step_*.safetensors"), reverse=True)

    def write(self, step: int, tensors: dict[str, torch.Tensor]) -> None:
        """Writes the checkpoint of a step, and removes later ones and those beyond `keep_checkpoints`.

        Raises:
            `FloatingPointError`: weights are broken, see [`check_weights`].
            `OSError`: the file cannot be written, as on a full disk.
        """
        check_weights(f"The checkpoint of step {step}", tensors)
        path = self.folder / f"step_{step:08d}.safetensors"
        write_whole(path, tensors, {"step": str(step), "settings": json.dumps(self.settings)})
        others = self.saved()
        # Checkpoints of later steps were damaged and skipped when the run was resumed.
        later = others[: others.index(path)]
        for stale in later + others[len(later) :][self.config.keep_checkpoints :]:
            stale.unlink()

    def newest(self) -> tuple[int, dict[str, torch.Tensor]] | None:
        """Returns step and tensors of the newest checkpoint that is complete and finite, or `None`.

        Raises:
            `ValueError`: the checkpoint was made with other settings.
        """
        for path in self.saved():
            content = read_whole(path)
            if content is None:
                logger.warning(f"{path} is damaged and is skipped.")
                continue
            tensors, metadata = content
            if not all(is_finite(tensor) for tensor in tensors.values()):
                logger.warning(f"{path} holds values that are not finite (NaN or infinity) and is skipped.")
                continue
            step = int(metadata["step"])
            self._check_settings(path, step, json.loads(metadata["settings"]))
            return step, tensors
        return None

    def _check_settings(self, path: Path, step: int, found: dict[str, Any]) -> None:
        # A checkpoint of an earlier version lacks newer options, which then had their defaults, and digests of the clips.
        defaults = {field.name: field.default for field in fields(self.config) if field.default is not MISSING}
        found = json.loads(json.dumps(defaults)) | found
        changed = {name: (found.get(name, now), now) for name, now in self.settings.items()}
        changed = {name: pair for name, pair in changed.items() if pair[0] != pair[1]}
        allowed = {name for name, (before, now) in changed.items() if name in LOWERED_ON_RESUME and now < before}
        if "steps" in changed:
            self._check_steps(path, step)
            # A cosine schedule depends on `steps`, a constant one does not.
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
    """Checks that no weight is NaN, infinite or at least `EXPLODED`.

    Raises:
        `FloatingPointError`: a weight is one of these; the message names the tensor.
    """
    for name, tensor in tensors.items():
        largest = float(tensor.detach().abs().max()) if tensor.numel() else 0.0
        # The optimizer's moments may have any finite value.
        if not largest < (float("inf") if name.startswith("optimizer.") else EXPLODED):
            raise FloatingPointError(
                f"{what} is not written: `{name}` has the value {largest:.3g}. Lower `learning_rate` or `max_grad_norm` and "
                "start again: the run resumes from its last valid checkpoint."
            )


def check_step(step: int, loss: float, gradient_norm: float) -> None:
    """Checks that loss and gradient allow an optimizer step.

    Args:
        step (`int`): number of steps taken so far.
        loss (`float`): mean loss over all processes.
        gradient_norm (`float`): norm of the gradient before clipping.

    Raises:
        `FloatingPointError`: a value is NaN or infinite, or the loss is at least `EXPLODED`.
    """
    if abs(loss) < EXPLODED and gradient_norm < float("inf"):
        return
    cause = "Lower `learning_rate` or `max_grad_norm` and start again: the run resumes from its last checkpoint."
    if step == 0:
        # The loss is that of the base model.
        cause = "No weight has changed yet: the base model's weights are broken, or a `targets` layer exceeds its dtype's range."
    raise FloatingPointError(
        f"Step {step + 1} has a loss of {loss:.4g} and a gradient of norm {gradient_norm:.4g}, and is not taken. {cause}"
    )
