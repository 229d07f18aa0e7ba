"""One of the processes of [`engines.processes`], as `accelerate launch` starts it."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from .job import Job, make_or_note
from .manifest import is_turn, stop_run
from .worker import Worker


def main(path: str) -> None:
    """Makes its share of the videos of a pickled [`Job`]."""
    job: Job = pickle.loads(Path(path).read_bytes())
    state, worker = PartialState(cpu=not torch.accelerator.is_available()), None
    try:
        worker = Worker(job.folder, job.load, job.parts, None if state.device.type == "cpu" else str(state.device))
        for row in job.rows(state.process_index, state.num_processes):
            if not is_turn(job.folder, job.run_id):
                break
            make_or_note(worker, row, worker.make)
    except Exception as error:
        # It stops the other processes, and is no reason to start this one again.
        stop_run(job.folder, error)
    finally:
        if worker is not None:
            worker.close()
        state.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
