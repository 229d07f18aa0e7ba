"""Worker of a run: makes planned videos stage by stage. Each output file is written completely or not at all."""

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
# Names of the parts of a pipeline that a run may need, for its loader.
REWRITER, COMPOSER, LORA, VIDEO = "rewriter", "composer", "lora", "video"
# Number of locks that the prompts share. A lock keeps two workers with the same prompt from both writing its caption.
NUM_LOCKS = 64


class Load(Protocol):
    """Callable that loads a pipeline in a worker's process. It must be picklable.

    Args:
        parts (collection of `str`): parts that the process needs, of `REWRITER`, `COMPOSER`, `LORA` and `VIDEO`. Without
            `VIDEO` the video model may be left without weights.
        device (`str`, *optional*): device of the pipeline; left out, the fastest that the machine has.
    """

    def __call__(self, parts: Collection[str], device: str | None = None) -> FactorizedStages: ...


def parts_of(arguments: dict[str, Any]) -> frozenset[str]:
    """Returns the parts of the pipeline that a call with these arguments needs."""
    if arguments.get("mode") == "direct":
        return frozenset({VIDEO})
    if arguments.get("image") is not None or arguments.get("anchors") is not None:
        return frozenset({LORA, VIDEO})
    is_written = arguments.get("first_frame_prompt") is not None or arguments.get("storyboard") is not None
    return frozenset({COMPOSER, LORA, VIDEO} | (set() if is_written else {REWRITER}))


def call_of(prompt: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of the pipeline's call for a planned video, with its images loaded.

    Raises:
        `ValueError`, `OSError`: an image cannot be read.
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
    """Makes videos of a plan. Each stage reuses what is already in the output folder.

    Args:
        folder (`Path`): the output folder, with a plan.
        load ([`Load`]): loads the pipeline.
        parts (collection of `str`): parts of the pipeline that this worker needs.
        device (`str`, *optional*): argument of `load`.
    """

    def __init__(self, folder: Path, load: Load, parts: Collection[str], device: str | None = None):
        self.folder = folder
        self.manifest = Manifest(folder)
        self.pipe = load(parts, device)
        self._listed: Collection[bytes] = ()

    def make(self, row: PlannedVideo) -> dict[str, Any] | None:
        """Runs all stages of a video; returns its line of the manifest, or `None` if it already had one."""
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
        """Runs stage 1: writes the caption of the row's prompt, which all videos of this prompt share."""
        path = caption_path(self.folder, row)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.parent / f"{int(path.stem[:8], 16) % NUM_LOCKS}.lock"):
                if not path.exists():
                    values = write(self.pipe, call_of(row.prompt, row.arguments)).to_json()
                    self._put(path, lambda draft: _write_json(draft, {"prompt": row.prompt, **values}))
        return Writing.from_json(json.loads(path.read_text(encoding="utf-8")))

    def compose(self, row: PlannedVideo) -> Drawing:
        """Runs stage 2: draws the anchors of the row's video."""
        folder = stages_folder(self.folder, row)
        if not folder.exists():
            writing = self.rewrite(row) if REWRITER in parts_of(row.arguments) else None
            started = time.perf_counter()
            drawing = draw(self.pipe, call_of(row.prompt, row.arguments), row.seed, writing)
            seconds = round(time.perf_counter() - started, 4)
            self._put(folder, lambda draft: _save_drawing(draft, drawing, seconds))
        return _load_drawing(folder)

    def animate(self, row: PlannedVideo) -> dict[str, Any] | None:
        """Runs stage 3: writes the video's file and its line of the manifest.

        Returns the line, or `None` if the video already had one.
        """
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
        """Returns whether an existing video has a line; a worker that died may have finished it."""
        if path_key(row.path) not in self._listed:
            self._listed = finished_sizes(self.folder)
        return path_key(row.path) in self._listed

    def _write_video(self, path: Path, output: FactorizedVideoPipelineOutput) -> int:
        """Writes the video's file, completely or not at all, and returns its size in bytes."""
        frames: Any = output.frames[0]
        sound: dict[str, Any] = {}
        if getattr(output, "audio", None):
            sound = {"audio": output.audio[0], "audio_sampling_rate": output.audio_sampling_rate}
        draft = self.folder / TEMPORARY / f"{uuid.uuid4().hex}.mp4"
        rate, scale = self.pipe.call_defaults["frame_rate"], viewing_scale(frames.shape[1])
        write_video(draft, frames, rate, output.records[0], scale, **sound)
        size = draft.stat().st_size
        path.parent.mkdir(parents=True, exist_ok=True)
        # `write_video` has already flushed the file to the disk.
        os.replace(draft, path)
        return size

    def close(self) -> None:
        self.manifest.close()

    def failed(self, row: PlannedVideo, error: Exception) -> dict[str, Any]:
        """Adds the line of a failed video to the manifest and returns it."""
        line = {"path": row.path, "status": "failed", "error": f"{type(error).__name__}: {error}"}
        self.manifest.add(line)
        return line

    def _put(self, path: Path, make: Callable[[Path], Any]) -> None:
        """Makes a temporary file or folder, flushes it to the disk and moves it to `path`, unless that exists by then."""
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
    """Returns the path of a prompt's caption, shared by all calls with the same arguments for stage 1."""
    names = ("mode", "num_moments", "rewriter_max_new_tokens", "rewriter_motion")
    asked = [row.prompt, *(row.arguments.get(name) for name in names)]
    return folder / CAPTIONS / f"{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]}.json"


def stages_folder(folder: Path, row: PlannedVideo) -> Path:
    """Returns the folder of a video's anchors.

    It holds `anchor.png`, `anchor_2.png` and so on for later moments, `candidate_1.png` and so on if a judge chose among
    candidates, and `stages.json` with file names, seeds, scores and answers.
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
    """Adds the line of an existing video that has none, because its worker was killed before it wrote the line.

    Raises:
        `ValueError`: the video's metadata has another prompt or seed.
    """
    record = read_video_metadata(path)
    is_seed = record.get("seeds", {}).get("video") == row.seed or row.arguments.get("motion_retries")
    if record.get("prompt") != row.prompt or not is_seed:
        raise ValueError(f"{row.path} was not made by this plan; move it away.")
    line = {"path": row.path, "status": "found", "seed": row.seed, "bytes": path.stat().st_size}
    manifest.add(line)
    return line


def _memory_bytes() -> int:
    """Returns the peak memory on the GPU, or without a GPU the current memory of this process."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else psutil.Process().memory_info().rss
