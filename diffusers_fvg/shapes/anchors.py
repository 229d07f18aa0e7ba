"""Measures anchors beyond the first frame: at both ends of a clip, in a clip that continues another one's last frames, and with
each `anchor_decode`. All numbers are synthetic.

The anchor LoRA was not trained for this: it saw one anchored latent frame per clip.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ..animate.anchor import Anchor, anchor_pixels
from ..animate.conditioning import encode_anchor
from ..animate.fidelity import ANCHOR_DECODES, colour_shift, decode_anchored, low_frequency_drift
from .blobs import find_objects
from .held_out import attributes_stay, split_scenes
from .prompts import object_at
from .report import claims_table, provenance
from .scorer import score_anchor, score_video
from .study import noise
from .summary import average, category_means
from .world import Scene, ShapeObject, render


END_BAR, KEPT_BAR = 0.9, 0.8
# Number of last frames that anchor the beginning of the next clip, and their strength.
RUNS = ((1, 1.0), (5, 1.0), (9, 1.0), (5, 0.8))
CONTINUED = (5, 1.0)
# Number of frames that are compared with the anchor: frame 0 and the frames of two further latent frames.
NEAR = 9
HOW = """All numbers are synthetic: a world of coloured shapes, scored by its own pixel reader, on held-out prompts.
Ends: the true first and last frame are anchors. A frame's score is the F1 of its objects by colour and shape, times the share
that lies in the right third; "round trip" is the true frame through the VAE, and the targets are relative to its score.
Continuation: a clip begins with the last frames of another one, of which the prompt is the same. "kept" is the share of
static-attribute prompts whose last frame shows exactly the objects of the prompt, by colour and shape; "before" that share
in the last frame of the clip that is continued, which is rendered, or made from the true first frame.
Fidelity: clips made from the true first frame, decoded in three ways. "shift" is the mean CIEDE2000 difference of a frame and
the anchor, "drift" the root mean square difference of their low frequencies, in levels of 255; both hold what moves, too."""


def last_objects(scene: Scene) -> list[ShapeObject]:
    """Returns the objects of a scene as its last frame shows them, without changes of size, which no score reads."""
    kept = (
        replace(item, changes=tuple(change for change in item.changes if change.kind != "scale"))
        for item in scene.objects
    )
    return [state for item in kept if (state := object_at(item, 1.0)) is not None]


def shows_its_objects(frame: np.ndarray, scene: Scene) -> bool:
    """Returns whether a frame shows exactly the objects of the prompt, by colour and shape."""
    seen = Counter((blob.colour, blob.shape) for blob in find_objects(frame))
    return seen == Counter((item.colour, item.shape) for item in scene.objects)


def _as_uint8(frames: np.ndarray) -> np.ndarray:
    return np.round(frames * 255).astype(np.uint8)


def _batches(
    pipe,
    scenes: Sequence[Scene],
    anchors: Callable[[int], list[Anchor]],
    steps: int,
    batch_size: int,
    output_type: str = "np",
) -> Iterator[tuple[range, list[list[Anchor]], np.ndarray | torch.Tensor]]:
    """Animates each scene's prompt from its anchors, with the same noise for a scene in every call; yields batches."""
    for start in range(0, len(scenes), batch_size):
        batch = range(start, min(start + batch_size, len(scenes)))
        given = [anchors(index) for index in batch]
        made = pipe.animate(
            [scenes[index].prompt for index in batch],
            given,
            num_inference_steps=steps,
            generator=[noise(index, 0) for index in batch],
            output_type=output_type,
        )
        yield batch, given, made


def measure_ends(
    pipe, scenes: Sequence[Scene], clips: Sequence[np.ndarray], steps: int, batch_size: int
) -> list[dict]:
    """Returns one record per scene: scores of both end frames, of the round trips of the true ones, and of the whole clip."""
    records = []
    for batch, _, videos in _batches(
        pipe, scenes, lambda index: [Anchor(clips[index][0]), Anchor(clips[index][-1], -1)], steps, batch_size
    ):
        for index, frames in zip(batch, _as_uint8(videos)):
            scene, true = scenes[index], clips[index]
            through = round_trip(pipe, true)
            record = {"category": scene.category, "prompt": scene.prompt}
            for end, frame, objects in (("first", 0, scene.objects), ("last", -1, last_objects(scene))):
                for name, video in (("", frames), ("_round_trip", through), ("_true", true)):
                    record[end + name] = score_anchor(video[frame], objects)
            records.append(record | {"score": score_video(frames, scene.category, scene.meta)})
    return records


