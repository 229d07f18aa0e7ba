"""LoRA files of every known key format, loaded into the video transformers with nothing lost in silence.

A key is read as prefixes, a module, and a kind of tensor. Module names of three vocabularies lead to a module of the
transformer at hand; they are derived from the model itself, so that there is one path for all formats and none of them
can leave a layer out:

    diffusers     transformer.blocks.0.attn1.to_q.lora_A.weight, transformer_2.blocks...
    PEFT          base_model.model.blocks.0.attn1.to_q.lora_A.default.weight, with adapter_config.json
    DiffSynth     blocks.0.self_attn.q.lora_A.default.weight, [diffusion_model.]
    ComfyUI       diffusion_model.blocks.0.self_attn.q.lora_A.weight (diffusion-pipe, ai-toolkit; also `alpha`)
    ai-toolkit    diffusion_model.transformer_1.blocks..., diffusion_model.transformer_2.blocks...
    musubi, kohya lora_unet_blocks_0_self_attn_q.lora_down.weight, .lora_up.weight, .alpha (VideoX-Fun: lora_unet__)
    LightX2V      diffusion_model.blocks.0.self_attn.q.lora_down.weight, and deltas `.diff`, `.diff_b`, `.diff_m`

What becomes of a tensor:

* low rank: a PEFT layer. `alpha / rank` is multiplied into it, so that the layer's own scale is always 1: PEFT forgets
  the alpha of a hot-swapped adapter as soon as its strength is changed.
* `diff`, `diff_b` of a linear layer or convolution: the same, exactly (`diff` times an identity; a bias on `lora_B`).
* `diff`, `diff_b` of a norm and `diff_m` (modulation): PEFT has no layer for them. [`ParameterDeltas`] adds them to
  the parameter, follows the adapter's strength and state, and restores the original values bit by bit.

The stock converters are not used: musubi's fails on a file without every layer of every block, ComfyUI's drops norm
and modulation deltas, and there is none for DiffSynth's, PEFT's and un-prefixed keys.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.utils import logging
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import nn


logger = logging.get_logger(__name__)

EXPERTS = ("transformer", "transformer_2")
FORMATS = (
    "diffusers (transformer.*, transformer_2.*), PEFT (base_model.model.*), DiffSynth (blocks.*.lora_A.default.weight), "
    "ComfyUI and ai-toolkit (diffusion_model.*), musubi and kohya (lora_unet_*), "
    "LightX2V (lora_down, diff, diff_b, diff_m)"
)

# Leading segments of a key that say nothing, and those that name an expert (high noise first).
_NEUTRAL_SEGMENTS = {"base_model", "model", "diffusion_model", "unet", "pipe", "dit", "module", "transformer"}
_EXPERT_SEGMENTS = {
    **dict.fromkeys(("transformer_1", "high_noise", "high_noise_model"), EXPERTS[0]),
    **dict.fromkeys(("transformer_2", "dit2", "low_noise", "low_noise_model"), EXPERTS[1]),
}
_KOHYA = re.compile(r"lora_unet_+(?:(high_noise|low_noise)(?:_model)?_)?(.+)")
# Module, kind, adapter name (PEFT and DiffSynth keep it in the key), "weight" or "bias".
_KEY = re.compile(
    r"(.+?)\.(lora_A|lora_B|lora_down|lora_up|alpha|diff_b|diff_m|diff)"
    r"(?:\.(?!(?:weight|bias)$)[^.]+)?(?:\.(weight|bias))?"
)
_KINDS = {
    ("lora_A", "weight"): "down",
    ("lora_down", "weight"): "down",
    ("lora_B", "weight"): "up",
    ("lora_up", "weight"): "up",
    ("lora_B", "bias"): "up_bias",
    ("lora_up", "bias"): "up_bias",
    ("alpha", None): "alpha",
    ("diff", None): "diff",
    ("diff_b", None): "diff_b",
    ("diff_m", None): "diff_m",
}
# Parts of other methods. What is left of a file without them would be another model.
_OTHER_METHODS = re.compile(r"\.(dora_scale|lora_magnitude_vector|lora_mid|hada_\w+|lokr_\w+|oft_\w+)\b")

# diffusers' name of a module -> its name in Wan's own code, in which most trainers write.
_WAN_NAMES: tuple[tuple[str, str | Callable[[re.Match], str]], ...] = (
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_([qkv])$", r".\1"),
    (r"\.to_out\.0$", ".o"),
    (r"\.add_([kv])_proj$", r".\1_img"),
    (r"\.norm_added_k$", ".norm_k_img"),
    (r"^(blocks\.\d+\.ffn)\.net\.0\.proj$", r"\1.0"),
    (r"^(blocks\.\d+\.ffn)\.net\.2$", r"\1.2"),
    # Wan calls norm1, norm3, norm2 in this order.
    (r"^(blocks\.\d+\.norm)([23])$", lambda match: match[1] + {"2": "3", "3": "2"}[match[2]]),
    (r"^condition_embedder\.(time|text)_embedder\.linear_1$", r"\1_embedding.0"),
    (r"^condition_embedder\.(time|text)_embedder\.linear_2$", r"\1_embedding.2"),
    (r"^condition_embedder\.time_proj$", "time_projection.1"),
    (r"^condition_embedder\.image_embedder\.norm1$", "img_emb.proj.0"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj$", "img_emb.proj.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2$", "img_emb.proj.3"),
    (r"^condition_embedder\.image_embedder\.norm2$", "img_emb.proj.4"),
    (r"^proj_out$", "head.head"),
    # The last modulation is the root's own parameter.
    (r"^$", "head"),
)
_PEFT_WEIGHT_NAME, _PEFT_CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

Weights = str | os.PathLike | dict[str, torch.Tensor]


@dataclass(frozen=True)
class LoraReport:
    """What became of the keys of a LoRA.

    Args:
        matched (`dict[str, str]`): key -> the module it went to, `"transformer.blocks.0.attn1.to_q"`. For a pair of
            files the keys begin with their expert, `"transformer_2: "`.
        unmatched (`dict[str, str]`): key -> why it was left out.
        adapters (`dict[str, str]`): expert (`"transformer"`, `"transformer_2"`) -> name of the adapter loaded into it.
    """

    matched: dict[str, str]
    unmatched: dict[str, str]
    adapters: dict[str, str]


# -- deltas that PEFT has no layer for --------------------------------------------------------------------------------


class ParameterDeltas(nn.Module, BaseTunerLayer):
    """Adapters made of plain additions to parameters: `original + sum(strength * delta)`, written into the parameter.

    To PEFT and diffusers it is one more adapter layer, so that `set_adapters`, `delete_adapters`, `disable_lora`,
    `fuse_lora` and `unfuse_lora` reach it. Values are brought up to date before each forward of the transformer. It
    holds no parameters of its own and never runs: the model's state dict and its speed stay as they are. In a saved
    state dict the parameters are those in use; `originals` has the base values.

    Args:
        transformer (`nn.Module`): the model whose parameters are changed; gets this object as `parameter_deltas`.
    """

    other_param_names = ("deltas", "scaling")
    # `set_lora_device` asks every adapter layer for its low-rank weights.
    lora_A: dict[str, nn.Module] = {}
    # Of a base layer, which this has none of; the inherited properties would look for it without end.
    weight = bias = None

    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.originals: dict[str, torch.Tensor] = {}
        self.deltas: dict[str, dict[str, torch.Tensor]] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._fused: dict[str, float] = {}
        self._applied: dict[str, float] | None = {}
        # In a tuple: as an attribute the transformer would become a child of its own child.
        self._transformer = (transformer,)
        self._hook = transformer.register_forward_pre_hook(self._before_forward)

    def _before_forward(self, transformer: nn.Module, args: tuple) -> None:
        self.refresh()

    def add(self, adapter_name: str, deltas: dict[str, torch.Tensor]) -> None:
        """Adds or replaces an adapter: parameter name -> delta of the parameter's shape. Its strength is 1."""
        (transformer,) = self._transformer
        for name in deltas:
            if name not in self.originals:
                self.originals[name] = transformer.get_parameter(name).detach().to("cpu", copy=True)
        self.deltas[adapter_name] = deltas
        self.scaling[adapter_name] = 1.0
        self._applied = None

    def _strengths(self) -> dict[str, float]:
        (transformer,) = self._transformer
        if self.merged:
            return self._fused
        # `unload_lora` takes PEFT's layers out of the model and this attribute with them.
        if self.disable_adapters or not getattr(transformer, "peft_config", None):
            return {}
        return {name: self.scaling[name] for name in self.active_adapters if name in self.deltas}

    def _value(self, name: str, strengths: dict[str, float], device: torch.device) -> torch.Tensor:
        original = self.originals[name]
        value = original.to(device, torch.promote_types(original.dtype, torch.float32))
        for adapter, strength in strengths.items():
            if name in self.deltas[adapter]:
                value = value + strength * self.deltas[adapter][name].to(value)
        return value

    @torch.no_grad()
    def refresh(self) -> None:
        """Writes the parameters if strengths have changed.

        Raises:
            `ValueError`: the parameters are away (sequential offload).
        """
        strengths = self._strengths()
        if strengths == self._applied:
            return
        (transformer,) = self._transformer
        for name in self.originals:
            parameter = transformer.get_parameter(name)
            if parameter.is_meta:
                raise ValueError(
                    f"The LoRA changes `{name}`, which sequential offload has moved away: load LoRAs and set their "
                    "strengths before `enable_sequential_cpu_offload()`, or use `enable_model_cpu_offload()`."
                )
            parameter.data.copy_(self._value(name, strengths, parameter.device))
        self._applied = dict(strengths)

    def retire(self) -> None:
        """Leaves the transformer with the parameters as they should be: fused, or the original ones."""
        self.refresh()
        self._hook.remove()
        (transformer,) = self._transformer
        del transformer.parameter_deltas

    # What PEFT and diffusers call.

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        pass  # `refresh` takes the deltas to the parameters' device

    def set_scale(self, adapter: str, scale: float) -> None:
        if adapter in self.scaling:
            self.scaling[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        # Called within a forward (`attention_kwargs={"scale": s}`), after the values were brought up to date.
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale
        self.refresh()

    def unscale_layer(self, scale: float | None = None) -> None:
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale
        # Not compared but written again: offloading may have dropped what was written within the forward.
        self._applied = None

    def enable_adapters(self, enabled: bool) -> None:
        # A PEFT layer un-fuses itself when it is disabled.
        if not enabled:
            self.unmerge()
        super().enable_adapters(enabled)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.deltas:
                continue
            if safe_merge and not all(torch.isfinite(delta).all() for delta in self.deltas[name].values()):
                raise ValueError(f"The adapter {name!r} has deltas that are not finite; it was not fused.")
            self._fused[name] = self.scaling[name]
            self.merged_adapters.append(name)
        self._applied = None
        self.refresh()

    def unmerge(self) -> None:
        self.merged_adapters.clear()
        self._fused = {}
        self.refresh()

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self._fused:
            # As with PEFT's layers, what is fused stays in the weights for good.
            strengths = {adapter_name: self._fused.pop(adapter_name)}
            self.merged_adapters.remove(adapter_name)
            for name, original in self.originals.items():
                self.originals[name] = self._value(name, strengths, original.device).to(original.dtype)
        super().delete_adapter(adapter_name)
        self._applied = None


# -- reading keys -----------------------------------------------------------------------------------------------------


def split_key(key: str) -> tuple[str | None, str, str] | None:
    """Expert (if the key names one), module path and kind of a key; `None` for one of no known form.

    >>> split_key("diffusion_model.transformer_2.blocks.0.self_attn.q.lora_A.weight")
    ('transformer_2', 'blocks.0.self_attn.q', 'down')
    """
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    path, kind, leaf = match.groups()
    # Some trainers write `lora_A` and `lora_B` for the tensors themselves.
    kind = _KINDS.get((kind, leaf or ("weight" if kind.startswith("lora_") else None)))
    if kind is None:
        return None
    expert = None
    while (head := path.partition(".")[0]) in _NEUTRAL_SEGMENTS or head in _EXPERT_SEGMENTS:
        expert = _EXPERT_SEGMENTS.get(head, expert)
        path = path.partition(".")[2]
    if match := _KOHYA.fullmatch(path):
        expert = _EXPERT_SEGMENTS.get(match[1], expert)
        path = match[2]
    return expert, path, kind


def module_names(transformer: nn.Module) -> dict[str, str]:
    """Every name by which a LoRA may call a module -> its name in the transformer (`""` is the transformer itself)."""
    own = [
        name
        for name, _ in transformer.named_modules()
        if not re.search(r"\.base_layer|\.lora_|^parameter_deltas$", name)
    ]
    wan = {_wan_name(name): name for name in own}
    own = {name: name for name in own if name}
    # Wan's names last: the two vocabularies share `norm2` and `norm3`, and only files of Wan's own names have norms.
    return {
        **own,
        **{name.replace(".", "_"): target for name, target in own.items()},
        **wan,
        **{name.replace(".", "_"): target for name, target in wan.items()},
    }


def _wan_name(name: str) -> str:
    for pattern, replacement in _WAN_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


# -- from the tensors of a file to the layers of a transformer --------------------------------------------------------


@dataclass
class _Fit:
    """What a file has for one transformer."""

    lora: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)  # module -> down, up, (bias)
    deltas: dict[str, torch.Tensor] = field(default_factory=dict)  # parameter -> delta
    matched: dict[str, str] = field(default_factory=dict)
    unmatched: dict[str, str] = field(default_factory=dict)


