"""The `fvg` command. Each subcommand parses, calls the library and prints; flags mirror argument names."""

from __future__ import annotations

import argparse
import sys

from .. import __version__
from ..shapes.command import add_shapes
from .options import add_model
from .overview import add_doctor, add_models
from .pipeline import load_pipeline
from .repositories import add_assemble, add_push
from .stages import add_animate, add_compose, add_generate, add_rewrite
from .training import add_train


def parser() -> argparse.ArgumentParser:
    """The command line, without anything heavy imported."""
    top = argparse.ArgumentParser(prog="fvg", description="Factorized Video Generation with diffusers.")
    top.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    adders = (add_generate, add_rewrite, add_compose, add_animate, add_train, add_assemble, add_push, add_models)
    for add in (*adders, add_doctor):
        add(commands)
    add_shapes(commands, add_model, load_pipeline)
    return top


def main(argv: list[str] | None = None) -> int:
    """Runs a command; bad input is one line on standard error and exit status 2."""
    arguments = parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"fvg {arguments.command}: {error}", file=sys.stderr)
        return 2
    return 0
