"""Writes shell scripts that create the environment of an official evaluator and run it on the output of [`layout`]."""

from __future__ import annotations

import json
import shlex
import sys
from importlib.resources import files
from pathlib import Path

from ...media.reading import Video
from .layout import layout_facts
from .suite import Suite, read_json


# Beginning of every script. `fetch` downloads an incomplete file again.
PREAMBLE = """#!/usr/bin/env bash
# {title}: {what}. Written by `fvg bench commands`.
set -euo pipefail

CONDA="${{CONDA:-conda}}"
PYTHON={python}
CHECKOUT={checkout}
LAYOUT={layout}
RESULTS={results}
ENVIRONMENTS="${{ENVIRONMENTS:-$RESULTS/environments}}"
MODELS=({models})
NUM_FRAMES={num_frames}
FRAME_RATE={frame_rate}
RATIO={ratio}

empty() {{
  if [ -d "$1" ] && [ -n "$(ls -A "$1")" ]; then
    echo "$1 is not empty: move it away first" >&2
    exit 1
  fi
}}
fetch() {{
  if [ ! -f "$1" ]; then
    mkdir -p "$(dirname "$1")"
    curl --fail --location --output "$1.part" "$2"
    mv "$1.part" "$1"
  fi
}}

"""
RESULTS_FACTS = "suite.json"
STEPS = {"environment": "makes its environments", "evaluate": "scores the videos"}


def write_commands(suite: Suite, layout: Path, checkout: Path, results: Path) -> list[Path]:
    """Writes `environment.sh` and `evaluate.sh` into the folder of the results, and `suite.json`, which names the suite.

    Args:
        suite ([`Suite`]): suite of the videos.
        layout (`Path`): output folder of [`lay_out`].
        checkout (`Path`): checkout of the evaluator's repository; `environment.sh` clones it if it does not exist. For the
            shapes suite, the folder with its prompts.
        results (`Path`): folder for the scripts. They write a folder of results for each model (a condition with one seed).

    Returns:
        `list[Path]`: the scripts.
    """
    facts = layout_facts(layout)
    models = facts["folders"]
    video = Video(next(layout.joinpath(models[0]).rglob("*.mp4")))
    results.mkdir(parents=True, exist_ok=True)
    quoted = {
        "python": sys.executable,
        "checkout": str(checkout.resolve()),
        "layout": str(layout.resolve()),
        "results": str(results.resolve()),
        "num_frames": str(len(video.times)),
        # The evaluators' scripts need an integer.
        "frame_rate": str(max(1, round(video.frame_rate))),
        "ratio": facts.get("ratio") or "",
    }
    values = {name: shlex.quote(value) for name, value in quoted.items()}
    values["models"] = shlex.join(models)
    written = []
    for step, what in STEPS.items():
        body = files(__package__).joinpath("scripts", suite.name, f"{step}.sh").read_text(encoding="utf-8")
        path = results / f"{step}.sh"
        path.write_text(PREAMBLE.format(title=suite.title, what=what, **values) + body, encoding="utf-8", newline="\n")
        path.chmod(0o755)
        written.append(path)
    (results / RESULTS_FACTS).write_text(json.dumps({"suite": suite.name, "models": models}, indent=2) + "\n")
    return written


def results_of(folder: Path, suite: str | None) -> tuple[str, dict[str, Path]]:
    """Returns the suite's name and the folder of each model in a folder of results.

    Raises:
        `ValueError`: the suite is not known from `suite` or the folder, or there are no results.
    """
    facts = read_json(folder / RESULTS_FACTS, dict) if (folder / RESULTS_FACTS).is_file() else {}
    name = suite or facts.get("suite")
    if name is None:
        raise ValueError(f"{folder} does not name the suite of its results: give --suite.")
    models = facts.get("models") or sorted(path.name for path in folder.iterdir() if path.is_dir())
    folders = {model: folder / model for model in models if (folder / model).is_dir()}
    if not folders:
        raise ValueError(f"{folder} holds no folder of results; run its evaluate.sh first.")
    return name, folders
