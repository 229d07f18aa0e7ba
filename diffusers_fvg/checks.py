"""Checks of what a caller passes, made before any model runs, and of what a stage made.

What cannot work raises `ValueError` naming the value and the fix.
"""

from __future__ import annotations

import inspect
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from pathlib import PureWindowsPath
from typing import Any, TypeAlias

import torch


# What draws: one for all videos, one for each, or the seed of one.
Generators: TypeAlias = torch.Generator | int | list[torch.Generator | int] | None

# Text encoders read 512 tokens; a prompt longer than this many characters is a mistake (a file, a log), not a prompt.
MAX_PROMPT_CHARACTERS = 10_000
# Models are trained on 1000 times of noise: more steps than that are a slip of the finger.
MAX_STEPS = 1000
# Of what one call makes of one prompt: videos, pictures, tries.
MAX_COUNT = 1000
# Pixels of a side, and frames: beyond any model.
MAX_SIDE, MAX_FRAMES = 16384, 100_000
# No model was trained above 20; at thousands the numbers themselves give way.
MAX_GUIDANCE = 1000
# Controls other than white space (U+0085 is one), which a terminal would obey, and halves of characters.
# Defaults of a call that are whole numbers from 1 on.
_COUNTS = ("height", "width", "num_frames", "num_inference_steps", "max_sequence_length", "composer_num_candidates")
UNSHOWABLE = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")


def check_latents(latents: torch.Tensor, shape: Sequence[int | None]) -> None:
    """A tensor of finite numbers and of a shape, of which sides that may be any are `None`."""
    fits = isinstance(latents, torch.Tensor) and latents.is_floating_point() and latents.ndim == len(shape)
    if not fits or any(side not in (None, given) for side, given in zip(shape, latents.shape)):
        what = (latents.dtype, tuple(latents.shape)) if isinstance(latents, torch.Tensor) else type(latents).__name__
        wanted = ", ".join("any" if side is None else str(side) for side in shape)
        raise ValueError(f"`latents` must be a tensor of floats of shape ({wanted}), but is {what}.")
    check_finite("latents", latents)


def check_texts(name: str, texts: list[str]) -> None:
    """A non-empty list of texts, each a string with something in it and of bounded length."""
    if not isinstance(texts, (list, tuple)) or not texts:
        raise ValueError(f"`{name}` must be a string or a non-empty list of strings, but is {texts!r}.")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"`{name}` must hold strings, but holds {type(text).__name__}.")
        if not text.strip():
            raise ValueError(f"`{name}` is empty: {text!r}; describe what should be seen.")
        lone = next((index for index, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), None)
        if lone is not None:
            raise ValueError(
                f"`{name}` holds {text[lone]!r} at character {lone}, a lone surrogate, which is half a character; remove it."
            )
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise ValueError(
                f"`{name}` has {len(text)} characters, starting {text[:40]!r}; keep it under {MAX_PROMPT_CHARACTERS}."
            )
        check_characters(name, text)


def check_characters(name: str, texts: Any) -> None:
    """A text, or each of a list, has characters that a video's file holds and a terminal shows. What is no text is left alone."""
    for text in texts if isinstance(texts, (list, tuple)) else [texts]:
        found = UNSHOWABLE.search(text) if isinstance(text, str) else None
        if found is not None:
            is_half = found[0] >= "\ud800"
            kind = "half of a character, as of a text that is not UTF-8" if is_half else "a control character"
            raise ValueError(f"`{name}` holds {found[0]!a} at place {found.start()}, {kind}; take it out.")


def _check_whole(name: str, value: int) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ValueError(f"`{name}={value!r}` must be a whole number.")


def _check_most(name: str, value: int, most: int | None) -> None:
    if most is not None and value > most:
        raise ValueError(f"`{name}={value}` must be at most {most}.")


