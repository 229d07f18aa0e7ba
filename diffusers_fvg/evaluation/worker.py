"""One process of a run: it makes the planned videos that it is given, a stage at a time, each output whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import PIL.Image
import psutil
import torch
from filelock import FileLock

from ..animate.anchor import Anchor
from ..animate.frames import first_frame
from ..compose.candidates import AnchorCandidate
from ..media import read_video_metadata, viewing_scale, write_video
from ..pipelines.staged import Drawing, Writing, animate, draw, write
from ..rewrite.storyboard import Moment
from .manifest import TEMPORARY, Manifest, finished_sizes, path_key
from .plan import PlannedVideo


if TYPE_CHECKING:
    from ..pipelines.output import FactorizedVideoPipelineOutput
    from ..pipelines.stages import FactorizedStages

CAPTIONS, STAGES, STAGES_FILE = "captions", "stages", "stages.json"
# Parts of a pipeline that a run may need, as its loader is asked for them.
REWRITER, COMPOSER, LORA, VIDEO = "rewriter", "composer", "lora", "video"
# Prompts share this many locks: two workers that meet the same prompt do not both write its caption.
NUM_LOCKS = 64


class Load(Protocol):
    """Loads a pipeline, in whichever process; it can be pickled.

    Args:
        parts (collection of `str`): of `REWRITER`, `COMPOSER`, `LORA` and `VIDEO`: what the process needs. Without `VIDEO` the
            video model may be one without weights.
        device (`str`, *optional*): where to; the fastest there is when left out.
    """

    def __call__(self, parts: Collection[str], device: str | None = None) -> FactorizedStages: ...


def parts_of(arguments: dict[str, Any]) -> frozenset[str]:
    """What a video with these arguments of the call needs."""
    if arguments.get("mode") == "direct":
        return frozenset({VIDEO})
    if arguments.get("image") is not None or arguments.get("anchors") is not None:
        return frozenset({LORA, VIDEO})
    is_written = arguments.get("first_frame_prompt") is not None or arguments.get("storyboard") is not None
    return frozenset({COMPOSER, LORA, VIDEO} | (set() if is_written else {REWRITER}))


def call_of(prompt: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the pipeline's call for a planned video, pictures opened.

    Raises:
        `ValueError`, `OSError`: a picture that cannot be read.
    """
    call = {"prompt": prompt, **arguments}
    if call.get("image") is not None:
        call["image"] = first_frame(call["image"])
    if call.get("anchors") is not None:
        call["anchors"] = [Anchor(**anchor | {"image": first_frame(anchor["image"])}) for anchor in call["anchors"]]
    if call.get("storyboard") is not None:
        call["storyboard"] = [Moment(**moment) for moment in call["storyboard"]]
    return call


