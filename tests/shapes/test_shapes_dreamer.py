"""The shapes world's Factorized-Dreamer: what is measured, and all of its training at a few steps."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from quick import quick
from safetensors.torch import load_file

from diffusers_fvg.cli import parser
from diffusers_fvg.embedded import EMBEDDED_DREAMER_FOLDER, EMBEDDED_FOLDER, load_embedded, load_embedded_dreamer
from diffusers_fvg.shapes import dreamer, dreamer_image, dreamer_report
from diffusers_fvg.shapes.blobs import find_objects
from diffusers_fvg.shapes.dreamer import DESIGNS, PLAIN, VIDEO_STEPS, train_dreamer
from diffusers_fvg.shapes.dreamer_report import (
    claims,
    detail,
    flow_error,
    joined,
    report_text,
    row_of,
    still_region,
    trained_steps,
    write_dreamer_report,
)
from diffusers_fvg.shapes.held_out import split_scenes
from diffusers_fvg.shapes.train import Part
from diffusers_fvg.shapes.world import Change, Scene, ShapeObject, render


STILL = ShapeObject("red", "square", 0.25, 0.5, 0.15)
MOVER = ShapeObject("blue", "circle", 0.75, 0.2, 0.12, (Change("move", (0.0, 0.5)),))


def scene(*objects) -> Scene:
    return Scene("motion_binding", "", "", objects)


def test_detail_is_read_where_nothing_changes():
    region = still_region(scene(STILL, MOVER), 8, 64, 64)
    # The square reaches 0.135 to each side, and what is around it counts as well.
    assert region[32, 16] and region[32, 26] and not region[32, 32] and not region[13, 48]
    passing = ShapeObject("blue", "circle", 0.25, 0.1, 0.1, (Change("move", (0.0, 0.35)),))
    covered = still_region(scene(STILL, passing), 8, 64, 64)
    assert covered.sum() < region.sum() and not covered[28, 16]
    assert not still_region(scene(MOVER), 8, 64, 64).any()

    first = render((STILL, MOVER), 8)[0]
    frames = np.repeat(first[None], 3, axis=0)
    frames[:, ~region] = 0
    frames[1:, 32, 16] -= 30
    error = 2 * 3 * 30**2 / (3 * 3 * region.sum())
    assert detail(frames, first, region) == pytest.approx(10 * np.log10(255**2 / error))


def test_flow_error_is_that_of_the_motion_that_is_missing():
    objects = scene(ShapeObject("red", "square", 0.3, 0.5, 0.2, (Change("move", (0.4, 0.0)),)))
    clip = render(objects.objects, 8)
    moving, standing = flow_error(clip, objects), flow_error(np.repeat(clip[:1], 8, axis=0), objects)
    # Where the object is, a clip that stands still lacks all of its path, 25.6 pixels; elsewhere it has nothing to lack.
    assert moving < 5 < 10 < standing <= 25.7


def test_plain_is_stable_diffusions_noise_and_no_design():
    assert not PLAIN.takes_image and DESIGNS["paca_alone"].takes_image
    alphas = next(iter(PLAIN.presets().values())).make_scheduler().alphas_cumprod
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    assert (alphas - (1 - betas).cumprod(0)).abs().max() < 1e-6


def test_claims_compare_designs_trained_for_as_long():
    rows = {("all", 9): {"score_written": 0.6, "detail": 24.0, "flow": 2.0}, ("plain", 9): {"score_prompt": 0.52}}
    assert [(claim["value"], claim["met"]) for claim in claims(rows)] == [(0.08, False)]
    rows |= {
        ("no_paca", 9): {"detail": 21.0},
        ("no_predict_net", 5): {"flow": 2.1},
        ("plain", 5): {"score_prompt": 0.1},
    }
    assert [(claim["value"], claim["met"]) for claim in claims(rows)] == [(0.08, False), (3.0, True)]
    rows |= {("all", 5): {"score_written": 0.2, "detail": 20.0, "flow": 2.0}}
    found = [(claim["trained_steps"], claim["value"], claim["met"]) for claim in claims(rows)]
    assert found == [(9, 0.08, False), (9, 3.0, True), (5, 0.1, True), (5, 0.05, False)]


def test_a_row_has_the_errors_of_its_prompts():
    """Two prompts with two videos each: the error is half the distance of the prompts' means."""
    facts = (("interaction", "a"), ("motion_binding", "b"), ("interaction", "a"), ("motion_binding", "b"))
    records = [
        {"category": name, "prompt": prompt, "score": 1.0, "motion": 0.0, "seconds": 0.0, "flow": flow}
        for (name, prompt), flow in zip(facts, (2.0, 6.0, 4.0, 8.0))
    ]
    row = row_of("row", {"true": records})
    assert (row["flow"], row["error_flow"]) == (5.0, 2.0) and "detail" not in row


