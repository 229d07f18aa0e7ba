"""This process."""

from __future__ import annotations

from ..job import Job, make_or_note
from ..worker import Worker


def run_in_process(job: Job) -> None:
    """Makes one video after the other."""
    worker = Worker(job.folder, job.load, job.parts)
    try:
        with job.bar() as bar:
            for row in job.rows():
                make_or_note(worker, row, worker.make)
                bar.update()
    finally:
        worker.close()