def round_trip(pipe, clip: np.ndarray) -> np.ndarray:
    """Encodes and decodes a clip with the VAE: the best that the model could show."""
    with torch.no_grad():
        pixels = anchor_pixels(Anchor(clip), *clip.shape[1:3])[None]
        return pipe.decode(encode_anchor(pipe.vae, pixels, 0, pipe.vae.device), "uint8")[0]


def measure_fidelity(
    pipe, scenes: Sequence[Scene], clips: Sequence[np.ndarray], steps: int, batch_size: int
) -> tuple[dict[str, dict[str, list[float]]], list[np.ndarray]]:
    """Returns mean shift and drift of frames 0 to 8 for every `anchor_decode`, and the clips decoded with `"raw"`."""
    found = {choice: {"shift": [], "drift": []} for choice in ANCHOR_DECODES}
    made: list[np.ndarray] = []
    for batch, given, latents in _batches(
        pipe, scenes, lambda index: [Anchor(clips[index][0])], steps, batch_size, output_type="latent"
    ):
        for choice in ANCHOR_DECODES:
            videos = decode_anchored(partial(pipe.decode, latents), given, choice, "np")
            made += list(_as_uint8(videos)) if choice == "raw" else []
            for index, frames in zip(batch, videos):
                picture = clips[index][0]
                found[choice]["shift"].append(colour_shift(frames[:NEAR], picture))
                found[choice]["drift"].append(255 * low_frequency_drift(frames[:NEAR], picture))
    means = {
        choice: {name: np.mean(values, axis=0).round(3).tolist() for name, values in by_name.items()}
        for choice, by_name in found.items()
    }
    return means, made


def measure_continuation(
    pipe,
    scenes: Sequence[Scene],
    before: Sequence[np.ndarray],
    run: int,
    strength: float,
    steps: int,
    batch_size: int,
) -> list[dict]:
    """Returns one record per scene: whether its objects are all there at the end of the first clip, and of the next one.

    Args:
        before (`Sequence[np.ndarray]`): first clip of each scene, uint8.
        run (`int`): number of its last frames that anchor the beginning of the next clip, 4k + 1.
        strength (`float`): strength of these anchors.
    """
    records = []
    for batch, _, videos in _batches(
        pipe, scenes, lambda index: [Anchor(before[index][-run:], 0, strength)], steps, batch_size
    ):
        for index, frames in zip(batch, _as_uint8(videos)):
            scene = scenes[index]
            record = {"category": scene.category, "prompt": scene.prompt}
            ends = (("before", before[index][-1]), ("kept", frames[-1]))
            records.append(record | {name: int(shows_its_objects(frame, scene)) for name, frame in ends})
    return records


def anchor_claims(ends: Sequence[dict], continuations: Sequence[dict]) -> list[dict]:
    """Returns the claims of the report, each with its target (`bar`) and whether the value meets it.

    Args:
        ends (`Sequence[dict]`): output of [`measure_ends`].
        continuations (`Sequence[dict]`): rows of the report about continued clips.
    """
    claims = []
    for end in ("first", "last"):
        score, best = average(ends, end), average(ends, f"{end}_round_trip")
        beside = f"{score:.3f} of {best:.3f}; the frame as rendered {average(ends, f'{end}_true'):.3f}"
        claims.append((f"{end} frame's score over the round trip's", score / best, END_BAR, beside))
    for row in continuations:
        if (row["run"], row["strength"]) == CONTINUED:
            beside = f"of {row['videos']} prompts; {row['before']:.3f} in the clip before"
            claims.append((f"kept by {row['run']} frames of a {row['source']} clip", row["kept"], KEPT_BAR, beside))
    return [
        {
            "claim": "first and last anchor" if bar == END_BAR else "continuation",
            "measure": measure,
            "value": round(value, 4),
            "relation": ">=",
            "bar": bar,
            "met": bool(value >= bar),
            "beside": beside,
        }
        for measure, value, bar, beside in claims
    ]


