"""Every change that importing this package makes to diffusers, and to what it is confined.

`DiffusionPipeline.from_pretrained` is called on the base class, so nothing that a class of ours overrides is asked before
its components are loaded. Each function here says what diffusers does (versions 0.40 to 0.42.1, if no other is named) and
acts only for a pipeline class of this package or a repository that names a class of this package;
`tests/loading/test_stock_pipelines.py` compares what stock pipelines read, write, fetch and say with and without it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from ..atomic import check_finished
from .arguments import call_argument, find_out, remember
from .reading import read_json
from .safety import PICKLES, is_guarded, load_guarded


PACKAGE = "diffusers_fvg"
# What a `model_index.json` may name: as a component that is neither a `ModelMixin` nor a pipeline, and otherwise.
COMPONENTS = (
    "AnchorAnimator",
    "AnchorComposer",
    "AnchorJudge",
    "AnchorLora",
    "FirstFrameRewriter",
    "HubReference",
    "SchedulerPresets",
)
CLASSES = (
    "AnchorConditionedCogVideoXTransformer3D",
    "AnchorConditionedSkyReelsV2Transformer3D",
    "AnchorConditionedTransformer3D",
    "FactorizedCogVideoXPipeline",
    "FactorizedDreamerPipeline",
    "FactorizedDreamerUNet",
    "FactorizedImageToVideoPipeline",
    "FactorizedVideoBlocks",
    "FactorizedVideoModularPipeline",
    "FactorizedVideoPipeline",
    "ShapesJudge",
    *COMPONENTS,
)
SAVE_AND_LOAD = ["save_pretrained", "from_pretrained"]


class _ByName(type):
    def __subclasscheck__(cls, other: type) -> bool:
        return any(base.__module__.split(".")[0] == PACKAGE and base.__name__ in COMPONENTS for base in other.__mro__)


class FactorizedVideoComponent(metaclass=_ByName):
    """The base of the classes in `COMPONENTS`, known by name: without importing the modules that define them."""


class NotOnnx:
    """False, and no other False: `_is_onnx` is all of a pipeline's class that `_get_ignore_patterns` is told."""

    def __bool__(self) -> bool:
        return False


NOT_ONNX = NotOnnx()


@functools.cache
def patch() -> None:
    """Makes all changes, once."""
    from diffusers import DiffusionPipeline
    from diffusers.pipelines import pipeline_loading_utils, pipeline_utils

    add_names()
    add_saving(pipeline_loading_utils.LOADABLE_CLASSES)
    DiffusionPipeline.from_pretrained = classmethod(keep_arguments(DiffusionPipeline.from_pretrained.__func__))
    _wrap("_get_custom_components_and_folders", note_references, pipeline_utils)
    _wrap("_get_ignore_patterns", choose_files, pipeline_utils)
    _wrap("_identify_model_variants", find_variants, pipeline_utils)
    _wrap("_get_pipeline_class", refuse_code, pipeline_utils)
    _wrap("_update_init_kwargs_with_connected_pipeline", refuse_connected, pipeline_utils)
    _wrap("load_sub_model", load_component, pipeline_utils)
    _wrap("maybe_raise_or_warn", check_passed, pipeline_utils, pipeline_loading_utils)


def _wrap(name: str, wrapper: Callable, *modules: Any) -> None:
    for module in modules:
        function = getattr(module, name)
        setattr(module, name, functools.wraps(function)(wrapper(function)))


def names_ours(index: dict[str, Any]) -> bool:
    """Whether a `model_index.json` names a class of this package."""
    parts = (tuple(value) for value in index.values() if isinstance(value, list | tuple))
    return index.get("_class_name") in CLASSES or any(part in _OWN_PARTS for part in parts)


_OWN_PARTS = {("diffusers", name) for name in CLASSES}


# -- names ------------------------------------------------------------------------------------------------------------


def add_names() -> None:
    """Makes our classes attributes of `diffusers`, looked up when asked for.

    diffusers looks the class of a pipeline, and of a component of the library "diffusers", up in its own module (since
    0.1). The classes of another library must come along as code in a repository on the Hub (since 0.22, pull request 5472;
    issue 6563 is open, pull request 5728 was declined), and that library is no longer imported (since 0.42.1, no thread
    found). This is Python's own hook for attributes that a module lacks, and knows no name but ours.
    """
    import diffusers

    ours = importlib.import_module(PACKAGE)

    def __getattr__(name: str) -> Any:
        if name == FactorizedVideoComponent.__name__:
            return FactorizedVideoComponent
        if name not in CLASSES:
            raise AttributeError(f"module 'diffusers' has no attribute {name}")
        if name == "FactorizedVideoPipeline" and "diffusers.pipelines.auto_pipeline" in sys.modules:
            # `ModularPipeline.from_pretrained` looks it up in tables, which this module has entered: see `add_modular`.
            importlib.import_module(f"{PACKAGE}.pipelines.modular")
        return getattr(ours, name)

    diffusers.__getattr__ = __getattr__


