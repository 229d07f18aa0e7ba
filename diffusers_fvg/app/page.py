"""The page of `fvg app`: a prompt and a panel for each stage. It shows a [`Session`] and runs its stages."""

from __future__ import annotations

import asyncio
import base64
import html
import os
import secrets
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import PIL.Image
from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse

from .api import send_video
from .layout import make_layout
from .orders import moments_text, new_seed, read_moments
from .outputs import Form
from .pictures import PictureFile
from .session import Session, Sessions
from .worker import ENDED, Job, Worker


CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
NAMES = {
    "rewrite": "writing",
    "compose": "drawing",
    "judge": "judging the pictures",
    "derive": "drawing later moments",
    "encode": "preparing",
    "denoise": "animating",
    "decode": "decoding",
}
# Seconds between two updates of a job's progress.
LOOK = 0.3
SEED_LIMIT = 2**31 - 1


def add_page(api: FastAPI, worker: Worker) -> FastAPI:
    """Returns the application with the page at its root, beside the API."""

    @api.get("/outputs/{id}/{form}", include_in_schema=False)
    def output(id: str, form: Form) -> FileResponse:
        # A link carries no owner, but only the owner knows the job's id.
        job = worker.find(id)
        if job is None or job.result is None or job.result.video is None:
            raise HTTPException(404, "There is no such video: it has been deleted.")
        return send_video(job, form)

    blocks = make_page(worker)
    limit = worker.limits.upload_bytes
    theme = gr.themes.Soft(primary_hue="orange", neutral_hue="slate", font=["system-ui", "sans-serif"]).set(
        body_background_fill="#f6f8fa",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        border_color_primary="#d5dce4",
        block_title_background_fill="none",
        block_title_text_color="*neutral_600",
        block_title_text_color_dark="*neutral_300",
        block_title_padding="0",
        block_label_background_fill="none",
        block_label_text_color="*neutral_600",
    )
    return gr.mount_gradio_app(
        api,
        blocks,
        path="/",
        css=CSS,
        theme=theme,
        max_file_size=limit,
        show_error=False,
        footer_links=[],
        ssr_mode=False,
        run_history=False,
    )


def make_page(worker: Worker) -> gr.Blocks:
    """Returns the page alone."""
    # By default, gradio aggregates the last 10,000 events after every event, which is slow.
    os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "1000")
    os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", "1000")
    with gr.Blocks(
        title="Factorized Video Generation", analytics_enabled=False, delete_cache=(3600, 24 * 3600)
    ) as blocks:
        parts = make_layout(worker)
        _Actions(parts, Sessions(worker)).connect(blocks)
    # gradio keeps about 0.1 MiB for each tab that was ever opened, by default for the latest 10,000. A tab that was dropped gets
    # this state again when it is used: a user's own data is kept in `Sessions`.
    blocks.state_session_capacity = worker.limits.people
    return blocks.queue(default_concurrency_limit=None, api_open=False)


# -- what it does -----------------------------------------------------------------------------------------------------


