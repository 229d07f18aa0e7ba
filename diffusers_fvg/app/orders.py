"""What can be asked of a server: one stage, or all of them. Each order is checked before it waits, and run by one worker."""

from __future__ import annotations

import inspect
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch

from ..animate.anchor import Anchor
from ..checks import check_texts
from ..compose.candidates import candidate_seeds
from ..media import lossless_video, viewing_scale, write_video
from ..pipelines.candidates import leave_device
from ..pipelines.record import composer_call
from ..pipelines.request import VideoRequest
from ..pipelines.request_checks import MODES
from ..pipelines.seeds import anchor_seed
from ..rewrite.storyboard import Moment
from .limits import Limits
from .pictures import PictureFile, Upload


if TYPE_CHECKING:
    from ..pipelines.stages import FactorizedStages

STAGES = ("rewrite", "compose", "animate", "generate")
Report = Callable[[str, int, int], None]
# From arguments of the pipeline's call to its `callback_on_step_end`.
Preview = Callable[[dict[str, Any]], Callable[..., dict] | None]
Keep = Callable[[PIL.Image.Image], PictureFile]
# Beside the video: its frames without loss, for other forms of it.
FRAMES_FILE = "frames.mp4"
POSTER_SIDE = 192


@dataclass(frozen=True)
class Picture:
    """A picture that stage 2 drew.

    Args:
        file (`PictureFile`): of the video's size.
        seed (`int`): draws it again.
        score (`float`, *optional*): of the pipeline's judge.
        answers (`dict[str, float]`, *optional*): question -> probability of a yes, of a judge that asks.
    """

    file: PictureFile
    seed: int
    score: float | None = None
    answers: dict[str, float] | None = None

    @property
    def image(self) -> PIL.Image.Image:
        """Decoded each time."""
        return self.file.open()


@dataclass(frozen=True)
class Result:
    """What an order made.

    Args:
        caption (`str`, *optional*): of the first frame.
        moments (`list[Moment]`): of a storyboard.
        pictures (`list[Picture]`): drawn for the caption, in the order of drawing.
        anchors (`list[PictureFile]`): what the video passes through.
        video (`Path`, *optional*): the mp4.
        poster (`PictureFile`, *optional*): the video's first frame, small.
        record (`dict`, *optional*): in the mp4, from which it is made again.
    """

    caption: str | None = None
    moments: list[Moment] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    anchors: list[PictureFile] = field(default_factory=list)
    video: Path | None = None
    poster: PictureFile | None = None
    record: dict[str, Any] | None = None

    @property
    def best(self) -> int:
        """Number of the picture with the highest score; the first where there are none."""
        scores = [picture.score or 0.0 for picture in self.pictures]
        return scores.index(max(scores)) if scores else 0


