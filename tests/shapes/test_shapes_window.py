"""The report on window attention of the embedded model, at its smallest."""

import json

import pytest

from diffusers_fvg.embedded import EMBEDDED_FOLDER
from diffusers_fvg.shapes.window import write_window_report


OWN_LORA = EMBEDDED_FOLDER / "anchor_lora" / "weights"


def test_windows_and_loras(pipe, few_scenes, tmp_path):
    pipe.transformer.set_anchor_window(3)
    text = write_window_report(pipe, tmp_path, (0, 1), {0: OWN_LORA}, per_category=1, seeds=1, steps=2)
    assert pipe.transformer.anchor_window == 3
    assert set(pipe.get_active_adapters()) == {"anchor"}
    report = json.loads((tmp_path / "window.json").read_text())
    found = {(row["lora"], row["window"]): row["inputs"] for row in report["rows"]}
    assert list(found) == [("own", "dense"), ("own", 0), ("trained with it", 0), ("own", 1)]
    assert report["synthetic"] and len(text.splitlines()) == 1 + 3 * len(found)

    def videos(key):
        return {arm: (row["score"], row["motion"], row["categories"]) for arm, row in found[key].items()}

    # A clip has 2 latent frames: 1 to either side are all of them, none to either side are not.
    assert videos(("own", "dense")) == videos(("own", 1)) != videos(("own", 0))
    # The same weights from a folder give the same videos.
    assert videos(("own", 0)) == videos(("trained with it", 0))


def test_loras_that_do_not_fit(pipe, tmp_path):
    with pytest.raises(ValueError, match=r"is given for window 3, which is not among `windows=\(0, 1\)`"):
        write_window_report(pipe, tmp_path, (0, 1), {3: OWN_LORA})
    with pytest.raises(ValueError, match=r"No pytorch_lora_weights.safetensors in .*of window 1"):
        write_window_report(pipe, tmp_path, (0, 1), {1: tmp_path})