def check_size(name: str, value: int, multiple: int, most: int = MAX_SIDE) -> None:
    """Pixels: a positive multiple of what a patch of the video model covers, at most as many as the model has places for."""
    _check_whole(name, value)
    _check_most(name, value, most)
    if value < multiple or value % multiple:
        below = max(multiple, value // multiple * multiple)
        raise ValueError(
            f"`{name}={value}` must be a positive multiple of {multiple}; nearest: {below} and {below + multiple}."
        )


def check_num_frames(num_frames: int, step: int, most: int | None = None) -> None:
    """Frames: 1, then `step` for every further latent, at most as many as the model has places for."""
    _check_whole("num_frames", num_frames)
    _check_most("num_frames", num_frames, most or MAX_FRAMES)
    if step == 1 and num_frames < 1:
        raise ValueError(f"`num_frames={num_frames}` must be at least 1.")
    if num_frames < 1 or (num_frames - 1) % step:
        below = max(1, (num_frames - 1) // step * step + 1)
        raise ValueError(f"`num_frames={num_frames}` must be {step}k + 1; nearest: {below} and {below + step}.")


def check_at_least_one(name: str, value: int | None, most: int | None = None) -> None:
    """A count: a whole number from 1 on, to `most` where there is one, or `None` where it is left out."""
    if value is None:
        return
    _check_whole(name, value)
    if value < 1:
        raise ValueError(f"`{name}={value}` must be at least 1.")
    _check_most(name, value, most)


def check_number(name: str, value: float | None) -> None:
    """A finite number, or `None` where it is left out."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"`{name}={value!r:.80}` must be a finite number.")


def check_callback(name: str, function: Any, arguments: Sequence[str]) -> None:
    """A function that can be called with so many arguments, or `None` where it is left out; one of diffusers' callbacks is.

    Raises:
        `ValueError`: no function, or one of other arguments.
    """
    if function is None:
        return
    if not callable(function):
        raise ValueError(f"`{name}` must be a function, but is a {type(function).__name__}.")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # Of a function that is not written in Python nothing is known.
    try:
        signature.bind(*arguments)
    except TypeError as error:
        given = ", ".join(arguments)
        raise ValueError(
            f"`{name}` is called with ({given}), which its signature {signature} does not take."
        ) from error


def check_guidance(name: str, value: float | None) -> None:
    """A scale of classifier-free guidance: a number from 0 to `MAX_GUIDANCE`, or `None` where it is left out."""
    check_number(name, value)
    if value is not None and not 0 <= value <= MAX_GUIDANCE:
        raise ValueError(f"`{name}={value!r}` must lie between 0 and {MAX_GUIDANCE}; 1 is no guidance.")


def check_scale(name: str, value: float) -> None:
    """Strength of LoRAs in a call: a number from -100 to 100."""
    check_number(name, value)
    if value is None or not -100 <= value <= 100:
        raise ValueError(f"`{name}={value!r}` must be a number from -100 to 100; 1 is the LoRA as it was trained.")


def check_defaults(defaults: Mapping[str, Any] | None) -> None:
    """The defaults of a call, which a file may hold, are numbers that can be: counts from 1 on, a frame rate above 0, no NaN."""
    if defaults is not None and not isinstance(defaults, Mapping):
        raise ValueError(f"`call_defaults` must be a dictionary of a call's arguments, but is {defaults!r}.")
    for name, value in (defaults or {}).items():
        if name in _COUNTS:
            check_at_least_one(name, value)
        elif isinstance(value, float) or name == "frame_rate":
            check_number(name, value)
        if name == "frame_rate" and value is not None and value <= 0:
            raise ValueError(f"`frame_rate={value!r}` must be above 0, in frames per second.")


def as_dtype(dtype: torch.dtype | str | None, default: torch.dtype) -> torch.dtype:
    """A dtype of weights, of its name in torch or itself.

    Raises:
        `ValueError`: no dtype of floating-point numbers.
    """
    found = default if dtype is None else dtype
    if isinstance(found, str):
        found = getattr(torch, found.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"`dtype={dtype!r}` must be torch.bfloat16, torch.float16 or torch.float32, or the name of one."
        )
    return found


def is_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    if not (values.is_floating_point() or values.is_complex()):
        return True
    # Eight-bit floats have no `isfinite` of their own.
    return bool(torch.isfinite(values if values.element_size() > 1 else values.float()).all())


def check_finite(name: str, values: torch.Tensor | None) -> None:
    """A tensor that a caller passes, or a file holds, has finite values.

    Raises:
        `ValueError`: NaN or infinity among them.
    """
    if values is None:
        return
    if values.is_meta or values.layout != torch.strided:
        raise ValueError(
            f"`{name}` is a tensor on {values.device} of {values.layout}; give one that holds its values."
        )
    if not is_finite(values):
        raise ValueError(f"`{name}` ({values.dtype}) holds values that are not finite (NaN or infinity).")


def stop_unless_finite(stage: str, values: torch.Tensor, dtype: torch.dtype | None = None, step: str = "") -> None:
    """What a stage made is finite: NaN would go on as a black picture.

    Args:
        stage (`str`): its name.
        values (`torch.Tensor`): what it made.
        dtype (`torch.dtype`, *optional*): what the model computes in; that of the values when left out.
        step (`str`): where in the stage, such as `"step 3 of 15"`.

    Raises:
        `FloatingPointError`: NaN or infinity among the values.
    """
    if not is_finite(values):
        raise FloatingPointError(
            f"Stage `{stage}` made values that are not finite{f' at {step}' * bool(step)}, computing in "
            f"{dtype or values.dtype}. If the inputs and the weights are sound, the range of that dtype is too small for the "
            "model: load it in bfloat16 or float32."
        )


def check_negative_texts(name: str, texts: str | list[str] | None, count: int) -> None:
    """A text for all, or a list of one for each, of bounded length; unlike prompts they may be empty. `None`: left out.

    Raises:
        `ValueError`: naming what is wrong with them.
    """
    if texts is None:
        return
    members = [texts] if isinstance(texts, str) else texts
    if not isinstance(members, (list, tuple)) or not all(isinstance(text, str) for text in members):
        raise ValueError(f"`{name}` must be a text or a list of texts, but is {texts!r:.80}.")
    if not isinstance(texts, str) and len(members) != count:
        raise ValueError(f"`{name}` has {len(members)} texts for {count} prompts; give one text or {count}.")
    for text in members:
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise ValueError(f"`{name}` has {len(text)} characters; keep it under {MAX_PROMPT_CHARACTERS}.")
    check_characters(name, texts)


def as_generators(generator: Generators) -> torch.Generator | list[torch.Generator] | None:
    """Generators of what a call was given: a whole number is the seed of one on the CPU.

    Raises:
        `ValueError`: something else, or a seed that torch does not take.
    """
    if isinstance(generator, (list, tuple)):
        return [_as_generator(member) for member in generator]
    return None if generator is None else _as_generator(generator)


def _as_generator(given: torch.Generator | int) -> torch.Generator:
    if isinstance(given, torch.Generator):
        return given
    is_seed = isinstance(given, numbers.Integral) and not isinstance(given, bool)
    if not is_seed or not 0 <= given < 2**63:
        raise ValueError(
            f"`generator={given!r:.60}` must be a torch.Generator, a seed from 0 to 2**63 - 1, or a list of them."
        )
    return torch.Generator().manual_seed(int(given))


def check_generators(generator: torch.Generator | list[torch.Generator] | None, count: int, things: str) -> None:
    if isinstance(generator, list) and len(generator) != count:
        raise ValueError(
            f"`generator` is a list of {len(generator)} for {count} {things}; give one generator or {count}."
        )


def check_name(name: str, what: str, folders: bool = False) -> str:
    """Returns a name that a repository gives to a file or folder of its own.

    Args:
        name (`str`): the name.
        what (`str`): what it names, for the message.
        folders (`bool`): it may be a path, `"folder/file"`.

    Raises:
        `ValueError`: an absolute path, a drive, `..`, or a separator without `folders`.
    """
    parts = name.split("/") if folders else [name]
    # Windows' rules on every system: a repository that is safe here is safe there.
    if any(part in ("", ".", "..") or PureWindowsPath(part).name != part for part in parts):
        raise ValueError(f"{what} is called {name!r}, which does not stay in its folder; use a plain name.")
    return name
