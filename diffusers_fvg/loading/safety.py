"""Refuses repositories with weights in pickles, and with names of files or repositories outside of themselves.

diffusers and transformers look for a pickle when a folder has no safetensors weights, unless `use_safetensors=True` is
passed. They follow any file name in an index of shards, and fetch files that some settings name. [`load_guarded`] prevents
this for pipelines of this package, also if `from_pretrained` is called on another class; `loading/patches.py` makes diffusers
call it. `SECURITY.md` lists the settings and the checks.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from huggingface_hub import get_cached_repo_tree
from safetensors import SafetensorError, safe_open

from ..checks import check_name
from .arguments import call_argument
from .reading import check_link, read_json


PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Settings of transformers whose value may be a repository with code to run.
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
# Settings of transformers whose values are names of files in the folder of the config.
_FILES = ("transformers_weights", "configuration_files", "fast_tokenizer_files", "extra_files")
# Settings of a model for which some class of transformers or diffusers fetches another model or a tokenizer.
_REPOSITORIES = ("backbone", "tokenizer")

_guarded: ContextVar[bool] = ContextVar("guarded", default=False)


# -- names and files --------------------------------------------------------------------------------------------------


def refuse_pickles(names: Iterable[str]) -> None:
    """Raises `ValueError` naming the files that would be unpickled."""
    pickles = [name for name in names if name.lower().endswith(PICKLES)]
    if pickles:
        raise ValueError(f"{pickles} would be read as pickles, which can run code; convert them to safetensors.")


def check_folder(folder: str | Path) -> None:
    """Checks the files in a component's folder before it is loaded.

    Raises:
        `ValueError`: the folder holds one of these:
            - a link that leaves the repository (links within the Hub's cache are allowed);
            - an entry that is neither a file nor a folder;
            - an index of shards that names other files than safetensors files in the same folder;
            - a safetensors file without a tensor;
            - the config of a PEFT adapter, whose base model transformers would fetch;
            - a setting that names a file or a repository elsewhere;
            - JSON that is not an object or is nested too deeply.
    """
    root = _repository(Path(folder))
    for path in Path(folder).rglob("*"):
        check_link(path, root)
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is a pipe or a device, not a file: delete it.")
        if path.name.lower() == "adapter_config.json":
            raise ValueError(
                f"{path} makes the model a PEFT adapter; load the adapter with `load_lora_weights` instead."
            )
        if ".safetensors.index." in path.name:
            shards = read_json(path).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise ValueError(f"{path} has no `weight_map` from names to files.")
            for shard in set(shards.values()):
                refuse_pickles([check_name(shard, f"A shard in {path}")])
        if path.suffix == ".safetensors" and _is_empty(path):
            # diffusers and transformers would continue with random weights.
            raise ValueError(f"{path} holds no tensor: its weights are missing.")
        if path.is_file() and re.fullmatch(r".*config.*\.json|special_tokens_map\.json", path.name, re.IGNORECASE):
            values = _read_json(path)
            if values is not None and not isinstance(values, dict):
                raise ValueError(f"{path} must be a JSON object, but is a {type(values).__name__}.")
            for name, value in _settings(values):
                _check_setting(path, name, value)


def _is_empty(path: Path) -> bool:
    """Returns whether a safetensors file has no tensor. Damaged files are left to the component's loader to report."""
    try:
        with safe_open(path, framework="np") as file:
            return not file.keys()
    except (SafetensorError, OSError):
        return False


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply to be read.") from error
    except ValueError:
        return None  # The component's own loader reports this.


def texts_in(value: Any) -> list[str]:
    """Returns the strings in a value, at any depth."""
    found, left = [], [value]
    while left:
        value = left.pop()
        if isinstance(value, (list, dict)):
            left += value.values() if isinstance(value, dict) else value
        elif isinstance(value, str):
            found.append(value)
    return found


def _settings(values: Any) -> Iterator[tuple[str, Any]]:
    """Yields the names and values in a config, at any depth."""
    left = [values]
    while left:
        values = left.pop()
        if isinstance(values, list):
            left += values
        elif isinstance(values, dict):
            yield from values.items()
            # `quantization_config` may hold names, such as the calibration tokenizer, that are not fetched at loading.
            left += [value for name, value in values.items() if name != "quantization_config"]


def _check_setting(path: Path, name: str, value: Any) -> None:
    """Refuses a setting that would make transformers or diffusers open another file or fetch another repository."""
    texts, problem = texts_in(value), None
    if name in _KERNELS:
        from transformers.utils import import_utils

        # If `kernels` is installed, transformers also fetches flash attention from the Hub.
        fetched = ("/", "flash") if import_utils.is_kernels_available() else ("/",)
        if any(word in text for text in texts for word in fetched):
            problem = "would run code from another repository"
    elif name in _FILES:
        refuse_pickles([check_name(text, f"A file of `{name}` in {path}") for text in texts])
    elif path.name.lower() == "config.json" and isinstance(value, str):
        # `architecture` is the name of a timm model, or "hf-hub:org/name".
        if name in _REPOSITORIES or name == "architecture" and re.search("[:/]", value):
            problem = "would be fetched from elsewhere"
    elif path.name.lower() in ("tokenizer_config.json", "special_tokens_map.json"):
        if name in ("gguf_file", "init_inputs") and value:
            problem = "would have the tokenizer open another file"
        elif name == "tokenizer_class" and str(value).startswith("Auto"):
            # An `AutoTokenizer` that names itself would recurse without end.
            problem = "is not a tokenizer class"
        # Older programs often wrote a path of their own machine, which has no effect if it does not exist here.
        elif name.endswith(("_file", "_path", "_dir")) and any(_is_elsewhere(text, path.parent) for text in texts):
            problem = "is a local file outside of the folder"
    if problem is not None:
        raise ValueError(
            f"`{name}` in {path} is {value!r}, which {problem}: remove it, or pass the component itself to "
            "`from_pretrained`."
        )


def _is_elsewhere(name: str, folder: Path) -> bool:
    return os.path.exists(name) and not Path(os.path.abspath(name)).is_relative_to(folder.absolute())


def _repository(folder: Path) -> Path:
    """Returns the folder that a component's files must be in: its pipeline's, or the repository's in the Hub's cache."""
    place = folder.absolute()
    while (place.parent / "model_index.json").is_file():
        place = place.parent
    snapshot = _snapshot(place.resolve())
    return place.resolve() if snapshot is None else snapshot.parents[1]


def _snapshot(folder: Path) -> Path | None:
    """Returns the snapshot folder in the Hub's cache that `folder` is in: `models--org--name/snapshots/commit`."""
    places = (place for place in (folder, *folder.parents) if place.parent.name == "snapshots")
    return next((place for place in places if (place.parents[1] / "blobs").is_dir()), None)


def _pickles(folder: Path) -> list[str]:
    """Returns the pickles in a folder. In the Hub's cache, includes those of the repository that were not fetched."""
    names = [path.relative_to(folder) for path in folder.rglob("*")]
    snapshot = _snapshot(folder.absolute())
    if snapshot is not None:
        cache, inner = snapshot.parents[1], folder.absolute().relative_to(snapshot)
        repository = cache.name.removeprefix("models--").replace("--", "/")
        tree = get_cached_repo_tree(repository, revision=snapshot.name, cache_dir=cache.parent)
        files = [Path(file.path) for file in tree]
        names += [file.relative_to(inner) for file in files if file.is_relative_to(inner)]
    return sorted({name.as_posix() for name in names if name.suffix.lower() in PICKLES})


# -- loading ----------------------------------------------------------------------------------------------------------


@contextmanager
def safetensors_only(folder: str | Path) -> Iterator[None]:
    """Makes pipelines of any class load only safetensors files within the block.

    Raises:
        `ValueError`: weights were not found, and `folder` holds pickles, which the message names.
    """
    reset = _guarded.set(True)
    try:
        yield
    except OSError as error:
        pickles = _pickles(Path(folder))
        if not pickles:
            raise
        raise ValueError(
            f"{folder} has weights that are not safetensors: {pickles} would be read as pickles, which can run code; "
            f"convert them to safetensors. ({error})"
        ) from error
    finally:
        _guarded.reset(reset)


def is_guarded() -> bool:
    """Returns whether the caller runs within [`safetensors_only`]."""
    return _guarded.get()


def load_guarded(load: Callable, arguments: dict[str, Any]) -> Any:
    """Checks a component's folder, then loads the component by `load(**arguments)`, diffusers' `load_sub_model`.

    Raises:
        `ValueError`: `use_safetensors=False`, [`check_folder`] or [`safetensors_only`] refuses the folder, a file is damaged
            or of another format, or weights are missing.
    """
    if not call_argument("trust_remote_code"):
        _check_class(arguments)
    if arguments["use_safetensors"] is False:
        raise ValueError(
            "`use_safetensors=False` would read pickles, which can run code; leave it out: only safetensors are read."
        )
    repository = Path(arguments["cached_folder"])
    check_link(repository / "model_index.json", _repository(repository))
    component = repository / arguments["name"]
    # diffusers looks for a component without its own folder in the pipeline's folder.
    check_folder(component if component.is_dir() else repository)
    with safetensors_only(repository):
        try:
            loaded = load(**arguments | {"use_safetensors": True})
        except Exception as error:
            if not _is_damage(error):
                raise
            raise ValueError(
                f"`{arguments['name']}` cannot be loaded from {component}: a file there is damaged or of another kind "
                f"({type(error).__name__}: {error})."
            ) from error
    _check_weights(loaded, component)
    return loaded


def _is_damage(error: Exception) -> bool:
    """Returns whether an error comes from a library that reads files and does not name the file in its message."""
    if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError, RecursionError)):
        return True
    if isinstance(error, RuntimeError):
        return "ignore_mismatched_sizes" in str(error)
    return not isinstance(error, (ValueError, OSError, ImportError, MemoryError))


