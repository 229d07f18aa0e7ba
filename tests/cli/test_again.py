"""`fvg generate --from` and --no-metadata, with the embedded model."""

import argparse
import functools
import json
import re

import av
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from diffusers_fvg import recipes
from diffusers_fvg.cli import main
from diffusers_fvg.cli.again import _take_model
from diffusers_fvg.lora.anchor_lora import WEIGHT_NAME
from diffusers_fvg.media import read_video, read_video_metadata, write_video
from diffusers_fvg.recipes import sources
from diffusers_fvg.recipes.sources import ModelSource


PROMPT = "A red circle moves to the right"
OPTIONS = ["--steps", "2", "--num-frames", "5", "--quiet"]
MODES = {
    "factorized": [PROMPT, "--anchor-decode", "match", "--negative-prompt", "blue"],
    "direct": [PROMPT, "--mode", "direct", "--guidance-scale", "3"],
    "storyboard": ["A red circle gradually turns into a square", "--mode", "storyboard"],
    "caption": [PROMPT, "--first-frame-prompt", "A still picture of a blue square", "--preset", "full-50"],
}


@pytest.fixture(scope="module", autouse=True)
def one_pipeline():
    """Loaded once: nothing of a call stays in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "load", functools.cache(recipes.load))
        yield


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("again") / "video.mp4"
    assert main(["generate", PROMPT, "--seed", "3", "--output", str(path), *OPTIONS]) == 0
    return path


def again(video, output, *more) -> int:
    return main(["generate", "--from", str(video), "--output", str(output), "--quiet", *map(str, more)])


@pytest.mark.parametrize(
    "mode",
    ["factorized", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("direct", "storyboard", "caption"))],
)
def test_a_video_is_made_again_bit_for_bit(mode, tmp_path, capsys):
    first, second = tmp_path / "first.mp4", tmp_path / "second.mp4"
    # Without a seed: the one that was drawn is in the file.
    assert main(["generate", *MODES[mode], "--output", str(first), *OPTIONS]) == 0
    assert again(first, second) == 0
    assert first.read_bytes() == second.read_bytes()


def test_a_flag_changes_what_the_file_says(video, tmp_path, capsys):
    assert again(video, tmp_path / "other.mp4", "--seed", 4, "--mode", "direct") == 0
    assert not np.array_equal(read_video(video)[0], read_video(tmp_path / "other.mp4")[0])
    record = read_video_metadata(tmp_path / "other.mp4")
    assert (record["seeds"], record["mode"], record["anchors"]) == ({"video": 4}, "direct", [])


def test_a_picture_is_given_again(video, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "stages"
    assert again(video, tmp_path / "a.mp4", "--save-stages", folder) == 0
    image = ["--image", str(folder / "anchor.png")]
    assert main(["animate", PROMPT, *image, "--seed", "3", "--output", str(tmp_path / "b.mp4"), *OPTIONS]) == 0
    assert again(tmp_path / "b.mp4", tmp_path / "c.mp4", *image) == 0
    assert (tmp_path / "b.mp4").read_bytes() == (tmp_path / "c.mp4").read_bytes()
    assert again(tmp_path / "b.mp4", tmp_path / "d.mp4") == 2
    assert "--image" in capsys.readouterr().err.strip().splitlines()[-1]
    # The flag counts before the record.
    other = ["--image", str(folder / "frame_0004.png")]
    told = []
    with monkeypatch.context() as patch:
        patch.setattr("diffusers_fvg.pipelines.replay.logger.warning", told.append)
        assert again(tmp_path / "b.mp4", tmp_path / "f.mp4", *other) == 0
    assert "--image differs from the recorded picture" in told[0]
    assert main(["animate", PROMPT, *other, "--seed", "3", "--output", str(tmp_path / "g.mp4"), *OPTIONS]) == 0
    assert (tmp_path / "f.mp4").read_bytes() == (tmp_path / "g.mp4").read_bytes()
    # Where the picture was drawn it is replaced.
    assert again(video, tmp_path / "e.mp4", "--image", folder / "frame_0004.png") == 0
    assert read_video_metadata(tmp_path / "e.mp4")["first_frame_prompt"] is None


def test_a_video_tells_its_story_or_nothing(video, tmp_path):
    with av.open(str(video)) as container:
        assert container.metadata["title"] == PROMPT
        assert json.loads(container.metadata["comment"])["prompt"] == PROMPT
    assert again(video, tmp_path / "plain.mp4", "--no-metadata") == 0
    assert np.array_equal(read_video(video)[0], read_video(tmp_path / "plain.mp4")[0])
    with av.open(str(tmp_path / "plain.mp4")) as container:
        assert container.metadata.keys() == {"major_brand", "minor_version", "compatible_brands"}
    data = (tmp_path / "plain.mp4").read_bytes()
    assert not [word for word in (b"red", b"Lavf", b"x264", b"fvg") if word in data]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_kind": "hub", "model": "org/fvg", "revision": "0" * 40}, "org/fvg"),
        ({"model_kind": "folder", "model": "my model"}, "a local folder named 'my model'; give it as --model"),
        ({"model_kind": "folder"}, "a local folder named 'embedded'; give it as --model"),
        ({"model_kind": "folder", "model": "wan2.2-5b"}, "a local folder named 'wan2.2-5b'; give it as --model"),
        ({"model_kind": "recipe", "model": "none"}, "'none' is not a recipe"),
        ({"hub_revisions": {"composer": "org/t2i@" + "0" * 40}}, "org/t2i"),
        ({"model_kind": "recipe", "model": "wan2.2-5b"}, "a local anchor LoRA; give it as --lora"),
        ({"fps": 1}, "`fps=1` of the record is not an argument of FactorizedVideoPipeline"),
        ({"max_sequence_length": 8000}, "`max_sequence_length=8000` must be at most 512"),
        ({"height": 4096, "width": 4096, "num_frames": 9}, "`height=4096` must be at most 512"),
        ({"model_kind": "hub", "model": "here/model"}, "'here/model' in the record is also the name of a local path"),
        ({"model": None}, "names no model; give it as --model"),
        (
            {"model_kind": "recipe", "model": "wan2.2-5b", "hub_revisions": {"anchor_lora": "here/model@" + "0" * 40}},
            "'here/model@0+' in the record is also the name of a local path; give the one that you mean as --lora",
        ),
        ({"model": "/etc"}, "which is not valid"),
        ({"custom_pipeline": "x"}, "unknown key 'custom_pipeline'"),
        ({"pipeline": "FactorizedCogVideoXPipeline"}, "The record is of a FactorizedCogVideoXPipeline"),
        ({"preset": "none"}, "Unknown preset 'none'"),
        ({"seeds": {"video": {"state": "none"}}}, "cannot be restored here .*--seed"),
        ({"seeds": {"video": {"device": "cuda", "seed": 1}}}, "on 'cuda' cannot be restored here"),
    ],
)
def test_a_record_that_cannot_be_followed_is_one_line(change, message, video, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    write_video("changed.mp4", np.zeros((1, 16, 16, 3), np.uint8), 8, read_video_metadata(video) | change)
    assert again("changed.mp4", "again.mp4") == 2
    printed = capsys.readouterr()
    assert re.search(message, printed.err.strip().splitlines()[-1]) and "Traceback" not in printed.err
    assert not (tmp_path / "again.mp4").exists()
    # What is fetched is said before.
    assert ("from the record:    model org/fvg" in printed.out) == (change.get("model") == "org/fvg")
    assert ("from the record:    composer org/t2i" in printed.out) == (message == "org/t2i")


def test_a_lora_that_was_given_is_given_again(video, quick_folder, tmp_path, capsys):
    weights = load_file(quick_folder / "anchor_lora" / WEIGHT_NAME)
    save_file({name: tensor * 2 for name, tensor in weights.items()}, tmp_path / "lora.safetensors")
    lora, first, second = ["--lora", str(tmp_path / "lora.safetensors")], tmp_path / "a.mp4", tmp_path / "b.mp4"
    assert main(["generate", PROMPT, *lora, "--seed", "3", "--output", str(first), *OPTIONS]) == 0
    assert again(first, second) == 2
    assert "another anchor LoRA than the model's own" in capsys.readouterr().err and not second.exists()
    assert again(first, second, *lora) == 0
    assert first.read_bytes() == second.read_bytes() != video.read_bytes()


@pytest.mark.parametrize(
    ("kind", "model", "given", "parts", "expected"),
    [
        # As --composer would: that of a Hub repository, and the embedded model's.
        ("hub", "org/base", None, {"composer": "org/t2i@a"}, {"model": "org/base", "composer": "org/t2i@a"}),
        ("embedded", "embedded", None, {"composer": "org/t2i@a"}, {"model": None, "composer": "org/t2i@a"}),
        # A recipe's own parts at the recorded commits.
        (
            "recipe",
            "wan2.2-5b",
            None,
            {"composer": "Tongyi-MAI/Z-Image-Turbo@a", "vae": "Wan-AI/Wan2.2-TI2V-5B-Diffusers@b"},
            {"model": "wan2.2-5b", "composer": "Tongyi-MAI/Z-Image-Turbo@a", "revision": "b"},
        ),
        # What the repository names itself has its settings there.
        ("hub", "org/base", None, {"composer": "org/own@c"}, {"model": "org/base", "composer": None}),
        ("folder", "base", None, {"composer": "org/own@c"}, {"model": "base", "composer": None}),
        # A flag counts before the record.
        ("hub", "org/base", "org/own", {"composer": "org/t2i@a"}, {"composer": "org/own"}),
    ],
)
def test_the_parts_of_a_record_are_taken(kind, model, given, parts, expected, tmp_path, monkeypatch, capsys):
    (tmp_path / "composer").mkdir()
    (tmp_path / "composer" / "composer_config.json").write_text('{"repository": "org/own", "revision": "c"}')
    monkeypatch.setattr(sources, "find_source", lambda *_: ModelSource("base", folder=tmp_path))
    names = ("model", "composer", "rewriter", "lora", "revision", "token", "first_frame_prompt")
    arguments = argparse.Namespace(**dict.fromkeys(names) | {"composer": given, "first_frame_prompt": "a circle"})
    arguments.model = model if kind == "folder" else None
    _take_model(arguments, {"model": model, "model_kind": kind, "hub_revisions": parts}, {"mode": "factorized"})
    assert {name: getattr(arguments, name) for name in expected} == expected
    # Said before anything is loaded.
    assert given or parts["composer"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-moments", 3], "--num-moments 3 has no effect: it needs --mode storyboard"),
        (["--rewriter", "org/chat", "--mode", "direct"], "--rewriter org/chat has no effect: --mode direct"),
        (["--rewriter", "org/chat", "--first-frame-prompt", "A red circle"], "--rewriter org/chat has no effect"),
        (["--composer", "org/t2i", "--mode", "direct"], "--composer org/t2i has no effect: --mode direct"),
        # Stage 1 runs with it.
        (["--rewriter", "org/chat"], "names org/chat on the Hub"),
    ],
)
def test_a_flag_has_an_effect_or_is_refused(flags, message, video, tmp_path, capsys):
    assert again(video, tmp_path / "again.mp4", *flags) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_prompt_or_a_video_is_needed(capsys, tmp_path):
    assert main(["generate", "--quiet", "--output", str(tmp_path / "video.mp4")]) == 2
    assert "give a prompt, or --from VIDEO" in capsys.readouterr().err