class _Actions:
    """Events of the page. Each one reads the page into the user's session, acts, and shows the session again."""

    def __init__(self, parts: SimpleNamespace, sessions: Sessions):
        self.parts, self.sessions = parts, sessions

    def connect(self, blocks: gr.Blocks) -> None:
        parts = self.parts
        values = set(vars(parts).values())
        read = {part for part in values if not isinstance(part, (gr.Button, gr.HTML, gr.Gallery))}
        shown = list(values)

        def on(event: Callable, do: Callable) -> None:
            event(do, inputs=read, outputs=shown, show_progress="hidden", api_visibility="private")

        for name in ("rewrite", "compose", "animate", "generate"):
            on(getattr(parts, name).click, self._stage(name))
        on(blocks.load, self._load)
        on(parts.upload.upload, self._quick(self._upload))
        on(parts.recipe.upload, self._quick(lambda session, data: session.take_recipe(data[parts.recipe])))
        on(parts.clear.click, self._quick(lambda session, data: session.anchors.clear()))
        # These events need and change only a few components.
        alone = {"show_progress": "hidden", "api_visibility": "private"}
        parts.cancel.click(self._cancel, parts.key, parts.status, **alone)
        for dice, seed in ((parts.dice, parts.seed), (parts.anchor_dice, parts.anchor_seed)):
            dice.click(new_seed, None, seed, **alone)
        needs = [parts.width, parts.height, parts.num_frames, parts.num_inference_steps, parts.preset]
        for need in needs:
            need.input(self._memory, [parts.key, *needs], parts.memory, **alone)
        parts.pictures.select(self._choose, parts.key, parts.judged, **alone)
        parts.history.select(self._look_back, parts.key, shown, **alone)

    # -- stages -------------------------------------------------------------------------------------------------------

    def _stage(self, name: str) -> Callable:
        async def run(data: dict) -> AsyncIterator[dict]:
            session = self._session(data[self.parts.key])
            try:
                await asyncio.to_thread(self._read, session, data)
                job = await asyncio.to_thread(getattr(session, name))
            except ValueError as error:
                yield {self.parts.status: _problem(str(error))}
                return
            async for update in self._follow(session, job):
                yield update

        return run

    async def _follow(self, session: Session, job: Job) -> AsyncIterator[dict]:
        last = None
        while job.state not in ENDED:
            told = _progress(session.worker, job), _preview(job)
            if told != last:
                yield dict(zip((self.parts.status, self.parts.preview), told))
            last = told
            await asyncio.sleep(LOOK)
        session.take(job)
        texts = {"done": "Done.", "cancelled": "Cancelled.", "failed": job.error or ""}
        show = _problem if job.state == "failed" else _message
        parts, view = self.parts, await asyncio.to_thread(self._view, session)
        # Text that the user wrote meanwhile, for the next run, is kept.
        made = [parts.pictures, parts.judged, parts.video, parts.downloads, parts.history, parts.memory]
        if job.state == "done" and job.order.stage in ("rewrite", "generate") and job.order.mode != "direct":
            made.append(parts.caption)
        shown = {part: view[part] for part in made}
        yield shown | {parts.status: show(texts[job.state]), parts.preview: ""}

    async def _load(self, data: dict) -> AsyncIterator[dict]:
        key = data[self.parts.key] or secrets.token_urlsafe(24)
        session = self._session(key)
        view = await asyncio.to_thread(self._view, session)
        if not session.prompt:
            # A new user may already be typing.
            del view[self.parts.prompt], view[self.parts.caption], view[self.parts.mode]
        yield view | {self.parts.key: key, self.parts.status: ""}
        for job in session.worker.history(session.owner):
            if job.state not in ENDED:
                async for update in self._follow(session, job):
                    yield update

    def _quick(self, act: Callable[[Session, dict], Any]) -> Callable:
        """Returns an event that runs no model: it calls `act`, and shows the text that `act` returns."""

        def run(data: dict) -> dict:
            session = self._session(data[self.parts.key])
            try:
                self._read(session, data)
                told = act(session, data)
            except ValueError as error:
                return {self.parts.status: _problem(str(error)), self.parts.upload: None, self.parts.recipe: None}
            status = {self.parts.status: _message(told)} if isinstance(told, str) else {}
            return self._view(session) | status

        return run

    def _cancel(self, key: str) -> str:
        session = self._session(key)
        waiting = [job for job in session.worker.history(session.owner) if job.state not in ENDED]
        for job in waiting:
            session.worker.cancel(session.owner, job.id)
        return _message("Cancelling …" if waiting else "Nothing is running.")

    def _upload(self, session: Session, data: dict) -> str:
        frame, strength = int(data[self.parts.frame] or 0), float(data[self.parts.strength])
        session.upload(data[self.parts.upload], frame, strength)
        return "The picture replaces stages 1 and 2: animate it, or add another one at another frame."

    def _choose(self, key: str, event: gr.SelectData) -> str:
        session = self._session(key)
        session.chosen = min(event.index, max(0, len(session.pictures) - 1))
        return _judged(session)

    def _look_back(self, key: str, event: gr.SelectData) -> dict:
        session, videos = self._session(key), self._videos(key)
        if event.index >= len(videos):
            return self._view(session)
        session.video = videos[event.index]
        told = session.take_recipe(_made(videos[event.index])[0])
        return self._view(session) | {self.parts.status: _message(told)}

    def _memory(self, key: str, *needs: Any) -> str:
        session, (*whole, preset) = self._session(key), needs
        names = ("width", "height", "num_frames", "num_inference_steps")
        session.settings |= {name: int(value or 0) or None for name, value in zip(names, whole)}
        session.settings["preset"] = preset or None
        return session.memory_text()

    # -- between page and session -------------------------------------------------------------------------------------

    def _session(self, key: str) -> Session:
        # A page without a key gets a new session that no other page can find.
        return self.sessions.of(f"page {key or secrets.token_urlsafe(24)}")

    def _videos(self, key: str) -> list[Job]:
        jobs = self.sessions.worker.history(self._session(key).owner)
        return [job for job in jobs if job.result is not None and job.result.video is not None]

    def _read(self, session: Session, data: dict) -> None:
        """Reads the page's values into the session; raises `ValueError` for a storyboard's line without a time."""
        parts = self.parts
        session.prompt, session.mode = data[parts.prompt] or "", data[parts.mode]
        session.num_candidates = int(data[parts.num_candidates])
        for name in ("seed", "anchor_seed"):
            value = data[getattr(parts, name)]
            setattr(session, name, new_seed() if value is None else int(value))
        text = (data[parts.caption] or "").strip()
        if session.mode == "storyboard":
            is_moments = text[:1].isdigit() and "%" in text
            session.moments = read_moments(text) if is_moments else session.moments if not text else []
        else:
            session.caption = text
        whole = ("width", "height", "num_frames", "num_inference_steps", "num_moments")
        settings = {name: int(data[getattr(parts, name)] or 0) or None for name in whole}
        settings |= {name: data[getattr(parts, name)] or None for name in ("preset", "negative_prompt")}
        session.settings = settings | {
            name: data[getattr(parts, name)] for name in ("guidance_scale", "anchor_decode")
        }
        session.lora_scale = None if data[parts.lora_scale] == 1 else data[parts.lora_scale]

    def _view(self, session: Session) -> dict:
        """Returns the values of the page's components for the session."""
        parts, settings = self.parts, session.settings
        own = session.worker.pipe.call_defaults
        text = moments_text(session.moments) if session.mode == "storyboard" else session.caption
        pictures = [
            (_shown(each.image), str(number) if each.score is None else f"{number}: {each.score:.2f}")
            for number, each in enumerate(session.pictures, start=1)
        ]
        chosen = min(session.chosen, len(pictures) - 1) if pictures else None
        anchors = [
            (
                _shown(session.seen(each)),
                f"frame {each.frame_index}" + (f" · {each.strength:g}" if each.strength < 1 else ""),
            )
            for each in session.anchors
        ]
        key = session.owner.removeprefix("page ")
        history = []
        for job in self._videos(key):
            video, poster = _made(job)
            if video.is_file():
                history.append((poster.open(), job.order.prompt))
        shown = {
            parts.prompt: session.prompt,
            parts.mode: session.mode,
            parts.caption: text,
            parts.pictures: gr.Gallery(value=pictures, selected_index=chosen),
            parts.judged: _judged(session),
            parts.anchors: anchors,
            parts.video: _video(session.video),
            parts.downloads: _downloads(session.video),
            parts.anchor_seed: session.anchor_seed,
            parts.seed: session.seed,
            parts.num_candidates: session.num_candidates,
            parts.history: history,
            parts.memory: session.memory_text(),
            parts.upload: None,
            parts.recipe: None,
            parts.lora_scale: 1 if session.lora_scale is None else session.lora_scale,
        }
        for name in ("width", "height", "num_frames"):
            shown[getattr(parts, name)] = settings.get(name) or own[name]
        for name in ("num_inference_steps", "guidance_scale"):
            shown[getattr(parts, name)] = settings.get(name)
        without = {"preset": "", "negative_prompt": "", "anchor_decode": "raw", "num_moments": 2}
        for name, value in without.items():
            shown[getattr(parts, name)] = settings.get(name) or value
        return shown


