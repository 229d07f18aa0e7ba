"""torch.compile by repeated block: how many graphs are made, counted by the backend that is asked for them."""

import pytest
import torch
from test_placement import LORA, SIZE
from tiny import tiny_pipeline, tiny_transformer
from torch._dynamo.testing import CompileCounter

from diffusers_fvg import AnchorLora


FRAMES = 3


@pytest.fixture
def counter():
    """A backend that runs graphs as they are and counts them. `fullgraph` makes a break an error."""
    torch.compiler.reset()
    yield CompileCounter()
    torch.compiler.reset()


@torch.no_grad()
def forward(model, times: list[float], seed: int = 0) -> torch.Tensor:
    """One time for the sample, or one for each latent frame."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 16, FRAMES, 4, 4, generator=generator)
    text = torch.randn(1, 8, 32, generator=generator)
    timestep = torch.tensor(times) if len(times) == 1 else torch.tensor([times])
    return model(latents, timestep, text, return_dict=False)[0]


def test_one_graph_for_all_blocks_steps_prompts_and_anchors(counter):
    eager, model = tiny_transformer(anchored=True), tiny_transformer(anchored=True)
    model.compile_repeated_blocks(backend=counter, fullgraph=True)
    steps = [
        [0.0, 900.0, 900.0],
        [0.0, 600.0, 600.0],
        # A soft anchor at the end, and none.
        [600.0, 600.0, 120.0],
        [600.0],
        [0.0, 300.0, 300.0],
        [300.0],
    ]
    for seed, times in enumerate(steps):
        torch.testing.assert_close(forward(model, times, seed), forward(eager, times, seed))
        assert counter.frame_count == 1, times


def test_a_pipeline_makes_its_graphs_in_the_first_call_of_each_mode(counter):
    pipe = tiny_pipeline(anchor_lora=AnchorLora({k: v for k, v in LORA.items() if k.startswith("transformer.")}))
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.compile_repeated_blocks(backend=counter, fullgraph=True)

    def call(prompt: str, **options) -> int:
        pipe(prompt, generator=torch.Generator().manual_seed(0), **(SIZE | options))
        return counter.frame_count

    first = call("a red circle")
    assert first > 0
    # Another prompt, other steps and guidance; conditional and unconditional branches are in each.
    assert call("two dogs on a green leaf", num_inference_steps=3, guidance_scale=3.0) == first
    # Without an anchor its LoRA is off, which is a graph of its own.
    both = call("a red circle", mode="direct")
    assert both <= 2 * first
    for mode in ("factorized", "direct", "factorized"):
        assert call("a cat", mode=mode) == both
    # So is one with the LoRA in the weights, made once.
    pipe.fuse_lora()
    fused = call("a red circle")
    assert both < fused <= both + first
    assert call("two dogs", num_inference_steps=3) == fused
