"""Runs a shapes model in several arms, at several numbers of steps and seeds, and scores every video (synthetic).

An arm is a variant of the pipeline: the text that the video model reads, and the source of its anchor. All arms share the video
model, the prompts and the noise of a seed. Captions and anchors are made once and reused at every number of steps. Records are
written batch by batch, so that a later call continues an interrupted study.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from ..animate.anchor import Anchor
from ..lora.anchor_lora import ADAPTER_NAME
from .blobs import find_objects
from .held_out import attributes_stay, score_written_caption, settled_caption, split_scenes
from .prompts import CAPTION_START
from .scorer import label_iou, motion_amount, score_anchor, score_video
from .summary import average
from .world import Scene, render


@dataclass(frozen=True)
class Arm:
    """A way to make videos.

    Args:
        anchor (`str`, *optional*): source of the anchor: `"written"`, drawn from the rewriter's caption; `"true caption"`, drawn
            from the true one; `"true"`, a frame of the rendered clip. `None` is text-to-video by the base.
        position (`float`): relative position of the anchor in the clip, 0 for the first frame and 1 for the last.
        rewritten (`bool`): whether the video model reads the prompt joined with the rewriter's caption.
        lora_strength (`float`): strength of the anchor LoRA.
        judged (`bool`): whether the model's judge chooses the anchor among several candidates.
        sweep (`str`): numbers of steps at which the arm runs: `"all"`, the `"ends"` (full and few), or `"few"`.
    """

    anchor: str | None = None
    position: float = 0.0
    rewritten: bool = False
    lora_strength: float = 1.0
    judged: bool = False
    sweep: str = "few"


ARMS = {
    "direct": Arm(sweep="all"),
    "direct_rewritten": Arm(rewritten=True, sweep="all"),
    "factorized": Arm("written", sweep="all"),
    "factorized_judged": Arm("written", judged=True),
    "true_caption": Arm("true caption"),
    "true_anchor": Arm("true", sweep="ends"),
    "true_middle": Arm("true", position=0.5),
    "true_last": Arm("true", position=1.0),
    "true_anchor_no_lora": Arm("true", lora_strength=0.0),
}
# Forms in which `direct_rewritten` joins its two texts, with the number of tokens. The best form is tuned like guidance.
# `objects` is the caption without its opening words. `None` is the model's own number of tokens, which cuts the longest texts.
FORMS: dict[str, tuple[str, int | None]] = {
    "prompt, objects": ("{prompt}, {objects}", None),
    "objects. prompt": ("{objects}. {prompt}", None),
    "caption. prompt, 104 tokens": ("{caption}. {prompt}", 104),
}
ANCHOR_SEEDS = 10_000


@dataclass(frozen=True)
class StudySettings:
    """Size of a study. The first of `steps` is the full number. Guidance is tuned at `few_steps`, on separate prompts."""

    per_category: int = 9
    seeds: int = 3
    steps: tuple[int, ...] = (50, 25, 15, 8, 4)
    few_steps: int = 15
    tuning_per_category: int = 4
    tuning_seeds: int = 2
    guidance: tuple[float, ...] = (1.0, 1.75, 3.0, 5.0)

    def arm_steps(self, arm: Arm) -> tuple[int, ...]:
        return {"all": self.steps, "ends": (self.steps[0], self.few_steps), "few": (self.few_steps,)}[arm.sweep]


@dataclass(frozen=True)
class Cell:
    """Settings that all videos of one table entry share.

    `lora` is another adapter than the model's anchor LoRA, and `judge` the fingerprint of the judge that chose the anchors.
    """

    split: str
    arm: str
    steps: int
    guidance: float | None = None
    form: str | None = None
    lora: str | None = None
    strength: float | None = None
    judge: str | None = None

    def facts(self) -> dict:
        return {name: value for name, value in asdict(self).items() if value is not None}


CELL_FIELDS = tuple(field.name for field in fields(Cell))


class FirstFrames:
    """Captions and anchors of scenes, made when an arm first needs them and kept."""

    def __init__(self, pipe, scenes: Sequence[Scene]):
        self.pipe, self.scenes = pipe, scenes
        self.seconds: dict[str, float] = {}
        self._composed: dict[tuple[str, int, bool], list[PIL.Image.Image]] = {}

    @cached_property
    def captions(self) -> list[str]:
        """One caption per scene. The rewriter decodes greedily, so captions do not depend on the seed."""
        began = time.perf_counter()
        captions = self.pipe.rewrite([scene.prompt for scene in self.scenes])
        self.seconds["rewrite"] = (time.perf_counter() - began) / len(captions)
        return captions

    def caption(self, source: str, index: int) -> str:
        return self.captions[index] if source == "written" else self.scenes[index].caption

    def composed(self, source: str, index: int, seed: int, judged: bool = False) -> PIL.Image.Image:
        if (source, seed, judged) not in self._composed:
            captions = [self.caption(source, k) for k in range(len(self.scenes))]
            began = time.perf_counter()
            # Other seeds than the video's: an image and a clip from the same noise would not be independent.
            generators = [noise(k, ANCHOR_SEEDS + seed) for k in range(len(captions))]
            images = self.pipe.compose(captions, generator=generators, num_candidates=None if judged else 1)
            self.seconds["judged" if judged else "compose"] = (time.perf_counter() - began) / len(captions)
            self._composed[source, seed, judged] = images
        return self._composed[source, seed, judged][index]

    def stage_seconds(self, source: str, judged: bool = False) -> float:
        """Returns the seconds of stages 1 and 2 for one video."""
        drawn = self.seconds["judged" if judged else "compose"]
        return drawn + (self.seconds["rewrite"] if source == "written" else 0.0)


def noise(index: int, seed: int) -> torch.Generator:
    """Returns the generator of a scene's noise, the same in every arm and at every number of steps."""
    return torch.Generator().manual_seed(1000 * seed + index)


