"""Makes the videos of a plan with one of the engines, and continues where an earlier run stopped."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.utils import logging

from .engines import ENGINES
from .job import Job, Watch
from .manifest import FULL, TEMPORARY, Manifest, Turn, finished_sizes, is_finished, path_key, read_manifest
from .plan import RUN_FACTS, PlannedVideo, keep_facts, plan_facts, read_plan
from .storage import Storage
from .worker import Load, note_found, parts_of


logger = logging.get_logger(__name__)

PENDING = "pending.jsonl"


@dataclass(frozen=True)
class Summary:
    """Result of a run.

    Args:
        planned, finished (`int`): number of videos in the plan, and number of those that are finished.
        made (`int`): number of videos that this run made.
        failures (`tuple[tuple[str, str], ...]`): path and error of the videos that failed, at most 100.
    """

    planned: int
    finished: int
    made: int
    failures: tuple[tuple[str, str], ...] = ()


def run_plan(
    folder: str | os.PathLike,
    load: Load,
    made_by: Mapping[str, Any] | None = None,
    engine: str = "in-process",
    num_processes: int = 1,
    num_rewriters: int = 1,
    num_composers: int = 1,
    quiet: bool = False,
    storage: Storage | None = None,
) -> Summary:
    """Makes the videos of a plan that are not finished yet.

    If one video fails with a `ValueError` or with values that are not finite, the others are still made, and the next run
    tries it again.

    Args:
        folder (`str` or `os.PathLike`): the output folder, with the plan that [`~evaluation.plan.write_plan`] wrote.
        load ([`Load`]): loads the pipeline; engines with several processes pickle it.
        made_by (mapping, *optional*): JSON values that name the model, for `run.json`. A later run with other values, except
            for `"versions"`, is refused.
        engine (`str`): `"in-process"`, `"accelerate"` (several processes on this machine) or `"ray"` (on several machines).
        num_processes (`int`): number of workers that make videos.
        num_rewriters, num_composers (`int`): number of workers for stages 1 and 2, with Ray only.
        quiet (`bool`): whether to hide the progress bar.
        storage ([`~evaluation.storage.Storage`], *optional*): opened storage for all files; `folder` is then its folder on
            this machine.

    Returns:
        [`Summary`]: numbers of videos, and the failures.

    Raises:
        `ValueError`: the folder has no plan, is in use by another run or holds videos of another model, or the engine is
            unknown.
        `OSError`: the disk is full, or the storage fails. Finished videos stay, and the same call continues.
    """
    folder = Path(folder)
    if engine not in ENGINES:
        raise ValueError(f"`engine={engine!r}` must be one of {', '.join(ENGINES)}.")
    if storage is not None and engine == "ray" and os.environ.get("RAY_ADDRESS"):
        raise ValueError(
            f"the machines of RAY_ADDRESS exchange images through a folder that all of them share, but {storage.url} is no "
            "such folder; name one, or unset RAY_ADDRESS to make the videos on this machine."
        )
    planned, count = plan_facts(folder)["videos"], 0
    try:
        with Turn(folder) as turn:
            keep_facts(folder / RUN_FACTS, made_by or {})
            if storage is not None:
                storage.add_facts()
            pending = folder / TEMPORARY / PENDING
            count, parts = _write_pending(folder, pending, storage)
            if storage is not None:
                storage.add_finished()
            if count:
                workers = (num_processes, num_rewriters, num_composers)
                job = Job(folder, pending, count, load, parts, turn.id, *workers, quiet)
                with Watch(job, None if storage is None else storage.add) as watch:
                    ENGINES[engine](job, watch)
            if storage is not None:
                storage.finish()
    except OSError as error:
        if error.errno not in FULL:
            raise
        finished = planned - sum(1 for _ in _missing(folder, storage))
        raise OSError(
            f"no space is left in {folder} ({os.strerror(error.errno)}): {finished} of {planned} videos are finished and whole. Make "
            "room and run the same command again; it continues from there."
        ) from error
    return _summary(folder, planned, count, storage)


def _write_pending(folder: Path, pending: Path, storage: Storage | None) -> tuple[int, frozenset[str]]:
    """Writes the lines of the videos to make; returns their number and the parts of the pipeline that they need."""
    count = 0
    parts: frozenset[str] = frozenset()
    listed = {} if storage is None else storage.sizes()
    sizes, manifest = finished_sizes(folder), Manifest(folder)
    try:
        with open(pending, "w", encoding="utf-8", newline="\n") as file:
            for row in read_plan(folder):
                if is_finished(folder, row, sizes, listed):
                    continue
                if storage is not None and path_key(row.path) in listed and path_key(row.path) not in sizes:
                    _note_listed(storage, row, manifest)
                    continue
                if _is_found(folder, row, sizes, manifest):
                    continue
                file.write(row.to_json() + "\n")
                count, parts = count + 1, parts | parts_of(row.arguments)
    finally:
        manifest.close()
    return count, parts


def _is_found(folder: Path, row: PlannedVideo, sizes: dict[bytes, int], manifest: Manifest) -> bool:
    """Returns whether an existing video gets a line now; removes it if its size differs from that in its line."""
    path = folder / row.path
    if not path.exists():
        return False
    if path_key(row.path) in sizes:
        logger.warning(f"{path} has {path.stat().st_size} bytes, unlike the number in its line, and is made again.")
        path.unlink()
        return False
    try:
        note_found(path, row, manifest)
        return True
    except ValueError:
        # The worker that gets the video reports the error.
        return False


def _note_listed(storage: Storage, row: PlannedVideo, manifest: Manifest) -> None:
    """Adds the missing line of a video that is in the storage."""
    try:
        with storage.borrowed(row.path) as path:
            note_found(path, row, manifest)
    except ValueError as error:
        raise ValueError(
            f"{storage.url}/{row.path} was not made by this plan, or is damaged; move it away."
        ) from error


def _missing(folder: Path, storage: Storage | None) -> Iterator[PlannedVideo]:
    sizes, listed = finished_sizes(folder), {} if storage is None else storage.sizes()
    return (row for row in read_plan(folder) if not is_finished(folder, row, sizes, listed))


def _summary(folder: Path, planned: int, count: int, storage: Storage | None) -> Summary:
    missing = {path_key(row.path) for row in _missing(folder, storage)}
    failed = [line for line in (read_manifest(folder) if missing else ()) if line["status"] == "failed"]
    # In order of time, so that the latest error of each video is kept.
    failed.sort(key=lambda line: line["time"])
    failures = {line["path"]: line["error"] for line in failed if path_key(line["path"]) in missing}
    return Summary(planned, planned - len(missing), count - len(missing), tuple(failures.items())[:100])