@dataclass(frozen=True)
class Order:
    """One stage, or all of them; the arguments are those of the pipeline's call.

    Args:
        stage (`str`): `"rewrite"`, `"compose"`, `"animate"`, or `"generate"` for all three.
        prompt (`str`): what should happen.
        mode (`str`): `"factorized"`, `"direct"` or `"storyboard"`.
        first_frame_prompt (`str`, *optional*): what is seen at first; in `"generate"` it skips stage 1.
        storyboard (`list[Moment]`, *optional*): captions of a storyboard's moments; likewise.
        picture ([`Picture`], *optional*): of `"animate"`, the one that was chosen of those stage 2 drew.
        anchors (`list[Upload]`, *optional*): pictures of the user's own.
        num_candidates (`int`): pictures to choose among; in `"generate"` the pipeline's judge chooses.
        anchor_seed, seed (`int`, *optional*): of stage 2 and of stage 3; drawn when left out.
        lora_scale (`float`, *optional*): strength of the anchor LoRA.
    """

    stage: str
    prompt: str
    mode: str = "factorized"
    first_frame_prompt: str | None = None
    storyboard: list[Moment] | None = None
    picture: Picture | None = None
    anchors: list[Upload] | None = None
    num_moments: int | None = None
    num_candidates: int = 1
    anchor_seed: int | None = None
    seed: int | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    preset: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    anchor_decode: str = "raw"
    lora_scale: float | None = None

    def checked(self, pipe: FactorizedStages, limits: Limits) -> Order:
        """The order with its seeds and sizes filled in.

        Raises:
            `ValueError`: one that the model or the server cannot carry out, in a sentence.
        """
        if self.stage not in STAGES:
            raise ValueError(f"`stage={self.stage!r}` must be one of {', '.join(STAGES)}.")
        if self.mode not in MODES:
            raise ValueError(f"`mode={self.mode!r}` must be one of {', '.join(MODES)}.")
        check_texts("prompt", [self.prompt])
        limits.check_count(self.num_candidates, len(self.anchors or ()))
        for name in ("seed", "anchor_seed"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < 2**63:
                raise ValueError(f"`{name}={getattr(self, name)}` must be a whole number from 0 to 2**63 - 1.")
        own = pipe.call_defaults
        filled = {name: own[name] if getattr(self, name) is None else getattr(self, name) for name in SIZES}
        filled |= {name: new_seed() for name in ("seed", "anchor_seed") if getattr(self, name) is None}
        order = replace(self, **filled)
        order._check_stage()
        order._check_choice(pipe)
        # Pictures were looked at when they came; of photographs a check is not to hold several at once.
        stand_in = PIL.Image.new("RGB", (8, 8))
        call = order._call([upload.anchor(stand_in) for upload in order.anchors or ()])
        known = inspect.signature(type(pipe).__call__).parameters
        unknown = [name for name in call if name not in known]
        if unknown:
            raise ValueError(
                f"`{unknown[0]}={call[unknown[0]]!r:.80}` is not for a {type(pipe).__name__}; leave it out."
            )
        request = VideoRequest(**call).completed(pipe)
        limits.check_size(request.height, request.width, request.num_frames, request.steps(pipe))
        return order

    def _check_stage(self) -> None:
        """Raises `ValueError` where the stage does not run, or lacks what it starts from."""
        cause = "`anchors`" if self.anchors else "`mode='direct'`" if self.mode == "direct" else None
        if self.stage in ("rewrite", "compose") and cause:
            raise ValueError(f"{cause} skips stage `{self.stage}`; leave one of them out.")
        if self.stage == "compose" and self.first_frame_prompt is None:
            raise ValueError("`first_frame_prompt` is missing: stage `compose` draws what it says.")
        size = self.width, self.height
        drawn = None if self.picture is None else self.picture.image.size
        if drawn is not None and drawn != size:
            was = "{} x {}".format(*drawn)
            raise ValueError(
                f"The picture was drawn for {was} pixels, and the video has {size[0]} x {size[1]}: draw it again."
            )

    def _check_choice(self, pipe: FactorizedStages) -> None:
        """Raises `ValueError` for several pictures where none is drawn, or where nobody chooses among them."""
        if self.num_candidates == 1:
            return
        told = f"`num_candidates={self.num_candidates}`"
        if self.stage in ("rewrite", "animate"):
            raise ValueError(
                f"{told}: stages `compose` and `generate` choose among pictures, and `{self.stage}` does not."
            )
        if self.anchors or self.mode == "direct":
            cause = "`anchors`" if self.anchors else "`mode='direct'`"
            raise ValueError(f"{told}: no picture is drawn with {cause}; leave one of them out.")
        if self.stage == "generate" and pipe.anchor_judge is None:
            raise ValueError(
                f"{told}: this model has no judge that chooses; ask stage `compose` for them, and choose one."
            )

    def steps(self, pipe: FactorizedStages) -> int:
        """Steps of the video model."""
        return VideoRequest(preset=self.preset, num_inference_steps=self.num_inference_steps).steps(pipe)

    def _call(self, anchors: list[Anchor]) -> dict[str, Any]:
        """Arguments of the pipeline's call, without generator."""
        call = {name: getattr(self, name) for name in (*SIZES, *SAMPLING) if getattr(self, name) is not None}
        call |= {"prompt": self.prompt, "mode": self.mode}
        if self.stage == "compose":
            return call | {"mode": "factorized", "first_frame_prompt": self.first_frame_prompt}
        if self.lora_scale is not None:
            call["attention_kwargs"] = {"scale": self.lora_scale}
        if self.anchor_decode != "raw" and self.stage != "rewrite":
            call["anchor_decode"] = self.anchor_decode
        for name in ("first_frame_prompt", "storyboard", "num_moments"):
            if getattr(self, name) is not None:
                call[name] = getattr(self, name)
        return call | ({"anchors": anchors} if anchors else {})

    # -- what the worker does -----------------------------------------------------------------------------------------

    def run(
        self, pipe: FactorizedStages, report: Report, video: Path, keep: Keep, preview: Preview | None = None
    ) -> Result:
        """Carries it out, checked before.

        Args:
            pipe ([`FactorizedStages`]): makes it.
            report (`Callable`): called as `report(stage, step, steps)` after each step; may raise to stop.
            video (`Path`): where an mp4 is written; other files are put beside it.
            keep (`Callable`): makes files of the pictures.
            preview (`Callable`, *optional*): of a video while it is denoised.
        """
        if self.stage in ("animate", "generate"):
            return self._animate(pipe, report, video, keep, preview)
        with pipe._running(lambda _, *place: report(*place)):
            if self.stage == "rewrite":
                return self._rewrite(pipe)
            return Result(self.first_frame_prompt, self.storyboard or [], self._draw(pipe, keep))

    def _rewrite(self, pipe: FactorizedStages) -> Result:
        if self.mode == "storyboard":
            (moments,) = pipe.storyboard([self.prompt], self.num_moments or 2)
            return Result(moments[0].caption, moments)
        (caption,) = pipe.rewrite([self.prompt])
        return Result(caption)

    def _draw(self, pipe: FactorizedStages, keep: Keep) -> list[Picture]:
        """The pictures one by one: each is then what its seed alone draws, whatever was drawn beside it."""
        pictures, size = [], {"height": self.height, "width": self.width}
        assert self.anchor_seed is not None  # `checked` fills it in.
        for seed in candidate_seeds(self.anchor_seed, self.num_candidates):
            generator = torch.Generator().manual_seed(seed)
            drawn = pipe.compose([self.first_frame_prompt], **size, generator=[generator], num_candidates=1)
            pictures += [Picture(keep(image), seed) for image in drawn]
        if pipe.anchor_judge is None or len(pictures) < 2:
            return pictures
        leave_device(pipe, "composer")
        with pipe._running() as progress, progress.stage("judge"):
            captions = [self.first_frame_prompt] * len(pictures)
            judgements = pipe.anchor_judge.judge([picture.image for picture in pictures], captions)
            leave_device(pipe, "anchor_judge")
        pairs = zip(pictures, judgements, strict=True)
        return [replace(picture, score=found.score, answers=found.answers) for picture, found in pairs]

    def _animate(
        self, pipe: FactorizedStages, report: Report, video: Path, keep: Keep, preview: Preview | None
    ) -> Result:
        call, drawn = self._call([upload.anchor() for upload in self.anchors or ()]), self.anchor_seed
        if self.picture is not None and self.mode != "direct" and not self.anchors:
            drawn = self.picture.seed
            if self.mode == "factorized":
                # The picture itself: it need not be drawn again.
                del call["first_frame_prompt"]
                call["anchors"] = [Anchor(self.picture.image)]
        if self.mode != "direct" and "anchors" not in call:
            call["composer_num_candidates"] = self.num_candidates
        if preview is not None:
            call["callback_on_step_end"] = preview(call)
        generator = torch.Generator().manual_seed(self.seed)
        with anchor_seed(drawn):
            output = pipe(
                **call, generator=generator, output_type="uint8", callback_on_stage_step=lambda _, *at: report(*at)
            )
        record = output.records[0]
        # One that only looks changes nothing that had to be recorded.
        record["not_recorded"] = [name for name in record["not_recorded"] if name != "callback_on_step_end"]
        if "anchors" in call and not self.anchors:
            self._tell_of_drawing(pipe, record)
        frames, frame_rate = output.frames[0], pipe.call_defaults["frame_rate"]
        write_video(video, frames, frame_rate, metadata=record, scale=viewing_scale(frames.shape[1]))
        video.with_name(FRAMES_FILE).write_bytes(lossless_video(frames, frame_rate))
        poster = PIL.Image.fromarray(frames[0])
        poster.thumbnail((POSTER_SIDE, POSTER_SIDE))
        return replace(self._result(output, record, video, keep), poster=keep(poster))

    def _tell_of_drawing(self, pipe: FactorizedStages, record: dict[str, Any]) -> None:
        """The record says of a picture that stage 2 drew what it says where the whole call draws it."""
        assert self.picture is not None
        record["first_frame_prompt"] = self.first_frame_prompt
        record["composer"] = composer_call(pipe, record)
        record["seeds"] = {"video": record["seeds"]["video"], "anchor": self.picture.seed}
        # In a record of one call these are the last.
        record |= {name: record.pop(name) for name in ("anchors", "seeds")}

    def _result(self, output: Any, record: dict[str, Any], video: Path, keep: Keep) -> Result:
        size = record["height"], record["width"]
        anchors = [upload.file.fitted(*size) for upload in self.anchors or ()]
        if output.anchor_images:
            made = output.anchor_images[0]
            anchors = [keep(image) for image in (made if isinstance(made, list) else [made])]
        elif self.picture is not None and not anchors:
            anchors = [self.picture.file]
        pictures = [
            Picture(keep(each.image), each.seed, each.score, each.answers) for each in (output.candidates or [[]])[0]
        ]
        if not pictures and output.anchor_images:
            pictures = [Picture(anchors[0], record["seeds"]["anchor"])]
        moments = output.storyboards[0] if output.storyboards else []
        return Result(record["first_frame_prompt"], moments, pictures, anchors, video, record=record)


SIZES = ("height", "width", "num_frames")
SAMPLING = ("preset", "num_inference_steps", "guidance_scale", "negative_prompt")


def new_seed() -> int:
    """As `fvg generate` draws one."""
    return secrets.randbelow(2**31)


def moments_text(moments: list[Moment]) -> str:
    """Moments as a person edits them: one line each, the time in per cent of the video and the caption."""
    return "\n".join(f"{moment.time:.0%} {moment.caption}" for moment in moments)


def read_moments(text: str) -> list[Moment]:
    """[`moments_text`] back.

    Raises:
        `ValueError`: a line without a time.
    """
    moments = []
    for line in filter(None, map(str.strip, text.splitlines())):
        found = re.fullmatch(r"(\d{1,3}(?:\.\d+)?)\s*%\s*(.+)", line)
        if found is None:
            raise ValueError(f"The storyboard's line {line!r:.80} must begin with a time, as in `50% A red circle`.")
        moments.append(Moment(found[2], float(found[1]) / 100))
    return moments