def _fit(transformer: nn.Module, modules: dict[str, dict[str, str]], source: _Source, config: dict[str, Any]) -> _Fit:
    """Fits `modules`, path -> kind -> key, to the transformer."""
    names, fit = module_names(transformer), _Fit()
    for path, keys in modules.items():
        name = names.get(path)
        if name is None:
            fit.unmatched |= dict.fromkeys(keys.values(), "the transformer has no such module")
            continue
        module = transformer.get_submodule(name)
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        tensors = {kind: source.tensors[key] for kind, key in keys.items()}
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            used = _fit_layer(module, tensors, partial(_alpha, config, path, name))
            if used.lora:
                fit.lora[name] = used.lora
        else:
            used = _fit_parameters(module, name, tensors)
            fit.deltas |= used.deltas
        for kind, key in keys.items():
            if kind in used.reasons:
                fit.unmatched[key] = used.reasons[kind]
            else:
                fit.matched[key] = name
    return fit


@dataclass
class _Used:
    lora: dict[str, torch.Tensor] = field(default_factory=dict)
    deltas: dict[str, torch.Tensor] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)  # kind -> why it is not used


def _fit_layer(module: nn.Module, tensors: dict[str, torch.Tensor], alpha_of: Callable[[int], float]) -> _Used:
    """Low-rank factors of a linear layer or convolution, for low-rank and full deltas alike."""
    used = _Used()
    if isinstance(module, nn.Linear):
        inputs, outputs, ones = (module.in_features,), module.out_features, ()
    else:
        inputs, outputs, ones = (
            (module.in_channels, *module.kernel_size),
            module.out_channels,
            (1,) * len(module.stride),
        )
    left = dict(tensors)

    def refuse(kinds: Sequence[str], reason: str) -> None:
        for kind in kinds:
            if left.pop(kind, None) is not None:
                used.reasons[kind] = reason

    refuse(("diff_m",), "a modulation delta of a module without modulation")
    if "down" not in left or "up" not in left:
        refuse(("down", "up", "up_bias", "alpha"), "the other half of the low-rank pair is missing")
    else:
        down, up = left["down"], left["up"]
        rank = down.shape[0]
        if tuple(down.shape[1:]) != inputs or tuple(up.shape) != (outputs, rank, *ones):
            shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
            reason = f"shapes {shapes} do not fit a layer of {inputs} inputs and {outputs} outputs"
            refuse(("down", "up", "up_bias", "alpha"), reason)
    if "diff" in left and "down" in left:
        refuse(("diff",), "a full delta beside a low-rank one")
    if "diff_b" in left and "up_bias" in left:
        refuse(("diff_b",), "a bias delta beside a low-rank bias")
    if "diff" in left and tuple(left["diff"].shape) != (outputs, *inputs):
        refuse(("diff",), f"shape {tuple(left['diff'].shape)} is not the weight's {(outputs, *inputs)}")
    for kind in ("up_bias", "diff_b"):
        if kind in left and tuple(left[kind].shape) != (outputs,):
            refuse((kind,), f"shape {tuple(left[kind].shape)} is not the bias's {(outputs,)}")

    bias = left.get("diff_b")
    if "down" in left:
        alpha = left["alpha"].item() if "alpha" in left else alpha_of(rank)
        if alpha == 0:
            raise ValueError("The LoRA has alpha 0, which switches the layer off; leave the layer out of the file.")
        down, up = _scaled_pair(down, up, alpha / rank)
        if "up_bias" in left:
            bias = left["up_bias"].to(torch.promote_types(left["up_bias"].dtype, torch.float32)) * (alpha / rank)
    elif "diff" in left:
        diff = left["diff"]
        size = math.prod(inputs)
        eye = torch.eye(min(size, outputs), dtype=diff.dtype, device=diff.device)
        if size <= outputs:
            down, up = eye.view(size, *inputs), diff.reshape(outputs, size, *ones)
        else:
            down, up = diff, eye.view(outputs, outputs, *ones)
    elif bias is not None:
        down, up = bias.new_zeros(1, *inputs), bias.new_zeros(outputs, 1, *ones)
    else:
        return used
    used.lora = {"down": down, "up": up} | ({} if bias is None else {"bias": bias})
    return used


