"""The study of few distinct clips: which clips a run sees, and that it continues."""

import json
import math
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_fvg.cli import parser
from diffusers_fvg.embedded import EMBEDDED_FOLDER, load_embedded
from diffusers_fvg.shapes import clips, clips_report, train_models
from diffusers_fvg.shapes.clips import build_shared_cache, cached_scenes, run_folder, train_run
from diffusers_fvg.shapes.clips_report import (
    SETTINGS,
    clips_needed,
    lead,
    needed_text,
    report_text,
    score_dreamer,
    write_clips_report,
)
from diffusers_fvg.shapes.study import StudySettings
from diffusers_fvg.shapes.train import LORA_SETTINGS


NUM_CLIPS = 8


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A cache in which all clips but the first `NUM_CLIPS` are NaN, and runs of two steps: one with images, one with clips."""
    monkeypatch.setattr(clips, "NUM_CLIPS", (NUM_CLIPS, 12))
    monkeypatch.setattr(clips, "build_cache", partial(train_models.build_cache, num_images=1))
    monkeypatch.setattr(clips, "BASE_STEPS", 2)
    monkeypatch.setattr(clips, "LORA_STEPS", 2)
    monkeypatch.setattr(train_models, "train", partial(train_models.train, save_every=1))
    small = partial(train_models.train_transformer, clip_batch=12, image_batch=2)
    monkeypatch.setattr(train_models, "train_transformer", small)
    for name, value in {"warmup_steps": 1, "batch_size": 2}.items():
        monkeypatch.setitem(LORA_SETTINGS, name, value)
    (tmp_path / "cache").mkdir()
    build_shared_cache(tmp_path / "cache")
    path = tmp_path / "cache" / "latents.safetensors"
    latents = load_file(path)
    # The first latent frame stays finite, because images are taken from all clips.
    latents["clips"][NUM_CLIPS:, :, 1:] = torch.nan
    save_file(latents, path)
    return tmp_path


def base_weights(folder):
    return load_file(folder / "base" / "diffusion_pytorch_model.safetensors")


def test_an_interrupted_cache_continues_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(train_models, "PART_BATCHES", 1)
    vae, render, rendered = load_embedded().vae, train_models.render, []

    def stopping(*scene):
        if len(rendered) == 10:
            raise KeyboardInterrupt
        rendered.append(scene)
        return render(*scene)

    def build(name):
        vae.save_pretrained(tmp_path / name / "vae")
        train_models.build_cache(tmp_path / name, num_clips=12, num_images=1, num_composer_images=1)
        return load_file(tmp_path / name / "latents.safetensors")

    whole = build("whole")
    monkeypatch.setattr(train_models, "render", stopping)
    with pytest.raises(KeyboardInterrupt):
        build("stopped")
    # The first part of 8 clips was kept: 4 clips and 2 pictures are left to render.
    rendered[:] = [None] * 4
    stopped = build("stopped")
    assert len(rendered) == 10 and stopped.keys() == whole.keys()
    assert all(torch.equal(stopped[name], whole[name]) for name in whole)
    assert not (tmp_path / "stopped" / "parts").exists()


def test_a_run_sees_the_named_clips_and_continues_to_the_bit(tiny, monkeypatch):
    loss_of_flow, calls = train_models.anchored_flow_loss, []

    def stopping(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return loss_of_flow(*args)

    monkeypatch.setattr(train_models, "anchored_flow_loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        train_run(tiny, NUM_CLIPS)
    train_run(tiny, NUM_CLIPS)
    # One step before the stop, the one that was stopped, and that again.
    assert len(calls) == 3
    run, cache = run_folder(tiny, NUM_CLIPS), tiny / "cache"
    train_models.train_base(cache, num_clips=NUM_CLIPS, steps=2)
    stopped, whole = base_weights(run), base_weights(cache)
    assert all(torch.equal(tensor, stopped[name]) and tensor.isfinite().all() for name, tensor in whole.items())

    rows = [json.loads(line) for line in (run / "clips" / "metadata.jsonl").read_text().splitlines()]
    texts = json.loads((cache / "texts.json").read_text())["clips"]
    assert [row["text"] for row in rows] == [prompt for prompt, _ in texts[:NUM_CLIPS]]
    assert len({row["file_name"] for row in rows}) == NUM_CLIPS == len(list((run / "lora_cache/latents").iterdir()))
    lora = load_file(run / "anchor_lora" / "weights" / "pytorch_lora_weights.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in lora.items() if "lora_B" in name)
    assert list(json.loads((run / "training.json").read_text())) == ["base", "lora"]

    # One clip more would have met the poison.
    (cache / "base.ckpt").unlink()
    train_models.train_base(cache, num_clips=NUM_CLIPS + 1, steps=2)
    assert any(tensor.isnan().any() for tensor in base_weights(cache).values())
    with pytest.raises(ValueError, match="`num_clips=13` must be 1 to 12"):
        train_models.train_base(cache, num_clips=13, steps=2)


def test_a_longer_list_begins_with_the_shorter_one():
    scenes = cached_scenes(40)
    assert scenes[:10] == cached_scenes(10) and len({repr(scene.objects) for scene in scenes}) == 40


def test_clips_needed_are_read_off_the_line_between_neighbours():
    curve = [(500, 0.2), (2000, 0.4), (8000, 0.4), (20_000, 0.7)]
    # Half of the way in score is half of the way in the logarithm.
    assert clips_needed(curve, 0.3) == pytest.approx(1000)
    assert clips_needed(curve, 0.1) == 500 and clips_needed(curve, 0.4) == pytest.approx(2000)
    assert clips_needed(curve, 0.7) == pytest.approx(20_000) and clips_needed(curve, 0.71) == math.inf
    assert clips_needed([*curve, (40_000, 0.6)], 0.3) is None
    assert needed_text(math.inf, 20_000) == "more than 20,000"
    assert "unknown" in needed_text(None, 20_000)


def test_a_lead_is_that_of_each_prompt():
    scores = {"a": (0.9, 0.5), "b": (0.7, 0.5), "c": (0.2, 0.4), "d": (0.2, 0.0)}
    records = [
        {"arm": arm, "steps": steps, "category": "xy"["ab".find(prompt) < 0], "prompt": prompt, "score": score + shift}
        for arm, steps, place in (("factorized", 15, 0), ("direct", 50, 1), ("direct", 15, 1))
        for prompt, pair in scores.items()
        for score in (pair[place],)
        for shift in (-0.1, 0.1)
    ]
    # Differences .4 and .2 in one category, -.2 and .2 in the other.
    found = lead(records, 15, 50)
    assert found["value"] == pytest.approx((0.3 + 0.0) / 2)
    assert found["error"] == pytest.approx(math.sqrt(0.02 / 2 + 0.08 / 2) / 2, abs=1e-4)


def test_dreamer_s_rows_are_compared_with_the_next_fewer_clips(tmp_path, monkeypatch):
    # Scores of two prompts of one category, by the number of clips; from true first frames each is 0.1 lower.
    scores = {500: (0.1, 0.3), 2000: (0.3, 0.9), 4000: (0.3, 0.8)}
    for number in (500, 4000, 2000):
        (tmp_path / f"video_{number}").mkdir()

    def run_row(name, cell, *_, **__):
        lower = 0.1 * (cell.arm == "true")
        return [
            {"category": "x", "prompt": prompt, "score": score - lower, "motion": 2 * score}
            for prompt, score in zip("ab", scores[int(name.removeprefix("video_"))])
        ]

    monkeypatch.setattr(clips_report, "run_row", run_row)
    monkeypatch.setattr(clips_report, "build_dreamer", lambda folder, name, designs: name)
    for name in ("digest", "Inputs", "provenance"):
        monkeypatch.setattr(clips_report, name, lambda *_: "")
    rows = score_dreamer(tmp_path, tmp_path / "report", SETTINGS, 16)
    assert [(row["clips"], row["arm"]) for row in rows] == [(n, arm) for n in scores for arm in ("written", "true")]
    assert [row["score"] for row in rows] == pytest.approx([0.2, 0.1, 0.6, 0.5, 0.55, 0.45])
    assert [row["motion"] for row in rows[::2]] == pytest.approx([0.4, 1.2, 1.1])
    # Differences of .2 and .6, then of 0 and -.1.
    error = [math.sqrt(0.08 / 2), math.sqrt(0.005 / 2)]
    for row, added, expected in zip(rows[2:], (0.4, 0.4, -0.05, -0.05), (error[0], error[0], error[1], error[1])):
        assert row["added"] == {"value": pytest.approx(added), "error": pytest.approx(expected, abs=1e-4)}
    assert all("added" not in row for row in rows[:2])
    report = {"settings": {"few_steps": 15, "steps": (50, 15)}, "not_run": [], "runs": {}, "rows": rows}
    lines = [" ".join(line.split()) for line in report_text(report).splitlines()]
    assert lines[-4:][::2] == ["2000 Dreamer 0.400 0.200", "4000 Dreamer -0.050 0.050"]


def test_the_text_says_what_is_met_and_what_is_missing():
    rows = [
        {"arm": arm, "steps": steps, "clips": clips, "series": f"{arm}, {steps} steps", "score": score, "spread": None}
        for clips, pair in {500: (0.3, 0.5), 2000: (0.5, 0.6)}.items()
        for arm, steps, score in (("direct", 50, pair[0]), ("factorized", 15, pair[1]), ("true_anchor", 15, 0.875))
    ]
    leads = {500: {"value": 0.2, "error": 0.03}, 2000: {"value": 0.1, "error": 0.03}}
    report = {"settings": {"few_steps": 15, "steps": (50, 15)}, "not_run": [8000], "rows": rows}
    guidance = {"direct": 1.75, "factorized": 3.0, "true_anchor": 5.0}
    runs = {clips: {"lead": found, "true_anchor_motion": 0.75, "guidance": guidance} for clips, found in leads.items()}
    text = report_text(report | {"runs": runs})
    lines = [line.split() for line in text.splitlines()]
    # An error below is .85 of the way in the logarithm.
    assert ["500", "0.200", "0.030", "met", *"2,000 (1,625 to more than 2,000)".split()] in lines
    assert ["500", "0.125", "0.250", "1.75,", "3,", "5"] in lines
    assert ["2000", "0.100", "0.030", "MISSED", "more", "than", "2,000"] in lines
    assert "not run yet: 8000" in text and "synthetic" in text


@pytest.mark.slow
def test_a_run_with_the_embedded_weights_scores_like_the_embedded_model(tmp_path):
    run = run_folder(tmp_path, 2000)
    (run / "training.json").parent.mkdir(parents=True)
    (run / "training.json").write_text(json.dumps({"base": {}, "lora": {}}))
    (run / "base").symlink_to(EMBEDDED_FOLDER / "transformer")
    (run / "anchor_lora").symlink_to(EMBEDDED_FOLDER / "anchor_lora")
    settings = StudySettings(1, 1, (3, 2), 2, 1, 1, (1.0,))
    text = write_clips_report(tmp_path, tmp_path / "report", settings)
    report = json.loads((tmp_path / "report" / "clips.json").read_text())
    own, embedded = ([row for row in report["rows"] if bool(row.get("embedded")) == flag] for flag in (False, True))
    left_out = {"clips", "embedded", "seconds", "stage_seconds"}
    kept = [[{k: v for k, v in row.items() if k not in left_out} for row in rows] for rows in (own, embedded)]
    assert kept[0] == kept[1] and len(kept[0]) == 6
    assert report["not_run"] == [500, 8000, 20000] and "not run yet" in text
    assert (tmp_path / "report" / "clips.png").stat().st_size > 1000


def test_nothing_is_scored_before_a_run_is_done(tmp_path):
    with pytest.raises(ValueError, match="No run is finished"):
        write_clips_report(tmp_path, tmp_path / "report")


def test_the_command_names_folders():
    arguments = parser().parse_args(["shapes", "clips", "runs", "--report", "report"])
    assert (arguments.folder.name, arguments.report.name) == ("runs", "report")
