"""Compares the two forms of anchors: "appended" after the clip, at their exact frame, and in a "slot", a latent frame of the clip.

All numbers are synthetic.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.torch import save

from ..animate.anchor import Anchor
from ..animate.conditioning import latent_index
from ..embedded import load_embedded
from ..lora.anchor_lora import AnchorLora
from .anchors import round_trip
from .held_out import split_scenes
from .report import claims_table, provenance
from .study import Cell, Journal, StudySettings, journal_header, measure, noise
from .summary import MOTION_CATEGORIES, average, difference, kept_share, rounded, standard_error
from .train import Part, train_lora, train_parts
from .world import Scene, render


if TYPE_CHECKING:
    from ..pipelines.pipeline_factorized_video import FactorizedVideoPipeline


# Frames of a clip of 17 that are given as anchors: the first, each of one latent frame (5 to 8), the last, and several at once.
FIRST, MIDDLE, LAST = (0,), (8,), (16,)
INSIDE = ((6,), (7,))
SETS = (FIRST, (5,), *INSIDE, MIDDLE, LAST, (0, 16), (0, 8, 16), (6, 8))
KEPT_BAR, PSNR_BAR = 0.03, -1.0
ANY_FRAME = {"anchor_position": "uniform", "checkpoint_every": 100}
HOW = """All numbers are synthetic: a world of coloured shapes, scored by its own pixel reader, on held-out prompts; true frames of
the rendered clips are the anchors. "slot": the LoRA that ships, an anchor takes the latent frame that it falls into, which stands for
four frames; its anchors in training were first, middle and last frames. "slot, any": a LoRA of the same recipe, the anchors of which
were any frame of the clip. "appended": as "slot, any", but an anchor is a latent frame of its own behind the clip, at its exact frame.
Frame 0 is given in the clip in all three. "guidance" scores best of the study's scales on separate prompts, for each form and each set
of frames. "kept" is the share of static-attribute prompts whose first and last frame show exactly the objects of the prompt, "psnr"
the mean over clips (and over the given frames) of the PSNR of exactly that frame against its picture,
in dB; "vae" is that of the true clip through the VAE."""
DIFFERENCES = """"appended" minus "slot, any", which had the same anchors in training; beside each value the standard error of the prompts'
differences:"""
FORMS = ("appended", "slot")
SHIPPED, ANY_SLOT, APPENDED = "slot", "slot, any", "appended"


def train_appended(folder: Path) -> None:
    """Trains an anchor LoRA of each form for the embedded base, with the same anchors, which may be any frame of the clip.

    Writes `folder/appended/anchor_lora` and `folder/slot/anchor_lora`. All options but the position and the form of the anchors
    are those of the embedded LoRA, the anchors of which were first, middle and last frames. A further call resumes an
    interrupted training.
    """
    pipe = load_embedded()
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer")} | {"base": pipe.transformer}
    for form in FORMS:
        for name, part in parts.items():
            if not (folder / form / name).is_dir():
                part.save_pretrained(folder / form / name)
        train_parts(folder / form, {"lora": Part(partial(train_lora, anchor_form=form, **ANY_FRAME))})


def psnr(frame: np.ndarray, picture: np.ndarray) -> float:
    """Returns the peak signal-to-noise ratio of two 8-bit images, in dB."""
    error = np.mean((frame.astype(np.float64) - picture) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


@contextmanager
def lora_of(pipe, lora: AnchorLora) -> Iterator[None]:
    """Context manager in which the pipeline has another anchor LoRA, with the form that it was trained in."""
    own = pipe.anchor_lora
    pipe.anchor_lora = lora
    try:
        yield
    finally:
        pipe.anchor_lora = own


@dataclass(frozen=True)
class FormStudy:
    """What both forms are measured on: scenes that are reported and scenes on which guidance is chosen, with their clips."""

    pipe: FactorizedVideoPipeline
    settings: StudySettings
    scenes: dict[str, Sequence[Scene]]
    clips: dict[str, Sequence[np.ndarray]]
    journal: Journal
    batch_size: int

    def measure(
        self, form: str, lora: str | None, sets: Sequence[tuple[int, ...]]
    ) -> dict[tuple[int, ...], tuple[float, list[dict]]]:
        """Returns for each set of given frames the guidance that scores best on the tuning prompts, and the records with it."""
        found = {}
        for given in sets:
            cell = Cell(form, " ".join(map(str, given)), self.settings.few_steps, lora=lora)
            tried = {
                guidance: average(
                    self.records(replace(cell, guidance=guidance), "tuning", given, self.settings.tuning_seeds)
                )
                for guidance in self.settings.guidance
            }
            guidance = max(tried, key=lambda choice: round(tried[choice], 4))
            found[given] = (
                guidance,
                self.records(replace(cell, guidance=guidance), "reported", given, self.settings.seeds),
            )
            print(
                f"[{form}] frames {cell.arm}: score {average(found[given][1]):.3f} at guidance {guidance:g}",
                flush=True,
            )
        return found

    def records(self, cell: Cell, group: str, given: Sequence[int], seeds: int) -> list[dict]:
        """Returns the records of a group of scenes with category and prompt; makes those that the journal lacks."""
        scenes = self.scenes[group]
        cell = replace(cell, split=f"{cell.split}, {group}")
        pairs = [(index, seed) for seed in range(seeds) for index in range(len(scenes))]
        wanted = [pair for pair in pairs if self.journal.find(cell, *pair) is None]
        for start in range(0, len(wanted), self.batch_size):
            self.journal.append(self.run_batch(cell, group, given, wanted[start : start + self.batch_size]))
        return [
            {"category": scenes[index].category, "prompt": scenes[index].prompt} | self.journal.find(cell, index, seed)
            for index, seed in pairs
        ]

    def run_batch(self, cell: Cell, group: str, given: Sequence[int], batch: Sequence[tuple[int, int]]) -> list[dict]:
        """Makes and scores a video for each `(scene index, seed)`, with the frames `given` of its clip as anchors."""
        scenes, clips, began = self.scenes[group], self.clips[group], time.perf_counter()
        videos = self.pipe.animate(
            [scenes[index].prompt for index, _ in batch],
            [[Anchor(clips[index][frame], frame) for frame in given] for index, _ in batch],
            num_inference_steps=cell.steps,
            guidance_scale=cell.guidance,
            generator=[noise(index, seed) for index, seed in batch],
        )
        seconds = (time.perf_counter() - began) / len(batch)
        records = []
        for (index, seed), video in zip(batch, videos):
            frames, clip = np.round(video * 255).astype(np.uint8), clips[index]
            record = cell.facts() | {"scene": index, "seed": seed, "seconds": round(seconds, 3)}
            record |= measure(frames, scenes[index], (given[-1], clip[given[-1]]), 0 in given)
            record["psnr"] = round(float(np.mean([psnr(frames[frame], clip[frame]) for frame in given])), 3)
            records.append(record)
        return records


def summary_row(
    form: str,
    given: tuple[int, ...],
    guidance: float,
    records: Sequence[dict],
    through: Sequence[np.ndarray],
    clips: Sequence[np.ndarray],
) -> dict:
    """Returns the means of one form and set of given frames; `through` are the true clips after the VAE's round trip."""
    moving = [record for record in records if record["category"] in MOTION_CATEGORIES]
    static = [record | {"category": "all"} for record in records if "kept" in record]
    best = [np.mean([psnr(video[k], clip[k]) for k in given]) for video, clip in zip(through, clips)]
    values = {
        "score": average(records),
        "error": standard_error(records),
        "motion_score": average(moving),
        "kept": kept_share(records),
        "kept_error": standard_error(static, "kept"),
        "psnr": float(np.mean([record["psnr"] for record in records])),
        "vae": float(np.mean(best)),
    }
    row = {"form": form, "frames": list(given), "guidance": guidance}
    return row | {name: rounded(value) for name, value in values.items()}


