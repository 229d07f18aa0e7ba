"""Measures the judge: pairs of images, counts, relations and its cost, and the detection of frozen clips. All numbers are
synthetic.

The scorer reads images only for this report; the judge is not trained with its results.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..animate.anchor import Anchor
from ..animate.motion import motion_amounts
from ..schedules.presets import MIN_MOTION
from .anchors import round_trip
from .blobs import find_objects
from .held_out import held_out_scenes, split_scenes
from .prompts import make_scene
from .report import claims_table, provenance
from .scorer import score_video
from .study import judge_fingerprint, noise
from .train_judge import held_out_pairs
from .world import Scene, render


# Seeds of scenes that are used neither by other reports nor for choosing a threshold.
COUNT_SEED, RELATION_SEED, PAIR_SEED, FROZEN_SEED = 501, 502, 503, 504
COUNTS = (1, 2, 3, 4, 5)
MOVING = ("consistent_attr", "dynamic_attr", "motion_binding", "action_binding", "interaction")
STILL = ("spatial_relationships", "generative_numeracy", "placement")
OVERLAPS = ("in front of", "behind")
HOW = """All numbers are synthetic: a world of coloured shapes, scored by its own pixel reader, on held-out prompts.
Pairs: a rendered picture of the caption and one with one fault. Counts: prompts of one or two kinds of objects, as many with one to
five of the first kind; a picture is right if it shows exactly the prompt's objects, by colour and shape. Relations: prompts with
"in front of" and "behind", the still picture scored as a clip is. Seconds are those of a whole call, for one video. Frozen: the
first frame of a clip held, as it is, with noise, with a drift of brightness, or through the VAE; moving: rendered and generated
clips. Their threshold was chosen on other clips."""


def count_scenes(per_count: int) -> list[Scene]:
    """Returns distinct held-out scenes, `per_count` for each count of the first kind of objects."""
    rng, found = np.random.default_rng(COUNT_SEED), {count: {} for count in COUNTS}
    for _ in range(4000 * per_count):
        scene = make_scene("generative_numeracy", rng, held_out=True)
        count = int(scene.meta["numbers"].split(",")[0])
        if len(found.get(count, range(per_count))) < per_count:
            found[count].setdefault(scene.prompt, scene)
        if all(len(scenes) == per_count for scenes in found.values()):
            break
    return [scene for scenes in found.values() for scene in scenes.values()]


def shows_exactly(picture: np.ndarray, scene: Scene) -> bool:
    """Returns whether an image shows exactly the objects of a scene, by colour and shape."""
    seen = Counter((blob.colour, blob.shape) for blob in find_objects(picture))
    return seen == Counter((item.colour, item.shape) for item in scene.objects)


def drawn(pipe, scenes: Sequence[Scene], num_candidates: int, seed: int) -> list[np.ndarray]:
    """Makes the anchor of each scene's prompt with stages 1 and 2."""
    captions = pipe.rewrite([scene.prompt for scene in scenes])
    generators = [noise(index, seed) for index in range(len(scenes))]
    return [np.asarray(image) for image in pipe.compose(captions, generator=generators, num_candidates=num_candidates)]


def measure_counts(pipe, scenes: Sequence[Scene], num_candidates: int, seeds: int) -> dict[str, float]:
    """Returns the share of right images for each count, and of all."""
    right: dict[str, list[bool]] = {}
    for seed in range(seeds):
        for scene, picture in zip(scenes, drawn(pipe, scenes, num_candidates, seed)):
            right.setdefault(scene.meta["numbers"].split(",")[0], []).append(shows_exactly(picture, scene))
    shares = {count: round(float(np.mean(values)), 4) for count, values in sorted(right.items())}
    return shares | {"all": round(float(np.mean([value for values in right.values() for value in values])), 4)}


def measure_relations(pipe, scenes: Sequence[Scene], num_candidates: int, seeds: int) -> dict[str, float]:
    """Returns the share of images with the full score of 1, for each relation and for both."""
    right: dict[str, list[bool]] = {}
    for seed in range(seeds):
        for scene, picture in zip(scenes, drawn(pipe, scenes, num_candidates, seed)):
            score = score_video(picture[None], scene.category, scene.meta)
            right.setdefault(scene.meta["spatial"], []).append(score == 1.0)
    shares = {relation: round(float(np.mean(values)), 4) for relation, values in right.items()}
    return shares | {"both": round(float(np.mean([value for values in right.values() for value in values])), 4)}


