"""The pipeline that the flags name."""

from __future__ import annotations

import argparse
from pathlib import Path


def _rewriter(arguments: argparse.Namespace):
    """What `--rewriter` names: a name, or what asks a server; `None` without it."""
    is_server = (arguments.rewriter or "").startswith(("http://", "https://"))
    if not is_server:
        if arguments.rewriter_model is not None or arguments.rewriter_api_key_env is not None:
            raise ValueError(
                "--rewriter-model and --rewriter-api-key-env belong to a server: name it with --rewriter URL."
            )
        return arguments.rewriter
    if arguments.rewriter_model is None:
        raise ValueError("--rewriter needs --rewriter-model NAME, the server's name of the chat model.")
    from .. import ChatEndpoint, FirstFrameRewriter

    endpoint = ChatEndpoint(arguments.rewriter, arguments.rewriter_model, arguments.rewriter_api_key_env)
    return FirstFrameRewriter(endpoint=endpoint)


def load_pipeline(arguments: argparse.Namespace):
    import diffusers
    import torch
    import transformers

    from ..embedded import EMBEDDED_FOLDER
    from ..recipes import load

    # One bar, that of the stages: loading would draw one for every component.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    if arguments.model is not None and Path(arguments.model).exists() and not Path(arguments.model).is_dir():
        raise ValueError(f"--model {arguments.model} is a file; give a folder or a Hub repository.")
    # One that is passed keeps the model's own from being loaded.
    parts = {name: getattr(arguments, name) for name in ("composer", "lora") if name in arguments}
    parts |= {"rewriter": _rewriter(arguments)} if "rewriter" in arguments else {}
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    if arguments.model is None:
        # Its operations are too small to be split: more threads gain nothing, and on a busy machine they wait for each other.
        torch.set_num_threads(1)
        dtype = dtype or torch.float32
    pipe = load(EMBEDDED_FOLDER if arguments.model is None else arguments.model, dtype=dtype, **parts)
    device = arguments.device
    if device is None and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator().type
    pipe.set_progress_bar_config(disable=arguments.quiet)
    return pipe.to(device) if device else pipe
