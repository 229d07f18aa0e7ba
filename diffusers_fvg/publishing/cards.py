"""Model cards, rendered from data: of a pipeline's folder, of a training run, and those in `model_cards/`. Light to import.

No number is on a card that was not read from a file, from the run's log, or from the table of [`models`]. The committed
cards are written again by `python -m diffusers_fvg.publishing.cards model_cards`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard

from .. import __all__ as PUBLIC_NAMES
from ..models import MODELS, License, ModelFacts, find_model, model_presets
from .card_sections import (
    CITATION,
    PROMPT,
    Part,
    Scores,
    card_data,
    config_block,
    facts_table,
    license_of,
    limits_section,
    lora_use,
    make_card,
    markdown_table,
    modulation_section,
    parts_table,
    presets_table,
    read_json,
    run_summary,
    scores_section,
    shapes_report,
    training_parts_table,
)
from .privacy import hub_name


if TYPE_CHECKING:
    from ..training.config import TrainConfig

# Of a source checkout; the committed cards read it.
EXAMPLES = Path(__file__).parents[1] / "examples"
CARDS = (
    "shapes",
    "wan2.2-ti2v-5b",
    "wan2.1-t2v-1.3b",
    "wan2.2-t2v-a14b",
    "cogvideox1.5-5b",
    "factorized-dreamer",
)
TAGS = ["factorized-video-generation", "first-frame", "anchor"]
METHOD = "[arXiv 2512.16371](https://arxiv.org/abs/2512.16371)"
# Of this package and of all that it ships.
PACKAGE_LICENSE = License("apache-2.0")
# Components of a `model_index.json` that have no weights of their own.
NO_WEIGHTS = {"scheduler", "schedulers", "tokenizer", "tokenizer_2"}

# Stages 1 and 2 of a card without weights: whoever assembles a repository chooses them.
CHOSEN = License("other", "its own")
CHOSEN_PARTS = [
    Part("rewriter", "any chat model or endpoint, named when a repository is assembled", CHOSEN),
    Part("composer", "any text-to-image pipeline of diffusers, named when a repository is assembled", CHOSEN),
]


def repository_card(folder: Path, repository: str | None = None, prompt: str = PROMPT) -> ModelCard:
    """The card of a saved pipeline, bundled or light.

    Args:
        folder (`Path`): with `model_index.json`. Read as well, where they are there: the components' configs, `parts.json`
            (`{part: {"repository", "revision", "license", "bytes"}}`), the presets in `schedulers/`, the training config in the
            anchor LoRA's file, `scores.json` ([`Scores`]).
        repository (`str`, *optional*): name on the Hub, for title and code; the folder's name when left out.
        prompt (`str`, *optional*): example of the card's widget and code.

    Raises:
        `ValueError`: a folder without `model_index.json`, or a `scores.json` of other fields.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} has no model_index.json: pass the folder that a pipeline was saved to.")
    name = repository or folder.resolve().name
    scores_path = folder / "scores.json"
    scores = Scores.load(scores_path) if scores_path.is_file() else None
    load = (
        "import diffusers_fvg\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("{name}", dtype=torch.bfloat16)'
    )
    return _pipeline_card(folder, name, prompt, load, _parts(folder, None), scores)


def training_card(config: TrainConfig, log: Mapping[str, Sequence[Mapping[str, float]]]) -> ModelCard:
    """The card of a finished training run, for the repository that holds `pytorch_lora_weights.safetensors`.

    Args:
        config (`TrainConfig`): of the run.
        log (`Mapping`): for each expert the lines of its `log_<expert>.jsonl`: `step`, `loss`, `gradient_norm`, `seconds`,
            `bytes`.

    Raises:
        `ValueError`: an expert of the config has no records.
    """
    missing = [expert for expert in config.experts if not log.get(expert)]
    if missing:
        raise ValueError(f"`log` has no records of {missing}; the config's experts are {list(config.experts)}.")
    base, dataset = hub_name(config.model), hub_name(config.data)
    facts = find_model(base)
    shown = base or Path(config.model).name
    data = card_data(
        tags=["lora", *TAGS],
        base_models=[base] if base else [],
        relation="adapter",
        licenses=[facts.license if facts else None],
        languages=facts.languages if facts else (),
        prompt=PROMPT,
        datasets=[dataset] if dataset else None,
    )
    rows = [(expert, *run_summary(log[expert])) for expert in config.experts]
    heads = ("expert", "steps", "loss, first tenth", "loss, last tenth", "hours", "most memory")
    memory = (
        "Memory is that of tensors on an accelerator, of the whole process on a CPU, of the first process of several."
    )
    intro = (
        f"A LoRA that teaches {shown} to keep a given clean frame, the anchor, and to animate it: anchor-grounding "
        f"training of Factorized Video Generation ({METHOD}), done with diffusers_fvg."
    )
    sections = [
        ("", intro),
        ("Use", lora_use(shown, config.experts)),
        ("Run", f"{markdown_table(heads, rows)}\n\n{memory}"),
        ("Training config", config_block(asdict(config))),
        ("Scores", "None: training computes no score, and the loss does not tell quality."),
        ("Limits", limits_section(facts, None)),
        ("Citation", CITATION),
    ]
    return make_card(data, f"Anchor LoRA for {shown.split('/')[-1]}", sections)


