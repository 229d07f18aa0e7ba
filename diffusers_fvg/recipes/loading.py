"""Loads a model by name: [`load`] loads the whole pipeline, [`load_part`] the model of one stage."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..atomic import temporary_folder
from .sources import EMBEDDED, NAME, ModelSource, find_source
from .table import AnimatorRecipe, Recipe


if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, PipelineQuantizationConfig

    from ..compose.composer import AnchorComposer
    from ..compose.judge import Judge
    from ..rewrite.rewriter import FirstFrameRewriter


# The video models of these pipelines keep a first frame without an anchor LoRA.
NO_ANCHOR_LORA = ("FactorizedDreamerPipeline", "FactorizedImageToVideoPipeline")


def load(
    name: str | os.PathLike,
    *,
    dtype: torch.dtype | str | None = None,
    composer: str | os.PathLike | AnchorComposer | Literal[False] | None = None,
    rewriter: str | os.PathLike | FirstFrameRewriter | Literal[False] | None = None,
    lora: str | os.PathLike | Literal[False] | None = None,
    revision: str | None = None,
    variant: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    quantization_config: PipelineQuantizationConfig | None = None,
) -> DiffusionPipeline:
    """Loads a model by the name of a recipe, a folder or a Hub repository; an existing folder takes precedence.

    Names of components are folders, `"org/name"` or `"org/name@revision"`. This function loads all pipelines of this package, bundled or
    light; a stock `WanPipeline` or `CogVideoXPipeline`, which is converted to the pipeline of this package with its own scheduler;
    and image-to-video pipelines of diffusers, each of which becomes the animator of a [`FactorizedImageToVideoPipeline`].

    Args:
        name (`str` or `os.PathLike`): one of [`RECIPES`] or [`ANIMATOR_RECIPES`], a folder, a repository, or `"embedded"` for the
            embedded model of this package.
        dtype (`torch.dtype` or its name, *optional*): dtype of every stage; defaults to bfloat16, for the embedded model to float32.
        composer (`str` or [`AnchorComposer`], *optional*): text-to-image pipeline instead of the model's own; `False` loads none,
            and no judge of its pictures.
        rewriter (`str` or [`FirstFrameRewriter`], *optional*): chat model, rewriter's folder or rewriter instead of the model's
            own; `False` loads none.
        lora (`str`, *optional*): anchor LoRA of any known format instead of the model's own; `False` loads none, which is enough
            for `mode="direct"`.
        revision (`str`, *optional*): revision of the repository, or of a recipe's base.
        variant (`str`, *optional*): variant of the weight files, such as `"fp16"`; components without it load their plain files.
        token, cache_dir, local_files_only (*optional*): arguments for the Hub.
        quantization_config (`PipelineQuantizationConfig`, *optional*): diffusers' quantization of components by their names.

    Returns:
        The pipeline, on the CPU.

    Raises:
        `ValueError`: the name is unknown, the pipeline is of another kind, or a recipe needs an anchor LoRA and has none. Nothing
            has been downloaded then.
        `OSError`: a component does not exist.
    """
    import torch

    from ..checks import as_dtype
    from ..embedded import check_world

    hub = hub_options(token, cache_dir, local_files_only)
    source = find_source(name, revision, hub)
    is_embedded = source.name == EMBEDDED
    dtype = as_dtype(dtype, torch.float32 if is_embedded else torch.bfloat16)
    options = _given(variant=variant, quantization_config=quantization_config)
    if source.recipe is None:
        pipe = _load_source(source, dtype, composer, rewriter, lora, hub, options)
        if is_embedded:
            pipe.prompt_check = check_world
            pipe.register_to_config(_name_or_path=EMBEDDED)
        return pipe
    check_lora(source, lora)
    if isinstance(source.recipe, AnimatorRecipe):
        return _load_animator_recipe(source.recipe, dtype, composer, rewriter, revision, hub, options)
    return _load_recipe(source.recipe, dtype, composer, rewriter, lora, revision, hub, options)


def hub_options(
    token: str | bool | None = None, cache_dir: str | os.PathLike | None = None, local_files_only: bool = False
) -> dict[str, Any]:
    """Returns the arguments for the Hub that are set."""
    return _given(token=token, cache_dir=cache_dir, local_files_only=local_files_only or None)


def check_lora(source: ModelSource, lora: str | os.PathLike | Literal[False] | None) -> None:
    """Checks that an anchor LoRA is given if the model needs one, and not given if the model takes none.

    Raises:
        `ValueError`: names the fix.
    """
    if source.pipeline_name in NO_ANCHOR_LORA and lora:
        raise ValueError(
            f"The model {source.name!r} is loaded as a {source.pipeline_name}, which takes no anchor LoRA; leave it out."
        )
    recipe = source.recipe
    if (
        recipe is None
        or isinstance(recipe, AnimatorRecipe)
        or lora is not None
        or recipe.lora is not None
        or recipe.keeps_first_frame
    ):
        return
    raise ValueError(
        f"{recipe.name} needs an anchor LoRA, and none is published: {recipe.facts.name} was not trained to keep a first frame. "
        f"`fvg train --recipe {recipe.name}` prints a config that trains one; give it as `lora=` or --lora. To make a video without "
        'one, use `lora=False` and `mode="direct"`, or --mode direct.'
    )


def _load_source(
    source: ModelSource,
    dtype: torch.dtype,
    composer: Any,
    rewriter: Any,
    lora: Any,
    hub: dict[str, Any],
    options: dict,
) -> DiffusionPipeline:
    """Loads a folder or a repository."""
    from ..loading.files import naming_repository

    check_lora(source, lora)
    _check_base(source)
    parts = _parts(composer, rewriter, dtype, hub, options.get("variant"))
    if composer is False and source.has("anchor_judge"):
        parts["anchor_judge"] = None
    if lora is not None and source.pipeline_name not in NO_ANCHOR_LORA:
        parts["anchor_lora"] = _anchor_lora(source, lora, hub) if lora else None
    arguments = {"dtype": dtype, **_given(revision=source.commit), **hub, **options, **parts}
    if source.repository is None:
        return source.pipeline_class.from_pretrained(str(source.folder), **arguments)
    with naming_repository(source.repository, source.commit, "The model"):
        pipe = source.pipeline_class.from_pretrained(source.repository, **arguments)
    pipe.origin = {"kind": "hub", "repository": source.repository, "revision": source.commit}
    return pipe


def _check_base(source: ModelSource) -> None:
    """Checks from the configurations, before weights are read, that VAE and text encoder fit the video model."""
    from ..publishing.assembly import FAMILIES

    anchored = FAMILIES.get((source.index.get("transformer") or [None, None])[1])
    if anchored is None or source.pipeline_name in NO_ANCHOR_LORA:
        # The model of a stock image-to-video pipeline may have more inputs than latents and a text.
        return
    assert source.folder is not None
    configs = {}
    for name in ("transformer", "vae", "text_encoder"):
        path = source.folder / name / "config.json"
        configs[name] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    vae, text_width = configs["vae"], configs["text_encoder"].get("d_model")
    channels = vae.get("z_dim", vae.get("latent_channels"))
    name = f"`transformer` of {source.name}"
    if configs["transformer"]:
        anchored[0].check_text_to_video(configs["transformer"], name, channels, text_width)


def _anchor_lora(source: ModelSource, lora: str | os.PathLike, hub: dict[str, Any]) -> Any:
    """Returns the LoRA as a component; it is read and compared with the base before the base's weights are read."""
    from ..lora.anchor_lora import AnchorLora
    from ..publishing.assembly import assemble

    lora, base = pinned(lora, "The anchor LoRA", hub), str(source.folder)
    if source.repository is not None:
        base = f"{source.repository}@{source.commit}"
    with temporary_folder() as folder:
        assembly = assemble(Path(folder, "out"), base, lora=lora, dry_run=True, **hub)
        part = next(part for part in assembly.parts if part.name == "anchor_lora")
        part.write(Path(folder))
        made = AnchorLora.from_pretrained(folder)
    if part.source.folder is None:
        made.reference = {"repository": part.source.name, "revision": part.source.revision}
    return made


