from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class StageProgress:
    """Progress bar, callback and timings for all stages of a call.

    Args:
        pipeline: provides the progress bar and is passed to the callback.
        callback (`Callable`, *optional*): `callback(pipeline, stage, step, steps)` after each step of each stage.
    """

    def __init__(self, pipeline, callback: Callable | None = None):
        self.pipeline, self.callback = pipeline, callback
        self.timings: dict[str, float] = {}
        self.bar: Any = None
        # The run's device, once it is known, and whether hooks move models to it.
        self.device: torch.device | None = None
        self.has_hooks = True
        self._thread, self._stage = threading.get_ident(), ""

    @property
    def may_continue(self) -> bool:
        """Whether a nested call may join this run: it comes from the run's thread, between two stages."""
        return self._thread == threading.get_ident() and not self._stage

    @contextmanager
    def stage(self, name: str, steps: int = 1) -> Iterator[Callable[[int, int], None]]:
        """Times a stage. Yields `report(step, steps)`, to be called after each step; the last step is reported at the end."""
        if self.bar is None:
            self.bar = self.pipeline.progress_bar(total=0)
        self.bar.total += steps
        self.bar.set_description(name)
        done, planned, started = 0, steps, time.perf_counter()
        self._stage = name

        def report(step: int, steps: int) -> None:
            nonlocal done, planned
            self.bar.total += steps - planned
            self.bar.update(step - done)
            done, planned = step, steps
            if self.callback is not None:
                self.callback(self.pipeline, name, step, steps)

        try:
            yield report
            if done < planned and not self.pipeline.interrupt:
                report(planned, planned)
        finally:
            self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - started
            self._stage = ""

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
