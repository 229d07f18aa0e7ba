"""`fvg generate`, `rewrite`, `compose` and `animate`: run all stages, or one."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import naming, replacing
from ..flags import Number, Whole, check_file, check_folder, file_name, free_name
from .again import Again, add_from, take_over
from .options import (
    add_choosing,
    add_composer,
    add_lora,
    add_model,
    add_overwrite,
    add_quantize,
    add_rewriter,
    add_seed,
    add_size,
    add_video,
)
from .output import check_stages, save_stages, stages_draft, write
from .pipeline import Model, look


if TYPE_CHECKING:
    from ..pipelines.request import VideoRequest


def add_generate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("generate", help="make a video from a prompt, with all three stages")
    parser.add_argument("prompt", nargs="?", help="prompt of the video; optional with --from")
    add_generation(parser)
    parser.set_defaults(run=_generate)


def add_generation(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for the model, the stages, their settings and the output files."""
    add_from(parser)
    _add_call(parser)
    add_lora(parser)
    add_video(parser)
    add_seed(parser)
    add_choosing(parser)
    parser.add_argument("--motion-prompt", metavar="TEXT", help="text for the video model instead of the prompt")
    parser.add_argument(
        "--rewriter-motion",
        action="store_true",
        default=None,
        help="let stage 1 also write the motion prompt, with the same names of objects as in the first frame",
    )
    parser.add_argument(
        "--save-stages", type=Path, metavar="DIR", help="also write caption, anchor and frames into this folder"
    )


def _add_call(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_rewriter(parser)
    add_composer(parser)
    add_quantize(parser)
    add_size(parser)
    parser.add_argument(
        "--mode",
        choices=("factorized", "direct", "storyboard"),
        help="factorized draws the first frame (the default), storyboard also draws later ones, direct is plain text-to-video",
    )
    parser.add_argument(
        "--num-moments",
        type=Whole(2, 100),
        metavar="NUMBER",
        help="maximum number of moments of a storyboard (default: 2)",
    )
    parser.add_argument("--first-frame-prompt", metavar="TEXT", help="caption of the first frame; skips stage 1")
    parser.add_argument("--image", type=file_name, metavar="FILE", help="anchor image; skips stages 1 and 2")


def add_rewrite(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("rewrite", help="stage 1: write the first-frame prompt of a prompt; deterministic")
    parser.add_argument("prompt", nargs="+", help="prompt of the video; each prompt gives one line")
    add_model(parser)
    add_rewriter(parser)
    parser.set_defaults(run=_rewrite)


def add_compose(commands: argparse._SubParsersAction) -> None:
    what = "stage 2: draw the anchor image of a first-frame prompt, the best of several if the model has a judge"
    parser = commands.add_parser("compose", help=what)
    parser.add_argument("first_frame_prompt", help="caption of the first frame")
    add_model(parser)
    add_composer(parser)
    add_size(parser)
    add_seed(parser)
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="PNG to write (default: anchor.png, or the next free anchor-2.png)"
    )
    add_overwrite(parser)
    parser.add_argument(
        "--num-inference-steps",
        "--steps",
        type=Whole(1, 1000),
        metavar="STEPS",
        help="steps of the text-to-image model (default: its own)",
    )
    parser.add_argument(
        "--num-candidates",
        type=Whole(1, 1000),
        metavar="NUMBER",
        help="maximum number of pictures to draw, of which the judge keeps the best (default: the model's own; 1 without a judge)",
    )
    parser.set_defaults(run=_compose)


def add_animate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("animate", help="stage 3: make a video from a prompt and an anchor image")
    parser.add_argument("prompt", help="prompt of the video")
    parser.add_argument("--image", type=file_name, required=True, metavar="FILE", help="anchor image")
    parser.add_argument(
        "--frame-index",
        type=Whole(-1_000_000, 1_000_000),
        metavar="INDEX",
        default=0,
        help="frame of the video that shows the image: 0 is the first, -1 the last (default: %(default)s)",
    )
    parser.add_argument(
        "--strength",
        type=Number(0, 1, above=True),
        default=1.0,
        help="in (0, 1]; below 1 the video may deviate from the image (default: %(default)s)",
    )
    add_model(parser)
    add_lora(parser)
    add_quantize(parser)
    add_size(parser)
    add_video(parser)
    add_seed(parser)
    parser.set_defaults(run=_animate)


# -- what they do -----------------------------------------------------------------------------------------------------


def open_image(path: Path):
    """Opens the picture in `--image`, or the first frame of a video, upright and opaque."""
    from ..animate.frames import first_frame

    try:
        return first_frame(path)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"--image {path} cannot be read ({error}); give a PNG or JPEG file, or a video.") from error


