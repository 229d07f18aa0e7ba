"""Files of LoRAs, loaded into the embedded pipeline; none of them changes a weight of it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bad_rows import Row, Shared
from safetensors.torch import save

from diffusers_fvg import AnchorLora, load_lora


LAYER = "transformer.blocks.0.attn1.to_q"


def pair(rank: int = 2, down: int = 0, up: int = 0, name: str = LAYER, dtype: torch.dtype = torch.float32) -> dict:
    """A LoRA of one layer; `down` and `up` are added to what the layer takes and gives."""
    return {
        f"{name}.lora_A.weight": torch.zeros(rank, WIDTH + down, dtype=dtype),
        f"{name}.lora_B.weight": torch.zeros(WIDTH + up, rank, dtype=dtype),
    }


# Of the embedded transformer.
WIDTH = 144


def file(content: bytes) -> Callable[[Shared], Any]:
    return lambda shared: load_lora(shared.pipe, shared.write("lora.safetensors", content), "tried")


def header(values: Any, data: bytes = b"") -> bytes:
    text = values if isinstance(values, bytes) else json.dumps(values).encode()
    return struct.pack("<Q", len(text)) + text + data


def nan_pair() -> dict:
    tensors = pair()
    next(iter(tensors.values()))[0, 0] = float("nan")
    return tensors


NO_FILE = ("lora.safetensors is not a safetensors file, or is damaged",)
WHOLE = save(pair())
FILES = [
    ("0 bytes", b"", NO_FILE),
    ("text", b"this is no LoRA\n" * 10, NO_FILE),
    ("a pickle", b"\x80\x04cos\nsystem\n(S'true'\ntR.", NO_FILE),
    ("half a file", WHOLE[: len(WHOLE) // 2], NO_FILE),
    ("half a header", WHOLE[:40], NO_FILE),
    ("a header of 2**62 bytes", struct.pack("<Q", 2**62) + b"{}", NO_FILE),
    ("a header that is not JSON", header(b"{" * 100), NO_FILE),
    ("a header of deep lists", header(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"), NO_FILE),
    ("an unknown dtype", header({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 1]}}, b"\0"), NO_FILE),
    ("places beyond the end", header({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}), NO_FILE),
    ("a shape of 2**60", header({"a": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 4]}}, bytes(4)), NO_FILE),
    ("a negative shape", header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)), NO_FILE),
    ("no tensors", save({}), ("lora.safetensors", "fits")),
    ("other keys", save({"model.weight": torch.zeros(2, 2)}), ("No key of", "model.weight", "Known formats")),
    ("one of a pair", save({f"{LAYER}.lora_A.weight": torch.zeros(2, WIDTH)}), ("lora_A",)),
    ("another width", save(pair(down=1)), ("fits",)),
    ("another height", save(pair(up=1)), ("fits",)),
    ("a layer that is not there", save(pair(name="transformer.blocks.99.attn1.to_q")), ("fits", "blocks.99")),
    ("another model's keys", save(pair(name="unet.down_blocks.0.attn.to_q")), ("fits", "down_blocks")),
    ("NaN", save(nan_pair()), ("not finite",)),
    ("whole numbers", save(pair(dtype=torch.int32)), ("fits", "int32")),
    ("a DoRA", save(pair() | {f"{LAYER}.lora_magnitude_vector": torch.zeros(WIDTH)}), ("DoRA", "merge it")),
    (
        "a LoKr",
        save({f"{LAYER}.lokr_w1": torch.zeros(2, 2), f"{LAYER}.lokr_w2": torch.zeros(2, 2)}),
        ("LoKr", "merge it"),
    ),
    ("alpha 0", save(pair() | {f"{LAYER}.alpha": torch.tensor(0.0)}), ("alpha 0", "leave the layer out")),
    ("alpha NaN", save(pair() | {f"{LAYER}.alpha": torch.tensor(float("nan"))}), ("alpha",)),
    ("rank 0", save(pair(rank=0)), ("rank",)),
    ("broken metadata", save(pair(), {"lora_adapter_metadata": "{"}), ("lora.safetensors",)),
]
ROWS = [Row(f"lora: {title}", file(content), words) for title, content, words in FILES]


def call(title: str, *words: str, error: type = ValueError, **arguments: Any) -> Row:
    """`load_lora` of the good LoRA with these arguments."""

    def give(shared: Shared) -> None:
        given = {"weights": shared.write("lora.safetensors", WHOLE), "adapter_name": "tried"} | arguments
        load_lora(shared.pipe, **given)

    return Row(f"lora: {title}", give, words, error)


ROWS += [
    call(
        "no such file",
        "/no/such/lora.safetensors",
        "no LoRA file or folder",
        weights="/no/such/lora.safetensors",
        error=Exception,
    ),
    call("a number for weights", "weights", weights=3),
    call("a name with a dot", "'a.b'", "dot", adapter_name="a.b"),
    call("strength='x'", "strength", "finite number", strength="x"),
    call("strength=nan", "strength", "finite number", strength=float("nan")),
    call("strength=True", "strength", "finite number", strength=True),
    call("strength=1e30", "strength", "-100 to 100", strength=1e30),
    call("strength_2=1", "strength_2", "transformer_2", strength_2=1.0),
    call("an empty state dict", "fits", weights={}),
    call("a state dict of numbers", "tensor", weights={f"{LAYER}.lora_A.weight": 3}),
]


def folder(title: str, fill: Callable[[Path], None], *words: str) -> Row:
    def give(shared: Shared) -> None:
        place = shared.folder / "anchor_lora"
        (place / "weights").mkdir(parents=True)
        fill(place)
        AnchorLora.from_pretrained(place).load_into(shared.pipe.transformer, "transformer")

    return Row(f"lora: folder {title}", give, words)


def weights_in(content: bytes) -> Callable[[Path], Any]:
    return lambda place: (place / "weights" / "pytorch_lora_weights.safetensors").write_bytes(content)


ROWS += [
    folder("of nothing", lambda place: None, "has no weights/pytorch_lora_weights.safetensors"),
    folder("of a pickle", lambda place: (place / "lora.bin").write_bytes(b"\x80\x04."), "pickles", "convert"),
    folder("of half a file", weights_in(WHOLE[:100]), "not a safetensors file, or is damaged"),
    folder("of other keys", weights_in(save({"a": torch.zeros(1)})), "no weights for `transformer`", "['a']"),
    Row(
        "lora: of an unknown form",
        lambda shared: setattr(shared.pipe, "anchor_lora", AnchorLora(pair(), {"anchor_form": "sideways"})),
        ("anchor_form='sideways'", "use a LoRA that was trained with it"),
    ),
]
