"""Shared code of the benchmarks. A script compares stock diffusers with this package in one process, in this order:

1. `gate` compares the results of both; a ratio between different results would mean nothing.
2. `interleaved_seconds` calls both in turn, so that a busy machine slows both equally, and takes medians.
3. `peak_bytes`, `count_flops` and `matmul_flops` measure memory above the weights, FLOPs, and the device's maximum FLOP/s.
4. `write_report` writes JSON with versions and device. `render.py` makes the tables of README.md from these files.

All sizes have random weights. `tiny` runs a script in seconds. `shapes` has the size of the embedded model. `cpu` has one layer
of Wan2.2-TI2V-5B's width and a short clip. `5b` and `a14b` are the whole Wan2.2-TI2V-5B and one expert of Wan2.2-T2V-A14B with
the video size and length of their training.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from diffusers_fvg.embedded import EMBEDDED_FOLDER
from diffusers_fvg.models import MODELS


RESULTS = Path(__file__).parents[1] / "results"

# Dense bfloat16 FLOP/s from the manufacturers' data sheets, by a part of the device's name. The first match is used.
PEAK_BF16_FLOPS = {
    "B200": 2250e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165.2e12,
}


@dataclass(frozen=True)
class Size:
    """One size of a benchmark.

    Args:
        config (`dict`): configuration of the transformer.
        latent_frames, latent_height, latent_width (`int`): size of the video's latents.
        text_tokens (`int`): number of tokens of the prompt.
        dtype (`torch.dtype`): dtype of weights and activations.
    """

    config: dict[str, Any]
    latent_frames: int
    latent_height: int
    latent_width: int
    text_tokens: int
    dtype: torch.dtype

    @property
    def frame_tokens(self) -> int:
        return (self.latent_height // 2) * (self.latent_width // 2)

    @property
    def tokens(self) -> int:
        return self.latent_frames * self.frame_tokens


def _trained_size(name: str, layers: int | None = None, dtype: torch.dtype = torch.bfloat16, **clip: int) -> Size:
    """Returns the size of a known model with its own video size and length, or with those in `clip`."""
    facts = MODELS[name]
    frames, height, width = facts.vae_stride
    trained = {
        "latent_frames": (facts.frame_counts[0] - 1) // frames + 1,
        "latent_height": facts.sizes[0].height // height,
        "latent_width": facts.sizes[0].width // width,
    }
    config = facts.transformer_config | ({} if layers is None else {"num_layers": layers})
    return Size(config, **(trained | clip), text_tokens=facts.max_sequence_length, dtype=dtype)


def _shapes_size() -> Size:
    """Returns the size of the embedded model with its own video size and length."""
    config = json.loads((EMBEDDED_FOLDER / "transformer" / "config.json").read_text(encoding="utf-8"))
    clip = json.loads((EMBEDDED_FOLDER / "model_index.json").read_text(encoding="utf-8"))["call_defaults"]
    return Size(
        {name: value for name, value in config.items() if not name.startswith("_")},
        latent_frames=(clip["num_frames"] - 1) // 4 + 1,
        latent_height=clip["height"] // 8,
        latent_width=clip["width"] // 8,
        text_tokens=clip["max_sequence_length"],
        dtype=torch.float32,
    )


SIZES = {
    "tiny": Size(
        MODELS["Wan2.2-TI2V-5B"].transformer_config
        | {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 64, "text_dim": 32, "num_layers": 1},
        latent_frames=3,
        latent_height=8,
        latent_width=8,
        text_tokens=8,
        dtype=torch.float32,
    ),
    "shapes": _shapes_size(),
    # 5 latent frames of 64 tokens take a second per step on one core. The text is short too, or it would outweigh the video.
    "cpu": replace(
        _trained_size(
            "Wan2.2-TI2V-5B", layers=1, dtype=torch.float32, latent_frames=5, latent_height=16, latent_width=16
        ),
        text_tokens=64,
    ),
    "5b": _trained_size("Wan2.2-TI2V-5B"),
    "a14b": _trained_size("Wan2.2-T2V-A14B"),
}

WHOLE = "5b"


def make_parser(description: str, output: str) -> argparse.ArgumentParser:
    """Returns a parser with the arguments of every benchmark; `output` names its file in `examples/results`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--size", choices=SIZES, default="5b" if has_gpu else "cpu", help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if has_gpu else "cpu", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="calls of each variant, in turn (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / output, help="JSON to write (default: %(default)s)")
    return parser