def check_outputs(arguments: argparse.Namespace, default: str, suffix: str) -> None:
    """Checks the output paths before minutes of work."""
    if arguments.output is None:
        arguments.output = Path(default) if arguments.overwrite else free_name(Path(default))
    check_file("--output", arguments.output, suffix, arguments.overwrite)
    check_file("--strip", getattr(arguments, "strip", None), ".png", arguments.overwrite)
    folder = getattr(arguments, "save_stages", None)
    if folder is not None:
        check_stages(folder, arguments.overwrite)
        check_folder("--save-stages", folder)


def _drawn_seed(arguments: argparse.Namespace) -> int:
    import secrets

    return secrets.randbelow(2**31) if arguments.seed is None else arguments.seed


def needed_parts(arguments: argparse.Namespace) -> dict[str, bool]:
    """Returns `False` for each component that a run does not need; raises `ValueError` for a flag without effect."""
    _check_effects(arguments)
    if arguments.mode == "direct":
        skipped = {"composer": False, "rewriter": False}
        return skipped if getattr(arguments, "lora", None) is not None else skipped | {"lora": False}
    if arguments.image is not None:
        return {"composer": False, "rewriter": False}
    return {"rewriter": False} if arguments.first_frame_prompt is not None else {}


def _check_effects(arguments: argparse.Namespace) -> None:
    if getattr(arguments, "source", None) is not None:
        return  # `again.py` checks the flags against the record.
    captioned, pictured = arguments.first_frame_prompt is not None, arguments.image is not None
    causes = {"--mode direct": arguments.mode == "direct", "--image": pictured, "--first-frame-prompt": captioned}
    skipping = [cause for cause, is_given in causes.items() if is_given]
    if skipping and arguments.rewriter is not None:
        raise ValueError(f"--rewriter has no effect: {skipping[0]} skips stage 1. Leave one of them out.")
    if skipping and skipping[0] != "--first-frame-prompt" and arguments.composer is not None:
        raise ValueError(f"--composer has no effect: {skipping[0]} skips stage 2. Leave one of them out.")
    if arguments.num_moments is not None and arguments.mode != "storyboard":
        raise ValueError(f"--num-moments {arguments.num_moments} has no effect without --mode storyboard.")


SAMPLING = ("height", "width", "num_frames", "preset", "num_inference_steps", "guidance_scale", "negative_prompt")


