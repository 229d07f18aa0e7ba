"""Entry point of a worker process, which [`engines.processes`] starts with `accelerate launch`."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import torch

from .job import Job, make_or_note
from .manifest import is_turn, stop_run
from .worker import Worker


def main(path: str) -> None:
    """Makes this process's share of the videos of a pickled [`Job`].

    The processes do not communicate. So they create no process group, which would fail if one of them died.
    """
    job: Job = pickle.loads(Path(path).read_bytes())
    index, count, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = f"{torch.accelerator.current_accelerator().type}:{local}" if torch.accelerator.is_available() else None
    worker = None
    try:
        worker = Worker(job.folder, job.load, job.parts, device)
        for row in job.rows(index, count):
            if not is_turn(job.folder, job.run_id):
                break
            make_or_note(worker, row, worker.make)
    except Exception as error:
        # The error stops the other processes. It is not raised, because the launcher would restart this process.
        stop_run(job.folder, error)
    finally:
        if worker is not None:
            worker.close()


if __name__ == "__main__":
    main(sys.argv[1])
