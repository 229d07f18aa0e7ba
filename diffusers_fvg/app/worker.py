"""One worker for one device: orders wait in a queue and run one after the other."""

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
# Stages that each kind of order reports, in their order.
STEPS = {
    "rewrite": ("rewrite",),
    "compose": ("compose", "judge"),
    "animate": ("encode", "denoise", "decode"),
    "generate": ("rewrite", "compose", "judge", "derive", "encode", "denoise", "decode"),
}


class QueueFull(ValueError):
    """Raised when the queue accepts no more orders for now."""


State = Literal["waiting", "running", "done", "failed", "cancelled"]


@dataclass
class Job:
    """An order with its progress and its result.

    Attributes:
        id (`str`): random id.
        owner (`str`): owner of the job.
        order ([`Order`]): the checked order.
        state (`str`): `"waiting"`, `"running"`, `"done"`, `"failed"` or `"cancelled"`.
        stage, step, steps: current stage, its current step and its number of steps.
        seconds_left (`float`, *optional*): estimate from this and earlier runs; `None` if there are too few of them.
        preview (`bytes`, *optional*): animated WebP of a video that is being denoised.
        result ([`Result`], *optional*): results, once the job is done.
        error (`str`, *optional*): error of a failed job, as a sentence.
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
    """Runs the orders of all users on one pipeline.

    Args:
        pipe ([`FactorizedStages`]): pipeline that is loaded and on its device. Nothing else may call it meanwhile.
        limits ([`Limits`], *optional*): limits of the server.
    """

    def __init__(self, pipe: FactorizedStages, limits: Limits | None = None):
        self.pipe = pipe
        self.limits = (limits or Limits()).of_model(pipe.call_defaults)
        self.folder = Path(tempfile.mkdtemp(prefix="fvg-app-"))
        self.keep = partial(PictureFile.of, self.folder)
        # Users, the most recently active last; each with their jobs in the order of submission.
        self._jobs: OrderedDict[str, dict[str, Job]] = OrderedDict()
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._change, self._closed = threading.Condition(), False
        self._previews: Previews | None = None
        # Cached, because it reads every parameter of every model.
        self.smallest_card = lru_cache(maxsize=256)(partial(_smallest_card, pipe))
        self._handles = ask_between_blocks(pipe, lambda: self._running is not None and self._running.is_unwanted)
        # Seconds per step, by stage and size.
        self._seconds: dict[tuple, float] = {}
        self._thread = threading.Thread(target=self._work, name="fvg-app-worker", daemon=True)
        self._thread.start()

    # -- what people ask ----------------------------------------------------------------------------------------------

    def submit(self, owner: str, order: Order) -> Job:
        """Checks an order and puts it in the queue.

        Raises:
            `ValueError`: the order cannot be run.
            `QueueFull`: the user or the server has too many unfinished jobs.
        """
        order = order.checked(self.pipe, self.limits)
        with self._change:
            jobs = self._of(owner)
            mine = [job for job in jobs.values() if job.state not in ENDED]
            if len(mine) >= self.limits.waiting:
                raise QueueFull(
                    f"You have {len(mine)} unfinished jobs, the most at a time: cancel one, or wait for it."
                )
            if len(self._waiting) >= self.limits.queue:
                raise QueueFull(f"{len(self._waiting)} jobs are waiting, the most on this server: try again later.")
            job = Job(secrets.token_urlsafe(16), owner, order)
            jobs[job.id] = job
            self._waiting.append(job)
            self._forget_old(jobs)
            self._change.notify_all()
        return job

    def job(self, owner: str, id: str) -> Job:
        """Returns a job of an owner.

        Raises:
            `KeyError`: the owner has no such job.
        """
        with self._change:
            return self._of(owner)[id]

    def find(self, id: str) -> Job | None:
        """Returns the job with an id, whoever its owner is."""
        with self._change:
            return next((jobs[id] for jobs in self._jobs.values() if id in jobs), None)

    def history(self, owner: str) -> list[Job]:
        """Returns the jobs of an owner, the latest first."""
        with self._change:
            return list(self._of(owner).values())[::-1]

    def position(self, job: Job) -> int:
        """Returns how many jobs run before this one."""
        with self._change:
            if job not in self._waiting:
                return 0
            return self._waiting.index(job) + (self._running is not None)

    def seconds_before(self, order: Order) -> float | None:
        """Estimates the seconds of stage 3 of an order from earlier runs of its size; `None` before the first."""
        size = order.height, order.width, order.num_frames
        if ("denoise", *size) not in self._seconds:
            return None
        return seconds_of(STEPS["animate"], self._seconds, size, order.steps(self.pipe))

    def cancel(self, owner: str, id: str) -> Job:
        """Cancels a job: a waiting one at once, a running one before the next block of a model. A finished one does not change."""
        with self._change:
            job = self._of(owner)[id]
            if job in self._waiting:
                self._waiting.remove(job)
                self._end(job, "cancelled")
            elif job is self._running:
                job.is_unwanted = True
                # Stage 1 checks this before every token.
                self.pipe._interrupt = True
        return job

    def close(self) -> None:
        """Cancels all jobs and deletes their files."""
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
            # An error of one job does not stop the worker.
            result = None
            if not job.is_unwanted:
                logger.warning(
                    f"A job failed: {type(error).__name__}: {error}", exc_info=not isinstance(error, ValueError)
                )
                return "failed", None, sentence(error)
            # An interrupted call returns no frames, so that the code that reads the first of them fails.
        if job.is_unwanted or result is None:
            shutil.rmtree(file.parent, ignore_errors=True)
            return "cancelled", None, None
        return "done", result, None

    def _preview(self, job: Job, call: dict[str, Any]) -> Callable[..., dict] | None:
        """Returns the callback that previews a job's video."""
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
        # The result contains the pictures as the model saw them.
        job.order = replace(job.order, anchors=None, picture=None)
        job.ended.set()


