"""The cards in this folder, rendered from the table of facts and from the results in `examples/`.

`python model_cards/render.py [FOLDER]` writes all of them again, here when no folder is named.
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
# Of this package and of all that it ships.
PACKAGE_LICENSE = License("apache-2.0")

# Stages 1 and 2 of a card without weights: whoever assembles a repository chooses them.
CHOSEN = License("other", "its own")
CHOSEN_PARTS = [
    Part("rewriter", "any chat model or endpoint, named when a repository is assembled", CHOSEN),
    Part("composer", "any text-to-image pipeline of diffusers, named when a repository is assembled", CHOSEN),
]


def render(name: str) -> ModelCard:
    """A card of this folder.

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


def _shapes_card() -> ModelCard:
    from diffusers_fvg.embedded import EMBEDDED_FOLDER

    report = shapes_report(EXAMPLES / "results" / "shapes")
    rows = [(arm, f"{seconds:.2f}") for arm, seconds in report.seconds.items()]
    training = "`fvg shapes train` trains all parts, on scenes whose prompts are none of those that are scored."
    if report.training:
        training += f"\n\n{training_parts_table(report.training)}\n\n"
    return pipeline_card(
        EMBEDDED_FOLDER,
        "Shapes",
        "A red circle moves to the right",
        "import diffusers_fvg\n\npipe = diffusers_fvg.load_embedded()",
        folder_parts(EMBEDDED_FOLDER, PACKAGE_LICENSE),
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


if __name__ == "__main__":
    for written in write_cards(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE):
        print(written)