def _scaled_pair(down: torch.Tensor, up: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The pair with `scale` in `up`, in a wider type where that of the file would round the product."""
    if scale == 1:
        return down, up
    wide = torch.promote_types(up.dtype, torch.float32)
    scaled = up.to(wide) * scale
    narrow = scaled.to(up.dtype)
    return (down, narrow) if torch.equal(narrow.to(wide), scaled) else (down.to(wide), scaled)


def _fit_parameters(module: nn.Module, name: str, tensors: dict[str, torch.Tensor]) -> _Used:
    """Deltas of a norm (`weight`, `bias`) or of a module with a modulation table."""
    used = _Used()
    parameters = {"diff": "weight", "diff_b": "bias", "diff_m": "scale_shift_table"}
    for kind, tensor in tensors.items():
        parameter = getattr(module, parameters[kind], None) if kind in parameters else None
        if not isinstance(parameter, nn.Parameter):
            used.reasons[kind] = (
                f"the module is a {type(module).__name__} and has nothing that a `{kind}` could change"
            )
        elif parameter.shape != tensor.shape:
            used.reasons[kind] = f"shape {tuple(tensor.shape)} is not the parameter's {tuple(parameter.shape)}"
        else:
            used.deltas[f"{name}.{parameters[kind]}".removeprefix(".")] = tensor
    return used


def _alpha(config: dict[str, Any], path: str, name: str, rank: int) -> float:
    """alpha of a module according to the file's `LoraConfig`; its rank, that is scale 1, when there is none."""
    patterns = config.get("alpha_pattern") or {}
    key = next(
        (key for key in (get_pattern_key(patterns, path), get_pattern_key(patterns, name)) if key in patterns), ""
    )
    alpha = patterns.get(key, config.get("lora_alpha", rank))
    # alpha / sqrt(rank) instead of alpha / rank.
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


# -- files ------------------------------------------------------------------------------------------------------------


@dataclass
class _Source:
    label: str
    tensors: dict[str, torch.Tensor]
    metadata: dict[
        str, Any
    ]  # entries of a PEFT LoraConfig, with "transformer." before the names where diffusers wrote it

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
            "`use_safetensors=False` asks for a pickle, which can run code; LoRAs are read from safetensors."
        )
    if isinstance(weights, dict):
        return [_Source("the state dict", weights, _adapter_config(metadata or {}))]
    if metadata is not None:
        raise ValueError("`metadata` is read from the file itself; pass it only with a state dict.")
    names = [weight_name] if isinstance(weight_name, str) else weight_name
    place = str(weights)
    _refuse_pickles([place, *(names or [])])
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
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = _adapter_config(file.metadata() or {})
    if path.name == _PEFT_WEIGHT_NAME:
        config = path.with_name(_PEFT_CONFIG_NAME)
        if not config.is_file():
            raise ValueError(
                f"{path} is PEFT's, but there is no {_PEFT_CONFIG_NAME} beside it, which holds its alpha."
            )
        metadata = json.loads(config.read_text())
    return _Source(str(path), tensors, metadata)


