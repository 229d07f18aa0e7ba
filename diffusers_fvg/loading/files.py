"""Selects and fetches the files of Hub repositories that a component needs."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import re
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils import logging
from huggingface_hub import HfApi, constants, get_cached_repo_tree, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import CachedRepoTreeNotFoundError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..checks import check_name
from .arguments import HUB_ARGUMENTS, call_argument, hub_arguments
from .safety import PICKLES, safetensors_only


logger = logging.get_logger(__name__)

COMMIT = re.compile("[0-9a-f]{40}")
# Names of weight files in diffusers and transformers: "model.fp16-00001-of-00002.safetensors" and the index of the shards.
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<a>\w+))?(?:-\d{5}-of-\d{5})?\.safetensors(?:\.index(?:\.(?P<b>\w+))?\.json)?"
)
_MODEL_CONFIGS = ("config.json", "generation_config.json")
_TEXT_SUFFIXES = (".json", ".txt", ".model", ".jinja")


def _variant(name: str) -> str | None:
    match = _WEIGHTS.fullmatch(PurePosixPath(name).name)
    return match and (match["a"] or match["b"])


def available_variant(names: Iterable[str], variant: str | None, place: str) -> str | None:
    """Returns `variant` if `names` has files of it; otherwise warns and returns `None` (standard files) as diffusers."""
    if variant is None or any(_variant(name) == variant for name in names):
        return variant
    logger.warning(f"{place} has no files of the variant {variant!r}; its standard files are used.")
    return None


def component_files(
    names: Iterable[str], subfolder: str = "", variant: str | None = None, weights: bool = True
) -> list[str]:
    """Returns the files of a repository that one component needs.

    Args:
        names (`Iterable[str]`): paths in the repository.
        subfolder (`str`): folder of the component; files in deeper folders are ignored.
        variant (`str`, *optional*): variant of the weights.
        weights (`bool`): `True` for a model, which needs its safetensors files and configs; `False` for a scheduler or
            tokenizer, which needs all configs and vocabularies.

    Raises:
        `ValueError`: `weights` is `True`, and there are no safetensors files of that variant.
    """
    inside = [name for name in names if str(PurePosixPath(name).parent) == (subfolder or ".")]
    if not weights:
        return sorted(
            name for name in inside if name.endswith(_TEXT_SUFFIXES) and ".index." not in PurePosixPath(name).name
        )
    found = [name for name in inside if _WEIGHTS.fullmatch(PurePosixPath(name).name) and _variant(name) == variant]
    if not any(name.endswith(".safetensors") for name in found):
        there = sorted(PurePosixPath(name).name for name in inside) or "nothing"
        pickles = [name for name in inside if name.endswith(PICKLES)]
        hint = f" {pickles} would be read as pickles, which can run code: convert them." if pickles else ""
        raise ValueError(
            f"no safetensors weights{f' of the variant {variant!r}' if variant else ''} in "
            f"{subfolder or 'the root'!r}, which holds {there}.{hint}"
        )
    return sorted([*found, *(name for name in inside if PurePosixPath(name).name in _MODEL_CONFIGS)])


def repository_files(repository: str, revision: str | None = None, **hub: Any) -> tuple[str | None, dict[str, dict]]:
    """Returns the commit of a revision, and its files: path -> `{"size": bytes, "sha256": hash or None}`.

    The Hub gives a SHA-256 hash only for large files.

    Args:
        repository (`str`): Hub repository.
        revision (`str`, *optional*): a commit, whose file list is cached, or a branch or tag.
        hub: arguments that [`hub_arguments`] returns.

    Raises:
        `OSError`: the repository or the revision does not exist, or the Hub does not answer.
    """
    validate_repo_id(repository)
    if revision is not None:
        check_name(revision, "The revision", folders=True)
    offline = constants.HF_HUB_OFFLINE or hub.get("local_files_only")
    if offline or COMMIT.fullmatch(revision or ""):
        try:
            tree = get_cached_repo_tree(repository, revision=revision, cache_dir=hub.get("cache_dir"))
        except CachedRepoTreeNotFoundError as error:
            if offline:
                raise LocalEntryNotFoundError(
                    f"it is not in the cache, and Hub access is switched off ({error})"
                ) from error
        else:
            return revision, {file.path: _file(file.size, file.lfs) for file in tree}
    try:
        info = HfApi(token=hub.get("token")).model_info(repository, revision=revision, files_metadata=True)
    except Exception as error:
        if not is_of_connection(error):
            raise
        raise OSError(f"the Hub does not answer ({error}); HF_HUB_OFFLINE=1 uses cached files only") from error
    return info.sha, {file.rfilename: _file(file.size, file.lfs) for file in info.siblings}


def _file(size: int, lfs: Any) -> dict[str, Any]:
    return {"size": size, "sha256": None if lfs is None else lfs.sha256}


def fetch(
    repository: str, revision: str | None, select: Callable[[list[str]], list[str]], place: str, **hub: Any
) -> tuple[Path, list[str]]:
    """Fetches selected files of a repository into the Hub's cache.

    Args:
        repository, revision (`str`): Hub repository and its revision.
        select (`Callable`): returns the files to fetch from a list of all files; raises `ValueError` if one is missing.
        place (`str`): the component or file that names the repository; used in messages.
        hub: arguments that [`hub_arguments`] returns.

    Returns:
        `tuple[Path, list[str]]`: the folder of the snapshot, and the selected files in it.

    Raises:
        `OSError`: the repository, the revision or a file does not exist, or a file differs from the Hub's size or hash. The
            Hub's error is the `__cause__`.
    """
    title = _title(repository, revision)
    try:
        commit, files = repository_files(repository, revision, **hub)
        names = select(list(files))
        there = [try_to_load_from_cache(repository, name, hub.get("cache_dir"), commit) for name in names]
        cached = {name for name, path in zip(names, there) if isinstance(path, str)}
        patterns = [glob.escape(name) for name in names]
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, **hub))
    except Exception as error:
        if not isinstance(error, (OSError, ValueError)) and not is_of_connection(error):
            raise
        reason = str(error).strip() or type(error).__name__
        raise OSError(f"{place} names {title} on the Hub, which cannot be loaded: {reason}") from error
    for name in names:
        path, expected = folder / name, files[name]
        damage = None
        if path.stat().st_size != expected["size"]:
            damage = f"{path.stat().st_size} bytes, not {expected['size']}"
        elif name not in cached and expected["sha256"] not in (None, _sha256(path)):
            damage = f"content that differs from sha256 {expected['sha256']}"
        if damage is not None:
            # The client never renews its cached listing of a commit, and the listing may be what is wrong.
            listing = folder.parents[1] / "trees" / f"{folder.name}.json"
            for part in (path.resolve(), path, listing):
                part.unlink(missing_ok=True)
            raise OSError(
                f"{place} names {title} on the Hub, whose file {name} arrived with {damage}. The file has been deleted: try again."
            )
    return folder, names


def load_pipeline(source: str | Path, revision: str | None, place: str, **arguments: Any) -> DiffusionPipeline:
    """Loads a pipeline that is a component of another one.

    Args:
        source (`str` or `Path`): a Hub repository as a `str`, or a folder as a `Path`.
        revision (`str`, *optional*): revision of the repository.
        place (`str`): the component that names the repository; used in messages.
        arguments: arguments of `DiffusionPipeline.from_pretrained`; Hub arguments and the variant of the running call are
            added.

    Raises:
        `OSError`: the repository or a file does not exist. The Hub's error is the `__cause__`.
    """
    own = {name: arguments.pop(name, None) for name in HUB_ARGUMENTS}
    hub = hub_arguments(**own)
    try:
        if isinstance(source, Path):
            names = [path.name for path in source.rglob("*.safetensors")]
        else:
            names = list(repository_files(source, revision, **hub)[1])
        variant = available_variant(names, arguments.pop("variant", None) or call_argument("variant"), place)
        with safetensors_only(source):
            arguments |= {"variant": variant, "use_safetensors": True, **hub}
            if not isinstance(source, Path):
                # Given its name, `from_pretrained` would prefer a local folder of the same name.
                source = DiffusionPipeline.download(source, revision=revision, **arguments)
            return DiffusionPipeline.from_pretrained(source, **arguments)
    except Exception as error:
        if not isinstance(error, (OSError, HFValidationError)) and not is_of_connection(error):
            raise
        raise OSError(f"{place} names {_title(source, revision)}, which cannot be loaded: {error}") from error


@contextlib.contextmanager
def naming_repository(repository: str, revision: str | None, place: str) -> Iterator[None]:
    """Adds the repository to errors of the Hub client in the block, whose messages may not name it.

    Args:
        repository, revision (`str`): Hub repository and its revision.
        place (`str`): the component or argument that names the repository; used in messages.

    Raises:
        `OSError`: the client raised an error, which is the `__cause__`.
    """
    try:
        yield
    except Exception as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        # The client also raises errors of Python's built-in classes.
        is_of_client = frame.f_globals["__name__"].startswith("huggingface_hub.")
        if not is_of_client and not is_of_connection(error):
            raise
        title = _title(repository, revision)
        raise OSError(f"{place} names {title} on the Hub, which cannot be loaded: {error}") from error


def is_of_connection(error: Exception) -> bool:
    """Returns whether an error comes from the HTTP library of the Hub client; these share no base class in Python."""
    return type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")


def _title(source: str | Path, revision: str | None) -> str:
    return f"{source}@{revision}" if revision else str(source)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
