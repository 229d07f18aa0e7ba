"""What an engine is given, and what every engine does with one video."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from tqdm.auto import tqdm

from .manifest import MANIFEST
from .plan import PlannedVideo
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
        """The videos to make; of `count` workers those of one, every `count`-th."""
        with open(self.pending, encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file):
                if number % count == index:
                    yield PlannedVideo.from_json(line)

    def row(self, place: int) -> PlannedVideo:
        """The video whose line begins at this byte."""
        with open(self.pending, "rb") as file:
            file.seek(place)
            return PlannedVideo.from_json(file.readline().decode())

    def bar(self) -> tqdm:
        return tqdm(total=self.count, desc="videos", unit="video", disable=self.quiet)


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


class Watch:
    """Shows on a bar the lines that workers add to the manifest; what is there already is not counted.

    Args:
        job ([`Job`]): whose workers they are.
        bar (`tqdm`): the bar.
    """

    def __init__(self, job: Job, bar: tqdm):
        self._folder, self._bar = job.folder / MANIFEST, bar
        self._places: dict[Path, int] = {}
        self._new()

    def update(self) -> None:
        count = self._new()
        if count:
            self._bar.update(count)

    def _new(self) -> int:
        count = 0
        for path in self._folder.glob("*.jsonl"):
            place = self._places.get(path, 0)
            if path.stat().st_size > place:
                with open(path, "rb") as file:
                    file.seek(place)
                    added = file.read()
                count += added.count(b"\n")
                self._places[path] = place + len(added)
        return count
