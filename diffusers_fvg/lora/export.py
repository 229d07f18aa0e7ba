"""Exports a trained LoRA with diffusers' keys or with Wan's original keys, which ComfyUI reads, or merges it into a base."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..atomic import is_empty, replacing
from ..checks import check_finite
from .anchor_lora import ADAPTER_NAME, WEIGHT_NAME
from .formats import EXPERTS, _wan_name
from .loader import load_lora


FORMATS = ("diffusers", "comfyui")
_KEY = re.compile(r"(transformer|transformer_2)\.(.+)\.lora_([AB])\.weight")
# Suffixes of the files of a two-expert model in programs that load each expert as a separate model.
_NOISE = {"transformer": "high_noise", "transformer_2": "low_noise"}


def read_lora(source: str | Path, average: bool = True) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads a LoRA with diffusers' keys (`transformer.*`, `transformer_2.*`), alpha multiplied in, and its metadata.

    Args:
        source (`str` or `Path`): the file of a finished LoRA; a folder that holds one, such as the `output_dir` of a
            training; or a checkpoint of a training, `checkpoints/<expert>/step_*.safetensors`.
        average (`bool`, *optional*): whether to read the moving average of a checkpoint instead of its weights. A finished
            LoRA is the moving average.

    Raises:
        `ValueError`: there is no such file, or it has other keys or values that are not finite.
    """
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in (WEIGHT_NAME, Path(WEIGHT_NAME).name) if (path / name).is_file()]
        if not found:
            raise ValueError(f"{path} holds no {WEIGHT_NAME}: pass the file of a finished LoRA, or of a checkpoint.")
        path = found[0]
    if not path.is_file() or path.suffix != ".safetensors":
        raise ValueError(f"{path} is not a safetensors file of a LoRA.")
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        metadata = dict(file.metadata() or {})
    if "settings" in metadata and "step" in metadata:
        tensors, metadata = _of_checkpoint(path, tensors, metadata, average)
    other = [key for key in tensors if not _KEY.fullmatch(key)]
    if other or not tensors:
        raise ValueError(f"{path} is not a LoRA that this package trained: its keys are not diffusers' ({other[:1]}).")
    for key, tensor in tensors.items():
        check_finite(f"{path.name}: {key}", tensor)
    return tensors, {name: value for name, value in metadata.items() if name not in ("format", "crc32")}


def _of_checkpoint(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], average: bool
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    settings, expert = json.loads(metadata["settings"]), path.parent.name
    if expert not in EXPERTS or not {"alpha", "rank"} <= settings.keys():
        raise ValueError(f"{path} is not a checkpoint of a LoRA in its folder `checkpoints/<expert>`.")
    # A run without a moving average has only its weights.
    kind = "average" if average and any(key.startswith("average.") for key in tensors) else "weights"
    scale, state = settings["alpha"] / settings["rank"], {}
    for key, tensor in tensors.items():
        if key.startswith(kind + "."):
            name = key.removeprefix(kind + ".").replace(f".{ADAPTER_NAME}.weight", ".weight")
            state[f"{expert}.{name}"] = tensor * scale if ".lora_B." in name else tensor
    form = settings.get("anchor_form", "slot")
    told = {"step": metadata["step"], "weights": kind, "rank": str(settings["rank"])}
    return state, told if form == "slot" else told | {"anchor_form": form}


def export_lora(
    source: str | Path,
    output: str | Path,
    format: Literal["diffusers", "comfyui"] = "comfyui",
    average: bool = True,
) -> list[Path]:
    """Writes a LoRA file for another program.

    `"diffusers"` writes one file, for `load_lora_weights`. `"comfyui"` writes the names of Wan's original code,
    `diffusion_model.blocks.0.self_attn.q.lora_A.weight`, which ComfyUI maps to every layer with such a weight
    (`model_lora_keys_unet` in its `comfy/lora.py`) and which other trainers write. ComfyUI loads a two-expert model as two
    models, so there are two files: `<output>_high_noise` and `<output>_low_noise`.

    Args:
        source, average: see [`read_lora`].
        output (`str` or `Path`): the file to write, ending in `.safetensors`.
        format (`str`, *optional*): `"diffusers"` or `"comfyui"`.

    Returns:
        `list[Path]`: the written files.

    Raises:
        `ValueError`: `format` is unknown, `output` does not end in `.safetensors`, the LoRA is for CogVideoX and
            `format="comfyui"`, or [`read_lora`] refuses `source`.
    """
    output = Path(output)
    if format not in FORMATS:
        raise ValueError(f"`format={format!r}` must be one of {', '.join(FORMATS)}.")
    if output.suffix != ".safetensors":
        raise ValueError(f"`output={str(output)!r}` must end in .safetensors.")
    state, metadata = read_lora(source, average)
    if format == "diffusers":
        return [_write(output, state, metadata)]
    experts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        match = _KEY.fullmatch(key)
        assert match is not None  # `read_lora` refuses other keys.
        expert, module, half = match.groups()
        if not module.startswith(("blocks.", "condition_embedder.", "patch_embedding", "proj_out")):
            raise ValueError(
                f"{source} is not a LoRA of a Wan model ({module}), and ComfyUI reads no other names: use `format='diffusers'`."
            )
        experts.setdefault(expert, {})[f"diffusion_model.{_wan_name(module)}.lora_{half}.weight"] = tensor
    if len(experts) == 1:
        (only,) = experts.values()
        return [_write(output, only, metadata)]
    return [
        _write(output.with_stem(f"{output.stem}_{_NOISE[expert]}"), experts[expert], metadata) for expert in EXPERTS
    ]


def merge_lora(
    source: str | Path,
    base: str | Path,
    output: str | Path,
    average: bool = True,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes a pipeline with the LoRA merged into its transformers, for programs that do not load LoRAs.

    Args:
        source, average: see [`read_lora`].
        base (`str` or `Path`): pipeline that the LoRA was trained on: a folder or a Hub repository.
        output (`str` or `Path`): an empty or new folder.
        dtype (`torch.dtype`, *optional*): dtype of the sum and of the written weights. Small changes of the LoRA are rounded
            away in 16-bit dtypes.

    Raises:
        `ValueError`: `output` is not empty, the LoRA does not fit the base or was trained with `anchor_form="appended"`, or
            [`read_lora`] refuses `source`.
    """
    from diffusers import DiffusionPipeline

    output = Path(output)
    if not is_empty(output):
        raise ValueError(f"`output={str(output)!r}` is not empty: name a new folder.")
    state, metadata = read_lora(source, average)
    if metadata.get("anchor_form", "slot") != "slot":
        raise ValueError(
            f"{source} was trained with `anchor_form={metadata['anchor_form']!r}`, which a merged model cannot record: load it as a LoRA."
        )
    pipe = DiffusionPipeline.from_pretrained(base, dtype=dtype)
    if getattr(pipe, "anchor_lora", None) is not None:
        # The LoRA replaces the anchor LoRA that a pipeline of this package may have.
        pipe.anchor_lora = None
    experts = [getattr(pipe, name, None) for name in EXPERTS]
    load_lora(experts, state, ADAPTER_NAME, strict=True)
    for transformer in experts:
        if transformer is not None and getattr(transformer, "peft_config", None):
            transformer.fuse_lora(adapter_names=[ADAPTER_NAME])
            transformer.unload_lora()
    pipe.save_pretrained(output)


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> Path:
    """Writes a file atomically."""
    with replacing(path) as draft:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, draft, {"format": "pt"} | metadata)
    return path