def appended_claims(rows: Sequence[dict]) -> list[dict]:
    """Returns the claims about the appended form, compared with its own first frame, each with its target (`bar`).

    The row also shows the values of the slot form and, for PSNR, that of the true clip through the VAE.
    Claims whose sets were not run are left out.
    """
    by = {(row["form"], tuple(row["frames"])): row for row in rows}
    claims = []

    def add(claim: str, measured: str, given: tuple[int, ...], value: str, bar: float, lost: bool) -> None:
        sign, found = (1 if lost else -1), {}
        for form in (APPENDED, SHIPPED, ANY_SLOT):
            if (form, FIRST) in by and (form, given) in by:
                found[form] = sign * (by[form, FIRST][value] - by[form, given][value])
        if APPENDED not in found:
            return
        ours = round(found.pop(APPENDED), 4)
        met = ours <= bar if lost else ours >= bar
        row = {
            "claim": claim,
            "measure": measured,
            "value": ours,
            "relation": "<=" if lost else ">=",
            "bar": bar,
            "met": met,
        }
        beside = [f"{form} {other:.3f}" for form, other in found.items()]
        if value == "psnr":
            beside.append(f"the VAE alone {by[APPENDED, given]['vae'] - by[APPENDED, FIRST]['vae']:.3f}")
        claims.append(row | ({"beside": ", ".join(beside)} if beside else {}))

    for given, name in ((MIDDLE, "middle"), (LAST, "last")):
        add("any position", f"share kept lost by the true {name} frame", given, "kept", KEPT_BAR, lost=True)
    for given in (*INSIDE, MIDDLE, LAST):
        add("the exact frame", f"dB of frame {given[0]} beyond those of frame 0", given, "psnr", PSNR_BAR, lost=False)
    return claims


def appended_table(rows: Sequence[dict]) -> str:
    titles = {name: name.replace("_", " ") for name in ("guidance", "score", "error", "motion_score", "kept")}
    titles |= {"kept_error": "error", "psnr": "psnr", "vae": "vae"}
    lines = [f"{'synthetic':12s}{'frames':>10s}" + "".join(f"{title:>14s}" for title in titles.values())]
    for row in rows:
        cells = "".join(f"{'-' if row[name] is None else format(row[name], '.3f'):>14s}" for name in titles)
        lines.append(f"{row['form']:12s}{' '.join(map(str, row['frames'])):>10s}{cells}")
    return "\n".join(lines)


