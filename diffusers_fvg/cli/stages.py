"""`fvg generate`, `rewrite`, `compose` and `animate`: all stages, or one."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from .options import add_composer, add_lora, add_model, add_rewriter, add_video
from .output import check_outputs, save_stages, write
from .pipeline import load_pipeline


def add_generate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("generate", help="a prompt becomes a video, through all three stages")
    parser.add_argument("prompt")
    add_model(parser)
    add_rewriter(parser)
    add_composer(parser)
    add_lora(parser)
    add_video(parser)
    parser.add_argument("--mode", choices=("factorized", "direct", "storyboard"), default="factorized")
    parser.add_argument("--num-moments", type=int, default=2, help="of a storyboard, at most (default: %(default)s)")
    parser.add_argument("--first-frame-prompt", help="skips stage 1")
    parser.add_argument("--image", type=Path, help="anchor image; skips stages 1 and 2")
    parser.add_argument("--save-stages", type=Path, metavar="DIR", help="also write caption, anchor and frames there")
    parser.set_defaults(run=_generate)


def add_rewrite(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("rewrite", help="stage 1: prompt to first-frame prompt")
    parser.add_argument("prompt", nargs="+")
    add_model(parser)
    add_rewriter(parser)
    add_lora(parser)
    parser.set_defaults(run=_rewrite)


def add_compose(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("compose", help="stage 2: first-frame prompt to anchor image")
    parser.add_argument("first_frame_prompt")
    add_model(parser)
    add_composer(parser)
    add_lora(parser)
    parser.add_argument("--output", type=Path, default=Path("anchor.png"), help="PNG to write (default: %(default)s)")
    parser.add_argument("--num-inference-steps", "--steps", type=int, help="steps of the text-to-image model")
    parser.set_defaults(run=_compose)


def add_animate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("animate", help="stage 3: prompt and anchor image to video")
    parser.add_argument("prompt")
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--frame-index", type=int, default=0, help="frame that the image is (default: %(default)s)")
    parser.add_argument("--strength", type=float, default=1.0, help="in (0, 1] (default: %(default)s)")
    add_model(parser)
    add_lora(parser)
    add_video(parser)
    parser.set_defaults(run=_animate)


def _generate(arguments: argparse.Namespace) -> None:
    check_outputs(arguments)
    image = _open_image(arguments.image) if arguments.image else None
    pipe, seed = load_pipeline(arguments), _seed(arguments)
    output = pipe(
        arguments.prompt,
        mode=arguments.mode,
        num_moments=arguments.num_moments,
        first_frame_prompt=arguments.first_frame_prompt,
        image=image,
        **_video_options(arguments, seed),
    )
    caption = captions = output.first_frame_prompts[0] if output.first_frame_prompts else None
    anchor = output.anchor_images[0] if output.anchor_images else image
    print(f"prompt:             {arguments.prompt}")
    if caption:
        print(f"first-frame prompt: {caption}")
    record = {"prompt": arguments.prompt, "first_frame_prompt": caption, "seeds": output.seeds[0]}
    if output.storyboards:
        record["storyboard"] = [asdict(moment) for moment in output.storyboards[0]]
        captions = [moment.caption for moment in output.storyboards[0]]
        for moment in output.storyboards[0][1:]:
            print(f"{f'moment at {moment.time:.0%}:':19s} {moment.caption}")
    print(f"seeds:              {output.seeds[0]}")
    print("seconds:            " + ", ".join(f"{name} {value:.1f}" for name, value in output.timings.items()))
    write(arguments, pipe, output.frames[0], record, captions, anchor)
    if arguments.save_stages:
        save_stages(arguments.save_stages, record | {"timings": output.timings}, anchor, output.frames[0])
        print(f"stages:             {arguments.save_stages}")


def _rewrite(arguments: argparse.Namespace) -> None:
    for caption in load_pipeline(arguments).rewrite(arguments.prompt):
        print(caption)


def _compose(arguments: argparse.Namespace) -> None:
    import torch

    pipe, seed = load_pipeline(arguments), _seed(arguments)
    image = pipe.compose(
        arguments.first_frame_prompt,
        arguments.height,
        arguments.width,
        num_inference_steps=arguments.num_inference_steps,
        generator=torch.Generator().manual_seed(seed),
    )[0]
    image.save(arguments.output)
    print(f"seed {seed}\nanchor {arguments.output}")


def _animate(arguments: argparse.Namespace) -> None:
    from .. import Anchor

    check_outputs(arguments)
    image = _open_image(arguments.image)
    pipe, seed = load_pipeline(arguments), _seed(arguments)
    anchor = Anchor(image, arguments.frame_index, arguments.strength)
    frames = pipe.animate(arguments.prompt, anchors=anchor, **_video_options(arguments, seed))[0]
    record = {"prompt": arguments.prompt, "first_frame_prompt": None, "seeds": {"video": seed}}
    write(arguments, pipe, frames, record, None, image)


def _video_options(arguments: argparse.Namespace, seed: int) -> dict:
    import torch

    names = (
        "height",
        "width",
        "num_frames",
        "preset",
        "num_inference_steps",
        "guidance_scale",
        "negative_prompt",
        "anchor_decode",
    )
    options = {name: getattr(arguments, name) for name in names}
    return options | {"generator": torch.Generator().manual_seed(seed), "output_type": "np"}


def _seed(arguments: argparse.Namespace) -> int:
    import secrets

    return secrets.randbelow(2**31) if arguments.seed is None else arguments.seed


def _open_image(path: Path):
    import PIL.Image

    from ..animate.anchor import picture_image

    try:
        return picture_image(PIL.Image.open(path))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"--image {path} cannot be read ({error}); give a PNG or JPEG file.") from error