def _check_weights(model: Any, folder: Path) -> None:
    """Refuses a model whose files lack weights.

    diffusers leaves missing weights on the meta device. transformers initializes them at random, which can be intended, such
    as for a head that is not used. So a transformers model is refused if its files hold less than half of its values.
    """
    # Imported here because this module is imported while diffusers is.
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

    if isinstance(model, ModelMixin) and call_argument("device_map") is None:
        missing = [name for name, weight in model.named_parameters() if weight.is_meta]
        if missing and not any(hasattr(module, "_hf_hook") for module in model.modules()):
            names = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
            raise ValueError(f"{folder} lacks weights of the {type(model).__name__}: {names}.")
    elif isinstance(model, PreTrainedModel):
        there, needed = _num_values(folder), sum(weight.numel() for weight in model.parameters())
        if there is not None and 2 * there < needed:
            raise ValueError(
                f"{folder} lacks weights of the {type(model).__name__}: its files hold {there:,} values, but it has {needed:,}."
            )


def _num_values(folder: Path) -> int | None:
    """Returns how many values the safetensors files of a folder hold, from their headers; `None` without such a file."""
    count, files = 0, list(folder.glob("*.safetensors"))
    for path in files:
        with safe_open(path, framework="np") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no mapping)
    return count if files else None


