"""Scores the runs of [`clips.train_clips`] by the protocol in `examples/clips/README.md`. All numbers are synthetic."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ..embedded import EMBEDDED_FOLDER, load_embedded
from .clips import DREAMER_NUM_CLIPS, NUM_CLIPS, dreamer_part, run_folder
from .dreamer import DESIGNS, STEPS, build_dreamer
from .dreamer_report import Inputs, digest, run_row
from .held_out import split_scenes
from .report import provenance
from .study import Cell, Journal, StudySettings, journal_header, run_study
from .summary import MOTION_CATEGORIES, average, difference, rounded, seed_spread, select, standard_error, summarize


ARMS_RUN = ("direct", "factorized", "true_anchor")
SETTINGS = StudySettings(steps=(50, 15))
EMBEDDED = "embedded"
# Target for the lead of factorized over direct, from the paper's claim (arXiv 2512.16371).
LEAD_BAR = 0.15
HOW = """All numbers are synthetic: a world of coloured shapes, scored by its own pixel reader, on held-out prompts. "clips": distinct
clips in training. "direct" is plain text-to-video, "factorized" all three stages, "true anchor" the video model with the rendered
first frame. "embedded" is the shipped model: twice the steps, other captions of its images, and separate clips for its LoRA.
"spread" is the standard deviation over seeds of one prompt's score, averaged over prompts; "error" the standard error of the
average over prompts. "motion" is the mean length of an object's path, in fractions of the frame; "frame 0" the score of the first
frame; "kept" the share of static-attribute prompts whose first and last frame show exactly the objects of the prompt. The last two
are not measured for Dreamer.
"lead" is factorized at few steps minus direct at many (target: at least 0.15), with the standard error of the prompts' differences.
In brackets: the clips at one such error below and above the score of factorized."""


def finished(folder: Path) -> list[int]:
    """Returns the numbers of clips whose base and LoRA are trained, the smallest first."""
    return sorted(
        number
        for number in NUM_CLIPS
        if (path := run_folder(folder, number) / "training.json").exists() and "lora" in json.loads(path.read_text())
    )


def load_run(folder: Path, num_clips: int):
    """Loads the embedded pipeline with the base and the anchor LoRA of a run."""
    from ..animate.transformer_anchor import AnchorConditionedTransformer3D
    from ..lora.anchor_lora import AnchorLora
    from ..pipelines.pipeline_factorized_video import FactorizedVideoPipeline

    run = run_folder(folder, num_clips)
    return FactorizedVideoPipeline.from_pretrained(
        EMBEDDED_FOLDER,
        transformer=AnchorConditionedTransformer3D.from_pretrained(run / "base"),
        anchor_lora=AnchorLora.from_pretrained(run / "anchor_lora"),
        dtype=torch.float32,
    )


def lead(records: Sequence[dict], few: int, full: int) -> dict[str, float | None]:
    """Returns factorized at `few` steps minus direct at `full` steps, as [`difference`] does."""
    return difference(select(records, "factorized", few), select(records, "direct", full))


def clips_needed(curve: Sequence[tuple[int, float]], score: float) -> float | None:
    """Returns the number of clips at which a curve reaches `score`, interpolated linearly in the logarithm of clips.

    Args:
        curve (`Sequence[tuple[int, float]]`): increasing numbers of clips with their scores.

    Returns:
        `float`: the first number if it already reaches the score, infinity if none does; `None` if the scores are not
            increasing.
    """
    scores = [found for _, found in curve]
    if scores != sorted(scores):
        return None
    if score <= scores[0]:
        return float(curve[0][0])
    for (below, low), (above, high) in zip(curve, curve[1:]):
        if score <= high:
            return below * (above / below) ** ((score - low) / (high - low))
    return math.inf


def needed_text(clips: float | None, largest: int) -> str:
    if clips is None:
        return "unknown, as scores are not increasing"
    return f"more than {largest:,}" if math.isinf(clips) else f"{clips:,.0f}"


def worth(curve: Sequence[tuple[int, float]], score: float, error: float | None) -> str:
    """Says at how many clips a curve reaches `score`; in brackets, `score - error` and `score + error`."""
    largest = curve[-1][0]
    found, low, high = (
        needed_text(clips_needed(curve, value), largest)
        for value in (score, score - (error or 0.0), score + (error or 0.0))
    )
    return found if low == high else f"{found} ({low} to {high})"


def score_dreamer(folder: Path, output: Path, settings: StudySettings, batch_size: int) -> list[dict]:
    """Returns a row for each finished run of Dreamer and each input; `added` is its score minus that with the next fewer clips."""
    numbers = [number for number in sorted(DREAMER_NUM_CLIPS) if (folder / dreamer_part(number)).is_dir()]
    if not numbers:
        return []
    embedded = load_embedded()
    embedded.set_progress_bar_config(disable=True)
    scenes, _ = split_scenes(settings.per_category, settings.tuning_per_category)
    journal = Journal(output / "dreamer.jsonl", journal_header(embedded, reported=scenes))
    inputs, rows = Inputs(embedded, scenes), []
    fewer: dict[str, list[dict]] = {}
    for number in numbers:
        pipe = build_dreamer(folder, dreamer_part(number), DESIGNS["all"])
        weights = digest(folder / dreamer_part(number), folder / "vae")
        for source, series in (("written", "Dreamer"), ("true", "Dreamer, true first frame")):
            cell = Cell("clips", source, STEPS, lora=weights)
            records = run_row(pipe, cell, inputs, settings.seeds, journal, batch_size, fvg=False)
            row = {"series": series, "clips": number, "arm": source, "steps": STEPS, "videos": len(records)}
            row |= {"score": rounded(average(records)), "spread": rounded(seed_spread(records))}
            row |= {"standard_error": rounded(standard_error(records)), "motion": rounded(average(records, "motion"))}
            row |= {"made_with": provenance(embedded)}
            if source in fewer:
                row["added"] = difference(records, fewer[source])
            fewer[source] = records
            rows.append(row)
    return rows


def write_clips_report(folder: Path, output: Path, settings: StudySettings = SETTINGS, batch_size: int = 16) -> str:
    """Scores the finished runs and the embedded model; writes `clips.json`, `clips.txt` and `clips.png` to `output`.

    Args:
        folder (`Path`): folder of [`clips.train_clips`].
        output (`Path`): folder for the files and the records, from which a later call continues.
        settings (`StudySettings`, *optional*): size of the study. Factorized at `few_steps` is compared with direct at the
            first of `steps`.

    Raises:
        `ValueError`: matplotlib is missing, or no run is finished.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("The report's figure needs matplotlib: pip install 'diffusers-fvg[report]'.")
    from .plots import plot_clips

    numbers = finished(folder)
    if not numbers:
        raise ValueError(f"No run is finished in {folder}: train them with `fvg shapes clips {folder}`.")
    output.mkdir(parents=True, exist_ok=True)
    few, full = settings.few_steps, settings.steps[0]
    rows, runs = [], {}
    for label in (*numbers, EMBEDDED):
        pipe = load_embedded() if label == EMBEDDED else load_run(folder, label)
        pipe.set_progress_bar_config(disable=True)
        print(f"{label} clips", flush=True)
        records, tuned, _ = run_study(pipe, output / f"records_{label}.jsonl", settings, batch_size, ARMS_RUN)
        moving = [r for r in select(records, "true_anchor", few) if r["category"] in MOTION_CATEGORIES]
        runs[label] = {
            "lead": lead(records, few, full),
            "true_anchor_motion": round(average(moving), 4),
            "guidance": {arm: choice["guidance"] for arm, choice in tuned.items()},
        }
        facts = {"clips": max(NUM_CLIPS), "embedded": True} if label == EMBEDDED else {"clips": label}
        for row in summarize(records):
            rows.append(facts | {"series": f"{row['arm'].replace('_', ' ')}, {row['steps']} steps"} | row)
    rows += score_dreamer(folder / "dreamer", output, settings, batch_size)
    report = {"synthetic": True, "made_with": provenance(pipe), "settings": asdict(settings)}
    report |= {"not_run": sorted(set(NUM_CLIPS) - set(numbers)), "runs": runs, "rows": rows}
    (output / "clips.json").write_text(json.dumps(report, indent=1) + "\n")
    text = report_text(report)
    (output / "clips.txt").write_text(text + "\n")
    plot_clips(rows, output / "clips.png")
    return text