def _load_recipe(
    recipe: Recipe,
    dtype: torch.dtype,
    composer: Any,
    rewriter: Any,
    lora: Any,
    revision: str | None,
    hub: dict[str, Any],
    options: dict[str, Any],
) -> DiffusionPipeline:
    from diffusers import DiffusionPipeline

    from ..publishing.assembly import assemble

    lora, variant = recipe.lora if lora is None else lora or None, options.get("variant")
    if lora is not None:
        lora = pinned(lora, "The anchor LoRA", hub)
    # All repositories are looked up, and the LoRA is compared with the base, before weights are downloaded.
    names = {"composer": composer, "rewriter": rewriter}
    for part, value in names.items():
        if value is None:
            names[part] = pinned(recipe.repositories[part], f"The {part} of {recipe.name}", hub, folders=False)
    base = recipe.facts.repository + (f"@{revision}" if revision else "")
    base = pinned(base, f"The base of {recipe.name}", hub, folders=False)
    with temporary_folder() as folder:
        assembly = assemble(folder, base, lora=lora, variant=variant, **hub)
        parts = _parts(names["composer"], names["rewriter"], dtype, hub, variant)
        if _is_own(composer, recipe):
            parts["composer"].call_defaults = dict(recipe.composer.call_defaults)
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype, **hub, **options, **parts)
    for made in assembly.parts:
        if made.name == "anchor_lora" and made.source.folder is None:
            pipe.anchor_lora.reference = {"repository": made.source.name, "revision": made.source.revision}
    # The name of the temporary folder means nothing to the user.
    pipe.register_to_config(_name_or_path=recipe.name)
    pipe.origin = {"kind": "recipe"}
    return pipe


