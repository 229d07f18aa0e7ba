"""Weights of a stock diffusers class under one of ours: shared when converted, and saved so that the stock class loads them."""

from __future__ import annotations

import os
from typing import Any, Self

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin


class StockWeights:
    """Loading and saving of a model whose configuration and state dict are those of `stock_class`.

    Stands before the stock class among the bases.
    """

    stock_class: type[ModelMixin]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Self:
        """Loads the model; arguments are those of [`~diffusers.ModelMixin.from_pretrained`].

        Raises:
            `ValueError`: a pipeline's folder: diffusers passes it on where the component's own folder is missing.
        """
        if "subfolder" not in kwargs and os.path.isfile(
            os.path.join(pretrained_model_name_or_path, "model_index.json")
        ):
            raise ValueError(
                f"{pretrained_model_name_or_path} is a pipeline whose `transformer` folder is missing; download or copy it "
                "again, or name the model's own folder."
            )
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_stock(cls, transformer: ModelMixin) -> Self:
        """The same model as this class, sharing its weights: no copy is made. One of this class is returned as it is.

        Raises:
            `ValueError`: anything but a `stock_class`, or one with adapters (load them afterwards).
        """
        if isinstance(transformer, cls):
            return transformer
        if not isinstance(transformer, cls.stock_class):
            raise ValueError(
                f"`transformer` must be a {cls.stock_class.__name__}, but is a {type(transformer).__name__}."
            )
        if getattr(transformer, "peft_config", None):
            raise ValueError(
                f"The {cls.stock_class.__name__} has adapters {sorted(transformer.peft_config)}; load them after the pipeline "
                "is made."
            )
        return cls._sharing(transformer.config, transformer.state_dict())

    @classmethod
    def _sharing(cls, config: dict[str, Any], state_dict: dict[str, torch.Tensor]) -> Self:
        with init_empty_weights(include_buffers=False):
            model = cls.from_config(config)
        model.load_state_dict(state_dict, assign=True)
        return model.eval()

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Saves the base weights in the stock format. Adapters are left out: they are files of their own.

        Arguments are those of [`~diffusers.ModelMixin.save_pretrained`].
        """
        if not getattr(self, "peft_config", None):
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        base = {
            name.replace(".base_layer.", "."): tensor
            for name, tensor in self.state_dict().items()
            if ".lora_" not in name
        }
        # Deltas of norms and modulation tables act on the weights themselves.
        if hasattr(self, "parameter_deltas"):
            base |= self.parameter_deltas.originals
        self._sharing(self.config, base).save_pretrained(save_directory, *args, **kwargs)
