"""What an engine is given, and what every engine does with one video."""

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
        pending (`Path`): the lines of the plan that are to be made.
        count (`int`): how many.
        load ([`Load`]): the pipeline.
        parts (`frozenset[str]`): what of it all of them together need.
        run_id (`str`): of the turn.
        num_processes (`int`): workers that make videos.
        num_rewriters, num_composers (`int`): where stages 1 and 2 have workers of their own.
        quiet (`bool`): no progress bar.
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
        """The videos to make; of `count` workers those of one, its [`fair_share`]."""
        with open(self.pending, encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file):
                if fair_share(number, count) == index:
                    yield PlannedVideo.from_json(line)

    def row(self, place: int) -> PlannedVideo:
        """The video whose line begins at this byte."""
        with open(self.pending, "rb") as file:
            file.seek(place)
            return PlannedVideo.from_json(file.readline().decode())


def make_or_note(worker: Worker, row: PlannedVideo, stage: Callable[[PlannedVideo], Any]) -> bool:
    """Runs a stage of a video, or all; one that cannot be made for a reason of its own gets a line that says so.

    Returns:
        `bool`: whether it could be made.
    """
    try:
        stage(row)
        return True
    except (ValueError, FloatingPointError) as error:
        worker.failed(row, error)
        logger.warning(f"{row.path} cannot be made: {error}")
        return False


def fair_share(number: int, count: int) -> int:
    """Which of `count` workers makes a video: of `count` in a row each makes one, in an order drawn for them.

    Where every `count`-th were a worker's, arms that take turns in a plan would each have a worker of its own.
    """
    return (number + derive_seed(0, number // count)) % count


class Watch:
    """Follows the lines that workers add to the manifest, on a progress bar; what is there already is left out.

    Args:
        job ([`Job`]): whose workers they are.
        on_line (`Callable`, *optional*): is given each line.
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
        """Looks for new lines."""
        for path in self._folder.glob("*.jsonl"):
            place = self._places.get(path, 0)
            if path.stat().st_size <= place:
                continue
            with open(path, "rb") as file:
                file.seek(place)
                added = file.read()
            # The last may be in the making.
            lines = added[: added.rfind(b"\n") + 1]
            self._places[path] = place + len(lines)
            self._bar.update(lines.count(b"\n"))
            if self._on_line is not None:
                for line in lines.splitlines():
                    self._on_line(json.loads(line))
