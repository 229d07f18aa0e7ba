"""Kills a run several times, resumes it, and checks the result at the end.

    python tests/evaluation/kill_runs.py OUT --engine accelerate --kills 20

makes videos of shapes with the embedded model and its judge in two processes. A kill is a SIGKILL of the driver, of the launcher or of a
worker, drawn at random after a random number of videos; with `--engine ray`, of a node too, of a cluster of two that begins
with each driver. It prints the counts, and fails unless every video is there once, whole, and of its own seed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil

from diffusers_fvg.evaluation.check import check_folder
from diffusers_fvg.evaluation.manifest import read_manifest


# Marks the environment of all processes that this script starts, so that it kills no others.
MARK = f"kill-runs-{os.getpid()}-{time.time_ns()}"
# Videos without stages 1 and 2, with them, and with a judge that chooses between two images.
ARMS = ({"mode": "direct"}, {"mode": "factorized"}, {"mode": "factorized", "composer_num_candidates": 2})
COLOURS, MOVES = ("red", "green", "blue", "yellow"), ("to the left", "to the right", "upwards", "downwards")


def write_prompts(path: Path, count: int) -> None:
    prompts = [f"A {colour} circle moves {move}" for colour in COLOURS for move in MOVES]
    rows = [{"prompt": prompts[index % len(prompts)], **ARMS[index % len(ARMS)]} for index in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Cluster:
    """Two nodes of Ray on this machine, the second of which may be killed."""

    PORT = 6399

    def __init__(self):
        self.nodes: list[int] = []

    def start(self) -> dict[str, str]:
        head = ["--head", f"--port={self.PORT}", "--include-dashboard=false", "--disable-usage-stats"]
        for flags in (head, [f"--address=127.0.0.1:{self.PORT}"]):
            before = set(self._raylets())
            command = [
                sys.executable,
                "-m",
                "ray.scripts.scripts",
                "start",
                *flags,
                "--num-cpus=3",
                "--object-store-memory=100000000",
            ]
            for _ in range(5):
                if subprocess.run(command, capture_output=True).returncode == 0:
                    break
                # A killed process may still hold its port.
                time.sleep(5)
            else:
                raise RuntimeError(f"no node of Ray starts: {' '.join(command)}")
            self.nodes += set(self._raylets()) - before
        return {"RAY_ADDRESS": f"127.0.0.1:{self.PORT}"}

    def _raylets(self) -> list[int]:
        return [pid for pid, name, _ in marked() if name == "raylet"]

    def stop(self) -> None:
        for pid, name, words in marked():
            if str(self.PORT) in words or name in ("raylet", "gcs_server") or words.startswith("ray::"):
                kill(pid)
        self.nodes = []


def marked() -> list[tuple[int, str, str]]:
    """Returns pid, name and command line of this script's processes and their children."""
    found = {}
    for process in psutil.process_iter():
        try:
            if process.environ().get("FVG_MARK") == MARK and process.pid != os.getpid():
                # Workers of Ray write their titles over their environments.
                for each in (process, *process.children()):
                    found[each.pid] = (each.pid, each.name(), " ".join(each.cmdline()))
        except psutil.Error:
            continue
    return list(found.values())


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def finished(out: Path) -> int:
    return sum(line["status"] != "failed" for line in read_manifest(out))


def victims(driver: subprocess.Popen, engine: str, cluster: Cluster | None) -> dict[str, list[int]]:
    """Returns the pids by kind of process."""
    found = {"driver": [driver.pid], "launcher": [], "worker": []}
    for pid, _, words in marked():
        if engine == "ray" and words.startswith("ray::MapWorker"):
            found["worker"].append(pid)
        elif "accelerate.commands.launch" in words:
            found["launcher"].append(pid)
        elif "diffusers_fvg.evaluation.process" in words:
            found["worker"].append(pid)
    if cluster is not None:
        found["node"] = cluster.nodes[1:]
    return {kind: pids for kind, pids in found.items() if pids}


def run(arguments: argparse.Namespace) -> None:
    out, draw, counts = arguments.out, random.Random(arguments.seed), Counter()
    prompts = out.with_suffix(".jsonl")
    write_prompts(prompts, arguments.videos)
    command = [sys.executable, "-m", "diffusers_fvg.cli", "batch", str(prompts), str(out), "--steps", "1", "--quiet"]
    command += ["--engine", arguments.engine, "--num-processes", "2"]
    # A token of its own, for nodes that nobody else is to use, whose workers do not wait for all other programs.
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    os.environ |= {"FVG_MARK": MARK, "RAY_worker_niceness": "0", **token}
    cluster = Cluster() if arguments.engine == "ray" else None
    log = open(out.with_suffix(".log"), "w")  # noqa: SIM115 (of all drivers)
    try:
        while True:
            environment = {**os.environ, **({} if cluster is None else cluster.start())}
            driver = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            counts["drivers"] += 1
            while driver.poll() is None and sum(counts[kind] for kind in KINDS) < arguments.kills:
                goal = finished(out) + draw.randint(0, arguments.between)
                while driver.poll() is None and finished(out) < goal:
                    time.sleep(0.1)
                time.sleep(draw.random() * arguments.wait)
                kinds = victims(driver, arguments.engine, cluster)
                if driver.poll() is not None or len(kinds) < 2:
                    continue
                kind = draw.choice(sorted(kinds))
                kill(draw.choice(kinds[kind]))
                counts[kind] += 1
                print(f"{time.strftime('%X')} killed a {kind}, {finished(out)} videos are finished", flush=True)
                if kind == "node":
                    cluster.nodes.pop()
            status = driver.wait()
            print(
                f"{time.strftime('%X')} the driver ended with {status}, {finished(out)} videos are finished",
                flush=True,
            )
            if cluster is not None:
                cluster.stop()
            if status == 0:
                break
    finally:
        if cluster is not None:
            cluster.stop()
    lines = Counter(line["path"] for line in read_manifest(out) if line["status"] != "failed")
    faults = [finding for finding in check_folder(out) if finding.is_fault]
    print(
        f"kills: {dict(counts)}; videos: {len(lines)} of {arguments.videos}, most lines of one: {max(lines.values())}"
    )
    print("statuses:", Counter(line["status"] for line in read_manifest(out)), "faults:", faults)
    assert len(lines) == arguments.videos and set(lines.values()) == {1} and not faults
    assert sum(counts[kind] for kind in KINDS) == arguments.kills


KINDS = ("driver", "launcher", "worker", "node")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--engine", choices=("accelerate", "ray"), default="accelerate")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--videos", type=int, default=60)
    parser.add_argument("--between", type=int, default=3, help="finished videos between two kills, at the most")
    parser.add_argument("--wait", type=float, default=1.0, help="seconds more, at the most")
    parser.add_argument("--seed", type=int, default=0)
    run(parser.parse_args())