def test_designs_are_found_by_how_long_they_were_trained(tmp_path):
    for name in ("design_plain_30", "design_plain_300", "design_plain_30_flow", "design_paca_alone_30"):
        (tmp_path / name).mkdir()
    (tmp_path / "design_plain_40.ckpt").touch()
    assert trained_steps(tmp_path, "plain") == [300, 30]
    assert parser().parse_args(["shapes", "dreamer", "folder"]).design_steps == VIDEO_STEPS


def test_every_part_trains_and_one_call_continues(tmp_path, monkeypatch):
    draw = dreamer_image.training_frames
    monkeypatch.setattr(dreamer_image, "training_frames", lambda rng, num_scenes, per_scene: draw(rng, 3, per_scene))
    monkeypatch.setattr(dreamer_image, "CATEGORIES", ("motion_binding",))
    compared, loss = set(), dreamer_image.reconstruction_loss

    def reconstruction_loss(made, pixels):
        compared.update((made.shape[1:], pixels.shape[1:]))
        return loss(made, pixels)

    monkeypatch.setattr(dreamer_image, "reconstruction_loss", reconstruction_loss)
    parts = {
        "vae": Part(partial(dreamer_image.train_vae, steps=1)),
        "decoder": Part(
            partial(dreamer_image.train_decoder, steps=1), partial(dreamer_image.vae_score, per_category=1), 0.0
        ),
        "clip": Part(partial(dreamer_image.train_clip, steps=1, batch_size=4)),
        "clips": Part(partial(dreamer_image.build_clips, num_clips=6)),
        "image": Part(partial(dreamer_image.train_image, steps=1, batch_size=4)),
        "video": Part(lambda folder: dreamer.train_video(folder, "video", DESIGNS["all"], 1, batch_size=2)),
    }
    monkeypatch.setattr(dreamer, "DREAMER_PARTS", parts)
    with pytest.raises(ValueError, match="sharpness"):
        train_dreamer(tmp_path, EMBEDDED_FOLDER, ["sharpness"])
    train_dreamer(tmp_path, EMBEDDED_FOLDER, ["plain"], design_steps=1)
    summary = json.loads((tmp_path / "training.json").read_text())
    assert [*parts, "design_plain_1"] == list(summary) and compared == {(3, 1, 64, 64)}
    weights = tmp_path / "repository" / "unet" / "diffusion_pytorch_model.safetensors"
    size = sum(path.stat().st_size for path in (tmp_path / "repository").rglob("*") if path.is_file())
    assert size < 20e6
    (tensors, texts), (all_tensors, all_texts) = (dreamer_image.load_clips(tmp_path, number) for number in (2, None))
    assert texts == all_texts[:2] and len(all_texts) == 6
    assert all(torch.equal(tensor, all_tensors[name][:2]) for name, tensor in tensors.items())
    before = weights.stat().st_mtime_ns

    def again(*args, **options):
        pytest.fail("a part was trained again")

    monkeypatch.setattr(dreamer, "DREAMER_PARTS", dict.fromkeys(parts, Part(again)))
    monkeypatch.setattr(dreamer, "train_video", again)
    train_dreamer(tmp_path, EMBEDDED_FOLDER, ["plain"], design_steps=1)
    assert weights.stat().st_mtime_ns == before

    pipe = quick(load_embedded_dreamer(folder=tmp_path / "repository"))
    out = pipe("A red circle moves to the left", num_inference_steps=2, num_frames=10)
    assert out.frames.shape == (1, 10, 64, 64, 3) and out.motion_prompts == ["the red circle moves to the left"]


def test_a_vae_to_begin_with_keeps_its_latents(tmp_path, monkeypatch):
    vae = EMBEDDED_DREAMER_FOLDER / "vae"

    def next_part(folder):
        raise InterruptedError

    parts = {
        "vae": Part(next_part),
        "decoder": Part(partial(dreamer_image.train_decoder, steps=1), lambda folder: 1.0, 0.95),
        "clip": Part(next_part),
    }
    monkeypatch.setattr(dreamer, "DREAMER_PARTS", parts)
    with pytest.raises(InterruptedError):
        train_dreamer(tmp_path, EMBEDDED_FOLDER, vae=vae)
    assert list(json.loads((tmp_path / "training.json").read_text())) == ["vae", "decoder"]
    given, trained = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (vae, tmp_path / "vae"))
    changed = {name.split(".")[0] for name, tensor in trained.items() if not torch.equal(tensor, given[name].float())}
    assert changed == {"decoder", "post_quant_conv"}


