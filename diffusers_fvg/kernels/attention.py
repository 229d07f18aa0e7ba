"""Attention between pairs of frames that a mask allows, in plain torch: the definition and two faster implementations.

B batch, L tokens, N heads, H channels of a head, F frames of T = L / F tokens each. The mask `seen`, a boolean `(B, F, F)`,
is set at `[:, q, k]` if the tokens of frame q attend to ("see") the tokens of frame k. Every frame must see at least one.

[`anchor_window`] makes the mask of a clip with anchors: a model that has learned to use the anchor needs only the anchor and
the neighbouring frames for each frame. With a window of 3 at 31 frames, this is a quarter of all pairs.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.weak import WeakTensorKeyDictionary


_FLEX_BLOCK = 128
_Found = TypeVar("_Found")


def once_for_tensor(function: Callable[[torch.Tensor], _Found]) -> Callable[[torch.Tensor], _Found]:
    """Caches the result of `function` for each tensor until the tensor changes or is deleted; all layers share one mask."""
    known = WeakTensorKeyDictionary()

    def look(tensor: torch.Tensor) -> _Found:
        # A tensor made in inference mode has no version counter.
        version = None if tensor.is_inference() else tensor._version
        if tensor not in known or known[tensor][0] != version:
            known[tensor] = version, function(tensor)
        return known[tensor][1]

    return look


def anchor_window(timestep: torch.Tensor, window: int, places: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the mask with which each frame sees the anchors of its clip and the frames at most `window` away from it.

    A frame whose timestep is below the largest timestep of its clip is an anchor. In a clip without anchors every frame sees
    all frames, as distant frames would share no information otherwise.

    Args:
        timestep (`torch.Tensor` of shape `(B, F)`): timestep of each latent frame.
        window (`int`): distance in latent frames; with 0 a frame sees itself and the anchors.
        places (`torch.Tensor` of shape `(B, F)`, *optional*): positions of the frames in time, in latent frames;
            consecutive when left out.

    Returns:
        `torch.Tensor` of shape `(B, F, F)`, `bool`.
    """
    if places is None:
        places = torch.arange(timestep.shape[1], device=timestep.device)[None]
    near = (places[:, :, None] - places[:, None, :]).abs() <= window
    anchors = timestep < timestep.amax(dim=1, keepdim=True)
    return near | anchors[:, None, :] | ~anchors.any(dim=1)[:, None, None]


def frame_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Computes softmax attention over all tokens with those of unseen frames masked: the definition.

    Args:
        query, key, value (`torch.Tensor` of shape `(B, L, N, H)`): tokens, ordered by frame.
        seen (`torch.Tensor` of shape `(B, F, F)`, `bool`): key frames (columns) that each query frame (rows) sees.

    Returns:
        `torch.Tensor` of shape `(B, L, N, H)`.
    """
    tokens = query.shape[1] // seen.shape[1]
    mask = seen.repeat_interleave(tokens, dim=1).repeat_interleave(tokens, dim=2)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, mask[:, None]).transpose(1, 2)


def gathered_frame_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """Computes [`frame_attention`] without a mask: gathers the tokens that each group of frames sees.

    Frames that see the same frames form a group; groups of equal sizes form a batch. `seen` is read on the CPU, once for all
    calls with the same tensor, which torch.compile cannot trace.
    """
    batches = _batches(seen)
    if all(len(others) == seen.shape[1] for groups in batches for _, others in groups):
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)

    def gathered(frames: tuple[torch.Tensor, ...], wanted: list[list[int]]) -> torch.Tensor:
        """Returns the wanted frames of every group, of shape `(groups, heads, tokens, head_dim)`."""
        together = torch.stack([frames[frame] for group in wanted for frame in group])
        return together.unflatten(0, (len(wanted), -1)).flatten(1, 2).transpose(1, 2)

    num_frames = seen.shape[1]
    queries, keys, values = (
        x.unflatten(1, (num_frames, -1)).flatten(0, 1).unbind() for x in (query, key, value)
    )  # frames of all samples, (T, N, H) each
    outs: dict[int, torch.Tensor] = {}
    for groups in batches:
        frames, others = ([list(group[k]) for group in groups] for k in (0, 1))
        out = F.scaled_dot_product_attention(
            gathered(queries, frames), gathered(keys, others), gathered(values, others)
        )
        out = out.transpose(1, 2).unflatten(1, (len(frames[0]), -1)).flatten(0, 1)
        outs.update(zip((frame for group in frames for frame in group), out.unbind(), strict=True))
    return torch.stack([outs[frame] for frame in range(len(outs))]).unflatten(0, (-1, num_frames)).flatten(1, 2)


# A group is its query frames and the key frames that each of them sees. Frame numbers go on from one sample to the next.
_Group = tuple[tuple[int, ...], tuple[int, ...]]


@once_for_tensor
def _batches(seen: torch.Tensor) -> list[list[_Group]]:
    """Returns the groups of a mask, with those of equal numbers of query and key frames in one list."""
    num_frames = seen.shape[1]
    batches: dict[tuple[int, int], list[_Group]] = {}
    for sample, table in enumerate(seen.tolist()):
        offset = sample * num_frames
        groups: dict[tuple[int, ...], list[int]] = {}
        for frame, row in enumerate(table, offset):
            groups.setdefault(tuple(other for other, sees in enumerate(row, offset) if sees), []).append(frame)
        for others, frames in groups.items():
            batches.setdefault((len(frames), len(others)), []).append((tuple(frames), others))
    return list(batches.values())


def flex_frame_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """Computes [`frame_attention`] with FlexAttention, which skips unseen blocks under torch.compile on a GPU."""
    mask = _block_mask(seen, query.shape[1])
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return flex_attention(query, key, value, block_mask=mask).transpose(1, 2)


def _block_mask(seen: torch.Tensor, num_tokens: int) -> BlockMask:
    """Returns the block mask of FlexAttention, computed from `seen` without a mask of all pairs of tokens."""
    num_frames = seen.shape[1]
    tokens = num_tokens // num_frames
    start = torch.arange(0, num_tokens, _FLEX_BLOCK, device=seen.device)[:, None]
    frame = torch.arange(0, num_tokens, tokens, device=seen.device)
    touches = ((start < frame + tokens) & (frame < start + _FLEX_BLOCK)).float()  # (blocks, F)
    some, not_all = ((touches @ table.float() @ touches.T > 0)[:, None] for table in (seen, ~seen))
    partial, full = some & not_all, some & ~not_all

    def pair(b, _, q, k):
        return seen[b, q // tokens, k // tokens]

    return BlockMask.from_kv_blocks(
        *_listed(partial), *_listed(full), _FLEX_BLOCK, pair, seq_lengths=(num_tokens, num_tokens)
    )


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the number of set entries of each row, and the columns with those of set entries first, in order."""
    columns = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32), columns.to(torch.int32)
