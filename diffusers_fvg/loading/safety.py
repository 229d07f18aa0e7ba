"""What a repository may not do: bring its weights as a pickle, or name files and repositories outside of itself.

diffusers and transformers look for a pickle when a folder has no safetensors weights, unless `use_safetensors=True` is
passed, follow any file name in an index of shards, and fetch what some settings name. [`load_guarded`] closes this for
pipelines of this package, on whatever class `from_pretrained` is called; `loading/patches.py` has the loader call it.
`SECURITY.md` lists the settings and what holds them.
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
# Settings of transformers that are names of files beside the configuration.
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
    """Checks what a component's folder holds, before it is loaded.

    Raises:
        `ValueError`: a link that leaves the repository (that of the Hub's cache may point at the cache's own files), what is
            neither file nor folder, an index of shards that names anything but safetensors files beside it, weights without
            a tensor, an adapter of PEFT, which transformers would load from wherever it says, a setting that names a file or
            a repository elsewhere, or JSON that is nested too deep.
    """
    root = _repository(Path(folder))
    for path in Path(folder).rglob("*"):
        check_link(path, root)
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is a pipe or a device, and no file: delete it.")
        if path.name.lower() == "adapter_config.json":
            raise ValueError(f"{path} makes the model a PEFT adapter; load that with `load_lora_weights`.")
        if ".safetensors.index." in path.name:
            shards = read_json(path).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise ValueError(f"{path} has no `weight_map` from names to files.")
            for shard in set(shards.values()):
                refuse_pickles([check_name(shard, f"A shard in {path}")])
        if path.suffix == ".safetensors" and _is_empty(path):
            # diffusers and transformers would go on with weights drawn at random.
            raise ValueError(f"{path} holds no tensor: its weights are missing.")
        if path.is_file() and re.fullmatch(r".*config.*\.json|special_tokens_map\.json", path.name, re.IGNORECASE):
            values = _read_json(path)
            if values is not None and not isinstance(values, dict):
                raise ValueError(f"{path} must be an object of JSON, but is a {type(values).__name__}.")
            for name, value in _settings(values):
                _check_setting(path, name, value)


def _is_empty(path: Path) -> bool:
    """Whether a safetensors file has no tensor; what is none is told of by who loads it."""
    try:
        with safe_open(path, framework="np") as file:
            return not file.keys()
    except (SafetensorError, OSError):
        return False


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deep to be read.") from error
    except ValueError:
        return None  # The component's own loader says so.


def texts_in(value: Any) -> list[str]:
    """The strings in a value, at any depth."""
    found, left = [], [value]
    while left:
        value = left.pop()
        if isinstance(value, (list, dict)):
            left += value.values() if isinstance(value, dict) else value
        elif isinstance(value, str):
            found.append(value)
    return found


def _settings(values: Any) -> Iterator[tuple[str, Any]]:
    """Names and values in a configuration, at any depth."""
    left = [values]
    while left:
        values = left.pop()
        if isinstance(values, list):
            left += values
        elif isinstance(values, dict):
            yield from values.items()
            # It names what a model was quantized with, and is not followed.
            left += [value for name, value in values.items() if name != "quantization_config"]


def _check_setting(path: Path, name: str, value: Any) -> None:
    """Refuses a setting for which transformers or diffusers would open a file, or fetch a repository, that it names."""
    texts, problem = texts_in(value), None
    if name in _KERNELS:
        from transformers.utils import import_utils

        # Where `kernels` is installed, transformers takes flash attention from the Hub as well.
        fetched = ("/", "flash") if import_utils.is_kernels_available() else ("/",)
        if any(word in text for text in texts for word in fetched):
            problem = "would run code from another repository"
    elif name in _FILES:
        refuse_pickles([check_name(text, f"A file of `{name}` in {path}") for text in texts])
    elif path.name.lower() == "config.json" and isinstance(value, str):
        # `architecture` is timm's name of a network, or "hf-hub:org/name".
        if name in _REPOSITORIES or name == "architecture" and re.search("[:/]", value):
            problem = "would be fetched from elsewhere"
    elif path.name.lower() in ("tokenizer_config.json", "special_tokens_map.json"):
        if name in ("gguf_file", "init_inputs") and value:
            problem = "would have the tokenizer open another file"
        elif name == "tokenizer_class" and str(value).startswith("Auto"):
            # It would look for itself without an end.
            problem = "is no tokenizer's class"
        # What older programs wrote is often a path on their own machine, and does nothing on this one.
        elif name.endswith(("_file", "_path", "_dir")) and any(_is_elsewhere(text, path.parent) for text in texts):
            problem = "is a file of this machine"
    if problem is not None:
        raise ValueError(
            f"`{name}` in {path} is {value!r}, which {problem}: take it out, or pass the component itself to "
            "`from_pretrained`."
        )


def _is_elsewhere(name: str, folder: Path) -> bool:
    return os.path.exists(name) and not Path(os.path.abspath(name)).is_relative_to(folder.absolute())


def _repository(folder: Path) -> Path:
    """Where files of a component may be: its pipeline's folder, or all that the Hub's cache has of the repository."""
    place = folder.absolute()
    while (place.parent / "model_index.json").is_file():
        place = place.parent
    snapshot = _snapshot(place.resolve())
    return place.resolve() if snapshot is None else snapshot.parents[1]


def _snapshot(folder: Path) -> Path | None:
    """The commit's folder in the Hub's cache that `folder` is in: `models--org--name/snapshots/commit`."""
    places = (place for place in (folder, *folder.parents) if place.parent.name == "snapshots")
    return next((place for place in places if (place.parents[1] / "blobs").is_dir()), None)


def _pickles(folder: Path) -> list[str]:
    """Pickles in a folder. In the Hub's cache also those of the repository, which the loader does not fetch."""
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
    """Within it, pipelines of any class load safetensors only; a missing file is explained by the pickles in `folder`.

    Raises:
        `ValueError`: weights were not found, and there are pickles.
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
    """Whether this runs within [`safetensors_only`]."""
    return _guarded.get()


def load_guarded(load: Callable, arguments: dict[str, Any]) -> Any:
    """Loads a component by `load(**arguments)`, which is diffusers' `load_sub_model`, after checking its folder.

    Raises:
        `ValueError`: `use_safetensors=False`, what [`check_folder`] and [`safetensors_only`] refuse, files that are damaged
            or of another kind, or weights that are missing.
    """
    if not call_argument("trust_remote_code"):
        _check_class(arguments)
    if arguments["use_safetensors"] is False:
        raise ValueError(
            "`use_safetensors=False` asks for pickles, which can run code; weights are read from safetensors only."
        )
    repository = Path(arguments["cached_folder"])
    check_link(repository / "model_index.json", _repository(repository))
    component = repository / arguments["name"]
    # A component without a folder of its own is looked for in the pipeline's.
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
    """Whether it is of the library that reads the files, which names none; `tokenizers` raises no class of its own."""
    if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError, RecursionError)):
        return True
    if isinstance(error, RuntimeError):
        return "ignore_mismatched_sizes" in str(error)
    return not isinstance(error, (ValueError, OSError, ImportError, MemoryError))


def _check_weights(model: Any, folder: Path) -> None:
    """Refuses a model whose files lack weights.

    diffusers leaves them on the meta device. transformers draws them at random, and of some classes that is meant, such as
    of a head that nothing here uses: there it is refused if the files hold less than half of the values.
    """
    # Not above: the import of diffusers ends with that of this file.
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
                f"{folder} lacks weights of the {type(model).__name__}: its files hold {there:,} values, and it has {needed:,}."
            )


def _num_values(folder: Path) -> int | None:
    """How many numbers the safetensors files of a folder hold, by their headers; `None` where there is no such file."""
    count, files = 0, list(folder.glob("*.safetensors"))
    for path in files:
        with safe_open(path, framework="np") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no mapping)
    return count if files else None


def _check_class(arguments: dict[str, Any]) -> None:
    """Checks that a component is of a kind that diffusers saves: its loader takes any class with a `from_pretrained`.

    Raises:
        `ValueError`: another class, or one whose files are not safetensors and JSON.
    """
    import diffusers
    import transformers
    from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES, get_class_obj_and_candidates

    library = arguments["library_name"]
    # diffusers imports what is named here (until 0.42.0), which runs it.
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
            "no model, scheduler, tokenizer or processor."
        )
    files = Path(arguments["cached_folder"], arguments["name"]).glob("*.json")
    # A processor asks at the terminal whether to run code of its parts; all others are told not to.
    if issubclass(found, transformers.ProcessorMixin) and any(
        "auto_map" in dict(_settings(_read_json(file))) for file in files
    ):
        raise ValueError(
            f"`{arguments['name']}` has an `auto_map`, which names code; pass the processor itself to run it."
        )
