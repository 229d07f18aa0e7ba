"""The Triton kernels against their definition: first agreement, then time and share of the copy bandwidth.

Tokens of Wan2.2-5B at 704x1280 pixels and 121 frames: 31 latent frames of 880 tokens, 3072 channels, bfloat16, one time
per frame. Three implementations in turn: the definition as it is, the definition under torch.compile, the Triton kernel.
"adapter" is a backward pass with frozen weights and modulation, as LoRA training has it, "all" one with every gradient.

Before anything is timed, every output and gradient is compared with the definition in float64. A kernel that misses its
gate ends the run. Bytes count the tensors of the size of the tokens, each once; rows and angles come on top.

    python examples/benchmark_kernels.py --output kernels.json

`--small` tries the script at a few tokens in float32 on any device, on a CPU with TRITON_INTERPRET=1 to include the
kernels. Its times mean nothing.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffusers_fvg import kernels
from diffusers_fvg.kernels import reference


EPS = 1e-6
NUM_HEADS, HEAD_DIM = 24, 128
# Relative RMS. bfloat16 rounds to 8 bits, which by itself is 1.6e-3.
GATES = {torch.bfloat16: 2.5e-3, torch.float32: 1e-5}
SHARE_BAR = 0.8  # of the copy bandwidth, forward


@dataclass(frozen=True)
class Operation:
    """One kernel: its inputs, those of them an adapter leaves frozen, and how often a pass reads or writes the tokens."""

    name: str
    call: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    inputs: list[torch.Tensor]
    frozen: set[int]
    constants: tuple
    token_passes: dict[str, int]


def make_operations(
    num_frames: int, frame_tokens: int, num_heads: int, dtype: torch.dtype, device: str
) -> list[Operation]:
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    num_tokens, dim = num_frames * frame_tokens, num_heads * HEAD_DIM
    tokens = [random(1, num_tokens, dim) for _ in range(2)]
    # One table of six rows per frame, as the transformer has it.
    scale, shift, gate, *_ = random(1, num_frames, 6, dim, dtype=torch.float32).unbind(2)
    weights = [random(dim) for _ in range(2)]
    angle = torch.rand(1, num_tokens, 1, HEAD_DIM // 2, generator=generator, device=device) * 6.28
    angles = tuple(turn.repeat_interleave(2, dim=-1) for turn in (angle.cos(), angle.sin()))

    def norm(module, x, scale, shift):
        return module.modulated_layer_norm(x, scale, shift, EPS)

    def residual(module, x, branch, gate):
        return module.gated_residual(x, branch, gate)

    def rope(module, *tensors):
        return module.rms_norm_rope(*tensors, EPS)

    return [
        Operation(
            "modulated_layer_norm", norm, [tokens[0], scale, shift], {1, 2}, (), {"forward": 2, "adapter": 3, "all": 3}
        ),
        Operation("gated_residual", residual, [*tokens, gate], {2}, (), {"forward": 3, "adapter": 2, "all": 3}),
        Operation("rms_norm_rope", rope, [*tokens, *weights], {2, 3}, angles, {"forward": 4, "adapter": 6, "all": 6}),
    ]


def outputs(operation: Operation, function: Callable, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    constants = [t.to(inputs[0].dtype) if inputs[0].dtype == torch.float64 else t for t in operation.constants]
    out = function(*inputs, *constants)
    return out if isinstance(out, tuple) else (out,)


def leaves(operation: Operation, mode: str, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Inputs that ask for the gradients of `mode`."""
    return [
        x.detach()
        .to(dtype or x.dtype)
        .requires_grad_(mode == "all" or (mode == "adapter" and i not in operation.frozen))
        for i, x in enumerate(operation.inputs)
    ]


