"""The anchor LoRA as a pipeline component with its own folder; the pipeline loads it into its transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from ..atomic import replacing
from ..loading.safety import check_folder, refuse_pickles
from .files import read_safetensors
from .loader import EXPERTS, load_lora


# Name of the adapter, as in `pipe.set_adapters("anchor", 1.3)` and `get_active_adapters`.
ADAPTER_NAME = "anchor"
# In a subfolder of the component: if a component's folder holds a safetensors file without a standard name, diffusers
# concludes that the repository has no safetensors weights at all.
WEIGHT_NAME = "weights/pytorch_lora_weights.safetensors"


class AnchorLora:
    """LoRA weights in diffusers' key format, with the file's metadata.

    This is a separate component because diffusers downloads only known names of weight files from a component's folder, and
    would leave out a LoRA in a transformer's folder.

    Args:
        state_dict (`dict[str, torch.Tensor]`): tensors, with keys `transformer.*` and `transformer_2.*`.
        metadata (`dict[str, str]`, *optional*): header of the safetensors file.
    """

    # Hub repository and revision that the LoRA was loaded from, if any.
    reference: dict[str, str | None]

    def __init__(self, state_dict: dict[str, torch.Tensor], metadata: dict[str, str] | None = None):
        self.state_dict = state_dict
        self.metadata = metadata or {}

    @property
    def form(self) -> str:
        """How training passed anchors to the model, `anchor_form` in the metadata: `"slot"` (default) or `"appended"`."""
        return self.metadata.get("anchor_form", "slot")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path) -> AnchorLora:
        """Loads an anchor LoRA from a folder or a file.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): the component's folder, with
                `weights/pytorch_lora_weights.safetensors`, as training writes it; a folder with that file itself, as LoRA
                repositories have it; or a safetensors file.

        Raises:
            `ValueError`: the file is missing or damaged, or the folder holds pickles instead.
        """
        given = Path(pretrained_model_name_or_path)
        if given.is_file():
            refuse_pickles([str(given)])
            return cls(*read_safetensors(given))
        check_folder(pretrained_model_name_or_path)
        for path in (given / WEIGHT_NAME, given / Path(WEIGHT_NAME).name):
            if path.is_file():
                return cls(*read_safetensors(path))
        refuse_pickles(str(file) for file in given.rglob("*"))
        raise ValueError(f"{pretrained_model_name_or_path} has no {WEIGHT_NAME}, the file of an anchor LoRA.")

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes `weights/pytorch_lora_weights.safetensors` with its metadata into a folder, created if it is missing."""
        tensors = {key: value.contiguous() for key, value in self.state_dict.items()}
        with replacing(Path(save_directory) / WEIGHT_NAME) as draft:
            save_file(tensors, draft, metadata={"format": "pt", **self.metadata})

    def load_into(self, transformer: torch.nn.Module, prefix: str) -> None:
        """Loads the tensors under `prefix` (`"transformer"` or `"transformer_2"`) as the adapter `"anchor"`.

        Alpha is read from the tensors or else from the metadata.

        Raises:
            `ValueError`: no key has the prefix, or a tensor with the prefix fits no layer.
        """
        own = {key: tensor for key, tensor in self.state_dict.items() if key.startswith(prefix + ".")}
        if not own:
            raise ValueError(f"The anchor LoRA has no weights for `{prefix}`: its keys begin with {self._prefixes()}.")
        experts = [transformer if name == prefix else None for name in EXPERTS]
        load_lora(experts, own, ADAPTER_NAME, strict=True, metadata=self.metadata)

    def _prefixes(self) -> list[str]:
        return sorted({key.split(".")[0] for key in self.state_dict})