def _load_animator_recipe(
    recipe: AnimatorRecipe,
    dtype: torch.dtype,
    composer: Any,
    rewriter: Any,
    revision: str | None,
    hub: dict[str, Any],
    options: dict[str, Any],
) -> DiffusionPipeline:
    from ..animate.animator import AnchorAnimator
    from ..pipelines.pipeline_factorized_image_to_video import FactorizedImageToVideoPipeline

    # All repositories are looked up before weights are downloaded.
    names = {"composer": composer, "rewriter": rewriter}
    for part, value in names.items():
        if value is None:
            names[part] = pinned(recipe.repositories[part], f"The {part} of {recipe.name}", hub, folders=False)
    base = recipe.animator.repository + (f"@{revision}" if revision else "")
    place, _, commit = pinned(base, f"The animator of {recipe.name}", hub, folders=False).partition("@")
    parts = _parts(names["composer"], names["rewriter"], dtype, hub, options.get("variant"))
    if _is_own(composer, recipe):
        parts["composer"].call_defaults = dict(recipe.composer.call_defaults)
    animator = AnchorAnimator.from_pretrained(place, dtype=dtype, revision=commit, **hub, **options)
    animator.call_defaults = dict(recipe.animator.call_defaults)
    pipe = FactorizedImageToVideoPipeline(animator=animator, **parts)
    pipe.register_to_config(_name_or_path=recipe.name)
    pipe.origin = {"kind": "recipe"}
    return pipe


