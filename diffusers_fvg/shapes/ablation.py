"""Compares anchor LoRAs on the same base, prompts, anchors and noise, each at several strengths. All numbers are synthetic."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..lora.anchor_lora import ADAPTER_NAME
from .held_out import split_scenes
from .report import provenance
from .study import Cell, FirstFrames, Journal, complete, journal_header
from .summary import summarize


INPUTS = ("true_anchor", "true_middle", "factorized")
STRENGTHS = (0.55, 1.0, 1.4)
OWN = "own"
WEIGHT_FILE = "pytorch_lora_weights.safetensors"


def table(rows: Sequence[dict]) -> str:
    """Formats one line for each LoRA and strength, with score, kept share and anchor fidelity of every input."""
    titles = [f"{arm} {value}" for arm in INPUTS for value in ("score", "kept", "fidelity")]
    width = max(len(title) for title in titles) + 2
    lines = [f"{'synthetic':28s}{'strength':>9s}" + "".join(f"{title:>{width}s}" for title in titles)]
    for row in rows:
        values = [row["inputs"][arm][value] for arm in INPUTS for value in ("score", "kept", "anchor_iou")]
        cells = "".join(f"{value:{width}.3f}" for value in values)
        lines.append(f"{row['lora']:28s}{row['strength']:9.2f}" + cells)
    return "\n".join(lines)


def write_ablation(
    pipe,
    folder: Path,
    loras: Mapping[str, Path],
    per_category: int = 9,
    seeds: int = 3,
    strengths: Sequence[float] = STRENGTHS,
    steps: int = 15,
    batch_size: int = 16,
) -> str:
    """Scores the model's own anchor LoRA and those of `loras`; writes `folder/ablation.json` and `folder/ablation.txt`.

    All rows use the model's own guidance, so that they differ in LoRA and strength only.

    Args:
        pipe (`FactorizedVideoPipeline`): model to score; the LoRAs are loaded as further adapters.
        folder (`Path`): folder for the files, and for the records, from which a later call continues.
        loras (`Mapping[str, Path]`): for the name of each row, the folder with `pytorch_lora_weights.safetensors`.
        per_category (`int`): held-out prompts of each of the seven categories.
        seeds (`int`): videos of each prompt, input, LoRA and strength.
        strengths (`Sequence[float]`): strengths at which each LoRA runs.
        steps (`int`): sampling steps.

    Raises:
        `ValueError`: a folder has no weights, or a name is `"own"`.
    """
    if OWN in loras:
        raise ValueError(f"{OWN!r} is the row of the model's own anchor LoRA; give {loras[OWN]} another name.")
    hashes = {}
    for name, path in loras.items():
        if not (path / WEIGHT_FILE).is_file():
            raise ValueError(f"No {WEIGHT_FILE} in {path}, the folder of {name!r}.")
        hashes[name] = hashlib.sha256((path / WEIGHT_FILE).read_bytes()).hexdigest()[:16]
    scenes, _ = split_scenes(per_category, 4)
    journal = Journal(folder / "ablation.jsonl", journal_header(pipe, reported=scenes))
    # Adapters are named by a hash of their weights, so that a LoRA that was trained again gets new records.
    adapters = {name: f"lora_{digest}" for name, digest in hashes.items()}
    for name, path in loras.items():
        pipe.load_lora_weights(path, adapter_name=adapters[name])
    pipe.set_adapters(ADAPTER_NAME, 1.0)
    first_frames, rows = FirstFrames(pipe, scenes), []
    for name in (OWN, *loras):
        for strength in strengths:
            cells = [Cell("ablation", arm, steps, lora=adapters.get(name), strength=strength) for arm in INPUTS]
            records = complete(pipe, cells, first_frames, range(seeds), journal, batch_size)
            inputs = {row.pop("arm"): row for row in summarize(records)}
            rows.append({"lora": name, "strength": strength, "inputs": inputs})
    text = table(rows)
    study = {"synthetic": True, "made_with": provenance(pipe), "weights": hashes, "seeds": seeds, "rows": rows}
    (folder / "ablation.json").write_text(json.dumps(study) + "\n")
    (folder / "ablation.txt").write_text(text + "\n")
    return text
