import json
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest

from diffusers_fvg.cli import main, parser
from diffusers_fvg.cli.output import save_stages
from diffusers_fvg.compose.candidates import AnchorCandidate
from diffusers_fvg.media import read_video, read_video_metadata


PROMPT = "A red circle moves to the right"


def test_generate_writes_video_strip_and_stages(tmp_path, capsys):
    arguments = ["generate", PROMPT, "--seed", "3", "--steps", "4", "--rewriter-motion", "--quiet"]
    arguments += ["--output", str(tmp_path / "out" / "video.mp4"), "--strip", str(tmp_path / "strip.png")]
    assert main([*arguments, "--save-stages", str(tmp_path / "stages")]) == 0
    frames, frame_rate = read_video(tmp_path / "out" / "video.mp4")
    assert frames.shape == (17, 384, 384, 3) and frame_rate == 8
    metadata = read_video_metadata(tmp_path / "out" / "video.mp4")
    assert metadata["prompt"] == PROMPT and metadata["seeds"]["video"] == 3 and metadata["preset"] == "anchored-15"
    assert metadata["model"] == "embedded" and metadata["hub_revisions"] == {}
    assert "red circle" in metadata["first_frame_prompt"] and "moves" not in metadata["first_frame_prompt"]
    assert metadata["versions"].keys() == {"diffusers-fvg", "diffusers", "torch", "transformers"}
    printed = capsys.readouterr().out
    assert metadata["motion_prompt"] == "the red circle moves to the right"
    for words in (
        metadata["first_frame_prompt"],
        metadata["motion_prompt"],
        "rewrite",
        "compose",
        "denoise",
        "decode",
        "video.mp4",
    ):
        assert words in printed
    stages = json.loads((tmp_path / "stages" / "stages.json").read_text())
    assert stages["first_frame_prompt"] == metadata["first_frame_prompt"]
    assert PIL.Image.open(tmp_path / "stages" / "anchor.png").size == (64, 64)
    assert len(list((tmp_path / "stages").glob("frame_*.png"))) == 17
    assert PIL.Image.open(tmp_path / "strip.png").width > 500