def ends_table(records: Sequence[dict]) -> str:
    names = ("first", "first_round_trip", "last", "last_round_trip", "score")
    lines = [f"{'ends, synthetic':24s}" + "".join(f"{name.replace('_', ' '):>18s}" for name in names)]
    means = {name: category_means(records, name) for name in names}
    for category in means["score"]:
        lines.append(f"{category:24s}" + "".join(f"{means[name][category]:18.3f}" for name in names))
    return "\n".join([*lines, f"{'mean':24s}" + "".join(f"{average(records, name):18.3f}" for name in names)])


def continuation_table(rows: Sequence[dict]) -> str:
    categories = list(rows[0]["categories"])
    lines = [
        f"{'continuation, synthetic':24s}{'frames':>8s}{'strength':>10s}{'before':>8s}{'kept':>8s}"
        + "".join(f"{name:>24s}" for name in categories)
    ]
    for row in rows:
        cells = "".join(f"{row['categories'][name]:24.3f}" for name in categories)
        facts = f"{row['run']:8d}{row['strength']:10.2f}{row['before']:8.3f}{row['kept']:8.3f}"
        lines.append(f"{row['source'] + ' clip':24s}{facts}{cells}")
    return "\n".join(lines)


def fidelity_table(fidelity: dict[str, dict[str, list[float]]]) -> str:
    lines = [f"{'fidelity, synthetic':24s}" + "".join(f"{f'frame {index}':>9s}" for index in range(NEAR))]
    for name in ("shift", "drift"):
        for choice, values in fidelity.items():
            lines.append(f"{name + ', ' + choice:24s}" + "".join(f"{value:9.2f}" for value in values[name]))
    return "\n".join(lines)


def write_anchors_report(
    pipe,
    folder: Path,
    per_category: int = 9,
    steps: int = 15,
    runs: Sequence[tuple[int, float]] = RUNS,
    batch_size: int = 16,
) -> str:
    """Measures all three; writes `folder/anchors.json` and `folder/anchors.txt` and returns the text.

    Args:
        pipe (`FactorizedVideoPipeline`): model to measure, with an anchor LoRA. Only stage 3 runs.
        folder (`Path`): folder for the files.
        per_category (`int`): held-out prompts of each of the seven categories.
        steps (`int`): sampling steps.
        runs (`Sequence[tuple[int, float]]`): numbers and strengths of the frames with which rendered clips are continued.
            Generated clips are continued as in `CONTINUED`.
    """
    scenes, _ = split_scenes(per_category, 4)
    size = [pipe.call_defaults[name] for name in ("num_frames", "height", "width")]
    clips = [render(scene.objects, *size) for scene in scenes]
    ends = measure_ends(pipe, scenes, clips, steps, batch_size)
    fidelity, made = measure_fidelity(pipe, scenes, clips, steps, batch_size)

    static = [index for index, scene in enumerate(scenes) if attributes_stay(scene)]
    chosen, rows = [scenes[index] for index in static], []
    for source, videos, tried in (("rendered", clips, runs), ("generated", made, (CONTINUED,))):
        before = [videos[index] for index in static]
        for run, strength in tried:
            records = measure_continuation(pipe, chosen, before, run, strength, steps, batch_size)
            row = {"source": source, "run": run, "strength": strength, "videos": len(records)}
            # The target is a share of prompts, so this is not a mean of categories.
            row |= {name: round(float(np.mean([r[name] for r in records])), 4) for name in ("before", "kept")}
            rows.append(row | {"categories": category_means(records, "kept")})

    claims = anchor_claims(ends, rows)
    tables = (claims_table(claims), ends_table(ends), continuation_table(rows), fidelity_table(fidelity))
    text = "\n\n".join([f"{HOW}\n{len(scenes)} prompts, {steps} steps.", *tables])
    report = {"synthetic": True, "how": " ".join(HOW.split()), "made_with": provenance(pipe), "steps": steps}
    report |= {"claims": claims, "ends": ends, "continuations": rows, "fidelity": fidelity}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "anchors.json").write_text(json.dumps(report) + "\n")
    (folder / "anchors.txt").write_text(text + "\n")
    return text
