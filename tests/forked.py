"""Processes that fork from a server, which has imported the heavy packages once."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess

import pytest


def start_processes(function: Callable, arguments: list[tuple]) -> list[ForkServerProcess]:
    """Starts a process for each tuple of arguments. All have the environment of the first such call."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    processes = [context.Process(target=function, args=each) for each in arguments]
    with pytest.MonkeyPatch.context() as patch:
        # The server finds modules by its environment only.
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        for process in processes:
            process.start()
    return processes


def finish(processes: list[ForkServerProcess]) -> None:
    for process in processes:
        process.join(timeout=240)
    assert [process.exitcode for process in processes] == [0] * len(processes)
