"""One worker for one device: people's orders wait in a queue, and run one after the other."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffusers.utils import logging

from ..pipelines.profiles import CARDS, pipeline_stages, plan_memory
from .limits import Limits
from .orders import Order, Result
from .pictures import PictureFile
from .previews import Previews
from .stopping import Cancelled, ask_between_blocks


if TYPE_CHECKING:
    from ..pipelines.stages import FactorizedStages

logger = logging.get_logger(__name__)

ENDED = ("done", "failed", "cancelled")
# The stages that an order reports, in their order; which of them come is known before they do.
STEPS = {
    "rewrite": ("rewrite",),
    "compose": ("compose", "judge"),
    "animate": ("encode", "denoise", "decode"),
    "generate": ("rewrite", "compose", "judge", "derive", "encode", "denoise", "decode"),
}


class QueueFull(ValueError):
    """No more orders are taken for now."""


State = Literal["waiting", "running", "done", "failed", "cancelled"]


@dataclass
class Job:
    """An order on its way.

    Attributes:
        id (`str`): which nobody guesses.
        owner (`str`): whose it is.
        state (`str`): `"waiting"`, `"running"`, `"done"`, `"failed"` or `"cancelled"`.
        stage, step, steps: where it is.
        seconds_left (`float`, *optional*): of the run, from this and from earlier runs; `None` where too little is known.
        preview (`bytes`, *optional*): of a video that is being denoised, an animated WebP.
        result ([`Result`], *optional*): once it is done.
        error (`str`, *optional*): what was wrong, a sentence.
    """

    id: str
    owner: str
    order: Order
    state: State = "waiting"
    stage: str = ""
    step: int = 0
    steps: int = 0
    seconds_left: float | None = None
    preview: bytes | None = field(default=None, repr=False)
    result: Result | None = None
    error: str | None = None
    is_unwanted: bool = field(default=False, repr=False)
    ended: threading.Event = field(default_factory=threading.Event, repr=False)


class Worker:
    """Runs the orders of all people on one pipeline.

    Args:
        pipe ([`FactorizedStages`]): loaded and placed. Nothing else may call it meanwhile.
        limits ([`Limits`], *optional*): of the server.
    """

    def __init__(self, pipe: FactorizedStages, limits: Limits | None = None):
        self.pipe = pipe
        self.limits = (limits or Limits()).of_model(pipe.call_defaults)
        self.folder = Path(tempfile.mkdtemp(prefix="fvg-app-"))
        self.keep = partial(PictureFile.of, self.folder)
        # People by who came last, and each one's jobs by when they came.
        self._jobs: OrderedDict[str, dict[str, Job]] = OrderedDict()
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._change, self._closed = threading.Condition(), False
        self._previews: Previews | None = None
        # Looks at every parameter of every model.
        self.smallest_card = lru_cache(maxsize=256)(partial(_smallest_card, pipe))
        self._handles = ask_between_blocks(pipe, lambda: self._running is not None and self._running.is_unwanted)
        # Seconds that a step of a stage took, by stage and size.
        self._seconds: dict[tuple, float] = {}
        self._thread = threading.Thread(target=self._work, name="fvg-app-worker", daemon=True)
        self._thread.start()

    # -- what people ask ----------------------------------------------------------------------------------------------

    def submit(self, owner: str, order: Order) -> Job:
        """Checks an order and puts it in the queue.

        Raises:
            `ValueError`: an order that cannot be carried out, or [`QueueFull`].
        """
        order = order.checked(self.pipe, self.limits)
        with self._change:
            jobs = self._of(owner)
            mine = [job for job in jobs.values() if job.state not in ENDED]
            if len(mine) >= self.limits.waiting:
                raise QueueFull(
                    f"{len(mine)} of your jobs wait or run, the most at a time: cancel one, or wait for it."
                )
            if len(self._waiting) >= self.limits.queue:
                raise QueueFull(f"{len(self._waiting)} jobs wait, the most on this server: try again later.")
            job = Job(secrets.token_urlsafe(16), owner, order)
            jobs[job.id] = job
            self._waiting.append(job)
            self._forget_old(jobs)
            self._change.notify_all()
        return job

    def job(self, owner: str, id: str) -> Job:
        """One of a person's jobs.

        Raises:
            `KeyError`: none of theirs.
        """
        with self._change:
            return self._of(owner)[id]

    def find(self, id: str) -> Job | None:
        """The job of an id, whoever asks."""
        with self._change:
            return next((jobs[id] for jobs in self._jobs.values() if id in jobs), None)

    def history(self, owner: str) -> list[Job]:
        """A person's jobs, the latest first."""
        with self._change:
            return list(self._of(owner).values())[::-1]

    def position(self, job: Job) -> int:
        """How many jobs run before it."""
        with self._change:
            if job not in self._waiting:
                return 0
            return self._waiting.index(job) + (self._running is not None)

    def seconds_before(self, order: Order) -> float | None:
        """What the video stage of such an order took here lately; `None` before the first."""
        size = order.height, order.width, order.num_frames
        if ("denoise", *size) not in self._seconds:
            return None
        return seconds_of(STEPS["animate"], self._seconds, size, order.steps(self.pipe))

    def cancel(self, owner: str, id: str) -> Job:
        """Ends a job: one that waits at once, one that runs before the next block of a model. One that has ended stays as it is."""
        with self._change:
            job = self._of(owner)[id]
            if job in self._waiting:
                self._waiting.remove(job)
                self._end(job, "cancelled")
            elif job is self._running:
                job.is_unwanted = True
                # Stage 1 asks for it before every token.
                self.pipe._interrupt = True
        return job

    def close(self) -> None:
        """Ends all jobs, and deletes what they made."""
        with self._change:
            self._closed = True
            for job in [*self._waiting, *([self._running] if self._running else [])]:
                job.is_unwanted = True
            self.pipe._interrupt = True
            self._change.notify_all()
        self._thread.join()
        for handle in self._handles:
            handle.remove()
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- the worker's thread ------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                job = self._running = self._waiting.pop(0)
                job.state = "running"
            state, result, error = self._run(job)
            with self._change:
                self._running = None
                job.result, job.error = result, error
                self._end(job, state)

    def _run(self, job: Job) -> tuple[State, Result | None, str | None]:
        clock = _Clock(job, self._seconds, job.order.steps(self.pipe))
        file = self.folder / job.id / "video.mp4"

        def report(stage: str, step: int, steps: int) -> None:
            if job.is_unwanted:
                raise Cancelled
            clock.tell(stage, step, steps)

        try:
            result = job.order.run(self.pipe, report, file, self.keep, partial(self._preview, job))
        except Cancelled:
            result = None
        except Exception as error:
            # Whatever it is, the next one's turn comes.
            result = None
            if not job.is_unwanted:
                logger.warning(
                    f"A job failed: {type(error).__name__}: {error}", exc_info=not isinstance(error, ValueError)
                )
                return "failed", None, sentence(error)
            # A call that was interrupted has no frames, and whoever takes the first of them fails.
        if job.is_unwanted or result is None:
            shutil.rmtree(file.parent, ignore_errors=True)
            return "cancelled", None, None
        return "done", result, None

    def _preview(self, job: Job, call: dict[str, Any]) -> Callable[..., dict] | None:
        """The callback that previews a job's video."""
        self._previews = self._previews or Previews(self.pipe)
        return self._previews.callback(self.pipe, call, partial(setattr, job, "preview"))

    # -- with the lock held -------------------------------------------------------------------------------------------

    def _of(self, owner: str) -> dict[str, Job]:
        jobs = self._jobs.setdefault(owner, {})
        self._jobs.move_to_end(owner)
        idle = [name for name, theirs in self._jobs.items() if all(job.state in ENDED for job in theirs.values())]
        for name in idle[: max(0, len(self._jobs) - self.limits.people)]:
            if name != owner:
                for job in self._jobs.pop(name).values():
                    self._delete(job)
        return jobs

    def _forget_old(self, jobs: dict[str, Job]) -> None:
        ended = [job for job in jobs.values() if job.state in ENDED]
        for job in ended[: max(0, len(ended) - self.limits.kept)]:
            self._delete(jobs.pop(job.id))

    def _delete(self, job: Job) -> None:
        shutil.rmtree(self.folder / job.id, ignore_errors=True)

    def _end(self, job: Job, state: State) -> None:
        job.state, job.seconds_left, job.preview = state, None, None
        # The result has what the model saw of them.
        job.order = replace(job.order, anchors=None, picture=None)
        job.ended.set()


