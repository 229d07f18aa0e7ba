"""Compares the Triton kernels with their plain torch definition: results, time and share of the copy bandwidth.

The inputs have the tokens and the width of `--size`, and one timestep per frame. The implementations run in turn: the definition,
the definition under torch.compile, and the Triton kernel. "adapter" is a backward pass with frozen weights and modulation, as in
LoRA training; "all" computes every gradient.

Before timing, every output and gradient is compared with the definition in float64. The bytes are those of the tensors of the
size of the tokens, each counted once, without modulation rows and rotary angles. On a GPU, a buffer larger than the cache is
cleared before each call, so that inputs are read from memory and the clock starts after the launch.

    python examples/benchmarks/benchmark_kernels.py --size 5b

Without a GPU, the kernels run in Triton's interpreter with `--size tiny` and TRITON_INTERPRET=1; these times mean nothing.
"""

import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from harness import SIZES, Size, bar, describe, make_clock, make_parser, median_ratio, write_report

from diffusers_fvg import kernels
from diffusers_fvg.kernels import reference


EPS = 1e-6
# Limits of the relative RMS error. The rounding of bfloat16 to 8 bits alone gives 1.6e-3.
GATES = {torch.bfloat16: 2.5e-3, torch.float32: 1e-5}
# Cleared between calls, and copied for the bandwidth. The cache of an H200 has 50 MiB.
BUFFER = 2**30


@dataclass(frozen=True)
class Operation:
    """One kernel with its inputs, the indices of the inputs that are frozen in LoRA training, and the number of token-sized
    tensors that each pass reads or writes."""

    name: str
    call: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    inputs: list[torch.Tensor]
    frozen: set[int]
    constants: tuple
    token_passes: dict[str, int]


def make_operations(size: Size, device: str) -> list[Operation]:
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = size.dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    num_tokens, head_dim = size.tokens, size.config["attention_head_dim"]
    dim = size.config["num_attention_heads"] * head_dim
    tokens = [random(1, num_tokens, dim) for _ in range(2)]
    # The transformer has one table of six modulation rows per frame.
    scale, shift, gate, *_ = random(1, size.latent_frames, 6, dim, dtype=torch.float32).unbind(2)
    weights = [random(dim) for _ in range(2)]
    angle = torch.rand(1, num_tokens, 1, head_dim // 2, generator=generator, device=device) * 6.28
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
    """Returns copies of the inputs that require the gradients of `mode`."""
    return [
        x.detach()
        .to(dtype or x.dtype)
        .requires_grad_(mode == "all" or (mode == "adapter" and i not in operation.frozen))
        for i, x in enumerate(operation.inputs)
    ]


def check(operation: Operation, implementations: dict[str, Callable]) -> dict[str, float]:
    """Returns, for each implementation, the largest relative RMS error of outputs and gradients against float64."""

    with torch.no_grad():
        # All implementations get the same output gradients, so that the rounding of an output counts once.
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


def rounds(calls: Mapping[str, Callable[[], object]], device: str, repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of each call, made in turn.

    GPU events are used because a launch, which the harness's clock includes, takes as long as a kernel.
    """
    on_gpu, (clock, _) = device.startswith("cuda"), make_clock(device)
    buffer = torch.empty(BUFFER if on_gpu else 0, dtype=torch.uint8, device=device)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(-max(3, repeats // 5), repeats):
        for name, call in calls.items():
            if on_gpu:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                buffer.zero_()
                start.record()
                call()
                end.record()
                end.synchronize()
                duration = start.elapsed_time(end) / 1e3
            else:
                begin = clock()
                call()
                duration = clock() - begin
            if round_ >= 0:
                seconds[name].append(duration)
    return seconds


def make_call(operation: Operation, function: Callable, mode: str) -> Callable[[], object]:
    inputs = leaves(operation, mode)
    if mode == "forward":

        def forward() -> None:
            with torch.no_grad():
                outputs(operation, function, inputs)

        return forward
    outs = outputs(operation, function, inputs)
    learned = [x for x in inputs if x.requires_grad]
    grads = [torch.randn_like(out) for out in outs]
    return partial(torch.autograd.grad, outs, learned, grads, retain_graph=True)


def copy_bandwidth(num_bytes: int, device: str, repeats: int) -> float:
    """Returns the bytes per second that a copy reads and writes."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = rounds({"copy": lambda: target.copy_(source)}, device, repeats)
    return 2 * num_bytes / statistics.median(seconds["copy"])


def make_implementations(operation: Operation, device: str) -> dict[str, Callable]:
    def definition(*args):
        return operation.call(reference, *args)

    def triton(*args):
        with kernels.use_kernels("triton"):
            return operation.call(kernels, *args)

    implementations = {"reference": definition, "compiled": torch.compile(definition)}
    if device.startswith("cuda") or os.environ.get("TRITON_INTERPRET") == "1":
        implementations["triton"] = triton
    return implementations


def main() -> None:
    parser = make_parser(__doc__, "kernels.json")
    parser.set_defaults(repeats=50)
    args = parser.parse_args()
    size, device = SIZES[args.size], args.device
    # One forward serves many backward passes, so that a compiled backward must not reuse the buffers of the forward.
    torch._functorch.config.donated_buffer = False
    bandwidth = copy_bandwidth(BUFFER if device.startswith("cuda") else 2**27, device, args.repeats)

    runs, shares = [], {}
    for operation in make_operations(size, device):
        # All operations share one compiled function, and the compiler stops recompiling it after a number of variants.
        torch.compiler.reset()
        implementations = make_implementations(operation, device)
        errors = check(operation, implementations)
        token_bytes = operation.inputs[0].nbytes
        for mode, passes in operation.token_passes.items():
            calls = {name: make_call(operation, function, mode) for name, function in implementations.items()}
            seconds = rounds(calls, device, args.repeats)
            for name, values in seconds.items():
                rate = passes * token_bytes / statistics.median(values)
                shares[operation.name, mode, name] = rate / bandwidth
                runs.append(
                    {
                        "operation": operation.name,
                        "pass": mode,
                        "implementation": name,
                        "relative error": errors[name],
                        "microseconds": statistics.median(values) * 1e6,
                        "ratio": median_ratio(seconds, name, "reference"),
                        "GB/s": rate / 1e9,
                        "share of copy bandwidth": rate / bandwidth,
                    }
                )
    bars = [
        bar(
            f"{name}, forward: share of the copy bandwidth",
            0.80,
            shares[name, "forward", "triton"] if device.startswith("cuda") and args.size != "tiny" else None,
            at_most=False,
            needs="a GPU: --size 5b",
        )
        for name in ("modulated_layer_norm", "rms_norm_rope")
    ]
    settings = describe(args.size, device, args.repeats) | {"copy, GB/s": bandwidth / 1e9}
    del settings["layers"]
    write_report(args.output, "Kernels", device, settings, runs, bars)


if __name__ == "__main__":
    main()
