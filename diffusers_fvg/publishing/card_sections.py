"""Sections of a model card: tables and texts from data, and the card's metadata. Imports neither torch nor diffusers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..loading.reading import read_json
from ..models import License, ModelFacts, find_model
from .privacy import is_repository, without_paths
from .toml import toml_value


if TYPE_CHECKING:
    from ..schedules.presets import SchedulerPresets

PROMPT = "A green leaf slowly turns yellow"
STAGES = {"rewriter": "1 reasoning", "composer": "2 composition", "anchor_judge": "2 composition"}
ANIMATION = "3 animation"
# Options of a training config that hold local paths.
PLACES = ("cache_dir", "output_dir")

# Identifiers from https://huggingface.co/docs/hub/repositories-licenses; other licences use the Hub's `other` with a name.
HUB_LICENSES = frozenset(
    """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
    lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0
    openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma other""".split()
)

CITATION = """\
```bibtex
@misc{hassan2025factorized,
  title         = {Factorized Video Generation: Decoupling Scene Construction and Temporal Synthesis in Text-to-Video Diffusion Models},
  author        = {Hassan, Mariam and van Delft, Bastien and Li, Wuyang and Alahi, Alexandre},
  year          = {2025},
  eprint        = {2512.16371},
  archivePrefix = {arXiv},
  primaryClass  = {cs.CV}
}

@misc{yang2024factorizeddreamer,
  title         = {Factorized-Dreamer: Training A High-Quality Video Generator with Limited and Low-Quality Data},
  author        = {Yang, Tao and Shi, Yangming and Huang, Yunwen and Chen, Feng and Zheng, Yin and Zhang, Lei},
  year          = {2024},
  eprint        = {2408.10119},
  archivePrefix = {arXiv},
  primaryClass  = {cs.CV}
}
```

The two papers describe the methods. This package is independent of their authors."""


@dataclass(frozen=True)
class Scores:
    """Mean scores of a benchmark; a repository's `scores.json` has these fields.

    Args:
        benchmark (`str`): name of the benchmark.
        synthetic (`bool`): whether prompts and scorer belong to a synthetic world and not to real video.
        commit (`str`): commit that produced the scores; empty if it was not recorded.
        count (`int`): number of videos per variant of the pipeline.
        means (`dict[str, float]`): mean score of each variant, in [0, 1].
    """

    benchmark: str
    synthetic: bool
    commit: str
    count: int
    means: dict[str, float]

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Reads a `scores.json`.

        Raises:
            `ValueError`: a field is missing or unknown.
        """
        content, known = read_json(path), {field.name for field in fields(cls)}
        if set(content) != known:
            raise ValueError(f"{path} has the fields {sorted(content)}; it needs {sorted(known)}.")
        return cls(**content)


@dataclass(frozen=True)
class ShapesReport:
    """Results of `fvg shapes report`.

    Args:
        scores ([`Scores`]): mean of the means of the seven categories.
        seconds (`dict[str, float]`): seconds of stage 3 for one video, for each variant.
        device (`str`): device of the run.
        training (`dict[str, dict]`): steps, samples and seconds of the training of each part; empty if not recorded.
    """

    scores: Scores
    seconds: dict[str, float]
    device: str
    training: dict[str, dict[str, Any]]


def shapes_report(folder: Path) -> ShapesReport:
    """Reads `study.json` from a folder of results."""
    study = read_json(folder / "study.json")
    made, rows = study["made_with"], {f"{row['arm']}, {row['steps']} steps": row for row in study["results"]}
    commit = (made["commit"] or "") + ("-dirty" if made["changed"] else "")
    means = {name: row["score"] for name, row in rows.items()}
    videos = min(row["videos"] for row in rows.values())
    scores = Scores("Shapes world, held-out prompts of seven categories", study["synthetic"], commit, videos, means)
    seconds = {name: row["seconds"] for name, row in rows.items()}
    return ShapesReport(scores, seconds, made["device"], study["training"] or {})


