"""Two processes, talking over gloo, make what one makes."""

import os

import pytest
import torch
from accelerate import PartialState
from diffusers import ContextParallelConfig
from forked import finish, start_processes
from tiny import tiny_pipeline


# 3 latent frames of 4 tokens: the second half of the tokens begins in the middle of a frame.
SIZE = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16, "num_inference_steps": 2}
PROMPTS = ["a red circle", "two dogs", "a green leaf", "a blue star"]


def generate(pipe, prompts: list[str], **options) -> torch.Tensor:
    """A seed for each prompt, whichever process it is made in."""
    generators = [torch.Generator().manual_seed(PROMPTS.index(prompt)) for prompt in prompts]
    return pipe(prompts, generator=generators, output_type="pt", **(SIZE | options)).frames


def make_pipeline():
    torch.set_num_threads(1)
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def start(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)


def context_parallel(rank: int, folder: str) -> None:
    start(rank, folder)
    # diffusers asks for an accelerator; the CPU passes for one.
    torch._C._get_accelerator = lambda: torch.device("cpu")
    torch.accelerator.device_count = lambda: 1
    pipe = make_pipeline()
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    tokens = []
    pipe.transformer.blocks[0].ffn.register_forward_pre_hook(lambda module, args: tokens.append(args[0].shape[1]))
    frames = {mode: generate(pipe, PROMPTS[:1], mode=mode) for mode in ("factorized", "direct")}
    assert set(tokens) == {6}, tokens
    torch.save(frames, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def data_parallel(rank: int, folder: str) -> None:
    # What `accelerate launch --num_processes 2` tells a process.
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in names.items()})
    start(rank, folder)
    pipe = make_pipeline()
    state = PartialState(cpu=True)
    assert state.num_processes == 2
    with state.split_between_processes(PROMPTS) as prompts:
        assert len(prompts) == 2
        frames = generate(pipe, prompts)
    gathered = [torch.empty_like(frames) for _ in range(2)]
    torch.distributed.all_gather(gathered, frames.contiguous())
    torch.save(torch.cat(gathered), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


def test_context_parallel_splits_the_tokens_of_a_video(pipe, tmp_path):
    finish(start_processes(context_parallel, [(rank, str(tmp_path)) for rank in range(2)]))
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for mode in ("factorized", "direct"):
        expected = generate(pipe, PROMPTS[:1], mode=mode)
        for result in results:
            torch.testing.assert_close(result[mode], expected, rtol=0, atol=1e-5)


def test_data_parallel_splits_the_prompts(pipe, tmp_path):
    finish(start_processes(data_parallel, [(rank, str(tmp_path)) for rank in range(2)]))
    expected = torch.cat([generate(pipe, [prompt]) for prompt in PROMPTS])
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, rtol=0, atol=1e-5)
