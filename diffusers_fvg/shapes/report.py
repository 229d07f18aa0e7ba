"""Scores a shapes model on held-out prompts, stage by stage and arm by arm. All numbers are synthetic.

Arms: `direct` is plain text-to-video by the base; `factorized` runs all stages; `true_anchor` gives the video model the
rendered first frame, and so shows what stages 1 and 2 cost.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from .prompts import CATEGORIES, make_scene
from .scorer import motion_amount, score_anchor, score_caption, score_video
from .world import Scene, render


ARMS = ("direct", "factorized", "true_anchor")
# Scenes of one object, which a newcomer tries first.
SINGLE_OBJECT = ("motion_binding", "dynamic_attr", "placement")


def held_out_scenes(
    per_category: int, seed: int = 0, categories: Sequence[str] = (*CATEGORIES, "placement")
) -> list[Scene]:
    """Scenes whose prompts no part of the model saw in training, distinct within a category where there are enough."""
    rng = np.random.default_rng((2024, seed))
    scenes = []
    for category in categories:
        chosen: dict[str, Scene] = {}
        for _ in range(60 * per_category):
            scene = make_scene(category, rng, held_out=True)
            chosen.setdefault(scene.prompt, scene)
            if len(chosen) == per_category:
                break
        scenes += chosen.values()
    return scenes


def evaluate(
    pipe,
    scenes: Sequence[Scene],
    arms: Sequence[str] = ARMS,
    seed: int = 0,
    batch_size: int = 8,
    **call,
) -> list[dict]:
    """Generates a video for each scene and arm and scores it.

    Args:
        pipe (`Callable`): a [`FactorizedVideoPipeline`].
        scenes (`Sequence[Scene]`): with prompts of the grammar.
        arms (`Sequence[str]`): of `ARMS`.
        seed (`int`): the i-th scene's video starts from the same noise in every arm.
        batch_size (`int`): videos in one call.
        call: arguments for the pipeline, such as `preset` or `num_inference_steps`.

    Returns:
        `list[dict]`: one record per scene and arm with `score`, `motion`, and for the factorized arm `caption_score` and
        `anchor_score`.
    """
    records = []
    for arm in arms:
        for start in range(0, len(scenes), batch_size):
            batch = scenes[start : start + batch_size]
            generators = [torch.Generator().manual_seed(1000 * seed + start + k) for k in range(len(batch))]
            given = {"mode": "direct"} if arm == "direct" else {}
            if arm == "true_anchor":
                given["image"] = [PIL.Image.fromarray(render(scene.objects)[0]) for scene in batch]
            began = time.perf_counter()
            output = pipe([scene.prompt for scene in batch], generator=generators, output_type="np", **given, **call)
            seconds = (time.perf_counter() - began) / len(batch)
            for k, scene in enumerate(batch):
                frames = np.round(output.frames[k] * 255).astype(np.uint8)
                record = {"arm": arm, "category": scene.category, "prompt": scene.prompt, "seed": seed}
                record["score"] = score_video(frames, scene.category, scene.meta)
                record["single_object"] = len(scene.objects) == 1
                record |= {"motion": motion_amount(frames), "seconds": seconds}
                if arm == "factorized":
                    caption = output.first_frame_prompts[k]
                    record["caption"] = caption
                    record["caption_score"] = score_caption(caption, scene.caption)
                    record["anchor_score"] = score_anchor(np.asarray(output.anchor_images[k]), caption)
                records.append(record)
    return records


def table(records: Sequence[dict]) -> str:
    """Mean score per category and arm, as text."""
    arms = list(dict.fromkeys(record["arm"] for record in records))
    lines = [f"{'synthetic score':24s}" + "".join(f"{arm:>13s}" for arm in arms) + f"{'n':>6s}"]
    groups = [(name, lambda r, name=name: r["category"] == name) for name in (*CATEGORIES, "placement")]
    groups += [("mean of the seven", lambda r: r["category"] in CATEGORIES)]
    groups += [("single object", lambda r: r["single_object"] and r["category"] in SINGLE_OBJECT)]
    for name, belongs in groups:
        chosen = [record for record in records if belongs(record)]
        if not chosen:
            continue
        cells = []
        for arm in arms:
            by_category: dict[str, list[float]] = {}
            for record in chosen:
                if record["arm"] == arm:
                    by_category.setdefault(record["category"], []).append(record["score"])
            cells.append(np.mean([np.mean(values) for values in by_category.values()]))
        count = sum(record["arm"] == arms[0] for record in chosen)
        lines.append(f"{name:24s}" + "".join(f"{cell:13.3f}" for cell in cells) + f"{count:6d}")
    return "\n".join(lines)


def write_report(pipe, folder: Path, per_category: int = 12, seeds: Sequence[int] = (0,), **call) -> str:
    """Evaluates all arms and writes `folder/report.json` and `folder/report.txt`."""
    scenes = held_out_scenes(per_category)
    records = [record for seed in seeds for record in evaluate(pipe, scenes, seed=seed, **call)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(
        json.dumps({"synthetic": True, "call": call, "records": records}, indent=1) + "\n"
    )
    text = table(records)
    (folder / "report.txt").write_text(text + "\n")
    return text
