"""Kills a function in a separate process, like SIGKILL, at a random moment or at one of its steps."""

import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator


# Audit events of Python that change a folder or send a request; "open" counts only for writing.
STEPS = {
    "socket.connect",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "shutil.rmtree",
    "shutil.copyfile",
}


def count_steps(work: Callable[[], None]) -> int:
    """Returns the number of steps of the work."""
    count = multiprocessing.get_context("fork").Value("i", 0)
    _run(work, lambda: setattr(count, "value", count.value + 1))
    return count.value


def kill_at_step(work: Callable[[], None], step: int) -> bool:
    """Kills the work just before a step, counted from 1. Returns whether it reached that step."""
    left = [step]

    def at_step() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return _run(work, at_step) == -signal.SIGKILL


def kill_after(work: Callable[[], None], seconds: float) -> bool:
    """Kills the work after some seconds. Returns whether it had not finished by then."""
    return _run(work, None, seconds) == -signal.SIGKILL


def kills(
    work: Callable[[], None], count: int, seed: int = 0, undo: Callable[[], None] = lambda: None
) -> Iterator[int]:
    """Kills the work `count` times, and yields the number after each: half at moments, half at steps that are drawn.

    It is done once without a kill before, for its time and its steps. `undo` is called after each time that it was through.
    """
    began = time.monotonic()
    draw, steps, done = random.Random(seed), count_steps(work), 0
    seconds = time.monotonic() - began
    undo()
    while done < count:
        killed = kill_at_step(work, draw.randint(1, steps)) if done % 2 else kill_after(work, draw.uniform(0, seconds))
        if killed:
            done += 1
            yield done
        else:
            undo()


def _run(work: Callable[[], None], at_step: Callable[[], None] | None, seconds: float | None = None) -> int:
    """Runs the work in a fork without its output; returns the exit status."""

    def child() -> None:
        place = os.open(os.devnull, os.O_WRONLY)
        os.dup2(place, 1)
        if at_step is not None:

            def hook(event: str, arguments: tuple) -> None:
                if event in STEPS or event == "open" and _writes(arguments):
                    at_step()

            sys.addaudithook(hook)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode


def _writes(arguments: tuple) -> bool:
    _, mode, flags = arguments
    return bool(set(mode or "") & set("wax+")) or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))
