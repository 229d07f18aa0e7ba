"""Wrong values for every flag of every command, made from the parser itself; and its help texts."""

import argparse
from pathlib import Path

import PIL.Image
import pytest
import torch

from diffusers_fvg.cli import main, parser
from diffusers_fvg.flags import Number, Whole, file_name, folder_or_url, local_folder
from diffusers_fvg.recipes import outline


# What a command needs beside the flag that is tried; `{}` is a folder of the test.
NEEDED = {
    "fvg generate": ["a red circle"],
    "fvg plan": ["a red circle"],
    "fvg rewrite": ["a red circle"],
    "fvg compose": ["a red circle"],
    "fvg app": ["--no-page"],
    "fvg animate": ["a red circle", "--image", "{}/picture.png"],
    "fvg assemble": ["{}/out", "--base", "org/base"],
    "fvg push": ["{}/folder", "org/name"],
    "fvg lora export": ["{}/trained", "{}/a.safetensors"],
    "fvg lora merge": ["{}/trained", "{}/base", "{}/merged"],
    "fvg train": ["{}/run.toml"],
    "fvg shapes train": ["{}/trained"],
    "fvg shapes dreamer": ["{}/trained"],
    "fvg shapes clips": ["{}/trained"],
    "fvg shapes appended": ["{}/trained"],
    "fvg shapes report": ["{}/report"],
    "fvg shapes prompts": ["{}/prompts"],
    "fvg shapes score": ["{}/empty", "{}/empty", "{}/scores"],
    "fvg bench plan": ["{}/run", "--suite", "vbench-2.0", "--prompts", "{}/empty"],
    "fvg bench run": ["{}/empty"],
    "fvg bench check": ["{}/empty"],
    "fvg bench layout": ["{}/empty", "{}/layout"],
    "fvg bench commands": ["{}/empty", "{}/checkout", "{}/results"],
    "fvg bench read": ["{}/empty"],
    "fvg batch": ["{}/prompts.txt", "{}/videos"],
    "fvg bench pack": ["{}/empty", "{}/ours.zip", "--suite", "vbench-2.0", "--name", "ours"],
    "fvg bench report": ["{}/empty", "{}/report"],
}
# Text of which no value is wrong by itself.
FREE_TEXT = {"negative_prompt", "commit_message", "name"}
# Any text names something on the Hub, which does not answer here, or a variable.
NAMES = ["none", "org/none", "org/none@v1", "/no/such/folder", "\x00"]
WRONG = {
    "prompt": ["", " ", "\n", "\t", "a" * 20_000, "\x1b[31m a red circle", "a red circle \udce9"],
    "model": ["none", "org/none", "/no/such/folder", "{}/picture.png", "{}/empty"],
    "device": ["banana", "cuda", "cuda:7", "mps", ""],
    "memory": ["16TB", "-8GB", "0GB", "nanGB", "1e20"],
    "preset": ["none", "", "anchored-16", "FULL-50", "../x"],
    "rewriter": [*NAMES[:4], "http://127.0.0.1:9/v1"],
    "rewriter_model": ["none", "", " ", "a", "b"],
    "rewriter_api_key_env": ["NONE", "", " ", "a", "b"],
    "num_frames": ["18", "0", "-1", "1e20", "nan"],
    "height": ["70", "0", "-64", "1e20", "nan"],
    "width": ["70", "0", "-64", "64.5", "99999999999"],
    "frame_index": ["17", "-18", "0.5", "1e20", "x"],
    "designs": ["none", "", "no", "no_", "-"],
    "window": ["near=there", "=there", "1=", "1=there", "x"],
    "ablation": ["name", "=there", "name=", "name=there", ""],
    "repository": ["", "a/b/c", "a b", "-/", "a@b/c/d"],
    "base": NAMES,
    "lora": NAMES,
    "light_decoder": NAMES,
    "composer": NAMES,
    "animator": NAMES,
    "recipe": [*NAMES[:4], ""],
    "revision": ["none", "", "main", "v1", "x" * 40],
    "variant": ["none", "", "fp16", "..", "x"],
    "arms": ["none", "", "direct@", "@full-50", "image"],
    "categories": ["none", "", "material", "Material+Mechanics", "x"],
    "ratio": ["1:1", "", "4-3", "16-9", "x"],
    "baseline": ["none", "", "direct", "x", "y"],
    "presets": ["none", "", "x", "y", "z"],
    "label": ["none", "", " ", "prompt ", "\x00"],
    "host": ["no.such.invalid", "", "256.1.1.1", "a b", "x" * 300],
}
FILES = ["{}/video.txt", "{}/no\x00name.mp4", "/proc/no/such/video.mp4", "{}", "{}/picture.png/video.mp4"]
FOLDERS = ["{}/picture.png", "{}/picture.png/inside", "/proc/no/such", "{}/no\x00name", "/dev/null"]
PICTURES = ["{}/none.png", "{}", "{}/run.toml", "/dev/null", "{}/no\x00name.png", "", " "]