def add_saving(loadable: dict[str, dict[str, list[str]]]) -> None:
    """Lets `save_pretrained`, of pipelines and of modular pipelines, save our components.

    It looks for a base class of each component in this table (since 0.1; no thread found on adding to it), and leaves a
    component without one out. The last entry for diffusers: of a stock class it is asked after diffusers' own, and says no.
    """
    loadable["diffusers"][FactorizedVideoComponent.__name__] = SAVE_AND_LOAD


def add_modular(model_name: str, pipeline_class: type, modular_class: type) -> None:
    """Lets `ModularPipeline.from_pretrained` open the repositories of a pipeline of ours.

    It goes from the class in `model_index.json` to a model's name and on to a modular pipeline, through these two tables
    (no thread found on adding to them). Our class is an entry of its own in both.
    """
    from diffusers.modular_pipelines.modular_pipeline import MODULAR_PIPELINE_MAPPING
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2VIDEO_PIPELINES_MAPPING

    AUTO_TEXT2VIDEO_PIPELINES_MAPPING[model_name] = pipeline_class
    MODULAR_PIPELINE_MAPPING[model_name] = lambda config=None: modular_class.__name__


# -- loading ----------------------------------------------------------------------------------------------------------


def keep_arguments(load: Callable) -> Callable:
    """Keeps what `DiffusionPipeline.from_pretrained` was called with while it runs; see `loading/arguments.py`.

    diffusers hands a component its dtype and its quantization and keeps the rest to itself: token, cache and the variant
    of what is behind a reference would be lost (since 0.1; no thread found). What is kept only our components read.

    And a light repository has no files of a variant, those that it names have: diffusers refuses to load it (since 0.31,
    pull request 9253; it warned since 0.19, pull request 4011), so it is loaded again without.
    """

    @functools.wraps(load)
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        check_finished(pretrained_model_name_or_path, cls.config_name)
        with remember(kwargs) as call:
            try:
                return load(cls, pretrained_model_name_or_path, **kwargs)
            except (RecursionError, LookupError, TypeError, AttributeError) as error:
                problem = _index_problem(cls, pretrained_model_name_or_path, kwargs)
                if problem is None:
                    raise
                raise ValueError(problem) from error
            except ValueError as error:
                variant = kwargs.get("variant")
                refused = variant is not None and f"`variant={variant}`" in str(error)
                if not refused or not call.get("has_references"):
                    raise
            return load(cls, pretrained_model_name_or_path, **kwargs | {"variant": None})

    return from_pretrained


def _index_problem(cls: Any, name: str | os.PathLike, kwargs: dict[str, Any]) -> str | None:
    """What is wrong with a `model_index.json` on which diffusers fails; `None` where that is not the cause."""
    path: Path | None = Path(name, cls.config_name)
    if not Path(name, cls.config_name).is_file():
        places = kwargs.get("cache_dir"), kwargs.get("revision")
        found = None if Path(name).is_dir() else try_to_load_from_cache(str(name), cls.config_name, *places)
        path = Path(found) if isinstance(found, str) else None
    if path is None:
        return None
    try:
        index = read_json(path)
    except ValueError as error:
        return str(error)
    return None if index.get("_class_name") else f"{str(path)!r} names no pipeline's class in `_class_name`."


def note_references(components: Callable) -> Callable:
    """Finds out whether a repository on the Hub is a light one, while the loader chooses its files; changes nothing."""

    def _get_custom_components_and_folders(pretrained_model_name, config_dict, *args, **kwargs):
        find_out("has_references", _has_references(config_dict))
        return components(pretrained_model_name, config_dict, *args, **kwargs)

    return _get_custom_components_and_folders


def _has_references(index: dict[str, Any]) -> bool:
    return ["diffusers", "HubReference"] in [
        list(value) for value in index.values() if isinstance(value, list | tuple)
    ]


def choose_files(ignored: Callable) -> Callable:
    """Fetches, of a repository of our pipelines, safetensors files and no pickles, and nothing of what is passed.

    diffusers fetches pickles in place of all safetensors files where one folder of a component has none of a model's name,
    or no component has a folder with weights, as in a light repository (since 0.31, pull requests 8991 and 9741). Of a
    component that is passed it leaves the files in its folder behind, but fetches those in folders within it, which are a
    composer's models (since 0.15, pull request 2980; no thread found on this).
    """
    signature = inspect.signature(ignored)

    def _get_ignore_patterns(*args, **kwargs):
        call = signature.bind(*args, **kwargs).arguments
        if call["is_onnx"] is not NOT_ONNX:
            return ignored(*args, **kwargs)
        others = (*PICKLES, ".msgpack", ".onnx", ".pb")
        return [f"*{suffix}" for suffix in others] + [f"{name}/*" for name in call["passed_components"]]

    return _get_ignore_patterns