def render(name: str) -> ModelCard:
    """A card of `model_cards/`, from the files of a source checkout.

    Args:
        name (`str`): of `CARDS`.

    Raises:
        `ValueError`: an unknown name.
    """
    if name not in CARDS:
        raise ValueError(f"Unknown card {name!r}; use one of {', '.join(CARDS)}.")
    if name == "shapes":
        return _shapes_card()
    if name == "factorized-dreamer":
        return _dreamer_card()
    return _facts_card(next(facts for facts in MODELS.values() if facts.name.lower() == name))


def write_cards(folder: Path) -> list[Path]:
    """Writes all of `CARDS` as `folder/<name>.md`."""
    paths = [Path(folder) / f"{name}.md" for name in CARDS]
    for name, path in zip(CARDS, paths):
        render(name).save(path)
    return paths


# -- committed cards --------------------------------------------------------------------------------------------------


def _shapes_card() -> ModelCard:
    from ..embedded import EMBEDDED_FOLDER

    report = shapes_report(EXAMPLES / "results" / "shapes")
    rows = [(arm, f"{seconds:.2f}") for arm, seconds in report.seconds.items()]
    training = "`fvg shapes train` trains all parts, on scenes whose prompts are none of those that are scored."
    if report.training:
        training += f"\n\n{training_parts_table(report.training)}\n\n"
    return _pipeline_card(
        EMBEDDED_FOLDER,
        "Shapes",
        "A red circle moves to the right",
        "import diffusers_fvg\n\npipe = diffusers_fvg.load_embedded()",
        _parts(EMBEDDED_FOLDER, PACKAGE_LICENSE),
        report.scores,
        intro="This one ships with diffusers_fvg: the classes of the real thing at small size, trained from nothing on "
        "rendered clips of coloured shapes on a plain background, for demonstration and for tests.",
        training=training,
        hardware=f"Time of the scored videos, stage 3, in batches; device: {report.device}.\n\n"
        + markdown_table(("arm", "seconds per video"), rows),
        limits="- It knows circles, squares and triangles and the words of its own grammar, nothing else.",
    )


def _facts_card(facts: ModelFacts) -> ModelCard:
    """The card of a real model: what is published of it, and what this package has for it. There are no weights."""
    data = card_data(TAGS, [facts.repository], "adapter", [facts.license], facts.languages, PROMPT)
    parts = [
        *CHOSEN_PARTS,
        Part("text encoder, transformer, VAE", "", facts.license, facts.repository),
        Part("anchor LoRA", "nowhere: this project has not trained one", License("other", "none")),
    ]
    config = EXAMPLES / "training" / f"{facts.name.lower()}.toml"
    training = "There is no training config for this model."
    if config.is_file():
        training = f"`fvg train examples/training/{config.name}` is prepared and was not run:\n\n"
        training += f"```toml\n{config.read_text(encoding='utf-8')}```"
    hardware = ["Nothing was measured on this model's weights."]
    if facts.name == "Wan2.2-TI2V-5B":
        hardware.append(modulation_section(EXAMPLES / "results" / "modulation.json"))
    if facts.memory:
        hardware.append(f"GPU memory as its authors state it: {facts.memory} ({facts.sources['memory']}).")
    sections = [
        ("", f"{facts.name} as stage 3 of Factorized Video Generation ({METHOD})."),
        ("Status", _status(facts.anchored_class, f"{facts.name}'s weights")),
        ("Parts and licences", parts_table(parts)),
        ("The model as published", facts_table(facts)),
        ("Presets", f"Of `diffusers_fvg.models.model_presets`:\n\n{presets_table(model_presets(facts))}"),
        ("Training", training),
        ("Scores", "None."),
        ("Hardware and memory", "\n\n".join(hardware)),
        ("Limits", limits_section(facts, None)),
        ("Citation", CITATION),
    ]
    return make_card(data, f"{facts.name} with an anchor", sections)


def _dreamer_card() -> ModelCard:
    data = card_data(TAGS[:2], [], "", [PACKAGE_LICENSE], ("en",), PROMPT)
    intro = (
        "Factorized-Dreamer ([arXiv 2408.10119](https://arxiv.org/abs/2408.10119)): any text-to-image model draws the first "
        "frame, then an image UNet with temporal layers, a text-to-image adapter, pixel-aware cross-attention and a T5 "
        "encoder of the motion's description animates it."
    )
    parts = [
        *CHOSEN_PARTS,
        Part("image UNet, VAE, text encoder", "any Stable Diffusion repository that is wrapped", CHOSEN),
        Part("video layers", "nowhere: this project has not trained any", License("other", "none")),
        Part("code", "this package", PACKAGE_LICENSE),
    ]
    status = _status("FactorizedDreamerPipeline", "the paper's own weights, which are not published")
    small = (
        "A small one, of the world of coloured shapes, ships with diffusers_fvg: `diffusers_fvg.load_embedded_dreamer()`. Its "
        "scores, all synthetic, are in `examples/results/dreamer_shapes/dreamer.txt`."
    )
    limits = "- The paper's authors have published neither code nor weights: what the paper leaves open is our choice."
    sections = [
        ("", intro),
        ("Status", f"{status}\n\n{small}"),
        ("Parts and licences", parts_table(parts)),
        ("Scores", "None."),
        ("Hardware and memory", "Nothing was measured on this model's weights."),
        ("Limits", f"{limits_section(None, None)}\n{limits}"),
        ("Citation", CITATION),
    ]
    return make_card(data, "Factorized-Dreamer", sections)


