"""The command `fvg shapes`: trains and scores models of the shapes world. Importing this module is fast."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..flags import Whole, check_folder


if TYPE_CHECKING:
    from ..pipelines.pipeline_factorized_video import FactorizedVideoPipeline

# Parts in the order of training. Each builds on those before it.
SHAPES_PARTS = ("vae", "rewriter", "cache", "text", "base", "composer", "judge", "lora", "distilled")
COUNT = Whole(1, 1_000_000)


def add_shapes(
    commands: argparse._SubParsersAction,
    add_model: Callable[[argparse.ArgumentParser], None],
    load: Callable[[argparse.Namespace], FactorizedVideoPipeline],
) -> None:
    """Adds `shapes` to the commands of `fvg`; `add_model` adds the flags that name a pipeline, and `load` loads it."""
    shapes = commands.add_parser("shapes", help="train or score a model of coloured shapes, as the embedded one is")
    actions = shapes.add_subparsers(dest="action", required=True, metavar="ACTION")
    train = actions.add_parser("train", help="train all parts from scratch; resumes an interrupted training")
    train.add_argument("folder", type=Path, help="folder for checkpoints, logs and the finished repository")
    train.add_argument(
        "--parts",
        nargs="+",
        choices=SHAPES_PARTS,
        default=SHAPES_PARTS,
        metavar="PART",
        help=f"train only these parts, of {', '.join(SHAPES_PARTS)}",
    )
    dreamer = actions.add_parser(
        "dreamer", help="train the shapes model of Factorized-Dreamer; resumes an interrupted training"
    )
    dreamer.add_argument("folder", type=Path, help="folder for checkpoints, logs and the finished repository")
    dreamer.add_argument(
        "--designs",
        nargs="*",
        default=(),
        metavar="DESIGN",
        help="also train these designs for the report, such as no_paca",
    )
    dreamer.add_argument(
        "--design-steps",
        type=COUNT,
        metavar="STEPS",
        default=3000,
        help="training steps of each design (default: %(default)s)",
    )
    dreamer.add_argument(
        "--vae", type=Path, metavar="DIR", help="start from this VAE and train only its decoder to its target score"
    )
    dreamer.add_argument("--report", type=Path, metavar="DIR", help="then score all trained designs (synthetic)")
    clips = actions.add_parser(
        "clips", help="train video models on few distinct clips (see examples/clips); resumes an interrupted training"
    )
    clips.add_argument("folder", type=Path, help="folder for the cache, checkpoints, logs and weights")
    clips.add_argument("--report", type=Path, metavar="DIR", help="score the finished runs instead (synthetic)")
    appended = actions.add_parser(
        "appended",
        help="train an anchor LoRA of each form (see anchor_form) on the embedded base; resumes an interrupted training",
    )
    appended.add_argument(
        "folder", type=Path, help="folder for clips, checkpoints, logs and the LoRAs, in FORM/anchor_lora"
    )
    _add_report(actions, add_model)
    _add_benchmark(actions)
    shapes.set_defaults(run=lambda arguments: _run(arguments, load))


def _add_report(actions: argparse._SubParsersAction, add_model: Callable[[argparse.ArgumentParser], None]) -> None:
    report = actions.add_parser(
        "report",
        help="score a model on held-out prompts, in several arms (variants of the pipeline; synthetic)",
        # argparse does not wrap a mutually exclusive group in the usage line.
        usage="%(prog)s [OPTION ...] folder",
    )
    report.add_argument(
        "folder", type=Path, help="folder for records, JSON, tables and figures; continues existing records"
    )
    add_model(report)
    report.add_argument(
        "--per-category", type=COUNT, metavar="NUMBER", default=9, help="prompts per category (default: %(default)s)"
    )
    report.add_argument("--seeds", type=COUNT, metavar="NUMBER", help="number of seeds (default: 3, with --quick 1)")
    kind = report.add_mutually_exclusive_group()
    kind.add_argument(
        "--quick",
        action="store_true",
        help="make one table instead: three arms at 15 steps, with the model's own guidance",
    )
    kind.add_argument("--storyboard", action="store_true", help="compare several anchors with one instead")
    kind.add_argument(
        "--anchors",
        action="store_true",
        help="measure anchors at both ends, continued clips and colours of anchors instead, with one seed",
    )
    kind.add_argument(
        "--appended",
        metavar="DIR",
        type=Path,
        help="compare anchors at their exact frame instead, with the LoRAs that fvg shapes appended has trained in DIR",
    )
    kind.add_argument("--judge", action="store_true", help="measure the judge of anchors and frozen clips instead")
    kind.add_argument(
        "--ablation",
        nargs="+",
        metavar="NAME=DIR",
        help="compare anchor LoRAs instead: folders with pytorch_lora_weights.safetensors, each at strengths 0.55, 1, 1.4",
    )
    kind.add_argument(
        "--distilled",
        metavar="DIR",
        type=Path,
        help="compare ways of guidance instead, with the guidance-distilled LoRA in DIR",
    )
    kind.add_argument(
        "--window",
        nargs="*",
        metavar="WINDOW=DIR",
        help="measure window attention instead, also with LoRAs trained with a window",
    )


def _add_benchmark(actions: argparse._SubParsersAction) -> None:
    prompts = actions.add_parser("prompts", help="write held-out prompts as a benchmark's files, for fvg bench plan")
    prompts.add_argument("folder", type=Path, help="folder for prompts/ and meta_data/")
    prompts.add_argument(
        "--per-category", type=COUNT, metavar="NUMBER", default=9, help="prompts per category (default: %(default)s)"
    )
    score = actions.add_parser("score", help="score videos of these prompts by their pixels (synthetic)")
    score.add_argument("videos", type=Path, help="folder with a folder for each category")
    score.add_argument("prompts", type=Path, help="output folder of fvg shapes prompts")
    score.add_argument("folder", type=Path, help="folder for a CSV file of each category")
    score.add_argument("--name", default="shapes", help="prefix of the file names (default: %(default)s)")


def _run(arguments: argparse.Namespace, load: Callable[[argparse.Namespace], FactorizedVideoPipeline]) -> None:
    check_folder("FOLDER", arguments.folder)
    if getattr(arguments, "report", None) is not None:
        check_folder("--report", arguments.report)
    if arguments.action == "report":
        _report(arguments, load)
        return
    if arguments.action in ("prompts", "score"):
        _run_benchmark(arguments)
        return
    if arguments.action == "dreamer":
        from ..embedded import EMBEDDED_FOLDER, load_embedded
        from .dreamer import train_dreamer
        from .dreamer_report import write_dreamer_report

        if arguments.vae is not None and not (arguments.vae / "config.json").is_file():
            raise ValueError(f"--vae {arguments.vae}: the folder holds no VAE; give one with a config.json.")
        train_dreamer(arguments.folder, EMBEDDED_FOLDER, arguments.designs, arguments.design_steps, arguments.vae)
        if arguments.report:
            print(write_dreamer_report(load_embedded(), arguments.folder, arguments.report))
        return
    if arguments.action == "clips":
        from .clips import train_clips
        from .clips_report import write_clips_report

        if arguments.report:
            print(write_clips_report(arguments.folder, arguments.report))
        else:
            train_clips(arguments.folder)
        return
    if arguments.action == "appended":
        from .appended import train_appended

        train_appended(arguments.folder)
        return
    from .train import train_all

    train_all(arguments.folder, arguments.parts)


def _run_benchmark(arguments: argparse.Namespace) -> None:
    from .benchmark import score_videos, write_prompts

    if arguments.action == "prompts":
        for category, count in write_prompts(arguments.folder, arguments.per_category).items():
            print(f"{category:24s}{count:5d} prompts")
        return
    means = score_videos(arguments.videos, arguments.prompts, arguments.folder, arguments.name)
    for category, score in means.items():
        print(f"{category:24s}{score:8.3f} (synthetic)")


def _check_lora(flag: str, folder: Path) -> None:
    if not (folder / "pytorch_lora_weights.safetensors").is_file():
        raise ValueError(f"{flag}: No pytorch_lora_weights.safetensors in {folder}.")


def _named_folders(flag: str, name: str, pairs: Sequence[str]) -> dict[str, Path]:
    folders = dict(pair.partition("=")[::2] for pair in pairs)
    for key, path in folders.items():
        if not key or not path:
            raise ValueError(f"{flag} {key}{path}: give {name}=DIR.")
    return {key: Path(path) for key, path in folders.items()}


def _report(arguments: argparse.Namespace, load: Callable) -> None:
    loras = _named_folders("--ablation", "NAME", arguments.ablation or ())
    windows = _named_folders("--window", "WINDOW", arguments.window or ())
    wrong = [window for window in windows if not window.isdecimal()]
    if wrong:
        raise ValueError(f"--window {wrong[0]}={windows[wrong[0]]}: WINDOW must be a number of latent frames.")
    seeds = arguments.seeds if arguments.seeds is not None else 1 if arguments.quick else 3
    for flag, folders in (("--ablation", loras), ("--window", windows)):
        for name, path in folders.items():
            _check_lora(f"{flag} {name}={path}", path)
    if arguments.distilled is not None:
        _check_lora(f"--distilled {arguments.distilled}", arguments.distilled)
    if arguments.appended is not None:
        for form in ("appended", "slot"):
            _check_lora(f"--appended {arguments.appended}", arguments.appended / form / "anchor_lora" / "weights")
    from .ablation import write_ablation
    from .anchors import write_anchors_report
    from .appended import write_appended_report
    from .distillation import write_guidance_report
    from .judge_report import write_judge_report
    from .report import write_quick_report, write_study
    from .storyboard import write_storyboard_report
    from .study import StudySettings
    from .window import write_window_report

    pipe = load(arguments)
    pipe.set_progress_bar_config(disable=True)
    size = {"per_category": arguments.per_category, "seeds": seeds}
    if arguments.quick:
        print(write_quick_report(pipe, arguments.folder, **size))
    elif arguments.storyboard:
        print(write_storyboard_report(pipe, arguments.folder, **size))
    elif arguments.anchors:
        print(write_anchors_report(pipe, arguments.folder, arguments.per_category))
    elif arguments.appended:
        print(write_appended_report(pipe, arguments.folder, arguments.appended, StudySettings(**size)))
    elif arguments.judge:
        print(write_judge_report(pipe, arguments.folder, per_category=arguments.per_category, seeds=seeds))
    elif loras:
        print(write_ablation(pipe, arguments.folder, loras, **size))
    elif arguments.distilled:
        print(write_guidance_report(pipe, arguments.folder, arguments.distilled, **size))
    elif arguments.window is not None:
        trained = {int(window): path for window, path in windows.items()}
        print(write_window_report(pipe, arguments.folder, loras=trained, **size))
    else:
        print(write_study(pipe, arguments.folder, StudySettings(**size)))
