"""Light repositories: parts that stay in Hub repositories of their own, and pushing.

In place of a component's weights a folder holds `reference.json`: a Hub repository, the commit, the subfolder and the class.
`DiffusionPipeline.from_pretrained` fetches what it names, and nothing else: the safetensors files of one variant and the
component's own configuration. Composer and rewriter name their repositories in their own configurations, and fetch with
the same functions.
"""

from __future__ import annotations

import copy
import glob
import hashlib
import json
import os
import re
from abc import ABCMeta
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj
from diffusers.utils import logging
from huggingface_hub import (
    HfApi,
    constants,
    get_cached_repo_tree,
    get_token,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .arguments import HUB_ARGUMENTS, call_argument, hub_arguments
from .safety import PICKLES, check_folder, check_name, safetensors_only


logger = logging.get_logger(__name__)

REFERENCE_NAME = "reference.json"
COMMIT = re.compile("[0-9a-f]{40}")
PIPELINE_SHIM = "from diffusers_fvg import FactorizedVideoPipeline  # noqa: F401\n"
# What a reference may stand for, and where its class is looked up.
LIBRARIES = ("diffusers", "transformers")
REFERABLE = (ModelMixin, SchedulerMixin, PreTrainedModel, PreTrainedTokenizerBase)
# The file names that diffusers and transformers load: "model.fp16-00001-of-00002.safetensors" and the index of the shards.
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<a>\w+))?(?:-\d{5}-of-\d{5})?\.safetensors(?:\.index(?:\.(?P<b>\w+))?\.json)?"
)
_MODEL_CONFIGS = ("config.json", "generation_config.json")
_TEXT_SUFFIXES = (".json", ".txt", ".model", ".jinja")


# -- files of a repository --------------------------------------------------------------------------------------------


def _variant(name: str) -> str | None:
    match = _WEIGHTS.fullmatch(PurePosixPath(name).name)
    return match and (match["a"] or match["b"])


def available_variant(names: Iterable[str], variant: str | None, place: str) -> str | None:
    """The variant if `names` hold it; else `None`, with a warning: as in diffusers, parts without it come as they are."""
    if variant is None or any(_variant(name) == variant for name in names):
        return variant
    logger.warning(f"{place} has no files of the variant {variant!r}; its standard files are used.")
    return None


def component_files(
    names: Iterable[str], subfolder: str = "", variant: str | None = None, weights: bool = True
) -> list[str]:
    """Of a repository's files those that one component needs.

    Args:
        names (`Iterable[str]`): paths in the repository.
        subfolder (`str`): of the component; files deeper down are not its own.
        variant (`str`, *optional*): of the weights.
        weights (`bool`): a model: its safetensors files and configuration. Otherwise all configuration and vocabulary.

    Raises:
        `ValueError`: a model without safetensors files of that variant.
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


def repository_files(repository: str, revision: str | None = None, **hub: Any) -> tuple[str, dict[str, dict]]:
    """The commit of a revision, and its files: `{"size": bytes, "sha256": of its content if it is a large file}`.

    Args:
        repository (`str`): on the Hub.
        revision (`str`, *optional*): a commit, whose listing is kept in the cache, or a branch or tag.
        hub: as [`hub_arguments`] gives them.
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
                    f"it is not in the cache, and the Hub may not be asked ({error})"
                ) from error
        else:
            return revision, {file.path: _file(file.size, file.lfs) for file in tree}
    info = HfApi(token=hub.get("token")).model_info(repository, revision=revision, files_metadata=True)
    return info.sha, {file.rfilename: _file(file.size, file.lfs) for file in info.siblings}


def _file(size: int, lfs: Any) -> dict[str, Any]:
    return {"size": size, "sha256": None if lfs is None else lfs.sha256}


def fetch(
    repository: str, revision: str | None, select: Callable[[list[str]], list[str]], place: str, **hub: Any
) -> tuple[Path, list[str]]:
    """Fetches chosen files of a repository into the Hub's cache.

    Args:
        repository, revision (`str`): on the Hub.
        select (`Callable`): chooses among the repository's files; its `ValueError` says what is not there.
        place (`str`): what names the repository, for messages.
        hub: as [`hub_arguments`] gives them.

    Returns:
        `tuple[Path, list[str]]`: the folder of the snapshot, and the chosen files in it.

    Raises:
        `OSError`: the repository, the revision or a file is not there, or a file is not what the Hub says that it is. The
            Hub's own error is the cause.
    """
    title = _title(repository, revision)
    try:
        commit, files = repository_files(repository, revision, **hub)
        names = select(list(files))
        there = [try_to_load_from_cache(repository, name, hub.get("cache_dir"), commit) for name in names]
        cached = {name for name, path in zip(names, there) if isinstance(path, str)}
        patterns = [glob.escape(name) for name in names]
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, **hub))
    except (OSError, ValueError) as error:
        reason = str(error).strip() or type(error).__name__
        raise OSError(f"{place} names {title} on the Hub, which cannot be loaded: {reason}") from error
    for name in names:
        path, expected = folder / name, files[name]
        damage = None
        if path.stat().st_size != expected["size"]:
            damage = f"{path.stat().st_size} bytes, not {expected['size']}"
        elif name not in cached and expected["sha256"] not in (None, _sha256(path)):
            damage = f"another content than sha256 {expected['sha256']}"
        if damage is not None:
            for part in (path.resolve(), path):
                part.unlink(missing_ok=True)
            raise OSError(
                f"{place} names {title} on the Hub, whose file {name} came with {damage}. It has been deleted: try again."
            )
    return folder, names