def measure_seconds(pipe, scenes: Sequence[Scene], num_candidates: int, batch_size: int) -> dict[str, float]:
    """Returns the seconds per video of a whole call and of its stages, and the number of images drawn per video."""
    began, timings, pictures = time.perf_counter(), Counter(), 0
    for start in range(0, len(scenes), batch_size):
        batch = scenes[start : start + batch_size]
        output = pipe(
            [scene.prompt for scene in batch],
            generator=[noise(start + k, 0) for k in range(len(batch))],
            composer_num_candidates=num_candidates,
            output_type="uint8",
        )
        timings.update(output.timings)
        pictures += sum(map(len, output.candidates)) if output.candidates else len(batch)
    seconds = {"call": time.perf_counter() - began} | dict(timings)
    return {name: round(value / len(scenes), 4) for name, value in seconds.items()} | {
        "pictures": round(pictures / len(scenes), 3)
    }


def freeze(pipe, clip: np.ndarray, kind: int, rng: np.random.Generator) -> np.ndarray:
    """Makes a frozen clip: repeats the first frame unchanged, with noise, with a drift of brightness or through the VAE."""
    still = np.repeat(clip[:1], len(clip), axis=0)
    if kind == 3:
        return round_trip(pipe, still)
    change = (0.0, rng.normal(0, 3, still.shape), np.linspace(0, 6, len(clip))[:, None, None, None])[kind]
    return np.clip(np.round(still + change), 0, 255).astype(np.uint8)


