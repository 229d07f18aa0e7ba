"""Runs the most useful measurements on a GPU in one process with a time limit.

    python examples/benchmarks/gpu_run.py --deadline 470                    # all steps, the most useful first
    python examples/benchmarks/gpu_run.py --only steps,tests,fp8,lora,decode --deadline 400           # in two calls
    python examples/benchmarks/gpu_run.py --only pipeline,fast_pipeline,stages,training_step --deadline 400
    python examples/benchmarks/gpu_run.py --only shapes_lora                # a separate training; continues when it was stopped
    python examples/benchmarks/gpu_run.py --size tiny --device cpu          # a dry run

The models have random weights of Wan2.2-TI2V-5B's size. A step starts only if the seconds that it needs are left, is stopped at
its limit, and writes its report into the folder `--output` before the next step starts, so that an interruption loses no
finished step. `render.py` makes tables of the reports.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import runpy
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmark_pipeline import random as random_pipelines
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from gpu_decode import decode, light_decoder
from gpu_stages import stages
from gpu_switches import fast_pipeline, fp8, lora
from harness import (
    RESULTS,
    SIZES,
    bar,
    build_transformer,
    count_flops,
    describe,
    peak_bytes,
    peak_flops,
    synchronize,
    transformer_inputs,
    with_appended_anchor,
    write_report,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_fvg import kernels
from diffusers_fvg.animate.attention import NATIVE, choose_backend
from diffusers_fvg.animate.transformer_anchor import AnchorConditionedTransformer3D
from diffusers_fvg.kernels import attention, dispatch


HERE = Path(__file__).parent
# Tests marked `gpu` in files that need only the core requirements: a machine with a GPU may lack `av`.
TESTS = ["tests/kernels", "tests/animate/test_attention.py", "tests/pipelines/test_pipeline_factorized_video.py"]


class Late(Exception):
    """Raised when a step exceeds its limit."""


class Run:
    """Settings and clock shared by all steps.

    Args:
        size (`str`): key of `harness.SIZES`.
        device (`str`): torch's name of the device.
        output (`Path`): folder for the reports.
        deadline (`float`): seconds from the start of the process.
    """

    def __init__(self, size: str, device: str, output: Path, deadline: float):
        self.name, self.size, self.device, self.output = size, SIZES[size], device, output
        self.begin, self.deadline, self.log = time.monotonic(), deadline, []
        self.on_gpu = device.startswith("cuda")

    @property
    def left(self) -> float:
        return self.deadline - (time.monotonic() - self.begin)

    def seconds(self, call: Callable[[], object], repeats: int = 3) -> float:
        """Returns the median seconds of `repeats` calls after an untimed one."""
        found = []
        for _ in range(repeats + 1):
            synchronize(self.device)
            begin = time.perf_counter()
            call()
            synchronize(self.device)
            found.append(time.perf_counter() - begin)
        return statistics.median(found[1:])

    def report(
        self, step: str, title: str, runs: list[dict], bars: tuple = (), notes: str = "", **settings: Any
    ) -> None:
        settings = describe(self.name, self.device, 3) | settings
        write_report(self.output / f"{step}.json", f"On a GPU: {title}", self.device, settings, runs, [*bars], notes)

    def step(self, name: str, needs: float, limit: float, call: Callable[[Run], object]) -> None:
        """Runs `call` if `needs` seconds are left, and stops it after `limit` seconds."""
        if self.left < needs:
            self.log.append((name, f"skipped: {self.left:.0f} s left"))
            return
        print(f"== {name}, {self.left:.0f} s left", flush=True)
        self.reset_attention()
        begin, status = time.monotonic(), "done"
        signal.setitimer(signal.ITIMER_REAL, max(1, min(limit, self.left - 2)))
        try:
            call(self)
        except Late:
            status = "stopped at its limit"
        except (SystemExit, Exception) as error:
            status = f"{type(error).__name__}: {error}".partition("\n")[0]
            traceback.print_exc()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.log.append((name, f"{status} after {time.monotonic() - begin:.0f} s"))
        if self.on_gpu:
            torch.cuda.empty_cache()

    def reset_attention(self) -> None:
        """Sets diffusers' default attention backend, which is global to the process: another model may have changed it."""
        _AttentionBackendRegistry._active_backend = AttentionBackendName.NATIVE

    def transformer(self, stock: bool = False) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
        """Returns the stock transformer or ours, and its inputs."""
        cls = WanTransformer3DModel if stock else AnchorConditionedTransformer3D
        return build_transformer(cls, self.size, self.device), transformer_inputs(
            self.size, self.device, per_token=stock
        )

    def stock_denoise(self, stock: Any, call: dict[str, Any], guidance_scale: float) -> float:
        """Returns the seconds of 50 guided steps of a stock pipeline, extrapolated from two steps."""

        def seconds(count: int) -> float:
            synchronize(self.device)
            begin = time.perf_counter()
            options = {"guidance_scale": guidance_scale, "output_type": "latent"}
            stock(num_inference_steps=count, generator=torch.Generator().manual_seed(0), **options, **call)
            synchronize(self.device)
            return time.perf_counter() - begin

        seconds(1)
        # The difference leaves out the time before the steps.
        return 50 * (seconds(3) - seconds(1)) / 2

    @property
    def compiler(self) -> str:
        """Backend of `torch.compile`; a dry run only traces the models, which takes a few seconds."""
        return "inductor" if self.on_gpu else "eager"

    def compile(self, model: torch.nn.Module) -> None:
        model.compile_repeated_blocks(fullgraph=True, backend=self.compiler)

    @property
    def kernels(self) -> str:
        """Implementation to use. It is not `auto` on a GPU, because the kernels' tests may only pass later in this run."""
        return "triton" if self.on_gpu else "reference"

    @property
    def window(self) -> int:
        return min(3, (self.size.latent_frames - 1) // 4)


def tests(run: Run) -> None:
    """Runs the tests that need a GPU in a separate process."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfE", "--tb=short", *TESTS]
    done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, check=False)
    print(done.stdout[-3000:])
    summary = done.stdout.strip().splitlines()[-1]
    run.report("tests", "tests marked gpu", [{"summary": summary}], exit_status=done.returncode)
    if done.returncode == 0 and run.on_gpu:
        import triton

        # From now on `FVG_KERNELS=auto` uses the kernels on this compute capability.
        table = json.loads(dispatch.TESTED_GPUS.read_text(encoding="utf-8"))
        capability = ".".join(map(str, torch.cuda.get_device_capability(run.device)))
        name, date = torch.cuda.get_device_name(run.device), datetime.date.today().isoformat()
        table[capability] = {
            "tested_on": f"{name}, torch {torch.__version__}, triton {triton.__version__}, {date}",
            "sources": {source: dispatch.source_digest(source) for source in dispatch.SOURCES},
        }
        dispatch.TESTED_GPUS.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@torch.no_grad()
def attention_forms(run: Run) -> None:
    """Times the self-attention of one layer: dense backends, and every implementation with a window."""
    heads, head_dim = run.size.config["num_attention_heads"], run.size.config["attention_head_dim"]
    qkv = [torch.randn(1, run.size.tokens, heads, head_dim, device=run.device, dtype=run.size.dtype) for _ in range(3)]
    times = torch.full((1, run.size.latent_frames), 900.0, device=run.device)
    times[:, 0] = 0
    seen = attention.anchor_window(times, run.window)
    share, flops = seen.float().mean().item(), 4 * run.size.tokens**2 * heads * head_dim
    transposed = [x.transpose(1, 2) for x in qkv]
    rows: list[dict] = []

    def add(form: str, call: Callable[[], torch.Tensor], share: float = 1.0) -> None:
        seconds = run.seconds(call, 5)
        rows.append(
            {"form": form, "milliseconds": 1e3 * seconds, "TFLOP/s of the pairs seen": share * flops / seconds / 1e12}
        )

    add("dense, torch's choice", lambda: torch.nn.functional.scaled_dot_product_attention(*transposed))
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION) if run.on_gpu else (SDPBackend.MATH,):
        with sdpa_kernel(backend):
            add(f"dense, {backend.name}", lambda: torch.nn.functional.scaled_dot_product_attention(*transposed))
            add(f"window, gathered, {backend.name}", lambda: attention.gathered_frame_attention(*qkv, seen), share)
    if run.on_gpu:
        with kernels.use_kernels("triton"):
            add("window, Triton", lambda: kernels.frame_attention(*qkv, seen), share)
            add("all frames, Triton", lambda: kernels.frame_attention(*qkv, torch.ones_like(seen)))
    run.report("attention_forms", "self-attention of a layer", rows, window=run.window, share_of_frame_pairs=share)


@torch.no_grad()
def steps(run: Run) -> None:
    """Times one forward: stock, and ours with torch and Triton kernels, with the window and with an appended anchor, eager and
    compiled.

    Stock and ours with kernels are also timed with the attention backend that `"auto"` selects, if it is not the default.
    """
    flops, rows, seconds = count_flops(AnchorConditionedTransformer3D, run.size, False), [], {}
    best: dict[str, float] = {}

    def add(name: str, model: torch.nn.Module, inputs: dict[str, torch.Tensor], choice: str) -> None:
        with kernels.use_kernels(choice):
            seconds[name] = run.seconds(lambda: model(**inputs, return_dict=False))
            # Only the GPU's allocator sees the memory of Triton and of compiled code.
            known = [*model.parameters(), *inputs.values()]
            memory = peak_bytes(lambda: model(**inputs, return_dict=False), run.device, known) if run.on_gpu else None
        dense = None if "window" in name or "appended" in name else flops / seconds[name] / 1e12
        rows.append(
            {
                "forward": name,
                "seconds": seconds[name],
                "TFLOP/s": dense,
                "MiB above weights": memory and memory / 2**20,
            }
        )
        # After every forward, so that an interruption loses no result.
        run.report("steps", "a forward", rows, PFLOP=flops / 1e15)

    for compiled in ("eager", "compiled"):
        for stock in (True, False):
            torch.compiler.reset()
            run.reset_attention()
            model, inputs = run.transformer(stock)
            if compiled == "compiled":
                run.compile(model)
            name, choice = f"{'stock' if stock else 'ours'}, {compiled}", "reference"
            if not stock:
                add(f"{name}, torch", model, inputs, choice)
                name, choice = f"{name}, kernels", run.kernels
                model.set_anchor_window(run.window)
                add(f"{name}, window {run.window}", model, inputs, choice)
                model.set_anchor_window(None)
            add(name, model, inputs, choice)
            if not stock:
                add(f"{name}, one appended anchor", model, with_appended_anchor(inputs), choice)
            backend = choose_backend(torch.device(run.device), run.size.dtype, model.config.attention_head_dim)
            if backend != NATIVE:
                model.set_attention_backend(backend)
                add(f"{name}, {backend}", model, inputs, choice)
            best[name] = min(seconds.get(key, math.inf) for key in (name, f"{name}, {backend}"))
        del model
    eager, fast = seconds["ours, eager, kernels"], best["ours, compiled, kernels"]
    windowed, gpu = seconds[f"ours, compiled, kernels, window {run.window}"], run.on_gpu or None
    memory = {row["forward"]: row["MiB above weights"] for row in rows}
    needs = "a GPU: gpu_run.py --only steps"
    bars = [
        bar(
            "time of an eager step with an anchor, ours / stock",
            0.7,
            gpu and eager / seconds["stock, eager"],
            needs=needs,
        ),
        bar(
            "time of an eager step with an anchor, ours / stock with its best backend",
            0.9,
            gpu and eager / best["stock, eager"],
            needs=needs,
        ),
        bar(
            "time of a compiled step with an anchor, ours / stock, both with the best backend",
            0.95,
            gpu and fast / best["stock, compiled"],
            needs=needs,
        ),
        bar(
            "FLOP/s of a compiled step / dense bfloat16 peak of the GPU",
            0.6,
            gpu and flops / fast / peak_flops(run.device, run.size.dtype)[0],
            at_most=False,
            needs=needs,
        ),
        bar(
            "time of a compiled step, one appended anchor more / none",
            1.05,
            gpu and seconds["ours, compiled, kernels, one appended anchor"] / seconds["ours, compiled, kernels"],
            needs=needs,
        ),
        bar(f"time of a compiled step, window {run.window} / all frames", 0.7, gpu and windowed / fast, needs=needs),
        bar(
            "peak memory above the weights, ours / stock",
            0.6,
            gpu and memory["ours, eager, kernels"] / memory["stock, eager"],
            needs=needs,
        ),
    ]
    run.report("steps", "a forward", rows, bars, PFLOP=flops / 1e15)


@torch.no_grad()
def pipeline(run: Run) -> None:
    """Times a video of 15 steps, guided and unguided, against one of 50 stock steps, which is extrapolated from two steps.

    All are decoded, the guided one also with the light decoder. Stages 1 and 2 and the text encoder are left out.
    """
    ours, stock, our_call, stock_call = random_pipelines(run.size, run.device)
    for pipe in (ours, stock):
        pipe.set_progress_bar_config(disable=True)
    guidance = ours.presets["full-50"].guidance_scale

    def our_video(output_type: str = "uint8", **options: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        with kernels.use_kernels(run.kernels):
            return ours(preset="anchored-15", output_type=output_type, generator=generator, **our_call, **options)

    latents = our_video("latent", num_inference_steps=1).frames
    with kernels.use_kernels("reference"):
        decode = run.seconds(lambda: ours.decode(latents, "uint8"), 1)
    found = {"15 steps, guided": our_video().timings}
    found["15 steps, one forward each"] = our_video(guidance_scale=1.0).timings
    rows = [
        {"video": name, "seconds": sum(t.values()), "denoise": t["denoise"], "decode": t["decode"]}
        for name, t in found.items()
    ]
    ours.light_decoder = light_decoder(run)
    light = run.seconds(lambda: ours.decode(latents, "uint8"), 1)
    rest = rows[0]["seconds"] - rows[0]["decode"]
    rows.append(rows[0] | {"video": "15 steps, guided, light decoder", "seconds": rest + light, "decode": light})
    denoise = run.stock_denoise(stock, stock_call, guidance)
    rows.append(
        {"video": "stock, 50 steps, extrapolated", "seconds": denoise + decode, "denoise": denoise, "decode": decode}
    )
    needs, timed = "a GPU: gpu_run.py --only pipeline", run.on_gpu or None
    bars = [
        bar(
            "time of a video, ours with 15 steps / stock with 50",
            0.3,
            timed and rows[0]["seconds"] / rows[-1]["seconds"],
            needs=needs,
        ),
        bar(
            "time of a video, ours with 15 forwards / stock with 100",
            0.15,
            timed and rows[1]["seconds"] / rows[-1]["seconds"],
            needs=needs,
        ),
        bar(
            "time of decoding / time of a video with 15 steps",
            0.15,
            timed and rows[0]["decode"] / rows[0]["seconds"],
            needs=needs,
        ),
        bar(
            "time of decoding with the light decoder / time of a video with 15 steps",
            0.15,
            timed and rows[2]["decode"] / rows[2]["seconds"],
            needs=needs,
        ),
    ]
    run.report("pipeline", "a video without stages 1 and 2", rows, bars)


@torch.no_grad()
def profile(run: Run) -> None:
    """Profiles the operations of one eager forward with kernels."""
    from torch.profiler import ProfilerActivity

    model, inputs = run.transformer()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if run.on_gpu else [])]
    with kernels.use_kernels(run.kernels):
        model(**inputs, return_dict=False)
        with torch.profiler.profile(activities=activities) as found:
            model(**inputs, return_dict=False)
            synchronize(run.device)
    key = "self_device_time_total" if run.on_gpu else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, key))[:24]
    rows = [{"operation": e.key[:80], "milliseconds": getattr(e, key) / 1e3, "calls": e.count} for e in events]
    run.report("profile", "operations of a forward", rows)


def shapes_lora(run: Run) -> None:
    """Trains the shapes model's LoRA with anchors behind the clip in a separate process."""
    folder = run.output / "shapes_lora"
    few = ["--clips", "4", "--steps", "2"] if run.name == "tiny" else []
    began = time.monotonic()
    subprocess.run([sys.executable, str(HERE / "shapes_lora.py"), str(folder), *few], check=True)
    log = [json.loads(line) for line in (folder / "log_transformer.jsonl").read_text().splitlines()]
    row = {
        "steps": len(log),
        "seconds in all": time.monotonic() - began,
        "median seconds a step": statistics.median(record["seconds"] for record in log),
        "loss of the last tenth": statistics.mean(record["loss"] for record in log[-max(1, len(log) // 10) :]),
    }
    notes = "Synthetic world. `fvg shapes report FOLDER --appended shapes_lora/weights` scores it."
    run.report("shapes_lora", "training of the shapes LoRA with appended anchors", [row], notes=notes)


def benchmark(name: str, run: Run) -> None:
    """Runs a script of this folder and writes its report beside the others."""
    arguments = [
        "--size",
        run.name,
        "--device",
        run.device,
        "--output",
        str(run.output / f"{name}.json"),
        "--repeats",
        "3",
    ]
    before, sys.argv = sys.argv, [name, *arguments]
    try:
        torch.compiler.reset()
        runpy.run_path(str(HERE / f"benchmark_{name}.py"), run_name="__main__")
    finally:
        sys.argv = before


# Name, seconds that must be left, limit in seconds, function. Steps that were never measured come first, and first of all those that
# decide a default.
STEPS: list[tuple[str, float, float, Callable[[Run], Any]]] = [
    ("steps", 60, 150, steps),
    ("tests", 60, 190, tests),
    ("fp8", 50, 110, fp8),
    ("lora", 50, 110, lora),
    ("decode", 40, 150, decode),
    ("pipeline", 100, 170, pipeline),
    ("fast_pipeline", 150, 260, fast_pipeline),
    ("stages", 40, 90, stages),
    ("training_step", 60, 150, partial(benchmark, "training_step")),
    ("attention_forms", 15, 40, attention_forms),
    ("attention", 40, 80, partial(benchmark, "attention")),
    ("kernels", 30, 60, partial(benchmark, "kernels")),
    ("profile", 15, 30, profile),
    ("transformer_step", 90, 200, partial(benchmark, "transformer_step")),
    ("shapes_lora", 240, 440, shapes_lora),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="5b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu", help="folder (default: %(default)s)")
    parser.add_argument("--deadline", type=float, default=470, help="total seconds (default: %(default)s)")
    parser.add_argument("--only", default="", help=f"comma-separated names of {', '.join(name for name, *_ in STEPS)}")
    args = parser.parse_args()
    wanted = set(filter(None, args.only.split(",")))
    if unknown := wanted - {name for name, *_ in STEPS}:
        parser.error(f"--only {','.join(sorted(unknown))}: unknown steps.")
    run = Run(args.size, args.device, args.output, args.deadline)

    def late(*_: Any) -> None:
        raise Late

    signal.signal(signal.SIGALRM, late)
    for name, needs, limit, call in STEPS:
        if not wanted or name in wanted:
            run.step(name, needs, limit, call)
    for name, status in run.log:
        print(f"{name}: {status}")


if __name__ == "__main__":
    main()