def load_pipeline(source: str | Path, revision: str | None, place: str, **arguments: Any) -> DiffusionPipeline:
    """Loads the pipeline that another one holds: from a folder, or the repository that its folder names.

    Args:
        source (`str` or `Path`): a repository on the Hub, or a folder as a `Path`.
        revision (`str`, *optional*): of the repository.
        place (`str`): what names the repository, for messages.
        arguments: of `DiffusionPipeline.from_pretrained`; those of the running call are added.

    Raises:
        `OSError`: the repository or a file is not there. The Hub's own error is the cause.
    """
    own = {name: arguments.pop(name, None) for name in HUB_ARGUMENTS}
    hub = hub_arguments(**own)
    try:
        if isinstance(source, Path):
            names = [path.name for path in source.rglob("*.safetensors")]
        else:
            names = repository_files(source, revision, **hub)[1]
        variant = available_variant(names, arguments.pop("variant", None) or call_argument("variant"), place)
        with safetensors_only(source):
            arguments |= {"variant": variant, "use_safetensors": True, **hub}
            if not isinstance(source, Path):
                # By its name a folder of this machine would be taken in its place.
                source = DiffusionPipeline.download(source, revision=revision, **arguments)
            return DiffusionPipeline.from_pretrained(source, **arguments)
    except OSError as error:
        raise OSError(f"{place} names {_title(source, revision)}, which cannot be loaded: {error}") from error


def _title(source: str | Path, revision: str | None) -> str:
    return f"{source}@{revision}" if revision else str(source)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- references -------------------------------------------------------------------------------------------------------


