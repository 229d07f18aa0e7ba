"""Finds the model that the flags name, checks the call on it before weights are read, then loads and places it."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch

    from ..animate.light_decoder import LightDecoder
    from ..pipelines.profiles import MemoryPlan, Stage
    from ..pipelines.request import VideoRequest
    from ..pipelines.stages import FactorizedStages
    from ..recipes.sources import ModelSource

# For each value of --quantize: the package that it needs, and the bytes per parameter.
PACKAGES = {"fp8": None, "fp8-dynamic": "torchao", "int8": "torchao", "nf4": "bitsandbytes"}
PARAMETER_BYTES = {"fp8": 1.0, "fp8-dynamic": 1.0, "int8": 1.0, "nf4": 0.5625}


@dataclass
class Model:
    """A model before it is loaded.

    Args:
        arguments (`argparse.Namespace`): arguments of the command line.
        source ([`ModelSource`]): recipe, folder or repository of the model.
        outline ([`FactorizedStages`]): the pipeline without weights.
        device (`torch.device`): device on which it will run.
        memory (`str`, *optional*): value of `--memory`; `None` if no memory is planned.
        parts (`dict`): composer, rewriter and LoRA, as [`~recipes.load`] takes them.
    """

    arguments: argparse.Namespace
    source: ModelSource
    outline: FactorizedStages
    device: torch.device
    memory: str | None
    parts: dict[str, Any]

    def check(self, **call: Any) -> VideoRequest:
        """Checks the arguments of a call on the model and returns the completed request; see [`VideoRequest.completed`]."""
        from ..pipelines.request import VideoRequest

        known = inspect.signature(type(self.outline).__call__).parameters
        for name, value in call.items():
            if value is not None and name not in known:
                is_flag = getattr(self.arguments, name, None) is not None
                given = f"--{name.replace('_', '-')} {value}" if is_flag else f"`{name}={value!r}` of the record"
                raise ValueError(f"{given} is not an argument of {type(self.outline).__name__}.")
        call = {name: value for name, value in call.items() if value is not None}
        request = VideoRequest(**{"mode": "factorized"} | call).completed(self.outline)
        self.plan(request.height, request.width, request.num_frames)
        return request

    def stages(
        self, height: int | None = None, width: int | None = None, num_frames: int | None = None
    ) -> list[Stage]:
        """Returns the memory needs of each component with the requested quantization."""
        from ..pipelines.profiles import pipeline_stages

        kind = getattr(self.arguments, "quantize", None)
        stages = pipeline_stages(self.outline, height, width, num_frames)
        return [_quantized(stage, kind, self.outline) for stage in stages]

    def plan(self, *size: int | None) -> MemoryPlan | None:
        """Returns the memory plan, or `None` without `memory`; raises `ValueError` if the model does not fit."""
        from ..pipelines.profiles import plan_on

        return None if self.memory is None else plan_on(self.stages(*size), self.memory, self.device)

    def load(
        self, height: int | None = None, width: int | None = None, num_frames: int | None = None
    ) -> FactorizedStages:
        """Loads the pipeline and places it on the device."""
        from ..recipes import load

        arguments = self.arguments
        quantization = getattr(arguments, "quantize", None)
        self._check_quantization(quantization, _dtype(arguments))
        pipe = load(
            model_name(arguments),
            dtype=_dtype(arguments),
            variant=arguments.variant,
            quantization_config=_quantization_config(quantization, _dtype(arguments)),
            **_hub_arguments(arguments),
            **self.parts,
        )
        pipe.prompt_check = self.outline.prompt_check
        if getattr(arguments, "light_decoder", None) is not None:
            pipe.light_decoder = self.outline.light_decoder
        if arguments.model is None:
            # The name of the embedded model in records.
            pipe.register_to_config(_name_or_path="embedded")
            pipe.origin = {"kind": "embedded"}
        if quantization == "fp8":
            _store_in_fp8(pipe)
        pipe.set_progress_bar_config(disable=arguments.quiet)
        self._place(pipe, height, width, num_frames)
        if getattr(arguments, "compile", False):
            for model in _video_models(pipe):
                model.compile_repeated_blocks()
        return pipe

    def _check_quantization(self, kind: str | None, dtype: torch.dtype) -> None:
        """Raises `ValueError` for a quantization that the device or the model does not support."""
        if kind == "nf4" and self.device.type == "cpu":
            raise ValueError(
                "--quantize nf4 needs an accelerator, because diffusers creates 4-bit weights only there; use fp8 or int8."
            )
        if kind != "fp8-dynamic":
            return
        from ..animate.quantization import fp8_problem

        problem = fp8_problem(self.device, dtype)
        if self.outline.components.get("animator") is not None:
            problem = "it is not known which layers of an image-to-video pipeline can be quantized"
        if problem is not None:
            raise ValueError(f"--quantize fp8-dynamic cannot run: {problem}. Use fp8 or int8.")

    def _place(self, pipe: FactorizedStages, height: int | None, width: int | None, num_frames: int | None) -> None:
        from ..pipelines.profiles import pipeline_stages, place, plan_on

        if self.memory is None:
            pipe.to(self.device)
            return
        plan = plan_on(pipeline_stages(pipe, height, width, num_frames), self.memory, self.device)
        print(f"memory:             {_summary(plan, self.device)}")
        if self.device.type == "cpu":
            # On the CPU, weights are already where they run: there is nothing to offload.
            if plan.tile:
                pipe.vae.enable_tiling()
            return
        place(pipe, plan, self.device)

    def load_part(self, part: str) -> FactorizedStages:
        """Loads only the model of stage 1 or 2 into the outline, and returns the outline for that stage alone."""
        from ..pipelines.profiles import offload_layers, part_stage, plan_on
        from ..recipes import load_part

        arguments = self.arguments
        own = self.parts.get(part)
        component: Any = load_part(
            part,
            model_name(arguments),
            own=own,
            dtype=_dtype(arguments),
            variant=arguments.variant,
            **_hub_arguments(arguments),
        )
        plan = None if self.memory is None else plan_on([part_stage(part, component)], self.memory, self.device)
        if plan is None or plan.offload == "none" or self.device.type == "cpu":
            component.to(self.device)
        else:
            offload_layers(component, self.device)
        setattr(self.outline, part, component)
        self.outline.set_progress_bar_config(disable=arguments.quiet)
        return self.outline


def _summary(plan: MemoryPlan, device: torch.device) -> str:
    from ..overview import GIB, PLACED

    tiles = ", decode in tiles" * plan.tile
    line = f"{plan.profile}: {PLACED[plan.offload]}{tiles}, peak {plan.peak / GIB:.1f} GiB (computed)"
    if device.type == "cpu" and plan.offload != "none":
        line += "; not offloaded, because weights are already on the CPU"
    return line


def model_name(arguments: argparse.Namespace) -> str | Path:
    from ..embedded import EMBEDDED_FOLDER

    return EMBEDDED_FOLDER if arguments.model is None else arguments.model


def look(arguments: argparse.Namespace, **skipped: bool) -> Model:
    """Finds the model and builds it without weights.

    Args:
        skipped: `composer=False`, `rewriter=False` or `lora=False` for components that the run does not need.

    Raises:
        `ValueError` or `OSError`: the model, or the combination of flags, is not valid.
    """
    if arguments.model == "embedded" and not Path("embedded").is_dir():
        arguments.model = None  # The name of the embedded model in records.
    _check_model(arguments)
    rewriter = named_rewriter(arguments) if "rewriter" in arguments else None
    parts: dict[str, Any] = {name: getattr(arguments, name, None) for name in ("composer", "lora")}
    parts |= {"rewriter": rewriter} | skipped
    import torch

    set_bars(arguments.quiet)
    device, memory = _device(arguments)
    if arguments.model is None:
        # The operations of the embedded model are too small for several threads, which wait for each other on a busy machine.
        torch.set_num_threads(1)
    from ..embedded import check_world
    from ..recipes.loading import check_lora, hub_options
    from ..recipes.outline import outline
    from ..recipes.sources import find_source

    hub = hub_options(arguments.token or None)
    source = find_source(model_name(arguments), arguments.revision, hub)
    if skipped.get("lora") is False and source.recipe is None:
        # Without anchors, the model's own LoRA is disabled.
        parts["lora"] = None
    check_lora(source, parts["lora"])
    made = outline(source, _dtype(arguments), parts["composer"], parts["rewriter"], hub)
    if arguments.model is None:
        # The user's own rewriter may understand prompts outside of the embedded model's world.
        made.prompt_check = check_world if rewriter is None else lambda text, writes: check_world(text)
    if getattr(arguments, "light_decoder", None) is not None:
        made.light_decoder = _light_decoder(arguments, made)
    return Model(arguments, source, made, device, memory, parts)


def load_pipeline(arguments: argparse.Namespace) -> FactorizedStages:
    """Loads the pipeline that the flags name, with all components."""
    return look(arguments).load()


def _light_decoder(arguments: argparse.Namespace, pipe: FactorizedStages) -> LightDecoder:
    """Loads `--light-decoder`; of a folder or repository, the file that fits the model's VAE."""
    from ..animate.light_decoder import USES, LightDecoder, fitting_file
    from ..pipelines.pipeline_factorized_video import FactorizedVideoPipeline

    name, dtype = arguments.light_decoder, _dtype(arguments)
    file = fitting_file(pipe.vae) if isinstance(pipe, FactorizedVideoPipeline) else None
    if file is None:
        raise ValueError(f"--light-decoder {name} does not fit the model: {USES}. Leave it out.")
    if Path(name).is_file():
        decoder = LightDecoder.from_pretrained(name, dtype=dtype)
        if decoder.config.name != file:
            raise ValueError(f"--light-decoder {name} does not fit the model, which needs {file}: {USES}.")
        return decoder
    place, _, revision = (name, "", "") if Path(name).is_dir() else name.partition("@")
    options = {"revision": revision or None, "token": arguments.token or None}
    return LightDecoder.from_pretrained(place, f"{file}.safetensors", dtype, **options)


