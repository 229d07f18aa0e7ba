"""Seeds of a call: every video has one for its noise, and one for its anchor that is derived from it."""

from __future__ import annotations

import torch


def draw_seed(generator: torch.Generator | None = None) -> int:
    """A seed from the generator, or from torch's own."""
    return int(torch.randint(2**31, (1,), generator=generator, device=generator.device if generator else None))


def anchor_seeds(generator: torch.Generator | list[torch.Generator], num_videos: int) -> list[int]:
    """Seeds for the anchors from copies of the generators, whose own state stays for the video's noise."""
    if isinstance(generator, list):
        return [draw_seed(item.clone_state()) for item in generator]
    copy = generator.clone_state()
    return [draw_seed(copy) for _ in range(num_videos)]
