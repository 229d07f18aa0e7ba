"""Scores a shapes model whose frames attend to the anchor and their neighbours alone. All numbers are synthetic."""

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
    """One line for each LoRA, window and input: score with its standard error, score of the categories that ask for
    motion, how much moves, kept share and anchor fidelity."""
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
    """Scores the model with all frames and at each window, untrained for it and with the LoRA trained under it; writes
    `folder/window.json` and `folder/window.txt`.

    Args:
        pipe (`FactorizedVideoPipeline`): gets the LoRAs as further adapters; its window afterwards is as before.
        windows (`Sequence[int]`): in latent frames, of which a shapes clip has 5.
        loras (`Mapping[int, Path]`, *optional*): window -> folder with the `pytorch_lora_weights.safetensors` of a LoRA
            that was trained with it (`anchor_window` of the trainer).

    Raises:
        `ValueError`: a folder without weights, or one for a window that is not asked for.
    """
    adapters = {}
    for window, path in (loras or {}).items():
        if window not in windows:
            raise ValueError(f"{path} is of window {window}, which is not among {tuple(windows)}.")
        if not (path / WEIGHT_FILE).is_file():
            raise ValueError(f"No {WEIGHT_FILE} in {path}, the folder of window {window}.")
        # The weights' hash is the adapter's name in the records: those of a LoRA that was trained again are made again.
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
            # In the records, what would otherwise tell their prompts apart names the window.
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
