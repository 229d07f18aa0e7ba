"""The parts of a pipeline of any base model: how they come in, are recorded and are saved."""

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
    # The stock class of the base model, which stands behind this one among the bases.
    from diffusers import DiffusionPipeline as StockPipeline
else:
    StockPipeline = object


class FactorizedParts(StockPipeline):
    """Parts as people have them become those of the stages; what is saved loads without an import of this package."""

    # What `loading/patches.py` asks a pipeline's class, and tells our classes by.
    safetensors_only = True
    _is_onnx = NOT_ONNX
    # Component -> the class that is expected, and settings that tell it from others: one of somebody's own may have them.
    component_kinds: dict[str, tuple[str, tuple[str, ...]]] = {}
    # Of what may be absent in some modes, and freed, the video model is not.
    required_components: tuple[str, ...] = ("transformer", "unet")
    # Ways to give the model an anchor, of which the anchor LoRA was trained for one: see `animate/anchor.py`.
    anchor_forms: tuple[str, ...] = ("slot",)
    # Of `attention_kwargs`, where the model reads some keys alone.
    attention_keys: tuple[str, ...] = ()
    # The file that makes a saved repository load without an import of this package: see `save_pretrained`.
    pipeline_shim: str

    def _add_stages(self, parts: dict[str, Any], call_defaults: dict[str, Any] | None) -> None:
        """Registers the components that come with the stages, `None` for those that are not there."""
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
        """How anchors are given to the model: as the anchor LoRA was trained, `"slot"` without one."""
        anchor_lora = getattr(self, "anchor_lora", None)
        return "slot" if anchor_lora is None else anchor_lora.form

    def _experts(self) -> dict[str, torch.nn.Module]:
        experts = {name: getattr(self, name, None) for name in ("transformer", "transformer_2")}
        return {name: expert for name, expert in experts.items() if expert is not None}

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> Self:
        """Makes a pipeline of the components of another, such as the stock pipeline of the same base, without a copy.

        The other pipeline keeps its own transformer and gives what it gave: see [`StockWeights.from_stock`]. Weights are shared:
        what changes them, as `fuse_lora`, a cast by `to` or training does, both pipelines see.

        Args:
            pipeline (`DiffusionPipeline`): has the video model; what else it has that this class takes is used too.
            kwargs: components and settings of this class, in place of the other's or beside them.

        Raises:
            `ValueError`: a component that this class needs is in neither, or does not fit.
        """
        if not isinstance(pipeline, DiffusionPipeline):
            raise ValueError(f"`from_pipe` takes a pipeline, not {pipeline!r}; for a name there is `from_pretrained`.")
        names = set(inspect.signature(cls.__init__).parameters) - {"self"}
        found = {**pipeline.config, **pipeline.components}
        parts = {name: value for name, value in found.items() if name in names} | kwargs
        shared = found.get("anchor_lora")
        if shared is not None and parts["anchor_lora"] is not shared and parts["transformer"] is found["transformer"]:
            raise ValueError(
                "`anchor_lora` is another than the one in the video model, which both pipelines would share: assign it to the "
                "pipeline that there is, `pipe.anchor_lora = lora`, or load another pipeline."
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
        return made

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a pipeline that runs does not run.
        return {name: value for name, value in self.__dict__.items() if name != "_progress"}

    def register_modules(self, **kwargs) -> None:
        kwargs = {name: self._taken_over(name, value) for name, value in kwargs.items()}
        super().register_modules(**kwargs)
        self._record_own_classes(kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        # What is saved as a reference is none of the component itself.
        if name in getattr(self, "_internal_dict", {}) and type(value) is not HubReference:
            value = self._taken_over(name, value)
            self._keep_anchor_lora(name, value)
        super().__setattr__(name, value)
        if name in getattr(self, "_internal_dict", {}):
            self._record_own_classes({name: value})

    def _keep_anchor_lora(self, name: str, value: Any) -> None:
        """Before a component takes the place of another: the anchor LoRA is in the video model.

        Raises:
            `ValueError`: one that does not fit, or one in the place of a fused one.
        """
        own = self.__dict__.get("anchor_lora")
        if "_interrupt" not in self.__dict__:
            # It is being made.
            return
        is_other = name in EXPERTS and value is not None and not _is_same_model(value, getattr(self, name))
        if own is not None and is_other and ADAPTER_NAME not in getattr(value, "peft_config", {}):
            own.load_into(value, prefix=name)
        # A copy that is saved has the same weights; one without any tells of those that are in the model.
        weights = getattr(value, "state_dict", None)
        if name != "anchor_lora" or weights == {} or weights is getattr(own, "state_dict", None):
            return
        experts = self._experts()
        layers = [
            layer for expert in experts.values() for layer in expert.modules() if isinstance(layer, BaseTunerLayer)
        ]
        if any(ADAPTER_NAME in layer.merged_adapters for layer in layers):
            raise ValueError("The anchor LoRA is fused: call `unfuse_lora()` before another takes its place.")
        try:
            _exchange_adapters(experts, value)
        except ValueError:
            _exchange_adapters(experts, own)
            raise

    def _taken_over(self, name: str, component: Any) -> Any:
        """A component in the form that the stages take, of one in the form that people have.

        Raises:
            `ValueError`: one that does not fit.
        """
        if component is None:
            if name in self.required_components:
                raise ValueError(
                    f"`{name}` is None: without its video model a pipeline has no mode; delete the pipeline."
                )
            return None
        self._check_kind(name, component)
        if name == "anchor_lora" and component.form not in self.anchor_forms:
            raise ValueError(
                f"`anchor_lora` was trained with `anchor_form={component.form!r}`, and a {type(self).__name__} takes "
                f"{' or '.join(map(repr, self.anchor_forms))} alone: use one that was trained so."
            )
        if name == "rewriter":
            return as_rewriter(component)
        if name == "composer":
            return as_composer(component)
        return as_judge(component) if name == "anchor_judge" else component

    def _setting(self, component: str, name: str) -> Any:
        """A setting of a component; `None` where that is not there, or has no such setting."""
        return getattr(getattr(getattr(self, component, None), "config", None), name, None)

    def _check_kind(self, name: str, component: Any) -> None:
        """Refuses what is clearly something else; how a model is quantized, compiled, hooked or derived makes no difference."""
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
        # diffusers would record our module path, which a Hub download refuses: our classes are attributes of diffusers.
        for name, component in components.items():
            if type(component).__module__.split(".")[0] == "diffusers_fvg":
                self.register_to_config(**{name: ("diffusers", type(component).__name__)})

    def save_pretrained(self, save_directory: str | os.PathLike, *args, bundle: bool = False, **kwargs) -> None:
        """Writes a repository: components with their weights, and a `pipeline.py` of one import.

        What is there already is replaced when all is written, component by component: a kill leaves the old repository or the
        new one. Other files stay.

        With that file `DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)` works in a
        process that has not imported this package.

        Args:
            save_directory (`str` or `os.PathLike`): the folder, made if it is not there.
            bundle (`bool`): write the weights of components that came from a light repository. Otherwise they are
                references again: bundle after changing weights of such a component.
            args, kwargs: of [`~diffusers.DiffusionPipeline.save_pretrained`], but for its `push_to_hub`: use [`push_to_hub`].
        """
        if kwargs.pop("push_to_hub", False):
            raise ValueError(
                "`push_to_hub=True` is not for `save_pretrained` here; call `pipe.push_to_hub(repository)`."
            )
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
        """Saves the pipeline as [`save_pretrained`] does and uploads it with a card; see [`~diffusers_fvg.push`].

        Args:
            repo_id (`str`): repository on the Hub, made if it is not there.
            commit_message, private, token, create_pr (*optional*): of [`~diffusers_fvg.push`].
            variant, bundle (*optional*): of [`save_pretrained`].

        Returns:
            `str`: address of the commit, or of the pull request.
        """
        with temporary_folder() as folder:
            self.save_pretrained(folder, variant=variant, bundle=bundle)
            return push(folder, repo_id, commit_message, private, create_pr, token)


def _is_same_model(model: torch.nn.Module, other: torch.nn.Module | None) -> bool:
    """One that was compiled is the one inside."""
    return getattr(model, "_orig_mod", model) is getattr(other, "_orig_mod", other)


def _exchange_adapters(experts: dict[str, torch.nn.Module], anchor_lora: AnchorLora | None) -> None:
    """Takes the anchor LoRA out of the experts, and puts another in."""
    for name, expert in experts.items():
        if ADAPTER_NAME in getattr(expert, "peft_config", {}):
            expert.delete_adapters(ADAPTER_NAME)
        if anchor_lora is not None:
            anchor_lora.load_into(expert, prefix=name)
