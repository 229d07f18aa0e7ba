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