@dataclass(frozen=True)
class Part:
    """A row of the card's table of parts.

    Args:
        name (`str`): name of the component, or of several components with one origin.
        origin (`str`): place of its weights, in words.
        license (`License`, *optional*): licence; `None` if it is not stated.
        repository (`str`): repository on the Hub, if any.
        bytes (`int`): bytes of its weights in this repository.
        fetched (`int`): bytes that loading downloads from another repository.
    """

    name: str
    origin: str
    license: License | None
    repository: str = ""
    bytes: int = 0
    fetched: int = 0


def license_of(name: str) -> License | None:
    """Returns the licence with the name in a model card; `None` for an empty name or "not stated"."""
    if name in ("", "not stated"):
        return None
    if name in HUB_LICENSES:
        return License(name)
    return License("other", re.sub(r"[^a-z0-9.-]+", "-", name.lower()))


# -- sections ---------------------------------------------------------------------------------------------------------


def parts_table(parts: Sequence[Part]) -> str:
    rows = []
    for part in parts:
        link = f"[{part.repository}](https://huggingface.co/{part.repository})" if part.repository else ""
        license = part.license
        text = "not stated" if license is None else plain(license.name or license.id)
        text = f"[{text}]({license.link})" if license and license.link else text
        size = f"{part.bytes / 1e6:,.1f} MB" if part.bytes else ""
        rows.append(
            (
                STAGES.get(part.name, ANIMATION),
                plain(part.name),
                ", ".join(filter(None, (link, part.origin))),
                size,
                text,
            )
        )
    return markdown_table(("stage", "part", "source", "weights in this repository", "licence"), rows)


def facts_table(facts: ModelFacts) -> str:
    sizes = ", ".join(f"{size.height} x {size.width}" for size in facts.sizes)
    shifts = sorted({size.flow_shift for size in facts.sizes if size.flow_shift is not None})
    experts = "each of two experts" if facts.boundary_ratio is not None else "one transformer"
    lengths = " or ".join(map(str, facts.frame_counts))
    strides = " x ".join(map(str, facts.vae_stride))
    rows = [
        ("parameters", f"{facts.parameters:,} ({experts})", "parameters"),
        ("trained sizes (height x width)", sizes, "sizes"),
        ("trained lengths", f"{lengths} frames; {facts.frame_step}k + 1", "frame_counts"),
        ("frame rate", f"{facts.frame_rate} per second", "frame_rate"),
        ("VAE stride (frames, height, width)", strides, "vae_stride"),
        ("text tokens", str(facts.max_sequence_length), "max_sequence_length"),
        ("steps", str(facts.num_inference_steps), "num_inference_steps"),
        ("guidance", str(facts.guidance_scale), "guidance_scale"),
    ]
    if shifts:
        by_shift = ", ".join(
            f"{shift} at {' and '.join(f'{s.height} x {s.width}' for s in facts.sizes if s.flow_shift == shift)}"
            for shift in shifts
        )
        rows.append(("flow shift", by_shift, "sizes"))
    if facts.boundary_ratio is not None:
        rows.append(("guidance of the low-noise expert", str(facts.guidance_scale_2), "guidance_scale_2"))
        rows.append(
            (
                "noise level at and above which the high-noise expert is used",
                str(facts.boundary_ratio),
                "boundary_ratio",
            )
        )
    return markdown_table(
        ("fact", "value", "source"), [(name, value, facts.sources[key]) for name, value, key in rows]
    )


def presets_table(presets: SchedulerPresets) -> str:
    rows = []
    for preset in presets.values():
        # Presets of schedulers without explicit sigmas have no interval, and may have no shift.
        interval = "" if preset.sigmas is None else " to ".join(map(str, preset.guidance_interval))
        shift = "" if preset.flow_shift is None else preset.flow_shift
        numbers = (preset.num_inference_steps, plain(preset.scheduler_class), shift)
        low_noise = preset.guidance_scale_2
        guidance = preset.guidance_scale if low_noise is None else f"{preset.guidance_scale}, low noise {low_noise}"
        rows.append((code_span(preset.name), *numbers, guidance, interval, plain(preset.source)))
    heads = ("preset", "steps", "scheduler", "shift", "guidance", "guided noise levels", "source")
    notes = ["The first preset is the default."]
    for preset in presets.values():
        if weights := preset.weights:
            if not is_repository(weights):
                notes.append(
                    f"{code_span(preset.name)} is for the LoRA in {code_span(weights)}, which replaces the anchor LoRA."
                )
                continue
            link = f"[{weights}](https://huggingface.co/{weights})"
            notes.append(
                f"{code_span(preset.name)} is for the distilled weights in {link} together with the anchor LoRA; this was not "
                "measured."
            )
    return "\n\n".join([markdown_table(heads, rows), " ".join(notes)])