def _status(class_name: str, weights: str) -> str:
    has = "has its class" if class_name in PUBLIC_NAMES else "does not have its class yet"
    return (
        "**There are no weights here.** No weights were trained or published by this project for this model, and nothing "
        f"was measured on {weights}. This version of diffusers_fvg {has}, `{class_name}`."
    )


# -- a pipeline's folder ----------------------------------------------------------------------------------------------


def _pipeline_card(
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
    """`load` is code that makes `pipe`; the last four are text for their sections."""
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
    presets = "Those of the package: `pipe.presets`."
    if (folder / "schedulers").is_dir():
        from ..schedules.presets import SchedulerPresets

        presets = presets_table(SchedulerPresets.from_pretrained(folder / "schedulers"))
    stages = (
        "An LLM writes a caption of the first frame, a text-to-image model draws it, a video model animates it: Factorized "
        f"Video Generation ({METHOD}), `{index['_class_name']}`."
    )
    call = f"out = pipe({json.dumps(prompt, ensure_ascii=False)}, generator=torch.Generator().manual_seed(0))"
    lora = f"The anchor LoRA has rank {rank}." if rank else "There is no anchor LoRA."
    config = metadata.get("training_config")
    sections = [
        ("", _joined(" ", stages, intro)),
        (
            "Use",
            f"```python\nimport torch\n{load}\n{call}\nprint(out.first_frame_prompts, out.seeds)\n```",
        ),
        ("Parts and licences", parts_table(parts)),
        ("Presets", presets),
        ("Scores", scores_section(scores) if scores else "None: this repository holds no `scores.json`."),
        (
            "Training",
            _joined("\n\n", _joined(" ", training, lora), config_block(json.loads(config)) if config else ""),
        ),
        ("Hardware and memory", _joined("\n\n", _sizes(parts), hardware)),
        ("Limits", _joined("\n", limits_section(facts, index.get("call_defaults")), limits)),
        ("Citation", CITATION),
    ]
    return make_card(data, title, sections)


def _joined(separator: str, *texts: str) -> str:
    return separator.join(filter(None, texts))


def _sizes(parts: Sequence[Part]) -> str:
    inside, outside = sum(part.bytes for part in parts) / 1e6, sum(part.fetched for part in parts) / 1e6
    fetched = f"Fetched at the first loading: {outside:,.1f} MB." if outside else ""
    return _joined(" ", f"Weights in this repository: {inside:,.1f} MB.", fetched)


def _parts(folder: Path, license_inside: License | None) -> list[Part]:
    """Parts with weights in `folder`, and those that `parts.json` or a component's own config names.

    Args:
        folder (`Path`): of a pipeline.
        license_inside (`License`, *optional*): of weights that come from nowhere else.
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
        repository = hub_name(entry.get("repository", ""))
        facts, license = find_model(repository), license_of(entry.get("license", ""))
        if facts and (license is None or license.id == facts.license.id):
            license = facts.license
        revision = f"revision `{entry['revision']}`" if entry.get("revision") else ""
        origin = _joined(", ", entry.get("origin", ""), revision, "in this repository" if size else "")
        fetched = 0 if size else entry.get("bytes", 0)
        parts.append(Part(name, origin, license if entry else license_inside, repository, size, fetched))
    return parts


def _reference(folder: Path) -> dict[str, str]:
    """What a component's folder names instead of having weights."""
    config: dict[str, Any] = {}
    for name in ("reference.json", "rewriter_config.json", "composer_config.json"):
        if (folder / name).is_file():
            config = read_json(folder / name)
    repository = config.get("repository") or config.get("model")
    return {"repository": repository, "revision": config.get("revision", "")} if repository else {}


def _lora_metadata(folder: Path) -> tuple[dict[str, str], int]:
    """Metadata of the anchor LoRA's file and its largest rank; nothing and 0 where there is no such file."""
    from safetensors import safe_open

    path = folder / "anchor_lora" / "weights" / "pytorch_lora_weights.safetensors"
    if not path.is_file():
        return {}, 0
    with safe_open(path, framework="np") as file:
        downs = [key for key in file.keys() if key.endswith(".lora_A.weight")]  # noqa: SIM118 (no mapping)
        return file.metadata() or {}, max(file.get_slice(key).get_shape()[0] for key in downs)


if __name__ == "__main__":
    for written in write_cards(Path(sys.argv[1])):
        print(written)
