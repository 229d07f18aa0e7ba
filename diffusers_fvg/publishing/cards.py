"""Renders model cards of pipeline folders and of training runs. Imports neither torch nor diffusers.

Every number on a card comes from a file, from the run's log, or from the table of [`model_facts`].
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard

from ..models import License, find_model
from .card_sections import (
    CITATION,
    PROMPT,
    Part,
    Scores,
    card_data,
    code_span,
    config_block,
    license_of,
    limits_section,
    lora_use,
    make_card,
    markdown_table,
    parts_table,
    plain,
    presets_table,
    read_json,
    run_summary,
    scores_section,
)
from .privacy import hub_name


if TYPE_CHECKING:
    from ..training.config import TrainConfig

TAGS = ["factorized-video-generation", "first-frame", "anchor"]
METHOD = "[arXiv 2512.16371](https://arxiv.org/abs/2512.16371)"
# Components of a `model_index.json` that have no weights of their own.
NO_WEIGHTS = {"scheduler", "schedulers", "tokenizer", "tokenizer_2"}


def repository_card(folder: Path, repository: str | None = None, prompt: str = PROMPT) -> ModelCard:
    """Returns the card of a saved pipeline, bundled or light.

    Args:
        folder (`Path`): folder with `model_index.json`. If they exist, it also reads the components' configs, `parts.json`
            (`{part: {"repository", "revision", "license", "bytes"}}`), the presets in `schedulers/`, the training config in the
            anchor LoRA's file, and `scores.json` ([`Scores`]).
        repository (`str`, *optional*): name on the Hub for the title and the code; defaults to the folder's name.
        prompt (`str`, *optional*): example prompt of the card's widget and code.

    Raises:
        `ValueError`: the folder has no `model_index.json`, or its `scores.json` has other fields.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"`folder={str(folder)!r}` has no model_index.json: pass the folder of a saved pipeline.")
    name = repository or folder.resolve().name
    scores_path = folder / "scores.json"
    scores = Scores.load(scores_path) if scores_path.is_file() else None
    load = (
        "import diffusers_fvg\nfrom diffusers import DiffusionPipeline\n\n"
        f"pipe = DiffusionPipeline.from_pretrained({json.dumps(name, ensure_ascii=False)}, dtype=torch.bfloat16)"
    )
    return pipeline_card(folder, name, prompt, load, folder_parts(folder, None), scores)


def training_card(config: TrainConfig, log: Mapping[str, Sequence[Mapping[str, float]]]) -> ModelCard:
    """Returns the card of a finished training run, for the repository with `pytorch_lora_weights.safetensors`.

    Args:
        config (`TrainConfig`): configuration of the run.
        log (`Mapping`): the lines of `log_<expert>.jsonl` for each expert: `step`, `loss`, `gradient_norm`, `seconds`, `bytes`.

    Raises:
        `ValueError`: an expert of the config has no log lines.
    """
    missing = [expert for expert in config.experts if not log.get(expert)]
    if missing:
        raise ValueError(f"`log` has no records of {missing}; the config's experts are {list(config.experts)}.")
    base, datasets = hub_name(config.model), [name for source in config.sources if (name := hub_name(source.path))]
    facts = find_model(base)
    shown = base or Path(config.model).name
    data = card_data(
        tags=["lora", *TAGS],
        base_models=[base] if base else [],
        relation="adapter",
        licenses=[facts.license if facts else None],
        languages=facts.languages if facts else (),
        prompt=PROMPT,
        datasets=datasets or None,
    )
    rows = [(expert, *run_summary(log[expert])) for expert in config.experts]
    heads = ("expert", "steps", "mean loss, first tenth", "mean loss, last tenth", "hours", "peak memory")
    memory = (
        "The memory is that of the tensors on an accelerator, or of the whole process on a CPU. Of several processes, it is "
        "that of the first."
    )
    intro = (
        f"This LoRA trains {shown} to keep a given clean frame, the anchor, and to animate it. It was trained with "
        f"diffusers_fvg, by the anchor-grounding training of Factorized Video Generation ({METHOD})."
    )
    sections = [
        ("", intro),
        ("Use", lora_use(shown, config.experts)),
        ("Run", f"{markdown_table(heads, rows)}\n\n{memory}"),
        ("Training config", config_block(asdict(config))),
        ("Scores", "None. Training computes no score, and the loss does not measure quality."),
        ("Limits", limits_section(facts, None)),
        ("Citation", CITATION),
    ]
    return make_card(data, f"Anchor LoRA for {shown.split('/')[-1]}", sections)


# -- a pipeline's folder ----------------------------------------------------------------------------------------------


