"""Compares the peak memory of one forward with one anchor: the anchored transformer and diffusers' stock class.

The models have two layers of Wan2.2-5B's width and random weights; the video has 704x1280 pixels. The stock class takes one
timestep per token, ours one per latent frame. The memory is that above the weights and inputs.

* On a GPU, the allocator reports it, in bfloat16 for the full clip of 121 frames.
* On a CPU, the bytes of live tensors are counted at every operation: once in an executed float32 run (21 frames, 5,280 tokens,
  about a minute per class on one core), and once from tensor shapes for the full clip in bfloat16, without computing anything.

If the models are executed, their outputs are compared first; a ratio between different results would mean nothing.

    python examples/benchmarks/benchmark_modulation.py
"""

import argparse
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from harness import RESULTS, SIZES, Size, bar, build_transformer, gate, peak_bytes, transformer_inputs, write_report
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusers_fvg.animate.transformer_anchor import AnchorConditionedTransformer3D


LAYERS = 2
# In bfloat16 the stock class also rounds its modulation, which ours keeps in float32.
GATES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@torch.no_grad()
def forward(cls: type, size: Size, device: str) -> tuple[int, torch.Tensor]:
    """Returns the peak bytes of one forward above weights and inputs, and its output."""
    model = build_transformer(cls, size, device)
    inputs = transformer_inputs(size, device, per_token=cls is WanTransformer3DModel)
    samples = []

    def call() -> None:
        samples[:] = [model(**inputs, return_dict=False)[0]]

    return peak_bytes(call, device, [*model.parameters(), *model.buffers(), *inputs.values()]), samples[0]


def compare(latent_frames: int, dtype: torch.dtype, device: str, shapes_only: bool) -> dict:
    whole = SIZES["5b"]
    size = replace(whole, config=whole.config | {"num_layers": LAYERS}, latent_frames=latent_frames, dtype=dtype)
    with FakeTensorMode() if shapes_only else nullcontext():
        stock, ours = (forward(cls, size, device) for cls in (WanTransformer3DModel, AnchorConditionedTransformer3D))
    return {
        "pixel_frames": 4 * (latent_frames - 1) + 1,
        "tokens": size.tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "method": "cuda allocator" if device.startswith("cuda") else "live tensor bytes",
        "executed": not shapes_only,
        "stock_peak_bytes": stock[0],
        "anchored_peak_bytes": ours[0],
        "ratio": ours[0] / stock[0],
        "relative_difference": None if shapes_only else gate("forward", ours[1], stock[1], GATES[dtype]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "modulation.json", help="default: %(default)s")
    args = parser.parse_args()

    whole = SIZES["5b"].latent_frames
    if args.device.startswith("cuda"):
        runs = [compare(whole, torch.bfloat16, args.device, shapes_only=False)]
    else:
        runs = [
            compare(6, torch.float32, "cpu", shapes_only=False),
            compare(whole, torch.bfloat16, "cpu", shapes_only=True),
        ]
    bars = [
        bar(f"peak memory above weights and inputs at {r['tokens']:,} tokens, ours / stock", 0.60, r["ratio"])
        for r in runs
    ]
    title = f"Peak memory of a forward above weights and inputs, Wan2.2-5B width, {LAYERS} layers, one anchor"
    write_report(args.output, title, args.device, {"layers": LAYERS}, runs, bars)


if __name__ == "__main__":
    main()
