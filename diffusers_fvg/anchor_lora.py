"""The anchor LoRA as a component: it has a folder of its own and is put into the transformers by the pipeline."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


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

    def __init__(self, state_dict: dict[str, torch.Tensor], metadata: dict[str, str] | None = None):
        self.state_dict = state_dict
        self.metadata = metadata or {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path) -> AnchorLora:
        path = Path(pretrained_model_name_or_path) / WEIGHT_NAME
        if not path.is_file():
            raise ValueError(f"No {WEIGHT_NAME} in {pretrained_model_name_or_path}.")
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            return cls({key: file.get_tensor(key) for key in keys}, file.metadata())

    def save_pretrained(self, save_directory: str | Path) -> None:
        path = Path(save_directory) / WEIGHT_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {key: value.contiguous() for key, value in self.state_dict.items()}
        save_file(tensors, path, metadata={"format": "pt", **self.metadata})

    def load_into(self, transformer: torch.nn.Module, prefix: str) -> None:
        """Injects the tensors under `prefix` (`"transformer"` or `"transformer_2"`) as the adapter `"anchor"`.

        Raises:
            `ValueError`: no tensor carries the prefix.
        """
        if not any(key.startswith(prefix + ".") for key in self.state_dict):
            raise ValueError(f"The anchor LoRA has no weights for `{prefix}`: its keys begin with {self._prefixes()}.")
        transformer.load_lora_adapter(dict(self.state_dict), prefix=prefix, adapter_name=ADAPTER_NAME)

    def _prefixes(self) -> list[str]:
        return sorted({key.split(".")[0] for key in self.state_dict})
