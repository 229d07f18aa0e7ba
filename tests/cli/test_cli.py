import json
import subprocess
import sys
import time
from argparse import Namespace
from types import SimpleNamespace

import av
import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_fvg.cli import main, parser
from diffusers_fvg.cli.output import save_stages, write
from diffusers_fvg.cli.stages import look_at
from diffusers_fvg.compose.candidates import AnchorCandidate
from diffusers_fvg.media import read_video, read_video_metadata, write_video


PROMPT = "A red circle moves to the right"


def test_generate_writes_video_strip_and_stages(tmp_path, capsys):
    arguments = ["generate", PROMPT, "--seed", "3", "--steps", "1", "--rewriter-motion", "--quiet"]
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


def test_a_small_video_is_enlarged_by_its_height(tmp_path):
    frames, output = np.zeros((2, 64, 128, 3), np.uint8), tmp_path / "video.mp4"
    pipe = SimpleNamespace(call_defaults={"frame_rate": 8})
    made = SimpleNamespace(frames=[frames], records=[{"prompt": "a"}])
    arguments = Namespace(output=output, strip=None, no_metadata=False, overwrite=False)
    write(arguments, pipe, made, [], [])
    assert read_video(output)[0].shape == (2, 384, 768, 3) and read_video_metadata(output) == {"prompt": "a"}

    # What another run has written there meanwhile stays, unless it is to be overwritten.
    made.records = [{"prompt": "b"}]
    write(arguments, pipe, made, [], [])
    assert [read_video_metadata(tmp_path / name)["prompt"] for name in ("video.mp4", "video-2.mp4")] == ["a", "b"]
    arguments.overwrite = True
    write(arguments, pipe, made, [], [])
    assert read_video_metadata(output) == {"prompt": "b"} and len(list(tmp_path.iterdir())) == 2


def test_stages_tell_what_was_chosen_among(tmp_path):
    images = [PIL.Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    candidates = [AnchorCandidate(image, seed, seed / 10, None) for seed, image in enumerate(images)]
    save_stages(tmp_path, {"prompt": "a"}, images[1], [], candidates)
    told = json.loads((tmp_path / "stages.json").read_text())["candidates"]
    assert [(each["seed"], each["score"]) for each in told] == [(0, 0.0), (1, 0.1)]
    assert PIL.Image.open(tmp_path / told[1]["file"]).tobytes() == images[1].tobytes()


def test_a_storyboard_shows_and_keeps_its_moments(tmp_path, capsys):
    prompt = "A red circle gradually turns into a square"
    arguments = ["generate", prompt, "--mode", "storyboard", "--seed", "3", "--steps", "1", "--quiet"]
    arguments += ["--output", str(tmp_path / "video.mp4"), "--strip", str(tmp_path / "strip.png"), "--num-frames", "5"]
    assert main([*arguments, "--anchor-decode", "replace", "--save-stages", str(tmp_path / "stages")]) == 0
    stages = json.loads((tmp_path / "stages" / "stages.json").read_text())
    first, last = stages["storyboard"]
    assert (first["time"], last["time"]) == (0.0, 1.0)
    assert "red circle" in first["caption"] and "red square" in last["caption"]
    assert last["caption"] in capsys.readouterr().out
    assert read_video_metadata(tmp_path / "video.mp4")["storyboard"] == stages["storyboard"]
    for anchor, frame in (("anchor.png", "frame_0000.png"), ("anchor_2.png", "frame_0004.png")):
        anchor, frame = (np.asarray(PIL.Image.open(tmp_path / "stages" / name)) for name in (anchor, frame))
        assert np.array_equal(anchor, frame)


def test_the_sound_of_a_video_is_in_its_file(tmp_path, capsys):
    from tiny_animators import tiny_animator

    stock = tiny_animator("ltx2_i2v")
    stock.save_pretrained(tmp_path / "ltx2")
    PIL.Image.new("RGB", (64, 64), "red").save(tmp_path / "anchor.png")
    size = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in size.items()]
    arguments += ["--seed", "3", "--quiet", "--dtype", "float32", "--output", str(tmp_path / "video.mp4")]
    call = ["animate", PROMPT, "--model", str(tmp_path / "ltx2"), "--image", str(tmp_path / "anchor.png")]
    assert main([*call, *arguments]) == 0, capsys.readouterr().err
    assert "video.mp4, with sound\n" in capsys.readouterr().out
    image = PIL.Image.open(tmp_path / "anchor.png")
    generator = torch.Generator().manual_seed(3)
    expected = stock(image, PROMPT, generator=generator, output_type="np", **size).audio[0]
    # What the sound is after AAC is tested of `write_video`.
    write_video(tmp_path / "b.mp4", np.zeros((9, 64, 64, 3)), 24, audio=expected, audio_sampling_rate=24000)
    sounds = []
    for name in ("video.mp4", "b.mp4"):
        with av.open(tmp_path / name) as container:
            assert container.streams.audio[0].rate == 24000 and container.streams.video[0].frames == 9
            sounds.append(np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1))
    np.testing.assert_array_equal(*sounds)
    assert sounds[0].any() and b"Lavc" not in (tmp_path / "video.mp4").read_bytes()


