"""Builds a pipeline without weights, to check calls and to plan memory before weights are downloaded.

For a recipe it uses the published facts, without a request to the Hub; for a folder or a repository, the configurations.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin, SchedulerMixin
from transformers import PreTrainedModel

from ..animate.animator import CONFIG_NAME as ANIMATOR_CONFIG
from ..animate.animator import AnchorAnimator
from ..compose.composer import AnchorComposer
from ..compose.judge import CONFIG_NAME as JUDGE_CONFIG
from ..compose.judge import AnchorJudge, model_class, read_judge_config
from ..loading.reading import read_json
from ..loading.references import REFERENCE_NAME, HubReference
from ..pipelines.profiles import base_models, empty_weights
from ..publishing.assembly import FAMILIES
from ..rewrite.rewriter import FirstFrameRewriter
from ..rewrite.rewriter_files import CONFIG_NAME, read_rewriter_config
from ..schedules.presets import SchedulerPresets
from .sources import INDEX, ModelSource, fetch_configs
from .table import AnimatorRecipe, PartFacts, Recipe


if TYPE_CHECKING:
    from ..models import ModelFacts
    from ..pipelines.stages import FactorizedStages


class EmptyComposer(AnchorComposer):
    """Placeholder for a composer, with its models without weights. It checks only numbers and draws nothing."""

    def __init__(self, models: dict[str, torch.nn.Module]):
        torch.nn.Module.__init__(self)
        self.models = torch.nn.ModuleDict(models)
        self.reference = None

    def check_call(
        self, num_prompts: int, num_inference_steps: int | None = None, *arguments: Any, **options: Any
    ) -> None:
        """Checks nothing: the checks that depend on the pipeline run once it is loaded."""


class EmptyRewriter(FirstFrameRewriter):
    """Placeholder for a rewriter, with its model without weights. It writes nothing."""

    def __init__(self, models: dict[str, torch.nn.Module]):
        torch.nn.Module.__init__(self)
        self.models = torch.nn.ModuleDict(models)
        self.model = self.tokenizer = self.endpoint = self.reference = None


class EmptyJudge(AnchorJudge):
    """Placeholder for a judge, with its model without weights. It scores nothing."""

    def __init__(self, model: torch.nn.Module, threshold: float | None):
        torch.nn.Module.__init__(self)
        self.model, self.threshold = model, threshold
        self.processor = self.endpoint = self.function = self.reference = None


class EmptyTokenizer:
    """Placeholder for a tokenizer, with the attribute that the constructors of pipelines read."""

    model_max_length = 512


def outline(
    source: ModelSource,
    dtype: torch.dtype,
    composer: Any = None,
    rewriter: Any = None,
    hub: dict[str, Any] | None = None,
) -> FactorizedStages:
    """Builds the pipeline that [`~recipes.load`] would load, with models on the meta device and without tokenizers and LoRA.

    Args:
        source ([`ModelSource`]): source of the model.
        dtype (`torch.dtype`): dtype of all weights.
        composer, rewriter: as in [`~recipes.load`].
        hub (`dict`, *optional*): arguments for the Hub.

    Raises:
        `ValueError`: a component is unknown or does not fit the others.
        `OSError`: a configuration does not exist.
    """
    hub = hub or {}
    with empty_weights(dtype):
        named: dict[str, Any] = {}
        parts: dict[str, Any]
        for name, value, make in (("composer", composer, _named_composer), ("rewriter", rewriter, _named_rewriter)):
            if value is not None:
                is_name = isinstance(value, (str, os.PathLike))
                named[name] = None if value is False else make(value, hub) if is_name else value
        if composer is False:
            # Without a composer there are no pictures to judge.
            named["anchor_judge"] = None
        if isinstance(source.recipe, AnimatorRecipe):
            # The configurations of an animator are only on the Hub.
            animator = source.recipe.animator
            folder = fetch_configs(animator.repository, None, f"The animator of {source.name}", hub)
            parts = {"animator": _animator(folder, hub), **make_parts(source.recipe)}
            parts["animator"].call_defaults = dict(animator.call_defaults)
        elif source.recipe is not None:
            parts = _recipe_components(source.recipe)
        elif source.pipeline_name == "FactorizedImageToVideoPipeline" and "animator" not in source.index:
            assert source.folder is not None
            parts = {"animator": _animator(source.folder, hub)}
        else:
            assert source.folder is not None
            parts = {
                name: _component(source.folder / name, entry[0], entry[1], hub)
                for name, entry in source.index.items()
                if isinstance(entry, list) and entry[1] is not None and name not in named
            }
        parts |= named
    settings = ("boundary_ratio", "expand_timesteps", "call_defaults")
    facts = getattr(source.recipe, "facts", None)
    index = source.index
    if facts is not None:
        index = {"boundary_ratio": facts.boundary_ratio, "expand_timesteps": facts.expand_timesteps}
    known = source.pipeline_class._get_signature_keys(source.pipeline_class)
    taken = {*known[0], *known[1]}
    values = {name: index[name] for name in settings if name in index} | parts
    with torch.device("cpu"):
        return source.pipeline_class(**{name: value for name, value in values.items() if name in taken})


def _recipe_components(recipe: Recipe) -> dict[str, Any]:
    from ..models import model_presets

    facts: ModelFacts = recipe.facts
    presets = model_presets(facts)
    with torch.device("cpu"):
        scheduler = next(iter(presets.values())).make_scheduler()
    return {
        "tokenizer": EmptyTokenizer(),
        **base_models(facts),
        **make_parts(recipe),
        "schedulers": presets,
        "scheduler": scheduler,
    }


def make_parts(recipe: Recipe | AnimatorRecipe) -> dict[str, torch.nn.Module]:
    """Builds rewriter and composer on the default device from published configurations, without loading weights."""
    return {
        "rewriter": EmptyRewriter(_published_models(recipe.rewriter)),
        "composer": EmptyComposer(_published_models(recipe.composer)),
    }


def make_animator_models(recipe: AnimatorRecipe) -> dict[str, torch.nn.Module]:
    """Builds the animator's models on the default device from published configurations, in the order of running.

    Raises:
        `AttributeError`: the installed diffusers lacks one of the classes.
    """
    return {name: _published_model(kind, config) for name, (kind, config) in recipe.animator.models.items()}


def _published_models(facts: PartFacts) -> dict[str, torch.nn.Module]:
    return {kind: _published_model(kind, config) for kind, config in facts.configs.items()}


def _published_model(kind: str, config: dict[str, Any]) -> torch.nn.Module:
    # Some classes of LTX-2 are in the module of its pipeline.
    places = (place for place in (diffusers, transformers, diffusers.pipelines.ltx2) if hasattr(place, kind))
    made = getattr(next(places, diffusers), kind)
    return made(**config) if issubclass(made, ModelMixin) else made(made.config_class(**config))


def _component(folder: Path, library: str, class_name: str, hub: dict[str, Any]) -> Any:
    """Builds a component from its folder: a model without weights, or a scheduler or presets as they are; `None` for a LoRA."""
    if class_name == HubReference.__name__:
        values = _json(folder / REFERENCE_NAME)
        reference = HubReference(class_name=values.pop("class"), **values).values
        place, subfolder = f"`{folder.name}/{REFERENCE_NAME}`", reference["subfolder"]
        root = fetch_configs(reference["repository"], reference["revision"], place, hub, subfolder)
        return _component(root / subfolder, reference["library"], reference["class"], hub)
    if class_name == "AnchorComposer":
        return _composer(folder, hub)
    if class_name == "FirstFrameRewriter":
        return _rewriter(folder, hub)
    if class_name == "AnchorAnimator":
        return _animator(folder, hub)
    if class_name == "AnchorJudge":
        return _judge(folder, hub)
    if class_name == "SchedulerPresets":
        return SchedulerPresets.from_pretrained(folder)
    if class_name in FAMILIES:
        return FAMILIES[class_name][0].from_config(_json(folder / "config.json"))
    # A model that only one pipeline uses is in the module of that pipeline.
    places = {"diffusers": diffusers, "transformers": transformers}
    found = getattr(places.get(library) or getattr(diffusers.pipelines, library, None), class_name, None)
    if not isinstance(found, type):
        return None
    kind: Any = found
    if issubclass(kind, SchedulerMixin):
        with torch.device("cpu"):
            return kind.from_config(_json(folder / "scheduler_config.json"))
    if issubclass(kind, ConfigMixin) and (folder / str(kind.config_name)).is_file():
        return kind.from_config(_json(folder / kind.config_name))
    if issubclass(kind, ModelMixin):
        return kind.from_config(_json(folder / "config.json"))
    if issubclass(kind, PreTrainedModel):
        return kind(kind.config_class.from_dict(_json(folder / "config.json")))
    return EmptyTokenizer() if "Token" in class_name else None


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise OSError(f"The folder {path.parent.name!r} has no {path.name}.")
    return read_json(path)


def _animator(folder: Path, hub: dict[str, Any]) -> AnchorAnimator:
    """Builds an animator whose pipeline has models without weights, and which checks calls like the loaded one."""
    config = _json(folder / ANIMATOR_CONFIG) if (folder / ANIMATOR_CONFIG).is_file() else {}
    if "repository" in config:
        folder = fetch_configs(config["repository"], config.get("revision"), "The animator", hub)
    index = _json(folder / INDEX)
    kind = getattr(diffusers, str(index.get("_class_name")))
    parts = {
        name: _component(folder / name, entry[0], entry[1], hub) for name, entry in index.items() if _is_part(entry)
    }
    declared = inspect.signature(kind.__init__).parameters
    values = {name: value for name, value in {**index, **parts}.items() if name in declared}
    absent = {name: None for name, known in declared.items() if name != "self" and known.default is known.empty}
    with torch.device("cpu"):
        return AnchorAnimator(kind(**absent | values), config.get("call_defaults"))


def _is_part(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


def _composer(folder: Path, hub: dict[str, Any]) -> EmptyComposer:
    config = _json(folder / "composer_config.json") if (folder / "composer_config.json").is_file() else {}
    if "repository" in config:
        folder = fetch_configs(config["repository"], config.get("revision"), "The composer", hub)
    index = _json(folder / INDEX)
    kind = getattr(diffusers, str(index.get("_class_name")), None)
    if not isinstance(kind, type) or not issubclass(kind, DiffusionPipeline):
        raise ValueError(
            f"The composer is a {index.get('_class_name')}, which is not a pipeline of diffusers; name another."
        )
    models = {
        name: made
        for name, entry in index.items()
        if isinstance(entry, list) and entry[1] is not None
        if isinstance(made := _component(folder / name, entry[0], entry[1], hub), torch.nn.Module)
    }
    return EmptyComposer(models)


def _rewriter(folder: Path, hub: dict[str, Any]) -> EmptyRewriter:
    # This refuses a file that names a server, before anything else is read.
    config = read_rewriter_config(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else {}
    if "gguf_file" in config:
        return EmptyRewriter({})
    if "model" in config:
        folder = fetch_configs(config["model"], config.get("revision"), "The rewriter", hub)
    elif (folder / "model").is_dir():
        folder = folder / "model"
    values = _json(folder / "config.json")
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    return EmptyRewriter(
        {"model": transformers.AutoModelForCausalLM.from_config(config, dtype=torch.get_default_dtype())}
    )


def _judge(folder: Path, hub: dict[str, Any]) -> EmptyJudge:
    # This refuses a file that names a server, before anything else is read.
    config = read_judge_config(folder / JUDGE_CONFIG)
    if "model" in config:
        folder = fetch_configs(config["model"], config.get("revision"), "The judge", hub)
    else:
        folder = folder / "model"
    values = _json(folder / "config.json")
    made = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    return EmptyJudge(model_class(made).from_config(made, dtype=torch.get_default_dtype()), config.get("threshold"))


def _named_composer(name: str | os.PathLike, hub: dict[str, Any]) -> EmptyComposer:
    return _composer(_named(name, "The composer", hub), hub)


def _named_rewriter(name: str | os.PathLike, hub: dict[str, Any]) -> EmptyRewriter:
    return _rewriter(_named(name, "The rewriter", hub), hub)


def _named(name: str | os.PathLike, place: str, hub: dict[str, Any]) -> Path:
    if Path(name).is_dir():
        return Path(name)
    repository, _, revision = str(name).partition("@")
    return fetch_configs(repository, revision or None, place, hub)
