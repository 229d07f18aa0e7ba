"""Decides which argument of a text-to-image pipeline sets its guidance, and when a negative prompt has an effect.

Both follow from the signature of the pipeline's call and the configs of its models. For the families of diffusers 0.42.1:

| family                    | `guidance_scale` becomes          | a negative prompt has an effect                       |
|---------------------------|-----------------------------------|-------------------------------------------------------|
| Qwen-Image                | `true_cfg_scale`                  | with `true_cfg_scale` > 1, the default                |
| Qwen-Image-2.1            | `true_cfg_scale`, its only one    | with `true_cfg_scale` > 1, not the default            |
| FLUX.1-dev                | itself, an input of the model     | with `true_cfg_scale` > 1, not the default            |
| FLUX.1-schnell            | nothing: refused                  | as FLUX.1-dev                                         |
| FLUX.2-dev, Sana-Sprint   | itself, an input of the model     | never: no such argument                               |
| FLUX.2-klein              | itself; refused if `is_distilled` | never: no such argument                               |
| SD, SDXL, SD3, Sana, Wan  | itself                            | with `guidance_scale` > 1                             |
| LCM (`time_cond_proj_dim`)| itself, an input of the model     | never                                                 |
| Z-Image, Krea 2           | itself                            | with `guidance_scale` > 0: it is a scale of 1 + s     |
"""

from __future__ import annotations

import copy
from typing import Any

from diffusers import DiffusionPipeline

from ..checks import check_guidance
from ..loading.pipeline_component import call_arguments


# Qwen-Image applies no guidance without a negative prompt; its documentation recommends this one.
NO_NEGATIVE_PROMPT = " "


def guided_call(pipeline: DiffusionPipeline, arguments: dict[str, Any]) -> dict[str, Any]:
    """Renames `guidance_scale` in the arguments of a call to the argument that sets the guidance of this pipeline.

    Raises:
        `ValueError`: a scale above 1 has no effect, a scale is not a finite number from 0 to 1000, or two scales are given.
    """
    for argument in ("guidance_scale", "true_cfg_scale"):
        check_guidance(argument, arguments.get(argument))
    scale, name = arguments.get("guidance_scale"), type(pipeline).__name__
    if scale is None:
        return arguments
    if _true_cfg_guides(pipeline):
        if "true_cfg_scale" in arguments:
            raise ValueError(
                f"`guidance_scale={scale}` and `true_cfg_scale={arguments['true_cfg_scale']}` are the same setting in {name}; "
                "leave one of them out."
            )
        others = {key: value for key, value in arguments.items() if key != "guidance_scale"}
        return others | {"true_cfg_scale": scale}
    if scale > 1 and "guidance_scale" in call_arguments(pipeline) and not _takes_guidance(pipeline):
        raise ValueError(
            f"The composer's `guidance_scale={scale}` has no effect: the models of {name} are distilled to work without guidance. "
            "Leave it out."
        )
    return arguments


def with_negative_prompt(pipeline: DiffusionPipeline, arguments: dict[str, Any]) -> dict[str, Any]:
    """Adds an empty negative prompt if `true_cfg_scale` sets the guidance, which has no effect without one."""
    if _true_cfg_guides(pipeline) and arguments.get("true_cfg_scale", 1) > 1:
        return {"negative_prompt": NO_NEGATIVE_PROMPT} | arguments
    return arguments


def check_negative_prompt(pipeline: DiffusionPipeline, arguments: dict[str, Any]) -> None:
    """Checks that a negative prompt in the arguments, which [`guided_call`] returned, has an effect.

    Raises:
        `ValueError`: guidance is off.
    """
    declared = call_arguments(pipeline)
    name = next((name for name in ("true_cfg_scale", "guidance_scale") if name in declared), None)
    if name is None or arguments.get("negative_prompt") is None:
        return
    scale = arguments.get(name, declared[name].default)
    if scale > 1 if name == "true_cfg_scale" else _computes_negative(pipeline, scale):
        return
    fix = "Leave it out"
    if name == "true_cfg_scale" and not _true_cfg_guides(pipeline):
        fix += ", or set `true_cfg_scale` above 1 in the composer's `call_defaults`"
    elif name == "true_cfg_scale" or _computes_negative(pipeline, float("inf")):
        fix += ", or raise `guidance_scale`"
    raise ValueError(
        f"The composer's `negative_prompt` has no effect: with `{name}={scale}` {type(pipeline).__name__} does not compute it. "
        f"{fix}."
    )


def _true_cfg_guides(pipeline: DiffusionPipeline) -> bool:
    """Returns whether `true_cfg_scale` sets the guidance: no `guidance_scale` exists, or only for distilled models."""
    declared = call_arguments(pipeline)
    if "true_cfg_scale" not in declared or _embeds_guidance(pipeline):
        return False
    return "guidance_scale" not in declared or declared["guidance_scale"].default is None


def _embeds_guidance(pipeline: DiffusionPipeline) -> bool:
    """Returns whether the scale is an input of the model, which is then guidance-distilled (arXiv 2210.03142)."""
    transformer, unet = getattr(pipeline, "transformer", None), getattr(pipeline, "unet", None)
    if transformer is not None and transformer.config.get("guidance_embeds"):
        return True
    return unet is not None and unet.config.get("time_cond_proj_dim") is not None


def _takes_guidance(pipeline: DiffusionPipeline) -> bool:
    """Returns whether any `guidance_scale` changes images."""
    if "true_cfg_scale" in call_arguments(pipeline):
        return _embeds_guidance(pipeline)
    return _embeds_guidance(pipeline) or _computes_negative(pipeline, float("inf"))


def _computes_negative(pipeline: DiffusionPipeline, scale: float | None) -> bool:
    """Returns whether a call with this `guidance_scale` uses the negative prompt, by the pipeline's own property if any."""
    if scale is None or not hasattr(type(pipeline), "do_classifier_free_guidance"):
        return scale is None or scale > 1
    # `__call__` writes the scale to `_guidance_scale`, which the property reads.
    called = copy.copy(pipeline)
    called._guidance_scale = scale
    try:
        return called.do_classifier_free_guidance
    except AttributeError:
        # The property also reads other attributes that only `__call__` sets.
        return scale > 1
