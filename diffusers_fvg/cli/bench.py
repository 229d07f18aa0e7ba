"""`fvg bench`: published benchmarks, from the prompts to the files for their leaderboards."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..flags import FRAMES, PIXELS, STEPS, Number, Whole, check_folder, local_folder
from .batch import add_check, add_run


SUITE_NAMES = ("t2v-compbench-v1", "t2v-compbench-v2", "vbench-2.0", "evalcrafter", "vbench-i2v", "shapes")
COUNT = Whole(1, 1_000_000)


def add_bench(commands: argparse._SubParsersAction) -> None:
    bench = commands.add_parser("bench", help="published benchmarks: plan, run, check, lay out, score, read, report")
    actions = bench.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_plan(actions)
    add_run(actions)
    add_check(actions)
    _add_layout(actions)
    _add_results(actions)


def suites() -> dict:
    """Returns the benchmarks by name."""
    from ..evaluation.suites import PUBLISHED
    from ..shapes.benchmark import SHAPES

    return {suite.name: suite for suite in (*PUBLISHED, SHAPES)}


def _add_plan(actions: argparse._SubParsersAction) -> None:
    plan = actions.add_parser(
        "plan", help="plan the videos of a suite with one or more arms (variants of the pipeline)"
    )
    plan.add_argument("folder", type=local_folder, metavar="RUN", help="folder for the plan and the videos")
    plan.add_argument("--suite", required=True, choices=SUITE_NAMES, metavar="NAME", help=", ".join(SUITE_NAMES))
    plan.add_argument(
        "--prompts", type=Path, required=True, metavar="DIR", help="checkout of the benchmark, or its published files"
    )
    plan.add_argument(
        "--arms",
        nargs="+",
        metavar="ARM",
        help="variants of the pipeline: direct, direct_upsampled, factorized, factorized_judged, optionally with @PRESET, such as "
        "direct@full-50 (default: factorized; for vbench-i2v: image)",
    )
    plan.add_argument(
        "--steps", nargs="+", type=STEPS, default=(), metavar="STEPS", help="numbers of steps, for each arm"
    )
    plan.add_argument(
        "--seeds",
        nargs="+",
        type=Whole(0, 2**31),
        default=(0,),
        metavar="SEED",
        help="seeds, each for a set of all videos (default: 0)",
    )
    plan.add_argument("--upsampled", type=Path, metavar="FILE", help="prompts of direct_upsampled, one per line")
    plan.add_argument(
        "--categories", nargs="+", metavar="NAME", help="only these categories; the totals are then not official"
    )
    plan.add_argument(
        "--per-category",
        type=COUNT,
        metavar="NUMBER",
        help="only the first prompts of each category; the totals are then not official",
    )
    plan.add_argument(
        "--ratio", help="aspect ratio of the pictures of vbench-i2v: 1-1, 8-5, 7-4 or 16-9 (default: 16-9)"
    )
    plan.add_argument(
        "--num-candidates",
        type=Whole(2, 64),
        metavar="NUMBER",
        help="pictures for each video of factorized_judged (default: 4)",
    )
    for flag, kind in (("--num-frames", FRAMES), ("--height", PIXELS), ("--width", PIXELS)):
        plan.add_argument(flag, type=kind, metavar="NUMBER", help="for every video (default: the model's own)")
    plan.add_argument(
        "--guidance-scale", type=Number(0, 1000), metavar="SCALE", help="guidance scale (default: the preset's)"
    )
    plan.set_defaults(run=_plan)


def _add_layout(actions: argparse._SubParsersAction) -> None:
    layout = actions.add_parser("layout", help="link the videos where the official evaluator looks for them")
    layout.add_argument("folder", type=local_folder, metavar="RUN", help="folder of the run")
    layout.add_argument(
        "layout", type=Path, metavar="LAYOUT", help="folder for the links, one folder per arm and seed"
    )
    layout.add_argument(
        "--skip-missing",
        action="store_true",
        help="leave out missing videos, for evaluators that do so too",
    )
    layout.add_argument(
        "--lmms-eval", action="store_true", help="use the file names of lmms-eval's task vbench2; only for vbench-2.0"
    )
    layout.set_defaults(run=_layout)
    commands = actions.add_parser("commands", help="write scripts that install the official evaluator and run it")
    commands.add_argument("layout", type=Path, metavar="LAYOUT", help="folder made by fvg bench layout")
    commands.add_argument(
        "checkout", type=Path, metavar="CHECKOUT", help="checkout of the evaluator; cloned if it is missing"
    )
    commands.add_argument(
        "results", type=Path, metavar="RESULTS", help="folder for environment.sh, evaluate.sh and the results"
    )
    commands.set_defaults(run=_commands)


def _add_results(actions: argparse._SubParsersAction) -> None:
    read = actions.add_parser(
        "read", help="read the official result files; reports problems that make a total unofficial"
    )
    read.add_argument("results", type=Path, metavar="RESULTS", help="folder with one folder of results per model")
    read.add_argument(
        "--suite", choices=SUITE_NAMES, metavar="NAME", help="suite of a folder that fvg bench commands did not make"
    )
    read.add_argument("--output", type=Path, metavar="FILE", help="JSON to write (default: RESULTS/scores.json)")
    read.set_defaults(run=_read)
    pack = actions.add_parser("pack", help="write the zip file for a leaderboard")
    pack.add_argument("results", type=Path, metavar="RESULTS", help="official result files of one model")
    pack.add_argument("output", type=Path, metavar="ZIP", help="file to write, ending in .zip")
    pack.add_argument("--suite", required=True, choices=SUITE_NAMES, metavar="NAME", help=", ".join(SUITE_NAMES))
    pack.add_argument("--name", required=True, help="name of the model on the leaderboard")
    pack.set_defaults(run=_pack)
    report = actions.add_parser("report", help="write one HTML page and one Markdown table")
    report.add_argument("folder", type=local_folder, metavar="RUN", help="folder of the run")
    report.add_argument("report", type=Path, metavar="REPORT", help="folder for report.html and report.md")
    report.add_argument("--scores", type=Path, metavar="FILE", help="file written by fvg bench read")
    report.add_argument(
        "--baseline", metavar="ARM", help="arm to compare the others with (default: the first of the plan)"
    )
    report.add_argument(
        "--gallery",
        type=Whole(0, 500),
        default=8,
        metavar="NUMBER",
        help="number of prompts to show (default: %(default)s)",
    )
    report.set_defaults(run=_report)


# -- what they do -----------------------------------------------------------------------------------------------------


def _plan(arguments: argparse.Namespace) -> None:
    from ..evaluation.plan import write_plan
    from ..evaluation.suites.arms import chosen_prompts, conditions_of, plan_videos, read_upsampled, suite_facts

    check_folder("RUN", arguments.folder)
    suite = suites()[arguments.suite]
    _check_effects(arguments, suite.has_images)
    prompts = suite.read_prompts(arguments.prompts, arguments.ratio)
    chosen = chosen_prompts(prompts, arguments.categories, arguments.per_category)
    arms = arguments.arms or ["image" if suite.has_images else "factorized"]
    conditions = conditions_of(suite, arms, arguments.steps)
    upsampled = None if arguments.upsampled is None else read_upsampled(arguments.upsampled, len(prompts))
    names = ("num_frames", "height", "width", "guidance_scale")
    call = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    videos = plan_videos(suite, chosen, conditions, arguments.seeds, call, upsampled, arguments.num_candidates)
    facts = suite_facts(suite, prompts)
    made = write_plan(arguments.folder, videos, facts)
    print(f"suite:              {suite.title} ({suite.source})")
    print(f"prompts:            {len(chosen)} of {len(prompts)}{_as_checked(facts)}")
    print(f"arms:               {', '.join(condition.name for condition in conditions)}")
    print(f"seeds:              {', '.join(map(str, arguments.seeds))}")
    print(f"videos:             {made['videos']}")


def _check_effects(arguments: argparse.Namespace, has_images: bool) -> None:
    """Raises `ValueError` for a flag that would have no effect."""
    arms = [arm.partition("@")[0] for arm in arguments.arms or ()]
    for flag, value, needed, has_effect in (
        ("--ratio", arguments.ratio, "--suite vbench-i2v", has_images),
        ("--upsampled", arguments.upsampled, "--arms direct_upsampled", "direct_upsampled" in arms),
        ("--num-candidates", arguments.num_candidates, "--arms factorized_judged", "factorized_judged" in arms),
    ):
        if value is not None and not has_effect:
            raise ValueError(f"{flag} {value} has no effect without {needed}.")


def _as_checked(facts: dict) -> str:
    known = {True: ", equal to the checked version", False: "; they differ from the checked version", None: ""}
    return known[facts["prompts_as_checked"]]


def _layout(arguments: argparse.Namespace) -> None:
    from ..evaluation.plan import plan_facts
    from ..evaluation.suites.layout import lay_out, lmms_eval_places

    suite = plan_facts(arguments.folder).get("suite")
    if arguments.lmms_eval and suite != "vbench-2.0":
        raise ValueError(
            f"--lmms-eval is only for vbench-2.0, but {arguments.folder} is a run of {suite}; leave it out."
        )
    places = lmms_eval_places if arguments.lmms_eval else None
    counts = lay_out(arguments.folder, arguments.layout, suites(), arguments.skip_missing, places)
    for folder, count in counts.items():
        print(f"{count:6d} files in {arguments.layout / folder}")


def _commands(arguments: argparse.Namespace) -> None:
    from ..evaluation.suites.commands import write_commands
    from ..evaluation.suites.layout import layout_facts

    suite = suites()[layout_facts(arguments.layout)["suite"]]
    for path in write_commands(suite, arguments.layout, arguments.checkout, arguments.results):
        print(path)


def _read(arguments: argparse.Namespace) -> None:
    from ..evaluation.suites.commands import results_of
    from ..evaluation.suites.scores import write_scores

    name, folders = results_of(arguments.results, arguments.suite)
    scores = {model: suites()[name].read_scores(folder) for model, folder in folders.items()}
    output = arguments.output or arguments.results / "scores.json"
    write_scores(output, scores)
    for model, own in scores.items():
        print(f"{model}{' (synthetic)' if own.synthetic else ''}")
        for category, value in own.categories.items():
            print(
                f"  {category:34s}{'-' if value.score is None else f'{value.score:.4f}':>8s}{len(value.videos):7d} videos"
            )
        for total, value in own.totals.items():
            print(f"  {total:34s}{value:8.4f}")
        for problem in own.problems:
            print(f"  no total: {problem}")
        for note in own.notes:
            print(f"  note: {note}")
    print(f"scores:             {output}")


def _pack(arguments: argparse.Namespace) -> None:
    suite = suites()[arguments.suite]
    if suite.pack is None:
        raise ValueError(f"--suite {suite.name} has no leaderboard that accepts files; choose another suite.")
    if arguments.output.suffix != ".zip":
        raise ValueError(f"ZIP {arguments.output} must end in .zip.")
    missing = suite.pack(arguments.results, arguments.output, arguments.name)
    print(f"file:               {arguments.output}")
    if missing:
        print(f"not in it:          {', '.join(missing)}")


def _report(arguments: argparse.Namespace) -> None:
    from ..evaluation.report.page import write_report

    given = (arguments.scores, arguments.baseline, arguments.gallery)
    for path in write_report(arguments.folder, arguments.report, suites(), *given):
        print(path)