def scores_section(scores: Scores) -> str:
    kind = (
        "**Synthetic**: prompts and scorer belong to an artificial world, not to real video."
        if scores.synthetic
        else ""
    )
    commit = (
        f"The scores come from commit {code_span(scores.commit)}." if scores.commit else "The commit was not recorded."
    )
    rows = [(plain(arm), f"{mean:.3f}", scores.count) for arm, mean in scores.means.items()]
    table = markdown_table(("variant of the pipeline", "mean score (0 to 1, higher is better)", "videos"), rows)
    return " ".join(filter(None, (f"{plain(scores.benchmark)}.", kind, commit))) + "\n\n" + table


def limits_section(facts: ModelFacts | None, call_defaults: Mapping[str, Any] | None) -> str:
    lines = ["- The video keeps its anchor, and with it all errors of stage 2."]
    if call_defaults:
        texts = {
            "height": "{} pixels high",
            "width": "{} pixels wide",
            "num_frames": "{} frames",
            "frame_rate": "{} frames per second",
        }
        made = ", ".join(
            text.format(plain(call_defaults[name])) for name, text in texts.items() if name in call_defaults
        )
        lines.append(f"- The pipeline is made for videos of {made}.")
    if facts:
        sizes = ", ".join(f"{size.height} x {size.width}" for size in facts.sizes)
        lengths = " or ".join(map(str, facts.frame_counts))
        rate = f"{lengths} frames at {facts.frame_rate} per second"
        lines.append(f"- {facts.name} was trained at {sizes} (height x width) and {rate}; other videos may be worse.")
    lines.append("- The pipeline inherits the errors and the biases of its models.")
    return "\n".join(lines)


def lora_use(base: str, experts: Sequence[str]) -> str:
    """Returns instructions to load a LoRA of [`training.trainer.train`] with this package and with diffusers alone."""
    stock = {
        "transformer": 'pipe.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")',
        "transformer_2": (
            'pipe.load_lora_weights(lora, weight_name="transformer_2.safetensors", load_into_transformer_2=True)'
        ),
    }
    lines = "\n".join(stock[expert] for expert in experts)
    facts = find_model(base)
    pipeline, stock_pipeline, note = "FactorizedVideoPipeline", "WanPipeline", ""
    if facts is not None and facts.prediction == "v":
        pipeline, stock_pipeline = "FactorizedCogVideoXPipeline", facts.pipeline_class
    if stock_pipeline == "WanPipeline":
        note = " `WanPipeline` takes no picture; for Wan2.2-TI2V-5B, `WanImageToVideoPipeline` does:"
    return f"""\
With diffusers_fvg, which disables the LoRA in calls without an anchor:

```python
import torch
from diffusers_fvg import {pipeline}

base, lora = "{base}", "<this repository>"
pipe = {pipeline}.from_pretrained(base, dtype=torch.bfloat16)
pipe.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors", adapter_name="anchor")
frames = pipe.animate(["{PROMPT}"], anchors=image)
```

With diffusers alone.{note}

```python
import torch
from diffusers import {stock_pipeline}

base, lora = "{base}", "<this repository>"
pipe = {stock_pipeline}.from_pretrained(base, dtype=torch.bfloat16)
{lines}
```"""


def config_block(config: Mapping[str, Any]) -> str:
    """Returns a training config as TOML; of local paths it shows only the last name, or nothing."""
    shown = {name: value for name, value in without_paths(config).items() if name not in PLACES}
    keys = {name: name if re.fullmatch(r"[\w-]+", name) else toml_value(name) for name in shown}
    lines = [f"{keys[name]} = {toml_value(value)}" for name, value in shown.items()]
    return "```toml\n# Add cache_dir and output_dir, two folders of your own.\n" + "\n".join(lines) + "\n```"


