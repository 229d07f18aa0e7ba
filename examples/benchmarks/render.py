"""Writes README.md beside this file from the reports in `examples/results`: `python examples/benchmarks/render.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"

HEAD = """\
# Benchmarks

[Front page](../../README.md). Each script compares stock diffusers with this package in one process: first that both compute the same,
then both in turn, so that a busy machine slows both. Ratios are medians of the rounds. `harness.py` says how time, memory and FLOPs are
counted; on a CPU with one thread, times are the thread's own CPU seconds.

```bash
python examples/benchmarks/benchmark_transformer_step.py --size cpu     # tiny, shapes, cpu, 5b or a14b
python examples/benchmarks/render.py                                    # this page, from examples/results/*.json
```

| script `benchmark_...` | against |
|---|---|
| `transformer_step` | stock `WanTransformer3DModel` with per-token times, eager and compiled |
| `training_step` | stock forward and backward with the same LoRA and loss |
| `attention` | window attention against the best dense backend |
| `kernels` | the definition, the definition compiled, a copy's bandwidth |
| `modulation` | peak memory of the stock forward |
| `forwards` | what was left out: batched guidance, cached keys and values |
| `pipeline` | stock `WanPipeline` at 50 steps |
| `loading` | stock `WanPipeline.from_pretrained` |
| `dreamer` | the same UNet without its designs |

`gpu_run.py` measures what is worth it on a GPU in one process that ends in time; the sections of a GPU come last. A figure that is open
has its script, which was run at small size; what it needs is named. `shapes_lora.py` trains the shapes model's anchor LoRA on a device in
one go, without files of clips.

## Open on a GPU

Each figure is closed by `python examples/benchmarks/gpu_run.py --only STEP`; `fp8` needs the package torchao. Every step was run at
tiny size on a CPU.

| figure | bar | so far | step |
|---|---|---|---|
| anchored step, eager, of stock's time | at most 0.70 | 0.77 | `steps` |
| anchored step, both compiled, of stock's time | at most 0.95 | stock was not run | `steps` |
| compiled step, share of the data sheet's bfloat16 peak | at least 0.60 | 0.57 | `steps` |
| window of 3, compiled, of the time with all frames | at most 0.70 | eager 0.67, with an older kernel | `steps` |
| modulated norm and rotary embedding, share of the copy bandwidth | at least 0.80 | 0.59, 0.72 | `kernels` |
| float8 linear layers, compiled, of bfloat16's time | at most 0.75 | not run | `fp8` |
| anchor LoRA, fused and as layers | none | not run | `lora` |
| decoding, of a video of 15 steps | at most 0.15 | 0.21, worked out | `decode`, `pipeline` |
| video of 15 steps without stages 1 and 2, of stock's time at 50 steps | at most 0.30 | not run | `pipeline` |
| the same compiled; one forward a step; that with window and float8 | at most 0.25; 0.15; 0.10 | not run | `fast_pipeline` |
| training step of rank 128, of stock's time | at most 0.90 | not run | `training_step` |
| shapes model trained on a GPU, scores as on a CPU | same scores | seconds a step alone | `shapes_lora` |

No step times stages 1 and 2 at the size of a real text-to-image model and chat model.

A small decoder for previews (taew2.1, taew2.2 of [taehv](https://github.com/madebyollin/taehv)) is left out: diffusers 0.42.1 has no
class for it, and without its weights no test can tell whether one of our own gives frames in the right order, range and colours. Previews
are a convolution that is fitted to the VAE when it is loaded (`animate/preview.py`): less than a thousandth of a decode, and no download.
"""


def main() -> None:
    (HERE / "README.md").write_text(page(RESULTS), encoding="utf-8")


def page(folder: Path) -> str:
    """The whole page: one section for each report, in the order of the files' names, those of a GPU last."""
    paths = [*sorted(folder.glob("*.json")), *sorted((folder / "gpu").glob("*.json"))]
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return "\n".join([HEAD, *(section(report) for report in reports if "bars" in report)])


def section(report: dict[str, Any]) -> str:
    """Title, where it was measured, the runs and the bars of one report."""
    settings = ", ".join(f"{name} {cell(value)}" for name, value in report["settings"].items())
    libraries = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    parts = [f"## {report['benchmark']}", f"{report['date']}, {report['device']}; {libraries}.\n{settings}."]
    if report["runs"]:
        columns = list(report["runs"][0])
        parts.append(table(columns, [[run.get(column) for column in columns] for run in report["runs"]]))
    if report["bars"]:
        rows = [[b["figure"], b["bar"], b["value"], verdict(b)] for b in report["bars"]]
        parts.append(table(["figure", "bar", "value", "verdict"], rows))
    if report.get("notes"):
        parts.append(report["notes"])
    return "\n\n".join(parts) + "\n"


def verdict(bar: dict[str, Any]) -> str:
    if bar["met"] is None:
        return f"open: needs {bar['needs']}"
    return "met" if bar["met"] else "MISSED"


def table(columns: list[str], rows: list[list[Any]]) -> str:
    lines = [[column.replace("_", " ") for column in columns], ["---"] * len(columns)]
    lines += [[cell(value) for value in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any) -> str:
    """A number with the digits that mean something, bytes and counts with separators, nothing as a dash."""
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
