"""What a row of the table of bad inputs is, and what becomes of it."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


PROMPT = "A red circle moves to the right"
# Seconds of a row; all of them but a few are far below one.
LIMIT = 10
CLASSES = ("right", "late", "obscure", "silent", "hanging")


@dataclass(frozen=True)
class Row:
    """A bad input, and what a person gets.

    Args:
        name (`str`): what is given, of the row alone.
        give (`Callable`): gives it; it is passed the [`Shared`].
        words (`tuple[str, ...]`): that the message holds: the argument, its value, the fix.
        error (`type`): of the error, or of one that it is a kind of.
    """

    name: str
    give: Callable[[Shared], Any]
    words: tuple[str, ...]
    error: type[Exception] = ValueError


class ModelRan(BaseException):
    """A forward was entered. No handler of errors takes it."""


class Hanging(BaseException):
    """The row's time is up."""


class CommandRefused(Exception):
    """The command line said no: one line on standard error, exit status 2."""


def _ran(module: torch.nn.Module, arguments: tuple) -> None:
    raise ModelRan(type(module).__name__)


@contextlib.contextmanager
def no_model_runs() -> Iterator[None]:
    """Within it the forward of any module raises [`ModelRan`]."""
    hook = torch.nn.modules.module.register_module_forward_pre_hook(_ran)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises [`Hanging`] when the time is up, where Python code runs."""

    def stop(*unused: Any) -> None:
        raise Hanging

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(row: Row, shared: Shared, limit: float = LIMIT) -> tuple[str, str]:
    """The class of what becomes of a row, and what was said.

    `"right"`: an error of its kind with its words, before any model runs. `"obscure"`: another one. `"late"`: an error after
    a model ran. `"silent"`: none at all. `"hanging"`: none within the time.
    """
    model = None
    try:
        try:
            with time_limit(limit), no_model_runs(), shared.folder_of_a_row():
                row.give(shared)
        except ModelRan as ran:
            model = str(ran)
        if model is not None:
            with time_limit(limit), shared.folder_of_a_row():
                row.give(shared)
        return "silent", f"nothing was said{f', and {model} ran' * (model is not None)}"
    except Hanging:
        return "hanging", f"no answer within {limit} seconds"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        if model is not None:
            return "late", said
        is_right = isinstance(error, row.error) and all(word in str(error) for word in row.words)
        return "right" if is_right else "obscure", said


class Shared:
    """Pipelines that all rows share, each made when the first row asks for it, and a folder of each row's own."""

    def __init__(self) -> None:
        self.folder = Path()
        self._outlines: dict[tuple, Any] = {}

    def load(self) -> None:
        """Makes all of them now, outside of a row's time."""
        for name in ("pipe", "dreamer", "cogvideox", "image_to_video", "modular"):
            getattr(self, name)

    @contextlib.contextmanager
    def folder_of_a_row(self) -> Iterator[Path]:
        """A new folder, in which the row runs."""
        before = Path.cwd()
        with tempfile.TemporaryDirectory() as folder:
            self.folder = Path(folder)
            os.chdir(folder)
            try:
                yield self.folder
            finally:
                os.chdir(before)

    @functools.cached_property
    def pipe(self):
        from diffusers_fvg import load_embedded

        return _quiet(load_embedded())

    @functools.cached_property
    def dreamer(self):
        from diffusers_fvg import load_embedded_dreamer

        return _quiet(load_embedded_dreamer())

    @functools.cached_property
    def cogvideox(self):
        from tiny_cogvideox import tiny_cogvideox_pipeline

        return _quiet(tiny_cogvideox_pipeline())

    @functools.cached_property
    def image_to_video(self):
        from tiny import tiny_composer, tiny_rewriter
        from tiny_animators import ANIMATORS, tiny_animator

        from diffusers_fvg import FactorizedImageToVideoPipeline

        parts = {"rewriter": tiny_rewriter(), "composer": tiny_composer()}
        return _quiet(FactorizedImageToVideoPipeline(animator=tiny_animator(next(iter(ANIMATORS))), **parts))

    @functools.cached_property
    def modular(self):
        from diffusers_fvg import FactorizedVideoBlocks

        pipe = FactorizedVideoBlocks().init_pipeline()
        pipe.update_components(**{name: self.pipe.components.get(name) for name in pipe.component_names})
        return _quiet(pipe)

    def write(self, name: str, content: str | bytes) -> Path:
        """A file in the row's folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def repository(self) -> Path:
        """A copy of the embedded repository, whose weights are links to files of this machine."""
        from diffusers_fvg.embedded import EMBEDDED_FOLDER

        def copy(source: str, target: str) -> None:
            # Tests change small files alone: others are the same file under another name.
            if source.endswith(".safetensors"):
                with contextlib.suppress(OSError):
                    return os.link(source, target)
            shutil.copy(source, target)

        return Path(shutil.copytree(EMBEDDED_FOLDER, self.folder / "repository", copy_function=copy))

    def command(self, *arguments: str) -> None:
        """`fvg` with these arguments; `{}` is the row's folder."""
        from diffusers_fvg import cli
        from diffusers_fvg.recipes import outline

        make, written = outline.outline, io.StringIO()

        def outlined_once(*given: Any) -> Any:
            key = (given[0].folder, *given[1:4])
            if key not in self._outlines:
                self._outlines[key] = make(*given)
            return self._outlines[key]

        outline.outline = outlined_once
        try:
            with contextlib.redirect_stderr(written), contextlib.redirect_stdout(io.StringIO()):
                status = cli.main([argument.replace("{}", str(self.folder)) for argument in arguments])
        except SystemExit as exit:
            status = exit.code
        finally:
            outline.outline = make
        lines = [line for line in written.getvalue().splitlines() if line and not line.startswith("[transformers]")]
        if status == 2 and len(lines) <= 2 and lines[-1].startswith("fvg"):
            raise CommandRefused(lines[-1])
        if status:
            raise RuntimeError(f"exit status {status}: {written.getvalue()}")


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def short(value: Any) -> str:
    """A value in a row's name."""
    text = repr(value) if not callable(value) else getattr(value, "__name__", repr(value))
    return text if len(text) <= 40 else f"{text[:36]}... ({len(text)})"
