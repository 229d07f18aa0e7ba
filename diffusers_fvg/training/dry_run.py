"""Dry run of a training: reports what a run would do, from the config, the headers of files and the model's configs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import Linear

from .checkpoints import Checkpoints
from .config import TrainConfig
from .data import model_folder
from .draws import drawn_times
from .dreamer_config import DreamerConfig
from .estimate import clip_tokens, estimated_host_memory, estimated_memory, estimated_operations
from .families import CogVideoX, Wan, family_of
from .loop import check_model
from .metadata import Example, read_examples
from .trainer import sigma_ranges
from .videos import plan_clips


GIB = 2**30
# Dense bfloat16 operations per second of an H100 SXM, from the NVIDIA H100 data sheet.
H100_PEAK = 989e12
BINS, BAR = 10, 40


def dry_run(config: TrainConfig) -> str:
    """Returns a text about a run: buckets with counts, rejected files, tokens, steps, memory, duration, targets, noise times.

    No weight is loaded, and nothing is encoded or written. Only the first frame of each video is decoded, so damage after it
    is not found.

    Args:
        config ([`TrainConfig`]): config of the run.

    Raises:
        `ValueError`: the captions are not valid, the model cannot be trained, or `targets` match no layer.
    """
    folder = model_folder(config, weights=False)
    family = family_of(config, folder)
    check_model(family.empty, config)
    boundary = json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get("boundary_ratio")
    clips, rejected = planned(config, read_examples(config))

    def tokens(bucket: tuple[int, int, int]) -> int:
        return clip_tokens(config, bucket, family.patch, *family.strides)

    unit = "tokens at the most" if config.anchor_form == "appended" else "tokens"
    parts = [
        data_part(config, tokens, unit, clips, rejected),
        steps_part(config, clips),
        _cost_part(config, family),
        _targets_part(config, family),
        *(_times_part(config, expert, sigma_ranges(boundary)[expert]) for expert in config.experts),
    ]
    return "\n\n".join("\n".join(part) for part in parts)


def planned(config: TrainConfig | DreamerConfig, examples: list[Example]) -> tuple[list[tuple], dict[str, str]]:
    """Returns bucket and repeats of each clip, and the reason for each file that cannot be used."""
    clips, rejected = [], {}
    for example in examples:
        try:
            plan = plan_clips(example.path, config, example.buckets)
        except (ValueError, OSError) as error:
            rejected[str(example.path)] = str(error)
            continue
        clips += [(plan.bucket, example.repeats)] * len(plan.clips)
    return clips, rejected


def data_part(
    config: TrainConfig | DreamerConfig,
    size_of: Callable[[tuple[int, int, int]], int],
    unit: str,
    clips: list[tuple],
    rejected: dict[str, str],
) -> list[str]:
    """Returns lines about the buckets, with counts and sizes, and about the rejected files.

    Args:
        size_of (`Callable`): returns the size of a bucket's clip, in `unit`.
        clips, rejected: output of [`planned`].
    """
    counts: Counter[tuple] = Counter()
    repeated: Counter[tuple] = Counter()
    for bucket, repeats in clips:
        counts[bucket] += 1
        repeated[bucket] += repeats
    lines = [f"Buckets (frames x height x width: clips, in an epoch, {unit} of a step):"]
    for bucket in config.all_buckets:
        size = "x".join(map(str, bucket))
        of_a_step = config.batch_size * size_of(bucket)
        lines.append(f"  {size:>14}: {counts[bucket]:6} {repeated[bucket]:8g} {of_a_step:9,}")
    lines.append(f"Rejected files: {len(rejected)}")
    return lines + [f"  {path}: {reason}" for path, reason in sorted(rejected.items())]


def steps_part(config: TrainConfig | DreamerConfig, clips: list[tuple]) -> list[str]:
    """Returns lines about steps, epochs and existing checkpoints."""
    a_step = config.batch_size * config.gradient_accumulation_steps
    epoch = sum(repeats for _, repeats in clips)
    lines = [f"Steps: {config.steps} of {a_step} clips on each process, {len(config.experts)} expert(s)"]
    if epoch:
        lines.append(f"  {config.steps * a_step / epoch:.1f} epochs of {epoch:g} clips on one process")
    for expert in config.experts:
        saved = Checkpoints(Path(config.output_dir) / "checkpoints" / expert, config, {}).saved()
        if saved:
            lines.append(f"  {expert}: {saved[0].name} is there, from which the run would resume")
    return lines


def _cost_part(config: TrainConfig, family: Wan | CogVideoX) -> list[str]:
    spatial, temporal = family.strides
    shape = family.empty.config
    memory = estimated_memory(config, dict(shape), spatial, temporal)
    lines = [f"Memory, computed: {sum(memory.values()) / GIB:.2f} GiB, and about 2 for allocator and libraries"]
    lines += [f"  {name:14} {size / GIB:8.2f} GiB" for name, size in memory.items()]
    host = estimated_host_memory(config, dict(shape), spatial, temporal)
    if host:
        lines.append(f"In CPU memory, pinned for the device: {sum(host.values()) / GIB:.2f} GiB")
        lines += [f"  {name:14} {size / GIB:8.2f} GiB" for name, size in host.items()]
    width = shape.num_attention_heads * shape.attention_head_dim
    sizes = (family.empty.num_parameters(), width, shape.num_layers, family.patch, spatial, temporal)
    operations = len(config.experts) * estimated_operations(config, *sizes)
    hours = operations / H100_PEAK / 3600
    lines.append(
        f"Time, computed for the largest bucket: {operations:.3g} operations, at least {hours:.2g} hours of one H100, "
        f"at its peak of {H100_PEAK / 1e12:.0f} TFLOP/s"
    )
    return lines + measured_time(config)


def measured_time(config: TrainConfig | DreamerConfig) -> list[str]:
    """Returns lines about the time per step in the logs of an earlier run in `output_dir`."""
    lines = []
    for expert in config.experts:
        log = Path(config.output_dir) / f"log_{expert}.jsonl"
        seconds = [json.loads(line)["seconds"] for line in log.read_text().splitlines()] if log.is_file() else []
        if seconds:
            usual = float(torch.tensor(seconds).median())
            lines.append(
                f"  {expert}: {usual:.3g} s a step in its log, {usual * config.steps / 3600:.2g} hours for all steps"
            )
    return lines


def _targets_part(config: TrainConfig, family: Wan | CogVideoX) -> list[str]:
    linears = {name: module for name, module in family.empty.named_modules() if isinstance(module, Linear)}
    lines, total = [], 0
    for target in config.targets:
        found = [module for name, module in linears.items() if name == target or name.endswith(f".{target}")]
        size = config.rank * sum(module.in_features + module.out_features for module in found)
        lines.append(f"  {target:20} {len(found):5} layers {size:13,} parameters")
        total += size
    return [f"Targets, of rank {config.rank}: {total:,} parameters for each expert", *lines]


def _times_part(config: TrainConfig, expert: str, time_range: tuple[float, float]) -> list[str]:
    """Returns a histogram of the training times."""
    # Midpoints of 10,000 equal intervals of quantiles.
    times = drawn_times((torch.arange(10_000) + 0.5) / 10_000, config, time_range)
    return histogram(f"Times of {expert}, 1 is the time of pure noise (share of the draws):", times)


def histogram(title: str, values: torch.Tensor) -> list[str]:
    """Returns a histogram of values in [0, 1] as lines, one for each tenth."""
    shares, lines = torch.histc(values.float(), BINS, 0, 1) / len(values), [title]
    for number, share in enumerate(shares.tolist()):
        bar = "#" * round(BAR * share / float(shares.max()))
        lines.append(f"  {number / BINS:.1f} to {(number + 1) / BINS:.1f} {share:6.1%} {bar}")
    return lines
