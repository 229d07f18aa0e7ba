"""Real models by one name: a base, a text-to-image pipeline and a chat model that [`load`] puts together. Light to import.

A recipe is data, and each of its parts can be replaced. Its repositories are taken at their branch `main`, whose commit is
looked up once in each [`load`]: all of a repository's files are then of that commit, and [`hub_revisions`] names it.
**No recipe was ever run by this project with its real weights**: only with tiny ones under the same names.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .model_facts import MODELS, ModelFacts


if TYPE_CHECKING:
    import os

    import torch
    from diffusers import DiffusionPipeline

    from .compose.composer import AnchorComposer
    from .rewrite.rewriter import FirstFrameRewriter


@dataclass(frozen=True)
class PartFacts:
    """A text-to-image pipeline or a chat model.

    Args:
        repository (`str`): on the Hub.
        license (`str`): of the weights, as the Hub names it.
        configs (`dict`): class in diffusers or transformers to its arguments, for each model of the part.
        call_defaults (`dict`): of the composer, as its authors call it.
        sources (`dict[str, str]`): where each of these comes from.
    """

    repository: str
    license: str
    configs: dict[str, dict[str, Any]]
    sources: dict[str, str]
    call_defaults: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """Parts that make a pipeline, by name.

    Args:
        name (`str`): without a slash.
        facts ([`ModelFacts`]): of the base.
        composer, rewriter ([`PartFacts`]): of stages 1 and 2.
        training (`dict`): keys of [`~training.config.TrainConfig`] for an anchor LoRA, beside those that the facts give.
        clip_lengths (`tuple[int, ...]`): frames of the clips to train on.
        lora (`str`, *optional*): of a published anchor LoRA; `None` where there is none.
    """

    name: str
    facts: ModelFacts
    composer: PartFacts
    rewriter: PartFacts
    training: dict[str, Any]
    clip_lengths: tuple[int, ...]
    lora: str | None = None

    @property
    def keeps_first_frame(self) -> bool:
        """Whether the base was trained on clean first frames, and so keeps an anchor there without a LoRA."""
        return self.facts.expand_timesteps

    @property
    def repositories(self) -> dict[str, str]:
        """Part to its repository."""
        return {
            "base": self.facts.repository,
            "composer": self.composer.repository,
            "rewriter": self.rewriter.repository,
        }

    @property
    def licenses(self) -> dict[str, str]:
        """Part to its licence."""
        base = self.facts.license
        return {
            "base": base.name or base.id,
            "composer": self.composer.license,
            "rewriter": self.rewriter.license,
        }


QWEN3_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
QWEN3_4B_INSTRUCT = PartFacts(
    repository="Qwen/Qwen3-4B-Instruct-2507",
    license="apache-2.0",
    configs={"Qwen3ForCausalLM": QWEN3_4B},
    sources={
        "repository": "model card; it never thinks aloud",
        "license": "model card",
        "configs": "config.json of the repository",
    },
)
Z_IMAGE_TURBO = PartFacts(
    repository="Tongyi-MAI/Z-Image-Turbo",
    license="apache-2.0",
    # Its VAE is left out, which is small beside the others.
    configs={"ZImageTransformer2DModel": {}, "Qwen3Model": QWEN3_4B},
    # No size: it draws at that of the video.
    call_defaults={"num_inference_steps": 9, "guidance_scale": 0.0},
    sources={
        "repository": "Tongyi-MAI/Z-Image 44314b8, README.md",
        "license": "model card",
        "configs": "huggingface/diffusers 0.42.1: defaults of ZImageTransformer2DModel, whose cap_feat_dim is Qwen3-4B's width; "
        "the documentation has the text encoder at the size of Qwen3-4B",
        "call_defaults": "Tongyi-MAI/Z-Image 44314b8, README.md: 9 steps, guidance 0",
    },
)

# Bytes of weights on disk, where published: for when the Hub does not answer. The 5B's transformer (4,999,787,712 numbers) and
# VAE (704,688,668) are float32, its text encoder (5,680,910,336) is bfloat16: card of
# AbstractFramework/wan2.2-ti2v-5b-diffusers-8bit. Qwen3-4B (4,022,468,096) is bfloat16: its config.json.
STORED = {
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": 4 * (4_999_787_712 + 704_688_668) + 2 * 5_680_910_336,
    "Qwen/Qwen3-4B-Instruct-2507": 2 * 4_022_468_096,
}

# Keys beside those that follow from the facts: those of examples/training, with the reasons there.
_TRAINING = {"anchor_position": "uniform", "batch_size": 1, "learning_rate": 1e-4}

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "wan2.2-5b",
            MODELS["Wan2.2-TI2V-5B"],
            Z_IMAGE_TURBO,
            QWEN3_4B_INSTRUCT,
            _TRAINING | {"rank": 128, "alpha": 64, "gradient_accumulation_steps": 2, "steps": 1500},
            clip_lengths=(121, 81),
        ),
        Recipe(
            "wan2.1-1.3b",
            MODELS["Wan2.1-T2V-1.3B"],
            Z_IMAGE_TURBO,
            QWEN3_4B_INSTRUCT,
            _TRAINING | {"rank": 64, "alpha": 32, "gradient_accumulation_steps": 8, "steps": 2000},
            clip_lengths=(81, 49),
        ),
        Recipe(
            "cogvideox1.5-5b",
            MODELS["CogVideoX1.5-5B"],
            Z_IMAGE_TURBO,
            QWEN3_4B_INSTRUCT,
            _TRAINING
            | {"rank": 128, "alpha": 64, "gradient_accumulation_steps": 2, "steps": 2000}
            | {"targets": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]}
            | {"timestep_density": "uniform", "max_sequence_length": 224},
            clip_lengths=(81, 49),
        ),
    )
}


def find_recipe(name: str | os.PathLike) -> Recipe | None:
    """The recipe of a name; `None` for an existing folder, which comes first, and for what may be a repository.

    Raises:
        `ValueError`: a name without a slash that is neither.
    """
    name = str(name)
    if Path(name).is_dir() or len(Path(name).parts) > 1:
        return None
    if name not in RECIPES:
        raise ValueError(f"{name!r} is no folder and no recipe; recipes are {', '.join(RECIPES)}.")
    return RECIPES[name]


def load(
    name: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    composer: str | os.PathLike | AnchorComposer | None = None,
    rewriter: str | os.PathLike | FirstFrameRewriter | None = None,
    lora: str | os.PathLike | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> DiffusionPipeline:
    """Loads a model by a short name: a recipe. Folders and repositories on the Hub load too; a folder comes first.

    Names of parts are folders, `"org/name"` or `"org/name@revision"`.

    Args:
        name (`str` or `os.PathLike`): one of [`RECIPES`], a folder or a repository.
        dtype (`torch.dtype`, *optional*): of every stage; bfloat16 when left out.
        composer (`str` or [`AnchorComposer`], *optional*): in place of the model's own.
        rewriter (`str` or [`FirstFrameRewriter`], *optional*): in place of the model's own: a chat model, a rewriter's
            folder or a rewriter.
        lora (`str`, *optional*): anchor LoRA for a recipe's base, of any known format.
        revision (`str`, *optional*): of the base, or of the repository.
        token, cache_dir, local_files_only (*optional*): for the Hub.

    Raises:
        `ValueError`: an unknown name, or a recipe that needs an anchor LoRA and gets none: nothing has been downloaded then.
        `OSError`: a part is not there.
    """
    import torch

    recipe, dtype = find_recipe(name), dtype or torch.bfloat16
    hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only or None}
    hub = {key: value for key, value in hub.items() if value is not None}
    if recipe is None:
        if lora is not None:
            raise ValueError(
                f"An anchor LoRA can be given to a recipe ({', '.join(RECIPES)}), and {str(name)!r} is none: "
                "`fvg assemble --lora` puts one into a repository."
            )
        from .pipelines.pipeline_factorized_video import FactorizedVideoPipeline

        parts = _parts(composer, rewriter, dtype, hub)
        return FactorizedVideoPipeline.from_pretrained(name, dtype=dtype, **_given(revision=revision), **hub, **parts)
    _check_lora(recipe, lora)
    return _load_recipe(recipe, dtype, composer, rewriter, lora, revision, hub)


def _check_lora(recipe: Recipe, lora: str | os.PathLike | None) -> None:
    if lora is None and recipe.lora is None and not recipe.keeps_first_frame:
        raise ValueError(
            f"{recipe.name} needs an anchor LoRA, and none is published: {recipe.facts.name} ignores a first frame that it was "
            f"not trained to keep. `fvg train --recipe {recipe.name}` prints what makes one; give it as `lora=` or --lora."
        )


def _load_recipe(
    recipe: Recipe,
    dtype: torch.dtype,
    composer: str | os.PathLike | AnchorComposer | None,
    rewriter: str | os.PathLike | FirstFrameRewriter | None,
    lora: str | os.PathLike | None,
    revision: str | None,
    hub: dict[str, Any],
) -> DiffusionPipeline:
    from diffusers import DiffusionPipeline

    from .publishing.assembly import assemble

    lora = recipe.lora if lora is None else str(lora)
    if lora is not None and not Path(lora).exists():
        lora = _pinned(lora, "The anchor LoRA", hub)
    # All that is on the Hub is looked up, and LoRA and base are checked against each other, before weights are fetched.
    names = {"composer": composer, "rewriter": rewriter}
    for part, value in names.items():
        if value is None:
            names[part] = _pinned(recipe.repositories[part], f"The {part} of {recipe.name}", hub, folders=False)
    base = recipe.facts.repository + (f"@{revision}" if revision else "")
    base = _pinned(base, f"The base of {recipe.name}", hub, folders=False)
    with tempfile.TemporaryDirectory(prefix="fvg-") as folder:
        assembly = assemble(folder, base, lora=lora, **hub)
        parts = _parts(names["composer"], names["rewriter"], dtype, hub)
        if composer is None:
            parts["composer"].call_defaults = dict(recipe.composer.call_defaults)
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype, **hub, **parts)
    for part in assembly.parts:
        if part.name == "anchor_lora" and part.source.folder is None:
            pipe.anchor_lora.reference = {"repository": part.source.name, "revision": part.source.revision}
    return pipe


def hub_revisions(pipe: DiffusionPipeline) -> dict[str, str]:
    """Component to `"org/name@commit"`, for those of a pipeline that came from repositories of their own."""
    found = {}
    for name, component in pipe.components.items():
        reference = getattr(component, "hub_reference", None) or getattr(component, "reference", None) or {}
        repository, revision = reference.get("repository") or reference.get("model"), reference.get("revision")
        if repository is not None:
            found[name] = repository if revision is None else f"{repository}@{revision}"
    return found


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _parts(composer: Any, rewriter: Any, dtype: torch.dtype, hub: dict[str, Any]) -> dict[str, Any]:
    """Components that are to replace the repository's own, loaded where they are names."""
    from .compose.composer import AnchorComposer
    from .rewrite.rewriter import FirstFrameRewriter

    parts = _given(composer=composer, rewriter=rewriter)
    for part, kind in (("rewriter", FirstFrameRewriter), ("composer", AnchorComposer)):
        if part in parts and not isinstance(parts[part], kind):
            place, revision = _pinned(parts[part], f"The {part}", hub), None
            if not Path(place).is_dir():
                place, _, revision = place.partition("@")
            parts[part] = kind.from_pretrained(place, dtype=dtype, **_given(revision=revision), **hub)
    return parts


def _pinned(name: str | os.PathLike, place: str, hub: dict[str, Any], folders: bool = True) -> str:
    """A folder as it is, a repository with the commit of its branch; the cache keeps which that was, for use offline."""
    from .loading.files import COMMIT, fetch

    name = str(name)
    repository, _, revision = name.partition("@")
    if folders and Path(name).is_dir() or COMMIT.fullmatch(revision):
        return name
    # "org/name/file.safetensors" is one of a repository's files.
    owner, _, rest = repository.partition("/")
    repository, _, file = rest.partition("/")
    repository = f"{owner}/{repository}"
    # With a file the cache keeps the commit; the components' own loading fetches the others.
    small = {"README.md", "model_index.json", "config.json"}

    def select(names: list[str]) -> list[str]:
        return [file] if file else [name for name in names if name in small] or names[:1]

    folder, _ = fetch(repository, revision or None, select, place, **hub)
    return f"{repository}/{file}@{folder.name}" if file else f"{repository}@{folder.name}"
