"""Components of a pipeline with any base model: converting, registering and saving them."""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any, Self

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from peft.tuners.tuners_utils import BaseTunerLayer

from ..atomic import naming, replacing_entries, temporary_folder
from ..checks import check_defaults
from ..loading.patches import NOT_ONNX
from ..loading.references import HubReference
from ..lora.anchor_lora import ADAPTER_NAME, AnchorLora
from ..lora.formats import EXPERTS
from ..publishing.push import push
from ..schedules.presets import SchedulerPresets
from .parts import as_composer, as_judge, as_rewriter
from .saving import as_saved, forget_origins


if TYPE_CHECKING:
    # At runtime, the stock class of the base model follows this one among the bases.
    from diffusers import DiffusionPipeline as StockPipeline

    from ..animate.light_decoder import LightDecoder
else:
    StockPipeline = object


class FactorizedParts(StockPipeline):
    """Converts components to the classes of the stages, and saves pipelines that load without importing this package."""

    # `loading/patches.py` reads these two: they mark the pipeline classes of this package.
    safetensors_only = True
    _is_onnx = NOT_ONNX
    # Component -> the name of the expected class, and the config keys that identify it (a custom class may have them, too).
    component_kinds: dict[str, tuple[str, tuple[str, ...]]] = {}
    # Other components may be `None` if the mode does not need them; the video model is always needed.
    required_components: tuple[str, ...] = ("transformer", "unet")
    # Forms of anchors that the model supports; an anchor LoRA is trained for one of them: see `animate/anchor.py`.
    anchor_forms: tuple[str, ...] = ("slot",)
    # The allowed keys of `attention_kwargs`; empty if all are allowed.
    attention_keys: tuple[str, ...] = ()
    # Content of `pipeline.py` in a saved repository, which imports this package: see `save_pretrained`.
    pipeline_shim: str
    _light_decoder: LightDecoder | None = None

    def _add_stages(self, parts: dict[str, Any], call_defaults: dict[str, Any] | None) -> None:
        """Registers the components of the stages (`None` if absent) and loads the anchor LoRA into the video model."""
        self.register_modules(**parts)
        check_defaults(call_defaults)
        self.register_to_config(call_defaults=call_defaults)
        anchor_lora = parts.get("anchor_lora")
        if anchor_lora is not None:
            for name, expert in self._experts().items():
                if ADAPTER_NAME not in getattr(expert, "peft_config", {}):
                    anchor_lora.load_into(expert, prefix=name)
        self._interrupt = False

    @property
    def anchor_form(self) -> str:
        """Form in which anchors are passed to the model: that of the anchor LoRA's training, or `"slot"` without one."""
        anchor_lora = getattr(self, "anchor_lora", None)
        return "slot" if anchor_lora is None else anchor_lora.form

    @property
    def light_decoder(self) -> LightDecoder | None:
        """The [`LightDecoder`] that decodes instead of the VAE, or `None`."""
        return self._light_decoder

    @light_decoder.setter
    def light_decoder(self, decoder: LightDecoder | None) -> None:
        if decoder is not None:
            self._check_light_decoder(decoder)
        self._light_decoder = decoder

    def _check_light_decoder(self, decoder: Any) -> None:
        raise ValueError(f"`light_decoder` must be None: {type(self).__name__} always decodes with its own VAE.")

    def _experts(self) -> dict[str, torch.nn.Module]:
        experts = {name: getattr(self, name, None) for name in ("transformer", "transformer_2")}
        return {name: expert for name, expert in experts.items() if expert is not None}

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> Self:
        """Makes a pipeline from the components of another one, such as the stock pipeline of the same base, without copying.

        The other pipeline keeps its transformer object and gives the same results as before: see [`StockWeights.from_stock`].
        The weights are shared, so changes of them (`fuse_lora`, a cast by `to`, training) affect both pipelines.

        Args:
            pipeline (`DiffusionPipeline`): has the video model; its other components are used if this class has them.
            kwargs: components and settings of this class, which replace or complete those of `pipeline`.

        Raises:
            `ValueError`: a required component is missing, or a component does not fit.
        """
        if not isinstance(pipeline, DiffusionPipeline):
            raise ValueError(
                f"`from_pipe` takes a pipeline, not {pipeline!r}; use `from_pretrained` for a folder or repository."
            )
        names = set(inspect.signature(cls.__init__).parameters) - {"self"}
        found = {**pipeline.config, **pipeline.components}
        parts = {name: value for name, value in found.items() if name in names} | kwargs
        shared = found.get("anchor_lora")
        if shared is not None and parts["anchor_lora"] is not shared and parts["transformer"] is found["transformer"]:
            raise ValueError(
                "`anchor_lora` differs from the one in the video model, which both pipelines would share: assign it to the "
                "existing pipeline, `pipe.anchor_lora = lora`, or load another pipeline."
            )
        missing = sorted(cls._get_signature_keys(cls)[0] - parts.keys() - set(cls._optional_components))
        if missing:
            raise ValueError(
                f"{type(pipeline).__name__} has no {', '.join(missing)}, which {cls.__name__} needs; pass it."
            )
        made = cls(**parts)
        made.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
        if isinstance(pipeline, FactorizedParts):
            made.safety_checker, made.prompt_check = pipeline.safety_checker, pipeline.prompt_check
            if isinstance(made, type(pipeline)) and made.vae is pipeline.vae:
                made.light_decoder = pipeline.light_decoder
        return made

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a running pipeline is not running.
        return {name: value for name, value in self.__dict__.items() if name != "_progress"}

    def register_modules(self, **kwargs) -> None:
        kwargs = {name: self._taken_over(name, value) for name, value in kwargs.items()}
        super().register_modules(**kwargs)
        self._record_own_classes(kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        # A `HubReference` is only set for saving; it is not the component itself.
        if name in getattr(self, "_internal_dict", {}) and type(value) is not HubReference:
            value = self._taken_over(name, value)
            self._keep_anchor_lora(name, value)
        super().__setattr__(name, value)
        if name in getattr(self, "_internal_dict", {}):
            self._record_own_classes({name: value})

    def _keep_anchor_lora(self, name: str, value: Any) -> None:
        """Keeps the anchor LoRA loaded in the video model when a component is replaced; called before the replacement.

        Raises:
            `ValueError`: the anchor LoRA does not fit, or would replace a fused one.
        """
        own = self.__dict__.get("anchor_lora")
        if "_interrupt" not in self.__dict__:
            # The pipeline is still in its `__init__`.
            return
        is_other = name in EXPERTS and value is not None and not _is_same_model(value, getattr(self, name))
        if own is not None and is_other and ADAPTER_NAME not in getattr(value, "peft_config", {}):
            own.load_into(value, prefix=name)
        # A copy for saving has the same weights. An `AnchorLora` without weights only describes those in the model.
        weights = getattr(value, "state_dict", None)
        if name != "anchor_lora" or weights == {} or weights is getattr(own, "state_dict", None):
            return
        experts = self._experts()
        layers = [
            layer for expert in experts.values() for layer in expert.modules() if isinstance(layer, BaseTunerLayer)
        ]
        if any(ADAPTER_NAME in layer.merged_adapters for layer in layers):
            raise ValueError("The anchor LoRA is fused: call `unfuse_lora()` before you replace it.")
        try:
            _exchange_adapters(experts, value)
        except ValueError:
            _exchange_adapters(experts, own)
            raise

    def _taken_over(self, name: str, component: Any) -> Any:
        """Converts a component to the class that the stages use.

        Raises:
            `ValueError`: the component does not fit.
        """
        if component is None:
            if name in self.required_components:
                raise ValueError(
                    f"`{name}` is None, but every mode needs the video model; to free memory, delete the pipeline."
                )
            return None
        self._check_kind(name, component)
        if name == "anchor_lora" and component.form not in self.anchor_forms:
            raise ValueError(
                f"`anchor_lora` was trained with `anchor_form={component.form!r}`, but a {type(self).__name__} supports only "
                f"{' or '.join(map(repr, self.anchor_forms))}: use a LoRA that was trained with it."
            )
        if name == "rewriter":
            return as_rewriter(component)
        if name == "composer":
            return as_composer(component)
        return as_judge(component) if name == "anchor_judge" else component

    def _setting(self, component: str, name: str) -> Any:
        """Returns a config value of a component; `None` if the component or the value does not exist."""
        return getattr(getattr(getattr(self, component, None), "config", None), name, None)

    def _check_kind(self, name: str, component: Any) -> None:
        """Refuses a component that is clearly of another kind; quantized, compiled, hooked and derived models are accepted."""
        expected, settings = self.component_kinds.get(name, ("", ()))
        parts = {"scheduler": ("set_timesteps", "step", "config"), "vae": ("encode", "decode", "config")}.get(name, ())
        if name.startswith("tokenizer"):
            expected = "tokenizer"
            fits = not isinstance(component, (type, str, int, torch.nn.Module, DiffusionPipeline, SchedulerMixin))
        elif name in ("anchor_lora", "schedulers"):
            kind = {"anchor_lora": AnchorLora, "schedulers": SchedulerPresets}[name]
            expected, fits = kind.__name__, isinstance(component, kind)
        else:
            expected = expected or name
            config = getattr(component, "config", None)
            fits = not isinstance(component, type) and all(hasattr(component, part) for part in parts)
            fits = fits and all(hasattr(config, setting) for setting in settings)
        if not fits:
            what = (
                f"the class {component.__name__}" if isinstance(component, type) else f"a {type(component).__name__}"
            )
            raise ValueError(f"`{name}` must be of the kind {expected}, but is {what}.")

    def _record_own_classes(self, components: dict[str, Any]) -> None:
        # diffusers would record this package's module path, which it refuses at loading; these classes are attributes of
        # diffusers instead.
        for name, component in components.items():
            if type(component).__module__.split(".")[0] == "diffusers_fvg":
                self.register_to_config(**{name: ("diffusers", type(component).__name__)})

    def save_pretrained(self, save_directory: str | os.PathLike, *args, bundle: bool = False, **kwargs) -> None:
        """Saves the pipeline as a repository: components with their weights, and a `pipeline.py` that imports this package.

        With that file, `DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)` works in a
        process that has not imported this package.

        Existing components are replaced only after everything is written, so that a killed process leaves the old or the new
        repository. Other files in the folder stay.

        Args:
            save_directory (`str` or `os.PathLike`): the folder, created if it is missing.
            bundle (`bool`): whether to write the weights of components that were loaded by reference. Otherwise references
                are written again, without changes of these weights.
            args, kwargs: arguments of [`~diffusers.DiffusionPipeline.save_pretrained`] except `push_to_hub`; use the method
                [`push_to_hub`].

        Raises:
            `ValueError`: `push_to_hub=True` is passed, or LoRAs are fused into a component that is saved as a reference.
        """
        if kwargs.pop("push_to_hub", False):
            raise ValueError("`push_to_hub=True` is not supported; call `pipe.push_to_hub(repository)` instead.")
        saved = as_saved(self, bundle)
        with replacing_entries(save_directory, self.config_name) as draft, naming(save_directory):
            (draft / "pipeline.py").write_text(self.pipeline_shim)
            super(FactorizedParts, saved).save_pretrained(draft, *args, **kwargs)
            forget_origins(draft)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        variant: str | None = None,
        bundle: bool = False,
    ) -> str:
        """Saves the pipeline as [`save_pretrained`] does and uploads it with a model card; see [`~diffusers_fvg.push`].

        Args:
            repo_id (`str`): Hub repository, created if it is missing.
            commit_message, private, token, create_pr (*optional*): as in [`~diffusers_fvg.push`].
            variant, bundle (*optional*): as in [`save_pretrained`].

        Returns:
            `str`: URL of the commit, or of the pull request.
        """
        with temporary_folder() as folder:
            self.save_pretrained(folder, variant=variant, bundle=bundle)
            return push(folder, repo_id, commit_message, private, create_pr, token)


def _is_same_model(model: torch.nn.Module, other: torch.nn.Module | None) -> bool:
    """Returns whether two models are the same, apart from the wrapper of `torch.compile`."""
    return getattr(model, "_orig_mod", model) is getattr(other, "_orig_mod", other)


def _exchange_adapters(experts: dict[str, torch.nn.Module], anchor_lora: AnchorLora | None) -> None:
    """Removes the anchor LoRA from the experts, and loads another one if it is not `None`."""
    for name, expert in experts.items():
        if ADAPTER_NAME in getattr(expert, "peft_config", {}):
            expert.delete_adapters(ADAPTER_NAME)
        if anchor_lora is not None:
            anchor_lora.load_into(expert, prefix=name)
