"""References to components that stay in their own Hub repositories, which keep a pipeline's repository small.

The folder of such a component holds `reference.json` instead of weights: a Hub repository, the commit, the subfolder and the
class. `DiffusionPipeline.from_pretrained` fetches only the safetensors files of one variant and the configs of that
component. A repository with references is called light. Composer and rewriter name their repositories in their own configs,
and also fetch with [`loading.files`].
"""

from __future__ import annotations

import json
import os
import re
from abc import ABCMeta
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .arguments import call_argument, hub_arguments
from .files import available_variant, component_files, fetch
from .reading import read_json
from .safety import check_folder


REFERENCE_NAME = "reference.json"
# Libraries and base classes of the components that a reference may name.
LIBRARIES = ("diffusers", "transformers")
REFERABLE = (ModelMixin, SchedulerMixin, PreTrainedModel, PreTrainedTokenizerBase)


class HubReference(torch.nn.Module, metaclass=ABCMeta):
    """Stands in `model_index.json` for a component that stays in its own Hub repository.

    [`from_pretrained`] reads the folder's `reference.json` and returns the component itself. The class is an `nn.Module`
    because diffusers passes the requested dtype only to those.

    Args:
        repository (`str`): Hub repository.
        library, class_name (`str`): library and class of the component: a model, scheduler or tokenizer of `"diffusers"`
            (also for classes of this package) or `"transformers"`.
        revision (`str`, *optional*): a commit, or a branch or tag, which is resolved at each loading.
        subfolder (`str`): folder of the component in the repository.
        variant (`str`, *optional*): variant of the weights if `from_pretrained` is called without one.

    Raises:
        `ValueError`: the class is of another kind, or `repository` or `subfolder` is not a valid name.
    """

    def __init__(
        self,
        repository: str,
        library: str,
        class_name: str,
        revision: str | None = None,
        subfolder: str = "",
        variant: str | None = None,
    ):
        super().__init__()
        validate_repo_id(repository)
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*|", subfolder) or ".." in subfolder.split("/"):
            raise ValueError(f"The subfolder {subfolder!r} of {repository} is not a path within a repository.")
        self.values: dict[str, Any] = {"repository": repository, "revision": revision, "subfolder": subfolder}
        self.values |= {"library": library, "class": class_name, "variant": variant}
        self.component_class = _component_class(library, class_name)

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        # diffusers checks a component that is passed to `from_pretrained` against the class in `model_index.json`.
        return issubclass(other, REFERABLE) or NotImplemented

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, torch_dtype: torch.dtype | None = None, quantization_config=None
    ):
        """Loads the component that a folder refers to, with the Hub arguments of the running `from_pretrained`.

        Args:
            path (`str` or `os.PathLike`): a folder with `reference.json`. Its name is the name of the component.
            torch_dtype (`torch.dtype`, *optional*): dtype of the weights.
            quantization_config (*optional*): quantization config of diffusers or transformers, for a model.

        Raises:
            `ValueError`: `reference.json` is not valid.
            `OSError`: the repository or a file does not exist; the message names the reference and the files.
        """
        file = Path(path) / REFERENCE_NAME
        try:
            values = read_json(file)
            reference = cls(class_name=values.pop("class"), **values)
        except (OSError, LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{file} must name `repository`, `library` and `class`, and may name `revision`, `subfolder` and `variant`: "
                f"{type(error).__name__}: {error}"
            ) from error
        return reference.load(Path(path).name, torch_dtype, quantization_config)

    def load(self, name: str, torch_dtype: torch.dtype | None = None, quantization_config=None):
        """Loads the component and stores the reference in its `hub_reference`. `name` is its name in the pipeline."""
        values, component_class = self.values, self.component_class
        is_model, place = issubclass(component_class, torch.nn.Module), f"`{name}/{REFERENCE_NAME}`"
        variant: str | None = None

        def select(names: list[str]) -> list[str]:
            nonlocal variant
            inside = [file for file in names if file.startswith(f"{values['subfolder']}/")]
            asked = available_variant(inside, call_argument("variant"), place) if is_model else None
            variant = (asked or values["variant"] or None) if is_model else None
            files = component_files(names, values["subfolder"], variant, weights=is_model)
            if not files:
                folders = sorted({file.split("/")[0] for file in names if "/" in file})
                raise ValueError(f"nothing in the subfolder {values['subfolder']!r}; there are {folders}")
            return files

        folder, _ = fetch(values["repository"], values["revision"], select, place, **hub_arguments())
        arguments: dict[str, Any] = {}
        if is_model:
            arguments = {"use_safetensors": True, "device_map": call_argument("device_map")}
            arguments |= {} if variant is None else {"variant": variant}
            # diffusers resolved the config for a transformers class, because it does not know the class behind the reference.
            config = call_argument("quantization_config")
            if config is not None:
                is_diffusers = issubclass(component_class, ModelMixin)
                quantization_config = config._resolve_quant_config(is_diffusers=is_diffusers, module_name=name)
            if quantization_config is not None:
                arguments["quantization_config"] = quantization_config
            arguments["torch_dtype" if issubclass(component_class, ModelMixin) else "dtype"] = torch_dtype
        check_folder(folder / values["subfolder"])
        component = component_class.from_pretrained(folder / values["subfolder"], **arguments)
        component.hub_reference = dict(values)
        return component

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Writes `reference.json`."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        values = {key: value for key, value in self.values.items() if value is not None}
        (folder / REFERENCE_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _component_class(library: str, class_name: str) -> type[Any]:
    """Returns the class of a reference, which must be one that `DiffusionPipeline` loads without running remote code."""
    if library not in LIBRARIES:
        raise ValueError(f"The library {library!r} must be one of {LIBRARIES}.")
    try:
        component_class = simple_get_class_obj(library, class_name)
    except AttributeError as error:
        raise ValueError(f"{library} has no class {class_name!r}.") from error
    if not isinstance(component_class, type) or not issubclass(component_class, REFERABLE):
        raise ValueError(f"{library}'s {class_name} is not a model, scheduler or tokenizer.")
    return component_class
