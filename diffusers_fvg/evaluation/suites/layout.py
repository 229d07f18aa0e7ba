"""Arranges the finished videos of a run for an official evaluator: with exact file names, and no other files beside them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..plan import PlannedVideo, read_plan
from .suite import Suite, read_json


# Name of the file beside the models' folders.
LAYOUT_FACTS = "layout.json"


def condition_folder(video: PlannedVideo) -> str:
    """Returns the folder of a video's condition and seed, which an evaluator takes for one model."""
    return f"{video.labels['condition']}_seed-{video.labels['seed']}"


def lay_out(
    run: Path,
    output: Path,
    suites: Mapping[str, Suite],
    skip_missing: bool = False,
    places: Callable[[str, str], list[str]] | None = None,
) -> dict[str, int]:
    """Creates `output/<condition>_seed-<seed>/` for each condition and seed of a run, with hard links or copies of the videos.

    Files of an earlier call are replaced if the run has made them anew.

    Args:
        run (`Path`): output folder of a run.
        output (`Path`): folder outside of the run's.
        suites (`Mapping[str, Suite]`): suites by name.
        skip_missing (`bool`): whether to leave out missing videos, if the suite's evaluator does so, too.
        places (`Callable`, *optional*): replaces the suite's own `places`.

    Returns:
        `dict[str, int]`: number of files in each folder.

    Raises:
        `ValueError`: the run belongs to no suite, videos are missing, `output` is in the run's folder, or it holds a file
            that the evaluator would take for a video.
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
            raise ValueError(f"{run} is not a run of a suite: {video.path} belongs to no known suite.")
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
    """Raises a `ValueError` for any other file in the folders, because evaluators open all files there."""
    for folder in {target.parent for target in links}:
        stray = (
            next((path for path in sorted(folder.iterdir()) if path not in links), None) if folder.is_dir() else None
        )
        if stray is not None:
            raise ValueError(f"{stray} is not a video of this run, and the evaluator would open it: move it away.")


def _link(source: Path, target: Path) -> None:
    if target.exists():
        if target.samefile(source):
            return
        target.unlink()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        # The folders are on different file systems, or the file system has no hard links.
        shutil.copyfile(source, target)


def layout_facts(layout: Path) -> dict:
    """Returns the facts that [`lay_out`] wrote: suite, ratio of images, and folders.

    Raises:
        `ValueError`: the folder is not an output of [`lay_out`].
    """
    if not (layout / LAYOUT_FACTS).is_file():
        raise ValueError(f"{layout} holds no layout of videos: run fvg bench layout RUN {layout} first.")
    return read_json(layout / LAYOUT_FACTS, dict)


def lmms_eval_places(category: str, name: str) -> list[str]:
    """Returns the place `vbench2/<name>` in the output folder of a video model of lmms-eval, which then skips generation.

    The metric of lmms-eval itself is the share of existing videos; VBench's scorer computes the scores
    (github.com/EvolvingLMMs-Lab/lmms-eval, `lmms_eval/tasks/vbench/README.md` at 3640c59).
    """
    return [f"vbench2/{name}"]