def load_part(
    part: str,
    name: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    own: str | os.PathLike | FirstFrameRewriter | AnchorComposer | None = None,
    revision: str | None = None,
    variant: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> FirstFrameRewriter | AnchorComposer | Judge:
    """Loads the rewriter, composer or judge of a model alone, without downloading the other components.

    Args:
        part (`str`): `"rewriter"`, `"composer"` or `"anchor_judge"`.
        name, dtype, revision, variant, token, cache_dir, local_files_only: as in [`load`].
        own (*optional*): replacement for the model's own component, as in [`load`].

    Raises:
        `ValueError`: the name is unknown, or the model has no such component.
        `OSError`: the component does not exist.
    """
    import torch

    import diffusers_fvg

    from ..checks import as_dtype
    from ..loading.files import fetch

    hub = hub_options(token, cache_dir, local_files_only)
    source = find_source(name, revision, hub)
    dtype = as_dtype(dtype, torch.float32 if source.name == EMBEDDED else torch.bfloat16)
    if own is None and not source.has(part):
        raise ValueError(f"The model {source.name!r} has no {part}; name one with `{part}=` or --{part}.")
    if own is None and source.recipe is not None:
        own = pinned(source.recipe.repositories[part], f"The {part} of {source.name}", hub, folders=False)
        made = _parts(own if part == "composer" else False, own if part == "rewriter" else False, dtype, hub, variant)[
            part
        ]
        if part == "composer":
            made.call_defaults = dict(source.recipe.composer.call_defaults)
        return made
    if own is None:
        folder = source.folder
        if source.repository is not None:

            def select(names: list[str]) -> list[str]:
                return [name for name in names if name.startswith(f"{part}/") and name.endswith(_LOADED)]

            folder = fetch(source.repository, source.commit, select, f"The {part} of {name}", **hub)[0]
        assert folder is not None
        own = folder / part
    if part == "anchor_judge":
        return getattr(diffusers_fvg, source.index[part][1]).from_pretrained(own, torch_dtype=dtype, **hub)
    return _parts(own if part == "composer" else False, own if part == "rewriter" else False, dtype, hub, variant)[
        part
    ]


# Suffixes of the files of a component that are read.
_LOADED = (".safetensors", ".json", ".txt", ".model", ".jinja")


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _parts(
    composer: Any, rewriter: Any, dtype: torch.dtype, hub: dict[str, Any], variant: str | None
) -> dict[str, Any]:
    """Returns replacements for the repository's own components, loaded from their names; `None` for a component to leave out."""
    from ..compose.composer import AnchorComposer
    from ..pipelines.parts import as_composer, as_rewriter
    from ..rewrite.rewriter import FirstFrameRewriter

    parts = _given(rewriter=rewriter, composer=composer)
    kinds: dict[str, Any] = {"rewriter": FirstFrameRewriter, "composer": AnchorComposer}
    for part, kind in kinds.items():
        if parts.get(part) is False:
            parts[part] = None
        elif part in parts and not isinstance(parts[part], (str, os.PathLike)):
            parts[part] = (as_composer if part == "composer" else as_rewriter)(parts[part])
        elif part in parts:
            place, revision = pinned(parts[part], f"The {part}", hub), None
            if not Path(place).is_dir():
                place, _, revision = place.partition("@")
            options = _given(revision=revision, variant=variant if part == "composer" else None)
            parts[part] = kind.from_pretrained(place, dtype=dtype, **options, **hub)
    return parts


def _is_own(composer: Any, recipe: Recipe | AnimatorRecipe) -> bool:
    """Returns whether the composer is the recipe's own, at any commit; it then gets the recipe's call defaults."""
    if composer is None:
        return True
    name = composer if isinstance(composer, str) and not Path(composer).exists() else ""
    return name.partition("@")[0] == recipe.composer.repository


def pinned(name: str | os.PathLike, place: str, hub: dict[str, Any], folders: bool = True) -> str:
    """Returns a local path unchanged, and a repository with the commit of its branch, which the cache keeps for offline use."""
    from ..loading.files import COMMIT, fetch

    name = str(name)
    repository, _, revision = name.partition("@")
    if folders and Path(name).exists() or COMMIT.fullmatch(revision):
        return name
    if folders and name.startswith(("/", "./", "../", "~")):
        raise OSError(f"{place}: {name!r} does not exist on this machine.")
    # "org/name/file.safetensors" is one of a repository's files.
    owner, _, rest = repository.partition("/")
    repository, _, file = rest.partition("/")
    repository = f"{owner}/{repository}"
    if not NAME.fullmatch(repository):
        raise OSError(f"{place}: {name!r} does not exist on this machine, and is not a repository name (`org/name`).")
    # Downloading a small file makes the cache keep the commit; the components download the other files when they load.
    small = {"README.md", "model_index.json", "config.json"}

    def select(names: list[str]) -> list[str]:
        return [file] if file else [name for name in names if name in small] or names[:1]

    folder, _ = fetch(repository, revision or None, select, place, **hub)
    return f"{repository}/{file}@{folder.name}" if file else f"{repository}@{folder.name}"
