"""Maps LoRA keys of every known format to the modules of a transformer. Pure functions; `loader.py` loads the result.

A key consists of prefixes, a module, and a kind of tensor. Modules are called by diffusers' names, by Wan's original names,
or by either with underscores for dots. The tables of names are derived from the transformer itself, so that one code path
covers all formats and every layer:

    diffusers     transformer.blocks.0.attn1.to_q.lora_A.weight, transformer_2.blocks...
    PEFT          base_model.model.blocks.0.attn1.to_q.lora_A.default.weight, with adapter_config.json
    DiffSynth     blocks.0.self_attn.q.lora_A.default.weight, [diffusion_model.]
    ComfyUI       diffusion_model.blocks.0.self_attn.q.lora_A.weight (diffusion-pipe, ai-toolkit; also `alpha`)
    ai-toolkit    diffusion_model.transformer_1.blocks..., diffusion_model.transformer_2.blocks...
    musubi, kohya lora_unet_blocks_0_self_attn_q.lora_down.weight, .lora_up.weight, .alpha (VideoX-Fun: lora_unet__;
                  others: lora_transformer_)
    LightX2V      diffusion_model.blocks.0.self_attn.q.lora_down.weight, and deltas `.diff`, `.diff_b`, `.diff_m`

diffusers' converters are not used: the one for musubi fails on a file that lacks a layer of a block, the one for ComfyUI drops
norm and modulation deltas, and there is none for DiffSynth, PEFT and keys without a prefix. There is none for CogVideoX, whose
trainers (finetrainers, cogvideox-factory, VideoX-Fun) write diffusers' names. DiffSynth's names for CogVideoX are not
supported: `blocks.0.attn1.to_q` is also diffusers' name of a layer of Wan2.2-5B of the same width.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import nn


EXPERTS = ("transformer", "transformer_2")
FORMATS = (
    "diffusers (transformer.*, transformer_2.*), PEFT (base_model.model.*), DiffSynth (blocks.*.lora_A.default.weight), "
    "ComfyUI and ai-toolkit (diffusion_model.*), musubi and kohya (lora_unet_*, lora_transformer_*), "
    "LightX2V (lora_down, diff, diff_b, diff_m)"
)

# Leading segments of a key without meaning, and those that name an expert (high noise first).
_NEUTRAL_SEGMENTS = {"base_model", "model", "diffusion_model", "unet", "pipe", "dit", "module", "transformer"}
_EXPERT_SEGMENTS = {
    **dict.fromkeys(("transformer_1", "high_noise", "high_noise_model"), EXPERTS[0]),
    **dict.fromkeys(("transformer_2", "dit2", "low_noise", "low_noise_model"), EXPERTS[1]),
}
_KOHYA = re.compile(r"lora_(?:unet|transformer)_+(?:(high_noise|low_noise)(?:_model)?_)?(.+)")
# Module, kind, adapter name (only in keys of PEFT and DiffSynth), and "weight" or "bias", which some trainers omit.
_KEY = re.compile(
    r"(.+?)\.(?:lora_(A|B|down|up)(?:\.(?!(?:weight|bias)$)[^.]+)?(?:\.(weight|bias))?|(alpha|diff_b|diff_m|diff))"
)
_KINDS = {"A": "down", "down": "down", "B": "up", "up": "up"}
# CogVideoX's original training code (SAT) saves a whole checkpoint as a pickle, with alpha in another file.
_SAT_KEY = re.compile(r"\.matrix_[AB]\.\d+$")
# Tensors of other methods. Ignoring them would give another model.
_OTHER_METHODS = re.compile(r"\.(dora_scale|lora_magnitude_vector|lora_mid|hada_\w+|lokr_\w+|oft_\w+)\b")

# diffusers' name of a module -> its name in Wan's original code, which most trainers use.
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
    # The modulation of the output layer is a parameter of the transformer itself.
    (r"^$", "head"),
)


def split_key(key: str) -> tuple[str | None, str, str] | None:
    """Splits a key into expert (`None` if the key names none), module path and kind; returns `None` for an unknown form.

    >>> split_key("diffusion_model.transformer_2.blocks.0.self_attn.q.lora_A.weight")
    ('transformer_2', 'blocks.0.self_attn.q', 'down')
    """
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    path, half, leaf, kind = match.groups()
    kind = kind or _KINDS[half] + ("_bias" if leaf == "bias" else "")
    if kind == "down_bias":
        return None
    expert = None
    while (head := path.partition(".")[0]) in _NEUTRAL_SEGMENTS or head in _EXPERT_SEGMENTS:
        expert = _EXPERT_SEGMENTS.get(head, expert)
        path = path.partition(".")[2]
    if match := _KOHYA.fullmatch(path):
        expert = _EXPERT_SEGMENTS.get(match[1], expert)
        path = match[2]
    return expert, path, kind


def refuse_other_methods(label: str, keys: Iterable[str]) -> None:
    """Raises `ValueError` for keys of methods other than plain LoRA, and for files of CogVideoX's original code."""
    for key in keys:
        if _OTHER_METHODS.search(key):
            raise ValueError(
                f"{label} is not a plain LoRA but a DoRA, LoHa, LoKr, OFT or Tucker file ({key}); merge it into the model's "
                "weights or convert it to a LoRA first."
            )
        if _SAT_KEY.search(key):
            raise ValueError(
                f"{label} is a LoRA of CogVideoX's own training code ({key}), which keeps its alpha elsewhere: export it with "
                "`tools/export_sat_lora_weight.py` of zai-org/CogVideo and load it with `strength=alpha / rank`."
            )