def find_variants(identify: Callable) -> Callable:
    """Which components of a repository that names a class of ours have files of a variant.

    diffusers takes every name in a component's folder for that of a file with an ending, and fails on a folder in it
    (`IndexError`, since 0.13, pull request 2305; no thread found): a composer's and a rewriter's folder hold folders.
    """

    def _identify_model_variants(folder: str | os.PathLike, variant: str | None, config: dict) -> dict[str, str]:
        find_out("has_references", _has_references(config))
        if not names_ours(config):
            return identify(folder, variant, config)
        found = {}
        for name in config if variant is not None else ():
            files = [path.name for path in Path(folder, name).glob("*.*") if path.is_file()]
            if any(file.split(".")[1].startswith(variant) for file in files):
                found[name] = variant
        return found

    return _identify_model_variants


def refuse_code(find_class: Callable) -> Callable:
    """Refuses a pipeline class that is code, where a pipeline of ours or one within it is loaded without trusting code.

    diffusers takes `_class_name` in `model_index.json` for the repository's own code, or else for one of its community
    pipelines, which it fetches and runs (since 0.4, pull request 552; no thread found on the latter being named by a file).
    """

    def _get_pipeline_class(class_obj, *args, class_name=None, **kwargs):
        guarded = is_guarded() or getattr(class_obj, "safetensors_only", False)
        if class_name is not None and guarded and not call_argument("trust_remote_code"):
            raise ValueError(
                f"model_index.json names the pipeline class {class_name!r}, which is code; pass `trust_remote_code=True` to run it."
            )
        return find_class(class_obj, *args, class_name=class_name, **kwargs)

    return _get_pipeline_class


def refuse_connected(connect: Callable) -> Callable:
    """Refuses a pipeline within one of ours that has others fetched.

    diffusers fetches the pipelines that a repository's `README.md` names as connected, for `load_connected_pipeline=True` and
    for pipeline classes that ask for it (since 0.20, pull request 4305).
    """

    def _update_init_kwargs_with_connected_pipeline(*args, folder, **kwargs):
        if is_guarded():
            raise ValueError(
                f"{folder} is a pipeline whose README.md names others to fetch; save it with all its parts."
            )
        return connect(*args, folder=folder, **kwargs)

    return _update_init_kwargs_with_connected_pipeline


def load_component(load: Callable) -> Callable:
    """Loads a component of ours, and checks each component of a pipeline whose class has `safetensors_only = True`.

    diffusers calls nothing of a pipeline's class before it loads components, and most of ours are stock classes: what
    loads one component is the only place that knows pipeline class, component and folder. It reads pickles where there are
    no safetensors files, unless told not to (which it hears since 0.31, issue 9576), and follows any file name in an index
    of shards (no thread found).
    """

    def load_sub_model(**arguments: Any):
        names = arguments["library_name"], arguments["class_name"]
        arguments["importable_classes"] = _importable(arguments["importable_classes"], *names)
        if is_guarded() or getattr(arguments["pipeline_class"], "safetensors_only", False):
            return load_guarded(load, arguments)
        return load(**arguments)

    return load_sub_model


def check_passed(check: Callable) -> Callable:
    """Checks a component that is passed in place of one of ours against that very class.

    diffusers compares with the last class of a table that the component in `model_index.json` is of (since 0.2, pull
    request 188; no thread found on adding to it): an entry of ours there would be asked about the components of all
    pipelines. A `HubReference` says itself what may be passed in its place.
    """
    signature = inspect.signature(check)

    def maybe_raise_or_warn(*args, **kwargs):
        call = signature.bind(*args, **kwargs)
        names = call.arguments["library_name"], call.arguments["class_name"]
        if names in _MADE_OF_OTHERS and _makes_one(call.arguments["passed_class_obj"][call.arguments["name"]]):
            return None
        call.arguments["importable_classes"] = _importable(call.arguments["importable_classes"], *names)
        return check(*call.args, **call.kwargs)

    return maybe_raise_or_warn


# What our pipelines make of a pipeline, of a model and its tokenizer, of an endpoint, of a function, or of a name; one judge
# stands for another.
_MADE_OF_OTHERS = {
    ("diffusers", name)
    for name in ("AnchorAnimator", "AnchorComposer", "AnchorJudge", "FirstFrameRewriter", "ShapesJudge")
}


def _makes_one(component: Any) -> bool:
    from diffusers import DiffusionPipeline

    return (
        type(component).__name__ == "ChatEndpoint"
        or inspect.isfunction(component)
        or callable(getattr(component, "judge", None))
        or isinstance(component, (str, os.PathLike, tuple, list, DiffusionPipeline))
    )


def _importable(classes: dict[str, list[str]], library: str, class_name: str) -> dict[str, list[str]]:
    """The loader's table of base classes for one component: for one of ours its own class alone."""
    from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

    if library in LOADABLE_CLASSES:
        return {class_name: SAVE_AND_LOAD} if library == "diffusers" and class_name in COMPONENTS else classes
    component_class = getattr(sys.modules.get(library), class_name, None)
    if isinstance(component_class, type) and issubclass(component_class, FactorizedVideoComponent):
        # Somebody's subclass of one. The loader looks for its base in the module that has it.
        return dict.fromkeys(COMPONENTS, SAVE_AND_LOAD)
    return classes