def form_differences(ours: Sequence[dict], theirs: Sequence[dict]) -> dict[str, dict[str, float | None]]:
    """Returns score, motion score and kept share of the records `ours` minus those of `theirs`, each with its standard error."""

    def chosen(wanted: Callable[[dict], bool], **changes: str) -> list[list[dict]]:
        return [[record | changes for record in records if wanted(record)] for records in (ours, theirs)]

    return {
        "score": difference(ours, theirs),
        "motion_score": difference(*chosen(lambda record: record["category"] in MOTION_CATEGORIES)),
        # The share is over all videos, whatever their category.
        "kept": difference(*chosen(lambda record: "kept" in record, category="all"), value="kept"),
    }


def differences_table(differences: Sequence[dict]) -> str:
    names = ("score", "motion_score", "kept")
    lines = [f"{'synthetic frames':>16s}" + "".join(f"{name.replace('_', ' '):>14s}{'error':>8s}" for name in names)]
    for row in differences:
        cells = "".join(
            f"{row[name]['value']:14.3f}{'-' if row[name]['error'] is None else format(row[name]['error'], '.3f'):>8s}"
            for name in names
        )
        lines.append(f"{' '.join(map(str, row['frames'])):>16s}{cells}")
    return "\n".join(lines)


def write_appended_report(
    pipe: FactorizedVideoPipeline,
    folder: Path,
    trained: Path,
    settings: StudySettings | None = None,
    sets: Sequence[tuple[int, ...]] = SETS,
    batch_size: int = 16,
) -> str:
    """Scores both forms; writes `folder/appended.json` and `folder/appended.txt` and returns the text.

    Args:
        pipe (`FactorizedVideoPipeline`): model with an anchor LoRA of the form `"slot"`, which is restored afterwards.
        folder (`Path`): folder for the files, and for the records, from which a later call continues.
        trained (`Path`): folder of [`train_appended`], with a LoRA of each form.
        settings (`StudySettings`, *optional*): size of the study. Videos have `few_steps` sampling steps.
        sets (`Sequence[tuple[int, ...]]`): frames that are given together. Sets with two frames in one latent frame are not
            run in the slot form, which does not support them.

    Raises:
        `ValueError`: a LoRA in `trained` was trained with another form than that of its folder.
    """
    settings = settings or StudySettings()
    loras = {form: AnchorLora.from_pretrained(trained / form / "anchor_lora") for form in FORMS}
    for form, lora in loras.items():
        if lora.form != form:
            raise ValueError(f"{trained / form} was trained with `anchor_form={lora.form!r}`, not with {form!r}.")
    reported, tuning = split_scenes(settings.per_category, settings.tuning_per_category)
    scenes = {"reported": reported, "tuning": tuning}
    size = [pipe.call_defaults[name] for name in ("num_frames", "height", "width")]
    clips = {group: [render(scene.objects, *size) for scene in chosen] for group, chosen in scenes.items()}
    journal = Journal(folder / "appended.jsonl", journal_header(pipe, **scenes))
    study = FormStudy(pipe, settings, scenes, clips, journal, batch_size)
    slots = [given for given in sets if len({latent_index(frame) for frame in given}) == len(given)]
    found = {SHIPPED: study.measure(SHIPPED, None, slots)}
    # The records hold a hash of the weights, so that a LoRA that was trained again gets new records.
    for name, form, able in ((ANY_SLOT, "slot", slots), (APPENDED, "appended", sets)):
        with lora_of(pipe, loras[form]):
            found[name] = study.measure(name, digest(loras[form]), able)
    through = [round_trip(pipe, clip) for clip in clips["reported"]]
    rows = [
        summary_row(form, given, guidance, records, through, clips["reported"])
        for form, by_set in found.items()
        for given, (guidance, records) in by_set.items()
    ]
    differences = [
        {"frames": list(given)} | form_differences(found[APPENDED][given][1], records)
        for given, (_, records) in found[ANY_SLOT].items()
    ]
    claims = appended_claims(rows)
    text = "\n\n".join([
        f"{HOW}\n{len(reported)} prompts, {settings.seeds} seeds, {settings.few_steps} steps.",
        claims_table(claims),
        appended_table(rows),
        DIFFERENCES,
        differences_table(differences),
    ])  # fmt: skip
    report = {
        "synthetic": True,
        "how": " ".join(HOW.split()),
        "made_with": provenance(pipe),
        "weights": {form: digest(lora) for form, lora in loras.items()},
    }
    report |= {"settings": asdict(settings), "claims": claims, "rows": rows, "differences": differences}
    (folder / "appended.json").write_text(json.dumps(report) + "\n")
    (folder / "appended.txt").write_text(text + "\n")
    return text


def digest(lora: AnchorLora) -> str:
    """Returns a hash of a LoRA's weights."""
    weights = save({name: tensor.contiguous() for name, tensor in sorted(lora.state_dict.items())})
    return hashlib.sha256(weights).hexdigest()[:16]