def module_names(transformer: nn.Module) -> dict[str, str]:
    """Maps every name of a module in LoRA files to its name in the transformer (`""` is the transformer itself)."""
    names = [
        name
        for name, _ in transformer.named_modules()
        if not re.search(r"\.base_layer|\.lora_|^parameter_deltas$", name)
    ]
    wan = {_wan_name(name): name for name in names}
    own = {name: name for name in names if name}
    # Wan's names take precedence: both have `norm2` and `norm3`, and only files with Wan's names have norms.
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


@dataclass
class LoraFit:
    """The tensors of a LoRA file for one transformer.

    Args:
        pairs (`dict[str, tuple]`): module -> low-rank factors `(down, up)`, with `alpha / rank` multiplied into `up`.
        deltas (`dict[str, torch.Tensor]`): parameter -> tensor that is added to it.
        matched (`dict[str, str]`): key -> module.
        unmatched (`dict[str, str]`): key -> reason why it is not used.
    """

    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    deltas: dict[str, torch.Tensor] = field(default_factory=dict)
    matched: dict[str, str] = field(default_factory=dict)
    unmatched: dict[str, str] = field(default_factory=dict)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Returns the pairs in diffusers' key format, without prefix."""
        tensors: dict[str, torch.Tensor] = {}
        for name, (down, up) in self.pairs.items():
            dtype = torch.promote_types(down.dtype, up.dtype)
            tensors |= {f"{name}.lora_A.weight": down.to(dtype), f"{name}.lora_B.weight": up.to(dtype)}
        return tensors

    def peft_config(self) -> dict[str, Any]:
        """Returns the entries of a `LoraConfig` with scale 1 in every layer, whatever its rank."""
        ranks = {name: down.shape[0] for name, (down, _) in self.pairs.items()}
        ((rank, _),) = Counter(ranks.values()).most_common(1)
        pattern = {f"^{re.escape(name)}": value for name, value in ranks.items() if value != rank}
        alphas = {"lora_alpha": rank, "alpha_pattern": dict(pattern)}
        return {"r": rank, "rank_pattern": pattern, "target_modules": sorted(ranks), **alphas}


def fit_tensors(
    transformer: nn.Module,
    modules: dict[str, dict[str, str]],
    tensors: dict[str, torch.Tensor],
    config: dict[str, Any],
) -> LoraFit:
    """Matches the tensors of a file to the modules of a transformer, and checks their shapes.

    * Low-rank factors become a pair. `alpha / rank` is multiplied in, so that the scale of the PEFT layer is always 1: PEFT
      loses the alpha of a hotswapped adapter when its strength is changed.
    * `diff` (a full delta) of a linear layer or convolution also becomes a pair, exactly: `diff` times an identity matrix.
    * `diff` of a norm, `diff_m` (modulation) and all biases become deltas of parameters.

    Args:
        transformer (`nn.Module`): the model; its weights are not read.
        modules (`dict`): module path -> kind -> key, from [`split_key`].
        tensors (`dict`): key -> tensor.
        config (`dict`): entries of PEFT's `LoraConfig`, for an alpha that is not among the tensors.

    Raises:
        `ValueError`: alpha is 0, which switches a layer off, or not finite.
    """
    names, fit = module_names(transformer), LoraFit()
    for path, keys in modules.items():
        name = names.get(path)
        if name is None or name in fit.matched.values():
            reason = "the transformer has no such module" if name is None else f"other keys go to {name} as well"
            fit.unmatched |= dict.fromkeys(keys.values(), reason)
            continue
        module = transformer.get_submodule(name)
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        given = {kind: tensors[key] for kind, key in keys.items()}
        refused: dict[str, str] = {}
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            _fit_layer(fit, name, module, given, refused, lambda rank: _alpha(config, path, name, rank))  # noqa: B023
        _fit_parameters(fit, name, module, given, refused)
        for kind, key in keys.items():
            if kind in refused:
                fit.unmatched[key] = refused[kind]
            else:
                fit.matched[key] = name
    return fit