def _adapter_config(metadata: dict[str, str]) -> dict[str, Any]:
    return json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))


def _choose(names: Sequence[str], place: str) -> list[str]:
    """The LoRA among the files of a folder: one file, or one for each expert."""
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
        _refuse_pickles(names)
        raise ValueError(f"There is no .safetensors file in {place}.")
    raise ValueError(f"{place} has several LoRAs: {found}. Pass `weight_name`, or two of them for the two experts.")


def _refuse_pickles(names: Sequence[str]) -> None:
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise ValueError(f"{pickles} would be read as pickles, which can run code; convert them to safetensors.")


# -- loading ----------------------------------------------------------------------------------------------------------


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
    r"""Loads a LoRA of any known format as an adapter, beside those that are there and with them active.

    Strengths, order and state are then those of the stock functions: `pipe.set_adapters`, `delete_adapters`,
    `fuse_lora`, `unfuse_lora`, `disable_lora`, `unload_lora_weights`.

    With model and group offload on it works, given the pipeline. So it does with sequential offload, unless the file
    has norm or modulation deltas. A compiled model compiles again; `hotswap` avoids that.

    Args:
        pipe_or_transformers: a pipeline with a `transformer` and perhaps a `transformer_2`, a transformer, or a list
            of the high-noise and the low-noise expert.
        weights (path, Hub repository, state dict, or a pair of them):
            Keys that name an expert go to it. Others go to `transformer`. A pair is one for each expert (high noise,
            low noise), `None` leaves an expert out; `(file, file)` loads one file into both. A folder or repository
            with two files named "high" and "low" is such a pair.
        adapter_name (`str`, *optional*): the first free `"default_<n>"` when left out.
        strength (`float`): factor on the adapter.
        strength_2 (`float`, *optional*): the same for `transformer_2`; `strength` when left out.
        strict (`bool`): raise when any key is left over, instead of a warning.
        hotswap (`bool`): replace the weights of the adapter `adapter_name` in place.
        low_cpu_mem_usage (`bool`): as in diffusers.
        file_arguments: `weight_name` (one, or two for the experts), `subfolder`, `revision`, `token`, `cache_dir`,
            `local_files_only`, `force_download`; with a state dict `metadata`, the safetensors header of its file.

    Returns:
        [`LoraReport`]

    Raises:
        `ValueError`: no key fits, some do not and `strict` is set, a pickle, an unsupported method (DoRA, LoHa, LoKr),
            an adapter name in use, or other adapters are fused. The model is then as it was.
    """
    transformers, pipe = _transformers(pipe_or_transformers)
    sources = _placed_sources(weights, file_arguments)
    fits: dict[str, _Fit] = {}
    matched: dict[str, str] = {}
    unmatched: dict[str, str] = {}
    for source, expert in sources:
        _collect(source, expert, transformers, fits, matched, unmatched)
    loaded = [expert for expert in transformers if expert in fits]

    if strength_2 is not None and EXPERTS[1] not in loaded:
        raise ValueError(
            "`strength_2` is given, but nothing is loaded into `transformer_2`: pass `(weights, weights)` for the same "
            "file in both experts, or `(high, low)`."
        )
    for expert in loaded:
        _check_ready(transformers[expert], adapter_name, hotswap, pipe is not None)
    if unmatched:
        text = f"{len(unmatched)} of {len(unmatched) + len(matched)} LoRA keys are left over: {_sample(unmatched)}."
        if strict:
            raise ValueError(text)
        logger.warning(text)
    if len(sources) == 1 and sources[0][1] is None and loaded != list(transformers):
        missing = [expert for expert in transformers if expert not in loaded]
        logger.warning(
            f"The LoRA was loaded into `{loaded[0]}` only: no key names `{missing[0]}`. For both experts pass "
            "`(weights, weights)`, for two files `(high, low)`."
        )

    if adapter_name is None:
        used = {name for transformer in transformers.values() for name in getattr(transformer, "peft_config", {})}
        adapter_name = next(name for n in range(len(used) + 1) if (name := f"default_{n}") not in used)
    strengths = dict(zip(EXPERTS, (strength, strength if strength_2 is None else strength_2)))
    done = []
    try:
        for expert in loaded:
            done.append(expert)
            _load_into(
                transformers[expert], fits[expert], adapter_name, strengths[expert], hotswap, low_cpu_mem_usage, pipe
            )
    except Exception:
        for expert in done if not hotswap else []:
            if adapter_name in getattr(transformers[expert], "peft_config", {}):
                transformers[expert].delete_adapters(adapter_name)
        raise
    return LoraReport(matched, unmatched, dict.fromkeys(loaded, adapter_name))


