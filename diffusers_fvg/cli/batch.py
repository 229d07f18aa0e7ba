"""`fvg batch`, and the actions `run` and `check` for a folder with a plan."""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import math
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..flags import SEED, Whole, check_folder, folder_or_url, local_folder
from .options import (
    COUNTS,
    add_choosing,
    add_composer,
    add_light_decoder,
    add_lora,
    add_model,
    add_quantize,
    add_rewriter,
    add_sampling,
    add_size,
)
from .pipeline import Model, look


if TYPE_CHECKING:
    from ..evaluation.prompts import PromptRow
    from ..evaluation.storage import Storage
    from ..pipelines.stages import FactorizedStages

ENGINES = ("in-process", "accelerate", "ray")
# Number of distinct calls whose check is remembered.
MAX_SEEN = 100_000
# Flags that give arguments of the call for rows that leave them out.
DEFAULTS: tuple[str, ...]
DEFAULTS = ("mode", "num_moments", "height", "width", "num_frames", "preset", "num_inference_steps", "guidance_scale")
DEFAULTS += ("negative_prompt", "anchor_decode", "composer_num_candidates", "motion_retries")


@dataclass(frozen=True)
class ModelLoad:
    """Loads the model that the flags name; it can be pickled for other processes.

    Args:
        arguments (`argparse.Namespace`): arguments of the command line.
        size (`tuple`, *optional*): height, width and frames of the largest video, for which memory is planned.
    """

    arguments: argparse.Namespace
    size: tuple[int | None, int | None, int | None] = (None, None, None)

    def __call__(self, parts: Collection[str], device: str | None = None) -> FactorizedStages:
        arguments = copy.copy(self.arguments)
        arguments.device = arguments.device or device
        skipped = {part: False for part in ("rewriter", "composer", "lora") if part not in parts}
        if "video" in parts:
            pipe = look(arguments, **skipped).load(*self.size)
        else:
            (part,) = parts
            # The other components stay without weights and only check the call.
            model = look(arguments, lora=False)
            pipe = model.load_part(part)
            if part == "composer" and model.source.has("anchor_judge"):
                model.load_part("anchor_judge")
        # The run has its own progress bar.
        pipe.set_progress_bar_config(disable=True)
        return pipe


