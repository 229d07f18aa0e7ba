"""Every change that importing this package makes to diffusers.

`DiffusionPipeline.from_pretrained` is called on the base class, so a pipeline class cannot change how its components are
loaded. Each docstring here says what diffusers does (versions 0.40 to 0.42.1 unless another is named). The changes act only
for pipeline classes of this package and repositories that name a class of this package.
`tests/loading/test_stock_pipelines.py` compares what stock pipelines read, write, fetch and print with and without them.
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
# Classes that `model_index.json` may name: `COMPONENTS` are neither `ModelMixin`s nor pipelines; `CLASSES` are all of them.
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
    """Virtual base class of the classes in `COMPONENTS`. It compares names, so that no module has to be imported."""


class NotOnnx:
    """A distinct false value. `_is_onnx` is the only attribute of a pipeline class that `_get_ignore_patterns` receives."""

    def __bool__(self) -> bool:
        return False


NOT_ONNX = NotOnnx()


@functools.cache
def patch() -> None:
    """Applies all changes, once per process."""
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
    """Returns whether a `model_index.json` names a class of this package."""
    parts = (tuple(value) for value in index.values() if isinstance(value, list | tuple))
    return index.get("_class_name") in CLASSES or any(part in _OWN_PARTS for part in parts)


_OWN_PARTS = {("diffusers", name) for name in CLASSES}


# -- names ------------------------------------------------------------------------------------------------------------


def add_names() -> None:
    """Makes this package's classes attributes of `diffusers`, which are imported on first use.

    diffusers looks up the class of a pipeline, and of a component of the library "diffusers", in its own module (since
    0.1). Classes of another library must be code in the Hub repository (since 0.22, pull request 5472; issue 6563 is open,
    pull request 5728 was declined), and diffusers no longer imports that library (since 0.42.1, no thread found). A module's
    `__getattr__` is Python's hook for missing attributes; this one knows only the names in `CLASSES`.
    """
    import diffusers

    ours = importlib.import_module(PACKAGE)

    def __getattr__(name: str) -> Any:
        if name == FactorizedVideoComponent.__name__:
            return FactorizedVideoComponent
        if name not in CLASSES:
            raise AttributeError(f"module 'diffusers' has no attribute {name}")
        if name == "FactorizedVideoPipeline" and "diffusers.pipelines.auto_pipeline" in sys.modules:
            # `ModularPipeline.from_pretrained` looks the class up in tables; importing this module adds it (`add_modular`).
            importlib.import_module(f"{PACKAGE}.pipelines.modular")
        return getattr(ours, name)

    diffusers.__getattr__ = __getattr__


def add_saving(loadable: dict[str, dict[str, list[str]]]) -> None:
    """Lets `save_pretrained` of pipelines and of modular pipelines save this package's components.

    `save_pretrained` looks for a base class of each component in this table (since 0.1; no thread found on adding to it), and
    omits a component without one. The new entry is the last one for diffusers, so stock classes match diffusers' entries
    first, and they do not match this one.
    """
    loadable["diffusers"][FactorizedVideoComponent.__name__] = SAVE_AND_LOAD


def add_modular(model_name: str, pipeline_class: type, modular_class: type) -> None:
    """Lets `ModularPipeline.from_pretrained` load repositories of one of this package's pipelines.

    Two tables of diffusers map the class in `model_index.json` to a model name, and that name to a modular pipeline (no
    thread found on adding to them). This adds one entry to each.
    """
    from diffusers.modular_pipelines.modular_pipeline import MODULAR_PIPELINE_MAPPING
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2VIDEO_PIPELINES_MAPPING

    AUTO_TEXT2VIDEO_PIPELINES_MAPPING[model_name] = pipeline_class
    MODULAR_PIPELINE_MAPPING[model_name] = lambda config=None: modular_class.__name__


# -- loading ----------------------------------------------------------------------------------------------------------


def keep_arguments(load: Callable) -> Callable:
    """Stores the arguments of `DiffusionPipeline.from_pretrained` while it runs; see `loading/arguments.py`.

    diffusers passes a component only its dtype and its quantization config (since 0.1; no thread found): a referenced
    component would not get the token, the cache folder and the variant. Only this package's components read the stored
    arguments.

    A light repository has no files of a variant itself; the repositories that it refers to do. diffusers refuses to load it
    with `variant` (since 0.31, pull request 9253; it warned since 0.19, pull request 4011), so it is loaded again without.
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


def _index_problem(cls: type[Any], name: str | os.PathLike, kwargs: dict[str, Any]) -> str | None:
    """Returns what is wrong with the `model_index.json` on which diffusers failed; `None` if it is valid."""
    own = Path(name, cls.config_name)
    path: Path | None = own
    if not own.is_file():
        places = kwargs.get("cache_dir"), kwargs.get("revision")
        found = None if Path(name).is_dir() else try_to_load_from_cache(str(name), cls.config_name, *places)
        path = Path(found) if isinstance(found, str) else None
    if path is None:
        return None
    try:
        index = read_json(path)
    except ValueError as error:
        return str(error)
    return None if index.get("_class_name") else f"{str(path)!r} names no pipeline class in `_class_name`."


