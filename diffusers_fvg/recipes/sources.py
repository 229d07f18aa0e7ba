"""What a name stands for, found out before weights are read: a recipe, a folder or a repository on the Hub."""

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
# Stock pipelines of the same components.
_STOCK = {"WanPipeline": "FactorizedVideoPipeline", "CogVideoXPipeline": "FactorizedCogVideoXPipeline"}
INDEX = "model_index.json"
# Of a repository on the Hub.
NAME = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")
# What ships with the package, as records call it.
EMBEDDED = "embedded"
# What says how models are made, without their weights.
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
    """A model by name.

    Args:
        name (`str`): as it was given.
        recipe ([`Recipe`] or [`AnimatorRecipe`], *optional*): where it is one.
        folder (`Path`, *optional*): of the model, or of its configurations alone where it is on the Hub; `None` of a recipe.
        index (`dict`): its `model_index.json`.
        repository, commit (`str`, *optional*): on the Hub.
    """

    name: str
    recipe: Recipe | AnimatorRecipe | None = None
    folder: Path | None = None
    index: dict[str, Any] = field(default_factory=dict)
    repository: str | None = None
    commit: str | None = None

    @property
    def pipeline_name(self) -> str:
        """The class of this package that it becomes."""
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
        """The class of this package that it becomes."""
        module = importlib.import_module(f"diffusers_fvg.pipelines.{_PIPELINES[self.pipeline_name]}")
        return getattr(module, self.pipeline_name)

    def has(self, part: str) -> bool:
        """Whether the model brings a component."""
        if self.recipe is not None:
            return part in self.recipe.repositories
        return (self.index.get(part) or [None, None])[1] is not None


def find_source(name: str | os.PathLike, revision: str | None, hub: dict[str, Any]) -> ModelSource:
    """Finds a model by name. Of a repository on the Hub its small configurations are fetched, of a recipe nothing.

    Args:
        name (`str` or `os.PathLike`): a recipe, a folder, `"org/name"`, `"org/name@revision"` or `"embedded"`.
        revision (`str`, *optional*): of the repository; of a recipe's base.
        hub (`dict`): `token`, `cache_dir` and `local_files_only`, where they are set.

    Raises:
        `ValueError`: an unknown name, or a pipeline that does not become one of this package.
        `OSError`: a repository or revision that is not there.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise ValueError(
            f"`name` must be a recipe, a folder or a repository, but is a {type(name).__name__}; a pipeline of diffusers becomes one "
            "of this package by `FactorizedVideoPipeline.from_pipe(pipeline)`."
        )
    if str(name) == EMBEDDED and not Path(name).is_dir():
        from ..embedded import EMBEDDED_FOLDER

        if revision is not None:
            raise ValueError(
                f"The revision {revision!r} is of a repository on the Hub, and the embedded model has none."
            )
        return ModelSource(EMBEDDED, folder=EMBEDDED_FOLDER, index=_index(EMBEDDED_FOLDER, EMBEDDED))
    recipe = find_recipe(name)
    if recipe is not None:
        return ModelSource(str(name), recipe)
    if Path(name).is_dir():
        if revision is not None:
            raise ValueError(
                f"The revision {revision!r} is of a repository on the Hub, and {str(name)!r} is a folder."
            )
        source = ModelSource(str(name), folder=Path(name), index=_index(Path(name), str(name)))
    else:
        repository, _, own = str(name).partition("@")
        if not NAME.fullmatch(repository):
            raise ValueError(f"The model {str(name)!r} is no folder, and no repository's name, which is `org/name`.")
        if own and revision:
            raise ValueError(
                f"The model {str(name)!r} names a revision, and {revision!r} is another; give one of them."
            )
        folder = fetch_configs(repository, own or revision, "The model", hub)
        source = ModelSource(str(name), None, folder, _index(folder, repository), repository, folder.name)
    _check_class(source)
    return source


def fetch_configs(repository: str, revision: str | None, place: str, hub: dict[str, Any], subfolder: str = "") -> Path:
    """The folder of a repository's snapshot, with the configurations alone, or with what else is in the cache."""
    from ..loading.files import fetch

    def select(names: list[str]) -> list[str]:
        inside = [name for name in names if name.startswith(f"{subfolder}/" if subfolder else "")]
        # One of a repository without any keeps the commit in the cache.
        return [name for name in inside if PurePosixPath(name).name in CONFIGS] or names[:1]

    return fetch(repository, revision, select, place, **hub)[0]


def _index(folder: Path, name: str) -> dict[str, Any]:
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"The model {name!r} is no pipeline: it has no {INDEX}. A chat model is for `rewriter`, a LoRA for `lora`; recipes are "
            f"{', '.join(RECIPES | ANIMATOR_RECIPES)}."
        )
    return read_json(folder / INDEX)


def _check_class(source: ModelSource) -> None:
    if source.pipeline_name in _PIPELINES:
        return
    name, known = source.index.get("_class_name"), ", ".join([*_PIPELINES, *_STOCK])
    raise ValueError(
        f"The model {source.name!r} is a {name}, and none of {known}, or an image-to-video pipeline of diffusers; a "
        "text-to-image pipeline is for `composer`."
    )
