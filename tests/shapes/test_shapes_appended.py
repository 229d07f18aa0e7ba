"""The report on anchors at the exact frame, at its smallest."""

import json

import numpy as np
import pytest
from quick import quick
from safetensors.torch import load_file, save_file

from diffusers_fvg import load_embedded
from diffusers_fvg.embedded import EMBEDDED_FOLDER
from diffusers_fvg.shapes.appended import appended_claims, form_differences, psnr, write_appended_report
from diffusers_fvg.shapes.study import StudySettings


OWN_LORA = EMBEDDED_FOLDER / "anchor_lora" / "weights"
FILE = "pytorch_lora_weights.safetensors"


def test_psnr_by_closed_form():
    black, grey = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 51, np.uint8)
    # An error of a fifth of the range is 20 log10(5) dB.
    assert psnr(grey, black) == psnr(black, grey) == pytest.approx(13.9794, abs=1e-4)
    assert psnr(grey, grey) == float("inf")


def row(form, frames, **values):
    return {"form": form, "frames": list(frames)} | values


def test_claims_are_losses_against_the_forms_own_first_frame():
    rows = [
        row("slot", (0,), kept=0.92, psnr=24.0, vae=27.0),
        row("slot", (8,), kept=0.85, psnr=18.0, vae=26.5),
        row("slot, any", (0,), kept=0.93, psnr=24.5, vae=27.0),
        row("slot, any", (8,), kept=0.9, psnr=19.5, vae=26.5),
        row("appended", (0,), kept=0.94, psnr=25.0, vae=27.0),
        row("appended", (6,), kept=0.9, psnr=24.2, vae=26.0),
        row("appended", (8,), kept=0.92, psnr=23.9, vae=26.5),
    ]
    found = {claim["measure"]: claim for claim in appended_claims(rows)}
    assert {name: (claim["value"], claim["met"], claim.get("beside")) for name, claim in found.items()} == {
        "share kept lost by the true middle frame": (0.02, True, "slot 0.070, slot, any 0.030"),
        "dB of frame 6 beyond those of frame 0": (-0.8, True, "the VAE alone -1.000"),
        "dB of frame 8 beyond those of frame 0": (-1.1, False, "slot -6.000, slot, any -5.000, the VAE alone -0.500"),
    }


def test_differences_have_the_errors_of_their_prompts():
    """Two prompts of one category with motion, two without; differences of .2 and .4, and of 0 and .1."""

    def records(scores, kept):
        facts = (("interaction", "a"), ("interaction", "b"), ("static", "c"), ("static", "d"))
        found = [{"category": name, "prompt": prompt, "score": s} for (name, prompt), s in zip(facts, scores)]
        return [*found[:2], *(record | {"kept": k} for record, k in zip(found[2:], kept))]

    found = form_differences(records((0.8, 0.9, 0.5, 0.7), (1, 0)), records((0.6, 0.5, 0.5, 0.6), (1, 1)))
    # The standard error of the mean of two values is half of their distance.
    assert found["motion_score"] == pytest.approx({"value": 0.3, "error": 0.1})
    assert found["score"] == pytest.approx({"value": 0.175, "error": 0.0559}, abs=1e-4)
    assert found["kept"] == {"value": -0.5, "error": 0.5}


def test_report(few_scenes, tmp_path):
    pipe = quick(load_embedded(), num_frames=9)
    own = pipe.anchor_lora
    # The same weights in both forms.
    for form in ("appended", "slot"):
        path = tmp_path / form / "anchor_lora" / "weights" / FILE
        path.parent.mkdir(parents=True)
        save_file(load_file(OWN_LORA / FILE), path, metadata={"anchor_form": form})
    settings = StudySettings(1, 1, few_steps=1, tuning_per_category=1, tuning_seeds=1, guidance=(1.0, 3.0))
    text = write_appended_report(pipe, tmp_path / "out", tmp_path, settings, ((0,), (6, 8)))
    report = json.loads((tmp_path / "out" / "appended.json").read_text())
    # Two frames of one latent frame are of the appended form alone.
    slot, other, first, both = report["rows"]
    assert [(row["form"], row["frames"]) for row in report["rows"]] == [
        ("slot", [0]),
        ("slot, any", [0]),
        ("appended", [0]),
        ("appended", [6, 8]),
    ]
    assert {**slot, "form": "appended"} == {**other, "form": "appended"} == first and len(text.splitlines()) == 23
    # The same weights make the same videos of a first frame in both forms; with one prompt there is no standard error.
    (differences,) = report["differences"]
    assert differences["frames"] == [0] and differences["score"] == {"value": 0.0, "error": None}
    # Frame 0 is what the VAE makes of it; an anchor behind the clip is seen, not put in.
    assert first["psnr"] == pytest.approx(first["vae"], abs=0.05) and 5 < both["psnr"] < both["vae"] - 1
    assert pipe.anchor_lora is own and pipe.anchor_form == "slot" and pipe.get_active_adapters() == ["anchor"]
    # Each choice of guidance is that of the best mean on the tuning prompts, and the reported ones were not used for it.
    _, *lines = (json.loads(line) for line in (tmp_path / "out" / "appended.jsonl").read_text().splitlines())
    for found, split in zip(report["rows"], ("slot", "slot, any", "appended", "appended"), strict=True):
        own = [line for line in lines if line["arm"] == " ".join(map(str, found["frames"]))]
        means = {line["guidance"]: np.mean(line["score"]) for line in own if line["split"] == f"{split}, tuning"}
        assert set(means) == {1.0, 3.0} and means[found["guidance"]] == max(means.values())
        assert {line["guidance"] for line in own if line["split"] == f"{split}, reported"} == {found["guidance"]}
    save_file(load_file(OWN_LORA / FILE), path, metadata={"anchor_form": "appended"})
    with pytest.raises(ValueError, match="slot was trained with `anchor_form='appended'`, not with 'slot'"):
        write_appended_report(pipe, tmp_path / "out", tmp_path)
