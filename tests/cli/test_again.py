"""`fvg generate --from` and --no-metadata, with the embedded model."""

import functools
import json
import re

import av
import numpy as np
import pytest

from diffusers_fvg import recipes
from diffusers_fvg.cli import main
from diffusers_fvg.media import read_video, read_video_metadata, write_video


PROMPT = "A red circle moves to the right"
OPTIONS = ["--steps", "2", "--quiet"]
MODES = {
    "factorized": [PROMPT, "--anchor-decode", "match", "--negative-prompt", "blue"],
    "direct": [PROMPT, "--mode", "direct", "--guidance-scale", "3"],
    "storyboard": ["A red circle gradually turns into a square", "--mode", "storyboard", "--num-frames", "9"],
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


def test_a_picture_is_given_again(video, tmp_path, capsys):
    folder = tmp_path / "stages"
    assert again(video, tmp_path / "a.mp4", "--save-stages", folder) == 0
    image = ["--image", str(folder / "anchor.png")]
    assert main(["animate", PROMPT, *image, "--seed", "3", "--output", str(tmp_path / "b.mp4"), *OPTIONS]) == 0
    assert again(tmp_path / "b.mp4", tmp_path / "c.mp4", *image) == 0
    assert (tmp_path / "b.mp4").read_bytes() == (tmp_path / "c.mp4").read_bytes()
    for more, message in (([], "--image"), (["--image", folder / "frame_0016.png"], "Picture 1 is another one")):
        assert again(tmp_path / "b.mp4", tmp_path / "d.mp4", *more) == 2
        assert re.search(message, capsys.readouterr().err.strip().splitlines()[-1])
    # Where the picture was drawn it is replaced.
    assert again(video, tmp_path / "e.mp4", "--image", folder / "frame_0016.png") == 0
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
        ({"model": "org/fvg", "revision": "0" * 40}, "org/fvg"),
        ({"model": "my model"}, "the model was a folder called 'my model'; give it as --model"),
        ({"model": "here/model"}, "'here/model' of the record is also a place here"),
        ({"model": None}, "names no model; give it as --model"),
        (
            {"model": "wan2.2-5b", "hub_revisions": {"anchor_lora": "here/model@" + "0" * 40}},
            "'here/model@0+' of the record is also a place here; say by --lora",
        ),
        ({"model": "/etc"}, "which no call has"),
        ({"custom_pipeline": "x"}, "unknown key 'custom_pipeline'"),
        ({"pipeline": "FactorizedCogVideoXPipeline"}, "The record is of a FactorizedCogVideoXPipeline"),
        ({"preset": "none"}, "Unknown preset 'none'"),
        ({"seeds": {"video": {"state": "none"}}}, "cannot be restored here .* --seed"),
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


def test_a_prompt_or_a_video_is_needed(capsys, tmp_path):
    assert main(["generate", "--quiet", "--output", str(tmp_path / "video.mp4")]) == 2
    assert "give a prompt, or --from VIDEO" in capsys.readouterr().err