def _smallest_card(pipe: FactorizedStages, height: int, width: int, num_frames: int) -> tuple[str, int] | None:
    """Returns the smallest GPU memory in `CARDS` for a video of this size and its computed peak bytes; `None` if none is enough."""
    stages = pipeline_stages(pipe, height, width, num_frames)
    for card in CARDS:
        try:
            return card, plan_memory(stages, card).peak
        except ValueError:
            continue
    return None


class _Clock:
    """Tracks the progress of a job and estimates the time left."""

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
        # A moving average of the time per step.
        self.seconds[key] = took if key not in self.seconds else 0.8 * self.seconds[key] + 0.2 * took
        self.since, job.stage, job.step, job.steps = now, stage, step, steps
        job.seconds_left = self._left()

    def _left(self) -> float | None:
        job, planned = self.job, STEPS[self.job.order.stage]
        later = planned[planned.index(job.stage) + 1 :] if job.stage in planned else ()
        if "denoise" in later and ("denoise", *self.size) not in self.seconds:
            # Denoising takes most of the time, and its speed at this size is not known yet.
            return None
        now = (job.steps - job.step) * self.seconds[job.stage, *self.size]
        return now + seconds_of(later, self.seconds, self.size, self.denoise_steps)


def seconds_of(
    stages: Iterable[str], seconds: dict[tuple, float], size: tuple[int | None, ...], denoise_steps: int
) -> float:
    """Returns the seconds of stages at a size; stages that have not run at it count as 0."""
    steps = {"denoise": denoise_steps}
    return sum(seconds.get((stage, *size), 0.0) * steps.get(stage, 1) for stage in stages)


def sentence(error: Exception) -> str:
    """Returns an error as a sentence for users, without a traceback or a local path."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or "DefaultCPUAllocator" in text:
        return "The machine ran out of memory: choose fewer pixels or frames."
    if isinstance(error, (ValueError, FloatingPointError)) and text:
        return text if len(text) <= 600 else f"{text[:600]} ..."
    return f"The job failed with {name}; the server's log has the details. Try again, or change the settings."