def pipeline_card(
    folder: Path,
    title: str,
    prompt: str,
    load: str,
    parts: Sequence[Part],
    scores: Scores | None,
    intro: str = "",
    training: str = "",
    hardware: str = "",
    limits: str = "",
) -> ModelCard:
    """Returns the card of a pipeline's folder; `load` is code that creates `pipe`, and the last four arguments are texts."""
    index = read_json(folder / "model_index.json")
    metadata, rank = _lora_metadata(folder)
    repositories = [part.repository for part in parts if part.repository] or [hub_name(metadata.get("base_model", ""))]
    repositories = list(dict.fromkeys(filter(None, repositories)))
    facts = next((found for name in repositories if (found := find_model(name))), None)
    data = card_data(
        tags=["lora", *TAGS] if rank else TAGS,
        base_models=repositories,
        relation="adapter" if rank else "",
        licenses=[part.license for part in parts],
        languages=facts.languages if facts else (),
        prompt=prompt,
        scores=scores,
        title=title.split("/")[-1],
    )
    presets = "The presets of the package: `pipe.presets`."
    if (folder / "schedulers").is_dir():
        from ..schedules.presets import SchedulerPresets

        presets = presets_table(SchedulerPresets.from_pretrained(folder / "schedulers"))
    stages = (
        "A pipeline for Factorized Video Generation "
        f"({METHOD}), of class {code_span(index.get('_class_name'))}: a language model writes a caption of the first frame, a "
        "text-to-image model draws it, and a video model animates it."
    )
    call = f"out = pipe({json.dumps(prompt, ensure_ascii=False)}, generator=torch.Generator().manual_seed(0))"
    lora = f"The anchor LoRA has rank {rank}." if rank else "There is no anchor LoRA."
    config = _training_config(metadata)
    sections = [
        ("", _joined(" ", stages, intro)),
        (
            "Use",
            f"```python\nimport torch\n{load}\n{call}\nprint(out.first_frame_prompts, out.seeds)\n```",
        ),
        ("Parts and licences", parts_table(parts)),
        ("Presets", presets),
        ("Scores", scores_section(scores) if scores else "None: this repository contains no `scores.json`."),
        (
            "Training",
            _joined("\n\n", _joined(" ", training, lora), config),
        ),
        ("Hardware and memory", _joined("\n\n", _sizes(parts), hardware)),
        ("Limits", _joined("\n", limits_section(facts, index.get("call_defaults")), limits)),
        ("Citation", CITATION),
    ]
    return make_card(data, title, sections)


def _training_config(metadata: Mapping[str, str]) -> str:
    """Returns the training config in an anchor LoRA's metadata as a block for the card, or an empty text."""
    if "training_config" not in metadata:
        return ""
    try:
        return config_block(dict(json.loads(metadata["training_config"])))
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise ValueError(
            f"The `training_config` of the anchor LoRA is not valid ({type(error).__name__}: {error}); remove it from the file."
        ) from error


def _joined(separator: str, *texts: str) -> str:
    return separator.join(filter(None, texts))


def _sizes(parts: Sequence[Part]) -> str:
    inside, outside = sum(part.bytes for part in parts) / 1e6, sum(part.fetched for part in parts) / 1e6
    fetched = f"Downloaded at the first loading: {outside:,.1f} MB." if outside else ""
    return _joined(" ", f"Weights in this repository: {inside:,.1f} MB.", fetched)


def folder_parts(folder: Path, license_inside: License | None) -> list[Part]:
    """Returns the parts with weights in `folder`, and those that `parts.json` or a component's own config names.

    Args:
        folder (`Path`): folder of a pipeline.
        license_inside (`License`, *optional*): licence of weights for which no other origin is recorded.
    """
    index = read_json(folder / "model_index.json")
    recorded = read_json(folder / "parts.json") if (folder / "parts.json").is_file() else {}
    components = [name for name, value in index.items() if isinstance(value, list) and value[:1] != [None]]
    parts = []
    for name in dict.fromkeys([*components, *recorded]):
        size = sum(path.stat().st_size for path in (folder / name).rglob("*.safetensors"))
        entry = _reference(folder / name) | recorded.get(name, {})
        if name in NO_WEIGHTS or not (entry or size):
            continue
        repository = hub_name(str(entry.get("repository", "")))
        facts, license = find_model(repository), license_of(entry.get("license", ""))
        if facts and (license is None or license.id == facts.license.id):
            license = facts.license
        revision = f"revision {code_span(entry['revision'])}" if entry.get("revision") else ""
        origin = _joined(", ", plain(entry.get("origin", "")), revision, "in this repository" if size else "")
        fetched = 0 if size else entry.get("bytes", 0)
        parts.append(Part(name, origin, license if entry else license_inside, repository, size, fetched))
    return parts


def _reference(folder: Path) -> dict[str, str]:
    """Returns the repository and revision that a component's folder refers to, if any."""
    config: dict[str, Any] = {}
    names = (
        "reference.json",
        "rewriter_config.json",
        "composer_config.json",
        "judge_config.json",
        "animator_config.json",
    )
    for name in names:
        if (folder / name).is_file():
            config = read_json(folder / name)
    repository = config.get("repository") or config.get("model")
    return {"repository": repository, "revision": config.get("revision", "")} if repository else {}


def _lora_metadata(folder: Path) -> tuple[dict[str, str], int]:
    """Returns the metadata and the largest rank of the anchor LoRA's file, or an empty dict and 0 without a file."""
    from safetensors import safe_open

    path = folder / "anchor_lora" / "weights" / "pytorch_lora_weights.safetensors"
    if not path.is_file():
        return {}, 0
    with safe_open(path, framework="np") as file:
        downs = [key for key in file.keys() if key.endswith(".lora_A.weight")]  # noqa: SIM118 (no mapping)
        return file.metadata() or {}, max(file.get_slice(key).get_shape()[0] for key in downs)
