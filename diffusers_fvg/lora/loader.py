"""Loads LoRA files of every known key format into the video transformers, and reports every key that is not used.

`formats.py` maps the keys of a file to modules. Low-rank pairs become PEFT layers; deltas of norms, modulation tables and
biases become a [`~lora.deltas.ParameterDeltas`].
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE, LoraBaseMixin
from diffusers.utils import logging
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..checks import check_finite, check_name, check_scale
from ..loading.reading import read_json
from ..loading.safety import refuse_pickles
from .deltas import ParameterDeltas, base_parameter
from .files import adapter_config, check_weights, read_safetensors
from .formats import EXPERTS, FORMATS, LoraFit, fit_tensors, refuse_other_methods, split_key
from .forms import check_form


logger = logging.get_logger(__name__)

_PEFT_WEIGHT_NAME, _PEFT_CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"

Weights = str | os.PathLike | dict[str, torch.Tensor]


@dataclass(frozen=True)
class LoraReport:
    """Result of loading a LoRA: the keys that were used and those that were not.

    Args:
        matched (`dict[str, str]`): key -> module that it was loaded into, such as `"transformer.blocks.0.attn1.to_q"`. For a
            pair of files the keys begin with the expert, as in `"transformer_2: "`.
        unmatched (`dict[str, str]`): key -> reason why it was not used.
        adapters (`dict[str, str]`): expert (`"transformer"`, `"transformer_2"`) -> name of its new adapter.
    """

    matched: dict[str, str]
    unmatched: dict[str, str]
    adapters: dict[str, str]


# -- files ------------------------------------------------------------------------------------------------------------


@dataclass
class _Source:
    label: str
    tensors: dict[str, torch.Tensor]
    # Entries of a PEFT LoraConfig. If diffusers wrote the file, the names begin with "transformer.".
    metadata: dict[str, Any]

    def config(self, prefixes: Sequence[str]) -> dict[str, Any]:
        for prefix in prefixes:
            config = {
                key.removeprefix(prefix + "."): value
                for key, value in self.metadata.items()
                if key.startswith(prefix + ".")
            }
            if config:
                return config
        return self.metadata


def _sources(
    weights: Weights,
    metadata: dict[str, str] | None = None,
    weight_name: str | Sequence[str] | None = None,
    subfolder: str | None = None,
    use_safetensors: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> list[_Source]:
    """Reads one file, or the two of an expert pair (high noise first)."""
    if use_safetensors is False:
        raise ValueError(
            "`use_safetensors=False` would read a pickle, which can run code; leave it out: only safetensors are read."
        )
    check_weights(weights)
    if isinstance(weights, dict):
        return [_Source("the state dict", weights, adapter_config(metadata or {}, "the state dict"))]
    if metadata is not None:
        raise ValueError("`metadata` is for a state dict only; leave it out, as the file's own metadata is read.")
    names = [weight_name] if isinstance(weight_name, str) else weight_name
    for name in (*(names or []), *([subfolder] if subfolder else [])):
        check_name(name, "A LoRA", folders=True)
    place = str(weights)
    refuse_pickles([place, *(names or [])])
    if os.path.isfile(weights):
        return [_read(Path(weights))]
    if os.path.isdir(weights):
        folder = Path(weights, subfolder or "")
        names = names or _choose([path.name for path in folder.iterdir()], str(folder))
        return [_read(folder / name) for name in names]
    if place.endswith(".safetensors") or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", place):
        raise ValueError(f"There is no LoRA file or folder {place!r}.")

    hub = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    if names is None and (constants.HF_HUB_OFFLINE or local_files_only):
        return _sources(snapshot_download(place, **hub | {"local_files_only": True}), subfolder=subfolder)
    if names is None:
        files = HfApi(token=token).list_repo_files(place, revision=revision)
        inside = [Path(file).name for file in files if str(Path(file).parent) == (subfolder or ".")]
        names = _choose(inside, "/".join([place, *([subfolder] if subfolder else [])]))
    hub |= {"subfolder": subfolder, "force_download": force_download}
    if _PEFT_WEIGHT_NAME in names:
        hf_hub_download(place, _PEFT_CONFIG_NAME, **hub)
    return [_read(Path(hf_hub_download(place, name, **hub))) for name in names]


def _read(path: Path) -> _Source:
    tensors, metadata = read_safetensors(path)
    metadata = adapter_config(metadata, str(path))
    if path.name == _PEFT_WEIGHT_NAME:
        config = path.with_name(_PEFT_CONFIG_NAME)
        if not config.is_file():
            raise ValueError(
                f"{path} is a PEFT file, but {_PEFT_CONFIG_NAME}, which holds its alpha, is not in its folder: copy it there."
            )
        metadata = read_json(config)
    return _Source(str(path), tensors, metadata)


def _choose(names: Sequence[str], place: str) -> list[str]:
    """Returns the LoRA files among the files of a folder: one file, or one for each expert."""
    found = sorted(name for name in names if name.endswith(".safetensors"))
    for standard in (LORA_WEIGHT_NAME_SAFE, _PEFT_WEIGHT_NAME):
        if standard in found:
            return [standard]
    if len(found) == 1:
        return found
    high, low = ([name for name in found if re.search(word, name, re.IGNORECASE)] for word in ("high", "low"))
    if len(found) == 2 and len(high) == 1 and len(low) == 1 and high != low:
        return high + low
    if not found:
        refuse_pickles(names)
        raise ValueError(f"There is no .safetensors file in {place}.")
    raise ValueError(
        f"{place} has several LoRAs: {found}. Pass one as `weight_name`, or a list of two for the two experts."
    )


# -- loading ----------------------------------------------------------------------------------------------------------


@dataclass
class LoraFiles:
    """The contents of LoRA files, sorted by the experts of a model.

    Args:
        fits (`dict[str, LoraFit]`): expert -> tensors for it.
        matched, unmatched (`dict[str, str]`): as in [`LoraReport`].
        labels (`list[str]`): paths of the files.
        undecided (`bool`): whether the caller passed a single file, so that only its keys can name the expert.
    """

    fits: dict[str, LoraFit] = field(default_factory=dict)
    matched: dict[str, str] = field(default_factory=dict)
    unmatched: dict[str, str] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)
    undecided: bool = False


def read_lora(
    weights: Weights | Sequence[Weights | None], transformers: dict[str, nn.Module], **file_arguments: Any
) -> LoraFiles:
    """Reads a LoRA of any known format without changing the transformers, which may be on the meta device.

    Args:
        weights, file_arguments: as in [`load_lora`].
        transformers (`dict[str, nn.Module]`): `"transformer"`, `"transformer_2"` or both.

    Raises:
        `ValueError`: no key of a file fits, or the file is a pickle or of an unsupported method (DoRA, LoHa, LoKr).
    """
    sources = _placed_sources(weights, file_arguments)
    files = LoraFiles(labels=[source.label for source, _ in sources], undecided=sources[0][1] is None)
    for source, expert in sources:
        _collect(source, expert, transformers, files)
    return files


def load_lora(
    pipe_or_transformers: Any,
    weights: Weights | Sequence[Weights | None],
    adapter_name: str | None = None,
    strength: float = 1.0,
    strength_2: float | None = None,
    strict: bool = False,
    *,
    hotswap: bool = False,
    low_cpu_mem_usage: bool = True,
    **file_arguments: Any,
) -> LoraReport:
    r"""Loads a LoRA of any known format as an adapter. Adapters that were active before stay active.

    The stock methods manage the adapter afterwards: `pipe.set_adapters`, `delete_adapters`, `fuse_lora`, `unfuse_lora`,
    `disable_lora`, `unload_lora_weights`.

    Model, group and sequential offload may be enabled if the pipeline is passed; sequential offload only if the file has no
    deltas of norms, biases or modulation. A compiled model is compiled again; `hotswap` avoids that.

    Args:
        pipe_or_transformers: a pipeline with a `transformer` and perhaps a `transformer_2`, a transformer, or a list
            of the high-noise and the low-noise expert.
        weights (path, Hub repository, state dict, or a pair of them):
            Keys that name an expert are loaded into it, other keys into `transformer`. A pair has one entry for each expert
            (high noise, low noise); `None` skips an expert, and `(file, file)` loads one file into both. A folder or
            repository with two files with "high" and "low" in their names is such a pair.
        adapter_name (`str`, *optional*): the first free `"default_<n>"` when left out.
        strength (`float`): factor on the adapter, from -100 to 100; 1 is the LoRA as it was trained.
        strength_2 (`float`, *optional*): the factor in `transformer_2`; `strength` when left out.
        strict (`bool`): whether to raise an error instead of a warning if any key is not used.
        hotswap (`bool`): replace the weights of the adapter `adapter_name` in place.
        low_cpu_mem_usage (`bool`): as in diffusers' `load_lora_adapter`.
        file_arguments: `weight_name` (one, or two for the experts), `subfolder`, `revision`, `token`, `cache_dir`,
            `local_files_only`, `force_download`; for a state dict, `metadata`: the safetensors header of its file.

    Returns:
        [`LoraReport`]

    Raises:
        `ValueError`: no key fits, a key does not fit and `strict` is set, the file is a pickle, has values that are not
            finite, is of an unsupported method (DoRA, LoHa, LoKr) or was trained with another `anchor_form`, the adapter
            name is in use, or other adapters are fused. The model is not changed then.
    """
    check_scale("strength", strength)
    if strength_2 is not None:
        check_scale("strength_2", strength_2)
    transformers, pipe = _transformers(pipe_or_transformers)
    files = read_lora(weights, transformers, **file_arguments)
    check_form(pipe, files.labels, file_arguments.get("metadata"))
    loaded = [expert for expert in transformers if expert in files.fits]

    if strength_2 is not None and EXPERTS[1] not in loaded:
        raise ValueError(
            "`strength_2` is given, but nothing is loaded into `transformer_2`: pass `(weights, weights)` for the same "
            "file in both experts, or `(high, low)`."
        )
    for expert in loaded:
        _check_ready(transformers[expert], files.fits[expert], adapter_name, hotswap, pipe is not None)
    if files.unmatched:
        count = len(files.unmatched) + len(files.matched)
        text = f"{len(files.unmatched)} of {count} LoRA keys were not used: {_sample(files.unmatched)}."
        if strict:
            raise ValueError(text)
        logger.warning(text)
    if files.undecided and loaded != list(transformers):
        missing = [expert for expert in transformers if expert not in loaded]
        logger.warning(
            f"The LoRA was loaded into `{loaded[0]}` only: no key names `{missing[0]}`. Pass `(weights, weights)` to load it "
            "into both experts, or `(high, low)` for two files."
        )

    if adapter_name is None:
        used = {name for transformer in transformers.values() for name in getattr(transformer, "peft_config", {})}
        adapter_name = next(name for n in range(len(used) + 1) if (name := f"default_{n}") not in used)
    strengths = dict(zip(EXPERTS, (strength, strength if strength_2 is None else strength_2)))
    options = {"hotswap": hotswap, "low_cpu_mem_usage": low_cpu_mem_usage, "_pipeline": pipe}
    done = []
    try:
        for expert in loaded:
            done.append(expert)
            _load_into(transformers[expert], files.fits[expert], adapter_name, strengths[expert], options)
    except Exception:
        for expert in done if not hotswap else []:
            if adapter_name in getattr(transformers[expert], "peft_config", {}):
                transformers[expert].delete_adapters(adapter_name)
        raise
    return LoraReport(files.matched, files.unmatched, dict.fromkeys(loaded, adapter_name))


def _transformers(pipe_or_transformers: Any) -> tuple[dict[str, nn.Module], Any]:
    pipe, experts = None, pipe_or_transformers
    if isinstance(pipe_or_transformers, nn.Module):
        experts = [pipe_or_transformers]
    elif isinstance(pipe_or_transformers, (list, tuple)):
        if len(experts) > len(EXPERTS):
            raise ValueError(f"There are {len(EXPERTS)} experts, but {len(experts)} transformers were given.")
    else:
        pipe = pipe_or_transformers
        experts = [getattr(pipe, name, None) for name in EXPERTS]
    # `torch.compile(model)` is a wrapper; adapters belong to the model inside.
    found = {name: getattr(expert, "_orig_mod", expert) for name, expert in zip(EXPERTS, experts)}
    return {name: expert for name, expert in found.items() if expert is not None}, pipe


def _placed_sources(weights: Any, file_arguments: dict[str, Any]) -> list[tuple[_Source, str | None]]:
    """Returns each file with the expert that it is for; `None` if its keys decide."""
    if isinstance(weights, (list, tuple)):
        if len(weights) != len(EXPERTS) or all(part is None for part in weights):
            raise ValueError(
                "As a list, `weights` must be a pair: for the high-noise and the low-noise expert, or None."
            )
        places = [(part, expert) for part, expert in zip(weights, EXPERTS) if part is not None]
        placed = [(_sources(part, **file_arguments), expert) for part, expert in places]
        if any(len(sources) > 1 for sources, _ in placed):
            raise ValueError(
                "One side of the pair `weights` is itself a pair of files; pass it alone or with `weight_name`."
            )
        return [(sources[0], expert) for sources, expert in placed]
    sources = _sources(weights, **file_arguments)
    return list(zip(sources, EXPERTS)) if len(sources) == len(EXPERTS) else [(sources[0], None)]


def _collect(source: _Source, expert: str | None, transformers: dict[str, nn.Module], files: LoraFiles) -> None:
    """Sorts the keys of one file by expert and module, matches them to modules, and adds them to `files`."""
    refuse_other_methods(source.label, source.tensors)
    for key, tensor in source.tensors.items():
        check_finite(f"{source.label}: {key}", tensor)
    groups: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    left: dict[str, str] = {}
    for key in source.tensors:
        parts = split_key(key)
        if parts is None:
            left[key] = "not a known form of a LoRA key"
            continue
        own, path, kind = parts
        if None not in (own, expert) and own != expert:
            raise ValueError(f"{source.label} was passed for `{expert}`, but its key {key} names `{own}`.")
        kinds = groups[own or expert or EXPERTS[0]][path]
        if kind in kinds:
            raise ValueError(
                f"{source.label} has two tensors for the same weight, {kinds[kind]} and {key}: it holds several "
                "adapters. Split it into one file for each."
            )
        kinds[kind] = key

    found: dict[str, str] = {}
    prefixes = [EXPERTS[0]] if expert is not None else []
    for name, modules in groups.items():
        if name not in transformers:
            keys = [key for kinds in modules.values() for key in kinds.values()]
            left |= dict.fromkeys(keys, f"there is no `{name}`")
            continue
        config = source.config([name, *prefixes])
        if config.get("use_dora"):
            raise ValueError(f"{source.label} is a DoRA by its config, which is not supported: merge it first.")
        fit = fit_tensors(transformers[name], modules, source.tensors, config)
        found |= {key: f"{name}.{module}".rstrip(".") for key, module in fit.matched.items()}
        left |= fit.unmatched
        if fit.matched:
            files.fits[name] = fit
    if not found:
        raise ValueError(
            f"No key of {source.label} fits: {_sample(left)}. Known formats: {FORMATS}. Was the LoRA trained for this "
            "model?"
        )
    # The two files of a pair may have the same keys.
    mark = f"{expert}: " if expert is not None else ""
    files.matched |= {mark + key: module for key, module in found.items()}
    files.unmatched |= {mark + key: reason for key, reason in left.items()}


def _check_ready(
    transformer: nn.Module, fit: LoraFit, adapter_name: str | None, hotswap: bool, has_pipe: bool
) -> None:
    deltas = getattr(transformer, "parameter_deltas", None)
    if deltas is not None and not getattr(transformer, "peft_config", None):
        deltas.retire()
    names = getattr(transformer, "peft_config", {})
    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    fused = sorted({name for layer in layers for name in layer.merged_adapters})
    if fused:
        raise ValueError(
            f"Adapters {fused} are fused, and new adapters would have no effect: call `unfuse_lora()` first, or "
            "`unload_lora_weights()` to keep them in the weights permanently."
        )
    changed = {*fit.pairs, *(name.rpartition(".")[0] for name in fit.deltas)}
    holders = (transformer.get_submodule(name.rpartition(".")[0]) for name in changed)
    if any(getattr(holder, "fused_projections", False) for holder in holders):
        raise ValueError("Fused projections ignore adapters: call `unfuse_qkv_projections()` first.")
    if adapter_name is not None and "." in adapter_name:
        raise ValueError(f"The adapter name {adapter_name!r} has a dot, which PyTorch does not allow in names.")
    if hotswap and adapter_name not in names:
        raise ValueError(f"`hotswap` replaces an adapter, but there is no {adapter_name!r} in {sorted(names)}.")
    if not hotswap and adapter_name in names:
        raise ValueError(
            f"The adapter name {adapter_name!r} is in use; choose another, or `hotswap=True` to replace it."
        )
    if hotswap:
        # PEFT finds the adapter's tensors by a substring and zeroes those that the new file has no values for.
        others = [
            key
            for key in transformer.state_dict()
            if "lora_" in key and adapter_name in key and key.split(".")[-2] != adapter_name
        ]
        if others:
            raise ValueError(
                f"The adapter name {adapter_name!r} is part of {others[0]}, which hotswapping would zero; choose a name "
                "that is not part of another one."
            )
    if not has_pipe and any(parameter.is_meta for parameter in transformer.parameters()):
        raise ValueError("The transformer is under sequential offload: pass the pipeline instead of the transformer.")
    if any(base_parameter(transformer, name).is_meta for name in fit.deltas):
        raise ValueError(
            "The LoRA changes norms, biases or modulation, which sequential offload does not allow: load it before "
            "`enable_sequential_cpu_offload()`, or use `enable_model_cpu_offload()`."
        )


def _load_into(
    transformer: nn.Module, fit: LoraFit, adapter_name: str, strength: float, options: dict[str, Any]
) -> None:
    if not fit.pairs:
        # PEFT identifies an adapter by its layers, so an adapter with deltas only gets one layer of zeros.
        layers = ((name, module) for name, module in transformer.named_modules() if isinstance(module, nn.Linear))
        name, layer = next(layers)
        zeros = next(iter(fit.deltas.values())).new_zeros
        fit.pairs[name.removesuffix(".base_layer")] = zeros(1, layer.in_features), zeros(layer.out_features, 1)
    tuners = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    active = tuners[0].active_adapters if tuners else []
    transformer.load_lora_adapter(
        fit.state_dict(), prefix=None, adapter_name=adapter_name, metadata=fit.peft_config(), **options
    )
    deltas = getattr(transformer, "parameter_deltas", None)
    if deltas is None and fit.deltas:
        deltas = transformer.parameter_deltas = ParameterDeltas(transformer)
    if deltas is not None:
        deltas.add(adapter_name, fit.deltas)
    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(active if options["hotswap"] else [*active, adapter_name])
            # Set only if needed: a compiled model has a guard on the scale.
            if strength != 1:
                module.set_scale(adapter_name, strength)
    if deltas is not None:
        deltas.refresh()


def _sample(reasons: dict[str, str], limit: int = 8) -> str:
    shown = [f"{key} ({reason})" for key, reason in list(reasons.items())[:limit]]
    return ", ".join(shown) + (f" and {len(reasons) - limit} more" if len(reasons) > limit else "")


class FactorizedVideoLoraLoaderMixin(LoraBaseMixin):
    """LoRA methods of a video pipeline, for every known format and by default for both experts.

    List it before the stock pipeline class among the bases, whose loader mixin provides the other methods.
    """

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Weights | Sequence[Weights | None],
        adapter_name: str | None = None,
        hotswap: bool = False,
        load_into_transformer_2: bool = False,
        **kwargs: Any,
    ) -> LoraReport:
        """Calls [`load_lora`]; the arguments have the names that diffusers uses.

        Args:
            pretrained_model_name_or_path_or_dict: see `weights` of [`load_lora`].
            adapter_name (`str`, *optional*): see [`load_lora`].
            hotswap (`bool`): see [`load_lora`].
            load_into_transformer_2 (`bool`): whether to load into `transformer_2` only, as `(None, weights)` does.
            kwargs: `strength`, `strength_2`, `strict`, `low_cpu_mem_usage` and the file arguments of [`load_lora`].

        Returns:
            [`LoraReport`]
        """
        weights: Any = pretrained_model_name_or_path_or_dict
        if load_into_transformer_2:
            weights = (None, weights)
        return load_lora(self, weights, adapter_name, hotswap=hotswap, **kwargs)

    def fuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Fuses adapters as diffusers does; in both experts unless `components` names one."""
        super().fuse_lora(components=components or self._lora_components(), **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Unfuses adapters as diffusers does; in both experts unless `components` names one."""
        super().unfuse_lora(components=components or self._lora_components(), **kwargs)

    def unload_lora_weights(self) -> None:
        """Removes all adapters as diffusers does; fused ones stay in the weights."""
        super().unload_lora_weights()
        for name in self._lora_components():
            deltas = getattr(getattr(self, name), "parameter_deltas", None)
            if deltas is not None:
                deltas.retire()

    def _lora_components(self) -> list[str]:
        return [name for name in EXPERTS if getattr(self, name, None) is not None]