def _transformers(pipe_or_transformers: Any) -> tuple[dict[str, nn.Module], Any]:
    pipe = None
    if isinstance(pipe_or_transformers, nn.Module):
        experts = {EXPERTS[0]: pipe_or_transformers}
    elif isinstance(pipe_or_transformers, (list, tuple)):
        if len(pipe_or_transformers) > len(EXPERTS):
            raise ValueError(
                f"There are {len(EXPERTS)} experts, but {len(pipe_or_transformers)} transformers were given."
            )
        experts = dict(zip(EXPERTS, pipe_or_transformers))
    else:
        pipe = pipe_or_transformers
        experts = {name: getattr(pipe, name, None) for name in EXPERTS}
    # `torch.compile(model)` is a wrapper; adapters are those of the model inside.
    experts = {name: getattr(expert, "_orig_mod", expert) for name, expert in experts.items() if expert is not None}
    return experts, pipe


def _placed_sources(weights: Any, file_arguments: dict[str, Any]) -> list[tuple[_Source, str | None]]:
    """The files with the expert each is meant for; `None` where the keys decide."""
    if isinstance(weights, (list, tuple)):
        if len(weights) != len(EXPERTS) or all(part is None for part in weights):
            raise ValueError("`weights` is a pair: one for the high-noise and one for the low-noise expert, or None.")
        places = [(part, expert) for part, expert in zip(weights, EXPERTS) if part is not None]
        placed = [(_sources(part, **file_arguments), expert) for part, expert in places]
        if any(len(sources) > 1 for sources, _ in placed):
            raise ValueError(
                "One side of the pair `weights` is itself a pair of files; pass it alone or with `weight_name`."
            )
        return [(sources[0], expert) for sources, expert in placed]
    sources = _sources(weights, **file_arguments)
    return list(zip(sources, EXPERTS)) if len(sources) == len(EXPERTS) else [(sources[0], None)]


