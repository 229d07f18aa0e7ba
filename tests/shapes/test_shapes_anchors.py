"""The measurement of both ends, of clips that go on, and of `anchor_decode` on the shapes model."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from quick import quick

from diffusers_fvg import Anchor, load_embedded
from diffusers_fvg.media import read_video
from diffusers_fvg.shapes import anchors
from diffusers_fvg.shapes.anchors import (
    anchor_claims,
    last_objects,
    measure_continuation,
    round_trip,
    shows_its_objects,
    write_anchors_report,
)
from diffusers_fvg.shapes.held_out import attributes_stay
from diffusers_fvg.shapes.scorer import score_anchor
from diffusers_fvg.shapes.world import Change, Scene, ShapeObject, render


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def pipe():
    """Videos of 9 frames, so that the last 5 of one begin the next."""
    return quick(load_embedded(), num_frames=9)


def scene_of(*objects):
    return Scene("placement", "a prompt", "a caption", objects)


def test_last_objects_are_what_the_last_frame_shows():
    moving = ShapeObject("red", "circle", 0.2, 0.5, 0.12, (Change("move", (0.6, 0.3)), Change("scale", 1.2)))
    turning = ShapeObject("green", "square", 0.8, 0.2, 0.12, (Change("recolour", "cyan"),))
    leaving = ShapeObject("blue", "triangle", 0.2, 0.2, 0.12, (Change("vanish"),))
    scene = scene_of(moving, turning, leaving)
    last = last_objects(scene)
    seen = [(item.colour, item.shape, round(item.x, 9), round(item.y, 9)) for item in last]
    assert seen == [("red", "circle", 0.8, 0.8), ("cyan", "square", 0.8, 0.2)]
    frames = render(scene.objects)
    assert score_anchor(frames[-1], last) == 1.0 and score_anchor(frames[0], last) < 0.5


def test_a_frame_shows_its_objects_or_not():
    circle, square = ShapeObject("red", "circle", 0.3, 0.5, 0.12), ShapeObject("blue", "square", 0.7, 0.5, 0.12)
    frame = render((circle, square))[0]
    assert shows_its_objects(frame, scene_of(circle, square))
    assert not shows_its_objects(frame, scene_of(circle)) and not shows_its_objects(frame, scene_of(circle, circle))


def test_claims_are_shares_of_the_round_trip_and_of_prompts():
    ends = [
        {"category": name, "first": first, "first_round_trip": 0.8, "first_true": 1.0}
        | {"last": 0.6, "last_round_trip": 1.0, "last_true": 1.0}
        for name, first in (("a", 0.7), ("a", 0.7), ("b", 0.9))
    ]
    row = {"source": "rendered", "run": 5, "strength": 1.0, "videos": 10, "before": 1.0, "kept": 0.85}
    claims = anchor_claims(ends, [row, row | {"run": 1, "kept": 0.1}, row | {"source": "generated", "kept": 0.7}])
    assert [(claim["value"], claim["met"]) for claim in claims] == [
        (1.0, True),
        (0.6, False),
        (0.85, True),
        (0.7, False),
    ]


def test_round_trip_is_near_the_clip_and_not_the_clip(pipe):
    clip = render((ShapeObject("red", "circle", 0.3, 0.5, 0.14, (Change("move", (0.3, 0.0)),)),))
    through = round_trip(pipe, clip)
    assert through.shape == clip.shape and through.dtype == np.uint8
    assert 0 < np.abs(through.astype(int) - clip).mean() < 3


def test_the_report(pipe, few_scenes, tmp_path, monkeypatch):
    folder = tmp_path / "reports" / "anchors"
    text = write_anchors_report(pipe, folder, per_category=1, steps=2, runs=((1, 1.0), (5, 1.0)))
    report = json.loads((folder / "anchors.json").read_text())
    assert text == (folder / "anchors.txt").read_text().removesuffix("\n") and report["synthetic"]
    scenes, _ = few_scenes(1, 4)
    assert [record["prompt"] for record in report["ends"]] == [scene.prompt for scene in scenes]
    fidelity = report["fidelity"]
    assert fidelity["replace"]["shift"][0] == fidelity["replace"]["drift"][0] == 0 < fidelity["raw"]["shift"][0]
    assert fidelity["replace"]["shift"][1:] == fidelity["match"]["shift"][1:] != fidelity["raw"]["shift"][1:]
    rows = report["continuations"]
    assert [(row["source"], row["run"]) for row in rows] == [("rendered", 1), ("rendered", 5), ("generated", 5)]
    assert all(row["before"] == 1 for row in rows[:-1]) and len(report["claims"]) == 4

    # The same by hand, for one prompt.
    static = [scene for scene in scenes if attributes_stay(scene)]
    scene = static[-1]
    frames = pipe.animate(
        scene.prompt,
        Anchor(render(scene.objects, 9)[-5:]),
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
    )
    looked_at = []

    def looking(frame, scene):
        looked_at.append(frame)
        return shows_its_objects(frame, scene)

    monkeypatch.setattr(anchors, "shows_its_objects", looking)
    (record,) = measure_continuation(pipe, [scene], [render(scene.objects, 9)], 5, 1.0, 2, 16)
    last = np.round(frames[0, -1] * 255).astype(np.uint8)
    assert np.array_equal(looked_at[1], last) and record["kept"] == int(shows_its_objects(last, scene))


def test_a_long_video_shows_every_frame_once(tmp_path, monkeypatch, capsys):
    path = tmp_path / "long.mp4"
    prompts = ["A red circle moves to the right", "A red circle moves to the left", "A red circle rests at the centre"]
    monkeypatch.setattr(sys, "argv", ["long_video.py", *prompts, "--output", str(path), "--device", "cpu"])
    made = runpy.run_path(str(EXAMPLES / "long_video.py"), run_name="__main__")
    frames, rate = read_video(path)
    assert frames.shape == (17 + 12 + 12, 384, 384, 3) and rate == made["pipe"].call_defaults["frame_rate"]
    assert path.with_suffix(".png").stat().st_size > 0 and "to 40" in capsys.readouterr().out
    # A seam is no larger a step than those within the clips.
    steps = np.abs(np.diff(made["video"], axis=0)).mean((1, 2, 3))
    assert max(steps[16], steps[28]) < 1.5 * np.delete(steps, [16, 28]).max()
