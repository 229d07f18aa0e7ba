"""Measures loading: the embedded shapes model with all stages, its video model alone, and a stock pipeline with the same weights;
and one transformer of `--size` with random weights, with the stock class and with ours.

Each load runs in a separate process, in turn. Imports are timed separately. The first load in a process still imports the
modules of the models; the second one only loads. Memory is the resident memory of the process, with mapped files, above that
after the imports; reading it needs Linux.

Before timing, the script checks that ours and stock loaded the same weights bit for bit.

    python examples/benchmarks/benchmark_loading.py --size cpu
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from benchmark_pipeline import embedded
from diffusers import WanPipeline, WanTransformer3DModel
from harness import SIZES, bar, build_transformer, describe, make_clock, make_parser, write_report

import diffusers_fvg
from diffusers_fvg.animate.transformer_anchor import AnchorConditionedTransformer3D
from diffusers_fvg.embedded import EMBEDDED_FOLDER


CHILD = r"""
import json, pathlib, re, sys, time

def seconds(call):
    begin = clock()
    made.append(call())
    return clock() - begin

def kibibytes(name):
    return int(re.search(name + r":\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])

def names():
    import torch, diffusers, transformers, peft, diffusers_fvg
    from diffusers import {name}
    return {name}

made, (clock, folder, dtype, device, options) = [], json.loads(sys.argv[1])
clock = getattr(time, clock)
imports = seconds(names)
import torch
# Resets the peak memory.
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = kibibytes("VmRSS")

def load():
    return made[0].from_pretrained(folder, dtype=getattr(torch, dtype), **options).to(device)

first = seconds(load)
peak = kibibytes("VmHWM") - before
del made[1]
print(json.dumps([imports, first, seconds(load), peak * 1024]))
"""


def load(name: str, folder: Path, dtype: torch.dtype, device: str, **options) -> tuple[float, ...]:
    """Loads a class in a new process; returns the seconds of imports, first load and second load, and the first's peak bytes."""
    clock, _ = make_clock(device)
    given = json.dumps([clock.__name__, str(folder), str(dtype).removeprefix("torch."), device, options])
    command = [sys.executable, "-c", CHILD.format(name=name), given]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def check_equal(name: str, ours: torch.nn.Module, stock: torch.nn.Module) -> None:
    """Exits if a weight differs."""
    expected = stock.state_dict()
    found = {
        key.replace(".base_layer.", "."): value for key, value in ours.state_dict().items() if ".lora_" not in key
    }
    wrong = [key for key in expected.keys() | found.keys() if not _same(found.get(key), expected.get(key))]
    if wrong:
        raise SystemExit(f"{name}: {len(wrong)} weights differ, {wrong[0]} among them; nothing was timed.")


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)


def main() -> None:
    args = make_parser(__doc__, "loading.json").parse_args()
    size, device = SIZES[args.size], args.device
    with tempfile.TemporaryDirectory() as folder:
        pipeline, transformer = Path(folder, "pipeline"), Path(folder, "transformer")
        # The embedded weights are stored in float16 as well.
        embedded("cpu")[1].to(torch.float16).save_pretrained(pipeline)
        ours = diffusers_fvg.load_embedded()
        stock = WanPipeline.from_pretrained(pipeline, dtype=torch.float32)
        for part in ("transformer", "vae", "text_encoder"):
            check_equal(part, getattr(ours, part), getattr(stock, part))
        del ours, stock
        build_transformer(WanTransformer3DModel, size, "cpu").save_pretrained(transformer)
        classes = (AnchorConditionedTransformer3D, WanTransformer3DModel)
        check_equal("transformer", *(cls.from_pretrained(transformer, dtype=size.dtype) for cls in classes))

        shapes, large = (torch.float32, device), (size.dtype, device)
        calls = {
            "shapes, all stages": ("FactorizedVideoPipeline", EMBEDDED_FOLDER, shapes, {}),
            "shapes, video model": (
                "FactorizedVideoPipeline",
                EMBEDDED_FOLDER,
                shapes,
                {"rewriter": None, "composer": None},
            ),
            "shapes, stock WanPipeline": ("WanPipeline", pipeline, shapes, {}),
            "transformer, ours": ("AnchorConditionedTransformer3D", transformer, large, {}),
            "transformer, stock": ("WanTransformer3DModel", transformer, large, {}),
        }
        # The first round, which reads the files into the system's cache, is left out.
        rounds = [
            {what: load(name, path, *where, **options) for what, (name, path, where, options) in calls.items()}
            for _ in range(args.repeats + 1)
        ][1:]

    runs, medians, ratios = [], {}, {}
    for what in calls:
        base = "transformer, stock" if what.startswith("transformer") else "shapes, stock WanPipeline"
        imports, first, again, peak = (statistics.median(values) for values in zip(*(each[what] for each in rounds)))
        medians[what] = first
        ratios[what] = statistics.median(each[what][2] / each[base][2] for each in rounds)
        runs.append(
            {
                "what": what,
                "imports, seconds": imports,
                "first load, seconds": first,
                "second load, seconds": again,
                "ratio of the second": ratios[what],
                "peak MiB of the first": peak / 2**20,
            }
        )
    bars = [
        bar(
            "seconds of the first load of the shapes model, all stages, without imports",
            10,
            medians["shapes, all stages"],
        )
    ]
    settings = {f"transformer: {name}": value for name, value in describe(args.size, device, args.repeats).items()}
    write_report(args.output, "Loading", device, settings, runs, bars)


if __name__ == "__main__":
    main()
