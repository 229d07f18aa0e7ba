"""Seeds of a call: what gives the noise of each video again, and one for its anchor that is derived from it."""

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


# An integer for a fresh generator on the CPU. Otherwise a dictionary: `device`; `seed`, or `state` of a generator that was
# used before; and where videos share a generator `index` and `of` (drawn together) or `after` (one after the other).
Seed = int | dict[str, Any]

# Of a generator's state: 5056 bytes on the CPU, 16 on CUDA.
MAX_STATE_BYTES = 8192
# Of the CPU's generator, a Mersenne Twister of 624 words: after the seed in 8 bytes come how many are left before the next
# round, whether it was seeded, and which is next.
_TWISTER, _WORDS = struct.Struct("<8xiiQ"), 624


_GIVEN: ContextVar[int | None] = ContextVar("anchor_seed", default=None)


def draw_seed(generator: torch.Generator | None = None) -> int:
    """A seed from the generator, or from torch's own."""
    return int(torch.randint(2**31, (1,), generator=generator, device=generator.device if generator else None))


def anchor_seeds(generator: torch.Generator | list[torch.Generator], num_videos: int) -> list[int]:
    """Seeds for the anchors from copies of the generators, whose own state stays for the video's noise."""
    if (given := _GIVEN.get()) is not None:
        return [given] * num_videos
    if isinstance(generator, list):
        return [draw_seed(item.clone_state()) for item in generator]
    copy = generator.clone_state()
    return [draw_seed(copy) for _ in range(num_videos)]


@contextmanager
def anchor_seed(seed: int | None) -> Iterator[None]:
    """In a call within, anchors are drawn by this seed: a judge's choice, or a video made anew, has another than the derived one."""
    token = _GIVEN.set(seed)
    try:
        yield
    finally:
        _GIVEN.reset(token)


def caption_seeds(generator: torch.Generator | list[torch.Generator] | None, num_captions: int) -> list[int]:
    """A seed for each caption: that of its generator, or one that is drawn from the generator of all."""
    if isinstance(generator, list):
        return [item.initial_seed() for item in generator]
    return [draw_seed(generator) for _ in range(num_captions)]


def video_seeds(generator: torch.Generator | list[torch.Generator], num_videos: int) -> list[Seed]:
    """What [`restored_draws`] gives each video's draws again from; to be asked before anything is drawn."""
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
    """Arguments of a call for one video that draw what a video of another call drew.

    Args:
        seed (`int` or `dict`): from [`video_seeds`].
        shape (`tuple[int, ...]`): of one video's latents, the first side 1.
        device (`torch.device`): where the pipeline runs.

    Returns:
        `dict`: `generator`; and `latents` where videos shared one, of which one video's noise is a part. What else was drawn of
        a shared generator, by a scheduler in its steps or for anchors of a strength below 1, does not come again.

    Raises:
        `ValueError`: a state that is none, or of a device that is not here.
    """
    generator = _generator_of(seed)
    if isinstance(seed, int) or not _is_shared(seed):
        return {"generator": generator}
    noise = generator.clone_state()
    if "of" in seed:
        latents = randn_tensor((seed["of"], *shape[1:]), noise, device, torch.float32)[seed["index"], None]
        # The anchor's seed is drawn after those of the videos before.
        for _ in range(seed["index"]):
            draw_seed(generator)
    else:
        for _ in range(seed["after"] + 1):
            latents = randn_tensor(shape, noise, device, torch.float32)
    return {"generator": generator, "latents": latents}


def _is_shared(seed: Seed) -> bool:
    """Whether the generator drew other videos' noise as well."""
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
            # torch itself takes a state from which it would read beyond its table.
            if seeded != 1 or not 1 <= left <= _WORDS or left + following > _WORDS + 1:
                raise ValueError("its place in the table is none")
        return generator.set_state(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    except (RuntimeError, ValueError, TypeError, struct.error, zlib.error) as error:
        raise ValueError(
            f"The generator's state on {device!r} cannot be restored here ({str(error)[:120]}); pass `generator`, or to `fvg` --seed."
        ) from error
