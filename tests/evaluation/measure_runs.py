"""Measures the overhead of a run with a pipeline that makes two tiny frames, and the memory and time of a long plan.

python tests/evaluation/measure_runs.py OUT [--videos 10000] [--rows 1000000]
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import psutil
import torch
from stub import StubLoad

from diffusers_fvg.evaluation import worker
from diffusers_fvg.evaluation.plan import PlannedVideo, derive_seed, read_plan, write_plan
from diffusers_fvg.evaluation.run import run_plan


MIB = 2**20


def rows(count):
    for index in range(count):
        arguments = {"mode": "direct", "height": 480, "width": 832, "num_frames": 81, "preset": "anchored-15"}
        labels = {"suite": "measured", "category": str(index % 7), "prompt": str(index)}
        prompt = f"Prompt number {index} tells in some words what should happen in the video, and what should not"
        yield PlannedVideo(
            f"videos/{index % 100:02d}/{index:07d}.mp4", prompt, derive_seed(0, index), arguments, labels
        )


def timed(call, spent):
    def wrapped(*arguments, **options):
        began = time.process_time(), time.perf_counter()
        try:
            return call(*arguments, **options)
        finally:
            spent[0] += time.process_time() - began[0]
            spent[1] += time.perf_counter() - began[1]

    return wrapped


def measure_run(out: Path, count: int) -> None:
    write_plan(out, rows(count))
    inner, memory = [0.0, 0.0], []
    worker.write_video, worker.animate = timed(worker.write_video, inner), timed(worker.animate, inner)
    original = worker.Worker.make

    def make(self, row):
        if len(memory) * count < self.number * 10:
            memory.append(psutil.Process().memory_info().rss / MIB)
        self.number += 1
        return original(self, row)

    worker.Worker.number, worker.Worker.make = 0, make
    began = time.process_time(), time.perf_counter()
    summary = run_plan(out, StubLoad(), quiet=True)
    whole = time.process_time() - began[0], time.perf_counter() - began[1]
    assert summary.made == count
    processor, wall = (1000 * (all_ - part) / count for all_, part in zip(whole, inner))
    print(f"{count} videos: {whole[1]:.0f} s, {inner[1]:.0f} s of them in the pipeline and the encoder")
    print(f"overhead of a video: {wall:.2f} ms, {processor:.2f} ms of processor time")
    print("resident MiB at each tenth:", ", ".join(f"{each:.0f}" for each in memory))
    began = time.perf_counter()
    assert run_plan(out, StubLoad(), quiet=True).made == 0
    print(f"a run that finds all of them: {time.perf_counter() - began:.1f} s")


def measure_plan(out: Path, count: int) -> None:
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, time.perf_counter()
    write_plan(out, rows(count))
    middle = time.perf_counter()
    assert sum(1 for _ in read_plan(out)) == count
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{count} rows: written in {middle - began:.0f} s, read in {time.perf_counter() - middle:.0f} s; peak {peak:.0f} MiB, before "
        f"{before:.0f}; {(out / 'plan.jsonl').stat().st_size / MIB:.0f} MiB on disk"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--videos", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measure_plan(arguments.out / "plan", arguments.rows)
    measure_run(arguments.out / "run", arguments.videos)
