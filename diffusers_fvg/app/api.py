"""The HTTP API: submit, progress, cancel, download. FastAPI serves the OpenAPI document at `/openapi.json`, and its page at `/docs`."""

from __future__ import annotations

import base64
import secrets
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from .. import __version__
from ..animate.fidelity import ANCHOR_DECODES
from ..checks import MAX_PROMPT_CHARACTERS, check_texts
from ..pipelines.request_checks import MODES
from ..rewrite.storyboard import Moment
from .limits import Limits, open_upload
from .orders import STAGES, Order
from .outputs import FORMS, Form, video_file
from .pictures import PictureFile, Upload
from .worker import Job, QueueFull, State, Worker


if TYPE_CHECKING:
    # For type checkers; the values come from these tables.
    Stage = str
    Mode = str
    AnchorDecode = str
else:
    Stage, Mode, AnchorDecode = Literal[STAGES], Literal[MODES], Literal[ANCHOR_DECODES]


def _shown(text: str) -> str:
    check_texts("text", [text])
    return text


Text = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS), AfterValidator(_shown)]
# JSON numbers: "3" and true are rejected.
Whole = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Seed = Annotated[Whole, Field(ge=0, lt=2**63)]
Count = Annotated[Whole, Field(ge=1, le=100_000)]
Pixels = Annotated[Whole, Field(ge=8, le=16384)]


class AnchorInput(BaseModel):
    """A picture for one frame of the video."""

    model_config = ConfigDict(extra="forbid")
    image: Annotated[str, Field(min_length=1, description="a PNG or JPEG file in base64")]
    frame_index: Annotated[Whole, Field(ge=-100_000, le=100_000, description="0 is the first frame, -1 the last")] = 0
    strength: Annotated[Number, Field(gt=0, le=1, description="below 1 the video may deviate from it")] = 1.0


class MomentInput(BaseModel):
    """The caption of one moment of a storyboard."""

    model_config = ConfigDict(extra="forbid")
    caption: Text
    time: Annotated[
        Number, Field(ge=0, le=1, description="share of the video, 0 for the first frame and 1 for the last")
    ]


class JobInput(BaseModel):
    """A job. Arguments that are left out take the model's defaults; seeds are drawn at random."""

    model_config = ConfigDict(extra="forbid")
    prompt: Annotated[Text, Field(description="prompt of the video")]
    stage: Annotated[Stage, Field(description="one stage, or `generate` for all")] = "generate"
    mode: Annotated[Mode, Field(description="`direct` is plain text-to-video")] = "factorized"
    first_frame_prompt: Annotated[Text | None, Field(description="caption of the first frame; skips stage 1")] = None
    storyboard: Annotated[list[MomentInput] | None, Field(min_length=1, max_length=100)] = None
    anchors: Annotated[list[AnchorInput] | None, Field(min_length=1, max_length=100)] = None
    num_moments: Annotated[Whole | None, Field(ge=2, le=100)] = None
    num_candidates: Annotated[Whole, Field(ge=1, le=100, description="pictures to choose from")] = 1
    seed: Seed | None = None
    anchor_seed: Seed | None = None
    height: Pixels | None = None
    width: Pixels | None = None
    num_frames: Count | None = None
    preset: Annotated[str | None, Field(max_length=255)] = None
    num_inference_steps: Annotated[Whole | None, Field(ge=1, le=1000)] = None
    guidance_scale: Annotated[Number | None, Field(ge=0, le=1000)] = None
    negative_prompt: Annotated[str | None, Field(max_length=MAX_PROMPT_CHARACTERS)] = None
    anchor_decode: AnchorDecode = "raw"
    lora_scale: Annotated[Number | None, Field(ge=-10, le=10)] = None

    def order(self, worker: Worker) -> Order:
        """Returns the order of this job; raises `ValueError` for a file that is not a picture."""
        given = {name: getattr(self, name) for name in type(self).model_fields}
        given["storyboard"] = self.storyboard and [Moment(each.caption, each.time) for each in self.storyboard]
        worker.limits.check_count(self.num_candidates, len(self.anchors or ()))
        given["anchors"] = self.anchors and [_upload(each, worker) for each in self.anchors]
        return Order(**given)


class PictureOutput(BaseModel):
    """A picture of stage 2; the image itself is at `url`."""

    url: str
    seed: int
    score: float | None
    answers: dict[str, float] | None


