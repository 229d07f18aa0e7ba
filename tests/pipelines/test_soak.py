"""Many calls in a row of one pipeline: neither memory nor time grows."""

import gc
import statistics
import time

import psutil
import pytest
import torch

from diffusers_fvg import load_embedded


CALLS = 500
# Of all three stages, as small as they go.
SIZE = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 2}
COMPOSER = {"composer_num_inference_steps": 2, "composer_num_candidates": 1}
MODES = ({"mode": "factorized", **COMPOSER}, {"mode": "direct"}, {"mode": "storyboard", "num_moments": 2, **COMPOSER})


@pytest.mark.slow
def test_500_calls_take_no_more_memory_and_no_more_time(capsys):
    pipe, process = load_embedded(), psutil.Process()
    pipe.set_progress_bar_config(disable=True)
    memory, seconds, tensors, files = [], [], [], []
    for call in range(CALLS):
        began = time.process_time()
        generator = torch.Generator().manual_seed(call)
        pipe("A red circle moves to the right", generator=generator, **SIZE, **MODES[call % 3])
        seconds.append(time.process_time() - began)
        # What is this process's alone, also where the system has put it away.
        own = process.memory_full_info()
        memory.append((own.uss + own.swap) / 2**20)
        if call % 50 == 49:
            gc.collect()
            # A search leaves out what it has found in use before (see conftest.py), and with it what leaks.
            gc.unfreeze()
            tensors.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
            files.append(process.num_fds())
            with capsys.disabled():
                tenth = slice(call - 49, call + 1)
                # Of one mode, since the three take different times.
                took = statistics.median(seconds[number] for number in range(call - 49, call + 1) if number % 3 == 0)
                print(
                    f"calls {call - 48} to {call + 1}: {statistics.median(memory[tenth]):.1f} MiB, "
                    f"{took:.3f} s of processor time, {tensors[-1]} tensors, {files[-1]} files",
                    flush=True,
                )
    # From one tenth to the next, the allocator keeps up to 6 MiB more or less.
    tenths = [statistics.median(memory[start : start + 50]) for start in range(0, CALLS, 50)]
    assert tenths[-1] < max(tenths[:3]) + 4, tenths
    for mode in range(3):
        early, late = (statistics.median(seconds[mode::3][part]) for part in (slice(16, 50), slice(-34, None)))
        assert late < 1.25 * early, (mode, early, late)
    assert tensors[-1] <= tensors[1] and files[-1] <= files[1]
