"""Checks of arguments before any model runs, and of the outputs of stages.

An argument that cannot work raises `ValueError`, which names the argument, its value and the fix.
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


# One generator for all videos, or one for each; an integer is the seed of a generator.
Generators: TypeAlias = torch.Generator | int | list[torch.Generator | int] | None

# Text encoders read 512 tokens; a prompt longer than this many characters is a mistake (a file, a log), not a prompt.
MAX_PROMPT_CHARACTERS = 10_000
# Models are trained on 1000 timesteps: a larger number of steps is a typing error.
MAX_STEPS = 1000
# Largest number of videos, images or tries for one prompt in one call.
MAX_COUNT = 1000
# Height or width in pixels, and number of frames: larger than any model supports.
MAX_SIDE, MAX_FRAMES = 16384, 100_000
# No model was trained above 20; a scale in the thousands overflows.
MAX_GUIDANCE = 1000
# Entries of `call_defaults` that are whole numbers of at least 1.
_COUNTS = ("height", "width", "num_frames", "num_inference_steps", "max_sequence_length", "composer_num_candidates")
# Control characters other than white space (U+0085 counts as white space), which a terminal would obey, and surrogates.
UNSHOWABLE = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")


def check_latents(latents: torch.Tensor, shape: Sequence[int | None]) -> None:
    """Checks that `latents` is a tensor of finite floats of the given shape; `None` in the shape allows any length."""
    fits = isinstance(latents, torch.Tensor) and latents.is_floating_point() and latents.ndim == len(shape)
    if not fits or any(side not in (None, given) for side, given in zip(shape, latents.shape)):
        what = (latents.dtype, tuple(latents.shape)) if isinstance(latents, torch.Tensor) else type(latents).__name__
        wanted = ", ".join("any" if side is None else str(side) for side in shape)
        raise ValueError(f"`latents` must be a tensor of floats of shape ({wanted}), but is {what}.")
    check_finite("latents", latents)


def check_texts(name: str, texts: list[str]) -> None:
    """Checks that `texts` is a non-empty list of non-empty strings of at most `MAX_PROMPT_CHARACTERS` characters."""
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
    """Checks that a text, or each text of a list, has no control characters or surrogates; ignores other types."""
    for text in texts if isinstance(texts, (list, tuple)) else [texts]:
        found = UNSHOWABLE.search(text) if isinstance(text, str) else None
        if found is not None:
            is_half = found[0] >= "\ud800"
            kind = "half of a character, as in a text that is not UTF-8" if is_half else "a control character"
            raise ValueError(f"`{name}` holds {found[0]!a} at index {found.start()}, {kind}; remove it.")


def _check_whole(name: str, value: int) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ValueError(f"`{name}={value!r}` must be a whole number.")


def _check_most(name: str, value: int, most: int | None) -> None:
    if most is not None and value > most:
        raise ValueError(f"`{name}={value}` must be at most {most}.")


def check_size(name: str, value: int, multiple: int, most: int = MAX_SIDE) -> None:
    """Checks a height or width in pixels: a positive multiple of `multiple` (the pixels of a patch), at most `most`."""
    _check_whole(name, value)
    _check_most(name, value, most)
    if value < multiple or value % multiple:
        below = max(multiple, value // multiple * multiple)
        raise ValueError(
            f"`{name}={value}` must be a positive multiple of {multiple}; nearest: {below} and {below + multiple}."
        )


def check_num_frames(num_frames: int, step: int, most: int | None = None) -> None:
    """Checks a number of frames: `step * k + 1`, at most `most`."""
    _check_whole("num_frames", num_frames)
    _check_most("num_frames", num_frames, most or MAX_FRAMES)
    if step == 1 and num_frames < 1:
        raise ValueError(f"`num_frames={num_frames}` must be at least 1.")
    if num_frames < 1 or (num_frames - 1) % step:
        below = max(1, (num_frames - 1) // step * step + 1)
        raise ValueError(f"`num_frames={num_frames}` must be {step}k + 1; nearest: {below} and {below + step}.")


def check_at_least_one(name: str, value: int | None, most: int | None = None) -> None:
    """Checks that a count is a whole number from 1 to `most`, or `None`."""
    if value is None:
        return
    _check_whole(name, value)
    if value < 1:
        raise ValueError(f"`{name}={value}` must be at least 1.")
    _check_most(name, value, most)


def check_number(name: str, value: float | None) -> None:
    """Checks that a value is a finite number or `None`."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"`{name}={value!r:.80}` must be a finite number.")


