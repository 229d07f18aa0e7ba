"""What `DiffusionPipeline.from_pretrained` was called with, for the components that it loads.

diffusers hands a component its dtype and its share of the quantization config, and keeps the rest to itself. A component that
fetches from another repository needs the rest too. `loading/patches.py` keeps it while the call runs.
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
    """Within it, `arguments` are those of the running call. Yields what is kept of them, and what is found out with it."""
    call = {name: arguments[name] for name in _PASSED_ON if arguments.get(name) is not None}
    reset = _call.set(call)
    try:
        yield call
    finally:
        _call.reset(reset)


def find_out(name: str, value: Any) -> None:
    """Adds something to what `remember` of the running call yields."""
    call = _call.get()
    if call is not None:
        call[name] = value


def call_argument(name: str) -> Any:
    """`variant`, `quantization_config`, `device_map` or `trust_remote_code` of the running call, or `None`."""
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