@contextmanager
def adapter(pipe, name: str, strength: float) -> Iterator[None]:
    """Context manager in which one LoRA is active at a strength; afterwards the model's anchor LoRA is active at 1."""
    if (name, strength) == (ADAPTER_NAME, 1.0):
        yield
        return
    pipe.set_adapters(name, strength)
    try:
        yield
    finally:
        pipe.set_adapters(ADAPTER_NAME, 1.0)


def joined_text(form: str, prompt: str, caption: str) -> str:
    return FORMS[form][0].format(prompt=prompt, caption=caption, objects=caption.removeprefix(CAPTION_START).strip())


def measure(frames: np.ndarray, scene: Scene, anchor: tuple[int, np.ndarray] | None, first_frame_given: bool) -> dict:
    """Measures one video.

    Args:
        frames (`np.ndarray` of shape `(F, H, W, 3)`, `uint8`): the video.
        scene (`Scene`): scene of its prompt.
        anchor (`tuple`, *optional*): frame index and image of the anchor.
        first_frame_given (`bool`): whether the true first frame was the anchor. Then places which the prompt leaves open count,
            too.

    Returns:
        `dict`, rounded to four decimals: `score`; `motion`; `first_frame`, the `score_anchor` of frame 0; `anchor_iou`, the
        `label_iou` of the anchor and its frame; `kept` (only if `attributes_stay`), 1 if the first and the last frame both show
        exactly the scene's objects, by colour and shape.
    """
    truth = scene.objects if first_frame_given else settled_caption(scene)
    found = {
        "score": score_video(frames, scene.category, scene.meta),
        "motion": motion_amount(frames),
        "first_frame": score_anchor(frames[0], truth),
    }
    if attributes_stay(scene):
        wanted = Counter((item.colour, item.shape) for item in scene.objects)
        ends = [Counter((blob.colour, blob.shape) for blob in find_objects(frames[k])) for k in (0, -1)]
        found["kept"] = int(all(seen == wanted for seen in ends))
    if anchor is not None:
        found["anchor_iou"] = label_iou(frames[anchor[0]], anchor[1])
    return {name: round(value, 4) for name, value in found.items()}


