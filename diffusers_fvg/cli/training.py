"""`fvg train`: trains an anchor LoRA or Factorized-Dreamer, or prints what a run would do."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path


def add_train(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "train", help="train an anchor LoRA, or a stage of Factorized-Dreamer, on videos; continues where it stopped"
    )
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG", help="TOML file; see examples/training")
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="print a config for the anchor LoRA of a recipe, with the data and memory that it needs; trains nothing",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="report buckets, rejected files, memory, time, target layers and sampled times of the run; trains nothing",
    )
    parser.add_argument(
        "--help-options", action="store_true", help="list every option of the config with type, default and reason"
    )
    parser.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> None:
    import tomllib

    if arguments.help_options:
        from ..training.options import options_text

        print(options_text())
        return
    if (arguments.config is None) == (arguments.recipe is None):
        raise ValueError("give either the TOML file of a run or --recipe NAME, which prints one.")
    if arguments.recipe is not None:
        from ..overview import training_text
        from ..recipes import RECIPES

        if arguments.recipe not in RECIPES:
            raise ValueError(f"--recipe {arguments.recipe} must be one of {', '.join(RECIPES)}.")
        print(training_text(RECIPES[arguments.recipe]), end="")
        return

    from ..training.config import TrainConfig
    from ..training.trainer import main_train

    # `TrainConfig.load` reports a file that is not TOML.
    with contextlib.suppress(tomllib.TOMLDecodeError, UnicodeDecodeError):
        if "system" in tomllib.loads(arguments.config.read_text(encoding="utf-8")):
            if arguments.dry_run:
                from ..training.dreamer_config import DreamerConfig
                from ..training.dreamer_dry_run import dreamer_dry_run

                print(dreamer_dry_run(DreamerConfig.load(arguments.config)))
                return
            from ..training.dreamer import main_train_dreamer

            print(f"video UNet: {main_train_dreamer(arguments.config)}")
            return
    config, validate = TrainConfig.load(arguments.config), None
    if arguments.dry_run:
        from ..training.dry_run import dry_run

        print(dry_run(config))
        return
    if config.validation_every:
        from ..evaluation.validation import make_validate

        validate = make_validate(config)
    print(f"LoRA: {main_train(arguments.config, validate)}")
