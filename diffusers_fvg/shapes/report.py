"""Writes the report of `fvg shapes report`: the study (JSON, text, figures), or with `--quick` one table. All numbers are
synthetic."""

from __future__ import annotations

import importlib.util
import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from .held_out import held_out_scenes
from .prompts import CATEGORIES
from .study import ARMS, FORMS, Cell, FirstFrames, StudySettings, joined_text, run_cell, run_study
from .summary import claims, select, summarize
from .world import Scene


QUICK_ARMS = ("direct", "factorized", "true_anchor")
# Categories with scenes of one object, which new users try first.
SINGLE_OBJECT = ("motion_binding", "dynamic_attr", "placement")
HOW = """All numbers are synthetic: a world of coloured shapes, scored by its own pixel reader.
An average is the mean of the categories' means over held-out prompts. "spread" is the standard deviation over seeds of one
prompt's score (n - 1), averaged over prompts; "error" the standard error of the average over prompts. "motion" is the mean
path of an object, in fractions of the frame. "frame 0" compares the first frame with the truth, "kept" is the share of
static-attribute videos whose first and last frame both show exactly the prompt's objects, "fidelity" the label IoU of the
anchor and the frame that it stands for. Seconds are those of stage 3 alone, for one video."""


def evaluate(
    pipe,
    scenes: Sequence[Scene],
    arms: Sequence[str] = QUICK_ARMS,
    seed: int = 0,
    batch_size: int = 8,
    num_inference_steps: int = 15,
) -> list[dict]:
    """Generates a video for each scene and arm, with the model's own guidance, and scores it.

    Args:
        pipe (`FactorizedVideoPipeline`): model with the stages that the arms use.
        scenes (`Sequence[Scene]`): scenes with prompts of the grammar.
        arms (`Sequence[str]`): names in `ARMS`.
        seed (`int`): seed of the noise. A scene's video starts from the same noise in every arm.

    Returns:
        `list[dict]`: one record per scene and arm, see [`measure`].
    """
    first_frames, wanted = FirstFrames(pipe, scenes), [(index, seed) for index in range(len(scenes))]
    records = []
    for arm in arms:
        form = next(iter(FORMS)) if ARMS[arm].rewritten else None
        for batch in run_cell(
            pipe, Cell("quick", arm, num_inference_steps, form=form), first_frames, wanted, batch_size
        ):
            for record in batch:
                scene = scenes[record["scene"]]
                facts = {"category": scene.category, "prompt": scene.prompt}
                records.append(facts | {"single_object": len(scene.objects) == 1} | record)
    return records


def quick_table(records: Sequence[dict]) -> str:
    """Formats the mean score per category and arm as a table."""
    arms = list(dict.fromkeys(record["arm"] for record in records))
    lines = [f"{'synthetic score':24s}" + "".join(f"{arm:>13s}" for arm in arms) + f"{'n':>6s}"]
    groups = [(name, lambda r, name=name: r["category"] == name) for name in (*CATEGORIES, "placement")]
    groups += [("mean of the seven", lambda r: r["category"] in CATEGORIES)]
    groups += [("single object", lambda r: r["single_object"] and r["category"] in SINGLE_OBJECT)]
    for name, belongs in groups:
        chosen = [record for record in records if belongs(record)]
        if not chosen:
            continue
        cells = []
        for arm in arms:
            by_category: dict[str, list[float]] = {}
            for record in chosen:
                if record["arm"] == arm:
                    by_category.setdefault(record["category"], []).append(record["score"])
            cells.append(np.mean([np.mean(values) for values in by_category.values()]))
        count = sum(record["arm"] == arms[0] for record in chosen)
        lines.append(f"{name:24s}" + "".join(f"{cell:13.3f}" for cell in cells) + f"{count:6d}")
    return "\n".join(lines)