def _check_model(arguments: argparse.Namespace) -> None:
    name, kind = arguments.model, getattr(arguments, "quantize", None)
    if name is None:
        for flag in ("revision", "variant"):
            if getattr(arguments, flag) is not None:
                raise ValueError(f"--{flag} {getattr(arguments, flag)} needs --model; name a model, or leave it out.")
    elif Path(name).exists() and not Path(name).is_dir():
        raise ValueError(f"--model {name} is a file; give a recipe, a folder or a Hub repository.")
    package = PACKAGES.get(kind or "")
    if package is not None and importlib.util.find_spec(package) is None:
        raise ValueError(f"--quantize {kind} needs the package {package}; install it with `pip install {package}`.")


def named_rewriter(arguments: argparse.Namespace):
    """Returns the name in `--rewriter`, or a rewriter that calls the server in it; `None` without the flag."""
    is_server = (arguments.rewriter or "").lower().startswith(("http://", "https://"))
    if not is_server:
        if arguments.rewriter_model is not None or arguments.rewriter_api_key_env is not None:
            raise ValueError(
                "--rewriter-model and --rewriter-api-key-env are for a server; give its URL as --rewriter URL."
            )
        return arguments.rewriter
    if arguments.rewriter_model is None:
        raise ValueError("--rewriter URL needs --rewriter-model NAME, the name of the chat model on the server.")
    from .. import ChatEndpoint, FirstFrameRewriter

    endpoint = ChatEndpoint(arguments.rewriter, arguments.rewriter_model, arguments.rewriter_api_key_env)
    return FirstFrameRewriter(endpoint=endpoint)


