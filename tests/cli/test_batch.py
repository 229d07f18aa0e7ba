import json

import PIL.Image
import pytest

from diffusers_fvg import recipes
from diffusers_fvg.cli import main
from diffusers_fvg.cli.batch import ModelLoad, check_run, run_folder
from diffusers_fvg.evaluation.plan import read_plan
from diffusers_fvg.flags import Parser


PROMPT = "A red circle moves to the right"


def test_a_batch_makes_what_generate_makes_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    PIL.Image.new("RGB", (64, 64), "blue").save("blue.png")
    rows = [
        {"prompt": PROMPT, "seed": 3, "name": "drawn"},
        {"prompt": PROMPT, "image": "blue.png", "mode": "factorized"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    batch = ["batch", "rows.jsonl", "out", "--num-frames", "5", "--steps", "1", "--quiet"]
    assert main(batch) == 0 and "2 of 2 are finished, 2 of them in this run" in capsys.readouterr().out
    main(["generate", PROMPT, "--seed", "3", "--num-frames", "5", "--steps", "1", "--quiet", "--output", "one.mp4"])
    assert (tmp_path / "out" / "videos" / "drawn.mp4").read_bytes() == (tmp_path / "one.mp4").read_bytes()
    capsys.readouterr()
    assert main(batch) == 0 and "2 of 2 are finished, 0 of them" in capsys.readouterr().out
    assert main([*batch[:-2], "2", "--quiet"]) == 2 and "another plan" in capsys.readouterr().err
    (tmp_path / "out" / "videos" / "000002.mp4").unlink()
    flags = Parser()
    actions = flags.add_subparsers()
    from diffusers_fvg.cli.batch import add_check, add_run

    add_run(actions)
    add_check(actions)
    with pytest.raises(ValueError, match="1 missing"):
        check_run(flags.parse_args(["check", "out"]))
    run_folder(flags.parse_args(["run", "out", "--quiet"]))
    capsys.readouterr()
    check_run(flags.parse_args(["check", "out"]))
    # A blue picture stands still.
    told = capsys.readouterr().out
    assert "all videos of the plan are present and complete" in told and "missing" not in told


@pytest.mark.parametrize(
    "row, told",
    [
        ({"height": 63}, "`height=63` must be a positive multiple of"),
        ({"preset": "fast"}, "fast"),
        ({"mode": "indirect"}, "Unknown mode 'indirect'"),
        ({"image": "no.png"}, "no.png"),
        ({"guidance_scale_2": 2}, "two experts"),
        ({"fps": 8}, "`fps` is not an argument of FactorizedVideoPipeline"),
        ({"prompt": "A dog runs"}, "The embedded model is a toy"),
        ({"prompt": "a" * 10_001}, "10001 characters"),
        ({"name": "../a"}, "must be relative to the output folder"),
        ({"num_inference_steps": 10**9}, "`num_inference_steps=1000000000` must be at most 1000"),
        ({"rewriter_motion": "yes"}, "`rewriter_motion` must be true or false"),
        ({"rewriter_motion": True, "motion_prompt": "It moves"}, "Only one of `motion_prompt` and `rewriter_motion`"),
    ],
)
def test_rows_are_checked_before_a_model_is_loaded(tmp_path, monkeypatch, capsys, row, told):
    monkeypatch.setattr(recipes, "load", None)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [{"prompt": PROMPT}, {"prompt": PROMPT} | row])))
    assert main(["batch", str(tmp_path / "a.jsonl"), str(tmp_path / "out"), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert "a.jsonl, line 2: " in error or "name" in row
    assert not (tmp_path / "out" / "plan.json").exists()


def test_a_lora_that_is_not_there_is_told_before_the_plan_is_written(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(PROMPT)
    for name in ("wrong", "org/wrong", "./wrong.safetensors", str(tmp_path / "wrong.safetensors")):
        batch = ["batch", str(tmp_path / "a.txt"), str(tmp_path / "out"), "--lora", name, "--plan-only", "--quiet"]
        assert main(batch) == 2
        error = capsys.readouterr().err
        assert "The anchor LoRA" in error and name in error and error.count("\n") == 1
        assert ("does not exist on this machine" in error) == (name != "org/wrong")
        assert not (tmp_path / "out" / "plan.json").exists()
    # Of direct videos alone nothing asks for it.
    assert main([*batch, "--mode", "direct"]) == 0


def test_a_plan_alone_is_written_for_each_video_of_a_prompt(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(f"{PROMPT}\n{PROMPT}\n")
    flags = ["--num-videos-per-prompt", "2", "--mode", "direct", "--plan-only", "--quiet"]
    assert main(["batch", str(tmp_path / "a.txt"), str(tmp_path / "out"), *flags]) == 0
    rows = list(read_plan(tmp_path / "out"))
    assert len({row.seed for row in rows}) == 4 and {row.arguments["mode"] for row in rows} == {"direct"}
    assert not (tmp_path / "out" / "videos").exists()


def test_each_stage_is_loaded_alone():
    arguments = main.__globals__["parser"]().parse_args(["batch", "a", "b", "--quiet"])
    load = ModelLoad(arguments)
    rewriting, composing = load({"rewriter"}), load({"composer"})
    assert rewriting.rewriter.model is not None and composing.composer.pipeline is not None
    assert all(pipe.transformer.device.type == "meta" for pipe in (rewriting, composing))
    assert composing.anchor_judge.device.type == "cpu"
    animating = load({"lora", "video"})
    assert animating.rewriter is None and animating.composer is None and animating.transformer.device.type == "cpu"