class HubReference(torch.nn.Module, metaclass=ABCMeta):
    """Stands in `model_index.json` for a component that stays in a Hub repository of its own.

    [`from_pretrained`] reads the folder's `reference.json` and returns the component itself. It is an `nn.Module` because
    diffusers tells only those the asked dtype.

    Args:
        repository (`str`): on the Hub.
        library, class_name (`str`): what the component is: a model, scheduler or tokenizer of diffusers, of transformers or
            of this package (as `"diffusers"`).
        revision (`str`, *optional*): a commit, or a branch or tag, which are looked up at each loading.
        subfolder (`str`): of the component in the repository.
        variant (`str`, *optional*): of the weights, when the call names none.

    Raises:
        `ValueError`: a class that is none of these, or a repository or folder that is no name.
    """

    def __init__(
        self,
        repository: str,
        library: str,
        class_name: str,
        revision: str | None = None,
        subfolder: str = "",
        variant: str | None = None,
    ):
        super().__init__()
        validate_repo_id(repository)
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*|", subfolder) or ".." in subfolder.split("/"):
            raise ValueError(f"The subfolder {subfolder!r} of {repository} is no path within a repository.")
        self.values = {"repository": repository, "revision": revision, "subfolder": subfolder}
        self.values |= {"library": library, "class": class_name, "variant": variant}
        self.component_class = _component_class(library, class_name)

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        # diffusers checks a component that is passed to `from_pretrained` against the class in `model_index.json`.
        return issubclass(other, REFERABLE) or NotImplemented

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, torch_dtype: torch.dtype | None = None, quantization_config=None
    ):
        """Fetches the component that a folder names, with the arguments of the running `DiffusionPipeline.from_pretrained`.

        Args:
            path (`str` or `os.PathLike`): a folder with `reference.json`. Its name is the component's.
            torch_dtype (`torch.dtype`, *optional*): of the weights.
            quantization_config (*optional*): of diffusers or transformers, for a model.

        Raises:
            `ValueError`: a `reference.json` that is not valid.
            `OSError`: what it names is not there; the message says which reference it was and what was looked for.
        """
        file = Path(path) / REFERENCE_NAME
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            reference = cls(class_name=values.pop("class"), **values)
        except (OSError, LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{file} must name `repository`, `library` and `class`, and may name `revision`, `subfolder` and `variant`: "
                f"{type(error).__name__}: {error}"
            ) from error
        return reference.load(Path(path).name, torch_dtype, quantization_config)

    def load(self, name: str, torch_dtype: torch.dtype | None = None, quantization_config=None):
        """The component itself, which remembers its reference. `name` is that of the component in the pipeline."""
        values, component_class = self.values, self.component_class
        is_model, place = issubclass(component_class, torch.nn.Module), f"`{name}/{REFERENCE_NAME}`"
        variant = None

        def select(names: list[str]) -> list[str]:
            nonlocal variant
            inside = [file for file in names if file.startswith(f"{values['subfolder']}/")]
            variant = (
                is_model and (available_variant(inside, call_argument("variant"), place) or values["variant"]) or None
            )
            files = component_files(names, values["subfolder"], variant, weights=is_model)
            if not files:
                folders = sorted({file.split("/")[0] for file in names if "/" in file})
                raise ValueError(f"nothing in the subfolder {values['subfolder']!r}; there are {folders}")
            return files

        folder, _ = fetch(values["repository"], values["revision"], select, place, **hub_arguments())
        arguments: dict[str, Any] = {}
        if is_model:
            arguments = {"use_safetensors": True, "device_map": call_argument("device_map")}
            arguments |= {} if variant is None else {"variant": variant}
            # diffusers makes the config for a class of transformers, not knowing what is behind the reference.
            config = call_argument("quantization_config")
            if config is not None:
                is_diffusers = issubclass(component_class, ModelMixin)
                quantization_config = config._resolve_quant_config(is_diffusers=is_diffusers, module_name=name)
            if quantization_config is not None:
                arguments["quantization_config"] = quantization_config
            arguments["torch_dtype" if issubclass(component_class, ModelMixin) else "dtype"] = torch_dtype
        check_folder(folder / values["subfolder"])
        component = component_class.from_pretrained(folder / values["subfolder"], **arguments)
        component.hub_reference = dict(values)
        return component

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Writes `reference.json`."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        values = {key: value for key, value in self.values.items() if value is not None}
        (folder / REFERENCE_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _component_class(library: str, class_name: str) -> type:
    """The class that a reference names. Only what `DiffusionPipeline` itself would load by that name, and no code."""
    if library not in LIBRARIES:
        raise ValueError(f"The library {library!r} is none of {LIBRARIES}.")
    try:
        component_class = simple_get_class_obj(library, class_name)
    except AttributeError as error:
        raise ValueError(f"{library} has no class {class_name!r}.") from error
    if not isinstance(component_class, type) or not issubclass(component_class, REFERABLE):
        raise ValueError(f"{library}'s {class_name} is no model, scheduler or tokenizer.")
    return component_class


# -- saving -----------------------------------------------------------------------------------------------------------


def as_saved(pipe: DiffusionPipeline, bundle: bool) -> DiffusionPipeline:
    """A shallow copy of a pipeline as `save_pretrained` should write it.

    What came by reference is a reference again, or with `bundle` has its weights written. A rewriter that asks an endpoint
    is left out, with a warning: who loads the repository names one.

    Raises:
        `ValueError`: a component that came by reference has LoRAs fused into its weights, which the reference would lose.
    """
    saved = copy.copy(pipe)
    for name, component in pipe.components.items():
        reference = getattr(component, "hub_reference", None)
        if getattr(component, "endpoint", None) is not None:
            logger.warning(f"`{name}` asks an endpoint and is not saved; pass it again as `{name}=` when you load.")
            setattr(saved, name, None)
        elif reference is not None and not bundle:
            if any(isinstance(module, BaseTunerLayer) and module.merged for module in _modules(component)):
                raise ValueError(
                    f"`{name}` came from {reference['repository']} and has LoRAs fused into it, which a reference would "
                    "lose: call `unfuse_lora()`, or save with `bundle=True`."
                )
            values = dict(reference)
            setattr(saved, name, HubReference(class_name=values.pop("class"), **values))
        elif bundle and getattr(component, "reference", None) is not None:
            bundled = copy.copy(component)
            bundled.reference = None
            setattr(saved, name, bundled)
    return saved


def _modules(component: Any) -> Iterable[torch.nn.Module]:
    return component.modules() if isinstance(component, torch.nn.Module) else ()


def forget_origins(folder: str | os.PathLike) -> None:
    """Takes `_name_or_path`, which may be a path on this machine, out of the configurations of a saved pipeline."""
    index = Path(folder) / DiffusionPipeline.config_name
    components = json.loads(index.read_text(encoding="utf-8"))
    for file in [index, *(file for name in components for file in Path(folder, name).rglob("*.json"))]:
        if file.name in (index.name, "config.json", "scheduler_config.json"):
            config = json.loads(file.read_text(encoding="utf-8"))
            if config.pop("_name_or_path", "absent") != "absent":
                file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# -- pushing ----------------------------------------------------------------------------------------------------------

_SECRETS = re.compile(rb"\bhf_[A-Za-z]{30,}|\bsk-[A-Za-z0-9_-]{20,}|\bBearer [A-Za-z0-9._-]{16,}")
_HOMES = re.compile(rb"/(?:home|Users)/[\w.-]+/|/root/|[A-Z]:\\{1,2}Users\\")
PATH = re.compile(r"(?<![\w./:-])/[\w.-]+(?:/[\w.-]+)+")
_NOT_PUSHED = (".git*", ".cache/*", "**/.cache/*", "__pycache__/*", "**/__pycache__/*", "*.pyc")


def push(
    folder: str | os.PathLike,
    repository: str,
    commit_message: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> str:
    """Uploads a saved pipeline, bundled or light, with its card, `schedulers/` and `pipeline.py`.

    The repository is made if it is not there, otherwise brought up to date: components that are no longer in the folder, or
    now are references, lose their old files; other files stay. Done again after an interruption, it sends only the large
    files that did not arrive. A folder without `README.md` gets a card, unless the repository has one.

    Args:
        folder (`str` or `os.PathLike`): what `save_pretrained` or `fvg assemble` wrote.
        repository (`str`): on the Hub.
        commit_message (`str`, *optional*): `"Upload pipeline"` when left out.
        private (`bool`, *optional*): whether others may not see a repository that is made; an existing one stays as it is.
        create_pr (`bool`): as a pull request, not to the main branch.
        token (`str` or `bool`, *optional*): the one that `hf auth login` keeps when left out.

    Returns:
        `str`: address of the commit, or of the pull request.

    Raises:
        `ValueError`: no saved pipeline, or a file that holds a key or a path of this machine; nothing is uploaded then.
        `OSError`: the Hub refuses, or the upload was interrupted. The Hub's own error, or its cause.
    """
    folder, api = Path(folder), HfApi(token=token)
    index = folder / DiffusionPipeline.config_name
    if not index.is_file():
        raise ValueError(f"{str(folder)!r} has no {index.name}: it is no saved pipeline.")
    check_nothing_private(folder, token)
    repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
    if not (folder / "README.md").is_file() and not api.file_exists(repository, "README.md"):
        from ..publishing.cards import repository_card

        repository_card(folder).save(folder / "README.md")
        check_nothing_private(folder, token)
    components = [name for name, value in json.loads(index.read_text()).items() if isinstance(value, list)]
    try:
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=commit_message or "Upload pipeline",
            create_pr=create_pr,
            ignore_patterns=list(_NOT_PUSHED),
            # A weight left beside a reference would keep diffusers from fetching the reference.
            delete_patterns=[f"{name}/*" for name in components],
        )
    except RuntimeError as error:
        raise OSError(
            f"The upload to {repository} was interrupted ({error}). Push again: what arrived is kept."
        ) from error
    return commit.pr_url or commit.commit_url


def check_nothing_private(folder: Path, token: str | bool | None = None) -> None:
    """Refuses a folder in which a file holds a key, or a path of this machine.

    Raises:
        `ValueError`: naming the files.
    """
    token = token if isinstance(token, str) else get_token()
    # A key of another service, such as the rewriter's endpoint, is only known by the name of its variable.
    secrets = [value for name, value in os.environ.items() if re.search("KEY|TOKEN|SECRET", name) and len(value) >= 16]
    secrets += [token] if token else []
    found = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = _text(file)
        if _SECRETS.search(data) or any(secret.encode() in data for secret in secrets):
            found.append(f"{file.relative_to(folder)} (a key)")
        elif _HOMES.search(data) or any(os.path.exists(path) for path in _paths(file, data)):
            found.append(f"{file.relative_to(folder)} (a path of this machine)")
    if found:
        raise ValueError(f"Not pushed: {', '.join(found)}. Take it out of the file and push again.")


def _paths(file: Path, data: bytes) -> set[str]:
    """Absolute paths in what programs write; in prose `/usr/bin` is a word, as it is in a vocabulary."""
    if file.suffix not in (".json", ".safetensors") or file.name in ("tokenizer.json", "vocab.json"):
        return set()
    return set(PATH.findall(data.decode(errors="replace")))


def _text(file: Path) -> bytes:
    """What a person could read in a file: all of it, or the header of a safetensors file."""
    with file.open("rb") as data:
        if file.suffix != ".safetensors":
            return data.read() if file.stat().st_size < 100_000_000 else b""
        return data.read(int.from_bytes(data.read(8), "little"))