def set_bars(quiet: bool) -> None:
    """Enables the progress bars of downloads unless `quiet`, and disables those of loading, one for every component."""
    import diffusers
    import transformers
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    diffusers.utils.logging.disable_progress_bar()
    # This also disables the bars of the Hub.
    transformers.utils.logging.disable_progress_bar()
    if quiet:
        disable_progress_bars()
    elif not constants.HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()


def _device(arguments: argparse.Namespace) -> tuple[torch.device, str | None]:
    """Returns the device, and the memory to plan for."""
    import torch

    from ..pipelines.profiles import memory_bytes

    name, memory = arguments.device, arguments.memory and arguments.memory.strip().lower()
    there = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else None
    if memory not in (None, "auto", "cpu"):
        memory_bytes(arguments.memory)
    if name is None:
        name = "cpu" if memory == "cpu" or there is None else there
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"--device {name} is not a device; use {there or 'cpu'}{' or cpu' * (there is not None)}."
        ) from error
    if device.type not in ("cpu", there):
        raise ValueError(
            f"--device {name} does not exist; this machine has {f'{there} and ' * (there is not None)}cpu."
        )
    if device.type != "cpu" and (device.index or 0) >= torch.accelerator.device_count():
        last = torch.accelerator.device_count() - 1
        raise ValueError(f"--device {name} does not exist; the {there} devices have the numbers 0 to {last}.")
    if device.type == "cpu":
        return device, "cpu" if memory == "auto" else arguments.memory
    if memory == "cpu":
        raise ValueError(f"--memory cpu contradicts --device {name}; leave one of them out.")
    return device, arguments.memory or "auto"


