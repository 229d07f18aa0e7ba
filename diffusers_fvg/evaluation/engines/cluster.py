"""The Ray engine: each stage has its own pool of workers, on any number of machines that share the output folder.

Ray Data passes the videos from pool to pool and reassigns the work of a worker or machine that died. The results of each
stage are in the output folder, so reassigned work continues from there.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..job import Job, Watch, make_or_note
from ..manifest import is_turn, stop_run
from ..worker import COMPOSER, LORA, REWRITER, VIDEO, Worker, parts_of
from .processes import raise_stopped


if TYPE_CHECKING:
    import ray

# Object store of a cluster that this run starts. It holds line numbers only.
STORE_BYTES = 2**28
# Most videos in a block, which passes from pool to pool as one, and least number of blocks per worker.
MAX_BLOCK, BLOCKS_OF_A_WORKER = 64, 64


class Stage:
    """A worker of one stage, on any machine of the cluster.

    Args:
        job ([`Job`]): the work.
        parts (`frozenset[str]`): parts of the pipeline that the stage runs.
        method (`str`): name of the stage's method of [`Worker`].
    """

    def __init__(self, job: Job, parts: frozenset[str], method: str):
        self.job, self.parts, self.method = job, parts, method
        self.worker: Worker | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the stage for a batch of line numbers and returns the numbers of those that succeeded."""
        return {"id": np.array([number for number in batch["id"] if self._is_done(int(number))], dtype=np.int64)}

    def _is_done(self, number: int) -> bool:
        if not is_turn(self.job.folder, self.job.run_id):
            return False
        row = self.job.row(np.fromfile(_index(self.job), np.int64, 1, offset=8 * number)[0])
        if self.method != "animate" and not self.parts & parts_of(row.arguments):
            return True
        try:
            # Created with the first video and not in `__init__`, so that Ray does not take an error for a dead worker.
            self.worker = self.worker or Worker(self.job.folder, self.job.load, self.parts)
            return make_or_note(self.worker, row, getattr(self.worker, self.method))
        except Exception as error:
            stop_run(self.job.folder, error)
            return False


def run_cluster(job: Job, watch: Watch) -> None:
    """Makes the videos on the cluster of `RAY_ADDRESS`, or on one that starts here and ends with the run.

    Raises:
        `ImportError`: Ray is not installed.
        `OSError`, `RuntimeError`: a worker stopped the run; the error is that of the worker.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(
            "--engine ray needs Ray, which is not installed: pip install 'diffusers-fvg[ray]'"
        ) from error
    address = os.environ.get("RAY_ADDRESS")
    own = {"address": "local", "include_dashboard": False, "object_store_memory": STORE_BYTES}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        # Failures are recorded in the manifest, so the workers' logs are not shown.
        ray.init(**own if address is None else {"address": address}, logging_level="warning", log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    try:
        for _ in _videos(job).iter_batches(batch_size=None):
            watch.update()
        watch.update()
    finally:
        ray.shutdown()
    raise_stopped(job.folder)


def _videos(job: Job) -> ray.data.Dataset:
    """Returns the dataset of line numbers that pass through the pools."""
    import ray

    pools = [({REWRITER}, "rewrite", job.num_rewriters), ({COMPOSER}, "compose", job.num_composers)]
    pools = [pool for pool in pools if pool[0] & job.parts]
    pools.append(({LORA, VIDEO}, "animate", job.num_processes))
    share = _share(sum(count for *_, count in pools))
    np.fromiter(_places(job), np.int64, job.count).tofile(_index(job))
    block = max(1, min(MAX_BLOCK, job.count // (BLOCKS_OF_A_WORKER * job.num_processes)))
    data = ray.data.range(job.count, override_num_blocks=-(-job.count // block))
    for parts, method, count in pools:
        arguments = (job, frozenset(parts & job.parts), method)
        data = data.map_batches(
            Stage,
            fn_constructor_args=arguments,
            compute=ray.data.ActorPoolStrategy(size=count),
            batch_size=None,
            **share,
        )
    return data


def _index(job: Job) -> Path:
    """Returns the path of the file with the byte offset of each line."""
    return job.pending.with_suffix(".index")


def _places(job: Job) -> Iterator[int]:
    place = 0
    with open(job.pending, "rb") as file:
        for line in file:
            yield place
            place += len(line)


def _share(num_workers: int) -> dict[str, Any]:
    """Returns the resources of each worker: a GPU and a CPU core, or a fraction if there are more workers than these."""
    import ray

    there = ray.cluster_resources()
    # One CPU core is left for Ray's own tasks.
    processors = max(0.0, there.get("CPU", 1) - 1) / num_workers
    cards = there.get("GPU", 0) / num_workers
    return {
        name: min(1.0, int(value * 100) / 100)
        for name, value in (("num_cpus", processors), ("num_gpus", cards))
        if value
    }
