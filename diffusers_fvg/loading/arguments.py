"""Gives components access to the arguments of the running `DiffusionPipeline.from_pretrained`.

diffusers passes a component only its dtype and its part of the quantization config. A component that is fetched from another
repository also needs the other arguments. `loading/patches.py` stores them while the call runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


HUB_ARGUMENTS = ("cache_dir", "token", "local_files_only", "force_download")
_PASSED_ON = (*HUB_ARGUMENTS, "variant", "quantization_config", "device_map", "trust_remote_code")
_call: ContextVar[dict[str, Any] | None] = ContextVar("from_pretrained", default=None)


@contextmanager
def remember(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Stores the arguments of `from_pretrained` for the block. Yields the stored ones, to which [`find_out`] adds."""
    call = {name: arguments[name] for name in _PASSED_ON if arguments.get(name) is not None}
    reset = _call.set(call)
    try:
        yield call
    finally:
        _call.reset(reset)


def find_out(name: str, value: Any) -> None:
    """Adds a value to the dictionary that [`remember`] yields for the running call."""
    call = _call.get()
    if call is not None:
        call[name] = value


def call_argument(name: str) -> Any:
    """Returns `variant`, `quantization_config`, `device_map` or `trust_remote_code` of the running call, or `None`."""
    return (_call.get() or {}).get(name)


def hub_arguments(**own: Any) -> dict[str, Any]:
    """Returns `cache_dir`, `token`, `local_files_only`, `force_download` of `own`, or else of the running call."""
    call = {name: value for name, value in (_call.get() or {}).items() if name in HUB_ARGUMENTS}
    return call | {name: value for name, value in own.items() if value is not None}


def nested_quantization(name: str) -> Any:
    """Returns the quantization config for the component `name`, which is a pipeline itself.

    The `PipelineQuantizationConfig` of the running call names models of the inner pipeline with a dot, as in
    `"composer.transformer"`. A backend for all components applies to these models, too.

    Raises:
        `ValueError`: the config names the inner pipeline as a whole.
    """
    from diffusers import PipelineQuantizationConfig

    config, prefix = call_argument("quantization_config"), f"{name}."
    if config is None:
        return None
    if name in (config.quant_mapping or config.components_to_quantize or ()):
        raise ValueError(
            f"`{name}` is a pipeline: name its models in the quantization config, such as {prefix + 'transformer'!r}."
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
