"""`fvg assemble` and `fvg push`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..flags import FRAMES, PIXELS, Whole, check_folder


def add_assemble(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("assemble", help="make a repository from a base, a composer, a rewriter and a LoRA")
    parser.add_argument("output", type=Path, help="empty or new folder")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--base", help="Wan or CogVideoX pipeline: folder, org/name or org/name@revision")
    model.add_argument("--animator", help="image-to-video pipeline of diffusers, instead of a base")
    parser.add_argument("--composer", help="text-to-image pipeline: folder, org/name or org/name@revision")
    parser.add_argument("--rewriter", help="chat model: folder, org/name or org/name@revision")
    parser.add_argument("--lora", nargs="+", help="anchor LoRA of any format, or one per expert, high noise first")
    parser.add_argument(
        "--presets", nargs="+", default=(), help="names of presets, the default first, or a folder of presets"
    )
    parser.add_argument("--variant", help="variant of the weight files, such as fp16")
    for name, kind in (("height", PIXELS), ("width", PIXELS), ("num-frames", FRAMES), ("frame-rate", Whole(1, 1000))):
        parser.add_argument(f"--{name}", type=kind, metavar="NUMBER", help="default of the repository")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--light", action="store_true", help="store references to Hub repositories (the default)")
    kind.add_argument("--bundled", action="store_true", help="copy all weights")
    parser.add_argument("--dry-run", action="store_true", help="only list components, licences, files and sizes")
    parser.set_defaults(run=_assemble)


def add_push(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("push", help="upload a saved pipeline to the Hub, with its card")
    parser.add_argument("folder", type=Path, help="folder of a saved pipeline")
    parser.add_argument("repository", help="org/name; created if it does not exist")
    parser.add_argument("--commit-message", metavar="TEXT", help="commit message (default: the Hub's)")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--create-pr", action="store_true", help="push as a pull request")
    parser.set_defaults(run=_push)


def _assemble(arguments: argparse.Namespace) -> None:
    from .. import assemble

    if not arguments.dry_run:
        check_folder("OUTPUT", arguments.output)
    sizes = ("height", "width", "num_frames", "frame_rate")
    defaults = {name: value for name in sizes if (value := getattr(arguments, name)) is not None}
    names = ("base", "animator", "composer", "rewriter", "lora", "presets", "variant", "dry_run")
    parts = {name: getattr(arguments, name) for name in names}
    print(assemble(arguments.output, light=not arguments.bundled, call_defaults=defaults or None, **parts))
    if not arguments.dry_run:
        print(f"repository: {arguments.output}")


def _push(arguments: argparse.Namespace) -> None:
    from .. import push

    # With `None`, the default of the organization applies.
    private = True if arguments.private else None
    print(push(arguments.folder, arguments.repository, arguments.commit_message, private, arguments.create_pr))
