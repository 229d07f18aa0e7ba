"""Compares one forward of the anchored transformer with diffusers' `WanTransformer3DModel` on the same weights.

There is one anchor. The stock class takes one timestep per token, ours one per latent frame. Both run eager and, unless
`--no-compile` is given, compiled by repeated block, with the same attention backend (`--attention-backend`).

    python examples/benchmarks/benchmark_transformer_step.py --size cpu
"""

import statistics
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from harness import (
    SIZES,
    WHOLE,
    at_full_depth,
    bar,
    block_call,
    build_transformer,
    count_flops,
    describe,
    gate,
    interleaved_seconds,
    make_parser,
    median_ratio,
    peak_bytes,
    peak_flops,
    transformer_inputs,
    write_report,
)

from diffusers_fvg.animate.transformer_anchor import AnchorConditionedTransformer3D


CLASSES = {"stock": WanTransformer3DModel, "ours": AnchorConditionedTransformer3D}
# In bfloat16 the stock class also rounds its modulation, which ours keeps in float32.
GATES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
NOTES = (
    "The stock class embeds the timestep of every token once per forward. This work is thirty times as large a "
    "share of a model with one layer as of one with thirty. On a CPU the targets therefore apply to the time of a "
    "whole model, which is extrapolated from the measured step and the time of one block."
)


def main() -> None:
    parser = make_parser(__doc__, "transformer_step.json")
    parser.add_argument("--no-compile", action="store_true", help="eager only")
    parser.add_argument(
        "--attention-backend", default="native", help="name in diffusers' dispatcher (default: %(default)s)"
    )
    args = parser.parse_args()
    size, device = SIZES[args.size], args.device

    runs, ratios, peaks = [], {}, {}
    limit, limit_source = peak_flops(device, size.dtype)

    def add(mode: str, layers: int, seconds: dict[str, float], ratio: float, **more: dict[str, Any]) -> None:
        # The additional per-token work of the stock class is not useful work: our FLOPs count for both.
        cut = replace(size, config=size.config | {"num_layers": layers})
        flops = count_flops(AnchorConditionedTransformer3D, cut, per_token=False)
        for name, value in seconds.items():
            runs.append(
                {
                    "mode": mode,
                    "layers": layers,
                    "class": name,
                    "seconds": value,
                    "ratio": ratio if name == "ours" else 1.0,
                    "TFLOP": flops / 1e12,
                    "TFLOP/s": flops / value / 1e12,
                    "share of peak": flops / value / limit,
                    "peak MiB above weights": None,
                    "relative difference": None,
                }
                | {key: values[name] for key, values in more.items()}
            )

    layers, depth = size.config["num_layers"], SIZES[WHOLE].config["num_layers"]
    on_gpu = device.startswith("cuda")
    # Both models are in memory at once; at size `a14b` they fit on a GPU with 80 GB.
    models = {name: build_transformer(cls, size, device) for name, cls in CLASSES.items()}
    inputs = {name: transformer_inputs(size, device, per_token=name == "stock") for name in models}
    for model in models.values():
        model.set_attention_backend(args.attention_backend)
    calls = {name: partial(model, **inputs[name], return_dict=False) for name, model in models.items()}
    known = {name: [*models[name].parameters(), *models[name].buffers(), *inputs[name].values()] for name in models}
    # On a CPU the whole model is too slow: its time is extrapolated from that of a block.
    blocks = {} if on_gpu else {f"{name}, a block": block_call(model, inputs[name]) for name, model in models.items()}

    with torch.no_grad():
        for mode in ("eager",) if args.no_compile else ("eager", "compiled"):
            if mode == "compiled":
                for model in models.values():
                    model.compile_repeated_blocks(fullgraph=True)
            difference = gate(mode, calls["ours"]()[0], calls["stock"]()[0], GATES[size.dtype])
            more = {"relative difference": dict.fromkeys(models, difference)}
            if mode == "eager" or on_gpu:
                peaks[mode] = {name: peak_bytes(call, device, known[name]) for name, call in calls.items()}
                more["peak MiB above weights"] = {name: peak / 2**20 for name, peak in peaks[mode].items()}
            seconds = interleaved_seconds(calls | blocks, device, args.repeats)
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            ratios[mode] = median_ratio(seconds, "ours", "stock")
            add(mode, layers, {name: medians[name] for name in models}, ratios[mode], **more)
            if not on_gpu:
                whole = {name: at_full_depth(medians[name], medians[f"{name}, a block"], layers) for name in models}
                ratios[mode] = whole["ours"] / whole["stock"]
                add(f"{mode}, extrapolated", depth, whole, ratios[mode])

    timed = ratios if args.size != "tiny" else {}
    on_cpu, on_device = ({}, timed) if on_gpu else (timed, {})
    share = runs[-1]["share of peak"] if "compiled" in on_device else None
    cpu, gpu = "a CPU: --size cpu", "an H200-class GPU: --size 5b"
    bars = [
        bar("time of an eager step on a CPU, extrapolated, ours / stock", 0.95, on_cpu.get("eager"), needs=cpu),
        bar("time of an eager step on a GPU, ours / stock", 0.80, on_device.get("eager"), needs=gpu),
        bar("time of a compiled step on a CPU, extrapolated, ours / stock", 0.95, on_cpu.get("compiled"), needs=cpu),
        bar("time of a compiled step on a GPU, ours / stock", 0.95, on_device.get("compiled"), needs=gpu),
        bar("peak memory above the weights, ours / stock", 0.60, peaks["eager"]["ours"] / peaks["eager"]["stock"]),
        bar("FLOP/s of a compiled step / dense bfloat16 peak of the GPU", 0.60, share, at_most=False, needs=gpu),
    ]
    settings = describe(args.size, device, args.repeats)
    settings |= {
        "attention backend": args.attention_backend,
        "TFLOP/s at most": f"{limit / 1e12:.3g} ({limit_source})",
    }
    write_report(args.output, "Transformer step, one anchor", device, settings, runs, bars, NOTES)


if __name__ == "__main__":
    main()