def check_callback(name: str, function: Any, arguments: Sequence[str]) -> None:
    """Checks that a callback is `None` or can be called with `arguments`; diffusers' `PipelineCallback`s can.

    Raises:
        `ValueError`: the callback is not callable, or takes other arguments.
    """
    if function is None:
        return
    if not callable(function):
        raise ValueError(f"`{name}` must be a function, but is a {type(function).__name__}.")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # Functions that are not written in Python may have no signature.
    try:
        signature.bind(*arguments)
    except TypeError as error:
        given = ", ".join(arguments)
        raise ValueError(
            f"`{name}` is called with ({given}), which its signature {signature} does not take."
        ) from error


def check_guidance(name: str, value: float | None) -> None:
    """Checks a scale of classifier-free guidance: a number from 0 to `MAX_GUIDANCE`, or `None`."""
    check_number(name, value)
    if value is not None and not 0 <= value <= MAX_GUIDANCE:
        raise ValueError(f"`{name}={value!r}` must lie between 0 and {MAX_GUIDANCE}; 1 disables guidance.")


def check_scale(name: str, value: float) -> None:
    """Checks the scale of LoRAs in a call: a number from -100 to 100."""
    check_number(name, value)
    if value is None or not -100 <= value <= 100:
        raise ValueError(f"`{name}={value!r}` must be a number from -100 to 100; 1 is the LoRA as it was trained.")


def check_defaults(defaults: Mapping[str, Any] | None) -> None:
    """Checks `call_defaults`, which may come from a file: counts of at least 1, a frame rate above 0, no NaN."""
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
    """Returns a torch dtype, given as itself or by its name; `default` if `dtype` is `None`.

    Raises:
        `ValueError`: `dtype` is not a floating-point dtype.
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
    """Returns whether no value is NaN or infinite."""
    if not (values.is_floating_point() or values.is_complex()):
        return True
    # torch has no `isfinite` for 8-bit floats.
    return bool(torch.isfinite(values if values.element_size() > 1 else values.float()).all())


def check_finite(name: str, values: torch.Tensor | None) -> None:
    """Checks that a tensor from a caller or a file has finite values.

    Raises:
        `ValueError`: the tensor holds NaN or infinity, or has no values (meta device, sparse layout).
    """
    if values is None:
        return
    if values.is_meta or values.layout != torch.strided:
        raise ValueError(
            f"`{name}` is a tensor with layout {values.layout} on device {values.device}; give a dense tensor with values."
        )
    if not is_finite(values):
        raise ValueError(f"`{name}` ({values.dtype}) holds values that are not finite (NaN or infinity).")


def stop_unless_finite(stage: str, values: torch.Tensor, dtype: torch.dtype | None = None, step: str = "") -> None:
    """Checks that the output of a stage is finite: NaN would become a black image later.

    Args:
        stage (`str`): name of the stage.
        values (`torch.Tensor`): output of the stage.
        dtype (`torch.dtype`, *optional*): dtype that the model computes in; the dtype of `values` when left out.
        step (`str`): position within the stage, such as `"step 3 of 15"`.

    Raises:
        `FloatingPointError`: `values` holds NaN or infinity.
    """
    if not is_finite(values):
        raise FloatingPointError(
            f"Stage `{stage}` made values that are not finite{f' at {step}' * bool(step)}, computing in "
            f"{dtype or values.dtype}. If the inputs and the weights are valid, the range of that dtype is too small for the "
            "model: load it in bfloat16 or float32."
        )


def check_negative_texts(name: str, texts: str | list[str] | None, count: int) -> None:
    """Checks negative prompts: one text for all prompts, a list of `count` texts, or `None`. They may be empty.

    Raises:
        `ValueError`: wrong type or number, a text that is too long, or one that [`check_characters`] refuses.
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
    """Returns the generators of a call; an integer becomes a CPU generator with that seed.

    Raises:
        `ValueError`: another type, or a seed outside of 0 to 2**63 - 1.
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
            f"`generator` is a list of {len(generator)} generators for {count} {things}; give one generator or {count}."
        )


def check_name(name: str, what: str, folders: bool = False) -> str:
    """Returns `name`, the name of a file or folder in a repository, if it cannot lead out of that repository.

    Args:
        name (`str`): the name.
        what (`str`): what the name stands for; used in the message.
        folders (`bool`): whether the name may be a path, such as `"folder/file"`.

    Raises:
        `ValueError`: the name is an absolute path, has a drive or `..`, or has a separator without `folders`.
    """
    parts = name.split("/") if folders else [name]
    # Windows' rules apply on every system, so that a repository that is accepted here is safe on Windows, too.
    if any(part in ("", ".", "..") or PureWindowsPath(part).name != part for part in parts):
        raise ValueError(f"{what} is called {name!r}, which does not stay in its folder; use a plain name.")
    return name