def _smallest_card(pipe: FactorizedStages, height: int, width: int, num_frames: int) -> tuple[str, int] | None:
    """The smallest card that a video of this size fits on, with the bytes of its peak, as computed; `None` if it fits on none."""
    stages = pipeline_stages(pipe, height, width, num_frames)
    for card in CARDS:
        try:
            return card, plan_memory(stages, card).peak
        except ValueError:
            continue
    return None


class _Clock:
    """How far a job is, and how long it will take."""

    def __init__(self, job: Job, seconds: dict[tuple, float], denoise_steps: int):
        self.job, self.seconds, self.denoise_steps = job, seconds, denoise_steps
        order = job.order
        self.size = order.height, order.width, order.num_frames
        self.since = time.monotonic()

    def tell(self, stage: str, step: int, steps: int) -> None:
        job, now = self.job, time.monotonic()
        advanced = step - job.step if stage == job.stage and step > job.step else max(step, 1)
        key = (stage, *self.size)
        took = (now - self.since) / advanced
        # What one step took lately: the first one of all warms up.
        self.seconds[key] = took if key not in self.seconds else 0.8 * self.seconds[key] + 0.2 * took
        self.since, job.stage, job.step, job.steps = now, stage, step, steps
        job.seconds_left = self._left()

    def _left(self) -> float | None:
        job, planned = self.job, STEPS[self.job.order.stage]
        later = planned[planned.index(job.stage) + 1 :] if job.stage in planned else ()
        if "denoise" in later and ("denoise", *self.size) not in self.seconds:
            # Most of the time, and not known yet.
            return None
        now = (job.steps - job.step) * self.seconds[job.stage, *self.size]
        return now + seconds_of(later, self.seconds, self.size, self.denoise_steps)


def seconds_of(
    stages: Iterable[str], seconds: dict[tuple, float], size: tuple[int | None, ...], denoise_steps: int
) -> float:
    """What stages take, as far as they ran before at that size."""
    steps = {"denoise": denoise_steps}
    return sum(seconds.get((stage, *size), 0.0) * steps.get(stage, 1) for stage in stages)


def sentence(error: Exception) -> str:
    """What went wrong, as a person reads it: no traceback, no place on this machine."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or "DefaultCPUAllocator" in text:
        return "The memory was not enough: choose fewer pixels or frames."
    if isinstance(error, (ValueError, FloatingPointError)) and text:
        return text if len(text) <= 600 else f"{text[:600]} ..."
    return f"The job failed with a {name}; the server's log says more. Try again, or change what you asked for."