def call_of(arguments: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """Returns the arguments of the pipeline's call that were given."""
    values = {name: getattr(arguments, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _generator(seed: int) -> dict[str, Any]:
    import torch

    return {"generator": torch.Generator().manual_seed(seed), "output_type": "np"}


@dataclass(frozen=True)
class Look:
    """A run of all stages before its model is loaded.

    Args:
        model ([`Model`]): model that the flags or the record name.
        request ([`VideoRequest`]): completed request of the call.
        call (`dict`): arguments of the call that come from flags.
        again ([`Again`], *optional*): video to repeat.
    """

    model: Model
    request: VideoRequest
    call: dict[str, Any]
    again: Again | None


def look_at(arguments: argparse.Namespace, needs_prompt: bool = True) -> Look:
    """Finds the model and checks the call of `fvg generate` before weights are read.

    Raises:
        `ValueError` or `OSError`: the flags are not valid.
    """
    check_outputs(arguments, "video.mp4", ".mp4")
    image = open_image(arguments.image) if arguments.image else None
    names = ("anchor_decode", "mode", "num_moments", "composer_num_candidates", "motion_retries")
    texts = ("prompt", "first_frame_prompt", "motion_prompt", "rewriter_motion")
    call = call_of(arguments, (*texts, *SAMPLING, *names))
    call |= {} if image is None else {"image": image}
    again = None if arguments.source is None else take_over(arguments, call)
    if needs_prompt and again is None and arguments.prompt is None:
        raise ValueError("give a prompt, or --from VIDEO to repeat a video.")
    skipped = needed_parts(arguments)
    if not needs_prompt and arguments.lora is None:
        # The text of the plan mentions a missing LoRA.
        skipped["lora"] = False
    model = look(arguments, **skipped)
    wanted = dict(call if again is None else again.call)
    if again is None and arguments.prompt is None:
        # Any prompt will do: its length has no effect on the plan.
        model.outline.prompt_check, wanted["prompt"] = None, "a prompt"
    return Look(model, model.check(**wanted), call, again)


def _generate(arguments: argparse.Namespace) -> None:
    looked = look_at(arguments)
    with stages_draft(arguments.save_stages, arguments.overwrite) as draft:
        _make(arguments, looked, draft)
    if draft is not None:
        print(f"stages:             {arguments.save_stages}")


def _make(arguments: argparse.Namespace, looked: Look, stages: Path | None) -> None:
    model, request, call, again = looked.model, looked.request, looked.call, looked.again
    image = call.get("image")
    pipe = model.load(request.height, request.width, request.num_frames)
    draws = _generator(_drawn_seed(arguments)) if again is None or arguments.seed is not None else {}
    output = pipe(**call, **draws) if again is None else again.make(pipe, draws)
    record = output.records[0]
    caption = captions = record["first_frame_prompt"]
    anchor = output.anchor_images[0] if output.anchor_images else image
    print(f"prompt:             {record['prompt']}")
    if caption:
        print(f"first-frame prompt: {caption}")
    if output.storyboards:
        captions = [moment.caption for moment in output.storyboards[0]]
        for moment in output.storyboards[0][1:]:
            print(f"{f'moment at {moment.time:.0%}:':19s} {moment.caption}")
    if output.motion_prompts:
        print(f"motion prompt:      {output.motion_prompts[0]}")
    print(f"seeds:              {_shown(output.seeds[0])}")
    print("seconds:            " + ", ".join(f"{name} {value:.1f}" for name, value in output.timings.items()))
    write(arguments, pipe, output, captions, anchor)
    if stages is not None:
        facts = {"timings": output.timings, "motion": output.motion and output.motion[0]}
        candidates = output.candidates and output.candidates[0]
        with naming(arguments.save_stages):
            save_stages(stages, record | facts, anchor, output.frames[0], candidates)


def _shown(seeds: dict[str, Any]) -> dict[str, Any]:
    """Returns seeds for printing, without a generator's state of several thousand characters."""
    video = seeds["video"]
    is_state = isinstance(video, dict) and "state" in video
    return seeds | {"video": video | {"state": "in the file"}} if is_state else seeds


def _rewrite(arguments: argparse.Namespace) -> None:
    from ..checks import check_texts

    check_texts("prompt", arguments.prompt)
    model = look(arguments, composer=False, lora=False)
    if arguments.rewriter is not None:
        model.outline.prompt_check = None
    for caption in model.load_part("rewriter").rewrite(arguments.prompt):
        print(caption)


def _compose(arguments: argparse.Namespace) -> None:
    from ..checks import check_texts
    from ..pipelines.candidates import candidate_count

    check_outputs(arguments, "anchor.png", ".png")
    check_texts("first_frame_prompt", [arguments.first_frame_prompt])
    model = look(arguments, rewriter=False, lora=False)
    candidate_count(model.outline, arguments.num_candidates, "--num-candidates")
    size = [model.outline.call_defaults[name] if value is None else value for name, value in _size(arguments)]
    model.outline._check_size(*size)
    pipe, seed = model.load_part("composer"), _drawn_seed(arguments)
    if pipe.anchor_judge is not None:
        model.load_part("anchor_judge")
    options = {"num_inference_steps": arguments.num_inference_steps, "generator": _generator(seed)["generator"]}
    options["num_candidates"] = candidate_count(pipe, arguments.num_candidates)
    image = pipe.compose(arguments.first_frame_prompt, *size, **options)[0]
    # Another process may have written the file meanwhile.
    path = arguments.output if arguments.overwrite else free_name(arguments.output)
    with replacing(path) as draft:
        image.save(draft, format="PNG")
    print(f"seed:               {seed}\nanchor:             {path}")


def _size(arguments: argparse.Namespace) -> list[tuple[str, int | None]]:
    return [(name, getattr(arguments, name)) for name in ("height", "width")]


def _animate(arguments: argparse.Namespace) -> None:
    from .. import Anchor

    check_outputs(arguments, "video.mp4", ".mp4")
    image = open_image(arguments.image)
    call = call_of(arguments, (*SAMPLING, "anchor_decode"))
    call |= {"anchors": [Anchor(image, arguments.frame_index, arguments.strength)]}
    model: Model = look(arguments, composer=False, rewriter=False)
    request = model.check(prompt=arguments.prompt, **call)
    pipe, seed = model.load(request.height, request.width, request.num_frames), _drawn_seed(arguments)
    output = pipe(arguments.prompt, **call, **_generator(seed))
    print(f"prompt:             {arguments.prompt}")
    print(f"seeds:              {output.seeds[0]}")
    write(arguments, pipe, output, None, image)
