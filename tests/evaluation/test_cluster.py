"""What the driver of a run does around Ray and accelerate, which these tests do not start."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from diffusers_fvg.evaluation.engines import cluster, processes


@pytest.mark.parametrize("fails", [False, True])
def test_lines_are_looked_for_after_each_block_and_at_the_end(tmp_path, monkeypatch, fails):
    seen = []

    def blocks(batch_size):
        for number in range(2):
            seen.append(f"block {number}")
            yield number
        if fails:
            raise RuntimeError("a machine is gone")

    data = SimpleNamespace(DataContext=SimpleNamespace(get_current=SimpleNamespace))
    ray = SimpleNamespace(data=data, init=lambda **options: None, shutdown=lambda: seen.append("shut down"))
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", data)
    monkeypatch.setattr(cluster, "_videos", lambda job: SimpleNamespace(iter_batches=blocks))
    watch = SimpleNamespace(update=lambda: seen.append("looked"))
    job = SimpleNamespace(folder=tmp_path)
    if fails:
        with pytest.raises(RuntimeError, match="a machine is gone"):
            cluster.run_cluster(job, watch)
    else:
        cluster.run_cluster(job, watch)
    end = ["shut down"] if fails else ["looked", "shut down"]
    assert seen == ["block 0", "looked", "block 1", "looked", *end]


def test_lines_are_looked_for_while_processes_run_and_at_the_end(tmp_path, monkeypatch):
    seen, states = [], [None, None, 0]

    def wait(timeout=None):
        seen.append("waited")
        if timeout is not None:
            raise subprocess.TimeoutExpired("accelerate", timeout)

    launcher = SimpleNamespace(poll=lambda: states.pop(0), wait=wait, terminate=lambda: None, returncode=0)
    monkeypatch.setattr(processes.subprocess, "Popen", lambda command, env: launcher)
    watch = SimpleNamespace(update=lambda: seen.append("looked"))
    processes.run_processes(SimpleNamespace(folder=tmp_path, num_processes=2), watch)
    assert seen == ["looked", "waited", "looked", "waited", "looked", "waited"]