def check(operation: Operation, implementations: dict[str, Callable]) -> dict[str, float]:
    """Largest relative RMS error of outputs and gradients against the definition in float64, by implementation."""

    with torch.no_grad():
        # The same gradients arrive at all of them: the rounding of an output counts once.
        grads = [torch.randn_like(out) for out in outputs(operation, implementations["reference"], operation.inputs)]

    def values(function: Callable, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        inputs = leaves(operation, "all", dtype)
        outs = outputs(operation, function, inputs)
        return [*outs, *torch.autograd.grad(outs, inputs, [grad.to(outs[0].dtype) for grad in grads])]

    expected = values(implementations["reference"], torch.float64)
    errors = {}
    for name, function in implementations.items():
        actual = values(function)
        errors[name] = max(
            ((a.double() - e).square().mean() / e.square().mean()).sqrt().item()
            for a, e in zip(actual, expected, strict=True)
        )
        if not errors[name] <= GATES[operation.inputs[0].dtype]:
            raise SystemExit(f"{operation.name}, {name}: off by {errors[name]:.1e} of the RMS; nothing was timed")
    return errors


def seconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """Median time of one call."""
    for _ in range(max(3, repeats // 5)):
        call()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def time_mode(operation: Operation, function: Callable, mode: str, device: str, repeats: int) -> float:
    inputs = leaves(operation, mode)
    if mode == "forward":
        with torch.no_grad():
            return seconds(lambda: outputs(operation, function, inputs), device, repeats)
    outs = outputs(operation, function, inputs)
    learned = [x for x in inputs if x.requires_grad]
    grads = [torch.randn_like(out) for out in outs]
    return seconds(lambda: torch.autograd.grad(outs, learned, grads, retain_graph=True), device, repeats)


def copy_bandwidth(num_bytes: int, device: str, repeats: int) -> float:
    """Bytes read and written per second by a copy."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds(lambda: target.copy_(source), device, repeats)


def make_implementations(operation: Operation, device: str) -> dict[str, Callable]:
    def definition(*args):
        return operation.call(reference, *args)

    def triton(*args):
        with kernels.use_kernels("triton"):
            return operation.call(kernels, *args)

    implementations = {"reference": definition}
    if device == "cuda":
        implementations["compiled"] = torch.compile(definition)
    if device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        implementations["triton"] = triton
    return implementations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="kernels.json", help="where the figures are written")
    parser.add_argument("--repeats", type=int, default=50, help="timed calls, of which the median counts")
    parser.add_argument("--small", action="store_true", help="a few tokens, to try the script")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.small:
        raise SystemExit("This benchmark needs a CUDA device; try the script elsewhere with --small.")
    size = (3, 4, 2, torch.float32) if args.small else (31, 880, NUM_HEADS, torch.bfloat16)
    bandwidth = copy_bandwidth(2**20 if args.small else 2**30, device, args.repeats)

    rows = []
    print("| operation            | pass    | implementation | error   |       us |  GB/s | of copy |")
    print("|----------------------|---------|----------------|---------|---------:|------:|--------:|")
    for operation in make_operations(*size, device):
        implementations = make_implementations(operation, device)
        errors = check(operation, implementations)
        token_bytes = operation.inputs[0].nbytes
        for mode, passes in operation.token_passes.items():
            for name, function in implementations.items():
                duration = time_mode(operation, function, mode, device, args.repeats)
                row = {
                    "operation": operation.name,
                    "pass": mode,
                    "implementation": name,
                    "relative_error": errors[name],
                    "seconds": duration,
                    "bytes_per_second": passes * token_bytes / duration,
                    "share_of_copy_bandwidth": passes * token_bytes / duration / bandwidth,
                }
                rows.append(row)
                print(
                    f"| {operation.name:20} | {mode:7} | {name:14} | {errors[name]:.1e} | {duration * 1e6:8.1f} "
                    f"| {row['bytes_per_second'] / 1e9:5.0f} | {row['share_of_copy_bandwidth']:7.2f} |"
                )

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if "triton" in implementations:
        import triton

        versions["triton"] = triton.__version__
    report = {
        "benchmark": "kernels at the width and length of Wan2.2-5B, bfloat16"
        if not args.small
        else "trial of the script",
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu ({platform.machine()})",
        "versions": versions,
        "frames": size[0],
        "tokens": size[0] * size[1],
        "channels": size[2] * HEAD_DIM,
        "repeats": args.repeats,
        "copy_bytes_per_second": bandwidth,
        "runs": rows,
    }
    with open(args.output, "w") as file:
        json.dump(report, file, indent=2)
        file.write("\n")

    below = [
        f"{r['operation']} {r['share_of_copy_bandwidth']:.2f}"
        for r in rows
        if (r["implementation"], r["pass"]) == ("triton", "forward") and r["share_of_copy_bandwidth"] < SHARE_BAR
    ]
    if below and not args.small:
        raise SystemExit(f"below {SHARE_BAR} of the copy bandwidth: {', '.join(below)}")


if __name__ == "__main__":
    main()
