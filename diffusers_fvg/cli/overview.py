"""`fvg models`, `fvg plan` and `fvg doctor`."""

from __future__ import annotations

import argparse

from .stages import add_generation, look_at


def add_models(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("models", help="list recipes: first frame, memory, licences, sizes on disk")
    parser.set_defaults(run=_models)


def add_plan(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "plan", help="show the memory, forwards and downloads that `fvg generate` would need; downloads no weights"
    )
    parser.add_argument("prompt", nargs="?", help="prompt of the video (optional)")
    add_generation(parser)
    parser.set_defaults(run=_plan)


def add_doctor(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "doctor", help="show versions, devices, attention backends, kernels, and which recipes fit on this machine"
    )
    parser.set_defaults(run=_doctor)


def _models(arguments: argparse.Namespace) -> None:
    from ..overview import models_text

    print(models_text())


def _plan(arguments: argparse.Namespace) -> None:
    from ..planning import plan_text
    from ..recipes.loading import hub_options, pinned

    looked = look_at(arguments, needs_prompt=False)
    model, request = looked.model, looked.request
    if arguments.lora is not None:
        pinned(arguments.lora, "The anchor LoRA", hub_options(arguments.token or None))
    size = request.height, request.width, request.num_frames
    parts = {part: model.parts[part] for part in ("composer", "rewriter", "lora")}
    print(
        plan_text(
            model.source, model.outline, request, model.stages(*size), model.plan(*size), parts, arguments.variant
        )
    )


def _doctor(arguments: argparse.Namespace) -> None:
    from ..overview import doctor_text

    print(doctor_text())
