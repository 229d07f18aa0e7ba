"""What a repository may not do: bring its weights as a pickle, or name files outside of itself.

diffusers and transformers look for a pickle when a folder has no safetensors weights, unless `use_safetensors=True` is
passed, and follow any file name in an index of shards. [`load_guarded`] closes both for pipelines of this package, on
whatever class `from_pretrained` is called; `loading_patches.py` has the loader call it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import get_cached_repo_tree


PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_guarded: ContextVar[bool] = ContextVar("guarded", default=False)


# -- names and files --------------------------------------------------------------------------------------------------


def refuse_pickles(names: Iterable[str]) -> None:
    """Raises `ValueError` naming the files that would be unpickled."""
    pickles = [name for name in names if name.lower().endswith(PICKLES)]
    if pickles:
        raise ValueError(f"{pickles} would be read as pickles, which can run code; convert them to safetensors.")


def check_name(name: str, what: str, folders: bool = False) -> str:
    """Returns a name that a repository gives to a file or folder of its own.

    Args:
        name (`str`): the name.
        what (`str`): what it names, for the message.
        folders (`bool`): it may be a path, `"folder/file"`.

    Raises:
        `ValueError`: an absolute path, a drive, `..`, or a separator without `folders`.
    """
    parts = name.split("/") if folders else [name]
    # Windows' rules on every system: a repository that is safe here is safe there.
    if any(part in ("", ".", "..") or PureWindowsPath(part).name != part for part in parts):
        raise ValueError(f"{what} is called {name!r}, which does not stay in its folder; use a plain name.")
    return name


def check_folder(folder: str | Path) -> None:
    """Checks what a component's folder holds, before it is loaded.

    Raises:
        `ValueError`: a link that leaves the repository (that of the Hub's cache may point at the cache's own files), an
            index of shards that names anything but safetensors files beside it, or an adapter of PEFT, which transformers
            would load from wherever it says.
    """
    root = _repository(Path(folder))
    for path in Path(folder).rglob("*"):
        if not path.resolve().is_relative_to(root):
            raise ValueError(
                f"{path} is a link to {path.resolve()}, outside of its repository: put the files in its place, or pass "
                "the component itself to `from_pretrained`."
            )
        if path.name == "adapter_config.json":
            raise ValueError(f"{path} makes the model a PEFT adapter; load that with `load_lora_weights`.")
        if ".safetensors.index." in path.name:
            for shard in set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()):
                refuse_pickles([check_name(shard, f"A shard in {path}")])


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
    if arguments["use_safetensors"] is False:
        raise ValueError(
            "`use_safetensors=False` asks for pickles, which can run code; weights are read from safetensors only."
        )
    repository = Path(arguments["cached_folder"])
    component = repository / arguments["name"]
    # A component without a folder of its own is looked for in the pipeline's.
    check_folder(component if component.is_dir() else repository)
    with safetensors_only(repository):
        return load(**arguments | {"use_safetensors": True})
