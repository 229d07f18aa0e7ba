"""One forward of the anchored transformer against diffusers' `WanTransformer3DModel` on the same weights.

One anchor: the stock class is given one time per token, ours one per latent frame. Both eager and, unless `--no-compile`,
compiled by repeated block; the same attention backend, diffusers' native one unless `--attention-backend` names another.

    python examples/benchmarks/benchmark_transformer_step.py --size cpu
"""

import torch
from diffusers import WanTransformer3DModel
from harness import (
    SIZES,
    bar,
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

from diffusers_fvg.transformer_anchor import AnchorConditionedTransformer3D


# In bfloat16 the stock class also rounds its modulation, which ours keeps in float32.
GATES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def main() -> None:
    parser = make_parser(__doc__, "transformer_step.json")
    parser.add_argument("--no-compile", action="store_true", help="eager only")
    parser.add_argument(
        "--attention-backend", default="native", help="of diffusers' dispatcher (default: %(default)s)"
    )
    args = parser.parse_args()
    size, device = SIZES[args.size], args.device

    # One after the other: weights are held once for each class, and both fit at `a14b` on 80 GB and more.
    models = {
        "stock": build_transformer(WanTransformer3DModel, size, device),
        "ours": build_transformer(AnchorConditionedTransformer3D, size, device),
    }
    inputs = {name: transformer_inputs(size, device, per_token=name == "stock") for name in models}
    for model in models.values():
        model.set_attention_backend(args.attention_backend)

    def forward(name: str) -> torch.Tensor:
        with torch.no_grad():
            return models[name](**inputs[name], return_dict=False)[0]

    def forwards() -> dict:
        return {name: lambda name=name: forward(name) for name in models}

    differences = {"eager": gate("eager", forward("ours"), forward("stock"), GATES[size.dtype])}
    known = {name: [*models[name].parameters(), *models[name].buffers(), *inputs[name].values()] for name in models}
    peaks = {name: peak_bytes(lambda name=name: forward(name), device, known[name]) for name in models}
    seconds = {"eager": interleaved_seconds(forwards(), device, args.repeats)}
    compiled_peaks = None
    if not args.no_compile:
        for model in models.values():
            model.compile_repeated_blocks(fullgraph=True)
        differences["compiled"] = gate("compiled", forward("ours"), forward("stock"), GATES[size.dtype])
        seconds["compiled"] = interleaved_seconds(forwards(), device, args.repeats)
        if device.startswith("cuda"):
            compiled_peaks = {name: peak_bytes(lambda name=name: forward(name), device) for name in models}

    flops = count_flops(WanTransformer3DModel, size, per_token=True)
    limit, limit_source = peak_flops(device, size.dtype)
    runs, ratios = [], {}
    for mode, timed in seconds.items():
        ratios[mode] = median_ratio(timed, "ours", "stock")
        for name, values in timed.items():
            median = sorted(values)[len(values) // 2]
            memory = peaks if mode == "eager" else compiled_peaks
            runs.append(
                {
                    "mode": mode,
                    "class": name,
                    "seconds": median,
                    "ratio": ratios[mode] if name == "ours" else 1.0,
                    "TFLOP": flops / 1e12,
                    "TFLOP/s": flops / median / 1e12,
                    "share of peak": flops / median / limit,
                    "peak MiB above weights": None if memory is None else memory[name] / 2**20,
                    "relative difference": differences[mode],
                }
            )
    on_gpu = device.startswith("cuda")
    gpu = "an H200-class GPU: --size 5b"
    compiled_share = None
    if on_gpu and "compiled" in seconds:
        compiled_share = runs[-1]["share of peak"]
    bars = [
        bar("step, eager, on a CPU: time of stock's", 0.95, None if on_gpu else ratios["eager"], needs="a CPU"),
        bar("step, eager, on a GPU: time of stock's", 0.80, ratios["eager"] if on_gpu else None, needs=gpu),
        bar("step, both compiled: time of stock's", 0.95, ratios.get("compiled"), needs="a run without --no-compile"),
        bar("peak memory above the weights: of stock's", 0.60, peaks["ours"] / peaks["stock"]),
        bar("compiled step: share of dense bf16 peak", 0.60, compiled_share, at_most=False, needs=gpu),
    ]
    settings = describe(args.size, device, args.repeats)
    settings |= {
        "attention backend": args.attention_backend,
        "TFLOP/s at most": f"{limit / 1e12:.3g} ({limit_source})",
    }
    write_report(args.output, "Transformer step, one anchor", device, settings, runs, bars)


if __name__ == "__main__":
    main()
