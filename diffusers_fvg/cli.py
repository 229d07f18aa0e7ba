"""The `fvg` command. Each subcommand parses, calls the library and prints; flags mirror argument names."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

from . import __version__
from .shapes.command import add_shapes, run_shapes


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="recipe (see fvg models), folder or Hub repository; the embedded shapes model when left out"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of every stage")
    parser.add_argument("--device", help="cuda, mps or cpu; the fastest there is when left out")
    parser.add_argument("--seed", type=int, help="makes the run repeatable; drawn and printed when left out")
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_rewriter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rewriter",
        metavar="NAME|URL",
        help="in place of the model's: chat model (folder, org/name or org/name@revision), or OpenAI-compatible server",
    )
    parser.add_argument("--rewriter-model", metavar="NAME", help="the server's name of the chat model")
    parser.add_argument(
        "--rewriter-api-key-env", metavar="VAR", help="environment variable that holds the server's key"
    )


def _add_composer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--composer",
        metavar="NAME",
        help="in place of the model's: text-to-image pipeline (folder, org/name or org/name@revision)",
    )


def _add_lora(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lora", metavar="NAME", help="anchor LoRA for a recipe, of any format")


def _add_video(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("video.mp4"), help="mp4 to write (default: %(default)s)")
    parser.add_argument("--preset", help="sampling preset, such as anchored-15 or full-50")
    parser.add_argument("--num-inference-steps", "--steps", type=int, help="steps of the video model")
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--num-frames", type=int)
    parser.add_argument("--negative-prompt")
    parser.add_argument(
        "--anchor-decode", choices=("raw", "match", "replace"), default="raw", help="colours of the anchored frames"
    )
    parser.add_argument("--strip", type=Path, help="also write a PNG with prompt, anchor and some frames")


def _add_generate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("generate", help="a prompt becomes a video, through all three stages")
    parser.add_argument("prompt")
    _add_model(parser)
    _add_rewriter(parser)
    _add_composer(parser)
    _add_lora(parser)
    _add_video(parser)
    parser.add_argument("--mode", choices=("factorized", "direct", "storyboard"), default="factorized")
    parser.add_argument("--num-moments", type=int, default=2, help="of a storyboard, at most (default: %(default)s)")
    parser.add_argument("--first-frame-prompt", help="skips stage 1")
    parser.add_argument("--image", type=Path, help="anchor image; skips stages 1 and 2")
    parser.add_argument("--save-stages", type=Path, metavar="DIR", help="also write caption, anchor and frames there")


def _add_rewrite(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("rewrite", help="stage 1: prompt to first-frame prompt")
    parser.add_argument("prompt", nargs="+")
    _add_model(parser)
    _add_rewriter(parser)
    _add_lora(parser)


def _add_compose(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("compose", help="stage 2: first-frame prompt to anchor image")
    parser.add_argument("first_frame_prompt")
    _add_model(parser)
    _add_composer(parser)
    _add_lora(parser)
    parser.add_argument("--output", type=Path, default=Path("anchor.png"), help="PNG to write (default: %(default)s)")
    parser.add_argument("--num-inference-steps", "--steps", type=int, help="steps of the text-to-image model")


def _add_animate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("animate", help="stage 3: prompt and anchor image to video")
    parser.add_argument("prompt")
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--frame-index", type=int, default=0, help="frame that the image is (default: %(default)s)")
    parser.add_argument("--strength", type=float, default=1.0, help="in (0, 1] (default: %(default)s)")
    _add_model(parser)
    _add_lora(parser)
    _add_video(parser)


def _add_train(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "train", help="train an anchor LoRA, or a stage of Factorized-Dreamer, on videos; continues where it stopped"
    )
    parser.add_argument("config", type=Path, nargs="?", help="TOML file, see examples/training")
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="print a file for the anchor LoRA of a recipe, with data and cost; trains nothing",
    )


def _add_overview(commands: argparse._SubParsersAction) -> None:
    commands.add_parser("models", help="list recipes: first frame, memory, licences, sizes on disk")
    commands.add_parser("doctor", help="versions, devices, attention backends, kernels, and what would run here")


def _add_assemble(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("assemble", help="make a repository of parts given by name")
    parser.add_argument("output", type=Path, help="an empty or new folder")
    parser.add_argument("--base", required=True, help="Wan pipeline: folder, org/name or org/name@revision")
    parser.add_argument("--composer", help="text-to-image pipeline")
    parser.add_argument("--rewriter", help="chat model")
    parser.add_argument(
        "--lora", nargs="+", help="anchor LoRA of any format, or one for each expert, high noise first"
    )
    parser.add_argument("--presets", nargs="+", default=(), help="names, the default first, or a folder of them")
    parser.add_argument("--variant", help="of the weights, such as fp16")
    for name in ("height", "width", "num-frames", "frame-rate"):
        parser.add_argument(f"--{name}", type=int, help="default of the repository")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--light", action="store_true", help="refer to what is on the Hub (the default)")
    kind.add_argument("--bundled", action="store_true", help="copy all weights")
    parser.add_argument("--dry-run", action="store_true", help="list parts, licences, files and sizes only")


def _add_push(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("push", help="upload a saved pipeline to the Hub, with its card")
    parser.add_argument("folder", type=Path)
    parser.add_argument("repository", help="org/name; made if it is not there")
    parser.add_argument("--commit-message")
    parser.add_argument("--private", action="store_true", help="if it is made now")
    parser.add_argument("--create-pr", action="store_true", help="as a pull request")


def parser() -> argparse.ArgumentParser:
    """The command line, without anything heavy imported."""
    top = argparse.ArgumentParser(prog="fvg", description="Factorized Video Generation with diffusers.")
    top.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    adders = (_add_generate, _add_rewrite, _add_compose, _add_animate, _add_train, _add_assemble, _add_push)
    for add in (*adders, _add_overview):
        add(commands)
    add_shapes(commands, _add_model)
    return top


def _rewriter(arguments: argparse.Namespace):
    """What `--rewriter` names: a name, or what asks a server; `None` without it."""
    is_server = (arguments.rewriter or "").startswith(("http://", "https://"))
    if not is_server:
        if arguments.rewriter_model is not None or arguments.rewriter_api_key_env is not None:
            raise ValueError(
                "--rewriter-model and --rewriter-api-key-env belong to a server: name it with --rewriter URL."
            )
        return arguments.rewriter
    if arguments.rewriter_model is None:
        raise ValueError("--rewriter needs --rewriter-model NAME, the server's name of the chat model.")
    from . import ChatEndpoint, FirstFrameRewriter

    endpoint = ChatEndpoint(arguments.rewriter, arguments.rewriter_model, arguments.rewriter_api_key_env)
    return FirstFrameRewriter(endpoint=endpoint)


def _load(arguments: argparse.Namespace):
    import diffusers
    import torch
    import transformers

    from .embedded import EMBEDDED_FOLDER
    from .recipes import load

    # One bar, that of the stages: loading would draw one for every component.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    if arguments.model is not None and Path(arguments.model).exists() and not Path(arguments.model).is_dir():
        raise ValueError(f"--model {arguments.model} is a file; give a folder or a Hub repository.")
    # One that is passed keeps the model's own from being loaded.
    parts = {name: getattr(arguments, name) for name in ("composer", "lora") if name in arguments}
    parts |= {"rewriter": _rewriter(arguments)} if "rewriter" in arguments else {}
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    if arguments.model is None:
        # Its operations are too small to be split: more threads gain nothing, and on a busy machine they wait for each other.
        torch.set_num_threads(1)
        dtype = dtype or torch.float32
    pipe = load(EMBEDDED_FOLDER if arguments.model is None else arguments.model, dtype=dtype, **parts)
    device = arguments.device
    if device is None and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator().type
    pipe.set_progress_bar_config(disable=arguments.quiet)
    return pipe.to(device) if device else pipe


def _open_image(path: Path):
    import PIL.Image

    from .animate.anchor import picture_image

    try:
        return picture_image(PIL.Image.open(path))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"--image {path} cannot be read ({error}); give a PNG or JPEG file.") from error


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Refuses before minutes of work what would be refused after them."""
    for name, suffix in (("output", ".mp4"), ("strip", ".png")):
        path = getattr(arguments, name)
        if path is not None and path.suffix.lower() != suffix:
            raise ValueError(f"--{name} {path} must end in {suffix}.")


