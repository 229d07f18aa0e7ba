"""The training loop: an anchor LoRA for each expert of a video model, resumable to the bit.

Nothing random is remembered: data order, noise, noise levels and anchors are functions of seed, expert and step
([`draws`], [`batches.BatchOrder`]). A checkpoint is then weights, their average and the optimizer's state.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator, DistributedType
from diffusers.utils import logging
from peft import LoraConfig
from peft.helpers import disable_input_dtype_casting
from tqdm.auto import tqdm

from ..animate.anchor import AnchorLatents
from ..lora.anchor_lora import ADAPTER_NAME, WEIGHT_NAME
from .batches import BatchOrder, Clips, Prefetcher
from .config import TrainConfig
from .data import build_cache, model_folder
from .distillation import GuidedTeacher
from .draws import Draw, draw, draw_loss, generator_for
from .families import family_of
from .files import read_whole, write_whole
from .metadata import read_examples
from .objectives import FLOW_MATCHING, FlowMatching, VPrediction
from .output import write_card, write_lora
from .processes import make_accelerator, sharded_like, share, whole


logger = logging.get_logger(__name__)

# May differ when a run is continued: they do not touch what is computed up to a step.
FREE_ON_RESUME = {"experts", "checkpoint_every", "keep_checkpoints", "validation_every", "tracker"}
FREE_ON_RESUME |= {"model", "data", "cache_dir", "output_dir", "validation_prompts", "validation_anchors"}
# The teacher is known by its weights, not by where they are.
FREE_ON_RESUME |= {"teacher_lora"}
# Of Factorized-Dreamer: a start, and encoders that the cache knows by their content.
FREE_ON_RESUME |= {"video_unet", "motion_encoder", "image_encoder"}


@dataclass(frozen=True)
class Validation:
    """What a validation callable gets, on the main process.

    Args:
        transformer (`torch.nn.Module`): the expert with the averaged LoRA as adapter `"anchor"`, in evaluation mode.
            Another expert is not loaded.
        expert (`str`): `"transformer"` or `"transformer_2"`.
        step (`int`): optimizer steps done.
        folder (`Path`): of this validation, for videos; made by whoever writes there.
        config (`TrainConfig`): of the run.
        log (`Callable`): `log({"name": number})` hands numbers to the tracker.
        log_frames (`Callable`): `log_frames("name", frames)` hands it pictures, `(F, H, W, 3)` float in [0, 1] or uint8.
    """

    transformer: torch.nn.Module
    expert: str
    step: int
    folder: Path
    config: TrainConfig
    log: Callable[[dict[str, float]], None]
    log_frames: Callable[[str, np.ndarray], None]


Validate = Callable[[Validation], None]


def main_train(path: str | Path, validate: Validate | None = None) -> Path:
    """Everything from a TOML file to a LoRA file: fills the cache, trains each expert, continues where it stopped.

    Args:
        path (`str` or `Path`): of the config, see [`TrainConfig`].
        validate (`Callable`, *optional*): called every `validation_every` steps with a [`Validation`].

    Returns:
        `Path`: the LoRA file.

    Raises:
        `ValueError`: bad config or data; see [`train`].
    """
    config = TrainConfig.load(path)
    accelerator = make_accelerator(config)
    folder = model_folder(config)
    family = family_of(config, folder)
    boundary_ratio = json.loads((folder / "model_index.json").read_text()).get("boundary_ratio")
    # Encoding can take hours: what train() would refuse after it is refused now.
    check_run(config, boundary_ratio, validate, accelerator)
    check_model(family.empty, config)
    clips = build_cache(config, read_examples(config), folder, family)

    def load_expert(name: str) -> torch.nn.Module:
        dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
        return family.transformer.from_pretrained(folder, subfolder=name, torch_dtype=dtype)

    path = train(config, clips, load_expert, boundary_ratio, validate, family.objective)
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
            `teacher_lora` that cannot be distilled.
    """
    accelerator = make_accelerator(config)
    check_run(config, boundary_ratio, validate, accelerator)
    ranges = sigma_ranges(boundary_ratio)
    output = Path(config.output_dir)
    weights = {
        name: _Run(config, clips, name, load_expert(name), ranges[name], accelerator, validate, objective).train()
        for name in config.experts
    }
    if accelerator.is_main_process:
        write_lora(config, weights)
        write_card(config)
    accelerator.wait_for_everyone()
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
    if config.distill_guidance:
        for expert in config.experts:
            GuidedTeacher(config, expert)