def write_quick_report(pipe, folder: Path, per_category: int = 9, seeds: int = 1) -> str:
    """Scores three arms at 15 steps; writes `folder/quick.json` and `folder/quick.txt` and returns the table."""
    scenes = held_out_scenes(per_category)
    records = [record for seed in range(seeds) for record in evaluate(pipe, scenes, seed=seed)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "quick.json").write_text(json.dumps({"synthetic": True, "records": records}) + "\n")
    text = quick_table(records)
    (folder / "quick.txt").write_text(text + "\n")
    return text


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def source_version() -> dict[str, str | bool | None]:
    """Returns the commit of the source tree and whether the package's files differ from it; both are `None` if installed."""
    try:
        _git("ls-files", "--error-unmatch", "world.py")
        return {"commit": _git("rev-parse", "HEAD"), "changed": bool(_git("status", "--porcelain", "--", ".."))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "changed": None}


def provenance(pipe) -> dict:
    """Returns source version, package versions and device with which a report was made."""
    packages = ("diffusers-fvg", "torch", "diffusers", "transformers", "peft", "numpy")
    device = pipe.transformer.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        **source_version(),
        "versions": {package: version(package) for package in packages},
        "device": f"{device.type} ({name})",
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def _number(value: float | None, width: int = 10) -> str:
    return f"{'-' if value is None else f'{value:.3f}':>{width}s}"


def arms_table(rows: Sequence[dict]) -> str:
    columns = {
        "score": "score",
        "error": "standard_error",
        "spread": "spread",
        "motion": "motion",
        "frame 0": "first_frame",
        "kept": "kept",
        "fidelity": "anchor_iou",
        "caption": "caption_score",
        "anchor": "anchor_score",
        "seconds": "seconds",
    }
    lines = [f"{'arm':22s}{'steps':>6s}{'n':>6s}" + "".join(f"{title:>10s}" for title in columns)]
    for row in rows:
        cells = "".join(_number(row.get(name)) for name in columns.values())
        lines.append(f"{row['arm']:22s}{row['steps']:6d}{row['videos']:6d}{cells}")
    return "\n".join(lines)


def categories_table(rows: Sequence[dict], steps: int) -> str:
    chosen = [row for row in rows if row["steps"] == steps]
    width = max(len(row["arm"]) for row in chosen) + 2
    lines = [f"{f'score at {steps} steps':24s}" + "".join(f"{row['arm']:>{width}s}" for row in chosen)]
    for name in CATEGORIES:
        cells = "".join(_number(row["categories"][name]["score"], width) for row in chosen)
        lines.append(f"{name:24s}{cells}")
    lines.append(f"{'mean of the seven':24s}" + "".join(_number(row["score"], width) for row in chosen))
    return "\n".join(lines)


def claims_table(rows: Sequence[dict]) -> str:
    lines = [f"{'claim':28s}{'measure':54s}{'value':>8s}  {'target':8s}{'':10s}"]
    for row in rows:
        bar = "" if row["bar"] is None else f"{row['relation']} {row['bar']:g}"
        verdict = {True: "met", False: "MISSED", None: "" if row["bar"] is None else "unknown"}[row["met"]]
        line = f"{row['claim']:28s}{row['measure']:54s}{_number(row['value'], 8)}  {bar:8s}{verdict:10s}"
        lines.append((line + row.get("beside", "")).rstrip())
    return "\n".join(lines)


def tuning_table(tuned: dict[str, dict]) -> str:
    lines = [
        "arm (form of text), the guidance scale chosen on prompts for tuning, mean score on them at each guidance scale"
    ]
    for arm, choice in tuned.items():
        for form in dict.fromkeys(point["form"] for point in choice["grid"]):
            points = [point for point in choice["grid"] if point["form"] == form]
            name = arm if form is None else f"{arm} ({form})"
            best = f"{choice['guidance']:g}" if form == choice["form"] else "-"
            grid = "  ".join(f"{point['guidance']:g}: {point['score']:.3f}" for point in points)
            lines.append(f"{name:48s}{best:>6s}   {grid}")
    return "\n".join(lines)


