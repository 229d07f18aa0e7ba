"""Converts what users pass to components: a pipeline to a composer, a model and its tokenizer to a rewriter, names to both."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..animate.animator import AnchorAnimator
from ..compose.composer import AnchorComposer
from ..compose.judge import AnchorJudge, Judge, JudgeFunction
from ..rewrite.chat_endpoint import ChatEndpoint
from ..rewrite.rewriter import FirstFrameRewriter


def check_boundary(transformer_2: torch.nn.Module | None, boundary_ratio: float | None) -> None:
    """Raises `ValueError` for a second expert without `boundary_ratio`."""
    if transformer_2 is not None and boundary_ratio is None:
        raise ValueError(
            "`transformer_2` is never used without `boundary_ratio`, which is 0.875 in Wan2.2-T2V-A14B: pass it, or let "
            "`from_pipe(pipe)` read it from the pipeline."
        )


def as_composer(composer: AnchorComposer | DiffusionPipeline | str) -> AnchorComposer:
    """Makes a composer from a text-to-image pipeline, or from the name of one: a folder or a Hub repository.

    A text-to-video pipeline draws one frame, unless the composer's `call_defaults` set another `num_frames`.

    Raises:
        `ValueError`: `composer` is of another type.
    """
    if isinstance(composer, DiffusionPipeline):
        composer = AnchorComposer(composer)
    elif isinstance(composer, (str, os.PathLike)):
        composer = AnchorComposer.from_pretrained(composer)
    if not isinstance(composer, AnchorComposer):
        raise ValueError(
            f"`composer` must be an AnchorComposer, a text-to-image pipeline or its name, but is a {type(composer).__name__}."
        )
    # A composer without models has no pipeline. A text-to-video pipeline, such as Wan's, would draw a video for each image.
    pipeline = getattr(composer, "pipeline", None)
    if pipeline is not None and "num_frames" in inspect.signature(pipeline.__call__).parameters:
        composer.call_defaults = {"num_frames": 1} | composer.call_defaults
    return composer


def as_animator(animator: AnchorAnimator | DiffusionPipeline | str) -> AnchorAnimator:
    """Makes an animator from an image-to-video pipeline, or from the name of one: a folder or a Hub repository.

    Raises:
        `ValueError`: `animator` is of another type.
    """
    if isinstance(animator, DiffusionPipeline):
        return AnchorAnimator(animator)
    if isinstance(animator, (str, os.PathLike)):
        return AnchorAnimator.from_pretrained(animator)
    if not isinstance(animator, AnchorAnimator):
        raise ValueError(
            f"`animator` must be an AnchorAnimator, an image-to-video pipeline or its name, but is a {type(animator).__name__}."
        )
    return animator


def as_judge(judge: Judge | JudgeFunction | ChatEndpoint | Sequence[Any] | str) -> Judge:
    """Makes a judge from `(model, processor)`, an endpoint, a function, or the name of a model: a folder or Hub repository.

    Raises:
        `ValueError`: `judge` is of another type.
    """
    if isinstance(judge, ChatEndpoint):
        return AnchorJudge(endpoint=judge)
    _refuse_address("anchor_judge", judge)
    if isinstance(judge, (str, os.PathLike)):
        return AnchorJudge.from_pretrained(judge)
    if isinstance(judge, (tuple, list)) and len(judge) == 2:
        return AnchorJudge(*judge)
    other: Any = judge
    if callable(getattr(other, "judge", None)) and hasattr(other, "threshold"):
        return other
    if not callable(judge) or isinstance(judge, torch.nn.Module):
        raise ValueError(
            "`anchor_judge` must be an AnchorJudge, `(model, processor)`, a ChatEndpoint, a function of images, caption and "
            f"plan, or the name of a model, but is a {type(judge).__name__}."
        )
    return AnchorJudge(function=judge)


def as_rewriter(rewriter: FirstFrameRewriter | ChatEndpoint | Sequence[Any] | str) -> FirstFrameRewriter:
    """Makes a rewriter from `(model, tokenizer)`, an endpoint, or the name of a chat model: a folder or Hub repository.

    Raises:
        `ValueError`: `rewriter` is of another type.
    """
    if isinstance(rewriter, ChatEndpoint):
        return FirstFrameRewriter(endpoint=rewriter)
    _refuse_address("rewriter", rewriter)
    if isinstance(rewriter, (str, os.PathLike)):
        return FirstFrameRewriter.from_pretrained(rewriter)
    if isinstance(rewriter, (tuple, list)) and len(rewriter) == 2:
        model, tokenizer = rewriter
        kinds = " and ".join(type(part).__name__ for part in rewriter)
        if not hasattr(model, "generate") and not hasattr(tokenizer, "generate"):
            raise ValueError(
                f"`rewriter` must be `(model, tokenizer)` of a model that generates text, but is a pair of {kinds}."
            )
        if hasattr(tokenizer, "generate"):
            raise ValueError(f"`rewriter` must be `(model, tokenizer)`, in this order, but is a pair of {kinds}.")
        return FirstFrameRewriter(model, tokenizer)
    if not isinstance(rewriter, FirstFrameRewriter):
        raise ValueError(
            "`rewriter` must be a FirstFrameRewriter, `(model, tokenizer)`, a ChatEndpoint or the name of a chat model, but is "
            f"a {type(rewriter).__name__}."
        )
    return rewriter


def _refuse_address(name: str, component: Any) -> None:
    if isinstance(component, str) and component.lower().startswith(("http://", "https://")):
        raise ValueError(f"`{name}={component!r}` is a server's address: pass `ChatEndpoint({component!r}, model)`.")


def with_optional_components(init: Callable) -> Callable:
    """Decorates an `__init__` so that components in `_optional_components` may be left out; they are then `None`.

    The signature has no defaults for them, because with a default `from_pretrained(..., rewriter=None)` would still load the
    component.
    """

    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        given = list(inspect.signature(init).parameters)[1 : 1 + len(args)]
        absent = {name: None for name in self._optional_components if name not in given}
        init(self, *args, **absent | kwargs)

    return __init__
