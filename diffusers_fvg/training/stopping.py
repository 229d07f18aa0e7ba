"""Stops a run on signals, and keeps a second run from writing to the same folder."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from accelerate import Accelerator
from filelock import FileLock, Timeout

from .processes import on_main_process


class Interrupted(BaseException):
    """A signal arrived during a validation, which ends it."""


class StopRequest:
    """Context manager that records Ctrl-C and SIGTERM, so that the run can stop after the current step.

    In a run of one process, a second Ctrl-C stops at once. With several processes it does not, because launchers repeat the
    signal while a process still saves.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, num_processes: int = 1):
        self.alone, self._interruptible = num_processes == 1, False
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python allows signal handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                # A process that ignores Ctrl-C, as under `nohup`, keeps ignoring it.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Context manager whose block ends at once when a signal arrives."""
        self._interruptible = True
        try:
            yield
        except Interrupted:
            pass
        finally:
            self._interruptible = False

    def _received(self, number: int, frame: FrameType | None) -> None:
        again, self.signal = self.signal is not None, number
        if again and self.alone:
            raise KeyboardInterrupt
        if self._interruptible:
            raise Interrupted


@contextlib.contextmanager
def only_run_in(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Context manager that locks a folder for this run. The system releases the lock at the latest when the process ends.

    Raises:
        `ValueError`: another run has locked the folder.
    """
    lock = FileLock(folder / ".lock")

    def acquire() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"`output_dir={str(folder)!r}` is written to by another run; wait for its end, or choose another folder."
            ) from error

    on_main_process(accelerator, acquire)
    try:
        yield
    finally:
        lock.release()
