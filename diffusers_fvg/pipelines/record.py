"""The record of a video, from which [`~pipelines.replay`] generates it again and which people can read in its file.

It holds only texts, numbers and names: no keys, URLs, local paths or images.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer

from .. import __version__
from ..animate.anchor import Anchor
from ..lora.deltas import ParameterDeltas
from ..publishing.privacy import hub_name
from ..rewrite.storyboard import Moment
from .seeds import Seed


if TYPE_CHECKING:
    from .request import VideoRequest
    from .stages import FactorizedStages

VERSION = 1
MODEL_KINDS = ("embedded", "recipe", "folder", "hub")
# Arguments that are the same for all videos of a call and are recorded unchanged.
SETTINGS = (
    "mode",
    "height",
    "width",
    "num_frames",
    "fps",
    "guidance_rescale",
    "use_dynamic_cfg",
    "max_sequence_length",
    "anchor_decode",
    "num_moments",
    "rewriter_max_new_tokens",
    "composer_num_inference_steps",
    "composer_guidance_scale",
)
# Arguments that are not recorded: tensors, functions and arbitrary objects. The record lists those that were given.
NOT_RECORDED = (
    "latents",
    "prompt_embeds",
    "negative_prompt_embeds",
    "prompt_embeds_2",
    "negative_prompt_embeds_2",
    "callback_on_step_end",
    "animator_kwargs",
)
_COMMIT = re.compile(r"[\\/]snapshots[\\/]([0-9a-f]{40})(?=[\\/]|$)")


def make_records(
    pipe: FactorizedStages, request: VideoRequest, moments: list[list[Moment]] | None, seeds: list[dict[str, Seed]]
) -> list[dict[str, Any]]:
    """Returns the record of each video of a call.

    Args:
        pipe: the pipeline that generated the videos.
        request: the request as passed to stage 3.
        moments: moments of each prompt; `None` if stages 1 and 2 were skipped.
        seeds: seeds of each video.
    """
    of_call = _settings(pipe, request) | surroundings(pipe)
    if moments is None or request.first_frame_prompt is not None or request.storyboard is not None:
        # The rewriter wrote none of the captions.
        of_call["rewriter"] = None
        of_call["hub_revisions"].pop("rewriter", None)
    hashes: dict[int, list[str]] = {}
    records = []
    for video in range(request.num_videos):
        prompt = video // request.num_videos_per_prompt
        record: dict[str, Any] = {"record_version": VERSION}
        for name in ("prompt", "motion_prompt", "negative_prompt"):
            texts = getattr(request, name)
            record[name] = None if texts is None else texts[prompt]
        is_storyboard, written = request.mode == "storyboard", None if moments is None else moments[prompt]
        record["first_frame_prompt"] = written and written[0].caption
        board = written if is_storyboard else None
        record["storyboard"] = board and [{"caption": moment.caption, "time": moment.time} for moment in board]
        negative = None if written is None else request.composer_negative_prompt
        record["composer_negative_prompt"] = negative[video] if isinstance(negative, list) else negative
        record |= of_call
        if written is not None:
            record["composer"] = composer_call(pipe, record)
        # An interrupted call may have anchors for only some of the videos.
        anchors = (request.anchors or [])[video : video + 1]
        record["anchors"] = [_anchor(anchor, hashes) for anchor in anchors[0]] if anchors else []
        record["seeds"] = seeds[video]
        records.append(json.loads(json.dumps(record, default=_number)))
    return records


def surroundings(pipe: FactorizedStages) -> dict[str, Any]:
    """Returns everything but the arguments that affects the result of a call: model, adapters, dtypes, device and versions."""
    parts = {name: getattr(part, "dtype", None) for name, part in pipe.components.items() if name != "rewriter"}
    experts, origin = pipe._experts(), getattr(pipe, "origin", {})
    told = {
        "pipeline": type(pipe).__name__,
        "model": origin.get("repository") or model_name(pipe.name_or_path),
        "model_kind": _model_kind(pipe),
        "revision": origin.get("revision") or _revision(pipe),
        "hub_revisions": dict(sorted(hub_revisions(pipe).items())),
        "rewriter": rewriter_name(pipe.rewriter),
        "adapters": {name: found for name, expert in experts.items() if (found := _adapters(expert))},
        "adapter_hashes": {name: found for name, expert in experts.items() if (found := _adapter_hashes(expert))},
        "quantization": {name: kind for name, expert in experts.items() if (kind := _quantization(expert))},
        "vae_tiling": bool(getattr(pipe.vae, "use_tiling", False)),
        "light_decoder": None if pipe.light_decoder is None else pipe.light_decoder.config.name,
        "frame_rate": pipe.call_defaults["frame_rate"],
        "device": pipe._execution_device.type,
        "dtypes": {name: str(dtype).removeprefix("torch.") for name, dtype in parts.items() if dtype is not None},
        "versions": versions(),
    }
    return json.loads(json.dumps(told, default=_number))


def versions() -> dict[str, str]:
    """Returns the versions of the packages that affect a video."""
    modules = {"diffusers": diffusers, "torch": torch, "transformers": transformers}
    return {"diffusers-fvg": __version__} | {name: str(module.__version__) for name, module in modules.items()}


def model_name(name: str | os.PathLike | None) -> str | None:
    """Returns a Hub repository unchanged; for a folder or another path, only its last component."""
    if name is None:
        return None
    return hub_name(str(name)) or re.sub(r"[^\w .()+@-]", "_", Path(name).resolve().name)[:255] or None


def _model_kind(pipe: DiffusionPipeline) -> str | None:
    """Returns the kind of the model's name, one of `MODEL_KINDS`: a folder may have the name of a recipe."""
    origin = getattr(pipe, "origin", {})
    if kind := origin.get("kind"):
        return kind
    name = origin.get("repository") or pipe.name_or_path
    return None if name is None else "hub" if hub_name(str(name)) else "folder"