def _dtype(arguments: argparse.Namespace) -> torch.dtype:
    import torch

    return getattr(torch, arguments.dtype or ("float32" if arguments.model is None else "bfloat16"))


def _hub_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"revision": arguments.revision, "token": arguments.token or None}


# -- fewer bits -------------------------------------------------------------------------------------------------------


def _video_models(pipe: FactorizedStages) -> list[torch.nn.Module]:
    from ..pipelines.profiles import VIDEO_MODELS

    animator = pipe.components.get("animator")
    parts = pipe.components if animator is None else animator.pipeline.components
    return [model for name in VIDEO_MODELS if (model := parts.get(name)) is not None]


def _quantization_config(kind: str | None, dtype: torch.dtype):
    """Returns the configuration of a quantization that is done while weights are loaded; fp8 is done afterwards."""
    if kind in (None, "fp8"):
        return None
    from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, TorchAoConfig

    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    elif kind == "fp8-dynamic":
        from ..animate.quantization import fp8_dynamic

        config = fp8_dynamic()
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    models = ("transformer", "transformer_2", "unet")
    # Models of the pipeline itself, or of its animator.
    names = (*models, *(f"animator.{name}" for name in models))
    return PipelineQuantizationConfig(quant_mapping=dict.fromkeys(names, config))


def _store_in_fp8(pipe: FactorizedStages) -> None:
    import torch

    for model in _video_models(pipe):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=model.dtype)


def _quantized(stage: Stage, kind: str | None, pipe: FactorizedStages) -> Stage:
    """Returns the memory needs of a stage with quantized weights."""
    from dataclasses import replace

    from ..pipelines.profiles import VIDEO_MODELS

    name = stage.name.removeprefix("animator.")
    if kind is None or name not in VIDEO_MODELS:
        return stage
    parts = pipe.components if name == stage.name else pipe.animator.pipeline.components
    share = PARAMETER_BYTES[kind] / parts[name].dtype.itemsize
    whole = PACKAGES[kind] is not None
    return replace(stage, weights=int(stage.weights * share), layers=int(stage.layers * share), whole=whole)