def _seed(arguments: argparse.Namespace) -> int:
    import secrets

    return secrets.randbelow(2**31) if arguments.seed is None else arguments.seed


def _versions() -> dict[str, str]:
    import diffusers
    import torch
    import transformers

    modules = {"diffusers": diffusers, "torch": torch, "transformers": transformers}
    return {"diffusers-fvg": __version__} | {name: module.__version__ for name, module in modules.items()}


def _write(arguments: argparse.Namespace, pipe, frames, record: dict, captions, anchors) -> None:
    """Video and strip; `record` tells how the video was made, pictures and their captions are those of the strip."""
    from .media import write_strip, write_video
    from .recipes import hub_revisions

    frame_rate = pipe.call_defaults["frame_rate"]
    model = arguments.model or "embedded"
    metadata = {
        **record,
        # Of a folder nothing but its name: paths are those of this machine.
        "model": Path(model).resolve().name if Path(model).is_dir() else model,
        "hub_revisions": hub_revisions(pipe),
        "preset": arguments.preset or next(iter(pipe.presets)),
        "versions": _versions(),
    }
    # A player shows the embedded model's 64 pixels as a stamp: enlarged by whole factors, which keeps edges sharp.
    scale = max(1, 384 // frames.shape[1])
    write_video(arguments.output, frames, frame_rate, metadata=metadata, scale=scale)
    print(f"video:              {arguments.output}")
    if arguments.strip:
        write_strip(arguments.strip, record["prompt"], captions, anchors, frames)
        print(f"strip:              {arguments.strip}")


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


def _generate(arguments: argparse.Namespace) -> None:
    _check_outputs(arguments)
    image = _open_image(arguments.image) if arguments.image else None
    pipe, seed = _load(arguments), _seed(arguments)
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
    _write(arguments, pipe, output.frames[0], record, captions, anchor)
    if arguments.save_stages:
        _save_stages(arguments.save_stages, record | {"timings": output.timings}, anchor, output.frames[0])
        print(f"stages:             {arguments.save_stages}")


def _save_stages(folder: Path, record: dict, anchor, frames) -> None:
    import numpy as np
    import PIL.Image

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stages.json").write_text(json.dumps(record, indent=2) + "\n")
    if anchor is not None:
        anchors = [anchor] if isinstance(anchor, PIL.Image.Image) else anchor
        for number, image in enumerate(anchors):
            image.save(folder / ("anchor.png" if number == 0 else f"anchor_{number + 1}.png"))
    for index, frame in enumerate(frames):
        PIL.Image.fromarray(np.round(frame * 255).astype(np.uint8)).save(folder / f"frame_{index:04d}.png")


def _rewrite(arguments: argparse.Namespace) -> None:
    for caption in _load(arguments).rewrite(arguments.prompt):
        print(caption)


def _compose(arguments: argparse.Namespace) -> None:
    import torch

    pipe, seed = _load(arguments), _seed(arguments)
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
    from . import Anchor

    _check_outputs(arguments)
    image = _open_image(arguments.image)
    pipe, seed = _load(arguments), _seed(arguments)
    anchor = Anchor(image, arguments.frame_index, arguments.strength)
    frames = pipe.animate(arguments.prompt, anchors=anchor, **_video_options(arguments, seed))[0]
    record = {"prompt": arguments.prompt, "first_frame_prompt": None, "seeds": {"video": seed}}
    _write(arguments, pipe, frames, record, None, image)


def _train(arguments: argparse.Namespace) -> None:
    import tomllib

    if (arguments.config is None) == (arguments.recipe is None):
        raise ValueError("give either the TOML file of a run or --recipe NAME, which prints one.")
    if arguments.recipe is not None:
        from .overview import training_text
        from .recipes import RECIPES

        if arguments.recipe not in RECIPES:
            raise ValueError(f"--recipe {arguments.recipe} must be one of {', '.join(RECIPES)}.")
        print(training_text(RECIPES[arguments.recipe]), end="")
        return

    from .training.config import TrainConfig
    from .training.trainer import main_train

    # What is no TOML is said by the config's own reader.
    with contextlib.suppress(tomllib.TOMLDecodeError, UnicodeDecodeError):
        if "system" in tomllib.loads(arguments.config.read_text(encoding="utf-8")):
            from .training.dreamer import main_train_dreamer

            print(f"video UNet: {main_train_dreamer(arguments.config)}")
            return
    config, validate = TrainConfig.load(arguments.config), None
    if config.validation_every:
        from .evaluation.validation import make_validate

        validate = make_validate(config)
    print(f"LoRA: {main_train(arguments.config, validate)}")


def _assemble(arguments: argparse.Namespace) -> None:
    from . import assemble

    names = ("height", "width", "num_frames", "frame_rate")
    defaults = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    names = ("base", "composer", "rewriter", "lora", "presets", "variant", "dry_run")
    parts = {name: getattr(arguments, name) for name in names}
    print(assemble(arguments.output, light=not arguments.bundled, call_defaults=defaults or None, **parts))
    if not arguments.dry_run:
        print(f"repository: {arguments.output}")


def _models(arguments: argparse.Namespace) -> None:
    from .overview import models_text

    print(models_text())


def _doctor(arguments: argparse.Namespace) -> None:
    from .overview import doctor_text

    print(doctor_text())


def _push(arguments: argparse.Namespace) -> None:
    from . import push

    # Left out, an organization's own default decides.
    private = True if arguments.private else None
    print(push(arguments.folder, arguments.repository, arguments.commit_message, private, arguments.create_pr))


COMMANDS = {
    "shapes": lambda arguments: run_shapes(arguments, _load),
    "generate": _generate,
    "rewrite": _rewrite,
    "compose": _compose,
    "animate": _animate,
    "train": _train,
    "assemble": _assemble,
    "push": _push,
    "models": _models,
    "doctor": _doctor,
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command; bad input is one line on standard error and exit status 2."""
    arguments = parser().parse_args(argv)
    try:
        COMMANDS[arguments.command](arguments)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"fvg {arguments.command}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