class Worker:
    """Makes videos of a plan; each method may be called again for what is there.

    Args:
        folder (`Path`): the output folder, with a plan.
        load ([`Load`]): the pipeline.
        parts (collection of `str`): what of it this worker needs.
        device (`str`, *optional*): for `load`.
    """

    def __init__(self, folder: Path, load: Load, parts: Collection[str], device: str | None = None):
        self.folder = folder
        self.manifest = Manifest(folder)
        self.pipe = load(parts, device)
        self._listed: Collection[bytes] = ()

    def make(self, row: PlannedVideo) -> dict[str, Any] | None:
        """All stages of a video. Returns its line of the manifest, or `None` where it is there."""
        needed = parts_of(row.arguments)
        if (self.folder / row.path).exists():
            return self.animate(row)
        if REWRITER in needed:
            self.rewrite(row)
        if COMPOSER in needed:
            self.compose(row)
        return self.animate(row)

    # -- the stages ---------------------------------------------------------------------------------------------------

    def rewrite(self, row: PlannedVideo) -> Writing:
        """Stage 1: the caption of the row's prompt, which all its videos share."""
        path = caption_path(self.folder, row)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.parent / f"{int(path.stem[:8], 16) % NUM_LOCKS}.lock"):
                if not path.exists():
                    values = write(self.pipe, call_of(row.prompt, row.arguments)).to_json()
                    self._put(path, lambda draft: _write_json(draft, {"prompt": row.prompt, **values}))
        return Writing.from_json(json.loads(path.read_text(encoding="utf-8")))

    def compose(self, row: PlannedVideo) -> Drawing:
        """Stage 2: the pictures of the row's video."""
        folder = stages_folder(self.folder, row)
        if not folder.exists():
            writing = self.rewrite(row) if REWRITER in parts_of(row.arguments) else None
            started = time.perf_counter()
            drawing = draw(self.pipe, call_of(row.prompt, row.arguments), row.seed, writing)
            seconds = round(time.perf_counter() - started, 4)
            self._put(folder, lambda draft: _save_drawing(draft, drawing, seconds))
        return _load_drawing(folder)

    def animate(self, row: PlannedVideo) -> dict[str, Any] | None:
        """Stage 3, the video's file and its line of the manifest, which it returns."""
        path, needed = self.folder / row.path, parts_of(row.arguments)
        if path.exists():
            return None if self._is_listed(row) else note_found(path, row, self.manifest)
        started = time.perf_counter()
        writing = self.rewrite(row) if REWRITER in needed else None
        drawing = self.compose(row) if COMPOSER in needed else None
        output = animate(self.pipe, call_of(row.prompt, row.arguments), row.seed, writing, drawing)
        size = self._write_video(path, output)
        seconds = {**output.timings, "total": time.perf_counter() - started}
        motion = getattr(output, "motion", None)
        line = {"path": row.path, "status": "made", "seed": row.seed, "bytes": size, "frames": len(output.frames[0])}
        line |= {
            "seconds": {name: round(value, 4) for name, value in seconds.items()},
            "memory_bytes": _memory_bytes(),
        }
        line |= {"caption": output.records[0]["first_frame_prompt"], "motion": motion and motion[0]}
        self.manifest.add(line)
        return line

    def _is_listed(self, row: PlannedVideo) -> bool:
        """Whether a video that is there has a line: this worker may have been given what one that died had finished."""
        if path_key(row.path) not in self._listed:
            self._listed = finished_sizes(self.folder)
        return path_key(row.path) in self._listed

    def _write_video(self, path: Path, output: FactorizedVideoPipelineOutput) -> int:
        """The file, whole or not at all, and its bytes."""
        frames: Any = output.frames[0]
        sound: dict[str, Any] = {}
        if getattr(output, "audio", None):
            sound = {"audio": output.audio[0], "audio_sampling_rate": output.audio_sampling_rate}
        draft = self.folder / TEMPORARY / f"{uuid.uuid4().hex}.mp4"
        rate, scale = self.pipe.call_defaults["frame_rate"], viewing_scale(frames.shape[1])
        write_video(draft, frames, rate, output.records[0], scale, **sound)
        size = draft.stat().st_size
        path.parent.mkdir(parents=True, exist_ok=True)
        # It is on the disk already.
        os.replace(draft, path)
        return size

    def close(self) -> None:
        self.manifest.close()

    def failed(self, row: PlannedVideo, error: Exception) -> dict[str, Any]:
        """The line of a video that cannot be made."""
        line = {"path": row.path, "status": "failed", "error": f"{type(error).__name__}: {error}"}
        self.manifest.add(line)
        return line

    def _put(self, path: Path, make: Callable[[Path], Any]) -> None:
        """Makes a file or folder beside, to the disk, and then puts it in its place, unless another is there by then."""
        draft = self.folder / TEMPORARY / uuid.uuid4().hex
        try:
            make(draft)
            for file in draft.iterdir() if draft.is_dir() else (draft,):
                with open(file, "rb+") as written:
                    os.fsync(written.fileno())
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(draft, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        finally:
            if draft.is_dir():
                shutil.rmtree(draft)
            draft.unlink(missing_ok=True)


# -- files of the stages ----------------------------------------------------------------------------------------------


def caption_path(folder: Path, row: PlannedVideo) -> Path:
    """Where the caption of a prompt is: one for all calls that ask stage 1 for the same."""
    names = ("mode", "num_moments", "rewriter_max_new_tokens", "rewriter_motion")
    asked = [row.prompt, *(row.arguments.get(name) for name in names)]
    return folder / CAPTIONS / f"{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]}.json"


def stages_folder(folder: Path, row: PlannedVideo) -> Path:
    """Where the pictures of a video are: `anchor.png` and those of later moments, `candidate_1.png` and so on where a judge chose,
    and `stages.json`, which names them with seeds, scores and answers.
    """
    return folder / STAGES / row.path


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _save_drawing(folder: Path, drawing: Drawing, seconds: float) -> None:
    folder.mkdir()
    names = ["anchor.png", *(f"anchor_{number}.png" for number in range(2, len(drawing.pictures) + 1))]
    for name, picture in zip(names, drawing.pictures):
        picture.save(folder / name)
    listed = None
    for number, candidate in enumerate(drawing.candidates or (), 1):
        candidate.image.save(folder / f"candidate_{number}.png")
        facts = {"seed": candidate.seed, "score": candidate.score, "answers": candidate.answers}
        listed = [*(listed or ()), {"file": f"candidate_{number}.png", **facts}]
    values = {
        "anchors": names,
        "seed": drawing.seed,
        "candidates": listed,
        "seconds": seconds,
        "record": drawing.record,
    }
    _write_json(folder / STAGES_FILE, values)


def _load_drawing(folder: Path) -> Drawing:
    values = json.loads((folder / STAGES_FILE).read_text(encoding="utf-8"))
    candidates = values["candidates"] and [
        AnchorCandidate(_picture(folder / each["file"]), each["seed"], each["score"], each["answers"])
        for each in values["candidates"]
    ]
    return Drawing(
        [_picture(folder / name) for name in values["anchors"]], values["seed"], candidates, values["record"]
    )


def _picture(path: Path) -> PIL.Image.Image:
    with PIL.Image.open(path) as image:
        return image.convert("RGB")


def note_found(path: Path, row: PlannedVideo, manifest: Manifest) -> dict[str, Any]:
    """The line of a video that is there, in a file, without one: it was made before a kill that came before its line.

    Raises:
        `ValueError`: the file is another one.
    """
    record = read_video_metadata(path)
    is_seed = record.get("seeds", {}).get("video") == row.seed or row.arguments.get("motion_retries")
    if record.get("prompt") != row.prompt or not is_seed:
        raise ValueError(f"{row.path} was not made by this plan; move it away.")
    line = {"path": row.path, "status": "found", "seed": row.seed, "bytes": path.stat().st_size}
    manifest.add(line)
    return line


def _memory_bytes() -> int:
    """Of the card the most that was used, without one what this process uses."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else psutil.Process().memory_info().rss
