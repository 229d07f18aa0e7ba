"""Scores a shapes model whose frames attend only to the anchor and to neighbouring frames. All numbers are synthetic."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..lora.anchor_lora import ADAPTER_NAME
from .ablation import INPUTS, OWN, WEIGHT_FILE
from .held_out import split_scenes
from .report import provenance
from .study import Cell, FirstFrames, Journal, complete, journal_header
from .summary import MOTION_CATEGORIES, summarize


DENSE = "dense"
VALUES = {"score": "score", "error": "standard_error", "motion": "motion", "kept": "kept", "fidelity": "anchor_iou"}


def table(rows: Sequence[dict]) -> str:
    """Formats one line for each LoRA, window and input: score with its standard error, motion amount, kept share, anchor
    fidelity, and the score of the categories about motion."""
    titles = [*VALUES, "motion score"]
    lines = [f"{'synthetic':20s}{'window':>8s}  {'input':14s}" + "".join(f"{title:>14s}" for title in titles)]
    for row in rows:
        for name, found in row["inputs"].items():
            values = [*(found[value] for value in VALUES.values()), found["motion_score"]]
            cells = "".join(f"{'-' if value is None else format(value, '.3f'):>14s}" for value in values)
            lines.append(f"{row['lora']:20s}{row['window']!s:>8s}  {name:14s}{cells}")
    return "\n".join(lines)


def write_window_report(
    pipe,
    folder: Path,
    windows: Sequence[int] = (0, 1, 2),
    loras: Mapping[int, Path] | None = None,
    per_category: int = 9,
    seeds: int = 3,
    steps: int = 15,
    batch_size: int = 16,
) -> str:
    """Scores the model without a window and at each window, with its own LoRA and with those trained with the window.

    Writes `folder/window.json` and `folder/window.txt` and returns the table.

    Args:
        pipe (`FactorizedVideoPipeline`): model to score; the LoRAs are loaded as further adapters, and its window is restored.
        folder (`Path`): folder for the files, and for the records, from which a later call continues.
        windows (`Sequence[int]`): windows in latent frames, of which a shapes clip has 5.
        loras (`Mapping[int, Path]`, *optional*): for a window, the folder with the `pytorch_lora_weights.safetensors` of a LoRA
            that was trained with it (`anchor_window` of the trainer).
        per_category (`int`): held-out prompts of each of the seven categories.
        seeds (`int`): videos of each prompt, input, LoRA and window.
        steps (`int`): sampling steps.

    Raises:
        `ValueError`: a folder has no weights, or is given for a window that is not in `windows`.
    """
    adapters = {}
    for window, path in (loras or {}).items():
        if window not in windows:
            raise ValueError(f"{path} is given for window {window}, which is not among `windows={tuple(windows)}`.")
        if not (path / WEIGHT_FILE).is_file():
            raise ValueError(f"No {WEIGHT_FILE} in {path}, the folder of window {window}.")
        # Adapters are named by a hash of their weights, so that a LoRA that was trained again gets new records.
        digest = hashlib.sha256((path / WEIGHT_FILE).read_bytes()).hexdigest()[:16]
        adapters[window] = f"window_{window}_{digest}"
        pipe.load_lora_weights(path, adapter_name=adapters[window])
    pipe.set_adapters(ADAPTER_NAME, 1.0)
    scenes, _ = split_scenes(per_category, 4)
    journal = Journal(folder / "window.jsonl", journal_header(pipe, reported=scenes))
    first_frames, rows = FirstFrames(pipe, scenes), []
    before = pipe.transformer.anchor_window
    try:
        for window in (None, *windows):
            pipe.transformer.set_anchor_window(window)
            # The `split` of the records, which otherwise names the set of prompts, names the window here.
            split = DENSE if window is None else f"window {window}"
            for lora in (None, *([adapters[window]] if window in adapters else [])):
                cells = [Cell(split, name, steps, lora=lora) for name in INPUTS]
                records = complete(pipe, cells, first_frames, range(seeds), journal, batch_size)
                inputs = {row.pop("arm"): row for row in summarize(records)}
                for row in inputs.values():
                    scores = [row["categories"][category]["score"] for category in MOTION_CATEGORIES]
                    row["motion_score"] = round(sum(scores) / len(scores), 4)
                name = OWN if lora is None else "trained with it"
                rows.append({"lora": name, "window": DENSE if window is None else window, "inputs": inputs})
    finally:
        pipe.transformer.set_anchor_window(before)
    text = table(rows)
    study = {"synthetic": True, "made_with": provenance(pipe), "weights": adapters, "seeds": seeds, "rows": rows}
    (folder / "window.json").write_text(json.dumps(study) + "\n")
    (folder / "window.txt").write_text(text + "\n")
    return text