def run_cell(
    pipe, cell: Cell, first_frames: FirstFrames, wanted: Sequence[tuple[int, int]], batch_size: int = 16
) -> Iterator[list[dict]]:
    """Makes and scores a video for each `(scene index, seed)` of `wanted`; yields the records of each batch."""
    arm, scenes = ARMS[cell.arm], first_frames.scenes
    defaults = pipe.call_defaults
    size = [defaults[name] for name in ("num_frames", "height", "width")]
    frame_index = round(arm.position * (size[0] - 1))
    strength = arm.lora_strength if cell.strength is None else cell.strength
    for start in range(0, len(wanted), batch_size):
        batch = wanted[start : start + batch_size]
        texts = [scenes[index].prompt for index, _ in batch]
        options = {"num_inference_steps": cell.steps, "guidance_scale": cell.guidance}
        if arm.rewritten:
            texts = [joined_text(cell.form, text, first_frames.captions[k]) for text, (k, _) in zip(texts, batch)]
            options["max_sequence_length"] = FORMS[cell.form][1]
        images = None
        if arm.anchor == "true":
            images = [PIL.Image.fromarray(render(scenes[k].objects, *size)[frame_index]) for k, _ in batch]
        elif arm.anchor is not None:
            images = [first_frames.composed(arm.anchor, k, seed, arm.judged) for k, seed in batch]
        anchors = [[Anchor(image, frame_index)] for image in images] if images else None
        began = time.perf_counter()
        with adapter(pipe, cell.lora or ADAPTER_NAME, strength):
            videos = pipe.animate(texts, anchors, generator=[noise(k, seed) for k, seed in batch], **options)
        seconds = (time.perf_counter() - began) / len(batch)
        records = []
        for position, (index, seed) in enumerate(batch):
            scene, frames = scenes[index], np.round(videos[position] * 255).astype(np.uint8)
            anchor = (frame_index, np.asarray(images[position])) if images else None
            record = cell.facts() | {"scene": index, "seed": seed}
            record |= measure(frames, scene, anchor, arm.anchor == "true" and frame_index == 0)
            if arm.anchor in ("written", "true caption"):
                caption = first_frames.caption(arm.anchor, index)
                record["anchor_score"] = round(score_anchor(np.asarray(images[position]), caption), 4)
                record["stage_seconds"] = round(first_frames.stage_seconds(arm.anchor, arm.judged), 3)
            if arm.anchor == "written":
                record["caption_score"] = round(score_written_caption(caption, scene), 4)
            records.append(record | {"seconds": round(seconds, 3)})
        yield records


class Journal:
    """File with the records of a study: a header that names model and prompts, then one line per batch. A line holds the values
    that all its records share, and the others as columns.

    Raises:
        `ValueError`: the file belongs to another model or to other prompts.
    """

    def __init__(self, path: Path, header: dict):
        self.path, self.records = path, {}
        # Text after the last line break is an incomplete line.
        text = path.read_text().rpartition("\n")[0] if path.exists() else ""
        if text:
            found, *batches = (json.loads(line) for line in text.split("\n"))
            other = [name for name in header if found.get(name) != header[name]]
            if other:
                raise ValueError(f"{path} holds records of another {other[0]}: delete it, or choose another folder.")
            for batch in batches:
                self._add(_rows(batch))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((text or json.dumps(header)) + "\n")

    @staticmethod
    def _key(record: dict) -> tuple:
        return tuple(record.get(name) for name in (*CELL_FIELDS, "scene", "seed"))

    def _add(self, records: Sequence[dict]) -> None:
        self.records |= {self._key(record): record for record in records}

    def find(self, cell: Cell, index: int, seed: int) -> dict | None:
        return self.records.get(self._key(asdict(cell) | {"scene": index, "seed": seed}))

    def append(self, records: Sequence[dict]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(_columns(records), separators=(",", ":")) + "\n")
        self._add(records)


def _columns(records: Sequence[dict]) -> dict:
    names = dict.fromkeys(name for record in records for name in record)
    return {
        name: records[0][name] if name in CELL_FIELDS else [record.get(name) for record in records] for name in names
    }


def _rows(columns: dict) -> list[dict]:
    rows = [
        {name: values if name in CELL_FIELDS else values[index] for name, values in columns.items()}
        for index in range(len(columns["scene"]))
    ]
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def complete(
    pipe,
    cells: Sequence[Cell],
    first_frames: FirstFrames,
    seeds: Sequence[int],
    journal: Journal,
    batch_size: int = 16,
) -> list[dict]:
    """Returns the records of all `cells` with category and prompt; makes those that the journal lacks."""
    scenes, result = first_frames.scenes, []
    pairs = [(index, seed) for seed in seeds for index in range(len(scenes))]
    for number, cell in enumerate(cells, start=1):
        wanted = [pair for pair in pairs if journal.find(cell, *pair) is None]
        began = time.perf_counter()
        for records in run_cell(pipe, cell, first_frames, wanted, batch_size):
            journal.append(records)
        records = [
            {"category": scenes[k].category, "prompt": scenes[k].prompt} | journal.find(cell, k, seed)
            for k, seed in pairs
        ]
        facts = ", ".join(f"{name} {value}" for name, value in cell.facts().items() if name not in ("split", "arm"))
        spent = f"{len(wanted)} videos in {time.perf_counter() - began:.0f} s" if wanted else "already there"
        print(
            f"[{cell.split} {number}/{len(cells)}] {cell.arm}, {facts}: {average(records):.3f} ({spent})", flush=True
        )
        result += records
    return result


