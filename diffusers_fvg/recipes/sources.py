"""Finds what a model name refers to before weights are read: a recipe, a folder or a repository on the Hub."""

from __future__ import annotations

import importlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..loading.reading import read_json
from .table import ANIMATOR_RECIPES, RECIPES, AnimatorRecipe, Recipe, find_recipe


if TYPE_CHECKING:
    from ..pipelines.stages import FactorizedStages

_PIPELINES = {
    "FactorizedVideoPipeline": "pipeline_factorized_video",
    "FactorizedCogVideoXPipeline": "pipeline_factorized_cogvideox",
    "FactorizedDreamerPipeline": "pipeline_factorized_dreamer",
    "FactorizedImageToVideoPipeline": "pipeline_factorized_image_to_video",
}
# Stock pipelines with the same components.
_STOCK = {"WanPipeline": "FactorizedVideoPipeline", "CogVideoXPipeline": "FactorizedCogVideoXPipeline"}
INDEX = "model_index.json"
# Form of a repository name.
NAME = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")
# Name of the embedded model, also in records.
EMBEDDED = "embedded"
# Configuration files, from which models are built without weights.
CONFIGS = {
    INDEX,
    "config.json",
    "scheduler_config.json",
    "animator_config.json",
    "composer_config.json",
    "guider_config.json",
    "judge_config.json",
    "rewriter_config.json",
    "reference.json",
}


@dataclass(frozen=True)
class ModelSource:
    """Source of a model.

    Args:
        name (`str`): name as it was given.
        recipe ([`Recipe`] or [`AnimatorRecipe`], *optional*): recipe of that name.
        folder (`Path`, *optional*): folder of the model or, for a Hub repository, of its configurations; `None` for a recipe.
        index (`dict`): contents of its `model_index.json`.
        repository, commit (`str`, *optional*): repository on the Hub and its commit.
    """

    name: str
    recipe: Recipe | AnimatorRecipe | None = None
    folder: Path | None = None
    index: dict[str, Any] = field(default_factory=dict)
    repository: str | None = None
    commit: str | None = None

    @property
    def pipeline_name(self) -> str:
        """Name of this package's pipeline class that loads the model."""
        if isinstance(self.recipe, AnimatorRecipe):
            return "FactorizedImageToVideoPipeline"
        if self.recipe is not None:
            return (
                "FactorizedVideoPipeline" if self.recipe.facts.prediction == "flow" else "FactorizedCogVideoXPipeline"
            )
        name = str(self.index.get("_class_name"))
        if name not in _PIPELINES and name not in _STOCK:
            from ..animate.families import is_image_to_video

            return "FactorizedImageToVideoPipeline" if is_image_to_video(name) else name
        return _STOCK.get(name, name)

    @property
    def pipeline_class(self) -> type[FactorizedStages]:
        """This package's pipeline class that loads the model."""
        module = importlib.import_module(f"diffusers_fvg.pipelines.{_PIPELINES[self.pipeline_name]}")
        return getattr(module, self.pipeline_name)

    def has(self, part: str) -> bool:
        """Returns whether the model has a component."""
        if self.recipe is not None:
            return part in self.recipe.repositories
        return (self.index.get(part) or [None, None])[1] is not None


def find_source(name: str | os.PathLike, revision: str | None, hub: dict[str, Any]) -> ModelSource:
    """Finds a model by name. It downloads the configurations of a Hub repository, and nothing for a recipe.

    Args:
        name (`str` or `os.PathLike`): a recipe, a folder, `"org/name"`, `"org/name@revision"` or `"embedded"`.
        revision (`str`, *optional*): revision of the repository, or of a recipe's base.
        hub (`dict`): `token`, `cache_dir` and `local_files_only`, as far as they are set.

    Raises:
        `ValueError`: the name is unknown, or this package cannot load the pipeline.
        `OSError`: the repository or the revision does not exist.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise ValueError(
            f"`name` must be a recipe, a folder or a repository, but is a {type(name).__name__}; to convert a pipeline of diffusers, "
            "use `FactorizedVideoPipeline.from_pipe(pipeline)`."
        )
    if str(name) == EMBEDDED and not Path(name).is_dir():
        from ..embedded import EMBEDDED_FOLDER

        if revision is not None:
            raise ValueError(
                f"`revision={revision!r}` is for a Hub repository, but the embedded model has no revisions; leave it out."
            )
        return ModelSource(EMBEDDED, folder=EMBEDDED_FOLDER, index=_index(EMBEDDED_FOLDER, EMBEDDED))
    recipe = find_recipe(name)
    if recipe is not None:
        return ModelSource(str(name), recipe)
    if Path(name).is_dir():
        if revision is not None:
            raise ValueError(
                f"`revision={revision!r}` is for a Hub repository, but {str(name)!r} is a folder; leave it out."
            )
        source = ModelSource(str(name), folder=Path(name), index=_index(Path(name), str(name)))
    else:
        repository, _, own = str(name).partition("@")
        if not NAME.fullmatch(repository):
            raise ValueError(
                f"The model {str(name)!r} is neither an existing folder nor a repository name (`org/name`)."
            )
        if own and revision:
            raise ValueError(
                f"The model {str(name)!r} names a revision, and `revision={revision!r}` another; give one of them."
            )
        folder = fetch_configs(repository, own or revision, "The model", hub)
        source = ModelSource(str(name), None, folder, _index(folder, repository), repository, folder.name)
    _check_class(source)
    return source


def fetch_configs(repository: str, revision: str | None, place: str, hub: dict[str, Any], subfolder: str = "") -> Path:
    """Downloads the configurations of a repository and returns the folder of its snapshot in the cache."""
    from ..loading.files import fetch

    def select(names: list[str]) -> list[str]:
        inside = [name for name in names if name.startswith(f"{subfolder}/" if subfolder else "")]
        # Without configurations, one other file is downloaded, so that the cache keeps the commit.
        return [name for name in inside if PurePosixPath(name).name in CONFIGS] or names[:1]

    return fetch(repository, revision, select, place, **hub)[0]


def _index(folder: Path, name: str) -> dict[str, Any]:
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"The model {name!r} is not a pipeline: it has no {INDEX}. Pass a chat model as `rewriter` and a LoRA as `lora`. The "
            f"recipes are {', '.join(RECIPES | ANIMATOR_RECIPES)}."
        )
    return read_json(folder / INDEX)


def _check_class(source: ModelSource) -> None:
    if source.pipeline_name in _PIPELINES:
        return
    name, known = source.index.get("_class_name"), ", ".join([*_PIPELINES, *_STOCK])
    raise ValueError(
        f"The model {source.name!r} is a {name}; use one of {known}, or an image-to-video pipeline of diffusers. Pass a "
        "text-to-image pipeline as `composer`."
    )
