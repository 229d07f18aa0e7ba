"""The command line: each is one line on standard error and exit status 2."""

from __future__ import annotations

from bad_rows import PROMPT, CommandRefused, Row, Shared, short


def command(line: list[str], *words: str, files: dict[str, str | bytes] | None = None) -> Row:
    """`fvg` with these arguments; `{}` in them is a folder, which holds `files`."""

    def give(shared: Shared) -> None:
        for name, content in (files or {}).items():
            shared.write(name, content)
        shared.command(*line)

    title = " ".join(short(part) if len(part) > 40 else part for part in line)
    return Row(f"command: {title}", give, words, CommandRefused)


GENERATE = ["generate", PROMPT]
WRONG = [
    ("--num-inference-steps", "0", "from 1 to 1000"),
    ("--num-inference-steps", "1000000000", "from 1 to 1000"),
    ("--num-inference-steps", "1.5", "from 1 to 1000"),
    ("--num-inference-steps", "nan", "from 1 to 1000"),
    ("--num-inference-steps", "True", "from 1 to 1000"),
    ("--num-frames", "18", "nearest: 17 and 21"),
    ("--num-frames", "0", "from 1 to 100000"),
    ("--num-frames", "99997", "must be at most 125"),
    ("--height", "80000000", "from 8 to 16384"),
    ("--height", "70", "nearest: 64 and 80"),
    ("--height", "16384", "must be at most 512"),
    ("--width", "64.5", "from 8 to 16384"),
    ("--width", "-64", "from 8 to 16384"),
    ("--guidance-scale", "nan", "from 0 to 1000"),
    ("--guidance-scale", "-1", "from 0 to 1000"),
    ("--guidance-scale", "1e30", "from 0 to 1000"),
    ("--seed", "-1", "whole number"),
    ("--seed", "1.5", "whole number"),
    ("--seed", "99999999999999999999", "whole number"),
    ("--preset", "none", "has anchored-15, full-50"),
    ("--preset", "", "has anchored-15, full-50"),
    ("--mode", "none", "invalid choice: 'none'"),
    ("--anchor-decode", "none", "invalid choice: 'none'"),
    ("--dtype", "float8", "invalid choice: 'float8'"),
    ("--device", "banana", "banana is not a device"),
    ("--memory", "16TB", "16TB"),
    ("--memory", "-8GB", "-8GB"),
    ("--model", "/no/such/folder", "/no/such/folder"),
    ("--model", "no/such/model/here", "no/such/model/here", "`org/name`"),
    ("--variant", "fp16", "needs --model"),
    ("--revision", "main", "needs --model"),
    ("--output", "video.txt", "must end in .mp4"),
    ("--output", "/proc/no/such/video.mp4", "cannot be written"),
    ("--strip", "strip.jpg", "must end in .png"),
    ("--first-frame-prompt", "", "is empty"),
    ("--first-frame-prompt", "a red circle \x1b[31m", "control character"),
    ("--motion-prompt", " ", "is empty"),
    ("--negative-prompt", "x" * 20_000, "20000 characters"),
    ("--negative-prompt", "\x1b[31m", "control character"),
    ("--rewriter", "http://127.0.0.1:9/v1", "--rewriter-model"),
    ("--rewriter-model", "gpt", "--rewriter URL"),
    ("--composer", "/no/such/folder", "/no/such/folder"),
    ("--lora", "/no/such/file.safetensors", "LoRA", "/no/such/file.safetensors", "does not exist on this machine"),
    ("--quantize", "int3", "invalid choice: 'int3'"),
    ("--no-such-flag", "3", "unrecognized arguments"),
]
ROWS = [
    *(
        command(
            [*GENERATE, f"{flag}={value}"],
            *(words if flag == "--lora" else (flag.removeprefix("--").split("-")[0], *words)),
        )
        for flag, value, *words in WRONG
    ),
    *(
        command(["generate", text], *words)
        for text, words in (
            ("", ("prompt", "is empty")),
            ("   ", ("prompt", "is empty")),
            ("x" * 20_000, ("prompt", "20000 characters")),
            ("a red circle \x1b[31m", ("prompt", "control character")),
            ("a red circle \udce9", ("prompt", "half")),
            ("hello world", ("hello", "--model")),
        )
    ),
    command(["no-such-command"], "no-such-command", "invalid choice"),
    command([], "COMMAND", "required"),
]