def hub_revisions(pipe: DiffusionPipeline) -> dict[str, str]:
    """Returns the Hub repositories of a pipeline's components: name -> `"org/name@commit"`.

    Components that were loaded from the pipeline's own repository are listed once, as `"pipeline"`.
    """
    found = {}
    for name, component in {"pipeline": pipe, **pipe.components}.items():
        reference = getattr(component, "origin", None) or getattr(component, "hub_reference", None)
        reference = reference or getattr(component, "reference", None) or {}
        repository, revision = reference.get("repository") or reference.get("model"), reference.get("revision")
        if repository is not None:
            found[name] = repository if revision is None else f"{repository}@{revision}"
    return found


def composer_call(pipe: FactorizedStages, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the class of the text-to-image pipeline and the arguments of its call, including defaults."""
    if pipe.composer is None:
        return None
    names = ("composer_num_inference_steps", "composer_guidance_scale", "composer_negative_prompt")
    inner = pipe.composer.pipeline
    arguments = pipe.composer._arguments_of(inner, 1, *(record[name] for name in names))
    return {"pipeline": type(inner).__name__, **{name: _plain(value) for name, value in arguments.items()}}


def picture_hash(picture: torch.Tensor) -> str:
    """Returns the SHA-256 of an image `(3, H, W)` in [0, 1], computed from its 8-bit RGB values in row-major order."""
    pixels = (picture * 255).round().byte().permute(1, 2, 0).contiguous()
    return hashlib.sha256(pixels.numpy(force=True).tobytes()).hexdigest()


def _settings(pipe: FactorizedStages, request: VideoRequest) -> dict[str, Any]:
    """Returns the arguments of a call, with the model's defaults for those that were left out."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    settings = {name: getattr(request, name) for name in SETTINGS if name in parameters}
    sampling, (scale, scale_2) = request.sampling(pipe), request.guidance(pipe)
    settings["preset"] = None if sampling is None else sampling.name
    settings["scheduler"] = scheduler_config(pipe.scheduler) if sampling is None else None
    settings |= {"num_inference_steps": request.steps(pipe), "guidance_scale": scale}
    if boundary_ratio(pipe) is not None:
        settings["guidance_scale_2"] = scale_2
    kwargs = request.attention_kwargs or {}
    settings["lora_scale"] = kwargs.get("scale")
    settings["not_recorded"] = [name for name in NOT_RECORDED if getattr(request, name) is not None]
    settings["not_recorded"] += ["attention_kwargs"] if kwargs.keys() - {"scale"} else []
    return settings


def _anchor(anchor: Anchor, hashes: dict[int, list[str]]) -> dict[str, Any]:
    """Returns the record of an anchor. Videos of one prompt share their images, so each image is hashed once."""
    if id(anchor.image) not in hashes:
        # The request has decoded the images to tensors.
        pictures = anchor.image if isinstance(anchor.image, list) else [anchor.image]
        hashes[id(anchor.image)] = [picture_hash(picture) for picture in pictures]
    return {"frame_index": anchor.frame_index, "strength": anchor.strength, "sha256": hashes[id(anchor.image)]}


def _adapters(model: torch.nn.Module) -> dict[str, Any]:
    """Returns the strength of each adapter: 1 as trained, 0 if switched off; a list if layers differ."""
    found: dict[str, set[float]] = {}
    for layer in (module for module in model.modules() if isinstance(module, BaseTunerLayer)):
        for name, scaling in layer.scaling.items():
            trained = 1.0
            if name in getattr(layer, "r", {}):
                rank = layer.r[name]
                trained = layer.lora_alpha[name] / (math.sqrt(rank) if layer.use_rslora.get(name) else rank)
            is_on = name in layer.merged_adapters or name in layer.active_adapters and not layer.disable_adapters
            found.setdefault(Path(name).name, set()).add(round(scaling / trained, 6) if is_on else 0.0)
    return {name: values.pop() if len(values) == 1 else sorted(values) for name, values in found.items()}


def _adapter_hashes(model: torch.nn.Module) -> dict[str, str]:
    """Returns the first 16 hex digits of the SHA-256 of each adapter's loaded weights: names, alphas and bytes.

    Adapters with weights on the meta device (accelerate's sequential offload) are left out.
    """
    hashes: dict[str, Any] = {}
    absent: set[str] = set()
    for place, layer in getattr(model, "_orig_mod", model).named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        for name, tensors in _adapter_tensors(layer).items():
            found = hashes.setdefault(name, hashlib.sha256())
            found.update(repr((place, getattr(layer, "lora_alpha", {}).get(name))).encode())
            for key, tensor in sorted(tensors.items()):
                found.update(repr((key, str(tensor.dtype), tuple(tensor.shape))).encode())
                if tensor.is_meta:
                    absent.add(name)
                    continue
                found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return {Path(name).name: found.hexdigest()[:16] for name, found in hashes.items() if name not in absent}


def _adapter_tensors(layer: BaseTunerLayer) -> dict[str, dict[str, torch.Tensor]]:
    """Returns the weights of each adapter in a layer: adapter name -> tensor name -> tensor."""
    if isinstance(layer, ParameterDeltas):
        return layer.deltas
    found: dict[str, dict[str, torch.Tensor]] = {}
    for kind in layer.adapter_layer_names:
        for name, part in getattr(layer, kind, {}).items():
            tensors = {"": part} if isinstance(part, torch.Tensor) else dict(part.named_parameters())
            found.setdefault(name, {}).update({f"{kind}.{key}": tensor for key, tensor in tensors.items()})
    return found


def _quantization(model: torch.nn.Module) -> str | None:
    """Returns the storage format of the weights if it differs from the compute dtype, else `None`."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        config = quantizer.quantization_config
        method = getattr(config.quant_method, "value", config.quant_method)
        if type(getattr(config, "quant_type", None)).__name__ == "Float8DynamicActivationFloat8WeightConfig":
            return f"{method}-fp8-dynamic"
        return f"{method}-4bit" if getattr(config, "load_in_4bit", False) else str(method)
    for module in model.modules():
        hooks = getattr(module, "_diffusers_hook", None)
        casting = None if hooks is None else hooks.get_hook("layerwise_casting")
        if casting is not None:
            return str(casting.storage_dtype).removeprefix("torch.")
    return None


def boundary_ratio(pipe: FactorizedStages) -> float | None:
    """Returns `boundary_ratio` of the pipeline or of its animator's pipeline; `None` for a model with one expert."""
    animator = getattr(pipe, "animator", None)
    return (pipe if animator is None else animator.pipeline).config.get("boundary_ratio")


def scheduler_config(scheduler: Any) -> dict[str, Any]:
    """Returns a scheduler's class and config."""
    config = {name: _plain(value) for name, value in scheduler.config.items() if not name.startswith("_")}
    return {"class": type(scheduler).__name__, **config}


def rewriter_name(rewriter: Any) -> str | None:
    """Returns the name of the chat model, on the Hub or on a server, without the server's URL."""
    if rewriter is None:
        return None
    if rewriter.endpoint is not None:
        return model_name(rewriter.endpoint.model)
    return (rewriter.reference or {}).get("model") or hub_name(str(rewriter.model.config.name_or_path)) or None


def _revision(pipe: DiffusionPipeline) -> str | None:
    """Returns the commit of the repository that the pipeline was loaded from, read from paths in the Hub's cache."""
    if not hub_name(str(pipe.name_or_path)):
        return None
    for component in pipe.components.values():
        origin = getattr(component, "name_or_path", None) or getattr(
            getattr(component, "config", None), "_name_or_path", ""
        )
        if found := _COMMIT.search(str(origin)):
            return found[1]
    return None


def _plain(value: Any) -> Any:
    """Converts a value to JSON: paths to their last component, objects of other types to the name of their class."""
    if isinstance(value, str):
        return Path(value).name if os.path.isabs(value) else value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return _number(value) if isinstance(value, np.generic) else type(value).__name__


def _number(value: Any) -> Any:
    """Converts a NumPy scalar to a Python number."""
    return value.item()