# -- models -----------------------------------------------------------------------------------------------------------


def build_transformer(cls: type, size: Size, device: str) -> torch.nn.Module:
    """Builds a model with the same random weights for every class, in the dtypes of `from_pretrained(dtype=...)`."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(size.dtype)
    try:
        with torch.device(device):
            model = cls(**size.config).eval()
    finally:
        torch.set_default_dtype(default)
    kept = cls._keep_in_fp32_modules
    for name, parameter in model.named_parameters():
        if any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.float()
    return model


def transformer_inputs(size: Size, device: str, per_token: bool, batch_size: int = 1) -> dict[str, torch.Tensor]:
    """Returns inputs whose first latent frame is an anchor: its timestep is 0, the others are 900.

    There is one timestep per token, as the stock class takes them, or one per latent frame.
    """
    generator = torch.Generator(device).manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(batch_size, *shape, generator=generator, device=device).to(size.dtype)

    times = torch.full((batch_size, size.latent_frames), 900.0, device=device)
    times[:, 0] = 0
    latents = draw(size.config["in_channels"], size.latent_frames, size.latent_height, size.latent_width)
    return {
        "hidden_states": latents,
        "timestep": times.repeat_interleave(size.frame_tokens, dim=1) if per_token else times,
        "encoder_hidden_states": draw(size.text_tokens, size.config["text_dim"]),
    }


def with_appended_anchor(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Adds a second anchor to the inputs of our class, as a latent frame behind the clip; it stands for frame 6."""
    latents, times = inputs["hidden_states"], inputs["timestep"]
    return inputs | {
        "hidden_states": torch.cat([latents, latents[:, :, :1]], dim=2),
        "timestep": torch.cat([times, torch.zeros_like(times[:, :1])], dim=1),
        "anchor_positions": torch.full_like(times[:, :1], 1.875),
    }


# -- correctness ------------------------------------------------------------------------------------------------------


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the RMS of the difference divided by that of `expected`, computed in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


def gate(name: str, actual: torch.Tensor, expected: torch.Tensor, limit: float) -> float:
    """Returns [`relative_rms`]. Exits if it is above `limit` or not a number."""
    difference = relative_rms(actual, expected)
    if not difference <= limit:
        raise SystemExit(f"{name}: differs by {difference:.1e} of the RMS, more than {limit:.0e}; nothing was timed.")
    return difference


# -- time -------------------------------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def make_clock(device: str) -> tuple[Callable[[], float], str]:
    """Returns a clock in seconds and its name. The CPU time of a single thread does not depend on other programs."""
    if not device.startswith("cuda") and torch.get_num_threads() == 1:
        return time.process_time, "CPU seconds of one thread"
    return time.perf_counter, "wall seconds"


def interleaved_seconds(
    calls: Mapping[str, Callable[[], object]], device: str, repeats: int, warmups: int = 1
) -> dict[str, list[float]]:
    """Returns the seconds of `repeats` calls of each, made in turn (a, b, a, b) after `warmups` untimed rounds."""
    clock, _ = make_clock(device)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(-warmups, repeats):
        for name, call in calls.items():
            synchronize(device)
            begin = clock()
            call()
            synchronize(device)
            if round_ >= 0:
                seconds[name].append(clock() - begin)
    return seconds


def median_ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> float:
    """Returns the median over the rounds of a call's time divided by that of `base` in the same round."""
    return statistics.median(own / other for own, other in zip(seconds[name], seconds[base], strict=True))


def block_call(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> Callable[[], object]:
    """Returns a call of the model's first block with its inputs from a forward."""
    given: list[tuple] = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _, args: given.append(args))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return partial(model.blocks[0], *given[0])


def at_full_depth(model: float, block: float, layers: int) -> float:
    """Extrapolates seconds to a model as deep as `WHOLE`, from a model with `layers` layers and from one of its blocks.

    Work that is done once per forward is a larger share of the time of a model with few layers.
    """
    return model + (SIZES[WHOLE].config["num_layers"] - layers) * block


# -- memory -----------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of simultaneously live storages that are created while this mode is active.

    Workspace inside an operation is not counted.

    Args:
        known (iterable of `torch.Tensor`): tensors that are not counted, such as weights and inputs.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.storages = {tensor.untyped_storage()._cdata for tensor in known}
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


