"""A diffusers pipeline as a component of another pipeline: the base class of composer and animator."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DiffusionPipeline

from ..atomic import naming, replacing_entries
from ..checks import check_defaults
from .arguments import call_argument, nested_quantization
from .component_config import read_config
from .files import load_pipeline
from .safety import texts_in


def call_arguments(pipeline: DiffusionPipeline) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of a pipeline's `__call__`."""
    return MappingProxyType(inspect.signature(type(pipeline).__call__).parameters)


class PipelineComponent(torch.nn.Module):
    """A diffusers pipeline as a component of another pipeline.

    Only a component that is an `nn.Module` gets the requested dtype, moves with `.to()` and can be offloaded. So the models
    of the inner pipeline are children of this module, and run only within its `forward`. A subclass sets the name of its JSON
    config file (`config_name`), the attributes that are saved there (`settings`), and the arguments of the inner call that
    it passes itself (`own_arguments`).

    Args:
        pipeline (`DiffusionPipeline`): the inner pipeline. Its progress bar is switched off.
        call_defaults (`dict`, *optional*): arguments of each call of the inner pipeline.
        reference (`dict`, *optional*): the Hub `repository` of the pipeline and its `revision`. With it, `save_pretrained`
            writes the reference and no weights; set it to `None` to save the weights.

    Raises:
        `ValueError`: `pipeline` is not a pipeline, or `call_defaults` holds arguments of `own_arguments`.
    """

    config_name: ClassVar[str]
    settings: ClassVar[tuple[str, ...]] = ("call_defaults",)
    own_arguments: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        call_defaults: dict[str, Any] | None = None,
        reference: dict[str, str] | None = None,
    ):
        super().__init__()
        if not isinstance(pipeline, DiffusionPipeline):
            raise ValueError(f"`pipeline` must be a diffusers pipeline, but is a {type(pipeline).__name__}.")
        self.pipeline = pipeline
        self.models = torch.nn.ModuleDict(
            {name: model for name, model in pipeline.components.items() if isinstance(model, torch.nn.Module)}
        )
        check_defaults(call_defaults)
        self.call_defaults = dict(call_defaults or {})
        self.reference = reference
        taken = sorted(self.call_defaults.keys() & self.own_arguments)
        if taken:
            raise ValueError(f"`call_defaults` holds {taken}, which each call sets itself; remove them.")
        settings = getattr(pipeline, "_progress_bar_config", {})
        pipeline.set_progress_bar_config(**settings | {"disable": True})

    # -- loading and saving -------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        **kwargs,
    ) -> Self:
        """Loads the component from its folder or from a pipeline's Hub repository.

        Args:
            path (`str` or `os.PathLike`): a Hub repository of a pipeline; or a folder with a pipeline (`model_index.json`),
                with a config file of this class that names a Hub repository, or with a pipeline and a config file of
                settings.
            torch_dtype, dtype (`torch.dtype`, *optional*): dtype of the weights, float32 when left out. The two names are
                equivalent; diffusers passes the first.
            revision (`str`, *optional*): revision of the Hub repository `path`; not for a folder, whose config names it.
            kwargs (*optional*): arguments of `DiffusionPipeline.from_pretrained`, such as `token`, `cache_dir` and
                `local_files_only`.

        Raises:
            `ValueError`: `path` is a folder with neither `model_index.json` nor this class's config file, or that config is invalid;
                `torch_dtype` and `dtype` differ; or `revision` is given for a folder.
        """
        if torch_dtype is not None and dtype is not None and torch_dtype != dtype:
            raise ValueError(f"`torch_dtype={torch_dtype}` and `dtype={dtype}` differ; give one of them.")
        folder = Path(path)
        config: dict[str, Any] = {}
        if not folder.is_dir():
            config = {"repository": str(path)} | ({} if revision is None else {"revision": revision})
        elif revision is not None:
            raise ValueError(f"`revision={revision!r}` is for a Hub repository, and {str(path)!r} is a folder.")
        elif (folder / cls.config_name).is_file():
            config = cls._read_config(folder / cls.config_name)
        reference: dict[str, str] = {key: config.pop(key) for key in ("repository", "revision") if key in config}
        if not reference and not (folder / DiffusionPipeline.config_name).is_file():
            raise ValueError(
                f"{str(path)!r} holds no {cls.config_name.partition('_')[0]}: it has no {DiffusionPipeline.config_name}, and no "
                f"{cls.config_name} that names a repository."
            )
        arguments = {"dtype": dtype or torch_dtype, "device_map": call_argument("device_map")} | kwargs
        if call_argument("quantization_config") is not None:
            arguments["quantization_config"] = nested_quantization(folder.name)
        pipeline = load_pipeline(
            reference.get("repository", folder), reference.get("revision"), f"`{folder.name}`", **arguments
        )
        return cls(pipeline, reference=reference or None, **config)

    def save_pretrained(
        self, path: str | os.PathLike, safe_serialization: bool = True, max_shard_size: int | str | None = None
    ) -> None:
        """Saves the config file, and the inner pipeline unless it has a `reference`, for `from_pretrained`.

        Args:
            path (`str` or `os.PathLike`): the folder, created if it is missing.
            safe_serialization, max_shard_size (*optional*): arguments of `DiffusionPipeline.save_pretrained`.
        """
        config = dict(self.reference or {}) | {name: getattr(self, name) for name in self.settings}
        options = {"safe_serialization": safe_serialization, "max_shard_size": max_shard_size}
        index = DiffusionPipeline.config_name if self.reference is None else self.config_name
        with replacing_entries(path, index) as draft, naming(path):
            (draft / self.config_name).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
            if self.reference is None:
                self.pipeline.save_pretrained(draft, **options)

    @classmethod
    def _read_config(cls, path: Path) -> dict[str, Any]:
        """Reads a config file of this class and refuses unknown keys.

        Raises:
            `ValueError`: as in [`~loading.component_config.read_config`], or `call_defaults` name a file or a URL.
        """
        config = read_config(path, {"repository", "revision", *cls.settings}, "repository", {"revision"})
        for name, value in (config.get("call_defaults") or {}).items():
            # Some pipelines open images whose path or URL they are given.
            if any(os.path.isfile(text) or "://" in text for text in texts_in(value)):
                raise ValueError(f"{str(path)!r} sets `{name}` to {value!r}, a local file or a URL; remove it.")
        return config

    # -- placement ----------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        return self.pipeline.dtype

    @property
    def device(self) -> torch.device:
        return self.pipeline.device

    def _show_offload_hooks(self) -> None:
        """Marks the models of the inner pipeline as offloaded when sequential offload is active.

        Sequential offload puts hooks on the layers and on the component, which is this module. A pipeline finds its
        execution device by the hooks of its own components; without one it would use the device of the weights, which is
        meta.
        """
        if any(hasattr(module, "_hf_hook") for module in self.models.modules()):
            for model in self.models.values():
                if not hasattr(model, "_hf_hook"):
                    add_hook_to_module(model, ModelHook())
