"""The `fvg` command. Each subcommand parses, calls the library and prints; flags mirror argument names."""

from __future__ import annotations

import argparse
import sys

from .. import __version__
from ..flags import Parser
from ..shapes.command import add_shapes
from .app import add_app
from .batch import add_batch
from .bench import add_bench
from .lora import add_lora
from .options import add_model
from .overview import add_doctor, add_models, add_plan
from .pipeline import load_pipeline
from .repositories import add_assemble, add_push
from .stages import add_animate, add_compose, add_generate, add_rewrite
from .training import add_train


def parser() -> argparse.ArgumentParser:
    """The command line, without anything heavy imported."""
    top = Parser(prog="fvg", description="Factorized Video Generation with diffusers.")
    top.add_argument("--version", action="version", version=f"%(prog)s {__version__}", help="print it and exit")
    commands = top.add_subparsers(
        dest="command", required=True, metavar="COMMAND", help="each has a --help of its own"
    )
    adders = (
        add_generate,
        add_batch,
        add_rewrite,
        add_compose,
        add_animate,
        add_plan,
        add_train,
        add_assemble,
        add_push,
    )
    for add in (*adders, add_app, add_bench, add_lora, add_models, add_doctor):
        add(commands)
    add_shapes(commands, add_model, load_pipeline)
    return top


def main(argv: list[str] | None = None) -> int:
    """Runs a command. What cannot be done is one line on standard error and exit status 2; Ctrl-C is 130."""
    arguments = parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        print(f"fvg {arguments.command}: stopped", file=sys.stderr)
        return 130
    # A shape that torch refuses and memory that is not there are `RuntimeError`s.
    except (ValueError, OSError, ArithmeticError, ImportError, MemoryError, RuntimeError) as error:
        print(f"fvg {arguments.command}: {_line(error)}", file=sys.stderr)
        return 2
    except Exception as error:  # Of a library that was given a damaged file, most likely.
        print(f"fvg {arguments.command}: {type(error).__name__}: {_line(error)}", file=sys.stderr)
        return 1
    return 0


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    # The CPU's allocator has no class of its own.
    if is_memory or "DefaultCPUAllocator" in text:
        text = f"out of memory: give a --memory, fewer pixels or frames, or --quantize ({text})"
    return text if len(text) <= 600 else f"{text[:600]} ..."