class JobOutput(BaseModel):
    """The progress of a job and, once it is done, its results."""

    id: str
    stage: str = Field(description="the requested stage")
    state: State
    jobs_before: int
    running_stage: str
    step: int
    steps: int
    seconds_left: float | None
    error: str | None
    preview: str | None = Field(None, description="URL of an animated WebP while the video is denoised")
    first_frame_prompt: str | None = None
    storyboard: list[dict[str, Any]] = []
    pictures: list[PictureOutput] = []
    video: str | None = Field(None, description="URL of the mp4")
    record: dict[str, Any] | None = Field(
        None, description="settings that repeat the video; the mp4 contains them too"
    )


class Problem(BaseModel):
    """An error, as a sentence."""

    detail: str


PROBLEMS = {status: {"model": Problem} for status in (400, 404, 413, 422, 429)}


def make_api(worker: Worker) -> FastAPI:
    """Returns the application with the HTTP API and without the page."""
    api = FastAPI(
        title="diffusers-fvg",
        version=__version__,
        description="Makes a caption, a picture and a video from a prompt: submit a job, ask for its progress, download its results.",
        responses={status: PROBLEMS[status] for status in (404, 422)},
    )
    _add_errors(api)
    _add_files(api, worker)
    _limit_requests(api, worker.limits)

    @api.post("/api/jobs", status_code=202, responses={status: PROBLEMS[status] for status in (400, 413, 429)})
    def submit(job: JobInput, request: Request) -> JobOutput:
        """Adds a job to the queue."""
        return _told(worker, worker.submit(_owner(request), job.order(worker)))

    @api.get("/api/jobs")
    def history(request: Request) -> list[JobOutput]:
        """Returns your jobs, the latest first."""
        return [_told(worker, job) for job in worker.history(_owner(request))]

    @api.get("/api/jobs/{id}")
    def progress(id: str, request: Request) -> JobOutput:
        """Returns the progress and the results of a job."""
        return _told(worker, _job(worker, request, id))

    @api.delete("/api/jobs/{id}")
    def cancel(id: str, request: Request) -> JobOutput:
        """Cancels a job. A running job stops within its current step; a finished one does not change."""
        return _told(worker, worker.cancel(_owner(request), _job(worker, request, id).id))

    @api.get("/api/model")
    def model() -> dict[str, Any]:
        """Returns the model's own size and length, its presets, and the limits of this server."""
        return model_facts(worker)

    return api


def _add_files(api: FastAPI, worker: Worker) -> None:
    """Adds the routes that return the files of a job."""

    @api.get("/api/jobs/{id}/video", response_class=FileResponse)
    def video(id: str, request: Request, format: Form = "mp4") -> FileResponse:
        """Returns the mp4 with its record, an animation (GIF or WebP), the frames as PNG files in a ZIP, or a contact strip."""
        job = _job(worker, request, id)
        if job.result is None or job.result.video is None:
            raise HTTPException(
                404, f"The job has no video: its stage is `{job.order.stage}` and its state {job.state}."
            )
        return send_video(job, format)

    @api.get("/api/jobs/{id}/preview", response_class=Response)
    def preview(id: str, request: Request) -> Response:
        """Returns a small animated WebP of the video as estimated at the current step."""
        shown = _job(worker, request, id).preview
        if shown is None:
            raise HTTPException(404, "The job has no preview: it is not being denoised, or its model has none.")
        return Response(shown, media_type="image/webp")

    @api.get("/api/jobs/{id}/pictures/{number}", response_class=Response)
    def picture(id: str, number: int, request: Request) -> Response:
        """Returns a picture of stage 2 as PNG; numbers start at 0."""
        job = _job(worker, request, id)
        pictures = [] if job.result is None else job.result.pictures
        if not 0 <= number < len(pictures):
            raise HTTPException(404, f"The job has no picture {number}; it has {len(pictures)}, numbered from 0.")
        return Response(pictures[number].file.path.read_bytes(), media_type="image/png")


def send_video(job: Job, form: str) -> FileResponse:
    """Returns a video as a download in one of `FORMS`."""
    name, kind = FORMS[form]
    try:
        return FileResponse(video_file(job, form), media_type=kind, filename=name)
    except OSError as error:
        raise HTTPException(404, "The video has been deleted meanwhile.") from error


