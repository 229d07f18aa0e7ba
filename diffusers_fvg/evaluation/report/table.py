"""Formats the numbers of a report, and writes its Markdown tables."""

from __future__ import annotations

import statistics

from .comparison import Comparison
from .gather import Condition, Gathered
from .statistics import Difference, Spread


MIB = 2**20
STAGES = ("rewrite", "compose", "encode", "denoise", "decode")
SYNTHETIC = "Synthetic: the videos show drawn shapes, and a program scores their pixels. The scores compare with no other benchmark."
PAIRED = (
    "Differences are paired: both have the same prompts and seeds. Brackets hold the 95 % confidence interval of Student's t "
    "over prompts; seeds and samples of a prompt are averaged first."
)


def number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.3f}" if abs(value) < 10 else f"{value:{sign}.2f}"


def spread_text(own: Spread | None) -> str:
    if own is None:
        return "-"
    return number(own.mean) if own.deviation is None else f"{number(own.mean)} ± {number(own.deviation)}"


def difference_text(own: Difference | None) -> str:
    if own is None:
        return ""
    if own.mean == own.low == own.high == 0:
        return "no difference"
    ends = "" if own.low is None or own.high is None else f" [{number(own.low, '+')}, {number(own.high, '+')}]"
    return number(own.mean, "+") + ends


def stage_seconds(condition: Condition) -> dict[str, float]:
    """Returns the median seconds of each stage."""
    return {stage: statistics.median(values) for stage, values in condition.all_seconds.items()}


def stages_of(gathered: Gathered) -> list[str]:
    """Returns the stages for which any condition has seconds, in the order of a run, and the total last."""
    named = {stage for condition in gathered.conditions.values() for stage in condition.all_seconds}
    return (
        [stage for stage in STAGES if stage in named]
        + sorted(named - {*STAGES, "total"})
        + ["total"] * ("total" in named)
    )


def markdown(gathered: Gathered, comparison: Comparison) -> str:
    """Returns the report as Markdown, without images."""
    names = [name for name, own in gathered.conditions.items() if own.scores]
    lines = [f"# {gathered.suite.title}", ""]
    if gathered.suite.synthetic:
        lines += [SYNTHETIC, ""]
    if names:
        lines += _row("category", *names) + _row("---", *["---:"] * len(names))
        for row, spreads in comparison.spreads.items():
            cells = []
            for name in names:
                difference = difference_text(comparison.differences.get(row, {}).get(name))
                cells.append(spread_text(spreads[name]) + (f"<br>{difference}" if difference else ""))
            lines += _row(f"**{row}**" if row == comparison.total else row, *cells)
        others = [name for name in names if name != comparison.baseline]
        seeds = max(len(own.scores) for own in gathered.conditions.values())
        lines.append("")
        lines += [f"± is the standard deviation over {seeds} seeds.", ""] if seeds > 1 else []
        lines += [f"Below each score is its difference from {comparison.baseline}. {PAIRED}", ""] if others else []
    for name, problems in comparison.problems.items():
        lines += [f"{name} has no official total:", "", *(f"* {problem}" for problem in problems), ""]
    for name, notes in comparison.notes.items():
        lines += [f"Notes on {name}:", "", *(f"* {note}" for note in notes), ""]
    stages = stages_of(gathered)
    lines += _row("condition", "videos", *(f"{stage}, s" for stage in stages), "memory, MiB", "missing")
    lines += _row("---", *["---:"] * (len(stages) + 3))
    for name, own in gathered.conditions.items():
        medians = stage_seconds(own)
        seconds = [f"{medians[stage]:.2f}" if stage in medians else "-" for stage in stages]
        memory = f"{own.memory_bytes / MIB:.0f}" if own.memory_bytes else "-"
        lines += _row(name, f"{own.finished} of {own.planned}", *seconds, memory, str(len(own.failures)))
    lines += ["", "Seconds are medians over videos; memory is the most that one process used.", ""]
    return "\n".join(lines)


def _row(*cells: str) -> list[str]:
    return [f"| {' | '.join(cells)} |"]
