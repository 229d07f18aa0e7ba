"""The `fvg` command. Each subcommand parses its flags, calls the library and prints; flags mirror argument names."""

from __future__ import annotations

import argparse
import functools
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


@functools.cache
def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line; imports neither torch nor diffusers."""
    top = Parser(prog="fvg", description="Factorized Video Generation with diffusers.")
    top.add_argument(
        "--version", action="version", version=f"%(prog)s {__version__}", help="print the version and exit"
    )
    commands = top.add_subparsers(
        dest="command", required=True, metavar="COMMAND", help="each command has its own --help"
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
    """Runs a command and returns its exit status.

    The status is 0 for success, 2 for an expected error, which is printed as one line on standard error, 1 for an unexpected
    one, and 130 for Ctrl-C.
    """
    arguments = parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        print(f"fvg {arguments.command}: stopped", file=sys.stderr)
        return 130
    # Torch raises `RuntimeError` for wrong shapes and for a lack of memory.
    except (ValueError, OSError, ArithmeticError, ImportError, MemoryError, RuntimeError) as error:
        print(f"fvg {arguments.command}: {_line(error)}", file=sys.stderr)
        return 2
    except Exception as error:  # Most likely a library's error about a damaged file.
        print(f"fvg {arguments.command}: {type(error).__name__}: {_line(error)}", file=sys.stderr)
        return 1
    return 0


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    # The CPU's allocator has no exception class of its own.
    if is_memory or "DefaultCPUAllocator" in text:
        text = f"out of memory: use --memory, fewer pixels or frames, or --quantize ({text})"
    return text if len(text) <= 600 else f"{text[:600]} ..."
