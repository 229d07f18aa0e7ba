"""Draws the study's figures as PNG files. Needs matplotlib (`pip install diffusers-fvg[report]`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .prompts import CATEGORIES


# Okabe and Ito's palette, which colour-blind readers can tell apart. An arm has the same colour in all figures.
COLOURS = {
    "direct": "#D55E00",
    "direct_rewritten": "#E69F00",
    "factorized": "#0072B2",
    "factorized_judged": "#332288",
    "true_caption": "#56B4E9",
    "true_anchor": "#009E73",
    "true_middle": "#66C2A5",
    "true_last": "#A6D96A",
    "true_anchor_no_lora": "#888888",
}
SWEPT = ("direct", "direct_rewritten", "factorized", "true_anchor")

# Colour and line style of each series in the figure about few clips.
# Series of `plot_clips`: label, colour, line and whether its spread over seeds is drawn.
CLIPS_SERIES = {
    "direct, 50 steps": ("direct, 50 steps", COLOURS["direct"], "-", True),
    "direct, 15 steps": ("direct, 15 steps", COLOURS["direct"], ":", False),
    "factorized, 15 steps": ("factorized, 15 steps", COLOURS["factorized"], "-", True),
    "true anchor, 15 steps": ("true anchor, 15 steps", COLOURS["true_anchor"], "--", False),
    "Dreamer": ("Dreamer, 10 steps", "#CC79A7", "-", False),
    "Dreamer, true first frame": ("Dreamer, true first frame", "#CC79A7", "--", False),
}


def _label(arm: str) -> str:
    return arm.replace("_", " ").replace("no lora", "without LoRA")


def _steps_axis(axes: Axes, rows: Sequence[dict]) -> None:
    steps = sorted({row["steps"] for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(steps, [str(number) for number in steps])
    axes.minorticks_off()
    axes.set_xlabel("sampling steps")
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def _lines(axes: Axes, rows: Sequence[dict], value: str, error: str | None = None) -> None:
    for arm in SWEPT:
        chosen = sorted(
            (row for row in rows if row["arm"] == arm and row[value] is not None), key=lambda r: r["steps"]
        )
        if not chosen:
            continue
        steps, values = [row["steps"] for row in chosen], [row[value] for row in chosen]
        style = {"linestyle": "--"} if arm == "true_anchor" else {}
        axes.plot(steps, values, marker="o", color=COLOURS[arm], label=_label(arm), **style)
        if error is not None and all(row[error] is not None for row in chosen):
            low, high = ([row[value] + sign * row[error] for row in chosen] for sign in (-1, 1))
            axes.fill_between(steps, low, high, color=COLOURS[arm], alpha=0.15, linewidth=0)
    shown = [row[value] for row in rows if row["arm"] in SWEPT and row[value] is not None]
    axes.set_ylim(0, 1.12 * max(shown) if shown and max(shown) > 0 else 1)
    _steps_axis(axes, rows)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)


def plot_steps(rows: Sequence[dict], path: Path) -> None:
    """Plots score and spread over seeds against the number of steps."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    score, spread = figure.subplots(1, 2)
    _lines(score, rows, "score", "standard_error")
    score.set_ylim(0, 1.02)
    score.set_ylabel("synthetic score, mean of seven categories")
    score.set_title("Score (band: one standard error over prompts)", fontsize=10)
    _lines(spread, rows, "spread")
    spread.set_ylabel("standard deviation of the score")
    spread.set_title("Spread over seeds, mean over prompts", fontsize=10)
    figure.legend(*score.get_legend_handles_labels(), frameon=False, ncols=len(SWEPT), loc="outside lower center")
    figure.suptitle("Synthetic shapes world: fewer sampling steps, held-out prompts")
    _save(figure, path)


def plot_motion(rows: Sequence[dict], path: Path) -> None:
    """Plots the motion amount against the number of steps."""
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    _lines(axes, rows, "motion")
    axes.set_ylabel("mean path of an object, fraction of the frame")
    axes.set_title("Synthetic shapes world: motion amount, held-out prompts", fontsize=11)
    figure.legend(frameon=False, ncols=len(SWEPT), loc="outside lower center", fontsize=9)
    _save(figure, path)


def plot_categories(rows: Sequence[dict], steps: int, path: Path) -> None:
    """Plots the score per category at one number of steps, with one bar per arm."""
    chosen = [row for row in rows if row["steps"] == steps]
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    axes = figure.subplots()
    names = [*CATEGORIES, "mean"]
    width = 0.84 / len(chosen)
    for number, row in enumerate(chosen):
        values = [row["categories"][name]["score"] for name in CATEGORIES] + [row["score"]]
        places = [position + (number - (len(chosen) - 1) / 2) * width for position in range(len(names))]
        axes.bar(places, values, width, color=COLOURS[row["arm"]], label=_label(row["arm"]))
    axes.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names])
    axes.axvline(len(CATEGORIES) - 0.5, color="0.8", linewidth=1)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("synthetic score")
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"Synthetic shapes world: score per category at {steps} steps, held-out prompts", fontsize=11)
    figure.legend(frameon=False, ncols=min(5, len(chosen)), loc="outside lower center", fontsize=9)
    _save(figure, path)


def plot_clips(rows: Sequence[dict], path: Path) -> None:
    """Plots the score against the number of distinct clips, with its standard error over prompts.

    Args:
        rows (`Sequence[dict]`): rows with `series` (a key of `CLIPS_SERIES`), `clips`, `score`, `standard_error` and `spread`.
            Rows with `embedded` are drawn as separate points without a line.
        path (`Path`): PNG file to write.
    """
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for series, (label, colour, style, with_spread) in CLIPS_SERIES.items():
        own = sorted((row for row in rows if row["series"] == series), key=lambda row: row["clips"])
        curve = [row for row in own if not row.get("embedded")]
        clips, scores = [row["clips"] for row in curve], [row["score"] for row in curve]
        errors = [row["standard_error"] or 0.0 for row in curve]
        axes.errorbar(clips, scores, errors, marker="o", capsize=3, color=colour, linestyle=style, label=label)
        if with_spread:
            low, high = ([row["score"] + sign * (row["spread"] or 0.0) for row in curve] for sign in (-1, 1))
            axes.fill_between(clips, low, high, color=colour, alpha=0.12, linewidth=0)
        apart = [row for row in own if row.get("embedded")]
        points = [row["clips"] for row in apart], [row["score"] for row in apart]
        axes.plot(*points, marker="o", color=colour, markerfacecolor="none", linestyle="")
    numbers = sorted({row["clips"] for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(numbers, [f"{number:,}" for number in numbers])
    axes.minorticks_off()
    axes.set_xlabel("distinct clips in training (hollow: the embedded model, twice the steps)")
    axes.set_ylabel("synthetic score, mean of seven categories")
    axes.set_ylim(0.5, 1.01)
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    title = "Synthetic shapes world, held-out prompts\nbars: standard error over prompts; bands: spread of one prompt's score over seeds"
    axes.set_title(title, fontsize=10)
    figure.legend(frameon=False, ncols=3, loc="outside lower center", fontsize=9)
    _save(figure, path)


def write_plots(rows: Sequence[dict], few_steps: int, folder: Path) -> None:
    """Writes `steps.png`, `categories.png` and `motion.png` from the rows of `summarize`."""
    plot_steps(rows, folder / "steps.png")
    plot_categories(rows, few_steps, folder / "categories.png")
    plot_motion(rows, folder / "motion.png")
