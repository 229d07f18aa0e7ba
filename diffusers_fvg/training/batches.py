"""Loads cached clips, and orders them into training batches.

Shapes: B batch, C latent channels, f/h/w latent frames, height and width, L tokens, D width.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from .draws import Pictures, generator_for
from .files import read_whole


class Clips:
    """The cached clips of a run.

    Args:
        latents (`list[Path]`): file of each clip's latents.
        texts (`list[Path]`): file of each clip's text embeddings.
        shapes (`list` of `(C, f, h, w)`): shape of each clip's latents.
        empty_text (`Path`): file of the empty prompt's embeddings, or of the negative prompt's with guidance distillation.
        max_sequence_length (`int`): length to which embeddings are padded with zeros, as in `WanPipeline`.
        rejected (`dict[str, str]`): reason for each video that cannot be used, by its path.
        repeats (`list[float]`, *optional*): how often an epoch contains each clip; left out, once.
    """

    def __init__(
        self,
        latents: list[Path],
        texts: list[Path],
        shapes: list[tuple[int, ...]],
        empty_text: Path,
        max_sequence_length: int,
        rejected: dict[str, str] | None = None,
        repeats: list[float] | None = None,
    ):
        self.latents, self.texts, self.shapes = latents, texts, shapes
        self.empty_text, self.max_sequence_length = empty_text, max_sequence_length
        self.rejected = rejected or {}
        self.repeats = repeats or [1.0] * len(latents)

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def digests(self) -> dict[str, str]:
        """Digests of videos, captions and repeats, in order. They identify content, because the cache names files by it."""
        names = {
            "videos": [path.name for path in self.latents],
            "captions": [path.name for path in self.texts],
            "repeats": self.repeats,
        }
        return {key: hashlib.sha256(repr(column).encode()).hexdigest()[:16] for key, column in names.items()}

    def load(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, Pictures | None]:
        """Loads clips of one shape: latents `(B, C, f, h, w)`, text embeddings `(B + 1, L, D)` with that of `empty_text` last,
        and the clips' [`Pictures`], if the cache has them."""
        files = [_read(self.latents[index]) for index in indices]
        latents, pictures = torch.stack([file["latents"] for file in files]), None
        if "pictures" in files[0]:
            pictures = Pictures(*(torch.stack([file[name] for file in files]) for name in ("pictures", "frames")))
        texts = [_read(path)["embeds"] for path in [*(self.texts[index] for index in indices), self.empty_text]]
        embeds = texts[0].new_zeros(len(texts), self.max_sequence_length, texts[0].shape[1])
        for row, text in zip(embeds, texts):
            row[: len(text)] = text
        return latents, embeds, pictures


def _read(path: Path) -> dict[str, torch.Tensor]:
    whole = read_whole(path)
    if whole is None:
        raise ValueError(f"{path} in the cache is missing or damaged; delete it and start again.")
    return whole[0]


class BatchOrder:
    """Indices of the clips in the n-th batch, for any n, so that a run can continue without a stored state.

    An epoch contains each clip as often as `repeats` says, in batches of one shape. The last batch of a shape is filled up
    from the beginning of that shape's order, so that no clip is left out.

    Args:
        shapes (`list[tuple]`): shape of each clip's latents.
        batch_size (`int`): batch size over all processes.
        seed (`int`): seed of the order.
        repeats (`list[float]`, *optional*): how often an epoch contains each clip; left out, once. With a fraction, each epoch
            takes that share of the clips that have this value, different ones in successive epochs.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        batch_size: int,
        seed: int,
        repeats: Sequence[float] | None = None,
    ):
        self.groups: dict[tuple[int, ...], dict[float, list[int]]] = defaultdict(lambda: defaultdict(list))
        for index, (shape, times) in enumerate(zip(shapes, repeats or [1.0] * len(shapes))):
            self.groups[shape][times].append(index)
        self.batch_size, self.seed = batch_size, seed
        self.batches_per_epoch = sum(
            math.ceil(len(self._taken(group, 0)) / batch_size) for group in self.groups.values()
        )
        self._epoch: tuple[int, list[list[int]]] | None = None

    def __getitem__(self, number: int) -> list[int]:
        epoch, index = divmod(number, self.batches_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._batches(epoch))
        return self._epoch[1][index]

    @staticmethod
    def _taken(group: dict[float, list[int]], epoch: int) -> list[int]:
        """Returns the clips of a shape in an epoch. Their number is the same in every epoch."""
        taken = []
        for repeats, clips in group.items():
            whole = int(repeats)
            # At least one, so that no clip is left out forever.
            rest = max(round((repeats - whole) * len(clips)), int(whole == 0))
            taken += clips * whole + [clips[(epoch * rest + place) % len(clips)] for place in range(rest)]
        return taken

    def _batches(self, epoch: int) -> list[list[int]]:
        generator, batches = generator_for("order", self.seed, epoch), []
        for group in self.groups.values():
            taken = self._taken(group, epoch)
            order = [taken[i] for i in torch.randperm(len(taken), generator=generator)]
            for start in range(0, len(order), self.batch_size):
                wanted = range(start, start + self.batch_size)
                batches.append([order[i % len(order)] for i in wanted])
        return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


class Prefetcher:
    """Loads the batches of one process, and reads the next batch in the background.

    Args:
        clips ([`Clips`]): the cached clips.
        order ([`BatchOrder`]): the batches over all processes.
        process_index, batch_size (`int`): index of this process, and number of clips of each batch that it loads.
    """

    def __init__(self, clips: Clips, order: BatchOrder, process_index: int, batch_size: int):
        self.clips, self.order = clips, order
        self.slice = slice(process_index * batch_size, (process_index + 1) * batch_size)
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._next: tuple[int, Future] | None = None

    def load(self, number: int) -> tuple[torch.Tensor, torch.Tensor, Pictures | None]:
        """Loads batch `number` of this process; see [`Clips.load`]."""
        if self._next is None or self._next[0] != number:
            self._next = self._submit(number)
        batch = self._next[1].result()
        self._next = self._submit(number + 1)
        return batch

    def close(self) -> None:
        self._pool.shutdown()

    def _submit(self, number: int):
        return number, self._pool.submit(self.clips.load, self.order[number][self.slice])
