"""Attention in which every frame sees the frames that a table names, in plain torch: definition and two faster forms.

B batch, L tokens, N heads, H channels of a head, F frames of T = L / F tokens each. `seen`, a boolean `(B, F, F)`, says
in row q which frames the queries of frame q see; all tokens of a frame are seen or none. Every frame must see one.

The table of a clip with anchors is [`anchor_window`]: once the anchor is learned, a frame needs it, its neighbours in
time, and little else. With a window of 3 at 31 frames that is a quarter of all pairs.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention


_FLEX_BLOCK = 128


def anchor_window(timestep: torch.Tensor, window: int) -> torch.Tensor:
    """Each frame sees the anchors of its clip and the frames at most `window` away from it.

    A frame whose time is below the clip's own, the largest, is an anchor. A clip without anchors sees all of itself:
    nothing would tie its far ends together.

    Args:
        timestep (`torch.Tensor` of shape `(B, F)`): time of each latent frame.
        window (`int`): in latent frames, 0 for the frame itself and the anchors.

    Returns:
        `torch.Tensor` of shape `(B, F, F)`, `bool`.
    """
    frame = torch.arange(timestep.shape[1], device=timestep.device)
    near = (frame[:, None] - frame).abs() <= window
    anchors = timestep < timestep.amax(dim=1, keepdim=True)
    return near | anchors[:, None, :] | ~anchors.any(dim=1)[:, None, None]


def frame_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Softmax attention over all tokens, those of unseen frames masked: the definition.

    Args:
        query, key, value (`torch.Tensor` of shape `(B, L, N, H)`): tokens, frame by frame.
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
    """[`frame_attention`] without a mask: frames that see the same attend together, to the keys of those alone.

    `seen` is read on the host, which a graph of torch.compile cannot hold.
    """
    tables = seen.tolist()
    if any(table != tables[0] for table in tables):
        samples = zip(*(x.split(1) for x in (query, key, value, seen)), strict=True)
        return torch.cat([gathered_frame_attention(*sample) for sample in samples])

    groups: dict[tuple[int, ...], list[int]] = {}
    for frame, row in enumerate(tables[0]):
        groups.setdefault(tuple(other for other, sees in enumerate(row) if sees), []).append(frame)
    tokens = query.shape[1] // seen.shape[1]
    queries, keys, values = (x.transpose(1, 2).split(tokens, dim=2) for x in (query, key, value))  # (B, N, T, H)
    outs: dict[int, torch.Tensor] = {}
    for others, frames in groups.items():
        out = F.scaled_dot_product_attention(
            torch.cat([queries[frame] for frame in frames], dim=2),
            torch.cat([keys[frame] for frame in others], dim=2),
            torch.cat([values[frame] for frame in others], dim=2),
        )
        outs.update(zip(frames, out.split(tokens, dim=2), strict=True))
    return torch.cat([outs[frame] for frame in range(len(outs))], dim=2).transpose(1, 2)


def flex_frame_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """[`frame_attention`] as FlexAttention, which skips unseen blocks inside a graph of torch.compile on a GPU."""
    mask = _block_mask(seen, query.shape[1])
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return flex_attention(query, key, value, block_mask=mask).transpose(1, 2)


def _block_mask(seen: torch.Tensor, num_tokens: int) -> BlockMask:
    """Which blocks of tokens see which, from the table alone: a mask of all pairs of tokens is never built."""
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
    """How many are set in each row, and their columns, in order and before all others."""
    columns = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32), columns.to(torch.int32)
