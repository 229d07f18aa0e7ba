"""Renders the cards in this folder from the table of model facts and from the results in `examples/`.

`python model_cards/render.py [FOLDER]` writes all of them again, into this folder by default.
"""

from __future__ import annotations

import sys
from pathlib import Path

from huggingface_hub import ModelCard

from diffusers_fvg import __all__ as PUBLIC_NAMES
from diffusers_fvg.models import MODELS, License, ModelFacts, model_presets
from diffusers_fvg.publishing.card_sections import (
    CITATION,
    PROMPT,
    Part,
    card_data,
    facts_table,
    limits_section,
    make_card,
    markdown_table,
    modulation_section,
    parts_table,
    presets_table,
    shapes_report,
    training_parts_table,
)
from diffusers_fvg.publishing.cards import METHOD, TAGS, folder_parts, pipeline_card


HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
CARDS = (
    "shapes",
    "wan2.2-ti2v-5b",
    "wan2.1-t2v-1.3b",
    "wan2.2-t2v-a14b",
    "cogvideox1.5-5b",
    "factorized-dreamer",
)
# Licence of this package and of the weights in it.
PACKAGE_LICENSE = License("apache-2.0")

# Stages 1 and 2 of a card without weights; the user chooses them when assembling a repository.
CHOSEN = License("other", "its own")
CHOSEN_PARTS = [
    Part("rewriter", "any chat model or endpoint, named when a repository is assembled", CHOSEN),
    Part("composer", "any text-to-image pipeline of diffusers, named when a repository is assembled", CHOSEN),
]


def render(name: str) -> ModelCard:
    """Returns a card of this folder.

    Args:
        name (`str`): one of `CARDS`.

    Raises:
        `ValueError`: `name` is unknown.
    """
    if name not in CARDS:
        raise ValueError(f"`name={name!r}` is not a card; use one of {', '.join(CARDS)}.")
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


def _shapes_card() -> ModelCard:
    from diffusers_fvg.embedded import EMBEDDED_FOLDER

    report = shapes_report(EXAMPLES / "results" / "shapes")
    rows = [(arm, f"{seconds:.2f}") for arm, seconds in report.seconds.items()]
    training = "`fvg shapes train` trains all parts on scenes whose prompts are not among the scored ones."
    if report.training:
        training += f"\n\n{training_parts_table(report.training)}\n\n"
    return pipeline_card(
        EMBEDDED_FOLDER,
        "Shapes",
        "A red circle moves to the right",
        "import diffusers_fvg\n\npipe = diffusers_fvg.load_embedded()",
        folder_parts(EMBEDDED_FOLDER, PACKAGE_LICENSE),
        report.scores,
        intro="This small model ships with diffusers_fvg for demonstration and tests. It has the classes of a real pipeline "
        "and was trained from scratch on rendered clips of coloured shapes on a plain background. In the tables below, "
        "`direct` is the video model alone, `direct_rewritten` the video model with prompt and caption, `factorized` all three "
        "stages, and `factorized_judged` all stages and the judge; `true_caption` starts from the true caption, `true_anchor`, "
        "`true_middle` and `true_last` from a rendered frame.",
        training=training,
        hardware=f"The table gives the time of stage 3 per scored video, made in batches. Device: {report.device}.\n\n"
        + markdown_table(("variant of the pipeline", "seconds per video"), rows),
        limits="- The model knows only circles, squares, triangles and the words of its own grammar.",
    )


def _facts_card(facts: ModelFacts) -> ModelCard:
    """Returns the card of a real model with its published facts and this package's settings for it; it has no weights."""
    data = card_data(TAGS, [facts.repository], "adapter", [facts.license], facts.languages, PROMPT)
    parts = [
        *CHOSEN_PARTS,
        Part("text encoder, transformer, VAE", "", facts.license, facts.repository),
        Part("anchor LoRA", "none: this project has not trained one", License("other", "none")),
    ]
    config = EXAMPLES / "training" / f"{facts.name.lower()}.toml"
    training = "There is no training config for this model."
    if config.is_file():
        training = f"The command `fvg train examples/training/{config.name}` was not run. Its config:\n\n"
        training += f"```toml\n{config.read_text(encoding='utf-8')}```"
    hardware = ["Nothing was measured on this model's weights."]
    if facts.name == "Wan2.2-TI2V-5B":
        hardware.append(modulation_section(EXAMPLES / "results" / "modulation.json"))
    if facts.memory:
        hardware.append(f"The model's authors state a GPU memory of {facts.memory} ({facts.sources['memory']}).")
    sections = [
        ("", f"This card describes {facts.name} as stage 3 of Factorized Video Generation ({METHOD})."),
        ("Status", _status(facts.anchored_class, f"{facts.name}'s weights")),
        ("Parts and licences", parts_table(parts)),
        ("The model as published", facts_table(facts)),
        ("Presets", f"The presets of `diffusers_fvg.models.model_presets`:\n\n{presets_table(model_presets(facts))}"),
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
        "In Factorized-Dreamer ([arXiv 2408.10119](https://arxiv.org/abs/2408.10119)), any text-to-image model draws the first "
        "frame. An image UNet with temporal layers, a text-to-image adapter, pixel-aware cross-attention and a T5 encoder for "
        "the description of the motion then animates it."
    )
    parts = [
        *CHOSEN_PARTS,
        Part("image UNet, VAE, text encoder", "any Stable Diffusion repository", CHOSEN),
        Part("video layers", "none: this project has not trained any", License("other", "none")),
        Part("code", "this package", PACKAGE_LICENSE),
    ]
    status = _status("FactorizedDreamerPipeline", "the paper's own weights, which are not published")
    small = (
        "A small model of a world of coloured shapes ships with diffusers_fvg: `diffusers_fvg.load_embedded_dreamer()`. Its "
        "scores, all synthetic, are in `examples/results/dreamer_shapes/dreamer.txt`."
    )
    limits = (
        "- The paper's authors have published neither code nor weights; this project chose what the paper leaves open."
    )
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
    has = "contains" if class_name in PUBLIC_NAMES else "does not contain"
    return (
        "**There are no weights here.** This project has not trained or published weights for this model, and has measured "
        f"nothing on {weights}. This version of diffusers_fvg {has} its class `{class_name}`."
    )


if __name__ == "__main__":
    for written in write_cards(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE):
        print(written)