def measure_motion(pipe, per_kind: int = 50) -> dict[str, list[float]]:
    """Returns `motion_amounts` of moving and of frozen clips, half of them generated, and of clips for prompts without motion.

    There are up to `per_kind` clips of each kind.
    """
    rng = np.random.default_rng(FROZEN_SEED)
    count = -(-per_kind // (2 * len(MOVING)))
    clips = {}
    for name, categories in (("moving", MOVING), ("still prompts", STILL)):
        scenes = held_out_scenes(2 * count, FROZEN_SEED, categories)
        order = rng.permutation(len(scenes))[:per_kind]
        scenes = [scenes[index] for index in order]
        rendered = [render(scene.objects) for scene in scenes]
        chosen = range(len(scenes)) if name == "still prompts" else range(len(scenes) // 2, len(scenes))
        made = pipe.animate(
            [scenes[k].prompt for k in chosen],
            [[Anchor(rendered[k][0])] for k in chosen],
            generator=[noise(k, FROZEN_SEED) for k in chosen],
            output_type="uint8",
        )
        for k, video in zip(chosen, made):
            rendered[k] = video
        clips[name] = rendered
    clips["frozen"] = [freeze(pipe, clip, k % 4, rng) for k, clip in enumerate(clips["moving"])]
    return {name: motion_amounts(videos) for name, videos in clips.items()}


def judge_claims(report: dict, num_candidates: int) -> list[dict]:
    """Returns the claims of the report, each with its target (`bar`) and whether the value meets it."""
    one, several = ("1", str(num_candidates))
    motion = report["motion"]
    alarms = sum(amount < MIN_MOTION for amount in motion["moving"])
    found = sum(amount < MIN_MOTION for amount in motion["frozen"])
    ratio = report["seconds"][several]["call"] / report["seconds"][one]["call"]
    beside = f"{report['seconds'][several]['pictures']:.2f} pictures a video"
    still = sum(amount < MIN_MOTION for amount in motion["still prompts"])
    rows = [
        ("the judge", "right picture preferred to a wrong one", report["pairs"]["all"], ">=", 0.97, ""),
        (
            "counting",
            "right count, 1 to 5",
            report["counts"][several]["all"],
            ">=",
            0.95,
            report["counts"][one]["all"],
        ),
        (
            "relations",
            "in front / behind",
            report["relations"][several]["both"],
            ">=",
            0.95,
            report["relations"][one]["both"],
        ),
        ("cost", f"seconds of {num_candidates} candidates over one", ratio, "<=", 1.6, beside),
        ("motion", f"of {len(motion['frozen'])} frozen clips found", found, ">=", len(motion["frozen"]), ""),
        ("motion", f"of {len(motion['moving'])} moving clips called frozen", alarms, "<=", 2, ""),
        (
            "motion",
            f"of {len(motion['still prompts'])} with nothing to move",
            still,
            "",
            None,
            "called frozen, reported",
        ),
    ]
    return [
        {"claim": claim, "measure": measure, "value": round(float(value), 4), "relation": relation, "bar": bar}
        | {"met": None if bar is None else bool(value >= bar if relation == ">=" else value <= bar)}
        | {"beside": beside if isinstance(beside, str) else f"without the judge {beside:.3f}"}
        for claim, measure, value, relation, bar, beside in rows
    ]


def write_judge_report(
    pipe, folder: Path, per_count: int = 20, per_category: int = 9, seeds: int = 3, batch_size: int = 16
) -> str:
    """Makes all measurements; writes `folder/judge.json` and `folder/judge.txt` and returns the text.

    Args:
        pipe (`FactorizedVideoPipeline`): model with all stages and the shapes world's judge.
        folder (`Path`): folder for the files.
        per_count (`int`): prompts of each count.
        per_category (`int`): prompts of each category of the study, for the seconds.
        seeds (`int`): images of each prompt, for counts and relations.

    Raises:
        `ValueError`: the pipeline has no judge.
    """
    if pipe.anchor_judge is None:
        raise ValueError("The pipeline has no `anchor_judge`: there is nothing to measure.")
    count = pipe.call_defaults["composer_num_candidates"]
    counted, timed = count_scenes(per_count), split_scenes(per_category, 4)[0]
    related = held_out_scenes(60, RELATION_SEED, ("spatial_relationships",))
    related = [scene for scene in related if scene.meta["spatial"] in OVERLAPS]
    pairs = held_out_pairs(pipe.anchor_judge, seed=PAIR_SEED)
    report = {"synthetic": True, "how": " ".join(HOW.split()), "made_with": provenance(pipe)}
    report |= {"judge": judge_fingerprint(pipe), "threshold": pipe.anchor_judge.threshold}
    report["pairs"] = {name: round(float(np.mean(values)), 4) for name, values in sorted(pairs.items())}
    report["num_pairs"] = {name: len(values) for name, values in sorted(pairs.items())}
    report["pairs"]["all"] = round(float(np.mean([right for values in pairs.values() for right in values])), 4)
    for name, measure, scenes, size in (
        ("counts", measure_counts, counted, seeds),
        ("relations", measure_relations, related, seeds),
        ("seconds", measure_seconds, timed, batch_size),
    ):
        report[name] = {str(number): measure(pipe, scenes, number, size) for number in (1, count)}
    report["motion"] = measure_motion(pipe)
    report["claims"] = judge_claims(report, count)
    text = "\n\n".join(
        [HOW, f"{len(counted)} prompts of counts, {len(related)} of relations, {seeds} seeds.", _tables(report)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "judge.json").write_text(json.dumps(report) + "\n")
    (folder / "judge.txt").write_text(text + "\n")
    return text


def _tables(report: dict) -> str:
    lines = [f"{'pairs, synthetic':24s}{'preferred':>12s}{'pairs':>8s}"]
    lines += [f"{name:24s}{report['pairs'][name]:12.3f}{number:8d}" for name, number in report["num_pairs"].items()]
    tables = ["CLAIMS\n" + claims_table(report["claims"]), "\n".join(lines)]
    for title in ("counts", "relations", "seconds"):
        columns = list(dict.fromkeys(name for row in report[title].values() for name in row))
        head = f"{title + ', synthetic':24s}" + "".join(f"{name:>13s}" for name in columns)
        rows = [
            f"{f'{number} candidates':24s}" + "".join(f"{row.get(name, 0):13.3f}" for name in columns)
            for number, row in report[title].items()
        ]
        tables.append("\n".join([head, *rows]))
    columns = ("least", "tenth", "median", "most")
    lines = [f"{'share that changes':24s}" + "".join(f"{name:>13s}" for name in columns)]
    for name, amounts in report["motion"].items():
        lines.append(f"{name:24s}" + "".join(f"{value:13.3f}" for value in np.percentile(amounts, (0, 10, 50, 100))))
    return "\n\n".join([*tables, "\n".join(lines)])