def run_summary(records: Sequence[Mapping[str, float]]) -> tuple[str, ...]:
    tenth = max(1, len(records) // 10)
    first, last = (_mean([record["loss"] for record in part]) for part in (records[:tenth], records[-tenth:]))
    hours = sum(record["seconds"] for record in records) / 3600
    memory = max(record["bytes"] for record in records) / 2**30
    return f"{records[-1]['step']}", f"{first:.4f}", f"{last:.4f}", f"{hours:.2f}", f"{memory:.1f} GiB"


def training_parts_table(training: Mapping[str, Mapping[str, Any]]) -> str:
    columns = {"parameters": "parameters", "samples": "samples", "steps": "steps", "seconds": "seconds"}
    columns |= {"held_out": "score on held-out prompts (synthetic)"}
    rows = [
        (part, *(f"{facts[name]:,}" if facts.get(name) is not None else "" for name in columns))
        for part, facts in training.items()
    ]
    return markdown_table(("part", *columns.values()), rows)


def modulation_section(path: Path) -> str:
    """Returns the results of `examples/benchmarks/benchmark_modulation.py` as a table."""
    result = read_json(path)
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    rows = [
        (
            f"{run['tokens']:,}",
            run["dtype"],
            "measured" if run["executed"] else "computed from tensor shapes",
            f"{run['stock_peak_bytes'] / 2**20:,.0f} MiB",
            f"{run['anchored_peak_bytes'] / 2**20:,.0f} MiB",
            f"{run['ratio']:.2f}",
        )
        for run in result["runs"]
    ]
    heads = ("tokens", "dtype", "method", "stock diffusers", "this package", "this package / stock")
    table = markdown_table(heads, rows)
    head = f"{result['benchmark']}, with random weights. Device: {result['device']}. Versions: {versions}."
    return f"{head}\n\n{table}"


# -- metadata and markdown --------------------------------------------------------------------------------------------


def card_data(
    tags: Sequence[str],
    base_models: Sequence[str],
    relation: str,
    licenses: Sequence[License | None],
    languages: Sequence[str],
    prompt: str,
    scores: Scores | None = None,
    title: str | None = None,
    datasets: list[str] | None = None,
) -> ModelCardData:
    """Returns the YAML block. It names a licence only if all licences are known; several become the Hub's `other`."""
    found = {license for license in licenses if license is not None}
    license = License("")
    if None not in licenses and found:
        license = found.pop() if len(found) == 1 else License("other", "licences-of-the-parts")
    results = (
        []
        if scores is None
        else [
            EvalResult(
                task_type="text-to-video",
                dataset_type="synthetic" if scores.synthetic else "custom",
                dataset_name=scores.benchmark + (" (synthetic)" if scores.synthetic else ""),
                dataset_revision=scores.commit or None,
                metric_type="score",
                metric_name=f"mean score, {arm}",
                metric_value=round(mean, 3),
            )
            for arm, mean in scores.means.items()
        ]
    )
    more = {"base_model_relation": relation} if relation and base_models else {}
    return ModelCardData(
        base_model=list(base_models) or None,
        language=list(languages) or None,
        library_name="diffusers",
        license=license.id or None,
        license_name=license.name or None,
        license_link=license.link or None,
        pipeline_tag="text-to-video",
        tags=list(tags),
        datasets=datasets,
        model_name=title if results else None,
        eval_results=results or None,
        widget=[{"text": prompt}],
        **more,
    )


def make_card(data: ModelCardData, title: str, sections: Sequence[tuple[str, str]]) -> ModelCard:
    texts = [f"# {plain(title)}", *(f"## {head}\n\n{text}" if head else text for head, text in sections)]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(texts) + "\n")


def plain(text: Any) -> str:
    """Escapes text from a file so that Markdown shows it as plain text, without links, pictures, code, headings or HTML."""
    line = " ".join("".join(letter for letter in str(text) if letter.isprintable() or letter.isspace()).split())
    return re.sub(r"([\\`\[\]]|^[#+-])", r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def code_span(text: Any) -> str:
    """Returns text from a file as inline code."""
    return f"`{re.sub('[`|<>]', '', ' '.join(str(text).split()))}`"


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    cells = ([str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