def _collect(
    source: _Source,
    expert: str | None,
    transformers: dict[str, nn.Module],
    fits: dict[str, _Fit],
    matched: dict[str, str],
    unmatched: dict[str, str],
) -> None:
    """Sorts the keys of one file by expert and module and fits them; adds to `fits`, `matched` and `unmatched`."""
    foreign = [key for key in source.tensors if _OTHER_METHODS.search(key)]
    if foreign:
        raise ValueError(
            f"{source.label} is not a plain LoRA but a DoRA, LoHa, LoKr, OFT or Tucker file ({foreign[0]}); merge it into "
            "the model's weights or convert it to a LoRA first."
        )
    groups: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    left: dict[str, str] = {}
    named: dict[str, str] = {}
    for key in source.tensors:
        parts = split_key(key)
        if parts is None:
            left[key] = "no known form of a LoRA key"
            continue
        own, path, kind = parts
        if own is not None:
            named[own] = key
        kinds = groups[own or expert or EXPERTS[0]][path]
        if kind in kinds:
            raise ValueError(
                f"{source.label} has two tensors for one place, {kinds[kind]} and {key}: it holds several "
                "adapters. Split it."
            )
        kinds[kind] = key
    for own, key in named.items():
        if expert is not None and own != expert:
            raise ValueError(f"{source.label} is meant for `{expert}`, but its key {key} names `{own}`.")

    found: dict[str, str] = {}
    prefixes = [EXPERTS[0]] if expert is not None else []
    for name, modules in groups.items():
        if name not in transformers:
            keys = [key for kinds in modules.values() for key in kinds.values()]
            left |= dict.fromkeys(keys, f"there is no `{name}`")
            continue
        config = source.config([name, *prefixes])
        if config.get("use_dora"):
            raise ValueError(f"{source.label} is a DoRA by its config, which is not supported.")
        fit = _fit(transformers[name], modules, source, config)
        found |= {key: f"{name}.{module}".rstrip(".") for key, module in fit.matched.items()}
        left |= fit.unmatched
        if fit.matched:
            fits[name] = fit
    if not found:
        raise ValueError(
            f"No key of {source.label} fits: {_sample(left)}. Known formats: {FORMATS}. Is the LoRA made for this "
            "model?"
        )
    # Two files of a pair have the same keys.
    mark = f"{expert}: " if expert is not None else ""
    matched |= {mark + key: module for key, module in found.items()}
    unmatched |= {mark + key: reason for key, reason in left.items()}