def commands(parser: argparse.ArgumentParser):
    """Parsers that run something."""
    (inner,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)] or [None]
    if inner is None:
        yield parser
    for command in inner.choices.values() if inner else ():
        yield from commands(command)


def wrong_values(action: argparse.Action) -> list[str]:
    if action.dest in ("first_frame_prompt", "motion_prompt"):
        return WRONG["prompt"]
    if action.dest in WRONG:
        return WRONG[action.dest]
    if action.choices is not None:
        return ["none", "", "1", "ALL", "-"]
    if isinstance(action.type, Whole):
        return [str(action.type.low - 1), str(action.type.high + 1), "1e20", "nan", "x"]
    if isinstance(action.type, Number):
        below = action.type.low if action.type.above else action.type.low - 1
        return [str(below), str(action.type.high * 2), "nan", "1e400", "x"]
    assert action.type in (Path, file_name, local_folder, folder_or_url), f"no wrong values for {action.dest}"
    if action.dest == "image":
        return PICTURES
    return (
        FOLDERS
        if action.dest in ("folder", "report", "save_stages", "distilled") or "folder" in action.help
        else FILES
    )


CASES = [
    pytest.param(command.prog, action, id=f"{command.prog[4:]} {action.dest}".replace(" ", "-"))
    for command in commands(parser())
    for action in command._actions
    if action.nargs != 0 and action.dest not in FREE_TEXT
]


@pytest.fixture
def outlined_once(monkeypatch):
    """The parser and the embedded model without weights are made once for all values."""
    make = outline.outline

    def outline_once(source, dtype, composer=None, rewriter=None, hub=None):
        key = source.folder, dtype, composer, rewriter
        if key not in OUTLINES:
            OUTLINES[key] = make(source, dtype, composer, rewriter, hub)
        return OUTLINES[key]

    monkeypatch.setattr(outline, "outline", outline_once)
    monkeypatch.setattr("diffusers_fvg.cli.parser", lambda: PARSER)


OUTLINES, PARSER = {}, parser()


@pytest.mark.usefixtures("outlined_once")
@pytest.mark.parametrize(("command", "action"), CASES)
def test_a_wrong_value_is_one_line(command, action, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PIL.Image.new("RGB", (64, 64)).save(tmp_path / "picture.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "run.toml").write_text("")
    (tmp_path / "prompts.txt").write_text("A red circle moves to the right\n")
    there = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for value in wrong_values(action):
        arguments = [*command.split()[1:], *NEEDED.get(command, [])]
        if action.option_strings:
            arguments += [f"{action.option_strings[0]}={{}}".format(value)]
        else:
            place = [action.dest for action in positionals(command)].index(action.dest)
            given = arguments[len(command.split()) - 1 :]
            given[place] = value
            arguments = [*command.split()[1:], *given]
        arguments = [argument.replace("{}", str(tmp_path)) for argument in arguments]
        try:
            status = main(arguments)
        except SystemExit as exit:
            status = exit.code
        error = capsys.readouterr().err
        assert status == 2, (arguments, error)
        lines = [line for line in error.splitlines() if line]
        assert "Traceback" not in error and lines[-1].startswith("fvg") and len(lines) <= 2, error
        assert len(lines[-1]) < 800
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == there


def positionals(prog: str) -> list[argparse.Action]:
    (command,) = [command for command in commands(PARSER) if command.prog == prog]
    return [action for action in command._actions if not action.option_strings]


# -- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [parser(), *commands(parser())], ids=lambda command: command.prog.replace(" ", "-")
)
def test_help_is_whole_and_fits_a_terminal(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = command.format_help()
    assert max(map(len, text.splitlines())) <= 80
    for action in command._actions:
        assert action.help, f"{command.prog} {action.dest}"
        words = "".join((action.help % {**vars(action), "prog": command.prog}).split())
        assert words in "".join(text.split()), f"{command.prog} {action.dest}"


def test_nothing_heavy_is_imported_for_help(run_python):
    code = "import sys; from diffusers_fvg.cli import parser; parser(); print(sorted({'torch', 'diffusers', 'numpy'} & set(sys.modules)))"
    assert run_python(code, new_interpreter=True).strip() == "[]"


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("diffusers_fvg.overview.models_text", stopped)
    assert main(["models"]) == 130 and capsys.readouterr().err == "fvg models: stopped\n"


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("tried to allocate\n 20 GiB"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_what_runs_out_of_memory_says_what_helps(error, monkeypatch, capsys):
    monkeypatch.setattr("diffusers_fvg.overview.models_text", failing(error))
    assert main(["models"]) == 2
    assert capsys.readouterr().err.startswith("fvg models: out of memory: use --memory")


def test_what_nobody_expected_is_one_line_with_its_kind(monkeypatch, capsys):
    monkeypatch.setattr("diffusers_fvg.overview.models_text", failing(KeyError("added_tokens")))
    assert main(["models"]) == 1
    assert capsys.readouterr().err == "fvg models: KeyError: 'added_tokens'\n"


def failing(error):
    def fail(*arguments, **options):
        raise error

    return fail
