"""Base class of models with the weights of a stock diffusers class: they share the weights when converted, and save them so
that the stock class loads them."""

from __future__ import annotations

import copy
import functools
import inspect
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from accelerate import init_empty_weights
from accelerate.hooks import AlignDevicesHook, CpuOffload, SequentialHook, add_hook_to_module
from diffusers import ModelMixin
from diffusers.hooks.hooks import HookRegistry
from diffusers.utils import logging
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..model_facts import MODELS


if TYPE_CHECKING:
    # At runtime, the base class is the stock class that follows this one among the bases.
    from diffusers import ModelMixin as StockModel
else:
    StockModel = object

Init = TypeVar("Init", bound=Callable[..., None])

logger = logging.get_logger(__name__)


def configured_as(stock_class: type[ModelMixin]) -> Callable[[Init], Init]:
    """Decorates an `__init__` so that diffusers reads the config from the signature of the stock class, in every version."""

    def decorated(init: Init) -> Init:
        functools.update_wrapper(init, stock_class.__init__)
        return init

    return decorated


class StockWeights(StockModel):
    """Loading, converting and saving of a model whose config and state dict are those of `stock_class`.

    List it before the stock class among the bases.
    """

    stock_class: type[ModelMixin]
    # Config key of the stock class -> the further input of a model that sets it, in addition to noisy latents and text.
    further_inputs: dict[str, str] = {}

    @classmethod
    def check_text_to_video(
        cls, config: Mapping[str, Any], name: str, latent_channels: int | None = None, text_width: int | None = None
    ) -> None:
        """Checks that a model has only noisy latents and text as inputs.

        Args:
            config (`Mapping`): config of the model; defaults of the stock class may be missing.
            name (`str`): name of the model in messages.
            latent_channels (`int`, *optional*): latent channels of the pipeline's VAE.
            text_width (`int`, *optional*): width of the embeddings of the pipeline's text encoder.

        Raises:
            `ValueError`: the model is an image-to-video or control model, or does not fit the VAE or the text encoder.
        """
        declared = inspect.signature(cls.stock_class.__init__).parameters
        settings = {key: config.get(key, value.default) for key, value in declared.items()}
        channels = settings["in_channels"]
        made = settings["out_channels"] or channels
        further = [text for key, text in cls.further_inputs.items() if settings[key] is not None]
        if channels != made or further:
            known = [facts.repository for facts in MODELS.values() if facts.anchored_class == cls.__name__]
            raise ValueError(
                f"{name} takes {' and '.join([f'{channels} channels', *further])}, but latents have {made}: it is an "
                "image-to-video or control model, whose first frame is a separate input. Use a text-to-video model, in which "
                f"anchors are frames of the video, such as {', '.join(known)}."
            )
        if latent_channels not in (None, channels):
            raise ValueError(
                f"{name} takes {channels} channels, but the VAE's latents have {latent_channels}: load both from one "
                "repository."
            )
        # The key of Wan, or of CogVideoX.
        width = settings.get("text_dim", settings.get("text_embed_dim"))
        if text_width not in (None, width):
            raise ValueError(
                f"{name} takes text embeddings of width {width}, but the text encoder's have {text_width}: load both "
                "from one repository."
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Self:
        """Loads the model with the arguments of [`~diffusers.ModelMixin.from_pretrained`].

        Raises:
            `ValueError`: the path is a pipeline's folder, which diffusers passes if the component's folder is missing.
        """
        if "subfolder" not in kwargs and os.path.isfile(
            os.path.join(pretrained_model_name_or_path, "model_index.json")
        ):
            raise ValueError(
                f"{pretrained_model_name_or_path} is a pipeline whose `transformer` folder is missing; download or copy it "
                "again, or pass the model's own folder."
            )
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_stock(cls, transformer: ModelMixin, name: str = "transformer") -> Self:
        """Converts a stock model to this class. A model of this class is returned unchanged.

        The layers with weights and adapters are shared, also if they are quantized, cast or offloaded: no weights are copied.
        The modules that contain them are copied, so that new adapters, adapter strengths, processors or windows of one model
        do not affect the other. Changes of the weights affect both: fusing or hotswapping an adapter, a cast, training.

        Args:
            transformer (`ModelMixin`): a model of `stock_class`.
            name (`str`): name of the model in messages.

        Raises:
            `ValueError`: the model is of another class, or has fused adapters or custom attention processors.
        """
        inner = getattr(transformer, "_orig_mod", transformer)
        if isinstance(inner, cls):
            return transformer
        if not isinstance(inner, nn.Module):
            is_class = isinstance(transformer, type)
            what = f"the class {transformer.__name__}" if is_class else f"a {type(transformer).__name__}"
            raise ValueError(f"`{name}` must be a {cls.stock_class.__name__}, but is {what}.")
        if inner is not transformer or any(module._compiled_call_impl is not None for module in inner.modules()):
            logger.warning(
                f"The {type(inner).__name__} is taken over without its compilation; compile the pipeline's transformer instead."
            )
        transformer = inner
        if not isinstance(transformer, cls.stock_class):
            raise ValueError(f"`{name}` must be a {cls.stock_class.__name__}, but is a {type(transformer).__name__}.")
        fused = {name for layer in _adapter_layers(transformer) for name in layer.merged_adapters}
        if fused:
            raise ValueError(
                f"The {cls.stock_class.__name__} has the fused adapters {sorted(fused)}, which unfusing in one model would remove "
                "from both: call `unload_lora_weights()` to keep them permanently, or `unfuse_lora()`."
            )
        holders = _copied_holders(transformer)
        model = holders[transformer]
        model.__class__ = cls
        model._convert()
        for holder, copied in holders.items():
            _copy_hooks(holder, copied, holders)
        return model

    def _convert(self) -> None:
        """Changes the classes of a stock model's modules to those of this model. Subclasses define it."""
        raise NotImplementedError

    def fuse_qkv_projections(self) -> None:
        """Fuses the query, key and value projections, as in diffusers.

        Raises:
            `ValueError`: the model has adapters, which fused projections would ignore.
        """
        if any(not layer.merged for layer in _adapter_layers(self)):
            raise ValueError(
                f"Fused projections would ignore the adapters {sorted(self.peft_config)}: call `fuse_lora()` and "
                "`unload_lora_weights()` first, which merge them into the weights."
            )
        super().fuse_qkv_projections()

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        """Merges the active or the named adapters into the weights, as in diffusers.

        Raises:
            `ValueError`: weights are on the meta device (sequential offload) or quantized; nothing is fused then.
        """
        for layer in _adapter_layers(self):
            weight = getattr(getattr(layer, "base_layer", None), "weight", None)
            problem = None if weight is None else _fusing_problem(weight)
            if problem is not None:
                raise ValueError(f"LoRAs cannot be fused into this {type(self).__name__}: {problem}.")
        super().fuse_lora(lora_scale, safe_fusing, adapter_names)

    def set_adapters(
        self,
        adapter_names: list[str] | str,
        weights: float | dict | list[float] | list[dict] | list[None] | None = None,
    ) -> None:
        """Sets active adapters and their strengths, as in diffusers.

        Raises:
            `ValueError`: adapters are fused, so that strengths would have no effect.
        """
        fused = sorted({name for layer in _adapter_layers(self) for name in layer.merged_adapters})
        if fused:
            raise ValueError(
                f"The adapters {fused} are fused, so new strengths and other adapters would have no effect: call `unfuse_lora()` "
                "before `set_adapters`."
            )
        super().set_adapters(adapter_names, weights)

    def unload_lora(self) -> None:
        """Removes all adapters, as in diffusers. Fused ones stay in the weights, which no longer are those of a Hub repository."""
        if any(layer.merged for layer in _adapter_layers(self)):
            self.__dict__.pop("hub_reference", None)
        super().unload_lora()

    # `wraps` keeps the signature, by which a pipeline decides what it passes; otherwise no `variant` would be saved.
    @functools.wraps(ModelMixin.save_pretrained)
    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Saves the weights in the stock format, including fused adapters. Other adapters are saved as separate files.

        The arguments are those of [`~diffusers.ModelMixin.save_pretrained`].
        """
        if not getattr(self, "peft_config", None):
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        base = {
            name.replace(".base_layer.", "."): tensor
            for name, tensor in self.state_dict().items()
            if ".lora_" not in name
        }
        # Deltas of norms and modulation tables change the weights; unless they are fused, the original values are saved.
        if hasattr(self, "parameter_deltas") and not self.parameter_deltas.merged:
            base |= self.parameter_deltas.originals
        with init_empty_weights(include_buffers=False):
            model = type(self).from_config(self.config)
        model.load_state_dict(base, assign=True)
        model.save_pretrained(save_directory, *args, **kwargs)


def _adapter_layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _fusing_problem(weight: torch.Tensor) -> str | None:
    """Returns why an adapter cannot be merged into a weight; `None` if it can."""
    if weight.is_meta:
        return (
            "sequential offload keeps its weights off the device; fuse before `enable_sequential_cpu_offload()`, or use "
            "`enable_model_cpu_offload()`"
        )
    # Quantized weights have other classes, some of which report the dtype that they were quantized from.
    if type(weight) is not nn.Parameter or weight.dtype.itemsize < 2:
        kind = weight.dtype if type(weight) is nn.Parameter else type(weight).__name__
        return f"its weights are quantized ({kind}), and fusing would round them again; fuse before quantizing"
    return None


# Attributes that hooks and `compile` set on an instance and that are bound to it. A copy gets new hooks instead.
_BOUND = ("forward", "_old_forward", "_hf_hook", "_diffusers_hook", "_compiled_call_impl")


def _copied_holders(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Copies the modules that contain other modules; the layers without submodules are shared.

    Returns:
        `dict`: module -> copy, with the model itself last. Parameters and buffers are the same objects.
    """
    holders: dict[nn.Module, nn.Module] = {}

    def copied(module: nn.Module) -> nn.Module:
        # An empty container is copied, too: adapters may be added to it.
        if not module._modules and not isinstance(module, (nn.ModuleDict, nn.ParameterDict)):
            return module
        if module not in holders:
            other = module.__class__.__new__(module.__class__)
            state = {name: value for name, value in vars(module).items() if name not in _BOUND}
            # Only exact types are copied: the config is a dict subclass that cannot be changed.
            state = {
                name: copy.copy(value) if type(value) in (dict, OrderedDict, set, list) else value
                for name, value in state.items()
            }
            other.__dict__ = state
            other._modules = {name: child and copied(child) for name, child in module._modules.items()}
            holders[module] = other
        return holders[module]

    copied(model)
    return holders


def _copy_hooks(module: nn.Module, copied: nn.Module, holders: dict[nn.Module, nn.Module]) -> None:
    """Adds copies of a module's hooks to its copy: of diffusers (group offload, casting) and accelerate (other offload)."""
    registry: Any = getattr(module, "_diffusers_hook", None)
    for name in [] if registry is None else registry._hook_order:
        hook = copy.copy(registry.hooks[name])
        if hasattr(hook, "group"):
            # The leaders are the modules whose calls load and offload the group's weights.
            hook.group = copy.copy(hook.group)
            for leader in ("onload_leader", "offload_leader"):
                led = getattr(hook.group, leader)
                setattr(hook.group, leader, holders.get(led, led))
        HookRegistry.check_if_exists_or_initialize(copied).register_hook(hook, name)
    hook = getattr(module, "_hf_hook", None)
    if isinstance(hook, (AlignDevicesHook, CpuOffload, SequentialHook)):
        # The weights are already placed, so the hook need not initialize them again.
        hook = copy.copy(hook)
        hook.init_hook = lambda module: module
        add_hook_to_module(copied, hook)
