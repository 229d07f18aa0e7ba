"""The Triton kernels at the size and in the dtype of Wan2.2-5B, on a GPU: frames of 880 tokens, heads of 128, bfloat16.

Limits are a few times what rounding to bfloat16 makes: half of 2^-8 for a value, as much again for weights and sums that
are rounded on the way. What one NVIDIA H200 reached stands in `examples/results/gpu`.
"""

import pytest
import torch

from diffusers_fvg import kernels
from diffusers_fvg.kernels import attention, reference


pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
HEADS, HEAD_DIM, FRAME_TOKENS = 24, 128, 880
DIM = HEADS * HEAD_DIM


def check(fused, defined, tensors, limit):
    """Outputs and all gradients, against the definition in float64, as relative RMS errors."""
    found, grads = [], None
    with kernels.use_kernels("triton"):
        for function, dtype in ((fused, None), (defined, torch.float64)):
            inputs = [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in tensors]
            out = function(*inputs)
            outs = out if isinstance(out, tuple) else (out,)
            grads = grads or [torch.randn_like(value) for value in outs]
            found.append([*outs, *torch.autograd.grad(outs, inputs, [g.to(o.dtype) for g, o in zip(grads, outs)])])
    for actual, expected in zip(*found, strict=True):
        error = (actual.double() - expected).square().mean() / expected.square().mean()
        assert error.sqrt() < limit


def draw(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda", dtype=dtype)


# Whole blocks and a last one that is cut; two clips with different anchors.
@pytest.mark.parametrize(("batch", "frames", "tokens"), [(2, 5, FRAME_TOKENS), (1, 4, FRAME_TOKENS - 7)])
def test_window_attention(batch, frames, tokens):
    torch.manual_seed(0)
    times = torch.full((batch, frames), 900.0, device="cuda")
    times[0, 0] = times[-1, 2] = 0
    seen = attention.anchor_window(times, 1)
    check(
        lambda *qkv: kernels.frame_attention(*qkv, seen),
        lambda *qkv: attention.frame_attention(*qkv, seen),
        [draw(batch, frames * tokens, 2, HEAD_DIM) for _ in range(3)],
        limit=1e-2,
    )


def test_modulation_and_rotary_embedding():
    torch.manual_seed(0)
    frames, length = 7, 7 * FRAME_TOKENS
    x, y = draw(1, length, DIM), draw(1, length, DIM)
    rows = [draw(1, frames, DIM, dtype=torch.float32) for _ in range(3)]
    weights = [1 + draw(DIM) / 8 for _ in range(2)]
    angles = (6.28 * torch.rand(1, length, 1, HEAD_DIM // 2, device="cuda")).repeat_interleave(2, -1)
    cos, sin = angles.cos(), angles.sin()
    for name, tensors, constants in (
        ("modulated_layer_norm", [x, *rows[:2]], (1e-6,)),
        ("gated_residual", [x, y, rows[2]], ()),
        ("rms_norm_rope", [x, y, *weights], (cos, sin, 1e-6)),
    ):
        wide = [value.double() if torch.is_tensor(value) else value for value in constants]
        check(
            lambda *t, name=name, constants=constants: getattr(kernels, name)(*t, *constants),
            lambda *t, name=name, wide=wide: getattr(reference, name)(*t, *wide),
            tensors,
            limit=2.5e-3,
        )
