"""Weights of a stock diffusers class under one of ours: shared when converted, and saved so that the stock class loads them."""

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
    # Of which class it is, the stock class behind this one says.
    from diffusers import ModelMixin as StockModel
else:
    StockModel = object

Init = TypeVar("Init", bound=Callable[..., None])

logger = logging.get_logger(__name__)


def configured_as(stock_class: type[ModelMixin]) -> Callable[[Init], Init]:
    """Decorates an `__init__`: the configuration is read from its signature, which is the stock one, whatever the version of
    diffusers.
    """

    def decorated(init: Init) -> Init:
        functools.update_wrapper(init, stock_class.__init__)
        return init

    return decorated


class StockWeights(StockModel):
    """Loading and saving of a model whose configuration and state dict are those of `stock_class`.

    Stands before the stock class among the bases.
    """

    stock_class: type[ModelMixin]
    # Setting of the stock class -> what a model that has it is fed beside noisy latents and a text.
    further_inputs: dict[str, str] = {}

    @classmethod
    def check_text_to_video(
        cls, config: Mapping[str, Any], name: str, latent_channels: int | None = None, text_width: int | None = None
    ) -> None:
        """Checks that a model takes noisy latents and a text, and nothing else.

        Args:
            config (`Mapping`): its configuration, which may leave out what is the stock class's default.
            name (`str`): what errors call the model.
            latent_channels (`int`, *optional*): of the VAE beside it.
            text_width (`int`, *optional*): numbers for each token of the text encoder beside it.

        Raises:
            `ValueError`: an image-to-video or control model, or one of other latents or texts.
        """
        declared = inspect.signature(cls.stock_class.__init__).parameters
        settings = {key: config.get(key, value.default) for key, value in declared.items()}
        channels = settings["in_channels"]
        made = settings["out_channels"] or channels
        further = [text for key, text in cls.further_inputs.items() if settings[key] is not None]
        if channels != made or further:
            known = [facts.repository for facts in MODELS.values() if facts.anchored_class == cls.__name__]
            raise ValueError(
                f"{name} takes {' and '.join([f'{channels} channels', *further])}, and latents have {made}: it is an "
                "image-to-video or control model, whose first frame comes through inputs of its own. Use a text-to-video model, "
                f"to which anchors are frames of the video, such as {', '.join(known)}."
            )
        if latent_channels not in (None, channels):
            raise ValueError(
                f"{name} takes {channels} channels, and the VAE's latents have {latent_channels}: they are of different models."
            )
        # Wan's name of it, and CogVideoX's.
        width = settings.get("text_dim", settings.get("text_embed_dim"))
        if text_width not in (None, width):
            raise ValueError(
                f"{name} takes texts of width {width}, and the text encoder's have {text_width}: they are of different models."
            )

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
    def from_stock(cls, transformer: ModelMixin, name: str = "transformer") -> Self:
        """The same model as this class. One of this class is returned as it is.

        Layers are taken over as they are, quantized, cast or offloaded, with their weights and adapters: nothing is copied. What
        holds them is new, so that neither model sees an adapter, a strength, a processor or a window that the other gets. Both
        see what changes the weights themselves: fusing or hot-swapping an adapter, a cast, training.

        Args:
            transformer (`ModelMixin`): a `stock_class`.
            name (`str`): what errors call it.

        Raises:
            `ValueError`: anything but a `stock_class`, one with fused adapters, or one with attention processors of somebody's
                own.
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
                f"The compiled {type(inner).__name__} is taken over as it was before; compile the pipeline's own."
            )
        transformer = inner
        if not isinstance(transformer, cls.stock_class):
            raise ValueError(f"`{name}` must be a {cls.stock_class.__name__}, but is a {type(transformer).__name__}.")
        fused = {name for layer in _adapter_layers(transformer) for name in layer.merged_adapters}
        if fused:
            raise ValueError(
                f"The {cls.stock_class.__name__} has the fused adapters {sorted(fused)}, which either model could take out of the "
                "weights of both: call `unload_lora_weights()` to keep them there for good, or `unfuse_lora()`."
            )
        holders = _copied_holders(transformer)
        model = holders[transformer]
        model.__class__ = cls
        model._convert()
        for holder, copied in holders.items():
            _copy_hooks(holder, copied, holders)
        return model

    def _convert(self) -> None:
        """Gives the parts of a stock model the classes that this one has. Defined by the model."""
        raise NotImplementedError

    def fuse_qkv_projections(self) -> None:
        """As in diffusers.

        Raises:
            `ValueError`: adapters, which the fused projections would run without.
        """
        if any(not layer.merged for layer in _adapter_layers(self)):
            raise ValueError(
                f"Fused projections would leave out the adapters {sorted(self.peft_config)}: `fuse_lora()` and "
                "`unload_lora_weights()` first put them into the weights."
            )
        super().fuse_qkv_projections()

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        """As in diffusers: the active adapters, or those named, become part of the weights.

        Raises:
            `ValueError`: weights that are away or kept in fewer bits; nothing is fused then.
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
        """As in diffusers.

        Raises:
            `ValueError`: adapters are fused, whose strengths are in the weights.
        """
        fused = sorted({name for layer in _adapter_layers(self) for name in layer.merged_adapters})
        if fused:
            raise ValueError(
                f"The adapters {fused} are fused with the strengths that they had, and others have no effect beside them: call "
                "`unfuse_lora()` before `set_adapters`."
            )
        super().set_adapters(adapter_names, weights)

    # A pipeline asks by the signature what it may pass on: without its own it would save no variant.
    @functools.wraps(ModelMixin.save_pretrained)
    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Saves the base weights in the stock format, with adapters that are fused. Others are left out: they are files of their own.

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
        # Deltas of norms and modulation tables act on the weights themselves, and those that are fused stay there.
        if hasattr(self, "parameter_deltas") and not self.parameter_deltas.merged:
            base |= self.parameter_deltas.originals
        with init_empty_weights(include_buffers=False):
            model = type(self).from_config(self.config)
        model.load_state_dict(base, assign=True)
        model.save_pretrained(save_directory, *args, **kwargs)


