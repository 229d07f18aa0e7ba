"""One user's video in progress: results of each stage, the user's changes, and the seeds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image

from ..overview import GIB
from ..pipelines.profiles import CARDS
from ..pipelines.replay import check_own_limits, needs_images, read_record, recorded_call
from ..rewrite.storyboard import Moment
from .limits import open_upload
from .orders import SAMPLING, SIZES, Order, Picture, new_seed
from .pictures import PictureFile, Upload
from .worker import Job, Worker


SETTINGS = (*SIZES, *SAMPLING, "anchor_decode", "num_moments")


@dataclass
class Session:
    """State of the three stages, which run one by one. Each stage starts from the result of the one before, or from its edited form.

    Args:
        worker ([`Worker`]): worker that runs the stages.
        owner (`str`): owner of the session.

    Attributes:
        prompt, mode: prompt and mode of the video.
        caption (`str`), moments (`list[Moment]`): results of stage 1; may be edited.
        pictures (`list[Picture]`), chosen (`int`): results of stage 2, and the index of the picture to animate.
        drawn_for (`str`, *optional*): caption for which the pictures were drawn.
        anchors (`list[Upload]`): uploaded pictures, which replace stages 1 and 2.
        anchor_seed, seed (`int`): seeds of stages 2 and 3; kept until they are changed.
        num_candidates (`int`): number of pictures of stage 2.
        settings (`dict`): arguments of the pipeline's call that differ from the model's defaults.
        lora_scale (`float`, *optional*): strength of the anchor LoRA.
        video (`Job`): latest job with a video.
    """

    worker: Worker
    owner: str
    prompt: str = ""
    mode: str = "factorized"
    caption: str = ""
    moments: list[Moment] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    chosen: int = 0
    drawn_for: str | None = ""
    anchors: list[Upload] = field(default_factory=list)
    anchor_seed: int = field(default_factory=new_seed)
    seed: int = field(default_factory=new_seed)
    num_candidates: int = 4
    settings: dict[str, Any] = field(default_factory=dict)
    lora_scale: float | None = None
    video: Job | None = None

    # -- the stages ---------------------------------------------------------------------------------------------------

    def rewrite(self) -> Job:
        """Runs stage 1, which writes the caption or the moments of a storyboard; it is deterministic."""
        return self._submit("rewrite")

    def compose(self) -> Job:
        """Runs stage 2, which draws pictures of the current caption with `anchor_seed`."""
        # The pictures show the first moment; stage 3 derives the later ones from the chosen picture.
        return self._submit("compose", first_frame_prompt=self._first_caption(), num_candidates=self.num_candidates)

    def animate(self) -> Job:
        """Runs stage 3, which makes the video of the prompt and the chosen picture with `seed`.

        Raises:
            `ValueError`: there is no picture, or it was drawn for another caption.
        """
        if self.mode == "direct":
            return self._submit("animate")
        if self.anchors:
            return self._submit("animate", anchors=list(self.anchors))
        if not self.pictures:
            raise ValueError(
                "There is no picture to animate: draw one in stage 2, upload one, or make the video alone."
            )
        caption = self._first_caption()
        if caption != self.drawn_for:
            raise ValueError("The caption was changed after its pictures were drawn: run stage 2 again.")
        given = {"storyboard": self.moments} if self.mode == "storyboard" else {"first_frame_prompt": caption}
        return self._submit("animate", picture=self.pictures[self.chosen], **given)

    def generate(self) -> Job:
        """Runs all stages from the prompt."""
        if self.anchors and self.mode != "direct":
            return self.animate()
        is_choice = self.mode != "direct" and self.worker.pipe.anchor_judge is not None
        return self._submit("generate", num_candidates=self.num_candidates if is_choice else 1)

    def _submit(self, stage: str, **given: Any) -> Job:
        settings = {name: value for name, value in self.settings.items() if value is not None}
        if self.mode != "storyboard" or "storyboard" in given or given.get("anchors"):
            settings.pop("num_moments", None)
        if self.mode == "direct" or stage in ("rewrite", "compose"):
            settings.pop("anchor_decode", None)
        scale = None if self.mode == "direct" else self.lora_scale
        mode = "factorized" if given.get("anchors") else self.mode
        order = Order(
            stage,
            self.prompt,
            mode,
            anchor_seed=self.anchor_seed,
            seed=self.seed,
            lora_scale=scale,
            **settings,
            **given,
        )
        return self.worker.submit(self.owner, order)

    def _first_caption(self) -> str | None:
        if self.mode == "storyboard":
            return self.moments[0].caption if self.moments else None
        return self.caption or None

    def take(self, job: Job) -> None:
        """Takes over the results of a finished job of this session."""
        result, stage = job.result, job.order.stage
        if job.state != "done" or result is None:
            return
        if stage in ("rewrite", "generate") and job.order.mode != "direct":
            self.caption, self.moments = result.caption or "", result.moments
        if stage in ("compose", "generate") and result.pictures:
            self.pictures, self.chosen = result.pictures, result.best
            self.drawn_for = self._first_caption() if stage == "generate" else job.order.first_frame_prompt
        if result.video is not None:
            self.video = job

    # -- pictures of the person's own ---------------------------------------------------------------------------------

    def upload(self, path: str | Path, frame_index: int = 0, strength: float = 1.0) -> PIL.Image.Image:
        """Adds a picture as an anchor, replacing one at the same frame, and returns it as the model will see it.

        Raises:
            `ValueError`: the file is not a picture, or the frame or the strength is not valid.
        """
        limits, num_frames = self.worker.limits, self.num_frames
        if not -num_frames <= frame_index < num_frames:
            raise ValueError(
                f"The video has {num_frames} frames, from 0 to {num_frames - 1}, and no frame {frame_index}."
            )
        others = [other for other in self.anchors if (other.frame_index - frame_index) % num_frames]
        limits.check_count(1, len(others) + 1)
        open_upload(path, limits)
        anchor = Upload(PictureFile(self.worker.folder, Path(path).read_bytes()), frame_index, strength)
        self.anchors = sorted([*others, anchor], key=lambda other: other.frame_index % num_frames)
        return self.seen(anchor)

    def seen(self, anchor: Upload) -> PIL.Image.Image:
        """Returns an anchor's picture upright and cropped, as the model sees it."""
        return anchor.file.fitted(self._size("height"), self._size("width")).open()

    @property
    def num_frames(self) -> int:
        return self._size("num_frames")

    def _size(self, name: str) -> int:
        return self.settings.get(name) or self.worker.pipe.call_defaults[name]

    # -- recipes ------------------------------------------------------------------------------------------------------

    def take_recipe(self, path: str | Path) -> str:
        """Takes over the settings in an mp4's record, and returns a sentence with the next step for the user.

        Raises:
            `ValueError`: the file has no record, or it is of another kind of pipeline.
        """
        pipe, path = self.worker.pipe, Path(path)
        try:
            record = read_record(path)
        except (OSError, ValueError) as error:
            raise ValueError(str(error).replace(str(path), f"The file {path.name!r}")) from error
        if record["pipeline"] != type(pipe).__name__:
            raise ValueError(
                f"The video was made by a {record['pipeline']}, but this model is a {type(pipe).__name__}."
            )
        seeds, is_own = record["seeds"], needs_images(record)
        if not isinstance(seeds["video"], int):
            raise ValueError(
                "The video was made with a generator that had been used before: repeat it with `fvg generate --from`."
            )
        check_own_limits(pipe, recorded_call(record, None, {"mode": "direct"}), {})
        limits, steps = self.worker.limits, record.get("num_inference_steps") or 1
        limits.check_size(record["height"], record["width"], record["num_frames"], steps)
        self.prompt = record.get("prompt") or ""
        self.mode, self.caption = record["mode"], record.get("first_frame_prompt") or ""
        self.moments = [Moment(**moment) for moment in record.get("storyboard") or ()]
        self.settings = {name: record[name] for name in SETTINGS if record.get(name) is not None}
        self.lora_scale, self.seed = record.get("lora_scale"), seeds["video"]
        self.anchor_seed = seeds.get("anchor", self.anchor_seed)
        self.pictures, self.anchors, self.num_candidates, self.drawn_for = [], [], 1, ""
        if (
            record.get("model") != (pipe.config.get("_name_or_path") or None)
            and record.get("model_kind") == "embedded"
        ):
            return "The recipe is loaded. It comes from the embedded model, so that this model makes another video."
        if is_own:
            return "The recipe is loaded without its pictures, which an mp4 does not contain: upload them again."
        if self.mode == "direct":
            return "The recipe is loaded: run stage 3."
        return "The recipe is loaded: run stage 2 to draw its picture again, then stage 3."

    # -- before a run -------------------------------------------------------------------------------------------------

    def memory_text(self) -> str:
        """Returns what a video of this size needs: the computed memory, and the time that such a video took before."""
        pipe, sizes = self.worker.pipe, {name: self._size(name) for name in SIZES}
        fits = self.worker.smallest_card(*sizes.values())
        told = [f"{self.num_frames} frames, {self.num_frames / pipe.call_defaults['frame_rate']:.1f} s"]
        if fits is None:
            told.append(f"too large for a GPU with {CARDS[-1]} (computed)")
        else:
            told.append(f"peak memory {fits[1] / GIB:.1f} GiB, fits a GPU with {fits[0]} (computed)")
        sampling = {name: self.settings.get(name) for name in ("preset", "num_inference_steps")}
        known: dict[str, Any] = sizes | sampling
        seconds = self.worker.seconds_before(Order("animate", self.prompt, **known))
        told.append("time: known after the first video" if seconds is None else f"about {seconds:.0f} s here")
        return " · ".join(told)


class Sessions:
    """Sessions of all users by their key. Above the limit, the session that was unused for longest is dropped."""

    def __init__(self, worker: Worker):
        self.worker = worker
        self._sessions: dict[str, Session] = {}

    def of(self, owner: str) -> Session:
        session = self._sessions.pop(owner, None) or Session(self.worker, owner)
        self._sessions[owner] = session
        while len(self._sessions) > self.worker.limits.people:
            self._sessions.pop(next(iter(self._sessions)))
        return session
