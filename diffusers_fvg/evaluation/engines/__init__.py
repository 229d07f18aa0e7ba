"""Engines, which make the videos of a [`Job`]: this process, several processes on this machine, or a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable

from ..job import Job, Watch
from .cluster import run_cluster
from .in_process import run_in_process
from .processes import run_processes


ENGINES: dict[str, Callable[[Job, Watch], None]] = {
    "in-process": run_in_process,
    "accelerate": run_processes,
    "ray": run_cluster,
}
