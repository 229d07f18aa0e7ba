"""Writes README.md beside this file from the reports in `examples/results`: `python examples/benchmarks/render.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"

HEAD = """\
# Benchmarks

[Front page](../../README.md). Each script compares stock diffusers ("stock") with this package ("ours") in one process. It first checks that both
compute the same result. It then calls them in turn, so that other programs on the machine slow both equally. `harness.py` explains how time, memory and
FLOPs are measured; on a CPU with one thread, times are CPU seconds of that thread.

```bash
python examples/benchmarks/benchmark_transformer_step.py --size cpu     # or --size tiny, shapes, 5b, a14b
python examples/benchmarks/render.py                                    # writes this page from examples/results/*.json
```

| script `benchmark_...` | what it compares |
|---|---|
| `transformer_step` | a forward with stock `WanTransformer3DModel` and per-token timesteps, eager and compiled |
| `training_step` | forward and backward with stock's, with the same LoRA and loss |
| `attention` | window attention with the fastest dense attention backend |
| `kernels` | each kernel with its plain torch definition, eager and compiled, and with the bandwidth of a copy |
| `modulation` | the peak memory of a forward with stock's |
| `forwards` | ways to save forwards or parts of them: a fused LoRA, batched guidance, step caches, cached keys and values |
| `pipeline` | a whole video with stock `WanPipeline` at 50 steps |
| `loading` | loading with stock `WanPipeline.from_pretrained` |
| `dreamer` | Factorized-Dreamer's UNet with the same UNet without its designs |

`gpu_run.py` runs the most useful measurements on a GPU in one process with a time limit; the sections "On a GPU" come last. `shapes_lora.py` trains the
anchor LoRA of the shapes model on a device in one run, without files of clips.

How to read the tables:

* **ratio** is the time divided by that of the first row of its group, or of `stock`, as the median over the rounds; lower is better. In *computed*
  rows it is the share of FLOPs that remain.
* **relative difference** and **relative error** are the root mean square of the difference divided by that of the expected result; 0 is best.
* **A / B** in the column *measure* means that A is divided by B. **target** is the value to reach. **result** is *met*, *missed* or *not run*, with
  what a run needs.
* *timed* rows were measured. *extrapolated* rows add up measured parts to a model with all layers. *computed* rows follow from tensor shapes.
* *dense* is attention to all frames. *gathered*, *flex* and *triton* are three implementations of window attention.
* *forward*, *adapter* and *all* are the passes of a kernel: forward; backward with gradients for the adapter's inputs; backward with all gradients.
* Sizes: *tiny* takes seconds, *shapes* is the embedded model, *cpu* is one layer of Wan2.2-TI2V-5B with a short clip, *5b* and *a14b* are the whole
  Wan2.2-TI2V-5B and one expert of Wan2.2-T2V-A14B. The weights of all sizes are random; the sections "Loading" and "Whole pipeline" also use the
  trained embedded model.

## Measures that are not met or not run on a GPU

Each row is a measure with its target, the result so far, and the step that measures it: `python examples/benchmarks/gpu_run.py --only STEP`, with
several steps separated by commas. Step `fp8` needs the package torchao. Every step was run at tiny size on a CPU. Results on a CPU are in
the sections below without "On a GPU" in their titles; those of the shapes model are in [its study](../results/shapes/study.txt).

| measure | target | result so far | step |
|---|---|---|---|
| time of an eager step with an anchor, ours / stock | at most 0.70 | 0.77 | `steps` |
| time of a compiled step with an anchor, ours / stock, both with the best backend | at most 0.95 | stock was not run | `steps` |
| FLOP/s of a compiled step / bfloat16 peak of the data sheet | at least 0.60 | 0.57 | `steps` |
| time of a compiled step, window 3 / all frames | at most 0.70 | 0.67 in eager mode with an earlier kernel | `steps` |
| time of a compiled step, one appended anchor more / none | at most 1.05 | time not run; 1.050 times the FLOPs, computed, and 1.083 at size `a14b` (above the target) | `steps` |
| bandwidth of modulated norm and of rotary embedding / bandwidth of a copy | at least 0.80 | 0.59, 0.72 | `kernels` |
| time of a compiled step, float8 / bfloat16 linear layers | at most 0.75 | not run | `fp8` |
| time of a step with an anchor LoRA, fused and as separate layers | none | not run | `lora` |
| time of decoding / time of a video with 15 steps | at most 0.15 | 0.21, extrapolated | `decode`, `pipeline` |
| the same with the light decoder | at most 0.15 | not run | `decode`, `pipeline` |
| time of a video without stages 1 and 2, ours with 15 steps / stock with 50 | at most 0.30 | not run | `pipeline` |
| the same, compiled; with one forward per step; with a window and float8 as well | at most 0.25; 0.15; 0.10 | not run | `fast_pipeline` |
| the same two rows with stages 1 and 2, with random weights of the size of Z-Image and Qwen3-4B | the same | not run | `pipeline,fast_pipeline,stages` |
| time of a training step at rank 128, ours / stock | at most 0.90 | not run | `training_step` |
| peak memory of a training step above weights and inputs, ours / stock | at most 0.70 | 0.66, without gradient checkpointing 0.60, both computed | \
`training_step` |
| time of a step with SageAttention, and its difference | none | not run; for GPUs of compute capability 8.6, 8.9 and 12.0 | `steps`, on such a GPU \
with the package sageattention |
| minutes and scores of the shapes model trained from scratch on a GPU | scores as on a CPU | only seconds per step were measured | `fvg shapes train \
OUT`, then `fvg shapes report DIR --model OUT/repository`; one LoRA alone: `shapes_lora` |

