"""Output of `fvg plan`: what a call would need, computed from a pipeline without weights."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelCard, try_to_load_from_cache

from .embedded import EMBEDDED_FOLDER
from .loading.files import repository_files
from .overview import GIB, NOT_KNOWN, PLACED, weight_files
from .pipelines.profiles import CARDS, MemoryPlan, Stage, plan_memory
from .publishing.parts import PARTS_NAME
from .recipes import STORED
from .recipes.sources import ModelSource


if TYPE_CHECKING:
    from .pipelines.request import VideoRequest
    from .pipelines.stages import FactorizedStages


def plan_text(
    source: ModelSource,
    outline: FactorizedStages,
    request: VideoRequest,
    stages: Sequence[Stage],
    memory: MemoryPlan | None,
    parts: dict[str, Any],
    variant: str | None = None,
) -> str:
    """Returns model, licences, video, forward passes, memory and downloads of a call; 80 columns.

    Args:
        source ([`ModelSource`]): source of the model.
        outline ([`FactorizedStages`]): the pipeline without weights.
        request ([`VideoRequest`]): arguments of the call, with defaults filled in.
        stages (sequence of [`Stage`]): memory that each part needs.
        memory ([`MemoryPlan`], *optional*): plan for one GPU; when left out, GPUs of several sizes are listed.
        parts (`dict`): composer, rewriter and LoRA that the user chose instead of the model's.
        variant (`str`, *optional*): variant of the weight files, such as `"fp16"`.
    """
    lines = [f"model      {_title(source)}: {type(outline).__name__}"]
    lines += [f"licence    {part}: {name}" for part, name in _licenses(source, outline).items()]
    recipe = source.recipe
    is_missing = recipe is not None and not (recipe.lora or parts.get("lora") or recipe.keeps_first_frame)
    if is_missing and request.mode != "direct":
        lines.append("           needs an anchor LoRA, and none is published: give --lora")
    rate = outline.call_defaults["frame_rate"]
    lines.append(
        f"video      {request.num_frames} frames at {rate} per second, {request.height} x {request.width} (height x width)"
    )
    lines += [*_forwards(outline, request), *_memory(stages, memory), *_downloads(source, parts, variant)]
    return "\n".join(lines)


def _title(source: ModelSource) -> str:
    if source.folder == EMBEDDED_FOLDER:
        return "the embedded shapes model"
    return source.folder.resolve().name if source.repository is None and source.folder is not None else source.name


def _licenses(source: ModelSource, outline: FactorizedStages) -> dict[str, str]:
    if source.recipe is not None:
        return source.recipe.licenses
    if source.folder == EMBEDDED_FOLDER:
        return {"all": "Apache-2.0, as this package"}
    assert source.folder is not None
    if (source.folder / PARTS_NAME).is_file():
        records = json.loads((source.folder / PARTS_NAME).read_text(encoding="utf-8"))
        return {part: record["license"] for part, record in records.items()}
    if (source.folder / "README.md").is_file():
        data = ModelCard.load(source.folder / "README.md", ignore_metadata_errors=True).data
        if data.get("license"):
            return {"all": data.get("license_name") or data.get("license")}
    if outline.facts is not None:
        license = outline.facts.license
        return {"base": license.name or license.id}
    return {"all": "not stated"}


def _forwards(outline: FactorizedStages, request: VideoRequest) -> list[str]:
    if getattr(outline, "animator", None) is not None:
        return _animator_steps(outline, request)
    sampling, scheduler = request.sampling(outline), request.make_scheduler(outline, torch.device("cpu"))
    times = scheduler.timesteps.tolist()
    windows = outline._windows(request.num_frames)[0] if hasattr(outline, "_windows") else 1
    name = "the model's own scheduler" if sampling is None else sampling.name
    lines = [f"sampling   {name}: {len(times)} steps" + f", {windows} windows" * (windows > 1)]
    scale = request.guidance_scale
    if scale is None and sampling is not None:
        scale = sampling.guidance_scale
    sigmas = getattr(scheduler, "sigmas", None)
    sigmas = [1.0] * len(times) if sigmas is None else [float(sigma) for sigma in sigmas]
    low, high = (0.0, 1.0) if sampling is None else sampling.guidance_interval
    boundary = (outline.config.get("boundary_ratio") or -math.inf) * scheduler.config.num_train_timesteps
    counts: Counter[str] = Counter()
    for time, sigma in zip(times, sigmas):
        guided = (scale is None or scale > 1) and low <= sigma <= high
        counts["high noise" if time >= boundary else "low noise"] += (1 + guided) * windows
    total = f"{sum(counts.values())} of the video model"
    if len(counts) > 1:
        total += " (" + ", ".join(f"{count} of the {name} expert" for name, count in counts.items()) + ")"
    lines.append(f"forwards   {total}")
    return lines


def _animator_steps(outline: FactorizedStages, request: VideoRequest) -> list[str]:
    sampling, family = request.sampling(outline), outline.animator.family.name
    own = outline.animator.num_inference_steps if sampling is None else sampling.num_inference_steps
    name = "the model's own scheduler" if sampling is None else sampling.name
    steps = f"sampling   {name}: {request.num_inference_steps or own} steps"
    return [steps, f"family     {family}: activation memory is an allowance, not computed"]


def _memory(stages: Sequence[Stage], memory: MemoryPlan | None) -> list[str]:
    lines = ["memory     GiB, computed, not measured:"]
    if memory is None:
        for card in CARDS:
            try:
                plan = plan_memory(stages, card)
                lines.append(f"  {card:8} {_way(plan)}, peak {plan.peak / GIB:.1f}")
            except ValueError:
                lines.append(f"  {card:8} too large")
        memory = MemoryPlan("", 0, "none", False, tuple(stages))
    else:
        lines.append(f"  {memory.profile:8} {_way(memory)}, peak {memory.peak / GIB:.1f}")
    host = sum(stage.weights for stage in stages) / GIB
    lines.append(f"  with stages or layers, all weights are also in CPU memory: {host:.1f}")
    width = max(16, *(len(stage.name) for stage in stages))
    lines.append(f"  {'part':{width}} {'weights':>8} {'works in':>9}")
    for stage in stages:
        working = stage.tiled if memory.tile and stage.tiled is not None else stage.working
        lines.append(f"  {stage.name:{width}} {stage.weights / GIB:8.1f} {working / GIB:9.1f}")
    return lines


def _way(plan: MemoryPlan) -> str:
    return f"{PLACED[plan.offload]}{', decode in tiles' * plan.tile}"


def _downloads(source: ModelSource, parts: dict[str, Any], variant: str | None) -> list[str]:
    lines, total, is_all = [], 0, True
    for (repository, revision), subfolders in _repositories(source, parts).items():
        try:
            commit, files = repository_files(repository, revision)
        except OSError:
            size, is_all = STORED.get(repository), False
            total += size or 0
            lines.append(
                f"  {NOT_KNOWN if size is None else f'{size / 1e9:.1f}':>7}  {repository} (the Hub does not answer)"
            )
            continue
        names = [name for name in weight_files(files, variant) if not subfolders or name.split("/")[0] in subfolders]
        missing = [
            name for name in names if not isinstance(try_to_load_from_cache(repository, name, revision=commit), str)
        ]
        size, there = (sum(files[name]["size"] for name in group) for group in (missing, set(names) - set(missing)))
        total += size
        lines.append(f"  {size / 1e9:7.1f}  {repository}" + f", {there / 1e9:.1f} more are here" * bool(there))
    return [f"download   {'at least ' * (not is_all)}{total / 1e9:.1f} GB of weights" + ":" * bool(lines), *lines]


def _repositories(source: ModelSource, parts: dict[str, Any]) -> dict[tuple[str, str | None], set[str]]:
    """Maps each (repository, revision) with weights to the folders used from it; an empty set means all folders."""
    found: dict[tuple[str, str | None], set[str]] = {}
    named = {part: value for part, value in parts.items() if value is not None}
    if source.recipe is not None:
        own = {part: name for part, name in source.recipe.repositories.items() if part not in named}
        found = {(name, None): set() for name in own.values()}
    elif source.repository is not None:
        # The folder of a component that is loaded from another repository holds no weights.
        kept = {name for name, entry in source.index.items() if isinstance(entry, list) and entry[1] is not None}
        found[source.repository, source.commit] = kept - named.keys()
    for part in source.index:
        assert source.folder is not None
        folder = source.folder / part
        for name, repository, subfolder in (
            ("reference.json", "repository", "subfolder"),
            ("animator_config.json", "repository", None),
            ("composer_config.json", "repository", None),
            ("rewriter_config.json", "model", None),
            ("judge_config.json", "model", None),
        ):
            if part not in named and (folder / name).is_file():
                values = json.loads((folder / name).read_text(encoding="utf-8"))
                if repository in values:
                    inside = found.setdefault((values[repository], values.get("revision")), set())
                    inside |= {values[subfolder]} if subfolder and values.get(subfolder) else set()
    for value in named.values():
        if isinstance(value, str) and not Path(value).exists():
            repository, _, revision = value.partition("@")
            found[repository, revision or None] = set()
    return found
