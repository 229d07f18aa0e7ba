"""Peak memory of one forward with one anchor: the anchored transformer against diffusers' stock class.

Two layers at the width of Wan2.2-5B, random weights, 704x1280 pixels. The stock class takes one time per token, ours one
per latent frame. What counts is memory above the weights and inputs.

* With a GPU: what its allocator reports, bfloat16, full 121-frame clip.
* Without: bytes of live tensors, counted at every operation. Once on a float32 run that is executed (21 frames, 5,280
  tokens, about a minute a class on one core), and once on shapes alone for the bfloat16 full clip, which computes nothing.
  Workspace inside an operation is not seen by the counter; it is the same for both classes.

Where the models are executed their outputs are compared first: a ratio between different results would mean nothing.

    python examples/benchmark_modulation.py --output modulation.json
"""

import argparse
import datetime
import json
import platform
import weakref

import diffusers
import torch
from diffusers import WanTransformer3DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusers_fvg.transformer_anchor import AnchorConditionedTransformer3D


# https://huggingface.co/Wan-AI/Wan2.2-TI2V-5B-Diffusers, transformer/config.json, with 2 layers of its 30.
WAN22_5B = {
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "in_channels": 48,
    "out_channels": 48,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 14336,
    "num_layers": 2,
}
HEIGHT, WIDTH = 704 // 16, 1280 // 16  # latents
TOKENS_PER_FRAME = HEIGHT // 2 * WIDTH // 2
RATIO_BAR = 0.6
# Largest RMS difference of the outputs, relative to their RMS. In bfloat16 the stock class also rounds its modulation.
GATES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made while it is active that are alive at the same time."""

    def __init__(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]):
        super().__init__()
        given = [*model.parameters(), *model.buffers(), *inputs.values()]
        self.storages = {t.untyped_storage()._cdata for t in given}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.storages:
                self.storages.add(key)
                self.live += size
                weakref.finalize(storage, self._free, key, size)
        self.peak = max(self.peak, self.live)
        return out

    def _free(self, key: int, size: int) -> None:
        self.storages.discard(key)
        self.live -= size


def build(cls: type, dtype: torch.dtype, device: str) -> WanTransformer3DModel:
    """Random weights, the same for both classes, in the dtypes `from_pretrained(dtype=...)` would give them."""
    torch.manual_seed(0)
    with torch.device(device):
        model = cls(**WAN22_5B).eval()
    for name, parameter in model.named_parameters():
        if not any(part in cls._keep_in_fp32_modules for part in name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model


def make_inputs(cls: type, num_frames: int, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """Latents of `num_frames` latent frames, the first of them an anchor: time 0 among times of 900."""
    generator = torch.Generator(device).manual_seed(1)
    frame_times = torch.full((1, num_frames), 900.0, device=device)
    frame_times[:, 0] = 0
    if cls is WanTransformer3DModel:
        frame_times = frame_times.repeat_interleave(TOKENS_PER_FRAME, dim=1)
    return {
        "hidden_states": torch.randn(1, 48, num_frames, HEIGHT, WIDTH, generator=generator, device=device).to(dtype),
        "timestep": frame_times,
        "encoder_hidden_states": torch.randn(1, 512, 4096, generator=generator, device=device).to(dtype),
    }


@torch.no_grad()
def peak_bytes(cls: type, num_frames: int, dtype: torch.dtype, device: str) -> tuple[int, torch.Tensor]:
    """Peak bytes of one forward above weights and inputs, and its output."""
    model = build(cls, dtype, device)
    inputs = make_inputs(cls, num_frames, dtype, device)
    if device == "cuda":
        model(**inputs)  # leaves behind the workspaces that live on between forwards
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        sample = model(**inputs).sample
        return torch.cuda.max_memory_allocated() - before, sample
    with LiveBytes(model, inputs) as counter:
        sample = model(**inputs).sample
    return counter.peak, sample


def compare(num_frames: int, dtype: torch.dtype, device: str, shapes_only: bool) -> dict:
    peaks, samples = {}, {}
    for cls in (WanTransformer3DModel, AnchorConditionedTransformer3D):
        if shapes_only:
            with FakeTensorMode():
                peaks[cls], _ = peak_bytes(cls, num_frames, dtype, device)
        else:
            peaks[cls], samples[cls] = peak_bytes(cls, num_frames, dtype, device)
    result = {
        "pixel_frames": 4 * (num_frames - 1) + 1,
        "tokens": num_frames * TOKENS_PER_FRAME,
        "dtype": str(dtype).removeprefix("torch."),
        "method": "cuda allocator" if device == "cuda" else "live tensor bytes",
        "executed": not shapes_only,
        "stock_peak_bytes": peaks[WanTransformer3DModel],
        "anchored_peak_bytes": peaks[AnchorConditionedTransformer3D],
        "ratio": peaks[AnchorConditionedTransformer3D] / peaks[WanTransformer3DModel],
    }
    if not shapes_only:
        stock, ours = (samples[cls].double() for cls in (WanTransformer3DModel, AnchorConditionedTransformer3D))
        result["relative_difference"] = ((ours - stock).square().mean() / stock.square().mean()).sqrt().item()
        if not result["relative_difference"] <= GATES[dtype]:
            raise SystemExit(
                f"outputs differ by {result['relative_difference']:.1e} of their RMS; nothing was compared"
            )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="modulation.json", help="where the figures are written")
    args = parser.parse_args()

    if torch.cuda.is_available():
        device_name = torch.cuda.get_device_name()
        runs = [compare(31, torch.bfloat16, "cuda", shapes_only=False)]
    else:
        device_name = f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
        runs = [
            compare(6, torch.float32, "cpu", shapes_only=False),
            compare(31, torch.bfloat16, "cpu", shapes_only=True),
        ]

    print(f"| {'tokens':>6} | dtype    | executed | stock, MiB | anchored, MiB | ratio |")
    print("|-------:|----------|----------|-----------:|--------------:|------:|")
    for r in runs:
        stock, ours = r["stock_peak_bytes"] / 2**20, r["anchored_peak_bytes"] / 2**20
        executed = "yes" if r["executed"] else "no"
        print(
            f"| {r['tokens']:6} | {r['dtype']:8} | {executed:8} | {stock:10.0f} | {ours:13.0f} | {r['ratio']:5.3f} |"
        )

    report = {
        "benchmark": "peak memory of a forward above weights and inputs, Wan2.2-5B width, 2 layers, one anchor",
        "date": datetime.date.today().isoformat(),
        "device": device_name,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
        "runs": runs,
    }
    with open(args.output, "w") as file:
        json.dump(report, file, indent=2)
        file.write("\n")

    above = [r for r in runs if r["ratio"] > RATIO_BAR]
    if above:
        raise SystemExit(f"ratio {above[0]['ratio']:.3f} is above the bar of {RATIO_BAR}")


if __name__ == "__main__":
    main()
