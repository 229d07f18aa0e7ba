"""What a repository may not do: bring its weights as a pickle, or name files and repositories outside of itself.

diffusers and transformers look for a pickle when a folder has no safetensors weights, unless `use_safetensors=True` is
passed, follow any file name in an index of shards, and fetch what some settings name. [`load_guarded`] closes this for
pipelines of this package, on whatever class `from_pretrained` is called; `loading/patches.py` has the loader call it.
`SECURITY.md` lists the settings and what holds them.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from huggingface_hub import get_cached_repo_tree

from ..checks import check_name
from .arguments import call_argument


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
        `ValueError`: a link that leaves the repository (that of the Hub's cache may point at the cache's own files), an
            index of shards that names anything but safetensors files beside it, an adapter of PEFT, which transformers
            would load from wherever it says, or a setting that names a file or a repository elsewhere.
    """
    root = _repository(Path(folder))
    for path in Path(folder).rglob("*"):
        _check_link(path, root)
        if path.name.lower() == "adapter_config.json":
            raise ValueError(f"{path} makes the model a PEFT adapter; load that with `load_lora_weights`.")
        if ".safetensors.index." in path.name:
            for shard in set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()):
                refuse_pickles([check_name(shard, f"A shard in {path}")])
        if path.is_file() and re.fullmatch(r".*config.*\.json|special_tokens_map\.json", path.name, re.IGNORECASE):
            for name, value in _settings(_read_json(path)):
                _check_setting(path, name, value)


def _check_link(path: Path, root: Path) -> None:
    if not path.resolve().is_relative_to(root):
        raise ValueError(
            f"{path} is a link to {path.resolve()}, outside of its repository: put the files in its place, or pass the component "
            "itself to `from_pretrained`."
        )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None  # The component's own loader says so.


def texts_in(value: Any) -> list[str]:
    """The strings in a value, at any depth."""
    if isinstance(value, (list, dict)):
        return [text for item in (value.values() if isinstance(value, dict) else value) for text in texts_in(item)]
    return [value] if isinstance(value, str) else []


def _settings(values: Any) -> Iterator[tuple[str, Any]]:
    """Names and values in a configuration, at any depth."""
    if isinstance(values, list):
        for value in values:
            yield from _settings(value)
    elif isinstance(values, dict):
        for name, value in values.items():
            yield name, value
            # It names what a model was quantized with, and is not followed.
            if name != "quantization_config":
                yield from _settings(value)


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
        `ValueError`: `use_safetensors=False`, or what [`check_folder`] and [`safetensors_only`] refuse.
    """
    if not call_argument("trust_remote_code"):
        _check_class(arguments)
    if arguments["use_safetensors"] is False:
        raise ValueError(
            "`use_safetensors=False` asks for pickles, which can run code; weights are read from safetensors only."
        )
    repository = Path(arguments["cached_folder"])
    _check_link(repository / "model_index.json", _repository(repository))
    component = repository / arguments["name"]
    # A component without a folder of its own is looked for in the pipeline's.
    check_folder(component if component.is_dir() else repository)
    with safetensors_only(repository):
        try:
            return load(**arguments | {"use_safetensors": True})
        except (ValueError, OSError, ImportError, RuntimeError, MemoryError):
            raise
        except Exception as error:  # Of the library that reads the files; `tokenizers` raises no class of its own.
            raise ValueError(
                f"`{arguments['name']}` cannot be loaded from {component}: a file there is damaged or of another kind "
                f"({type(error).__name__}: {error})."
            ) from error


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
