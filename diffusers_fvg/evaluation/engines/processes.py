"""The engine with several processes on this machine: each loads the pipeline and makes its share of the videos.

`accelerate launch` starts the processes. If one dies, it restarts all of them; finished videos stay.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

from .. import process
from ..job import Job, Watch
from ..manifest import FULL, PATIENCE, stopped_by
from .in_process import run_in_process


# Most restarts of the processes by the launcher.
MAX_RESTARTS = 3
PACKAGE_FOLDER = Path(__file__).parents[3]


def run_processes(job: Job, watch: Watch) -> None:
    """Makes the videos in `job.num_processes` processes, or in this process if the number is 1.

    Raises:
        `OSError`, `RuntimeError`: a process stopped the run, with its error, or the processes died too often.
    """
    if job.num_processes == 1:
        return run_in_process(job, watch)
    # The folder is private to this user, so that nobody else can replace the pickle.
    with tempfile.TemporaryDirectory() as private:
        path = Path(private) / "job.pickle"
        path.write_bytes(pickle.dumps(job))
        options: dict[str, int | str] = {
            "num_processes": job.num_processes,
            "num_machines": 1,
            "max_restarts": MAX_RESTARTS,
        }
        options |= {"mixed_precision": "no", "dynamo_backend": "no", "main_process_port": 0}
        flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        # `--multi_gpu` starts several processes on CPUs, too.
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
        command = [*launch, *flags, "-m", process.__name__, str(path)]
        paths = [str(PACKAGE_FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
        launcher = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)})
        try:
            while launcher.poll() is None:
                watch.update()
                try:
                    launcher.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    continue
            watch.update()
        finally:
            launcher.terminate()
            launcher.wait()
    raise_stopped(job.folder)
    if launcher.returncode:
        raise RuntimeError(
            f"the worker processes died {MAX_RESTARTS + 1} times (exit status {launcher.returncode}); finished videos stay, and "
            "the same command continues from there."
        )


def raise_stopped(folder: Path) -> None:
    """Raises the error with which a worker stopped the run, if any."""
    told = stopped_by(folder)
    if told is not None:
        raise (
            OSError(told["errno"], told["error"])
            if told["errno"] in FULL
            else RuntimeError(f"{told['kind']}: {told['error']}")
        )
