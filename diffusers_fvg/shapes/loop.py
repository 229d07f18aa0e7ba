"""The training loop of all parts of the shapes model: resumable, with a moving average of the weights, on any device."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


def training_device() -> torch.device:
    """Returns the accelerator of this machine, or the CPU if it has none."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def train(
    folder: Path,
    name: str,
    steps: int,
    modules: dict[str, torch.nn.Module],
    make_optimizers: Callable[[], list[torch.optim.Optimizer]],
    loss_of: Callable[[int], tuple[str, torch.Tensor]],
    peak: float,
    decay: float = 0.999,
    warmup: int = 100,
    log_every: int = 50,
    save_every: int = 100,
) -> None:
    """Trains the parameters that require a gradient, and leaves their moving average in `modules`.

    Args:
        folder (`Path`): folder for `<name>.ckpt`, from which a later call resumes, and `<name>_log.jsonl`.
        name (`str`): name of the part.
        steps (`int`): number of steps in all. A step's random state depends on its number only.
        modules (`dict`): modules by name; moved to the training device and, at the end, back to the CPU.
        make_optimizers (`Callable`): called after the modules are moved; returns the optimizers.
        loss_of (`Callable`): takes a step's number; returns the kind of batch, under which the loss is logged, and the loss.
        peak (`float`): learning rate after `warmup` steps; a cosine lowers it to 1/50 at the end.
        decay (`float`): decay of the moving average, which starts from `(1 + step) / (10 + step)`.
        warmup, log_every, save_every (`int`): steps of linear warm-up, between log lines and between checkpoints.
    """
    for module in modules.values():
        module.to(training_device())
    tuned = {
        f"{key}.{n}": p for key, module in modules.items() for n, p in module.named_parameters() if p.requires_grad
    }
    average = {key: p.detach().clone() for key, p in tuned.items()}
    solvers, step, checkpoint, log = make_optimizers(), 0, folder / f"{name}.ckpt", folder / f"{name}_log.jsonl"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=training_device())
        for key, p in tuned.items():
            p.data.copy_(state["weights"][key])
        average, step = state["average"], state["step"]
        for solver, solver_state in zip(solvers, state["optimizers"]):
            solver.load_state_dict(solver_state)
    if log.exists():
        # Steps after the checkpoint are repeated, so their lines are removed.
        lines = log.read_text().splitlines(keepends=True)
        log.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
    recent: dict[str, list[torch.Tensor]] = {}
    started, since = time.perf_counter(), step
    while step < steps:
        progress = max(0.0, (step - warmup) / max(1, steps - warmup))
        rate = peak * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        torch.manual_seed(1_000_003 * step + 17)
        kind, loss = loss_of(step)
        for solver in solvers:
            solver.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tuned.values(), 1.0)
        for solver in solvers:
            for group in solver.param_groups:
                group["lr"] = rate
            solver.step()
        step += 1
        with torch.no_grad():
            weight = 1 - min(decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in tuned.values()], weight)
        recent.setdefault(kind, []).append(loss.detach())
        if step % log_every == 0:
            record = {"step": step, "seconds_per_step": (time.perf_counter() - started) / (step - since)}
            record |= {f"loss_{kind}": torch.stack(losses).mean().item() for kind, losses in recent.items()}
            with open(log, "a") as file:
                file.write(json.dumps(record) + "\n")
            recent, started, since = {}, time.perf_counter(), step
        if step % save_every == 0 or step == steps:
            state = {"weights": {k: p.detach() for k, p in tuned.items()}, "average": average, "step": step}
            torch.save(state | {"optimizers": [s.state_dict() for s in solvers]}, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    for key, p in tuned.items():
        p.data.copy_(average[key])
    for module in modules.values():
        module.to("cpu").eval()


def trained(folder: Path, name: str, points: int = 20) -> dict[str, Any]:
    """Summarizes a part's log: steps, seconds, and about `points` points `[step, loss]` of the loss curve of each kind."""
    records = [json.loads(line) for line in (folder / f"{name}_log.jsonl").read_text().splitlines()]
    gaps = np.diff([0, *(record["step"] for record in records)])
    seconds = sum(gap * record["seconds_per_step"] for gap, record in zip(gaps, records))
    curves: dict[str, list] = {}
    for record in records[:: -max(1, len(records) // points)][::-1]:
        for key, value in record.items():
            if key.startswith("loss_"):
                curves.setdefault(key, []).append([record["step"], round(value, 4)])
    return {"steps": records[-1]["step"], "seconds": round(float(seconds)), **curves}
