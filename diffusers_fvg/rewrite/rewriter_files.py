"""Loads a rewriter's folder: its settings, and the chat model in the folder or on the Hub."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..loading.arguments import call_argument, hub_arguments
from ..loading.component_config import read_config
from ..loading.files import fetch
from ..loading.safety import check_folder, safetensors_only
from .chat_endpoint import host_of
from .generation import chat_files


CONFIG_NAME = "rewriter_config.json"


def load_rewriter(
    path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    quantization_config=None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
    """Loads the model, the tokenizer and the settings of a rewriter: see [`FirstFrameRewriter.from_pretrained`]."""
    folder = Path(path)
    if folder.is_file() and folder.suffix == ".gguf":
        folder, gguf_file = folder.parent, folder.name
    is_chat_model = folder.is_dir() and not (folder / CONFIG_NAME).is_file() and _is_chat_model(folder, gguf_file)
    if folder.is_dir() and revision is not None or (gguf_file is not None and folder.is_dir() and not is_chat_model):
        raise ValueError(
            f"`revision` and `gguf_file` do not apply to {str(path)!r}, a folder that names its own; leave them out."
        )
    config: dict[str, Any]
    if is_chat_model:
        config = {"gguf_file": _gguf_in(folder, gguf_file)}
    elif folder.is_dir():
        config = read_rewriter_config(folder / CONFIG_NAME)
    else:
        config = {"model": str(path), "revision": revision, "gguf_file": gguf_file}
    reference = {key: config.pop(key, None) for key in ("model", "revision", "gguf_file")}
    reference = {key: value for key, value in reference.items() if value is not None}
    source = {"gguf_file": reference["gguf_file"]} if "gguf_file" in reference else {}
    model_path, tokenizer_path = folder / "model", folder / "tokenizer"
    if is_chat_model:
        # No reference: `save_pretrained` must write the weights, because a local path does not exist on other machines.
        model_path, tokenizer_path, reference = folder, folder, {}
    if reference:
        hub = hub_arguments(cache_dir=cache_dir, local_files_only=local_files_only or None, token=token)
        model_path = tokenizer_path = fetch(
            reference["model"], reference.get("revision"), partial(chat_files, **source), "The rewriter", **hub
        )[0]
    for place in (model_path,) if reference else (folder, model_path, tokenizer_path):
        check_folder(place)
    try:
        with safetensors_only(model_path):
            model, found = AutoModelForCausalLM.from_pretrained(
                model_path,
                dtype=dtype or "auto",
                quantization_config=quantization_config,
                device_map=call_argument("device_map"),
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **source,
            )
            # Without a value for `trust_remote_code`, transformers would ask at the terminal.
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, trust_remote_code=trust_remote_code, **source)
    except OSError as error:
        # transformers does not always name the model, and users of a pipeline have not named it themselves.
        raise OSError(f"The rewriter's model {str(model_path)!r} cannot be loaded: {error}") from error
    if found["missing_keys"]:
        raise ValueError(
            f"The rewriter's model {str(model_path)!r} lacks the weights {sorted(found['missing_keys'])[:4]}; load a complete "
            "checkpoint."
        )
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if source and getattr(quantizer, "packed_modules", True) == {}:
        # All GGUF weights were dequantized, but transformers refuses to save a model that it still marks as quantized.
        quantizer.remove_quantization_config(model)
    return model, tokenizer, {"reference": reference or None, **config}


def _is_chat_model(folder: Path, gguf_file: str | None) -> bool:
    return (folder / "config.json").is_file() or _gguf_in(folder, gguf_file) is not None


def _gguf_in(folder: Path, gguf_file: str | None) -> str | None:
    """Returns the file `gguf_file` of a folder, or the only GGUF file of a folder without a `config.json`, or `None`."""
    found = sorted(file.name for file in folder.glob("*.gguf"))
    if gguf_file is not None:
        if gguf_file not in found:
            raise ValueError(f"`gguf_file={gguf_file!r}` is not in {str(folder)!r}; choose one of {found}.")
        return gguf_file
    if len(found) > 1 and not (folder / "config.json").is_file():
        raise ValueError(f"The folder {str(folder)!r} holds {found}; name one in `gguf_file`.")
    return found[0] if found and not (folder / "config.json").is_file() else None


def read_rewriter_config(path: Path) -> dict[str, Any]:
    """Reads a `rewriter_config.json`.

    Raises:
        `ValueError`: the file is missing, names an endpoint, or is not valid as in
            [`~loading.component_config.read_config`].
    """
    if not path.is_file():
        raise ValueError(f"The folder {str(path.parent)!r} is not a rewriter: it has no {CONFIG_NAME}.")
    of_endpoint = {"endpoint", "api_key_env"}
    settings = {"instruction", "examples", "answer_format", "judge", "max_new_tokens"}
    known = {"model", "revision", "gguf_file", *settings, *of_endpoint}
    config = read_config(path, known, "model", {"revision", "gguf_file"})
    if config.keys() & of_endpoint:
        # Otherwise the author of a file could receive every prompt and the value of any environment variable.
        raise ValueError(
            f"{str(path)!r} names an endpoint at {host_of(config.get('endpoint'))!r}, to which prompts would be sent. Only you "
            "can name one: pass `rewriter=FirstFrameRewriter(endpoint=ChatEndpoint(url, model, api_key_env=...))`, or to `fvg` "
            "`--rewriter URL`. `rewriter=None` loads without a rewriter."
        )
    return config