def model_facts(worker: Worker) -> dict[str, Any]:
    """Returns the facts about the model that a client needs for a job."""
    pipe, limits = worker.pipe, worker.limits
    facts = {name: pipe.call_defaults[name] for name in ("height", "width", "num_frames", "frame_rate")}
    facts |= {"model": str(pipe.config.get("_name_or_path") or "").split("/")[-1], "pipeline": type(pipe).__name__}
    facts["presets"] = {name: preset.num_inference_steps for name, preset in pipe.presets.items()}
    parts = {"rewriter": pipe.rewriter, "composer": pipe.composer, "anchor_judge": pipe.anchor_judge}
    facts |= {f"has_{name}": part is not None for name, part in parts.items()}
    return facts | {f"max_{name}": getattr(limits, name) for name in ("pixels", "frames", "steps", "anchors")}


def require_login(api: FastAPI, auth: tuple[str, str]) -> None:
    """Requires a name and a password for the page and for the API (HTTP Basic)."""
    expected = b":".join(part.encode() for part in auth)

    @api.middleware("http")
    async def check(request: Request, call_next: Callable) -> Response:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        try:
            is_known = kind.lower() == "basic" and secrets.compare_digest(base64.b64decode(given), expected)
        except ValueError:
            is_known = False
        if is_known:
            return await call_next(request)
        wanted = {"WWW-Authenticate": 'Basic realm="fvg", charset="UTF-8"'}
        return JSONResponse({"detail": "This server needs a name and a password."}, 401, wanted)


def _owner(request: Request) -> str:
    """Returns the owner of a request's jobs: the client's address. Other clients do not know the ids of its jobs."""
    return f"api {request.client.host if request.client else ''}"


def _job(worker: Worker, request: Request, id: str) -> Job:
    try:
        return worker.job(_owner(request), id)
    except KeyError:
        raise HTTPException(404, f"You have no job {id!r:.80}: it was deleted, or belongs to someone else.") from None


def _upload(given: AnchorInput, worker: Worker) -> Upload:
    try:
        content = base64.b64decode(given.image, validate=True)
    except ValueError as error:
        raise ValueError(f"`image` of an anchor must be a file in base64 ({error}).") from error
    with tempfile.NamedTemporaryFile(prefix="anchor-") as file:
        file.write(content)
        file.flush()
        open_upload(file.name, worker.limits)
    return Upload(PictureFile(worker.folder, content), given.frame_index, given.strength)


def _told(worker: Worker, job: Job) -> JobOutput:
    result, place = job.result, f"/api/jobs/{job.id}"
    made: dict[str, Any] = {}
    if result is not None:
        made = {
            "first_frame_prompt": result.caption,
            "storyboard": [{"caption": each.caption, "time": each.time} for each in result.moments],
            "pictures": [
                PictureOutput(url=f"{place}/pictures/{number}", seed=each.seed, score=each.score, answers=each.answers)
                for number, each in enumerate(result.pictures)
            ],
            "video": result.video and f"{place}/video",
            "record": result.record,
        }
    return JobOutput(
        id=job.id,
        stage=job.order.stage,
        state=job.state,
        jobs_before=worker.position(job),
        running_stage=job.stage,
        step=job.step,
        steps=job.steps,
        seconds_left=job.seconds_left,
        error=job.error,
        preview=f"{place}/preview" if job.preview else None,
        **made,
    )


def _add_errors(api: FastAPI) -> None:
    """Makes every error a sentence in `detail`, and never a traceback."""

    @api.exception_handler(RequestValidationError)
    def bad_request(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return JSONResponse({"detail": f"The body is not JSON: {first['ctx']['error']}."}, 422)
        place = ".".join(str(part) for part in first["loc"][1:]) or "body"
        return JSONResponse({"detail": f"`{place}` is not valid: {first['msg'].rstrip('.')}."}, 422)

    @api.exception_handler(QueueFull)
    def full(_: Request, error: QueueFull) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 429)

    @api.exception_handler(ValueError)
    def refused(_: Request, error: ValueError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 400)


def _limit_requests(api: FastAPI, limits: Limits) -> None:
    # Base64 makes a file a third longer; the request also contains some text.
    longest = limits.anchors * limits.upload_bytes * 4 // 3 + 2**20

    @api.middleware("http")
    async def check(request: Request, call_next: Callable) -> Response:
        length = request.headers.get("content-length", "")
        if (
            request.method == "POST"
            and request.url.path == "/api/jobs"
            and not (length.isdigit() and int(length) <= longest)
        ):
            return JSONResponse({"detail": f"A request must state its length, at most {longest} bytes."}, 413)
        return await call_next(request)
