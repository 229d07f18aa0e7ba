"""The form in which an anchor LoRA was given its anchors in training, and a pipeline that gives them in another: see `animate/placing.py`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from safetensors import safe_open


def check_form(pipe: Any, labels: Sequence[str], metadata: Mapping[str, str] | None = None) -> None:
    """Refuses a LoRA that was trained with its anchors in another form than the pipeline gives them.

    Args:
        pipe: a pipeline, or `None` where a LoRA is for transformers alone.
        labels (`Sequence[str]`): paths of the LoRA's files.
        metadata (mapping, *optional*): of a state dict's file.

    Raises:
        `ValueError`: naming the forms and the way.
    """
    own, told = getattr(pipe, "anchor_form", None), [metadata or {}]
    if own is None:
        return
    for label in labels:
        if os.path.isfile(label):
            with safe_open(label, framework="pt") as file:
                told.append(file.metadata() or {})
    other = next((values["anchor_form"] for values in told if values.get("anchor_form", own) != own), None)
    if other is not None:
        raise ValueError(
            f"The LoRA was trained with `anchor_form={other!r}`, and this pipeline gives its model anchors in the form {own!r}, "
            "that of its `anchor_lora`: assign `pipe.anchor_lora = AnchorLora(tensors, metadata)`, or load the pipeline with it, "
            "`diffusers_fvg.load(name, lora=file)`."
        )