def fingerprint(pipe) -> str:
    """Returns a hash of all weights of a pipeline, including stages 1 and 2 and LoRAs, but not the judge."""
    parts = {"rewriter": pipe.rewriter, "composer": pipe.composer, "text": pipe.text_encoder, "vae": pipe.vae}
    return _hash(parts | {"transformer": pipe.transformer})


def judge_fingerprint(pipe) -> str | None:
    return None if pipe.anchor_judge is None else _hash({"judge": pipe.anchor_judge})


def _hash(parts: dict[str, torch.nn.Module]) -> str:
    digest = hashlib.sha256()
    for part, module in parts.items():
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{part}.{name}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def journal_header(pipe, **scenes: Sequence[Scene]) -> dict:
    """Returns the journal's header: what records depend on besides their cell, which are the model, the prompts of each set and
    their scenes."""
    prompts = {f"{name}_prompts": [scene.prompt for scene in chosen] for name, chosen in scenes.items()}
    world = hashlib.sha256(repr(scenes).encode()).hexdigest()[:16]
    return {"synthetic": True, "model": fingerprint(pipe), **prompts, "scenes": world}


def arms_of(pipe) -> tuple[str, ...]:
    """Returns the arms for which a pipeline has the components."""
    return tuple(name for name, arm in ARMS.items() if not arm.judged or pipe.anchor_judge is not None)


def tuning_cells(settings: StudySettings, arms: Sequence[str] = tuple(ARMS), judge: str | None = None) -> list[Cell]:
    return [
        Cell("tuning", name, settings.few_steps, guidance, form, judge=judge if ARMS[name].judged else None)
        for name in arms
        for form in (FORMS if ARMS[name].rewritten else (None,))
        for guidance in settings.guidance
    ]


def best_settings(records: Sequence[dict]) -> dict[str, dict]:
    """Returns for each arm the guidance (and the form) with the best average on the tuning prompts, and all averages."""
    chosen: dict[str, dict] = {}
    for name in dict.fromkeys(record["arm"] for record in records):
        groups: dict[tuple, list[dict]] = {}
        for record in records:
            if record["arm"] == name:
                groups.setdefault((record["guidance"], record.get("form")), []).append(record)
        grid = [
            {"guidance": guidance, "form": form, "score": round(average(group), 4)}
            for (guidance, form), group in groups.items()
        ]
        best = max(grid, key=lambda choice: choice["score"])
        chosen[name] = {"guidance": best["guidance"], "form": best["form"], "grid": grid}
    return chosen


def study_cells(settings: StudySettings, tuned: dict[str, dict], judge: str | None = None) -> list[Cell]:
    return [
        Cell("study", name, steps, choice["guidance"], choice["form"], judge=judge if ARMS[name].judged else None)
        for name, choice in tuned.items()
        for steps in settings.arm_steps(ARMS[name])
    ]


def run_study(
    pipe, path: Path, settings: StudySettings, batch_size: int = 16, arms: Sequence[str] | None = None
) -> tuple[list[dict], dict[str, dict], FirstFrames]:
    """Tunes each arm on separate prompts, then runs all `arms` on the reported ones.

    Args:
        pipe (`FactorizedVideoPipeline`): model with all three stages and the anchor LoRA.
        path (`Path`): file of the records. Existing records are not made again.
        settings (`StudySettings`): size of the study. More seeds, steps or guidance scales keep the existing records.
        arms (`Sequence[str]`, *optional*): names in `ARMS`; left out, all for which the pipeline has the components.

    Returns:
        The records of the study, the choice of `best_settings`, and captions and anchors of the reported prompts.
    """
    reported, tuning = split_scenes(settings.per_category, settings.tuning_per_category)
    journal = Journal(path, journal_header(pipe, reported=reported, tuning=tuning))
    seeds = range(settings.tuning_seeds)
    arms, judge = arms_of(pipe) if arms is None else arms, judge_fingerprint(pipe)
    cells = tuning_cells(settings, arms, judge)
    tuned = best_settings(complete(pipe, cells, FirstFrames(pipe, tuning), seeds, journal, batch_size))
    first_frames = FirstFrames(pipe, reported)
    cells = study_cells(settings, tuned, judge)
    return complete(pipe, cells, first_frames, range(settings.seeds), journal, batch_size), tuned, first_frames