def note_references(components: Callable) -> Callable:
    """Notes whether a Hub repository is light (has references) while diffusers selects its files; changes nothing."""

    def _get_custom_components_and_folders(pretrained_model_name, config_dict, *args, **kwargs):
        find_out("has_references", _has_references(config_dict))
        return components(pretrained_model_name, config_dict, *args, **kwargs)

    return _get_custom_components_and_folders


def _has_references(index: dict[str, Any]) -> bool:
    return ["diffusers", "HubReference"] in [
        list(value) for value in index.values() if isinstance(value, list | tuple)
    ]


def choose_files(ignored: Callable) -> Callable:
    """Excludes pickles, and components that the caller passes, from the download of this package's pipelines.

    diffusers fetches pickles instead of all safetensors files if a component's folder has no safetensors file with a model's
    name, or if no component has weights, as in a light repository (since 0.31, pull requests 8991 and 9741). For a component
    that the caller passes, it skips the files in its folder but fetches those in subfolders, such as a composer's models
    (since 0.15, pull request 2980; no thread found on this).
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
    """Finds the components that have files of a variant, for repositories that name a class of this package.

    diffusers takes every entry of a component's folder for a file with a suffix, and fails on a subfolder (`IndexError`,
    since 0.13, pull request 2305; no thread found). The folders of composer and rewriter have subfolders.
    """

    def _identify_model_variants(folder: str | os.PathLike, variant: str | None, config: dict) -> dict[str, str]:
        find_out("has_references", _has_references(config))
        if not names_ours(config):
            return identify(folder, variant, config)
        found: dict[str, str] = {}
        if variant is None:
            return found
        for name in config:
            files = [path.name for path in Path(folder, name).glob("*.*") if path.is_file()]
            if any(file.split(".")[1].startswith(variant) for file in files):
                found[name] = variant
        return found

    return _identify_model_variants


def refuse_code(find_class: Callable) -> Callable:
    """Refuses a pipeline class from remote code, in this package's pipelines and their inner pipelines.

    `trust_remote_code=True` allows it. diffusers looks for `_class_name` of `model_index.json` in the code of the repository,
    or else among the community pipelines, which it fetches and runs (since 0.4, pull request 552; no thread found on files
    that name a community pipeline).
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
    """Refuses an inner pipeline whose repository makes diffusers fetch further pipelines.

    diffusers fetches the pipelines that a repository's `README.md` names as connected, for `load_connected_pipeline=True` and
    for pipeline classes with `_load_connected_pipes` (since 0.20, pull request 4305).
    """

    def _update_init_kwargs_with_connected_pipeline(*args, folder, **kwargs):
        if is_guarded():
            raise ValueError(
                f"{folder} is a pipeline whose README.md names other pipelines to fetch; save it with all its components."
            )
        return connect(*args, folder=folder, **kwargs)

    return _update_init_kwargs_with_connected_pipeline


def load_component(load: Callable) -> Callable:
    """Loads this package's components, and checks each component of pipelines with `safetensors_only = True`.

    diffusers calls no method of a pipeline class before it loads components, and most components are stock classes, so
    `load_sub_model` is the only function that knows pipeline class, component and folder. It reads pickles if there are no
    safetensors files, unless `use_safetensors=True` is passed (respected since 0.31, issue 9576), and follows any file name
    in an index of shards (no thread found).
    """

    def load_sub_model(**arguments: Any):
        names = arguments["library_name"], arguments["class_name"]
        arguments["importable_classes"] = _importable(arguments["importable_classes"], *names)
        if is_guarded() or getattr(arguments["pipeline_class"], "safetensors_only", False):
            return load_guarded(load, arguments)
        return load(**arguments)

    return load_sub_model


def check_passed(check: Callable) -> Callable:
    """Checks a component that the caller passes against the class of this package that `model_index.json` names.

    diffusers compares it with the last base class in a table that matches the class in `model_index.json` (since 0.2, pull
    request 188; no thread found on adding to it). An entry of this package in that table would affect all pipelines. For a
    `HubReference`, its `__subclasshook__` decides what may be passed.
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


# Components that this package's pipelines can also make from a pipeline, a model and its tokenizer, an endpoint, a function
# or a repository name. Judges may replace each other.
_MADE_OF_OTHERS = {
    ("diffusers", name)
    for name in ("AnchorAnimator", "AnchorComposer", "AnchorJudge", "FirstFrameRewriter", "ShapesJudge")
}


def _makes_one(component: Any) -> bool:
    from diffusers import DiffusionPipeline

    return (
        type(component).__name__ == "ChatEndpoint"
        or callable(component)
        and not isinstance(component, type)
        or callable(getattr(component, "judge", None))
        or isinstance(component, (str, os.PathLike, tuple, list, DiffusionPipeline))
    )


def _importable(classes: dict[str, list[str]], library: str, class_name: str) -> dict[str, list[str]]:
    """Returns the table of base classes for loading one component: for this package's components only their own class."""
    from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

    if library in LOADABLE_CLASSES:
        return {class_name: SAVE_AND_LOAD} if library == "diffusers" and class_name in COMPONENTS else classes
    component_class = getattr(sys.modules.get(library), class_name, None)
    if isinstance(component_class, type) and issubclass(component_class, FactorizedVideoComponent):
        # A user's subclass of one of `COMPONENTS`. diffusers looks for the base class in the module of the subclass.
        return dict.fromkeys(COMPONENTS, SAVE_AND_LOAD)
    return classes
