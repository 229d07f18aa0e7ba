"""Measures how many videos of the shapes suite two workers make in the time of one, each with one thread.

    OMP_NUM_THREADS=1 python tests/evaluation/measure_throughput.py OUT

needs two processor cores that nothing else uses. A rate is videos a second from a worker's first video to its last, and of two
workers the sum. Driver and launcher stay on the first core. It prints three ratios and their median.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil

from diffusers_fvg.cli import main
from diffusers_fvg.evaluation.manifest import read_manifest


PAIRS = 3


def rate(plan: Path, out: Path, count: int) -> tuple[float, float]:
    """Returns the videos per second of `count` workers, and the seconds of the whole run."""
    shutil.copytree(plan, out)
    flags = ["--engine", "accelerate", "--num-processes", str(count), "--quiet"]
    began = time.perf_counter()
    driver = psutil.Popen(
        [sys.executable, "-m", "diffusers_fvg.cli", "bench", "run", str(out), *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while driver.poll() is None and not any(True for _ in read_manifest(out)):
        time.sleep(0.05)
    # Set after the workers have started, which would otherwise inherit this core.
    driver.cpu_affinity([0])
    for child in driver.children():
        child.cpu_affinity([0])
    assert driver.wait() == 0
    whole, times = time.perf_counter() - began, {}
    for line in read_manifest(out):
        times.setdefault(line["worker"], []).append(line["time"])
    assert len(times) == count
    return sum((len(own) - 1) / (max(own) - min(own)) for own in times.values()), whole


def measure(out: Path, per_category: int) -> None:
    shutil.rmtree(out, ignore_errors=True)
    prompts, plan, ratios = out / "prompts", out / "plan", []
    assert main(["shapes", "prompts", str(prompts), "--per-category", str(per_category)]) == 0
    arms = ["--arms", "direct", "--steps", "4"]
    assert main(["bench", "plan", str(plan), "--suite", "shapes", "--prompts", str(prompts), *arms]) == 0
    for number in range(PAIRS):
        (one, alone), (two, together) = (rate(plan, out / f"{number}-{count}", count) for count in (1, 2))
        ratios.append(two / one)
        print(
            f"one worker {one:.3f} videos a second, two {two:.3f}: {two / one:.2f} times (whole runs {alone:.0f} s and {together:.0f} s)",
            flush=True,
        )
    print(f"median: {statistics.median(ratios):.2f} times")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--per-category", type=int, default=3, help="prompts of each of the seven categories")
    arguments = parser.parse_args()
    measure(arguments.out, arguments.per_category)