def _check_class(arguments: dict[str, Any]) -> None:
    """Checks that a component's class is one that diffusers can save. Diffusers itself loads any class with `from_pretrained`.

    Raises:
        `ValueError`: the class is of another kind or of a library that is not imported, or names remote code in `auto_map`.
    """
    import diffusers
    import transformers
    from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES, get_class_obj_and_candidates

    library = arguments["library_name"]
    # Until 0.42.0, diffusers imports the library that is named here, which runs its code.
    if not (arguments["is_pipeline_module"] or library in LOADABLE_CLASSES or library in sys.modules):
        raise ValueError(
            f"model_index.json says that `{arguments['name']}` is of the library {library!r}, which has not been imported: "
            "import it, or pass `trust_remote_code=True` for code of the repository, if you trust it."
        )
    names = ("library_name", "class_name", "importable_classes", "pipelines", "is_pipeline_module")
    found, _ = get_class_obj_and_candidates(
        **{name: arguments[name] for name in names},
        component_name=arguments["name"],
        cache_dir=arguments["cached_folder"],
    )
    kinds = [name for name in arguments["importable_classes"] if name not in ("OnnxRuntimeModel", "ORTModule")]
    kinds = [getattr(diffusers, name, None) or getattr(transformers, name, None) for name in kinds]
    if not isinstance(found, type) or not issubclass(found, tuple(kind for kind in kinds if kind is not None)):
        raise ValueError(
            f"model_index.json says that `{arguments['name']}` is {arguments['library_name']}'s {arguments['class_name']}, which is "
            "not a model, scheduler, tokenizer or processor."
        )
    files = Path(arguments["cached_folder"], arguments["name"]).glob("*.json")
    # A processor asks in the terminal whether to run remote code of its parts; the others get `trust_remote_code=False`.
    if issubclass(found, transformers.ProcessorMixin) and any(
        "auto_map" in dict(_settings(_read_json(file))) for file in files
    ):
        raise ValueError(
            f"`{arguments['name']}` has an `auto_map`, which names code; pass the processor itself to run it."
        )
