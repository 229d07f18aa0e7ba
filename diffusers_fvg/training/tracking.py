"""Sends a run's values and videos to its tracker from a separate thread, so that a failing or hanging tracker never stops it."""

from __future__ import annotations

import io
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import PIL.Image
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from diffusers.utils import logging

from ..media.reading import read_video
from ..publishing.privacy import without_paths
from .config import TrainConfig


logger = logging.get_logger(__name__)

# Seconds that a call may take before the tracker is dropped. An upload over a slow line may take a while.
TIMEOUT = 120.0
# TensorBoard shows images only, so videos are sent as GIFs. They are scaled down to this side length in pixels, because a
# full-size GIF would be a hundred times as large as the mp4.
GIF_SIDE = 320


class Tracking:
    """Tracker of one expert's run, on the main process. Methods return at once; their calls run in order in the background.

    Args:
        accelerator (`Accelerator`): accelerator with the tracker, see [`processes.make_accelerator`].
        config ([`TrainConfig`]): config of the run. The tracker gets it without paths of this computer.
        expert (`str`): name of the expert, which names the run.
    """

    def __init__(self, accelerator: Accelerator, config: TrainConfig, expert: str):
        self.accelerator, self.name = accelerator, config.tracker
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._began: float | None = None
        self._given_up = config.tracker == "none" or not accelerator.is_main_process
        if self._given_up:
            return
        # A daemon thread does not keep the process from ending if it hangs.
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._thread.start()
        shown = {name: str(value) for name, value in without_paths(asdict(config)).items()}
        # TensorBoard has one folder per run, W&B one project with several runs.
        project = expert if self.name == "tensorboard" else Path(config.output_dir).name
        options = {"wandb": {"name": expert, "dir": config.output_dir}}
        self._tell(lambda: accelerator.init_trackers(project, shown, init_kwargs=options))

    def log(self, values: dict[str, float], step: int) -> None:
        """Sends numbers of a step."""
        self._tell(lambda: self.accelerator.log(values, step=step))

    def log_video(self, name: str, path: Path, step: int) -> None:
        """Sends an mp4 of a step."""

        def work() -> None:
            for tracker in self.accelerator.trackers:
                _log_video(tracker, name, path, step)

        self._tell(work)

    def close(self) -> None:
        """Ends the tracker's run. Waits for pending calls, unless one takes longer than `TIMEOUT`."""
        if self._given_up:
            return
        self._tell(lambda: [tracker.finish() for tracker in self.accelerator.trackers])
        self._calls.put(None)
        while self._thread.is_alive() and not self._given_up:
            self._thread.join(timeout=0.1)
            self._check_time()
        # Keeps `Accelerator.end_training` from ending the trackers again.
        self.accelerator.trackers = []

    def _tell(self, call: Callable[[], Any]) -> None:
        if not self._given_up:
            self._check_time()
            self._calls.put(call)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None and not self._given_up:
            self._began = time.monotonic()
            try:
                call()
            except Exception as error:
                self._give_up(f"failed: {type(error).__name__}: {error}")
            self._began = None

    def _check_time(self) -> None:
        began = self._began
        if began is not None and time.monotonic() - began > TIMEOUT:
            self._give_up(f"has been busy with one call for more than {TIMEOUT:g} seconds")

    def _give_up(self, reason: str) -> None:
        if not self._given_up:
            self._given_up = True
            self.accelerator.trackers = []
            logger.warning(f"The tracker {self.name!r} {reason}. It is not used any more, and training continues.")


def _log_video(tracker: GeneralTracker, name: str, path: Path, step: int) -> None:
    if tracker.name == "wandb":
        import wandb

        tracker.log({name: wandb.Video(str(path), format="mp4")}, step=step)
        return
    from tensorboard.compat.proto.summary_pb2 import Summary

    frames, frame_rate = read_video(path)
    height, width = frames.shape[1:3]
    scale = min(1.0, GIF_SIDE / max(height, width))
    size = round(width * scale), round(height * scale)
    pictures = [PIL.Image.fromarray(frame).resize(size) for frame in frames]
    content = io.BytesIO()
    duration = round(1000 / frame_rate)
    pictures[0].save(content, "GIF", save_all=True, append_images=pictures[1:], duration=duration, loop=0)
    image = Summary.Image(width=size[0], height=size[1], colorspace=3, encoded_image_string=content.getvalue())
    writer = tracker.writer.file_writer
    writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
    writer.flush()