def sigma_ranges(boundary_ratio: float | None) -> dict[str, tuple[float, float]]:
    """The noise levels that each expert is asked for at sampling."""
    boundary = boundary_ratio or 0.0
    return {"transformer": (boundary, 1.0), "transformer_2": (0.0, boundary)}


def check_model(transformer: torch.nn.Module, config: TrainConfig) -> None:
    """Each target is the end of the name of at least one linear layer, and the model has window attention if that is asked for.

    Raises:
        `ValueError`: naming the targets that match nothing and what there is, or the option.
    """
    if config.anchor_window is not None and not hasattr(transformer, "set_anchor_window"):
        kind = type(transformer).__name__
        raise ValueError(f"`anchor_window={config.anchor_window}`, but {kind} has no window attention: remove it.")
    names = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    unmatched = [
        target for target in config.targets if not any(name == target or name.endswith("." + target) for name in names)
    ]
    if unmatched:
        ends = sorted({re.sub(r"^\w*blocks\.\d+\.", "", name) for name in names})
        raise ValueError(f"`targets` {unmatched} match no linear layer of the transformer; it has {', '.join(ends)}.")


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of the step with this number, counted from 0."""
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.learning_rate_schedule == "constant":
        return config.learning_rate * warm
    progress = max(0.0, (step - config.warmup_steps) / (config.steps - config.warmup_steps))
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * progress))


class _Run:
    """One expert's training: model, optimizer, average, and where they are written to."""

    def __init__(
        self,
        config: TrainConfig,
        clips: Clips,
        expert: str,
        transformer: torch.nn.Module,
        time_range: tuple[float, float],
        accelerator: Accelerator,
        validate: Validate | None,
        objective: FlowMatching | VPrediction,
    ):
        self.config, self.clips, self.expert, self.time_range = config, clips, expert, time_range
        self.accelerator, self.validate, self.objective = accelerator, validate, objective
        self.output = Path(config.output_dir)
        self.checkpoints = self.output / "checkpoints" / expert
        self.log_path = self.output / f"log_{expert}.jsonl"
        self.step = 0

        self._make_trainable(transformer)
        tuned = [p for p in transformer.parameters() if p.requires_grad]
        for parameter in tuned:
            parameter.data = parameter.data.to(accelerator.device, torch.float32)
        if self.teacher is not None:
            self.teacher.start(transformer)
        optimizer = torch.optim.AdamW(tuned, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.model, self.optimizer = accelerator.prepare(transformer.train(), optimizer)
        self.transformer = accelerator.unwrap_model(self.model)
        self.forward = self._caller()
        # With FSDP these are shards, and so is what is computed from them.
        self.tuned = {name: p for name, p in self.transformer.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.tuned.items()}

    def _make_trainable(self, transformer: torch.nn.Module) -> None:
        """Freezes the model and adds what is trained, which alone requires a gradient afterwards."""
        config = self.config
        check_model(transformer, config)
        self.dtype = transformer.dtype
        self.teacher = GuidedTeacher(config, self.expert) if config.distill_guidance else None
        if self.teacher is not None:
            self.teacher.load_into(transformer)
        if config.anchor_window is not None:
            transformer.set_anchor_window(config.anchor_window)
        transformer.requires_grad_(False)
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets))
        # Only the initial LoRA comes from the global state.
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            transformer.add_adapter(lora, adapter_name=ADAPTER_NAME)

    def _caller(self) -> Callable:
        return self.objective.caller(self.model, self.transformer)

    def train(self) -> dict[str, torch.Tensor]:
        """Runs to the last step and returns the weights to save: name of the parameter -> average."""
        config, accelerator = self.config, self.accelerator
        self._resume()
        if accelerator.is_main_process:
            (self.output / "config.toml").write_text(config.to_toml(), encoding="utf-8")
            (self.output / "rejected_videos.json").write_text(json.dumps(self.clips.rejected, indent=2) + "\n")
        if config.tracker != "none":
            accelerator.init_trackers(self.expert, {k: str(v) for k, v in asdict(config).items()})
        order = BatchOrder(self.clips.shapes, config.batch_size * accelerator.num_processes, config.seed)
        batches = Prefetcher(self.clips, order, accelerator.process_index, config.batch_size)
        bar = tqdm(total=config.steps, initial=self.step, desc=self.expert, disable=not accelerator.is_main_process)
        while self.step < config.steps:
            started = time.perf_counter()
            loss, gradient_norm = self._optimizer_step(batches)
            if not math.isfinite(loss):
                raise ValueError(f"The loss is {loss} at step {self.step}; lower `learning_rate` or `max_grad_norm`.")
            self._log(bar, loss, gradient_norm, time.perf_counter() - started)
            if self.step % config.checkpoint_every == 0 or self.step == config.steps:
                self._save()
            if config.validation_every and self.step % config.validation_every == 0:
                self._validate()
        bar.close()
        batches.close()
        for tracker in accelerator.trackers:
            tracker.finish()
        weights = {name: whole(tensor).cpu() for name, tensor in self.average.items()}
        # The next expert needs the memory.
        self.model, self.optimizer = accelerator.free_memory(self.model, self.optimizer)
        del self.transformer, self.forward, self.tuned, self.average
        return weights

    # -- a step -------------------------------------------------------------------------------------------------------

    def _optimizer_step(self, batches: Prefetcher) -> tuple[float, float]:
        """Returns loss and norm of the gradient, the loss averaged over forwards and processes."""
        config, forwards = self.config, self.config.gradient_accumulation_steps
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for forward in range(forwards):
            number = self.step * forwards + forward
            batch = self._batch(batches, number)
            # Processes exchange gradients once per optimizer step.
            waiting = self.accelerator.no_sync(self.model) if forward < forwards - 1 else contextlib.nullcontext()
            # Autocast narrows a LoRA layer's input in any case. PEFT would widen it to the LoRA's float32 first, and what is
            # narrowed again is a copy: the backward would keep one for every layer, a tenth of what it keeps of Wan.
            with waiting, disable_input_dtype_casting(self.transformer):
                # FSDP leaves it to the caller.
                device = self.accelerator.device.type
                with torch.autocast(device, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
                    loss = self._loss(*batch)
                self.accelerator.backward(loss / forwards)
            losses.append(loss.detach())
        norm = whole(self.accelerator.clip_grad_norm_(self.tuned.values(), config.max_grad_norm))
        self.optimizer.step()
        self.step += 1
        if config.ema_decay:
            decay = min(config.ema_decay, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                averages, weights = ([share(t) for t in tensors.values()] for tensors in (self.average, self.tuned))
                torch._foreach_lerp_(averages, weights, 1 - decay)
        else:
            self.average = {name: p.detach() for name, p in self.tuned.items()}
        return float(self.accelerator.reduce(torch.stack(losses).mean(), "mean")), float(norm)

    def _loss(
        self,
        clean_latents: torch.Tensor,
        prompt_embeds: torch.Tensor,
        negative_embeds: torch.Tensor,
        drawn: Draw,
    ) -> torch.Tensor:
        """Of what [`_batch`] gives."""
        teacher = None
        if self.teacher is not None:
            teacher = functools.partial(self.teacher.predict, self.forward, self.transformer, negative_embeds)
        return draw_loss(self.forward, clean_latents, drawn, prompt_embeds, self.dtype, self.objective, teacher)

    def _batch(self, batches: Prefetcher, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Draw]:
        """Latents, embeddings of prompts and of as many empty (or negative) ones, and draws of forward `number`, on the device."""
        latents, embeds = batches.load(number)
        latents = self.objective.padded(latents)
        first = self.accelerator.process_index * len(latents)
        generators = [
            generator_for("clip", self.config.seed, self.expert, number, first + place)
            for place in range(len(latents))
        ]
        drawn = draw(latents, generators, self.config, self.time_range, self.objective)
        embeds, empty = embeds[:-1], embeds[-1:]
        embeds = torch.where(drawn.drop_prompt[:, None, None], empty, embeds)
        device = self.accelerator.device
        anchors = AnchorLatents(*(getattr(drawn.anchors, k).to(device) for k in ("latents", "strength", "noise")))
        on_device = {k: getattr(drawn, k).to(device) for k in ("noise", "sigmas", "counted", "drop_prompt")}
        empty = empty.to(device).expand_as(embeds)
        return latents.to(device), embeds.to(device), empty, Draw(anchors=anchors, **on_device)

    def _log(self, bar: tqdm, loss: float, gradient_norm: float, seconds: float) -> None:
        if not self.accelerator.is_main_process:
            return
        memory = _memory(self.accelerator.device)
        record = {"step": self.step, "loss": loss, "gradient_norm": gradient_norm, "seconds": seconds, "bytes": memory}
        with open(self.log_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        bar.update(1)
        bar.set_postfix(loss=f"{loss:.4f}", step=f"{seconds:.2f}s", memory=f"{memory / 2**30:.1f}GiB")
        self.accelerator.log({name: record[name] for name in record if name != "step"}, step=self.step)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        # A cosine ends at `steps`; a constant rate does not know where it ends.
        free = FREE_ON_RESUME | ({"steps"} if self.config.learning_rate_schedule == "constant" else set())
        values = {name: value for name, value in asdict(self.config).items() if name not in free}
        more = {"num_processes": self.accelerator.num_processes, "num_clips": len(self.clips)}
        if self.teacher is not None:
            more["teacher"] = self.teacher.digest
        return json.loads(json.dumps(values | more))

    def _save(self) -> None:
        tensors = {f"weights.{name}": p for name, p in self.tuned.items()}
        if self.config.ema_decay:
            tensors |= {f"average.{name}": tensor for name, tensor in self.average.items()}
        for name, parameter in self.tuned.items():
            state = self.optimizer.state[parameter]
            tensors |= {f"optimizer.{key}.{name}": value for key, value in state.items()}
        # Every process has a part in this.
        tensors = {name: whole(tensor) for name, tensor in tensors.items()}
        if self.accelerator.is_main_process:
            metadata = {"step": str(self.step), "settings": json.dumps(self._settings())}
            write_whole(self.checkpoints / f"step_{self.step:08d}.safetensors", tensors, metadata)
            for path in self._saved()[self.config.keep_checkpoints :]:
                path.unlink()
        self.accelerator.wait_for_everyone()

    def _saved(self) -> list[Path]:
        """Checkpoints, the newest first."""
        return sorted(self.checkpoints.glob("step_*.safetensors"), reverse=True)

    def _resume(self) -> None:
        """Continues from the newest checkpoint that is whole.

        Raises:
            `ValueError`: it was made with other settings.
        """
        for path in self._saved():
            whole = read_whole(path)
            if whole is None:
                logger.warning(f"{path} is damaged and is passed over.")
                continue
            tensors, metadata = whole
            self._check_settings(path, json.loads(metadata["settings"]))
            self._restore(tensors)
            self.step = int(metadata["step"])
            break
        if self.accelerator.is_main_process:
            self._cut_log()
        self.accelerator.wait_for_everyone()

    def _check_settings(self, path: Path, found: dict[str, Any]) -> None:
        settings = self._settings()
        differing = {name: (found.get(name), value) for name, value in settings.items() if found.get(name) != value}
        if differing:
            changes = ", ".join(f"{name} {before} to {now}" for name, (before, now) in differing.items())
            raise ValueError(
                f"{path} belongs to a run of other settings (changed: {changes}); change them back, or choose another "
                "`output_dir`."
            )

    @torch.no_grad()
    def _restore(self, tensors: dict[str, torch.Tensor]) -> None:
        kept = sorted({name.split(".")[1] for name in tensors if name.startswith("optimizer.")})
        for name, parameter in self.tuned.items():
            parameter.copy_(sharded_like(parameter, tensors[f"weights.{name}"]))
            # AdamW counts its steps on the CPU.
            self.optimizer.state[parameter] = {
                key: value if key == "step" else sharded_like(parameter, value)
                for key in kept
                for value in [tensors[f"optimizer.{key}.{name}"]]
            }
        if self.config.ema_decay:
            for name, average in self.average.items():
                average.copy_(sharded_like(average, tensors[f"average.{name}"]))
        else:
            self.average = {name: p.detach() for name, p in self.tuned.items()}

    def _cut_log(self) -> None:
        """Takes out what was logged after the checkpoint: those steps are taken again."""
        self.output.mkdir(parents=True, exist_ok=True)
        lines = self.log_path.read_text(encoding="utf-8").splitlines() if self.log_path.exists() else []
        # A kill can cut the last line short.
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= self.step]
        self.log_path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    # -- validation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _validate(self) -> None:
        """Calls `validate` with the averaged weights in place, and puts everything back."""
        if self.accelerator.is_main_process:
            trained = {name: p.detach().clone() for name, p in self.tuned.items()}
            for name, parameter in self.tuned.items():
                parameter.copy_(self.average[name])
            self.transformer.eval()
            folder = self.output / "validation" / f"{self.expert}_step_{self.step:08d}"

            def log(values: dict[str, float]) -> None:
                self.accelerator.log(values, step=self.step)

            def log_frames(name: str, frames: np.ndarray) -> None:
                for tracker in self.accelerator.trackers:
                    tracker.log_images({name: frames}, step=self.step, dataformats="NHWC")

            values = self.transformer, self.expert, self.step, folder, self.config, log, log_frames
            try:
                self.validate(Validation(*values))
            finally:
                self.transformer.train()
                for name, parameter in self.tuned.items():
                    parameter.copy_(trained[name])
        self.accelerator.wait_for_everyone()


def _memory(device: torch.device) -> int:
    """On an accelerator the most bytes that tensors held so far, on the CPU those that the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
