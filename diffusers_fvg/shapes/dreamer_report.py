"""Scores Factorized-Dreamer's shapes model and variants of its designs, beside the embedded Factorized Video Generation model.

All numbers are synthetic. Records are written batch by batch, so that a later call continues an interrupted report. Variants
that are not trained yet are listed as not run, and a later call adds them; it keeps the rows of weights that it does not find.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import torch

from ..animate.anchor import Anchor
from ..dreamer.flow import dis_flow
from .blobs import find_objects, label_maps
from .dreamer import DESIGNS, GUIDANCE_SCALE, STEPS, TEXT_GUIDANCE_SCALE, VIDEO_STEPS, build_dreamer, design_part
from .flow import exact_flow
from .held_out import attributes_stay, score_written_motion, split_scenes
from .prompts import motion_caption
from .report import provenance
from .scorer import motion_amount, score_video
from .study import Cell, FirstFrames, Journal, journal_header, noise
from .summary import average, rounded, standard_error
from .world import Scene, render


if TYPE_CHECKING:
    from ..pipelines.pipeline_factorized_dreamer import FactorizedDreamerPipeline


HOW = f"""All numbers are synthetic: a world of coloured shapes, scored by its own pixel reader, on held-out prompts.
Each row is trained for its number of steps, on the same clips in the same order; the claims compare rows with equal steps.
Guidance is {GUIDANCE_SCALE:g}, and {TEXT_GUIDANCE_SCALE:g} for a UNet that takes no first frame; both were chosen on other held-out prompts.
"seeds" is the number of videos of each prompt; "error" is the standard error over prompts of the value before it.
score: mean of the seven categories. "written": all stages run (the first frame is drawn from the rewriter's caption, the motion
caption is the rewriter's). "true": the rendered first frame and the true motion caption. "prompt": no first frame; the UNet
reads the whole prompt. motion: mean length of an object's path, in fractions of the frame.
detail: PSNR in dB against the first frame, of objects that stand still, where nothing passes over them; from true first frames.
flow: error in pixels of the flow that OpenCV's DIS estimates, against the exact one, where an object is; mean over pixels, summed
over the clip. Only scenes in which something moves, from true first frames. "rendered clips" is the error of DIS itself."""
FVG, RENDERED, MODEL = "FVG", "rendered", "Factorized-Dreamer"
LABELS = {
    "all": "all designs",
    "plain": "none: plain video UNet",
    "no_paca": "without PACA",
    "no_predict_net": "without PredictNet",
    "no_t2i_adapter": "without T2I adapter",
    "no_t5": "without T5",
    "no_shift": "without shift (s = 1)",
    "s_0.1": "s = 0.1",
    "s_0.15": "s = 0.15",
    "power_1": "s = 0.125, power 1",
    "paca_alone": "PACA alone",
    "t2i_adapter_alone": "T2I adapter alone",
    "schedule_alone": "noise schedule alone",
    "t5_alone": "T5 alone",
    "predict_net_alone": "PredictNet alone",
}
SCORE_BAR, DETAIL_BAR, FLOW_BAR = 0.10, 2.0, 0.10
MOVES = ("move", "bounce", "scale")
# Clips of 64 pixels are enlarged by this factor, because DIS compares patches of 8 pixels.
ENLARGED = 4


def seen_flow(frames: np.ndarray) -> torch.Tensor:
    """Estimates the flow `(2, F - 1, H, W)` of a small clip `(F, H, W, 3)` by DIS, in the clip's pixels."""
    height, width = frames.shape[1:3]
    size = (ENLARGED * width, ENLARGED * height)
    large = np.stack([np.asarray(PIL.Image.fromarray(frame).resize(size, PIL.Image.BICUBIC)) for frame in frames])
    return torch.nn.functional.interpolate(dis_flow(large), size=(height, width), mode="area") / ENLARGED


def flow_error(frames: np.ndarray, scene: Scene) -> float:
    """Returns the flow's mean error in pixels where this or the true clip shows an object, summed over the clip's frames."""
    truth = render(scene.objects, *frames.shape[:3])
    error = (seen_flow(frames) - exact_flow(scene.objects, *frames.shape[:3])).square().sum(0).sqrt()
    something = torch.from_numpy((label_maps(frames) > 0) | (label_maps(truth) > 0))[:-1]
    return float(error[something].mean()) * (len(frames) - 1)


def still_region(scene: Scene, num_frames: int, height: int, width: int) -> np.ndarray:
    """Returns a mask `(H, W)` of the objects that do not change, without pixels over which something passes."""
    clip = render(scene.objects, num_frames, height, width)
    rows, columns = (np.mgrid[:height, :width] + 0.5) / np.array([height, width]).reshape(2, 1, 1)
    region = np.zeros((height, width), dtype=bool)
    for item in scene.objects:
        if not item.changes:
            reach = item.radius + 2 / height
            region |= (abs(columns - item.x) * width / height < reach) & (abs(rows - item.y) < reach)
    return region & (clip == clip[:1]).all(axis=(0, 3))


def detail(frames: np.ndarray, first: np.ndarray, region: np.ndarray) -> float:
    """Returns the PSNR in dB of the frames against the given first frame, within a region."""
    error = (frames[:, region].astype(np.float64) - first[region]) ** 2
    return float(10 * np.log10(255**2 / max(error.mean(), 1e-3)))


def measure(frames: np.ndarray, scene: Scene, first: np.ndarray | None, is_true: bool) -> dict:
    """Measures one video. `first` is its given first frame, if any, and `is_true` says whether that is the rendered one."""
    found = {"score": score_video(frames, scene.category, scene.meta), "motion": motion_amount(frames)}
    if is_true:
        region = still_region(scene, *frames.shape[:3])
        if region.any():
            found["detail"] = detail(frames, first, region)
        if any(change.kind in MOVES for item in scene.objects for change in item.changes):
            found["flow"] = flow_error(frames, scene)
    return {name: round(value, 4) for name, value in found.items()}


class Inputs:
    """Outputs of stages 1 and 2 of the embedded pipeline for the scenes, computed once and used for all rows."""

    def __init__(self, embedded, scenes: Sequence[Scene]):
        self.scenes, self.first_frames = scenes, FirstFrames(embedded, scenes)
        began = time.perf_counter()
        self.motions = embedded.rewriter.describe_motion([scene.prompt for scene in scenes])
        self.seconds = (time.perf_counter() - began) / len(scenes)

    def motion_score(self) -> float:
        return float(np.mean([score_written_motion(text, scene) for text, scene in zip(self.motions, self.scenes)]))

    def picture(self, source: str, index: int, seed: int, size: Sequence[int]) -> PIL.Image.Image:
        if source == "written":
            return self.first_frames.composed("written", index, seed)
        return PIL.Image.fromarray(render(self.scenes[index].objects, *size)[0])

    def text(self, source: str, index: int) -> str:
        if source == "prompt":
            return self.scenes[index].prompt
        return self.motions[index] if source == "written" else motion_caption(self.scenes[index])


def digest(*folders: Path) -> str:
    """Returns a digest of the weights in folders, so that a variant that was trained again gets new records."""
    files = [folder / "diffusion_pytorch_model.safetensors" for folder in folders]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def trained_steps(parts: Path, name: str) -> list[int]:
    """Returns the numbers of steps for which the variant `name` was trained in `parts`, the largest first."""
    found = (re.fullmatch(rf"design_{re.escape(name)}_(\d+)", path.name) for path in parts.iterdir() if path.is_dir())
    return sorted((int(match[1]) for match in found if match), reverse=True)


def run_row(pipe, cell: Cell, inputs: Inputs, seeds: int, journal: Journal, batch_size: int, fvg: bool) -> list[dict]:
    """Returns the records of one row and input; makes those that the journal lacks."""
    scenes, source = inputs.scenes, cell.arm
    pairs = [(index, seed) for seed in range(seeds) for index in range(len(scenes))]
    wanted = [pair for pair in pairs if journal.find(cell, *pair) is None]
    for start in range(0, len(wanted), batch_size):
        batch = wanted[start : start + batch_size]
        if cell.split == RENDERED:
            videos, pictures, seconds = [render(scenes[k].objects, cell.steps) / 255 for k, _ in batch], None, 0.0
        else:
            size = [pipe.call_defaults[name] for name in ("num_frames", "height", "width")]
            pictures = None if source == "prompt" else [inputs.picture(source, *pair, size) for pair in batch]
            # The video model of Factorized Video Generation reads prompts, not motion captions.
            texts = [inputs.text("prompt" if fvg else source, k) for k, _ in batch]
            anchors = [[Anchor(picture)] for picture in pictures] if pictures else None
            generators = [noise(*pair) for pair in batch]
            began = time.perf_counter()
            videos = pipe.animate(texts, anchors, generator=generators, num_inference_steps=cell.steps)
            seconds = (time.perf_counter() - began) / len(batch)
        records = []
        for position, (index, seed) in enumerate(batch):
            frames = np.round(videos[position] * 255).astype(np.uint8)
            first = frames[0] if pictures is None else np.asarray(pictures[position])
            found = measure(frames, scenes[index], first, source == "true")
            records.append(cell.facts() | {"scene": index, "seed": seed, "seconds": round(seconds, 3)} | found)
        journal.append(records)
    facts = [{"category": scene.category, "prompt": scene.prompt} for scene in scenes]
    return [facts[index] | journal.find(cell, index, seed) for index, seed in pairs]


def drift(pipe, scenes: Sequence[Scene], lengths: Sequence[int] = (32, 48), batch_size: int = 16) -> list[dict]:
    """Measures how much of the true first frame is left in each window of clips that are longer than the UNet takes at once.

    Only scenes whose objects keep colour, shape and presence are used. `kept` is the share of videos that show exactly these
    objects at the window's end, and `detail` that of objects that stand still.
    """
    scenes = [scene for scene in scenes if attributes_stay(scene)]
    window, size = pipe.unet.config.num_frames, [pipe.call_defaults[name] for name in ("height", "width")]
    rows = []
    for length in lengths:
        ends = [min(end, length - 1) for end in range(window - 1, length + window - 2, window - 1)]
        kept: list[list[bool]] = [[] for _ in ends]
        details: list[list[float]] = [[] for _ in ends]
        for start in range(0, len(scenes), batch_size):
            chosen = scenes[start : start + batch_size]
            truths = [render(scene.objects, 8, *size) for scene in chosen]
            videos = pipe.animate(
                [motion_caption(scene) for scene in chosen],
                [[Anchor(PIL.Image.fromarray(truth[0]))] for truth in truths],
                num_frames=length,
                generator=[noise(start + k, 0) for k in range(len(chosen))],
            )
            for scene, truth, video in zip(chosen, truths, videos):
                frames = np.round(video * 255).astype(np.uint8)
                # Only in scenes without any motion, because something could pass over a still object in a later window.
                still = still_region(scene, 8, *size) if not any(item.changes for item in scene.objects) else None
                for number, (begin, end) in enumerate(zip([0, *ends], ends)):
                    kept[number].append(_same_objects(frames[end], scene))
                    if still is not None:
                        details[number].append(detail(frames[begin : end + 1], truth[0], still))
        rows.append(
            {
                "frames": length,
                "window_ends": ends,
                "kept": [round(float(np.mean(values)), 4) for values in kept],
                "detail": [round(float(np.mean(values)), 2) for values in details],
            }
        )
    return rows


def _same_objects(frame: np.ndarray, scene: Scene) -> bool:
    wanted = Counter((item.colour, item.shape) for item in scene.objects)
    return Counter((blob.colour, blob.shape) for blob in find_objects(frame)) == wanted


def row_of(label: str, records: dict[str, list[dict]], **facts) -> dict:
    """Returns the means of a row: a score for each input, and detail and flow from true first frames."""
    row = {"row": label} | facts
    for source, chosen in records.items():
        row[f"score_{source}"] = round(average(chosen), 4)
        row[f"error_{source}"] = round(standard_error(chosen), 4)
        row[f"motion_{source}"] = round(average(chosen, "motion"), 4)
        row["seconds"] = round(float(np.mean([record["seconds"] for record in chosen])), 3)
        row[f"categories_{source}"] = {
            name: round(float(np.mean([r["score"] for r in chosen if r["category"] == name])), 4)
            for name in dict.fromkeys(record["category"] for record in chosen)
        }
    for value in ("detail", "flow"):
        # The mean and its error are over all prompts, whatever their category.
        found = [record | {"category": "all"} for record in records.get("true", []) if value in record]
        if found:
            row[value] = round(average(found, value), 3)
            row[f"error_{value}"] = rounded(standard_error(found, value))
    return row


def claims(rows: dict[tuple[str, int], dict]) -> list[dict]:
    """Returns the claims of the report, each with its target (`bar`); they compare rows with equal training steps.

    Args:
        rows (`dict`): rows by (variant, training steps).
    """
    found = []
    for steps in sorted({steps for name, steps in rows if name == "all"}, reverse=True):
        full, plain, no_paca, no_predict_net = (
            rows.get((name, steps)) for name in ("all", "plain", "no_paca", "no_predict_net")
        )

        def claim(figure: str, value: float, bar: float, steps: int = steps) -> None:
            facts = {"value": round(value, 4), "bar": bar, "met": bool(value >= bar)}
            found.append({"figure": figure, "trained_steps": steps} | facts)

        if plain:
            claim("score, all designs minus plain", full["score_written"] - plain["score_prompt"], SCORE_BAR)
        if no_paca:
            claim("detail in dB that goes without PACA", full["detail"] - no_paca["detail"], DETAIL_BAR)
        if no_predict_net:
            claim("flow error added without PredictNet", no_predict_net["flow"] / full["flow"] - 1, FLOW_BAR)
    return found


COLUMNS = {
    "score_written": "written",
    "error_written": "error",
    "score_true": "true",
    "error_true": "error",
    "score_prompt": "prompt",
    "error_prompt": "error",
    "motion_written": "motion",
    "detail": "detail",
    "error_detail": "error",
    "flow": "flow",
    "error_flow": "error",
    "seconds": "seconds",
}


def report_text(report: dict) -> str:
    """Formats the report as text: claims, one line for each row, drift."""
    lines = [HOW, ""]
    for claim in report["claims"]:
        verdict = "met" if claim["met"] else "MISSED"
        figure = f"{claim['figure']}, {claim['trained_steps']} steps"
        lines.append(f"{figure:54s}{claim['value']:8.3f}  >= {claim['bar']:<5} {verdict}")
    titles = "".join(f"{title:>9s}" for title in COLUMNS.values())
    lines += ["", f"{'synthetic':26s}{'steps':>6s}{'seeds':>6s}{titles}"]
    for row in report["rows"]:
        cells = "".join(f"{'-' if row.get(key) is None else format(row[key], '.3f'):>9s}" for key in COLUMNS)
        lines.append(f"{row['row']:26s}{str(row.get('trained_steps') or '-'):>6s}{row['seeds']:6d}{cells}")
    lines += ["", *(f"Note: {note}" for note in report["notes"])] if report.get("notes") else []
    if report["not_run"]:
        lines += ["", f"not run: {', '.join(report['not_run'])}"]
    lines += ["", f"the rewriter's motion captions: {report['motion_caption_score']:.3f} (F1 over clauses)"]
    for row in report["drift"]:
        lines += [
            "",
            f"{row['frames']} frames by windows; after frame" + "".join(f"{end:>7d}" for end in row["window_ends"]),
            f"{'objects kept':34s}" + "".join(f"{value:7.2f}" for value in row["kept"]),
            f"{'detail, dB':34s}" + "".join(f"{value:7.1f}" for value in row["detail"]),
        ]
    return "\n".join(lines)


def write_dreamer_report(
    embedded,
    parts: Path,
    folder: Path,
    per_category: int = 9,
    seeds: int = 3,
    batch_size: int = 16,
    steps: int = STEPS,
    fvg_steps: int = 15,
) -> str:
    """Scores the trained variants; writes `folder/dreamer.json` and `folder/dreamer.txt` and returns the text.

    Rows of an earlier report in `folder` stay if `parts` does not have their weights.

    Args:
        embedded (`FactorizedVideoPipeline`): embedded pipeline, whose stages 1 and 2 are used and which is scored beside.
        parts (`Path`): folder of [`dreamer.train_dreamer`].
        folder (`Path`): folder for the files, and for the records, from which a later call continues.
        per_category (`int`): held-out prompts of each of the seven categories.
        seeds (`int`): videos of each prompt and input.
        steps, fvg_steps (`int`): sampling steps of Factorized-Dreamer and of Factorized Video Generation.
    """
    scenes, _ = split_scenes(per_category, 4)
    journal = Journal(folder / "dreamer.jsonl", journal_header(embedded, reported=scenes))
    inputs = Inputs(embedded, scenes)
    path, rows = folder / "dreamer.json", []
    before = json.loads(path.read_text()) if path.exists() else {"rows": [], "drift": []}

    def add(label: str, pipe, sources: Sequence[str], cell: Cell, **facts) -> None:
        records = {}
        for source in sources:
            chosen = replace(cell, arm=source)
            records[source] = run_row(pipe, chosen, inputs, seeds, journal, batch_size, fvg=cell.split == FVG)
        facts |= {"sampling_steps": cell.steps, "seeds": seeds, "made_with": provenance(embedded)}
        rows.append(row_of(label, records, **facts))
        print(f"{label}: {[rows[-1].get(f'score_{source}') for source in sources]}", flush=True)

    def add_unet(name: str, label: str, part: str, trained: int) -> FactorizedDreamerPipeline:
        designs = DESIGNS[name]
        pipe, guidance = build_dreamer(parts, part, designs), next(iter(designs.presets().values())).guidance_scale
        sources = ("written", "true") if designs.takes_image else ("prompt",)
        cell = Cell(name, "", steps, guidance, lora=digest(parts / part, parts / "vae"))
        add(label, pipe, sources, cell, guidance_scale=guidance, trained_steps=trained)
        return pipe

    add("rendered clips", None, ("true",), Cell(RENDERED, "", 8))
    embedded.set_progress_bar_config(disable=True)
    add("FVG, the embedded model", embedded, ("written", "true"), Cell(FVG, "", fvg_steps))
    drifts = before["drift"]
    if (parts / "video").is_dir():
        drifts = drift(add_unet("all", MODEL, "video", VIDEO_STEPS), scenes)
    for name in DESIGNS:
        for trained in trained_steps(parts, name):
            add_unet(name, LABELS[name], design_part(name, trained), trained)
    rows = joined(before["rows"], rows)
    names = {label: name for name, label in LABELS.items()} | {MODEL: "all"}
    by_name = {(names[row["row"]], row["trained_steps"]): row for row in rows if row["row"] in names}
    run = {name for name, _ in by_name}
    report = {"synthetic": True, "prompts": len(scenes), "motion_caption_score": round(inputs.motion_score(), 4)}
    report |= {"claims": claims(by_name), "rows": rows, "drift": drifts}
    report |= {"not_run": [label for name, label in LABELS.items() if name not in run]}
    if "notes" in before:
        report["notes"] = before["notes"]
    text = report_text(report)
    path.write_text(json.dumps(report, indent=1) + "\n")
    (folder / "dreamer.txt").write_text(text + "\n")
    return text


def joined(before: Sequence[dict], rows: Sequence[dict]) -> list[dict]:
    """Returns the rows of a report: `rows`, and those of `before` that they do not replace, in the order of the table."""
    by_key = {(row["row"], row.get("trained_steps", 0)): row for row in (*before, *rows)}
    order = ["rendered clips", "FVG, the embedded model", MODEL, *LABELS.values()]
    return [by_key[key] for key in sorted(by_key, key=lambda key: (order.index(key[0]), -key[1]))]
