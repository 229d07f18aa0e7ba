"""Orders to a server: one stage, or all of them. Each order is checked before it waits in the queue, and run by the worker."""

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
# Maps the arguments of the pipeline's call to its `callback_on_step_end`.
Preview = Callable[[dict[str, Any]], Callable[..., dict] | None]
Keep = Callable[[PIL.Image.Image], PictureFile]
# Lossless frames beside the mp4, from which its other formats are made.
FRAMES_FILE = "frames.mp4"
POSTER_SIDE = 192


@dataclass(frozen=True)
class Picture:
    """A picture that stage 2 drew.

    Args:
        file (`PictureFile`): file of the picture, in the size of the video.
        seed (`int`): seed that draws the picture again.
        score (`float`, *optional*): score of the pipeline's judge; higher is better.
        answers (`dict[str, float]`, *optional*): question -> probability of "yes", from a judge that asks questions.
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
    """Results of an order.

    Args:
        caption (`str`, *optional*): caption of the first frame.
        moments (`list[Moment]`): moments of a storyboard.
        pictures (`list[Picture]`): pictures drawn for the caption, in the order of drawing.
        anchors (`list[PictureFile]`): pictures of the video's anchored frames.
        video (`Path`, *optional*): path of the mp4.
        poster (`PictureFile`, *optional*): small version of the video's first frame.
        record (`dict`, *optional*): record in the mp4, from which the video can be repeated.
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
        """Index of the picture with the highest score; 0 without scores."""
        scores = [picture.score or 0.0 for picture in self.pictures]
        return scores.index(max(scores)) if scores else 0


@dataclass(frozen=True)
class Order:
    """An order for one stage or all of them; arguments not listed here are those of the pipeline's call.

    Args:
        stage (`str`): `"rewrite"`, `"compose"`, `"animate"`, or `"generate"` for all three.
        prompt (`str`): prompt of the video.
        mode (`str`): `"factorized"`, `"direct"` or `"storyboard"`.
        first_frame_prompt (`str`, *optional*): caption of the first frame; with `"generate"` it skips stage 1.
        storyboard (`list[Moment]`, *optional*): moments with captions; with `"generate"` they skip stage 1.
        picture ([`Picture`], *optional*): chosen picture of stage 2, for `"animate"`.
        anchors (`list[Upload]`, *optional*): the user's own pictures.
        num_candidates (`int`): number of pictures to draw. With `"generate"` the pipeline's judge chooses one.
        anchor_seed, seed (`int`, *optional*): seeds of stages 2 and 3; drawn at random by default.
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
        """Returns the order with its seeds and sizes filled in.

        Raises:
            `ValueError`: the model or the server cannot run the order.
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
        # Pictures were checked on upload. A stand-in keeps this check from decoding several photographs at once.
        stand_in = PIL.Image.new("RGB", (8, 8))
        call = order._call([upload.anchor(stand_in) for upload in order.anchors or ()])
        known = inspect.signature(type(pipe).__call__).parameters
        unknown = [name for name in call if name not in known]
        if unknown:
            raise ValueError(
                f"`{unknown[0]}={call[unknown[0]]!r:.80}` is not an argument of {type(pipe).__name__}; leave it out."
            )
        request = VideoRequest(**call).completed(pipe)
        limits.check_size(request.height, request.width, request.num_frames, request.steps(pipe))
        return order

    def _check_stage(self) -> None:
        """Raises `ValueError` if other arguments skip the stage, or if its input is missing."""
        cause = "`anchors`" if self.anchors else "`mode='direct'`" if self.mode == "direct" else None
        if self.stage in ("rewrite", "compose") and cause:
            raise ValueError(f"{cause} skips stage `{self.stage}`; leave one of them out.")
        if self.stage == "compose" and self.first_frame_prompt is None:
            raise ValueError("`first_frame_prompt` is missing: stage `compose` draws a picture of it.")
        size = self.width, self.height
        drawn = None if self.picture is None else self.picture.image.size
        if drawn is not None and drawn != size:
            was = "{} x {}".format(*drawn)
            raise ValueError(
                f"The picture has {was} pixels, but the video has {size[0]} x {size[1]}: draw the picture again."
            )

    def _check_choice(self, pipe: FactorizedStages) -> None:
        """Raises `ValueError` for several pictures if no picture is drawn, or if nothing chooses among them."""
        if self.num_candidates == 1:
            return
        told = f"`num_candidates={self.num_candidates}`"
        if self.stage in ("rewrite", "animate"):
            raise ValueError(
                f"{told}: stage `{self.stage}` does not choose among pictures; use 1, or stage `compose` or `generate`."
            )
        if self.anchors or self.mode == "direct":
            cause = "`anchors`" if self.anchors else "`mode='direct'`"
            raise ValueError(f"{told}: no picture is drawn with {cause}; leave one of them out.")
        if self.stage == "generate" and pipe.anchor_judge is None:
            raise ValueError(
                f"{told}: this model has no judge to choose one; draw the pictures in stage `compose` and choose one."
            )

    def steps(self, pipe: FactorizedStages) -> int:
        """Returns the number of steps of the video model."""
        return VideoRequest(preset=self.preset, num_inference_steps=self.num_inference_steps).steps(pipe)

    def _call(self, anchors: list[Anchor]) -> dict[str, Any]:
        """Returns the arguments of the pipeline's call, without a generator."""
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
        """Runs a checked order.

        Args:
            pipe ([`FactorizedStages`]): pipeline that makes the video.
            report (`Callable`): called as `report(stage, step, steps)` after each step; may raise to stop.
            video (`Path`): mp4 to write; other files are written beside it.
            keep (`Callable`): stores a picture in a file.
            preview (`Callable`, *optional*): returns the callback that previews a video while it is denoised.
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
        """Draws the pictures one by one, so that each depends only on its own seed."""
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
                # The picture is passed as an anchor and is not drawn again.
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
        # The preview callback does not change the video.
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
        """Records a picture of stage 2 as if the call that made the video had drawn it."""
        assert self.picture is not None
        record["first_frame_prompt"] = self.first_frame_prompt
        record["composer"] = composer_call(pipe, record)
        record["seeds"] = {"video": record["seeds"]["video"], "anchor": self.picture.seed}
        # The order of the keys is that of a record of one call.
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
    """Draws a random seed in the range of `fvg generate`."""
    return secrets.randbelow(2**31)


def moments_text(moments: list[Moment]) -> str:
    """Returns moments as editable text: one line per moment, with the time in per cent of the video and the caption."""
    return "\n".join(f"{moment.time:.0%} {moment.caption}" for moment in moments)


def read_moments(text: str) -> list[Moment]:
    """Reads moments from the text of [`moments_text`].

    Raises:
        `ValueError`: a line does not begin with a time.
    """
    moments = []
    for line in filter(None, map(str.strip, text.splitlines())):
        found = re.fullmatch(r"(\d{1,3}(?:\.\d+)?)\s*%\s*(.+)", line)
        if found is None:
            raise ValueError(
                f"The line {line!r:.80} of the storyboard must begin with a time, as in `50% A red circle`."
            )
        moments.append(Moment(found[2], float(found[1]) / 100))
    return moments