## Decoders

`LightDecoder` (`animate/light_decoder.py`) decodes with taew2_1 and taew2_2 of [taehv](https://github.com/madebyollin/taehv). A clip of 121 frames at
704 x 1280 needs 0.0098 PFLOP instead of 2.01, and 0.2 GiB of activations in bfloat16 instead of 8.0 GiB (both counted from tensor shapes). At
64 x 64 pixels on a CPU, it took 1/110 of the time of the VAE of Wan2.2-TI2V-5B, and 1/18 of that of Wan 2.1. Its frames equal those of taehv's own code
on the same weights. Not run: the published weights, latents of a real Wan model, and a GPU. Previews while a video denoises use one convolution that is
fitted to the VAE when it is loaded (`animate/preview.py`), takes less than a thousandth of the time of a decode, and needs no download.

The blocks of the VAE's decoder can be compiled: `block.compile(dynamic=False)` for `block` in `pipe.vae.decoder.up_blocks`, with
`torch._dynamo.config.recompile_limit = 64`, as they have 16 graphs. On a CPU the frames of a small VAE stay the same to 4e-7; step `decode` times it on
a GPU. With `channels_last_3d`, a decode took 1.08 times as long on an H200, so the package does not use it.

## Left out, with the reason

Times of a forward are those of Wan2.2-TI2V-5B on an H200, from the section "On a GPU" where no other source is given.

* One kernel for the gated residual and the next norm: it would save one of five passes over the tokens, 60 times in a forward. At the bandwidth of a copy
  this is 2.5 ms of 926 ms (computed).
* A norm kernel without masked lanes: a block of 4,096 lanes holds 3,072 channels. The 61 norms take 10.6 ms of a forward, and 6.4 ms at 0.8 of the
  bandwidth of a copy (computed). Another kernel would first have to pass the tests on a GPU.
* Kernels as `triton_op`, so that the compiler can look into them: a compiled forward takes 0.922 s with the kernels and 0.926 s without them.
* 128 registers per thread (`maxnreg=128`) for the kernel of window attention: its 128 KiB of shared memory allow one block on a multiprocessor in any
  case, and 144 bytes per thread would be spilled (compiled ahead of time for compute capability 9.0 with Triton 3.9).
* The attention backend `"auto"` as the default: on the only GPU that was measured it selects the default, because torch itself uses cuDNN there.
* A fused anchor LoRA as the default: see [speed](../../diffusers_fvg/kernels/README.md).
* Step caches at 15 steps: see the section "Fewer and cheaper forwards".
* The two branches of guidance on two GPUs: this would at most halve the time of one video, and needs a second copy of the model (9.3 GiB). Two processes
  with one GPU each make two videos in the time of one.
* Window attention together with context parallelism (Ulysses, ring): a GPU would need keys of frames that other GPUs hold. On one GPU, a window of 3 takes
  0.67 of the time of all frames; two GPUs with all frames take at least 0.5.
* Several latent frames in one forward of the VAE's decoder. Four in one forward give the same frames (to 4e-15 in float64, 3e-6 in float32) and need
  2.4 to 2.6 times the memory. Their CPU time, divided by that of four forwards, is 1.0 for Wan 2.1 at 64 x 64 pixels, 1.2 at 128 x 128, 1.3 to 1.5 for
  the shapes model, and 0.5 (64 x 64) to 1.3 (192 x 192) for a quarter of the width of Wan 2.1. Step `decode` measures it on a GPU.
* Tiles of one video on several GPUs: each GPU would need a copy of the VAE, and with one process per GPU all of them decode without waiting for tiles.
"""


def main() -> None:
    (HERE / "README.md").write_text(page(RESULTS), encoding="utf-8")


def page(folder: Path) -> str:
    """Returns the whole page: one section per report, in the order of the file names, with the GPU reports last."""
    paths = [*sorted(folder.glob("*.json")), *sorted((folder / "gpu").glob("*.json"))]
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return "\n".join([HEAD, *(section(report) for report in reports if "bars" in report)])


def section(report: dict[str, Any]) -> str:
    """Returns the section of one report: title, machine and versions, settings, table of runs, table of targets, notes."""
    settings = ", ".join(f"{name} {cell(value)}" for name, value in report["settings"].items())
    libraries = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    parts = [
        f"## {report['benchmark']}",
        f"Measured on {report['date']}. Device: {report['device']}. Versions: {libraries}.\nSettings: {settings}.",
    ]
    if report["runs"]:
        columns = list(report["runs"][0])
        parts.append(table(columns, [[run.get(column) for column in columns] for run in report["runs"]]))
    if report["bars"]:
        rows = [[b["figure"], b["bar"], b["value"], verdict(b)] for b in report["bars"]]
        parts.append(table(["measure", "target", "value", "result"], rows))
    if report.get("notes"):
        parts.append(report["notes"])
    return "\n\n".join(parts) + "\n"


def verdict(bar: dict[str, Any]) -> str:
    if bar["met"] is None:
        return f"not run: needs {bar['needs']}"
    return "met" if bar["met"] else "missed"


def table(columns: list[str], rows: list[list[Any]]) -> str:
    lines = [[column.replace("_", " ") for column in columns], ["---"] * len(columns)]
    lines += [[cell(value) for value in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any) -> str:
    """Formats a value: three significant digits for fractions, thousands separators for counts, a dash for `None`."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


if __name__ == "__main__":
    main()
