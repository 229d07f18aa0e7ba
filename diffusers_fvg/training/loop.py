"""Training loop of one expert. A resumed run gives bit-identical weights.

No random state is stored: data order, noise, noise levels and anchors are functions of seed, expert and step ([`draws`],
[`batches.BatchOrder`]). So a checkpoint holds only the weights, their average and the optimizer's state.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import math
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from diffusers.utils import logging
from peft import LoraConfig
from peft.helpers import disable_input_dtype_casting
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from ..atomic import remove_drafts
from ..lora.anchor_lora import ADAPTER_NAME
from .batches import BatchOrder, Clips, Prefetcher
from .checkpoints import Checkpoints, check_step, check_weights, run_settings
from .config import TrainConfig
from .distillation import GuidedTeacher
from .draws import Draw, draw, draw_loss, generator_for
from .files import naming, write_text_whole
from .initial import start_from
from .low_memory import NF4_BLOCK, checkpoint_blocks, offload_blocks, quantize_base, quantized_layers
from .objectives import FlowMatching, VPrediction
from .optimizers import as_tensors, from_tensors, make_optimizer
from .output import write_intermediate
from .processes import on_main_process, sharded_like, share, whole
from .stopping import StopRequest
from .tracking import Tracking


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Validation:
    """Argument of a validation callable, which runs on the main process.

    Args:
        transformer (`torch.nn.Module`): the expert with the averaged LoRA as adapter `"anchor"`, in evaluation mode. The
            other expert is not loaded.
        expert (`str`): `"transformer"` or `"transformer_2"`.
        step (`int`): number of optimizer steps done.
        folder (`Path`): folder for the videos of this validation; the callable creates it.
        config (`TrainConfig`): config of the run.
        log (`Callable`): `log({"name": number})` sends numbers to the tracker.
        log_video (`Callable`): `log_video("name", path)` sends an mp4 to the tracker.
    """

    transformer: torch.nn.Module
    expert: str
    step: int
    folder: Path
    config: TrainConfig
    log: Callable[[dict[str, float]], None]
    log_video: Callable[[str, Path], None]


Validate = Callable[[Validation], None]


def check_model(transformer: torch.nn.Module, config: TrainConfig) -> None:
    """Checks that each target matches a linear layer, and that the model supports window attention, appended anchors and
    quantization if the config asks for them.

    Raises:
        `ValueError`: the message names the option, or the targets that match nothing and the layers that exist.
    """
    if config.anchor_window is not None and not hasattr(transformer, "set_anchor_window"):
        kind = type(transformer).__name__
        raise ValueError(f"`anchor_window={config.anchor_window}`, but {kind} has no window attention: remove it.")
    if config.anchor_form == "appended" and not hasattr(transformer, "appended_rotary"):
        kind = type(transformer).__name__
        raise ValueError(
            f'`anchor_form="appended"`, but {kind} supports only anchors in latent frames of the clip: remove it.'
        )
    if config.quantize != "none" and not any(True for _ in quantized_layers(transformer, config.quantize)):
        raise ValueError(
            f"`quantize={config.quantize!r}`, but no layer of the transformer has `in_features` that are a multiple of {NF4_BLOCK}: set it to "
            '"fp8" or "none".'
        )
    names = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    unmatched = [
        target for target in config.targets if not any(name == target or name.endswith("." + target) for name in names)
    ]
    if unmatched:
        ends = sorted({re.sub(r"^\w*blocks\.\d+\.", "", name) for name in names})
        raise ValueError(f"`targets` {unmatched} match no linear layer of the transformer; it has {', '.join(ends)}.")


def learning_rate(config: TrainConfig, step: int) -> float:
    """Returns the learning rate of a step, counted from 0."""
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.learning_rate_schedule == "constant":
        return config.learning_rate * warm
    progress = max(0.0, (step - config.warmup_steps) / (config.steps - config.warmup_steps))
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * progress))


class Run:
    """Training run of one expert: model, optimizer, average of the weights, and their files."""

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
        self.log_path = self.output / f"log_{expert}.jsonl"
        self.step = 0

        self._make_trainable(transformer)
        tuned = [p for p in transformer.parameters() if p.requires_grad]
        for parameter in tuned:
            parameter.data = parameter.data.to(accelerator.device, torch.float32)
        if self.teacher is not None:
            self.teacher.start(transformer)
        optimizer = make_optimizer(config, tuned)
        # DDP would broadcast the frozen weights, which every process has loaded itself, and cannot broadcast 8-bit ones.
        frozen = {name for name, p in transformer.named_parameters() if not p.requires_grad}
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(transformer, frozen)
        # Offloaded blocks must stay off the device.
        placement = [not config.block_offload, True]
        self.model, self.optimizer = accelerator.prepare(transformer.train(), optimizer, device_placement=placement)
        self.transformer = accelerator.unwrap_model(self.model)
        self.forward = self._caller()
        # With FSDP these are shards, and so are the average and the optimizer's state.
        self.tuned = {name: p for name, p in self.transformer.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.tuned.items()}
        more = {"num_processes": accelerator.num_processes} | self.origins
        if self.teacher is not None:
            more["teacher"] = self.teacher.digest
        settings = run_settings(config, clips, more)
        self.checkpoints = Checkpoints(self.output / "checkpoints" / expert, config, settings)
        self.stop = StopRequest(accelerator.num_processes)

    def _make_trainable(self, transformer: torch.nn.Module) -> None:
        """Freezes the model and adds the LoRA; afterwards only the LoRA requires a gradient."""
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
            checkpoint_blocks(transformer, config.activation_offload)
        lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets))
        # PEFT initializes the LoRA from the global random state, which is set here and restored.
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            transformer.add_adapter(lora, adapter_name=ADAPTER_NAME)
        self.origins = {}
        if config.initial_lora:
            self.origins["initial"] = start_from(transformer, self.expert, config.initial_lora)
        # Quantized only after the LoRA is added, so that its initial weights do not depend on the base's precision.
        if config.quantize != "none":
            quantize_base(transformer, config.quantize, self.accelerator.device)
        if config.block_offload:
            offload_blocks(transformer, self.accelerator.device)

    def _caller(self) -> Callable:
        return self.objective.caller(self.model, self.transformer)

    def train(self) -> dict[str, torch.Tensor]:
        """Trains to the last step and returns the averaged weights by parameter name."""
        config, accelerator = self.config, self.accelerator
        self._resume()
        on_main_process(accelerator, self._write_facts)
        self.tracking = Tracking(accelerator, config, self.expert)
        together = config.batch_size * accelerator.num_processes
        order = BatchOrder(self.clips.shapes, together, config.seed, self.clips.repeats)
        batches = Prefetcher(self.clips, order, accelerator.process_index, config.batch_size)
        hidden = not accelerator.is_main_process
        with (
            self.stop,
            contextlib.closing(batches),
            tqdm(total=config.steps, initial=self.step, desc=self.expert, disable=hidden) as bar,
        ):
            while self.step < config.steps:
                started = time.perf_counter()
                loss, gradient_norm, stopped = self._optimizer_step(batches)
                self._log(bar, loss, gradient_norm, time.perf_counter() - started)
                due = bool(config.validation_every) and self.step % config.validation_every == 0
                if self.step % config.checkpoint_every == 0 or self.step == config.steps or stopped:
                    self._save()
                if config.lora_every and self.step % config.lora_every == 0:
                    self._write_intermediate()
                if due and not stopped and self._validate():
                    self._save()
                    stopped = True
                if stopped and self.step < config.steps:
                    self._leave()
        self.tracking.close()
        weights = {name: whole(tensor).cpu() for name, tensor in self.average.items()}
        check_weights(f"The LoRA of `{self.expert}`", weights)
        # Frees memory for the next expert.
        self.model, self.optimizer = accelerator.free_memory(self.model, self.optimizer)
        del self.transformer, self.forward, self.tuned, self.average
        # Hooks and offloaded blocks form reference cycles.
        gc.collect()
        return weights

    def _write_facts(self) -> None:
        for folder in (self.output, self.checkpoints.folder):
            if folder.is_dir():
                remove_drafts(folder)
        write_text_whole(self.output / "config.toml", self.config.to_toml())
        write_text_whole(self.output / "rejected_videos.json", json.dumps(self.clips.rejected, indent=2) + "\n")
        self._cut_log()

    def _leave(self) -> None:
        """Ends the process after a checkpoint, with the exit status of the signal."""
        self.tracking.close()
        # This process may not have got the signal itself.
        number = self.stop.signal or signal.SIGTERM
        if self.accelerator.is_main_process:
            logger.warning(
                f"Stopped by {signal.Signals(number).name} after step {self.step} of {self.config.steps}, with a checkpoint; "
                "the same command resumes from there."
            )
        raise SystemExit(128 + number)

    # -- a step -------------------------------------------------------------------------------------------------------

    def _optimizer_step(self, batches: Prefetcher) -> tuple[float, float, bool]:
        """Returns the loss, averaged over forwards and processes, the gradient norm, and whether a process got a stop signal.

        Raises:
            `FloatingPointError`: loss or gradient are broken. The weights are unchanged then.
        """
        config, forwards = self.config, self.config.gradient_accumulation_steps
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for forward in range(forwards):
            number = self.step * forwards + forward
            batch = self._batch(batches, number)
            # Processes synchronize gradients once per optimizer step.
            waiting = self.accelerator.no_sync(self.model) if forward < forwards - 1 else contextlib.nullcontext()
            # PEFT would cast a LoRA layer's input to float32, and autocast back to bfloat16. That makes a copy in every layer,
            # which the backward would keep: a tenth of all that it keeps for Wan.
            with waiting, disable_input_dtype_casting(self.transformer):
                # With FSDP, autocast is up to the caller.
                device = self.accelerator.device.type
                with torch.autocast(device, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
                    loss = self._loss(*batch)
                self.accelerator.backward(loss / forwards)
            losses.append(loss.detach())
        norm = float(whole(self.accelerator.clip_grad_norm_(self.tuned.values(), config.max_grad_norm)))
        # One reduction for both values, because each costs time.
        told = torch.stack([torch.stack(losses).mean(), losses[0].new_tensor(self.stop.signal is not None)])
        loss, stopped = self.accelerator.reduce(told, "mean").tolist()
        check_step(self.step, loss, norm)
        self.optimizer.step()
        self.step += 1
        if config.ema_decay:
            decay = min(config.ema_decay, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                averages, weights = ([share(t) for t in tensors.values()] for tensors in (self.average, self.tuned))
                torch._foreach_lerp_(averages, weights, 1 - decay)
        else:
            self.average = {name: p.detach() for name, p in self.tuned.items()}
        return loss, norm, stopped > 0

    def _loss(
        self,
        clean_latents: torch.Tensor,
        prompt_embeds: torch.Tensor,
        negative_embeds: torch.Tensor,
        drawn: Draw,
    ) -> torch.Tensor:
        """Returns the loss of one forward; takes what [`_batch`] returns."""
        teacher = None
        if self.teacher is not None:
            teacher = functools.partial(self.teacher.predict, self.forward, self.transformer, negative_embeds)
        return draw_loss(self.forward, clean_latents, drawn, prompt_embeds, self.dtype, self.objective, teacher)

    def _batch(self, batches: Prefetcher, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Draw]:
        """Returns latents, prompt embeddings, as many empty or negative ones, and draws of forward `number`, on the device."""
        latents, embeds, pictures = batches.load(number)
        latents = self.objective.padded(latents)
        first = self.accelerator.process_index * len(latents)
        generators = [
            generator_for("clip", self.config.seed, self.expert, number, first + place)
            for place in range(len(latents))
        ]
        drawn = draw(latents, generators, self.config, self.time_range, self.objective, pictures)
        embeds, empty = embeds[:-1], embeds[-1:]
        embeds = torch.where(drawn.drop_prompt[:, None, None], empty, embeds)
        device = self.accelerator.device
        on_device = {k: getattr(drawn, k).to(device) for k in ("noise", "sigmas", "counted", "drop_prompt")}
        empty = empty.to(device).expand_as(embeds)
        drawn = Draw(anchors=drawn.anchors.to(device), **on_device)
        return latents.to(device), embeds.to(device), empty, drawn

    def _log(self, bar: tqdm, loss: float, gradient_norm: float, seconds: float) -> None:
        if not self.accelerator.is_main_process:
            return
        memory = _memory(self.accelerator.device)
        record = {"step": self.step, "loss": loss, "gradient_norm": gradient_norm, "seconds": seconds, "bytes": memory}
        with naming(self.log_path), open(self.log_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        bar.update(1)
        bar.set_postfix(loss=f"{loss:.4f}", step=f"{seconds:.2f}s", memory=f"{memory / 2**30:.1f}GiB")
        values = {name: record[name] for name in record if name != "step"}
        self.tracking.log(values, self.step)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        tensors = {f"weights.{name}": p for name, p in self.tuned.items()}
        if self.config.ema_decay:
            tensors |= {f"average.{name}": tensor for name, tensor in self.average.items()}
        for name, parameter in self.tuned.items():
            state = as_tensors(self.optimizer.state[parameter])
            tensors |= {f"optimizer.{key}.{name}": value for key, value in state.items()}
        # Gathering the shards needs every process.
        tensors = {name: whole(tensor) for name, tensor in tensors.items()}
        on_main_process(self.accelerator, lambda: self.checkpoints.write(self.step, tensors))

    def _write_intermediate(self) -> None:
        average = {name: whole(tensor).cpu() for name, tensor in self.average.items()}
        write = functools.partial(write_intermediate, self.config, self.expert, self.step, average)
        on_main_process(self.accelerator, write)

    def _resume(self) -> None:
        """Resumes from the newest checkpoint that is complete and finite, if there is one."""
        newest = self.checkpoints.newest()
        if newest is not None:
            self.step, tensors = newest
            self._restore(tensors)
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def _restore(self, tensors: dict[str, torch.Tensor]) -> None:
        kept = sorted({name.split(".")[1] for name in tensors if name.startswith("optimizer.")})
        for name, parameter in self.tuned.items():
            parameter.copy_(sharded_like(parameter, tensors[f"weights.{name}"]))
            # AdamW keeps its step count on the CPU. An 8-bit optimizer keeps small tensors in 32 bits, with no quantization maps.
            state = {
                key: value if key == "step" else sharded_like(parameter, value)
                for key in kept
                for value in [tensors.get(f"optimizer.{key}.{name}")]
                if value is not None
            }
            self.optimizer.state[parameter] = from_tensors(self.config, state)
        if self.config.ema_decay:
            for name, average in self.average.items():
                average.copy_(sharded_like(average, tensors[f"average.{name}"]))
        else:
            self.average = {name: p.detach() for name, p in self.tuned.items()}

    def _cut_log(self) -> None:
        """Removes the log lines after the checkpoint, because those steps are repeated."""
        text = self.log_path.read_text(encoding="utf-8") if self.log_path.exists() else ""
        # If the process was killed, the last line may be incomplete.
        lines = [line for line in text.splitlines() if line.endswith("}")]
        kept = "".join(line + "\n" for line in lines if json.loads(line)["step"] <= self.step)
        if kept != text:
            write_text_whole(self.log_path, kept)

    # -- validation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _validate(self) -> bool:
        """Calls `validate` with the averaged weights and restores the trained ones; returns whether the run must stop."""

        def call() -> bool:
            if self.stop.signal is not None:
                return True
            trained = {name: p.detach().clone() for name, p in self.tuned.items()}
            for name, parameter in self.tuned.items():
                parameter.copy_(self.average[name])
            self.transformer.eval()
            try:
                with self.stop.interrupting():
                    assert self.validate is not None
                    self.validate(self._validation())
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                logger.warning(
                    f"The validation of step {self.step} failed, and training continues: {reason}", exc_info=True
                )
            finally:
                self.transformer.train()
                for name, parameter in self.tuned.items():
                    parameter.copy_(trained[name])
            return self.stop.signal is not None

        return on_main_process(self.accelerator, call)

    def _validation(self) -> Validation:
        folder = self.output / "validation" / f"{self.expert}_step_{self.step:08d}"
        log, log_video = (
            functools.partial(call, step=self.step) for call in (self.tracking.log, self.tracking.log_video)
        )
        return Validation(self.transformer, self.expert, self.step, folder, self.config, log, log_video)


def _memory(device: torch.device) -> int:
    """Returns the peak memory of tensors on a GPU, or without one the current memory of the process, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
