"""`fvg models`, `fvg plan` and `fvg doctor`."""

from __future__ import annotations

import argparse

from .options import add_sampling
from .pipeline import look
from .stages import SAMPLING, add_call, call_of, needed_parts, open_image


def add_models(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("models", help="list recipes: first frame, memory, licences, sizes on disk")
    parser.set_defaults(run=_models)


def add_plan(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "plan", help="what `fvg generate` would take: memory, forwards, downloads; nothing large is fetched"
    )
    add_call(parser)
    add_sampling(parser)
    parser.set_defaults(run=_plan, negative_prompt=None)


def add_doctor(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "doctor", help="versions, devices, attention backends, kernels, and what would run here"
    )
    parser.set_defaults(run=_doctor)


def _models(arguments: argparse.Namespace) -> None:
    from ..overview import models_text

    print(models_text())


def _plan(arguments: argparse.Namespace) -> None:
    from ..planning import plan_text

    image = open_image(arguments.image) if arguments.image else None
    call = call_of(arguments, (*SAMPLING, "mode", "num_moments", "first_frame_prompt"))
    # A LoRA that is missing is told of in the text.
    model = look(arguments, **needed_parts(arguments) | {"lora": False})
    # Any text: its length changes nothing.
    request = model.check(prompt="a prompt", **call, **({} if image is None else {"image": image}))
    size = request.height, request.width, request.num_frames
    parts = {part: model.parts[part] for part in ("composer", "rewriter")}
    print(
        plan_text(
            model.source, model.outline, request, model.stages(*size), model.plan(*size), parts, arguments.variant
        )
    )


def _doctor(arguments: argparse.Namespace) -> None:
    from ..overview import doctor_text

    print(doctor_text())
