"""Lays the finished videos of a run out as an official evaluator looks for them: exact names, and nothing else beside them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..plan import PlannedVideo, read_plan
from .suite import Suite, read_json


# Beside the models' folders.
LAYOUT_FACTS = "layout.json"


def condition_folder(video: PlannedVideo) -> str:
    """The name under which an evaluator sees a condition and a seed: one model of its own."""
    return f"{video.labels['condition']}_seed-{video.labels['seed']}"


def lay_out(
    run: Path,
    output: Path,
    suites: Mapping[str, Suite],
    skip_missing: bool = False,
    places: Callable[[str, str], list[str]] | None = None,
) -> dict[str, int]:
    """Makes `output/<condition>_seed-<seed>/` for each condition and seed of a run. Files are hard links where they can be.

    What is there already is replaced where it is another file, so that a run that has gone on is laid out again.

    Args:
        run (`Path`): output folder of a run.
        output (`Path`): outside of it.
        suites (`Mapping[str, Suite]`): by name.
        skip_missing (`bool`): leave out videos that are not there, where the evaluator does so too.
        places (`Callable`, *optional*): of a category and a name, in place of the suite's own.

    Returns:
        `dict[str, int]`: folder to the number of files in it.

    Raises:
        `ValueError`: videos are missing, or a file lies in the output that the evaluator would take for a video.
    """
    if output.resolve() == run.resolve() or run.resolve() in output.resolve().parents:
        raise ValueError(f"{output} is in the run's own folder; choose another.")
    links: dict[Path, Path] = {}
    missing: list[str] = []
    counts: dict[str, int] = {}
    facts: dict[str, Any] = {}
    for video in read_plan(run):
        suite = suites.get(video.labels.get("suite", ""))
        if suite is None:
            raise ValueError(f"{run} is no run of a suite: {video.path} belongs to none.")
        image = video.arguments.get("image")
        facts = {"suite": suite.name, "ratio": image and Path(image).parent.name}
        source = run / video.path
        if not source.is_file():
            missing.append(video.path)
            if skip_missing and not suite.skips_missing:
                raise ValueError(f"{video.path} is missing, and the evaluator of {suite.name} needs every video.")
            continue
        folder = condition_folder(video)
        for place in (places or suite.places)(video.labels["category"], video.labels["name"]):
            links[output / folder / place] = source
            counts[folder] = counts.get(folder, 0) + 1
    if missing and not skip_missing:
        raise ValueError(
            f"{len(missing)} videos are missing, the first {missing[0]}: make them with fvg bench run {run}."
        )
    _check_strays(links)
    for target, source in links.items():
        _link(source, target)
    text = json.dumps(facts | {"folders": sorted(counts)}, indent=2) + "\n"
    (output / LAYOUT_FACTS).write_text(text, encoding="utf-8")
    return counts


def _check_strays(links: Mapping[Path, Path]) -> None:
    """Evaluators open whatever lies in a folder of videos."""
    for folder in {target.parent for target in links}:
        stray = (
            next((path for path in sorted(folder.iterdir()) if path not in links), None) if folder.is_dir() else None
        )
        if stray is not None:
            raise ValueError(f"{stray} is no video of this run, and the evaluator would open it: move it away.")


def _link(source: Path, target: Path) -> None:
    if target.exists():
        if target.samefile(source):
            return
        target.unlink()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        # Another file system, or one without hard links.
        shutil.copyfile(source, target)


def layout_facts(layout: Path) -> dict:
    """What [`lay_out`] says of what it laid out.

    Raises:
        `ValueError`: it made nothing there.
    """
    if not (layout / LAYOUT_FACTS).is_file():
        raise ValueError(f"{layout} is not laid out: run fvg bench layout RUN {layout} first.")
    return read_json(layout / LAYOUT_FACTS, dict)


def lmms_eval_places(category: str, name: str) -> list[str]:
    """`vbench2/<name>` of the output folder of a video model of lmms-eval, which then finds its combined task done.

    Its own metric is the share of videos that are there; scores are those of VBench's scorer (github.com/EvolvingLMMs-Lab/lmms-eval,
    `lmms_eval/tasks/vbench/README.md` at 3640c59).
    """
    return [f"vbench2/{name}"]
