"""Seeds of a call: for each video the seed that reproduces its noise, and a seed derived from it for the anchor."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor


# An integer for a new generator on the CPU. Otherwise a dictionary: `device`; `seed`, or `state` of a generator that was used
# before; and if videos share a generator, `index` and `of` (drawn together) or `after` (drawn one after the other).
Seed = int | dict[str, Any]

# Largest size of a generator's state, which has 5056 bytes on the CPU and 16 on CUDA.
MAX_STATE_BYTES = 8192
# State of the CPU generator, a Mersenne Twister with 624 words: after 8 bytes of seed come the number of words that are left,
# whether it was seeded, and the index of the next word.
_TWISTER, _WORDS = struct.Struct("<8xiiQ"), 624


_GIVEN: ContextVar[int | None] = ContextVar("anchor_seed", default=None)


def draw_seed(generator: torch.Generator | None = None) -> int:
    """Draws a seed from the generator, or from torch's default generator."""
    return int(torch.randint(2**31, (1,), generator=generator, device=generator.device if generator else None))


def anchor_seeds(generator: torch.Generator | list[torch.Generator], num_videos: int) -> list[int]:
    """Returns seeds for the anchors, drawn from copies of the generators, whose states are kept for the video's noise."""
    if (given := _GIVEN.get()) is not None:
        return [given] * num_videos
    if isinstance(generator, list):
        return [draw_seed(item.clone_state()) for item in generator]
    copy = generator.clone_state()
    return [draw_seed(copy) for _ in range(num_videos)]


@contextmanager
def anchor_seed(seed: int | None) -> Iterator[None]:
    """Makes calls within the block use this seed for anchors, such as that of a judge's choice, instead of a derived one."""
    token = _GIVEN.set(seed)
    try:
        yield
    finally:
        _GIVEN.reset(token)


def caption_seeds(generator: torch.Generator | list[torch.Generator] | None, num_captions: int) -> list[int]:
    """Returns a seed for each caption: that of its own generator, or one drawn from the common generator."""
    if isinstance(generator, list):
        return [item.initial_seed() for item in generator]
    return [draw_seed(generator) for _ in range(num_captions)]


def video_seeds(generator: torch.Generator | list[torch.Generator], num_videos: int) -> list[Seed]:
    """Returns the seed of each video, for [`restored_draws`]. Call it before anything is drawn."""
    if not isinstance(generator, list):
        if num_videos == 1:
            return [_seed_of(generator)]
        return [_as_dict(_seed_of(generator)) | {"index": video, "of": num_videos} for video in range(num_videos)]
    seeds = []
    for video, item in enumerate(generator):
        before = sum(other is item for other in generator[:video])
        shares = sum(other is item for other in generator) > 1
        seeds.append(_as_dict(_seed_of(item)) | {"after": before} if shares else _seed_of(item))
    return seeds


def restored_draws(seed: Seed, shape: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """Returns arguments for a call with one video that reproduce the noise of a video of an earlier call.

    Args:
        seed (`int` or `dict`): from [`video_seeds`].
        shape (`tuple[int, ...]`): shape of the latents of one video, with batch size 1.
        device (`torch.device`): device that the pipeline runs on.

    Returns:
        `dict`: `generator`; and `latents` if the video shared its generator with others. Other noise from a shared generator
        (of a scheduler's steps, or of anchors with a strength below 1) is not reproduced.

    Raises:
        `ValueError`: the state is not valid, or its device does not exist here.
    """
    generator = _generator_of(seed)
    if isinstance(seed, int) or not _is_shared(seed):
        return {"generator": generator}
    noise = generator.clone_state()
    if "of" in seed:
        latents = randn_tensor((seed["of"], *shape[1:]), noise, device, torch.float32)[seed["index"], None]
        # The anchor's seed was drawn after those of the previous videos.
        for _ in range(seed["index"]):
            draw_seed(generator)
    else:
        for _ in range(seed["after"] + 1):
            latents = randn_tensor(shape, noise, device, torch.float32)
    return {"generator": generator, "latents": latents}


def _is_shared(seed: Seed) -> bool:
    """Returns whether the generator also drew the noise of other videos."""
    return isinstance(seed, dict) and ("of" in seed or "after" in seed)


def _as_dict(seed: Seed) -> dict[str, Any]:
    return seed if isinstance(seed, dict) else {"seed": seed}


def _seed_of(generator: torch.Generator) -> Seed:
    device, state = generator.device, generator.get_state()
    seed = generator.initial_seed()
    if torch.equal(state, torch.Generator(device).manual_seed(seed).get_state()):
        return seed if device.type == "cpu" else {"device": device.type, "seed": seed}
    return {"device": device.type, "state": base64.b85encode(zlib.compress(state.numpy().tobytes(), 9)).decode()}


def _generator_of(seed: Seed) -> torch.Generator:
    values = _as_dict(seed)
    device = values.get("device", "cpu")
    try:
        generator = torch.Generator(device)
        if "state" not in values:
            return generator.manual_seed(values["seed"])
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(base64.b85decode(values["state"]), MAX_STATE_BYTES)
        if device == "cpu":
            left, seeded, following = _TWISTER.unpack_from(data)
            # torch does not check this, and would read beyond the state's table.
            if seeded != 1 or not 1 <= left <= _WORDS or left + following > _WORDS + 1:
                raise ValueError("its index is outside of the table")
        return generator.set_state(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    except (RuntimeError, ValueError, TypeError, struct.error, zlib.error) as error:
        raise ValueError(
            f"The generator's state on {device!r} cannot be restored here ({str(error)[:120]}); pass `generator`, or `--seed` to `fvg`."
        ) from error
