"""What `DiffusionPipeline.from_pretrained` was called with, for the components that it loads.

diffusers hands a component its dtype and its share of the quantization config, and keeps the rest to itself. A component that
fetches from another repository needs the rest too. It is the base class that is called, so no override of ours would run.
"""

from __future__ import annotations

import functools
import os
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from .safety import PICKLES


HUB_ARGUMENTS = ("cache_dir", "token", "local_files_only", "force_download")
_PASSED_ON = (*HUB_ARGUMENTS, "variant", "quantization_config", "device_map")
_call: ContextVar[dict[str, Any] | None] = ContextVar("from_pretrained", default=None)


@functools.cache
def remember_arguments() -> None:
    """Makes `DiffusionPipeline.from_pretrained` keep its arguments while it runs."""
    from diffusers import DiffusionPipeline
    from diffusers.pipelines import pipeline_loading_utils, pipeline_utils

    load = DiffusionPipeline.from_pretrained.__func__

    @functools.wraps(load)
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        call = {name: kwargs[name] for name in _PASSED_ON if kwargs.get(name) is not None}
        if "variant" in call and _has_references(cls, pretrained_model_name_or_path, kwargs):
            # A variant is one of the repositories that are named; the loader would look for it in this one.
            del kwargs["variant"]
        reset = _call.set(call)
        try:
            return load(cls, pretrained_model_name_or_path, **kwargs)
        finally:
            _call.reset(reset)

    DiffusionPipeline.from_pretrained = classmethod(from_pretrained)
    # diffusers' own takes a folder within a component's folder for a file, and fails on its name (0.42.1).
    pipeline_utils._identify_model_variants = _identify_model_variants
    # And it leaves all safetensors files of a repository behind that has no model's weights, as a light one (0.42.1).
    compatible = pipeline_loading_utils.is_safetensors_compatible

    @functools.wraps(compatible)
    def is_safetensors_compatible(filenames, *args, **kwargs):
        names = [name for name in filenames if name.endswith((".safetensors", *PICKLES))]
        return (
            bool(names) and not any(name.endswith(PICKLES) for name in names) or compatible(filenames, *args, **kwargs)
        )

    pipeline_loading_utils.is_safetensors_compatible = is_safetensors_compatible
    ignored = pipeline_utils._get_ignore_patterns

    @functools.wraps(ignored)
    def _get_ignore_patterns(passed_components, *args, **kwargs):
        # diffusers' own fetches what is passed all the same, if it lies in a folder within the component's (0.42.1).
        return ignored(passed_components, *args, **kwargs) + [f"{name}/*" for name in passed_components]

    pipeline_utils._get_ignore_patterns = _get_ignore_patterns


def _has_references(cls: type, path: str | os.PathLike, kwargs: dict[str, Any]) -> bool:
    names = (*HUB_ARGUMENTS, "revision")
    try:
        index = cls.load_config(path, **{name: kwargs[name] for name in names if name in kwargs})
    except OSError:
        return False  # The loader says what is wrong.
    return ["diffusers", "HubReference"] in index.values()


def _identify_model_variants(folder: str | os.PathLike, variant: str | None, config: dict) -> dict[str, str]:
    found = {}
    for name in config if variant is not None else ():
        files = [path.name for path in Path(folder, name).glob("*.*") if path.is_file()]
        if any(file.split(".")[1].startswith(variant) for file in files):
            found[name] = variant
    return found


def call_argument(name: str) -> Any:
    """`variant`, `quantization_config` or `device_map` of the running call, or `None`."""
    return (_call.get() or {}).get(name)


def hub_arguments(**own: Any) -> dict[str, Any]:
    """`cache_dir`, `token`, `local_files_only`, `force_download`: `own` where given, else those of the running call."""
    call = {name: value for name, value in (_call.get() or {}).items() if name in HUB_ARGUMENTS}
    return call | {name: value for name, value in own.items() if value is not None}


def nested_quantization(name: str) -> Any:
    """What the running call's `PipelineQuantizationConfig` says of a pipeline that is its component `name`.

    Its parts are named with a dot, as in `"composer.transformer"`. A backend for all components is one for its parts too.
    """
    from diffusers import PipelineQuantizationConfig

    config, prefix = call_argument("quantization_config"), f"{name}."
    if config is None:
        return None
    if name in (config.quant_mapping or config.components_to_quantize or ()):
        raise ValueError(
            f"`{name}` is a pipeline: name its parts in the quantization config, as {prefix + 'transformer'!r}."
        )
    if config.quant_mapping is not None:
        mapping = {
            key.removeprefix(prefix): value for key, value in config.quant_mapping.items() if key.startswith(prefix)
        }
        return PipelineQuantizationConfig(quant_mapping=mapping) if mapping else None
    if config.components_to_quantize is None:
        return config
    parts = [part.removeprefix(prefix) for part in config.components_to_quantize if part.startswith(prefix)]
    return PipelineQuantizationConfig(config.quant_backend, config.quant_kwargs, parts) if parts else None
