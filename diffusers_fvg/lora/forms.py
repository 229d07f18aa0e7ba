"""Checks that a pipeline passes anchors to the model in the form (`"slot"` or `"appended"`) that a LoRA was trained with."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from safetensors import safe_open


def check_form(pipe: Any, labels: Sequence[str], metadata: Mapping[str, str] | None = None) -> None:
    """Refuses a LoRA whose `anchor_form` differs from the pipeline's.

    Args:
        pipe: a pipeline, or `None` if the LoRA is loaded into transformers without a pipeline.
        labels (`Sequence[str]`): paths of the LoRA's files.
        metadata (mapping, *optional*): metadata of the file that a state dict was read from.

    Raises:
        `ValueError`: the forms differ; the message names both and the fix.
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
            f"The LoRA was trained with `anchor_form={other!r}`, but this pipeline uses `anchor_form={own!r}`, "
            "the form of its `anchor_lora`: assign `pipe.anchor_lora = AnchorLora.from_pretrained(file)`, or load the pipeline with "
            "it, `diffusers_fvg.load(name, lora=file)`."
        )
