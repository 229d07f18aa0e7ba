"""The anchor LoRA as a component: it has a folder of its own and is put into the transformers by the pipeline."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from ..atomic import replacing
from ..loading.safety import check_folder, refuse_pickles
from .files import read_safetensors
from .loader import EXPERTS, load_lora


# The adapter's name in `pipe.set_adapters("anchor", 1.3)` and in `get_active_adapters`.
ADAPTER_NAME = "anchor"
# One folder deeper than the component: a Hub download takes a component's folder that holds a safetensors file of no
# standard name for a sign that the repository has no safetensors weights at all.
WEIGHT_NAME = "weights/pytorch_lora_weights.safetensors"


class AnchorLora:
    """LoRA weights in diffusers' key format (`transformer.*`, `transformer_2.*`), with the file's metadata.

    A component of its own because a component's folder on the Hub is downloaded by the names of known weight files: a LoRA
    beside a transformer's weights would be left behind.
    """

    # Where it came from on the Hub, if it did.
    reference: dict[str, str | None]

    def __init__(self, state_dict: dict[str, torch.Tensor], metadata: dict[str, str] | None = None):
        self.state_dict = state_dict
        self.metadata = metadata or {}

    @property
    def form(self) -> str:
        """How anchors were given to the model in training, its metadata's `anchor_form`: `"slot"` or `"appended"`."""
        return self.metadata.get("anchor_form", "slot")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path) -> AnchorLora:
        check_folder(pretrained_model_name_or_path)
        path = Path(pretrained_model_name_or_path) / WEIGHT_NAME
        if not path.is_file():
            refuse_pickles(str(file) for file in Path(pretrained_model_name_or_path).rglob("*"))
            raise ValueError(f"No {WEIGHT_NAME} in {pretrained_model_name_or_path}.")
        return cls(*read_safetensors(path))

    def save_pretrained(self, save_directory: str | Path) -> None:
        tensors = {key: value.contiguous() for key, value in self.state_dict.items()}
        with replacing(Path(save_directory) / WEIGHT_NAME) as draft:
            save_file(tensors, draft, metadata={"format": "pt", **self.metadata})

    def load_into(self, transformer: torch.nn.Module, prefix: str) -> None:
        """Loads the tensors under `prefix` (`"transformer"` or `"transformer_2"`) as the adapter `"anchor"`.

        Alpha counts, whether it is among the tensors or in the metadata.

        Raises:
            `ValueError`: no tensor carries the prefix, or one that does fits no layer.
        """
        own = {key: tensor for key, tensor in self.state_dict.items() if key.startswith(prefix + ".")}
        if not own:
            raise ValueError(f"The anchor LoRA has no weights for `{prefix}`: its keys begin with {self._prefixes()}.")
        experts = [transformer if name == prefix else None for name in EXPERTS]
        load_lora(experts, own, ADAPTER_NAME, strict=True, metadata=self.metadata)

    def _prefixes(self) -> list[str]:
        return sorted({key.split(".")[0] for key in self.state_dict})