def _check_ready(transformer: nn.Module, adapter_name: str | None, hotswap: bool, has_pipe: bool) -> None:
    deltas = getattr(transformer, "parameter_deltas", None)
    if deltas is not None and not getattr(transformer, "peft_config", None):
        deltas.retire()
    names = getattr(transformer, "peft_config", {})
    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    fused = sorted({name for layer in layers for name in layer.merged_adapters})
    if fused:
        raise ValueError(
            f"Adapters {fused} are fused, which keeps others from having any effect: call `unfuse_lora()` first, or "
            "`unload_lora_weights()` to keep them in the weights for good."
        )
    if adapter_name is not None and "." in adapter_name:
        raise ValueError(f"The adapter name {adapter_name!r} has a dot, which PyTorch does not allow in names.")
    if hotswap and adapter_name not in names:
        raise ValueError(f"`hotswap` replaces an adapter, but there is no {adapter_name!r} among {sorted(names)}.")
    if not hotswap and adapter_name in names:
        raise ValueError(
            f"The adapter name {adapter_name!r} is in use; choose another, or `hotswap=True` to replace it."
        )
    if hotswap:
        # PEFT finds the adapter's tensors by a substring and blanks what the new file has no values for.
        others = [
            key
            for key in transformer.state_dict()
            if "lora_" in key and adapter_name in key and key.split(".")[-2] != adapter_name
        ]
        if others:
            raise ValueError(
                f"The adapter name {adapter_name!r} is part of {others[0]}, which hot-swapping would blank; choose "
                "a name that is part of no other."
            )
    if not has_pipe and any(parameter.is_meta for parameter in transformer.parameters()):
        raise ValueError("The transformer's weights are away (sequential offload): pass the pipeline instead of it.")