def add_batch(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "batch", help="make a folder of videos from a file of prompts; continues where it stopped"
    )
    parser.add_argument(
        "prompts", type=Path, metavar="PROMPTS", help="txt (one prompt per line), csv, jsonl or parquet"
    )
    parser.add_argument(
        "folder",
        type=folder_or_url,
        metavar="OUT",
        help="folder for plan, videos and manifest, or a URL that fsspec opens, such as s3://bucket/folder",
    )
    parser.add_argument(
        "--num-videos-per-prompt",
        type=COUNTS,
        default=1,
        metavar="NUMBER",
        help="videos per prompt, each with its own first frame",
    )
    parser.add_argument(
        "--seed",
        type=SEED,
        default=0,
        metavar="NUMBER",
        help="seed from which the seeds of all videos are derived (default: %(default)s)",
    )
    parser.add_argument(
        "--label",
        action="append",
        default=[],
        metavar="COLUMN",
        help="column of the file to store with the video; repeatable",
    )
    parser.add_argument("--mode", choices=("factorized", "direct", "storyboard"), help="mode of rows that give none")
    parser.add_argument(
        "--num-moments", type=Whole(2, 100), metavar="NUMBER", help="maximum number of moments of a storyboard"
    )
    parser.add_argument(
        "--negative-prompt", metavar="TEXT", help="negative prompt of the video model (default: the model's own)"
    )
    parser.add_argument("--anchor-decode", choices=("raw", "match", "replace"), help="as in fvg generate")
    add_choosing(parser)
    add_size(parser)
    add_sampling(parser)
    add_run_flags(parser)
    parser.add_argument("--plan-only", action="store_true", help="check the file and write the plan; make no video")
    parser.set_defaults(run=_batch)


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for the model and for the engine."""
    add_model(parser)
    add_rewriter(parser)
    add_composer(parser)
    add_lora(parser)
    add_quantize(parser)
    add_light_decoder(parser)
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="in-process",
        help="in-process makes one video after the other; accelerate makes several at a time on this machine; ray uses the cluster "
        "in RAY_ADDRESS, or starts one on this machine (default: %(default)s)",
    )
    for flag, what in (
        ("--num-processes", "processes that make videos"),
        ("--num-rewriters", "workers that write captions, with --engine ray"),
        ("--num-composers", "workers that draw first frames, with --engine ray"),
    ):
        parser.add_argument(flag, type=COUNTS, default=1, metavar="NUMBER", help=f"{what} (default: %(default)s)")


def add_run(actions: argparse._SubParsersAction) -> None:
    """Adds the action `run`, which makes the videos of a plan."""
    parser = actions.add_parser("run", help="make the videos of a plan; continues where it stopped")
    parser.add_argument("folder", type=local_folder, metavar="RUN", help="folder with a plan")
    add_run_flags(parser)
    parser.set_defaults(run=run_folder)


def add_check(actions: argparse._SubParsersAction) -> None:
    """Adds the action `check`, which checks the videos of a plan."""
    parser = actions.add_parser("check", help="find missing, damaged, short, black, still, repeated and stray files")
    parser.add_argument(
        "folder", type=folder_or_url, metavar="RUN", help="folder or URL with a plan, from fvg batch or fvg bench"
    )
    parser.add_argument(
        "--min-frames",
        type=Whole(1, 100_000),
        default=1,
        metavar="FRAMES",
        help="fewest frames that an evaluator needs (default: %(default)s)",
    )
    parser.set_defaults(run=check_run)


# -- what they do -----------------------------------------------------------------------------------------------------


class CallChecks:
    """Checks the calls of a plan against a model before any weights are read.

    Args:
        arguments (`argparse.Namespace`): arguments of the command line.
        parts (collection of `str`): components that the calls together need.
    """

    def __init__(self, arguments: argparse.Namespace, parts: Collection[str]):
        self.model = look(arguments, **({} if "lora" in parts else {"lora": False}))
        if self.model.parts["lora"]:
            self._find_lora()
        self.largest: tuple[int | None, int | None, int | None] = (None, None, None)
        self._known = inspect.signature(type(self.model.outline).__call__).parameters
        self._seen: set[str] = set()

    def _find_lora(self) -> None:
        """Raises `ValueError` or `OSError` for a missing anchor LoRA, which nothing else would notice without weights."""
        from ..recipes.loading import hub_options, pinned

        pinned(self.model.parts["lora"], "The anchor LoRA", hub_options(self.model.arguments.token or None))

    def check(self, prompt: str, arguments: dict[str, Any]) -> None:
        """Raises `ValueError` or `OSError` for a call that the model does not accept."""
        from ..checks import check_texts
        from ..evaluation.worker import REWRITER, call_of, parts_of

        unknown = next((name for name in arguments if name not in self._known), None)
        if unknown is not None:
            raise ValueError(f"`{unknown}` is not an argument of {type(self.model.outline).__name__}; leave it out.")
        check_texts("prompt", [prompt])
        self.model.outline._check_known([prompt], writes=REWRITER in parts_of(arguments))
        # Many videos differ only in their prompts.
        key = json.dumps(arguments, sort_keys=True)
        if key in self._seen:
            return
        request = self.model.check(**call_of(prompt, arguments))
        size = (request.height, request.width, request.num_frames)
        self.largest = max(self.largest, size, key=_pixels)
        if len(self._seen) < MAX_SEEN:
            self._seen.add(key)


def _pixels(size: tuple[int | None, int | None, int | None]) -> int:
    return math.prod(side or 0 for side in size)


def _batch(arguments: argparse.Namespace) -> None:
    from ..evaluation.plan import write_plan
    from ..evaluation.prompts import planned_videos, read_prompts
    from ..evaluation.storage import opened
    from ..evaluation.worker import parts_of

    defaults = {name: getattr(arguments, name) for name in DEFAULTS if getattr(arguments, name) is not None}
    calls = (defaults | row.arguments for row in read_prompts(arguments.prompts, arguments.label))
    checks = CallChecks(arguments, frozenset().union(*map(parts_of, calls)))

    def checked() -> Iterator[PromptRow]:
        for row in read_prompts(arguments.prompts, arguments.label):
            try:
                checks.check(row.prompt, defaults | row.arguments)
            except (ValueError, OSError) as error:
                raise ValueError(f"{row.place}: {error}") from error
            yield row

    videos = planned_videos(checked(), arguments.seed, arguments.num_videos_per_prompt, defaults)
    with opened(arguments.folder) as (folder, storage):
        check_folder("OUT", folder)
        plan = write_plan(folder, videos, {"seed": arguments.seed})
        if storage is not None:
            storage.add_facts()
        print(f"plan:               {plan['videos']} videos in {arguments.folder}")
        if not arguments.plan_only:
            _run(arguments, checks, folder, storage)


def run_folder(arguments: argparse.Namespace) -> None:
    """Makes the videos of the plan in `arguments.folder`."""
    from ..evaluation.plan import read_plan
    from ..evaluation.worker import parts_of

    folder = arguments.folder
    checks = CallChecks(arguments, frozenset().union(*(parts_of(row.arguments) for row in read_plan(folder))))
    for number, row in enumerate(read_plan(folder), 1):
        try:
            checks.check(row.prompt, row.arguments)
        except (ValueError, OSError) as error:
            raise ValueError(f"{folder / 'plan.jsonl'}, line {number}: {error}") from error
    _run(arguments, checks, folder)


def _run(arguments: argparse.Namespace, checks: CallChecks, folder: Path, storage: Storage | None = None) -> None:
    from ..evaluation.run import run_plan

    given = {name: value for name, value in vars(arguments).items() if not callable(value)}
    load = ModelLoad(argparse.Namespace(**given), checks.largest)
    summary = run_plan(
        folder,
        load,
        _made_by(arguments, checks.model),
        arguments.engine,
        num_processes=arguments.num_processes,
        num_rewriters=arguments.num_rewriters,
        num_composers=arguments.num_composers,
        quiet=arguments.quiet,
        storage=storage,
    )
    print(
        f"videos:             {summary.finished} of {summary.planned} are finished, {summary.made} of them in this run"
    )
    if summary.finished < summary.planned:
        for path, error in summary.failures:
            print(f"  {path}: {error}")
        raise ValueError(
            f"{summary.planned - summary.finished} of {summary.planned} videos are missing; run the same command to try again."
        )


def _made_by(arguments: argparse.Namespace, model: Model) -> dict[str, Any]:
    """Returns the facts that identify the model, without local paths."""
    from ..pipelines.record import model_name, versions

    names = {
        name: getattr(arguments, name) for name in ("composer", "lora", "rewriter", "rewriter_model", "light_decoder")
    }
    names = {name: model_name(value.rpartition("://")[2]) for name, value in names.items() if value is not None}
    kinds = {name: getattr(arguments, name) for name in ("dtype", "quantize", "variant") if getattr(arguments, name)}
    name = "embedded" if arguments.model is None else model_name(arguments.model)
    revision = model.source.commit or arguments.revision
    return {"model": name, "revision": revision, **names, **kinds, "versions": versions()}


def check_run(arguments: argparse.Namespace) -> None:
    """Prints the faults in `arguments.folder`; raises `ValueError` if there are any."""
    from ..evaluation.check import check_folder as found_in
    from ..evaluation.storage import opened

    counts: Counter[str] = Counter()
    with opened(arguments.folder) as (folder, storage):
        for finding in found_in(folder, arguments.min_frames, storage):
            counts[finding.kind] += finding.is_fault
            print(f"{finding.kind:15} {finding.path}: {finding.reason}")
    faults = {kind: count for kind, count in counts.items() if count}
    if faults:
        listed = ", ".join(f"{count} {kind}" for kind, count in faults.items())
        raise ValueError(
            f"{listed}. Remove damaged and black files and run the plan again to make the missing videos."
        )
    print("all videos of the plan are present and complete")
