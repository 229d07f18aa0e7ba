"""The engine that makes the videos in this process."""

from __future__ import annotations

from ..job import Job, Watch, make_or_note
from ..worker import Worker


def run_in_process(job: Job, watch: Watch) -> None:
    """Makes one video after the other."""
    worker = Worker(job.folder, job.load, job.parts)
    try:
        for row in job.rows():
            make_or_note(worker, row, worker.make)
            watch.update()
    finally:
        worker.close()
