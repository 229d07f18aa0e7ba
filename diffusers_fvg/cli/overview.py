"""`fvg models` and `fvg doctor`."""

from __future__ import annotations

import argparse


def add_models(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("models", help="list recipes: first frame, memory, licences, sizes on disk")
    parser.set_defaults(run=_models)


def add_doctor(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "doctor", help="versions, devices, attention backends, kernels, and what would run here"
    )
    parser.set_defaults(run=_doctor)


def _models(arguments: argparse.Namespace) -> None:
    from ..overview import models_text

    print(models_text())


def _doctor(arguments: argparse.Namespace) -> None:
    from ..overview import doctor_text

    print(doctor_text())
