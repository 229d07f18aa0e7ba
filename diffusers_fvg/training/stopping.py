"""How a run ends before its last step, and that no second one writes to its folder."""

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
    """Ends what runs between two steps."""


class StopRequest:
    """Ctrl-C and SIGTERM within its context: a wish that the run looks at after every step.

    Of a process that runs alone a second Ctrl-C stops at once. Among several, launchers send the signal again to those that
    are busy saving.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, num_processes: int = 1):
        self.alone, self._interruptible = num_processes == 1, False
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python lets no other thread set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                # What was started to outlive its terminal ignores Ctrl-C.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within it a signal ends what runs at once, and the context with it."""
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
    """The system's lock on a folder, which ends with the process at the latest.

    Raises:
        `ValueError`: another run has it.
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
