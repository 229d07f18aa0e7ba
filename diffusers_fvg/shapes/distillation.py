"""Measures which sampling steps need guidance once an anchor fixes the composition, and a guidance-distilled LoRA. All numbers
are synthetic."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..lora.anchor_lora import ADAPTER_NAME
from ..schedules.presets import SchedulerPreset, SchedulerPresets
from .ablation import WEIGHT_FILE
from .held_out import split_scenes
from .report import provenance
from .study import Cell, FirstFrames, Journal, complete, journal_header
from .summary import summarize


INPUTS = ("factorized", "true_anchor")
# Target: most that the synthetic average may lose with one forward per step instead of two.
LARGEST_LOSS = 0.02


@dataclass(frozen=True)
class Guiding:
    """One way of guidance.

    Args:
        first, last (`int`): first and last step with an unconditional forward, counted from 1; 0 and 0 for none.
        distilled (`bool`): whether the guidance-distilled LoRA is used, at scale 1.
    """

    first: int
    last: int
    distilled: bool = False

    @property
    def extra_forwards(self) -> int:
        return self.last - self.first + 1 if self.last else 0

    def name(self, steps: int) -> str:
        if self.distilled:
            return "no guidance, distilled LoRA"
        if not self.last:
            return "no guidance"
        return "all steps" if self.extra_forwards == steps else f"steps {self.first} to {self.last}"

    def interval(self, preset: SchedulerPreset, steps: int) -> tuple[float, float]:
        """Returns the guidance interval of these steps, in sigmas. Its ends are between two steps, as schedulers round sigmas."""
        sigmas = (1.0, *preset.steps(steps), 0.0)
        between = [(before + after) / 2 for before, after in zip(sigmas, sigmas[1:])]
        return (0.0 if self.last == steps else between[self.last]), between[self.first - 1]


def guidings(steps: int) -> tuple[Guiding, ...]:
    """Returns the ways of guidance: at all steps; at the first third, half and two thirds; at the last two thirds and third; at
    the middle third; and at no step, without and with the distilled LoRA."""
    third, half = steps // 3, (steps + 1) // 2
    parts = ((1, steps), (1, third), (1, half), (1, 2 * third), (third + 1, steps), (2 * third + 1, steps))
    middle = Guiding(third + 1, 2 * third)
    return (*(Guiding(*part) for part in parts), middle, Guiding(0, 0), Guiding(0, 0, distilled=True))


@contextmanager
def guided_within(pipe, interval: tuple[float, float]) -> Iterator[None]:
    """Context manager in which all presets have this guidance interval, in sigmas."""
    before = pipe.schedulers
    pipe.schedulers = SchedulerPresets.of(
        *(replace(preset, guidance_interval=interval) for preset in pipe.presets.values())
    )
    try:
        yield
    finally:
        pipe.schedulers = before


def table(rows: Sequence[dict]) -> str:
    """Formats one line for each way of guidance: forwards per video, and for every input score, loss of score against the first
    row, motion, kept share and seconds."""
    values = {"score": "score", "loses": "loses", "motion": "motion", "kept": "kept", "seconds": "seconds"}
    titles = [f"{arm} {title}" for arm in INPUTS for title in values]
    width = max(len(title) for title in titles) + 2
    lines = [f"{'synthetic, guidance at':30s}{'forwards':>9s}" + "".join(f"{title:>{width}s}" for title in titles)]
    for row in rows:
        cells = "".join(f"{row['inputs'][arm][key]:{width}.3f}" for arm in INPUTS for key in values.values())
        lines.append(f"{row['guidance at']:30s}{row['forwards']:9d}{cells}")
    return "\n".join(lines)


def write_guidance_report(
    pipe,
    folder: Path,
    distilled: Path,
    per_category: int = 9,
    seeds: int = 2,
    steps: int = 15,
    batch_size: int = 16,
    ways: Sequence[Guiding] | None = None,
) -> str:
    """Scores every way of guidance; writes `folder/guidance.json` and `folder/guidance.txt` and returns the table.

    All rows use the scale of the pipeline's preset and the same prompts, anchors and noise.

    Args:
        pipe (`FactorizedVideoPipeline`): model to score; the distilled LoRA is loaded as a further adapter.
        folder (`Path`): folder for the files, and for the records, from which a later call continues.
        distilled (`Path`): folder with the `pytorch_lora_weights.safetensors` of a LoRA into which the preset's guidance is
            distilled.
        per_category (`int`): held-out prompts of each of the seven categories.
        seeds (`int`): videos of each prompt, input and way.
        steps (`int`): sampling steps.
        ways (`Sequence[Guiding]`, *optional*): ways of guidance, the others being compared with the first; left out, those of
            [`guidings`].

    Raises:
        `ValueError`: the folder has no weights.
    """
    if not (distilled / WEIGHT_FILE).is_file():
        raise ValueError(f"No {WEIGHT_FILE} in {distilled}, the folder of the distilled LoRA.")
    digest = hashlib.sha256((distilled / WEIGHT_FILE).read_bytes()).hexdigest()[:16]
    scenes, _ = split_scenes(per_category, 4)
    journal = Journal(folder / "guidance.jsonl", journal_header(pipe, reported=scenes))
    adapter_name, preset = f"lora_{digest}", pipe.presets.matching(pipe.scheduler)
    pipe.load_lora_weights(distilled, adapter_name=adapter_name)
    pipe.set_adapters(ADAPTER_NAME, 1.0)
    first_frames, rows = FirstFrames(pipe, scenes), []
    for way in ways or guidings(steps):
        scale = preset.guidance_scale if way.last else 1.0
        options = {"guidance": scale, "lora": adapter_name if way.distilled else None}
        name = way.name(steps)
        cells = [Cell(f"guidance at {name}", arm, steps, **options) for arm in INPUTS]
        with guided_within(pipe, way.interval(preset, steps) if way.last else (0.0, 1.0)):
            records = complete(pipe, cells, first_frames, range(seeds), journal, batch_size)
        inputs = {row.pop("arm"): row for row in summarize(records)}
        for arm, values in inputs.items():
            best = rows[0]["inputs"][arm]["score"] if rows else values["score"]
            values["loses"] = round(best - values["score"], 4)
        rows.append({"guidance at": name, "scale": scale, "forwards": steps + way.extra_forwards, "inputs": inputs})
    worst = max(
        values["loses"] for row in rows if "distilled" in row["guidance at"] for values in row["inputs"].values()
    )
    verdict = "met" if worst <= LARGEST_LOSS else "MISSED"
    text = f"{table(rows)}\n\nthe distilled LoRA loses at most {worst:.3f}, target {LARGEST_LOSS}: {verdict}"
    report = {"synthetic": True, "made_with": provenance(pipe), "distilled": digest, "seeds": seeds, "rows": rows}
    (folder / "guidance.json").write_text(json.dumps(report) + "\n")
    (folder / "guidance.txt").write_text(text + "\n")
    return text
