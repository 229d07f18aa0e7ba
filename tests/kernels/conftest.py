"""The Triton kernels run on two devices: CUDA (marker `gpu`), and the CPU through Triton's interpreter.

The interpreter is chosen when triton is imported, and diffusers imports it, so a process has the one or the other:
`test_interpreter.py` runs the files `test_triton_*.py` again in a process of its own, with TRITON_INTERPRET=1.
"""

import math
import os
from types import SimpleNamespace

import pytest
import torch


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
        cuda = pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])
        metafunc.parametrize("device", ["cpu"] if INTERPRETED else [cuda])


@pytest.fixture
def half_bound():
    """Largest relative error of one rounding to a dtype. The interpreter cuts bfloat16 off where a GPU rounds it."""
    return {torch.float16: 2**-11, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8}


class _Guarded:
    """`torch`, but its `empty` holds NaN, with more NaN on both sides."""

    GUARD = 64

    def __init__(self):
        self.buffers = []

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, shape, dtype, device):
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        numel = math.prod(shape)
        buffer = torch.full((numel + 2 * self.GUARD,), math.nan, dtype=dtype, device=device)
        self.buffers.append(buffer)
        return buffer[self.GUARD : self.GUARD + numel].view(shape)

    def check(self):
        for buffer in self.buffers:
            assert buffer[: self.GUARD].isnan().all() and buffer[-self.GUARD :].isnan().all(), "written out of bounds"


@pytest.fixture
def guarded(monkeypatch):
    """Output memory of the Triton kernels starts as NaN, and writes beside it are found: what is not written, shows."""
    from diffusers_fvg.kernels import triton_attention, triton_modulation, triton_norm, triton_rope

    guard = _Guarded()
    for module in (triton_attention, triton_modulation, triton_norm, triton_rope):
        monkeypatch.setattr(module, "torch", guard)
    yield
    assert guard.buffers
    guard.check()


@pytest.fixture
def layouts():
    """Ways to lay a tensor out in memory, by name. What surrounds it in memory is NaN, so reads beside it show."""

    def windowed(tensor):
        sizes = [n + 3 for n in tensor.shape]
        window = tensor.new_full(sizes, math.nan)[tuple(slice(1, 1 + n) for n in tensor.shape)]
        return window.copy_(tensor)

    def transposed(tensor):
        return windowed(tensor.transpose(1, -1)).transpose(1, -1)

    return SimpleNamespace(packed=torch.Tensor.contiguous, windowed=windowed, transposed=transposed)