def _shown(image: PIL.Image.Image) -> PIL.Image.Image:
    """Enlarges small pictures by a whole factor, as the video is enlarged."""
    scale = max(1, 384 // max(image.size))
    return image.resize([side * scale for side in image.size], PIL.Image.Resampling.NEAREST)


def _video(job: Job | None) -> str:
    if job is None:
        return "<p class='empty'>Your video will appear here.</p>"
    return f"<video src='outputs/{job.id}/mp4' controls autoplay loop muted playsinline></video>"


def _downloads(job: Job | None) -> str:
    names = {
        "mp4": "mp4 with its recipe",
        "gif": "GIF",
        "webp": "WebP",
        "frames": "PNG frames",
        "strip": "contact strip",
    }
    links = (
        f"<a id='get-{form}' href='outputs/{job.id}/{form}' download>{name}</a>" for form, name in names.items() if job
    )
    return f"<p>{' '.join(links)}</p>" if job else ""


def _preview(job: Job) -> str:
    if job.preview is None:
        return ""
    return f"<img alt='Preview' src='data:image/webp;base64,{base64.b64encode(job.preview).decode()}'><p>Preview</p>"


def _label(picture: Any) -> str:
    score = "" if picture.score is None else f"score {picture.score:.2f} · "
    return f"{score}seed {picture.seed}"


def _judged(session: Session) -> str:
    if not session.pictures:
        return ""
    picture = session.pictures[session.chosen]
    rows = "".join(
        f"<li><meter min=0 max=1 value={value:.3f}></meter> {html.escape(question)} <b>{value:.0%}</b></li>"
        for question, value in (picture.answers or {}).items()
    )
    return f"<p>Picture {session.chosen + 1} is chosen ({_label(picture)}).</p><ul>{rows}</ul>"


def _progress(worker: Worker, job: Job) -> str:
    before = worker.position(job)
    if job.state == "waiting":
        return _bar(0, f"Waiting: {before} {'job' if before == 1 else 'jobs'} before this one")
    if not job.stage:
        return _bar(0, "Starting")
    left = "" if job.seconds_left is None else f" · about {_seconds(job.seconds_left)} left"
    stopping = " · cancelling" if job.is_unwanted else ""
    name = NAMES.get(job.stage, job.stage).capitalize()
    return _bar(job.step / max(1, job.steps), f"{name}, step {job.step} of {job.steps}{left}{stopping}")


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _bar(share: float, text: str) -> str:
    return f"<div class='bar' role='status'><i style='width:{share:.0%}'></i><span>{html.escape(text)}</span></div>"


def _made(job: Job) -> tuple[Path, PictureFile]:
    """Returns the video and the poster of a job with a video."""
    result = job.result
    assert result is not None and result.video is not None and result.poster is not None
    return result.video, result.poster


def _message(text: str) -> str:
    return f"<div class='message' role='status'>{html.escape(text)}</div>"


def _problem(text: str) -> str:
    return f"<div class='problem' role='alert'>{html.escape(text)}</div>"