def report_text(report: dict) -> str:
    """Formats the report as text: leads, the clips that they replace, and one line for each run, arm and number of steps."""
    rows, few, full = report["rows"], report["settings"]["few_steps"], report["settings"]["steps"][0]
    lines = [
        HOW,
        "",
        f"{'clips':>9s}{'lead':>9s}{'error':>8s}   {f'>= {LEAD_BAR:g}':10s}clips with which direct scores as factorized",
    ]

    def curve(arm: str, steps: int) -> dict[int, float]:
        own = (row for row in rows if not row.get("embedded") and (row["arm"], row["steps"]) == (arm, steps))
        return {row["clips"]: row["score"] for row in own}

    direct, factorized = curve("direct", full), curve("factorized", few)
    for label, run in report["runs"].items():
        value, error = run["lead"]["value"], run["lead"]["error"]
        verdict = "met" if value >= LEAD_BAR else "MISSED" if value > 2 * (error or 0.0) else "no lead"
        text = "" if label == EMBEDDED else worth(sorted(direct.items()), factorized[int(label)], error)
        lines.append(
            f"{label!s:>9s}{value:9.3f}{'-' if error is None else format(error, '.3f'):>8s}   {verdict:10s}{text}".rstrip()
        )
    if report["not_run"]:
        lines += ["", f"not run yet: {', '.join(map(str, report['not_run']))}"]
    true_anchor = curve("true_anchor", few)
    lines += ["", "1 minus the score of the true anchor, and the guidance of direct, factorized and true anchor:"]
    lines += [f"{'clips':>9s}{'all':>9s}{'motion':>9s}   guidance"]
    for label, run in report["runs"].items():
        if label != EMBEDDED:
            scales = ", ".join(f"{scale:g}" for scale in run["guidance"].values())
            missing = (1 - true_anchor[int(label)], 1 - run["true_anchor_motion"])
            lines.append(f"{label!s:>9s}" + "".join(f"{value:9.3f}" for value in missing) + f"   {scales}")
    columns = ("score", "spread", "standard_error", "motion", "first_frame", "kept")
    titles = ("score", "spread", "error", "motion", "frame 0", "kept")
    lines += ["", f"{'synthetic':>9s}  {'arm':28s}" + "".join(f"{title:>9s}" for title in titles)]
    for row in rows:
        label = EMBEDDED if row.get("embedded") else row["clips"]
        cells = "".join(f"{'-' if row.get(name) is None else format(row[name], '.3f'):>9s}" for name in columns)
        lines.append(f"{label!s:>9s}  {row['series']:28s}{cells}")
    dreamer = [row for row in rows if "added" in row]
    if dreamer:
        lines += ["", f"{'clips':>9s}  {'added to the score with the next fewer clips':46s}{'added':>8s}{'error':>8s}"]
    for row in dreamer:
        added, error = row["added"]["value"], row["added"]["error"]
        lines.append(
            f"{row['clips']:9d}  {row['series']:46s}{added:8.3f}{'-' if error is None else format(error, '.3f'):>8s}"
        )
    return "\n".join(lines)