def test_the_shipped_model_moves_what_it_is_shown():
    pipe = load_embedded_dreamer()
    pipe.set_progress_bar_config(disable=True)
    prompts = ["A red circle moves to the left", "A yellow square moves upwards"]
    out = pipe(prompts, generator=[torch.Generator().manual_seed(seed) for seed in (0, 3)])
    assert out.motion_prompts == ["the red circle moves to the left", "the yellow square moves upwards"]
    frames = np.round(out.frames * 255).astype(np.uint8)
    assert frames.shape == (2, 8, 64, 64, 3)
    for video, colour, axis in zip(frames, ("red", "yellow"), (0, 1)):
        (first,), (last,) = find_objects(video[0]), find_objects(video[-1])
        assert first.colour == last.colour == colour
        # To the left, or up, by a good part of the two fifths of the frame that rendered ones go.
        assert first.place[axis] - last.place[axis] > 0.2


def test_report_names_what_was_not_run():
    row = {"row": "all designs", "score_written": 0.5, "trained_steps": 300, "seeds": 3}
    drift = {"frames": 32, "window_ends": [7, 14], "kept": [1.0, 0.5], "detail": [30.0, 20.0]}
    report = {
        "claims": [{"figure": "f", "trained_steps": 300, "value": 0.2, "bar": 0.1, "met": True}],
        "rows": [row],
        "drift": [drift],
    }
    text = report_text(report | {"not_run": ["PACA alone"], "motion_caption_score": 1.0, "notes": ["one decoder"]})
    assert (
        "not run: PACA alone" in text and "synthetic" in text and "0.500" in text and "\nNote: one decoder\n" in text
    )


def test_rows_of_weights_that_are_gone_stay_in_the_report():
    kept = [{"row": label, "trained_steps": 300, "seeds": 1} for label in ("all designs", "without PACA")]
    model = {"row": "Factorized-Dreamer", "trained_steps": 3000, "seeds": 1}
    new = [{"row": "rendered clips", "seeds": 3}, model | {"seeds": 3}]
    new += [{"row": "without PACA", "trained_steps": steps, "seeds": 3} for steps in (300, 3000)]
    found = [(row["row"], row.get("trained_steps"), row["seeds"]) for row in joined([*kept, model], new)]
    assert found == [
        ("rendered clips", None, 3),
        ("Factorized-Dreamer", 3000, 3),
        ("all designs", 300, 1),
        ("without PACA", 3000, 3),
        ("without PACA", 300, 3),
    ]


def test_a_report_keeps_the_rows_that_it_cannot_make(tmp_path, monkeypatch):
    scenes = [
        scene for scene in split_scenes(1, 1)[0] if scene.category in ("spatial_relationships", "motion_binding")
    ]
    monkeypatch.setattr(dreamer_report, "split_scenes", lambda *_: (scenes, []))
    dreamer_folder, out = EMBEDDED_DREAMER_FOLDER, tmp_path / "out"
    places = {
        "vae": "vae",
        "image_encoder": "image_encoder",
        "image_text_encoder": "text_encoder",
        "design_all_7": "unet",
    }
    for name, source in places.items():
        (tmp_path / name).symlink_to(dreamer_folder / source)
    for name in ("text_encoder", "tokenizer"):
        (tmp_path / name).symlink_to(EMBEDDED_FOLDER / name)
    kept = {"row": "without PACA", "trained_steps": 7, "seeds": 1, "detail": 3.5}
    out.mkdir()
    (out / "dreamer.json").write_text(json.dumps({"rows": [kept], "drift": [], "notes": ["one note"]}))
    text = write_dreamer_report(quick(load_embedded()), tmp_path, out, per_category=1, seeds=1, steps=1, fvg_steps=1)
    report = json.loads((out / "dreamer.json").read_text())
    rendered, fvg, model, other = report["rows"]
    assert [row["row"] for row in report["rows"][1:3]] == ["FVG, the embedded model", "all designs"] and other == kept
    assert {row["seeds"] for row in report["rows"]} == {1} and fvg["made_with"]["versions"].keys() >= {"diffusers"}
    assert rendered["score_true"] == 1 and 0 <= model["score_written"] <= 1 and model["trained_steps"] == 7
    (claim,) = report["claims"]
    assert claim["figure"] == "detail in dB that goes without PACA" and claim["value"] == round(
        model["detail"] - 3.5, 4
    )
    assert "without PACA" not in report["not_run"] and "Note: one note" in text and report["drift"] == []