def _load_into(
    transformer: nn.Module,
    fit: _Fit,
    adapter_name: str,
    strength: float,
    hotswap: bool,
    low_cpu_mem_usage: bool,
    pipe: Any,
) -> None:
    if fit.deltas and any(transformer.get_parameter(name).is_meta for name in fit.deltas):
        raise ValueError(
            "The LoRA changes norms or modulation, and sequential offload has moved them away: load it before "
            "`enable_sequential_cpu_offload()`, or use `enable_model_cpu_offload()`."
        )
    before = next(
        (module.active_adapters for module in transformer.modules() if isinstance(module, BaseTunerLayer)), []
    )
    transformer.load_lora_adapter(
        _peft_state_dict(transformer, fit),
        prefix=None,
        adapter_name=adapter_name,
        metadata=_peft_config(fit),
        hotswap=hotswap,
        low_cpu_mem_usage=low_cpu_mem_usage,
        _pipeline=pipe,
    )
    deltas = getattr(transformer, "parameter_deltas", None)
    if deltas is None and fit.deltas:
        deltas = transformer.parameter_deltas = ParameterDeltas(transformer)
    if deltas is not None:
        deltas.add(adapter_name, fit.deltas)
    active = before if hotswap else [*before, adapter_name]
    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(active)
            # As a number only where it is needed: a compiled model guards on it.
            if strength != 1:
                module.set_scale(adapter_name, strength)
    if deltas is not None:
        deltas.refresh()


def _peft_state_dict(transformer: nn.Module, fit: _Fit) -> dict[str, torch.Tensor]:
    if not fit.lora:
        # PEFT knows an adapter by its layers: one of zeros stands for an adapter of norm and modulation deltas alone.
        name, layer = next(
            (name, module) for name, module in transformer.named_modules() if isinstance(module, nn.Linear)
        )
        zeros = next(iter(fit.deltas.values())).new_zeros
        name = name.removesuffix(".base_layer")
        fit.lora[name] = {"down": zeros(1, layer.in_features), "up": zeros(layer.out_features, 1)}
    # PEFT has biases for all layers of an adapter or for none; missing ones would stay uninitialised.
    biased = any("bias" in tensors for tensors in fit.lora.values())
    state_dict = {}
    for name, tensors in fit.lora.items():
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
        state_dict[f"{name}.lora_A.weight"] = tensors["down"].to(dtype)
        state_dict[f"{name}.lora_B.weight"] = tensors["up"].to(dtype)
        if biased:
            bias = tensors.get("bias", tensors["up"].new_zeros(tensors["up"].shape[0]))
            state_dict[f"{name}.lora_B.bias"] = bias.to(dtype)
    return state_dict


def _peft_config(fit: _Fit) -> dict[str, Any]:
    """`LoraConfig` with scale 1 in every layer, whatever its rank."""
    ranks = {name: tensors["down"].shape[0] for name, tensors in fit.lora.items()}
    ((rank, _),) = Counter(ranks.values()).most_common(1)
    pattern = {f"^{re.escape(name)}": value for name, value in ranks.items() if value != rank}
    return {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": sorted(ranks),
        "lora_bias": any("bias" in tensors for tensors in fit.lora.values()),
    }


def _sample(reasons: dict[str, str], limit: int = 8) -> str:
    shown = [f"{key} ({reason})" for key, reason in list(reasons.items())[:limit]]
    return ", ".join(shown) + (f" and {len(reasons) - limit} more" if len(reasons) > limit else "")


class FactorizedVideoLoraLoaderMixin:
    """LoRA methods of a Wan pipeline that load every known format and leave no expert out unasked.

    Stands before the pipeline class among the bases; everything else is [`~diffusers.loaders.WanLoraLoaderMixin`].
    """

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Weights | Sequence[Weights | None],
        adapter_name: str | None = None,
        hotswap: bool = False,
        load_into_transformer_2: bool = False,
        **kwargs: Any,
    ) -> LoraReport:
        """[`load_lora`] with the names of diffusers.

        Args:
            pretrained_model_name_or_path_or_dict: see `weights` of [`load_lora`].
            adapter_name (`str`, *optional*): as there.
            hotswap (`bool`): as there.
            load_into_transformer_2 (`bool`): the same as `(None, weights)`.
            kwargs: `strength`, `strength_2`, `strict`, `low_cpu_mem_usage` and the file arguments of [`load_lora`].

        Returns:
            [`LoraReport`]
        """
        weights = pretrained_model_name_or_path_or_dict
        if load_into_transformer_2:
            weights = (None, weights)
        return load_lora(self, weights, adapter_name, hotswap=hotswap, **kwargs)

    def fuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """As in diffusers; both experts unless `components` names one."""
        super().fuse_lora(components=components or self._lora_components(), **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """As in diffusers; both experts unless `components` names one."""
        super().unfuse_lora(components=components or self._lora_components(), **kwargs)

    def unload_lora_weights(self) -> None:
        """As in diffusers: takes all adapters out; what is fused stays."""
        super().unload_lora_weights()
        for name in self._lora_components():
            deltas = getattr(getattr(self, name), "parameter_deltas", None)
            if deltas is not None:
                deltas.retire()

    def _lora_components(self) -> list[str]:
        return [name for name in EXPERTS if getattr(self, name, None) is not None]