def _fit_layer(
    fit: LoraFit,
    name: str,
    module: nn.Module,
    given: dict[str, torch.Tensor],
    refused: dict[str, str],
    alpha_of: Callable[[int], float],
) -> None:
    """Adds the low-rank factors of a linear layer or convolution, also for full deltas. Leaves biases in `given`."""
    ones: tuple[int, ...]
    if isinstance(module, nn.Linear):
        inputs, outputs, ones = (module.in_features,), module.out_features, ()
    else:
        inputs, outputs = (module.in_channels, *module.kernel_size), module.out_channels
        ones = (1,) * len(module.stride)

    down, up, alpha, diff = (given.pop(kind, None) for kind in ("down", "up", "alpha", "diff"))
    reason = None
    if down is None or up is None:
        reason = "the other half of the low-rank pair is missing"
    elif not down.is_floating_point() or not up.is_floating_point():
        reason = f"their dtypes {down.dtype} and {up.dtype} are not floating-point"
    elif not len(down):
        reason = "their rank is 0"
    elif tuple(down.shape[1:]) != inputs or tuple(up.shape) != (outputs, rank := down.shape[0], *ones):
        shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
        reason = f"shapes {shapes} do not fit a layer of {inputs} inputs and {outputs} outputs"
    if reason is not None:
        refused |= dict.fromkeys(("down", "up", "alpha", "up_bias"), reason)
        given.pop("up_bias", None)
    else:
        alpha = alpha_of(rank) if alpha is None else alpha.item() if alpha.numel() == 1 else alpha.tolist()
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise ValueError(f"The LoRA's alpha of {name} is {alpha!r:.60}, which is not a finite number.")
        if alpha == 0:
            raise ValueError("The LoRA has alpha 0, which switches the layer off; leave the layer out of the file.")
        fit.pairs[name] = _scaled_pair(down, up, alpha / rank)
        if "up_bias" in given:
            given["up_bias"] = given["up_bias"].float() * (alpha / rank)

    if diff is None:
        return
    if name in fit.pairs:
        refused["diff"] = "a full delta beside a low-rank one"
    elif tuple(diff.shape) != (outputs, *inputs):
        refused["diff"] = f"shape {tuple(diff.shape)} is not the weight's {(outputs, *inputs)}"
    else:
        size = math.prod(inputs)
        eye = torch.eye(min(size, outputs), dtype=diff.dtype, device=diff.device)
        if size <= outputs:
            fit.pairs[name] = eye.view(size, *inputs), diff.reshape(outputs, size, *ones)
        else:
            fit.pairs[name] = diff, eye.view(outputs, outputs, *ones)


def _fit_parameters(
    fit: LoraFit, name: str, module: nn.Module, given: dict[str, torch.Tensor], refused: dict[str, str]
) -> None:
    """Adds deltas of the parameters of a norm, of a modulation table, and of biases."""
    parameters = {"diff": "weight", "diff_b": "bias", "up_bias": "bias", "diff_m": "scale_shift_table"}
    for kind, tensor in given.items():
        parameter = getattr(module, parameters[kind], None) if kind in parameters else None
        target = f"{name}.{parameters.get(kind)}".removeprefix(".")
        if not isinstance(parameter, nn.Parameter):
            refused[kind] = f"the module is a {type(module).__name__} and has no parameter for `{kind}`"
        elif parameter.shape != tensor.shape:
            refused[kind] = f"shape {tuple(tensor.shape)} is not the parameter's {tuple(parameter.shape)}"
        elif target in fit.deltas:
            refused[kind] = "a second delta of one bias"
        else:
            fit.deltas[target] = tensor


def _scaled_pair(down: torch.Tensor, up: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiplies `scale` into `up`; returns float32 (or float64) if the file's dtype would round the product."""
    if scale == 1:
        return down, up
    # `promote_types` does not support 8-bit floats.
    wide = torch.float32 if up.dtype.itemsize == 1 else torch.promote_types(up.dtype, torch.float32)
    scaled = up.to(wide) * scale
    narrow = scaled.to(up.dtype)
    return (down, narrow) if torch.equal(narrow.to(wide), scaled) else (down.to(wide), scaled)


def _alpha(config: dict[str, Any], path: str, name: str, rank: int) -> float:
    """Returns alpha of a module from the file's `LoraConfig`; the rank (scale 1) if there is none."""
    patterns = config.get("alpha_pattern") or {}
    key = next((key for call in (path, name) if (key := get_pattern_key(patterns, call)) in patterns), "")
    alpha = patterns.get(key, config.get("lora_alpha", rank))
    # rsLoRA scales by alpha / sqrt(rank) instead of alpha / rank.
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
