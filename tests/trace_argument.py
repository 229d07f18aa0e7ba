"""Follows an argument of a call through the package: `python tests/trace_argument.py prompt` (or `anchors`).

A station is a call of a Python function of the package that receives the value in an argument: the object itself, not
an equal one, or a list, tuple, dict or dataclass that holds it, up to `DEPTH` of them deep. `self`, closures,
generators and comprehensions make no station, and neither does code outside the package. Stations are in the order in
which their calls begin; a return makes none. Two stations in a row that lie in different files are a move. The call is
a factorized one of the tiny pipeline, whose rewriter answers twice in vain; `anchors` follows the picture of one
`Anchor`.
"""

import argparse
import dataclasses
import inspect
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any, NamedTuple

import torch
from tiny import tiny_pipeline

import diffusers_fvg
from diffusers_fvg import Anchor


DEPTH = 5
SIZE = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16, "num_inference_steps": 2}


class Station(NamedTuple):
    file: str
    function: str


def trace(call: Callable[[], Any], value: Any, package: ModuleType = diffusers_fvg) -> list[Station]:
    """Makes the call and returns the stations of `value`."""
    folder = Path(package.__file__).parent
    stations = []

    def on_event(frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if event != "call" or code.co_flags & inspect.CO_GENERATOR or folder not in Path(code.co_filename).parents:
            return
        received = [frame.f_locals[name] for name in _arguments(code) if name != "self"]
        if _holds(received, value, DEPTH + 1):
            stations.append(Station(Path(code.co_filename).relative_to(folder).as_posix(), code.co_qualname))

    before = sys.getprofile()
    sys.setprofile(on_event)
    try:
        call()
    finally:
        sys.setprofile(before)
    return stations


def count(stations: list[Station]) -> tuple[int, int]:
    """Numbers of files and of moves between them."""
    files = [station.file for station in stations]
    return len(set(files)), sum(before != after for before, after in itertools.pairwise(files))


def trace_pipeline(argument: str) -> list[Station]:
    """Stations of `prompt` or `anchors` in a factorized call of the tiny pipeline."""
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    # Joined at run time: no literal is the same object.
    prompt = " ".join(["a", "red", "circle"])
    # A tensor, which stays the same object where pictures of other kinds are decoded.
    picture = torch.zeros(3, 32, 32)
    if argument == "anchors":
        return trace(lambda: pipe(prompt, anchors=[Anchor(picture)], **SIZE), picture)
    # The prompt stands in as caption. A copy of it: what stage 2 receives is a caption, not the prompt.
    rewrite = pipe.rewriter.rewrite_outcomes

    def copied(*args, **options):
        return [
            dataclasses.replace(outcome, made="".join(list(outcome.made))) for outcome in rewrite(*args, **options)
        ]

    pipe.rewriter.rewrite_outcomes = copied
    return trace(lambda: pipe(prompt, **SIZE), prompt)


def _arguments(code: CodeType) -> tuple[str, ...]:
    starred = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + starred]


def _holds(container: Any, value: Any, depth: int) -> bool:
    if container is value or depth == 0:
        return container is value
    if isinstance(container, dict):
        items = container.values()
    elif isinstance(container, (list, tuple)):
        items = container
    elif dataclasses.is_dataclass(container) and not isinstance(container, type):
        items = [getattr(container, field.name, None) for field in dataclasses.fields(container)]
    else:
        return False
    return any(_holds(item, value, depth - 1) for item in items)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("argument", choices=("prompt", "anchors"))
    stations = trace_pipeline(parser.parse_args().argument)
    print("\n".join(f"{file}:{function}" for file, function in stations))
    print("{} files, {} moves".format(*count(stations)))
