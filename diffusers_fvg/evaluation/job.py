"""The work that an engine gets, and the steps that all engines share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from tqdm.auto import tqdm

from .manifest import MANIFEST
from .plan import PlannedVideo, derive_seed
from .worker import Load, Worker


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Job:
    """The work of a run.

    Args:
        folder (`Path`): the output folder.
        pending (`Path`): file with the lines of the plan whose videos are still to be made.
        count (`int`): number of these lines.
        load ([`Load`]): loads the pipeline.
        parts (`frozenset[str]`): parts of the pipeline that at least one of the videos needs.
        run_id (`str`): id of the run's [`~manifest.Turn`].
        num_processes (`int`): number of workers that make videos.
        num_rewriters, num_composers (`int`): number of workers for stages 1 and 2, with Ray only.
        quiet (`bool`): whether to hide the progress bar.
    """

    folder: Path
    pending: Path
    count: int
    load: Load
    parts: frozenset[str]
    run_id: str
    num_processes: int = 1
    num_rewriters: int = 1
    num_composers: int = 1
    quiet: bool = False

    def rows(self, index: int = 0, count: int = 1) -> Iterator[PlannedVideo]:
        """Yields the videos to make; with `count` workers only those of worker `index`, by [`fair_share`]."""
        with open(self.pending, encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file):
                if fair_share(number, count) == index:
                    yield PlannedVideo.from_json(line)

    def row(self, place: int) -> PlannedVideo:
        """Returns the video whose line begins at byte `place` of the file."""
        with open(self.pending, "rb") as file:
            file.seek(place)
            return PlannedVideo.from_json(file.readline().decode())


def make_or_note(worker: Worker, row: PlannedVideo, stage: Callable[[PlannedVideo], Any]) -> bool:
    """Runs `stage` for a video. An error that concerns this video alone is recorded in the manifest and logged.

    Returns:
        `bool`: whether the stage succeeded.
    """
    try:
        stage(row)
        return True
    except (ValueError, FloatingPointError) as error:
        worker.failed(row, error)
        logger.warning(f"{row.path} cannot be made: {error}")
        return False


def fair_share(number: int, count: int) -> int:
    """Returns the index of the worker that makes video `number`: of `count` videos in a row each worker makes one, in random
    order.

    A fixed order would be unfair: where the variants of a comparison alternate in a plan, each worker would get only one.
    """
    return (number + derive_seed(0, number // count)) % count


class Watch:
    """Progress bar that follows the lines which workers add to the manifest from now on.

    Args:
        job ([`Job`]): the job of the workers.
        on_line (`Callable`, *optional*): called with each new line.
    """

    def __init__(self, job: Job, on_line: Callable[[Mapping[str, Any]], None] | None = None):
        self._folder, self._on_line = job.folder / MANIFEST, on_line
        self._bar = tqdm(total=job.count, desc="videos", unit="video", disable=job.quiet)
        self._places = {path: path.stat().st_size for path in self._folder.glob("*.jsonl")}

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def update(self) -> None:
        """Reads new lines and advances the progress bar."""
        for path in self._folder.glob("*.jsonl"):
            place = self._places.get(path, 0)
            if path.stat().st_size <= place:
                continue
            with open(path, "rb") as file:
                file.seek(place)
                added = file.read()
            # The last line may be incomplete.
            lines = added[: added.rfind(b"\n") + 1]
            self._places[path] = place + len(lines)
            self._bar.update(lines.count(b"\n"))
            if self._on_line is not None:
                for line in lines.splitlines():
                    self._on_line(json.loads(line))