def peak_bytes(call: Callable[[], object], device: str, known: Iterable[torch.Tensor] = ()) -> int:
    """Returns the peak bytes of one call above the bytes that are allocated before it.

    On a GPU the allocator counts them, after a first call that allocates persistent workspaces. On a CPU [`LiveBytes`] counts
    them, except for the tensors in `known`.
    """
    gc.collect()
    if device.startswith("cuda"):
        call()
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes(known) as counter:
        call()
    return counter.peak


# -- work -------------------------------------------------------------------------------------------------------------


def count_flops(cls: type, size: Size, per_token: bool, batch_size: int = 1) -> int:
    """Returns the FLOPs of one forward, two per multiply-add, from tensor shapes without computing anything."""
    # All layers have the same FLOPs, so that two small models replace a large one.
    one, two = (
        _count_flops(cls, replace(size, config=size.config | {"num_layers": layers}), per_token, batch_size)
        for layers in (1, 2)
    )
    return one + (size.config["num_layers"] - 1) * (two - one)


def _count_flops(cls: type, size: Size, per_token: bool, batch_size: int) -> int:
    # The counter does not support the CPU's fused attention, but it does support the matrix products of the plain one.
    with FakeTensorMode(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model = build_transformer(cls, size, "cpu")
        inputs = transformer_inputs(size, "cpu", per_token, batch_size)
        with FlopCounterMode(display=False) as counter:
            model(**inputs)
    return counter.get_total_flops()


def matmul_flops(device: str, dtype: torch.dtype, repeats: int = 5) -> float:
    """Measures the FLOP/s of a large square matrix product on this device."""
    side = 8192 if device.startswith("cuda") else 1024
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = interleaved_seconds({"matmul": lambda: left @ right}, device, repeats, warmups=2)
    return 2 * side**3 / min(seconds["matmul"])


def peak_flops(device: str, dtype: torch.dtype) -> tuple[float, str]:
    """Returns the maximum FLOP/s of the device and the source of the number."""
    if device.startswith("cuda") and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, flops in PEAK_BF16_FLOPS.items():
            if part in name:
                return flops, "data sheet, dense bfloat16"
    return matmul_flops(device, dtype), "measured, square matrix product"


# -- reports ----------------------------------------------------------------------------------------------------------


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} threads)"


def versions() -> dict[str, str]:
    import diffusers
    import transformers

    import diffusers_fvg

    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "diffusers_fvg": diffusers_fvg.__version__,
    }
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def bar(figure: str, limit: float, value: float | None, at_most: bool = True, needs: str = "") -> dict[str, Any]:
    """Returns a measure with its target. `value=None` means that it was not run; `needs` says what a run requires."""
    met = None if value is None else value <= limit if at_most else value >= limit
    return {
        "figure": figure,
        "bar": f"at {'most' if at_most else 'least'} {limit:g}",
        "value": value,
        "met": met,
        "needs": needs,
    }


def write_report(
    path: Path,
    benchmark: str,
    device: str,
    settings: dict[str, Any],
    runs: list[dict[str, Any]],
    bars: list[dict[str, Any]],
    notes: str = "",
) -> None:
    """Writes the JSON report and prints its section of the page that `render.py` writes.

    Args:
        path (`Path`): path of the JSON file.
        benchmark (`str`): title of the section.
        device (`str`): torch's name of the device.
        settings (`dict`): settings shared by all runs, such as size, tokens and repeats.
        runs (`list[dict]`): rows of the table; the keys of the first row are its columns.
        bars (`list[dict]`): measures with targets, from [`bar`].
        notes (`str`): explanations below the tables.
    """
    report = {
        "benchmark": benchmark,
        "date": datetime.date.today().isoformat(),
        "device": device_name(device),
        "versions": versions(),
        "settings": settings,
        "runs": runs,
        "bars": bars,
        "notes": notes,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    from render import section

    print(section(report))


def describe(size_name: str, device: str, repeats: int) -> dict[str, Any]:
    """Returns the settings that every report contains."""
    size = SIZES[size_name]
    return {
        "size": size_name,
        "layers": size.config["num_layers"],
        "width": size.config["num_attention_heads"] * size.config["attention_head_dim"],
        "latent_frames": size.latent_frames,
        "tokens": size.tokens,
        "dtype": str(size.dtype).removeprefix("torch."),
        "repeats": repeats,
        "clock": make_clock(device)[1],
    }