def test_stages_tell_what_was_chosen_among(tmp_path):
    images = [PIL.Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    candidates = [AnchorCandidate(image, seed, seed / 10, None) for seed, image in enumerate(images)]
    save_stages(tmp_path, {"prompt": "a"}, images[1], [], candidates)
    told = json.loads((tmp_path / "stages.json").read_text())["candidates"]
    assert [(each["seed"], each["score"]) for each in told] == [(0, 0.0), (1, 0.1)]
    assert PIL.Image.open(tmp_path / told[1]["file"]).tobytes() == images[1].tobytes()


def test_a_storyboard_shows_and_keeps_its_moments(tmp_path, capsys):
    prompt = "A red circle gradually turns into a square"
    arguments = ["generate", prompt, "--mode", "storyboard", "--seed", "3", "--steps", "4", "--quiet"]
    arguments += ["--output", str(tmp_path / "video.mp4"), "--strip", str(tmp_path / "strip.png")]
    assert main([*arguments, "--anchor-decode", "replace", "--save-stages", str(tmp_path / "stages")]) == 0
    stages = json.loads((tmp_path / "stages" / "stages.json").read_text())
    first, last = stages["storyboard"]
    assert (first["time"], last["time"]) == (0.0, 1.0)
    assert "red circle" in first["caption"] and "red square" in last["caption"]
    assert last["caption"] in capsys.readouterr().out
    assert read_video_metadata(tmp_path / "video.mp4")["storyboard"] == stages["storyboard"]
    for anchor, frame in (("anchor.png", "frame_0000.png"), ("anchor_2.png", "frame_0016.png")):
        anchor, frame = (np.asarray(PIL.Image.open(tmp_path / "stages" / name)) for name in (anchor, frame))
        assert np.array_equal(anchor, frame)


def test_a_seed_repeats_the_video_and_stages_chain(tmp_path, capsys):
    options = ["--seed", "5", "--steps", "3", "--quiet"]
    main(["rewrite", PROMPT, "--quiet"])
    caption = capsys.readouterr().out.strip()
    main(["generate", PROMPT, "--output", str(tmp_path / "a.mp4"), "--save-stages", str(tmp_path / "a"), *options])
    stages = json.loads((tmp_path / "a" / "stages.json").read_text())
    assert stages["first_frame_prompt"] == caption
    seed = str(stages["seeds"]["anchor"])
    main(["compose", caption, "--seed", seed, "--output", str(tmp_path / "anchor.png"), "--quiet"])
    anchors = [np.asarray(PIL.Image.open(tmp_path / name)) for name in ("anchor.png", "a/anchor.png")]
    assert np.array_equal(*anchors)
    main(["animate", PROMPT, "--image", str(tmp_path / "anchor.png"), "--output", str(tmp_path / "b.mp4"), *options])
    assert np.array_equal(read_video(tmp_path / "a.mp4")[0], read_video(tmp_path / "b.mp4")[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "", "--quiet"], "empty"),
        (["generate", PROMPT, "--height", "70", "--quiet"], "height=70.*64 and 80"),
        (["generate", PROMPT, "--preset", "none", "--quiet"], "Unknown preset 'none'"),
        (["generate", PROMPT, "--output", "video.avi"], "must end in .mp4"),
        (["generate", PROMPT, "--image", "missing.png"], "missing.png cannot be read"),
        (["generate", PROMPT, "--model", __file__], "is a file"),
        (
            ["generate", PROMPT, "--rewriter", "org/chat"],
            "The rewriter names org/chat on the Hub, which cannot be loaded",
        ),
        (
            ["generate", PROMPT, "--composer", "org/t2i"],
            "The composer names org/t2i on the Hub, which cannot be loaded",
        ),
        (
            ["generate", PROMPT, "--lora", "org/lora"],
            "The anchor LoRA names org/lora on the Hub, which cannot be loaded",
        ),
        (["generate", PROMPT, "--model", "none"], "'none' is no folder and no recipe; recipes are wan2.2-5b, "),
        (["generate", PROMPT, "--model", "WAN2.2-5B"], "Is 'wan2.2-5b' meant"),
        (["generate", PROMPT, "--rewriter-motion", "--mode", "direct"], "`rewriter_motion=True` has no effect"),
        (["generate", PROMPT, "--num-moments", "2"], "--num-moments 2 has no effect without --mode storyboard"),
        (["generate", PROMPT, "--mode", "direct", "--rewriter", "a/b"], "--rewriter has no effect: --mode direct"),
        (["plan", PROMPT, "--mode", "direct", "--composer", "a/b"], "--composer has no effect: --mode direct"),
        (
            ["plan", "--first-frame-prompt", PROMPT, "--rewriter", "a/b"],
            "--rewriter has no effect: --first-frame-prompt",
        ),
        (["compose", PROMPT, "--width", "2048"], "The width is 128 patches, .* 32 positions"),
        (["generate", PROMPT, "--height", "1024"], "The height is 64 patches, .* 32 positions"),
        (["generate", PROMPT, "--lora", __file__], "test_cli.py is no safetensors file"),
        (["rewrite", "a", "--rewriter", "HTTP://localhost/v1"], "needs --rewriter-model"),
        (["rewrite", "a", "--rewriter-api-key-env", "KEY"], "name it with --rewriter URL"),
        (
            ["rewrite", "a", "--rewriter", "http://host/v1", "--rewriter-model", "m", "--rewriter-api-key-env", "KEY"],
            "plain http",
        ),
        (["rewrite", "a", "--rewriter", "http://127.0.0.1:9/v1", "--rewriter-model", "m"], "endpoint .* failed"),
        (["shapes", "report", "new", "--window", "near=there"], "number of latent frames"),
        (["shapes", "report", "new", "--window", "1=there"], "No pytorch_lora_weights.safetensors in there"),
        (["shapes", "report", "new", "--ablation", "name"], "give NAME=DIR"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    import re

    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, error), error
    assert not list(tmp_path.glob("*.mp4"))


def test_help_is_quick_and_names_the_commands():
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "diffusers_fvg.cli", "--help"], capture_output=True, text=True)
    seconds = time.perf_counter() - started
    assert done.returncode == 0 and seconds < 2
    for command in ("generate", "rewrite", "compose", "animate"):
        assert command in done.stdout


def test_flags_mirror_argument_names():
    import inspect

    from diffusers_fvg import FactorizedVideoPipeline, load

    names = set(inspect.signature(FactorizedVideoPipeline.__call__).parameters)
    own = {"command", "run", "dtype", "device", "memory", "quantize", "compile", "seed", "quiet"}
    own |= {"output", "overwrite", "strip", "save_stages", "rewriter_model", "rewriter_api_key_env"}
    # Those that load the model are arguments of `load`.
    own |= {"source", "no_metadata"}
    own |= {"model", *inspect.signature(load).parameters}
    flags = set(vars(parser().parse_args(["generate", "a prompt"])))
    assert flags - own <= names
