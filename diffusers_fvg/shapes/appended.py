"""Anchors at the exact frame: an anchor LoRA trained with anchors behind the clip, against the one in the clip's own latent
frames. All numbers are synthetic.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ..embedded import load_embedded
from .train import Part, train_lora, train_parts


def train_appended(folder: Path) -> None:
    """Trains the embedded base's anchor LoRA again, as the one that ships but for `anchor_form="appended"`; writes
    `folder/anchor_lora`. What was interrupted continues."""
    folder.mkdir(parents=True, exist_ok=True)
    pipe = load_embedded()
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer")} | {"base": pipe.transformer}
    for name, part in parts.items():
        if not (folder / name).is_dir():
            part.save_pretrained(folder / name)
    train_parts(folder, {"lora": Part(partial(train_lora, anchor_form="appended", checkpoint_every=100))})