def test_a_seed_repeats_the_video_and_stages_chain(tmp_path, capsys):
    options = ["--seed", "5", "--steps", "2", "--num-frames", "5", "--quiet"]
    main(["rewrite", PROMPT, "--quiet"])
    printed = capsys.readouterr()
    caption = printed.out.strip()
    assert "rewrite: " not in printed.err
    main(["generate", PROMPT, "--output", str(tmp_path / "a.mp4"), "--save-stages", str(tmp_path / "a"), *options])
    stages = json.loads((tmp_path / "a" / "stages.json").read_text())
    assert stages["first_frame_prompt"] == caption
    seed = str(stages["seeds"]["anchor"])
    # The seed is that of the picture that the judge chose, so that no judge is asked again.
    alone = ["--seed", seed, "--num-candidates", "1"]
    main(["compose", caption, *alone, "--output", str(tmp_path / "anchor.png"), "--quiet"])
    anchors = [np.asarray(PIL.Image.open(tmp_path / name)) for name in ("anchor.png", "a/anchor.png")]
    assert np.array_equal(*anchors)
    main(["animate", PROMPT, "--image", str(tmp_path / "anchor.png"), "--output", str(tmp_path / "b.mp4"), *options])
    assert np.array_equal(read_video(tmp_path / "a.mp4")[0], read_video(tmp_path / "b.mp4")[0])


def test_generate_is_told_how_many_are_made(tmp_path, monkeypatch):
    """The embedded model draws several first frames for its judge; with one there are no candidates to save."""
    monkeypatch.chdir(tmp_path)
    generate = ["generate", PROMPT, "--steps", "1", "--num-frames", "5", "--seed", "0", "--quiet", "--save-stages"]
    main([*generate, "some"])
    main([*generate, "one", "--composer-num-candidates", "1"])
    assert (tmp_path / "some" / "candidate_1.png").exists() and not (tmp_path / "one" / "candidate_1.png").exists()
    looked = look_at(parser().parse_args(["generate", PROMPT, "--motion-retries", "2", "--quiet"]))
    assert looked.request.motion_retries == 2


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
        (
            ["generate", PROMPT, "--model", "none"],
            "'none' is neither a folder nor a recipe; the recipes are wan2.2-5b, ",
        ),
        (["generate", PROMPT, "--model", "WAN2.2-5B"], "Did you mean 'wan2.2-5b'?"),
        (["generate", PROMPT, "--rewriter-motion", "--mode", "direct"], "`rewriter_motion=True` has no effect"),
        (["generate", PROMPT, "--num-moments", "2"], "--num-moments 2 has no effect without --mode storyboard"),
        (["generate", PROMPT, "--mode", "direct", "--rewriter", "a/b"], "--rewriter has no effect: --mode direct"),
        (["plan", PROMPT, "--mode", "direct", "--composer", "a/b"], "--composer has no effect: --mode direct"),
        (
            ["plan", "--first-frame-prompt", PROMPT, "--rewriter", "a/b"],
            "--rewriter has no effect: --first-frame-prompt",
        ),
        (["compose", PROMPT, "--width", "2048"], "`width=2048` must be at most 512"),
        (["generate", PROMPT, "--height", "1024"], "`height=1024` must be at most 512"),
        (["generate", PROMPT, "--lora", __file__], "test_cli.py is not a safetensors file"),
        (["rewrite", "a", "--rewriter", "HTTP://localhost/v1"], "needs --rewriter-model"),
        (["rewrite", "a", "--rewriter-api-key-env", "KEY"], "give its URL as --rewriter URL"),
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


def test_plan_takes_the_flags_of_generate(tmp_path, capsys, monkeypatch):
    flags = [set(vars(parser().parse_args([command, "a prompt"]))) for command in ("generate", "plan")]
    assert flags[0] == flags[1]
    monkeypatch.chdir(tmp_path)
    options = [
        "--seed",
        "3",
        "--steps",
        "2",
        "--negative-prompt",
        "blue",
        "--anchor-decode",
        "match",
        "--compile",
        "--quiet",
    ]
    options += ["--output", "video.mp4", "--strip", "strip.png", "--save-stages", "stages", "--no-metadata"]
    assert main(["plan", PROMPT, *options, "--mode", "storyboard", "--num-moments", "3"]) == 0
    assert "2 steps" in capsys.readouterr().out and not list(tmp_path.iterdir())
    # What generate would refuse, and what a file says.
    assert main(["plan", PROMPT, "--output", "video.avi"]) == 2 and "must end in .mp4" in capsys.readouterr().err
    record = {
        "--first-frame-prompt": "A red circle at the left",
        "--steps": "3",
        "--num-frames": "5",
        "--output": "made.mp4",
    }
    assert main(["generate", PROMPT, "--quiet", *(text for pair in record.items() for text in pair)]) == 0
    capsys.readouterr()
    assert main(["plan", "--from", "made.mp4"]) == 0 and "3 steps" in capsys.readouterr().out
    assert main(["plan", "--from", "made.mp4", "--steps", "4"]) == 0 and "4 steps" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made.mp4"]


@pytest.mark.parametrize("name", ["", " "])
def test_an_image_without_a_name_is_one_sentence(name, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["generate", PROMPT, "--image", name])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert "argument --image: the file name is empty: give one, or omit the flag" in error


def test_flags_mirror_argument_names():
    import inspect

    from diffusers_fvg import FactorizedVideoPipeline, load

    names = set(inspect.signature(FactorizedVideoPipeline.__call__).parameters)
    own = {"command", "run", "dtype", "device", "memory", "quantize", "compile", "light_decoder", "seed", "quiet"}
    own |= {"output", "overwrite", "strip", "save_stages", "rewriter_model", "rewriter_api_key_env"}
    # Those that load the model are arguments of `load`.
    own |= {"source", "no_metadata"}
    own |= {"model", *inspect.signature(load).parameters}
    flags = set(vars(parser().parse_args(["generate", "a prompt"])))
    assert flags - own <= names
