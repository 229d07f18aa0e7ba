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

# Series of `plot_clips`: label, colour and line.
CLIPS_SERIES = {
    "direct, 50 steps": ("direct, 50 steps", COLOURS["direct"], "-"),
    "direct, 15 steps": ("direct, 15 steps", COLOURS["direct"], ":"),
    "factorized, 15 steps": ("factorized, 15 steps", COLOURS["factorized"], "-"),
    "true anchor, 15 steps": ("true anchor, 15 steps", COLOURS["true_anchor"], "--"),
    "Dreamer": ("Dreamer, 10 steps", "#CC79A7", "-"),
    "Dreamer, true first frame": ("Dreamer, true first frame", "#CC79A7", "--"),
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
    """Plots score and spread over seeds against the number of distinct clips.

    Args:
        rows (`Sequence[dict]`): rows with `series` (a key of `CLIPS_SERIES`), `clips`, `score`, `standard_error` and `spread`.
            Rows with `embedded` are drawn as separate points without a line.
        path (`Path`): PNG file to write.
    """
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for number, (series, (label, colour, style)) in enumerate(CLIPS_SERIES.items()):
        own = sorted((row for row in rows if row["series"] == series), key=lambda row: row["clips"])
        # The points of a number of clips stand beside each other, so that equal ones can be told apart.
        beside = 1.025 ** (number - (len(CLIPS_SERIES) - 1) / 2)
        for axes, value, error in zip(panels, ("score", "spread"), ("standard_error", None)):
            for embedded in (False, True):
                chosen = [row for row in own if bool(row.get("embedded")) == embedded and row[value] is not None]
                axes.errorbar(
                    [row["clips"] * beside for row in chosen],
                    [row[value] for row in chosen],
                    [row[error] or 0.0 for row in chosen] if error and not embedded else None,
                    marker="o",
                    capsize=3,
                    color=colour,
                    linestyle="" if embedded else style,
                    markerfacecolor="none" if embedded else colour,
                    label=None if embedded else label,
                )
    numbers = sorted({row["clips"] for row in rows})
    for axes in panels:
        axes.set_xscale("log")
        axes.set_xticks(numbers, [f"{number:,}" for number in numbers])
        axes.minorticks_off()
        axes.set_xlabel("distinct clips in training")
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    score, spread = panels
    score.set_ylim(0.5, 1.01)
    score.set_ylabel("score, mean of seven categories (axis from 0.5)")
    score.set_title("Score (bar: one standard error over prompts)", fontsize=10)
    spread.set_ylim(0)
    spread.set_ylabel("standard deviation of the score")
    spread.set_title("Spread of one prompt's score over seeds", fontsize=10)
    figure.legend(*score.get_legend_handles_labels(), frameon=False, ncols=3, loc="outside lower center", fontsize=9)
    figure.suptitle(
        "Synthetic shapes world, held-out prompts; hollow: the embedded model, twice the steps\n"
        "Dreamer is another system, with other clips, frames and steps",
        fontsize=10,
    )
    _save(figure, path)


def write_plots(rows: Sequence[dict], few_steps: int, folder: Path) -> None:
    """Writes `steps.png`, `categories.png` and `motion.png` from the rows of `summarize`."""
    plot_steps(rows, folder / "steps.png")
    plot_categories(rows, few_steps, folder / "categories.png")
    plot_motion(rows, folder / "motion.png")
