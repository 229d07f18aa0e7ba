"""What makes the videos of a [`Job`]: this process, several on this machine, or a cluster."""

from __future__ import annotations

from collections.abc import Callable

from ..job import Job, make_or_note
from ..worker import Worker
from .cluster import run_cluster
from .processes import run_processes


def run_in_process(job: Job) -> None:
    """One video after the other, here."""
    worker = Worker(job.folder, job.load, job.parts)
    try:
        with job.bar() as bar:
            for row in job.rows():
                make_or_note(worker, row, worker.make)
                bar.update()
    finally:
        worker.close()


ENGINES: dict[str, Callable[[Job], None]] = {
    "in-process": run_in_process,
    "accelerate": run_processes,
    "ray": run_cluster,
}