def _adapter_layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _fusing_problem(weight: torch.Tensor) -> str | None:
    """Why a difference cannot be added to a layer's weight; `None` where it can."""
    if weight.is_meta:
        return (
            "sequential offload has moved its weights away; fuse before `enable_sequential_cpu_offload()`, or use "
            "`enable_model_cpu_offload()`"
        )
    # Packages that quantize have classes of their own, of which some name the dtype that they stand for.
    if type(weight) is not nn.Parameter or weight.dtype.itemsize < 2:
        kind = weight.dtype if type(weight) is nn.Parameter else type(weight).__name__
        return f"its weights are kept in fewer bits ({kind}), to which nothing is added without rounding them again; fuse first"
    return None


# What hooks and `compile` put on an instance, bound to it. Hooks are made anew on a copy.
_BOUND = ("forward", "_old_forward", "_hf_hook", "_diffusers_hook", "_compiled_call_impl")


def _copied_holders(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Copies of the modules that hold others, which hold copies in turn and the layers at the ends as they are.

    Returns:
        `dict`: module -> copy, the model itself last. Parameters and buffers are the same objects.
    """
    holders: dict[nn.Module, nn.Module] = {}

    def copied(module: nn.Module) -> nn.Module:
        # A container without modules may get some, of adapters.
        if not module._modules and not isinstance(module, (nn.ModuleDict, nn.ParameterDict)):
            return module
        if module not in holders:
            other = module.__class__.__new__(module.__class__)
            state = {name: value for name, value in vars(module).items() if name not in _BOUND}
            # Plain dictionaries only: a configuration is one too, and cannot be changed.
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
    """Hooks of diffusers (group offload, casting) and of accelerate (sequential and model offload) for the copy of a module."""
    registry: Any = getattr(module, "_diffusers_hook", None)
    for name in [] if registry is None else registry._hook_order:
        hook = copy.copy(registry.hooks[name])
        if hasattr(hook, "group"):
            # A group's weights come and go with the modules that lead it.
            hook.group = copy.copy(hook.group)
            for leader in ("onload_leader", "offload_leader"):
                led = getattr(hook.group, leader)
                setattr(hook.group, leader, holders.get(led, led))
        HookRegistry.check_if_exists_or_initialize(copied).register_hook(hook, name)
    hook = getattr(module, "_hf_hook", None)
    if isinstance(hook, (AlignDevicesHook, CpuOffload, SequentialHook)):
        # Its weights are where it has put them already.
        hook = copy.copy(hook)
        hook.init_hook = lambda module: module
        add_hook_to_module(copied, hook)