def training_table(training: dict[str, dict]) -> str:
    """Formats sizes, samples and seconds of every part, from the training's summary."""
    columns = ("parameters", "samples", "steps", "seconds", "held_out")
    lines = [f"{'part':14s}" + "".join(f"{name:>14s}" for name in columns)]
    for part, facts in training.items():
        values = [facts.get(name) for name in columns]
        cells = ["-" if value is None else f"{value:,}" for value in values]
        lines.append(f"{part:14s}" + "".join(f"{cell:>14s}" for cell in cells))
    return "\n".join(lines)


def cut_share(pipe, first_frames: FirstFrames, form: str) -> float:
    """Returns the share of the joined texts of `direct_rewritten` that have more tokens than the model reads."""
    limit = FORMS[form][1] or pipe.call_defaults["max_sequence_length"]
    texts = [joined_text(form, s.prompt, caption) for s, caption in zip(first_frames.scenes, first_frames.captions)]
    return float(np.mean([len(pipe.tokenizer(text).input_ids) > limit for text in texts]))


def write_study(pipe, folder: Path, settings: StudySettings | None = None, batch_size: int = 16) -> str:
    """Runs or continues the study, and writes `study.json`, `study.txt` and the figures beside `records.jsonl`.

    If `folder/training.json`, the training's summary, exists, it is included.

    Raises:
        `ValueError`: matplotlib is missing, or the folder holds records of another model.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("The study's figures need matplotlib: pip install 'diffusers-fvg[report]', or use --quick.")
    from .plots import write_plots

    settings = settings or StudySettings()
    folder.mkdir(parents=True, exist_ok=True)
    records, tuned, first_frames = run_study(pipe, folder / "records.jsonl", settings, batch_size)
    full, few = settings.steps[0], settings.few_steps
    rows, claimed = summarize(records), claims(records, few, full)
    path = folder / "training.json"
    training = json.loads(path.read_text()) if path.exists() else None
    cut = round(cut_share(pipe, first_frames, tuned["direct_rewritten"]["form"]), 4)
    stages = [
        {"prompt": scene.prompt, "caption": caption, "caption_score": record["caption_score"]}
        for scene, caption, record in zip(
            first_frames.scenes, first_frames.captions, select(records, "factorized", few)
        )
    ]
    study = {
        "synthetic": True,
        "how": " ".join(HOW.split()),
        "made_with": provenance(pipe),
        "settings": asdict(settings),
        "claims": claimed,
        "arms": {name: asdict(arm) for name, arm in ARMS.items()},
        "results": rows,
        "tuning": tuned,
        "direct_rewritten_cut_texts": cut,
        "captions": stages,
        "training": training,
    }
    (folder / "study.json").write_text(_json_lines(study))
    counts = ", ".join(f"{name} {sum(s.category == name for s in first_frames.scenes)}" for name in CATEGORIES)
    parts = [
        HOW,
        f"Prompts: {counts}; {settings.seeds} seeds. Guidance is tuned for each arm on other held-out prompts.",
        "CLAIMS\n" + claims_table(claimed),
        "ARMS\n" + arms_table(rows),
        "CATEGORIES\n" + categories_table(rows, few),
        f"TUNING, {few} steps\n" + tuning_table(tuned),
        f"direct_rewritten reads the prompt joined with the rewriter's caption; {cut:.0%} of these texts are cut at the end.",
    ]
    if training is not None:
        parts.append("TRAINING\n" + training_table(training))
    text = "\n\n".join(parts)
    (folder / "study.txt").write_text(text + "\n")
    write_plots(rows, few, folder)
    return text


def _json_lines(study: dict) -> str:
    """Formats JSON with one line for each row of a list, so that diffs are readable."""
    entries = []
    for key, value in study.items():
        if isinstance(value, list):
            body = "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n ]"
        elif isinstance(value, dict):
            body = "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n }"
        else:
            body = json.dumps(value)
        entries.append(f" {json.dumps(key)}: {body}")
    return "{\n" + ",\n".join(entries) + "\n}\n"
