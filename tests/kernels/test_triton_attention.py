"""The Triton kernels of attention between frames against the definition in float64, and in the model."""

import pytest
import torch

from diffusers_fvg import kernels
from diffusers_fvg.kernels import attention


pytest.importorskip("triton")

NAMES = ("out", "gradient of query", "gradient of key", "gradient of value")
# (B, F, T, heads, head_dim): prime frame sizes, one token a frame, heads that are no power of two, frames of several
# blocks of the owned and of the passing tokens, Wan's heads.
SHAPES = [(2, 3, 5, 2, 12), (1, 4, 1, 1, 36), (1, 2, 37, 1, 64), (1, 2, 131, 1, 128)]


def make(shape, device, dtype=torch.float32):
    """Query, key, value; frames that see each other; gradient of the output."""
    batch, frames, tokens, heads, head_dim = shape
    generator = torch.Generator().manual_seed(0)
    size = (batch, frames * tokens, heads, head_dim)
    tensors = [torch.randn(size, generator=generator).to(device, dtype) for _ in range(4)]
    times = torch.full((batch, frames), 900.0)
    # The last frame is an anchor, and in a second clip the second one alone.
    times[0, -1] = 0
    times[1:, 1] = 0
    return tensors[:3], attention.anchor_window(times, 0).to(device), tensors[3]


def results(function, tensors, seen, grad):
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*tensors, seen)
    return dict(zip(NAMES, (out, *torch.autograd.grad(out, tensors, grad)), strict=True))


def check(tensors, seen, grad, limit=1e-6):
    """Relative RMS errors, of which weights rounded to the inputs' dtype make most."""
    with kernels.use_kernels("triton"):
        actual = results(kernels.frame_attention, tensors, seen, grad)
    expected = results(attention.frame_attention, [t.double().contiguous() for t in tensors], seen, grad.double())
    for name, value in actual.items():
        error = ((value.double() - expected[name]).square().mean() / expected[name].square().mean()).sqrt()
        assert error < limit, f"{name}: {error}"
    return actual


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(shape, device, guarded):
    check(*make(shape, device))


def test_all_frames_and_frames_nobody_sees(device, guarded):
    tensors, seen, grad = make((1, 3, 5, 1, 12), device)
    check(tensors, torch.ones_like(seen), grad)
    nobody_sees_1 = torch.tensor([[[True, False, True], [True, False, False], [False, False, True]]], device=device)
    found = check(tensors, nobody_sees_1, grad)
    assert (found["gradient of key"][:, 5:10] == 0).all() and (found["gradient of value"][:, 5:10] == 0).all()


def test_strided_tensors(device, guarded, layouts):
    (query, key, value), seen, grad = make((2, 3, 5, 2, 12), device)
    # Chunks of one fused projection, then no two tensors alike.
    fused = layouts.windowed(torch.cat([query, key, value], dim=2)).chunk(3, dim=2)
    check(fused, seen, layouts.windowed(grad.transpose(1, 2)).transpose(1, 2))
    check((fused[0], layouts.transposed(key), layouts.windowed(value)), seen, layouts.transposed(grad))


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_whose_exponentials_leave_float32(sign, device, guarded):
    (query, key, value), seen, grad = make((1, 3, 5, 1, 12), device)
    # One channel adds 180 to every score, or takes it off: no weight changes, every exponential does.
    query[..., 0], key[..., 0] = 25, sign * 25
    check((query, key, value), seen, grad, limit=5e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_tokens(dtype, device, guarded, half_bound):
    found = check(*make((1, 2, 5, 2, 12), device, dtype), limit=1.5 * half_bound[dtype])
    assert {value.dtype for value in found.values()} == {dtype}


def test_sums_over_many_blocks_of_narrow_tokens(device, guarded, half_bound):
    """Rounded inputs and weights make an error of 0.65 bounds, sums that are rounded after each block one of 0.85 or more."""
    tensors, seen, grad = make((1, 2, 160, 1, 16), device, torch.float16)
    check(tensors, torch.ones_like(seen), grad, limit=0.75 * half_bound[torch.float16])


def test_wide_heads_are_left_to_plain_torch(device):
    tensors, seen, grad = make((1, 2, 3, 1, 130), device)
    with (
        kernels.use_kernels("triton"),
        pytest.raises(ValueError, match="130 channels, but the kernels support up to 128"),
    ):
        kernels.frame_attention(*tensors, seen)


def test_operator_is_well_formed(device):
    from diffusers_fvg.kernels import triton_attention

    tensors, seen, _ = make((1, 2, 3, 1, 12), device)
    torch.library.opcheck(triton_attention._frame_attention_op, (*(t.requires_grad_() for t in tensors), seen))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_model_with_a_window(compiled, device):
    """Output and gradients of a whole transformer, all operations in Triton, against plain torch."""
    from diffusers_fvg.animate.transformer_anchor import AnchorConditionedTransformer3D

    config = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32, "ffn_dim": 32, "num_layers": 1}
    torch.manual_seed(0)
    model = AnchorConditionedTransformer3D(**config, freq_dim=32, rope_max_seq_len=32).to(device)
    model.set_anchor_window(0)
    latents, text = torch.randn(1, 16, 3, 2, 4, device=device), torch.randn(1, 5, 32, device=device)
    timestep = torch.tensor([[0.0, 700.0, 700.0]], device=device)
    found = []
    for choice in ("reference", "triton"):
        if compiled and choice == "triton":
            torch._dynamo.reset()
            model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        model.zero_grad()
        with kernels.use_kernels(choice):
            sample = model(latents, timestep, text).sample
            sample.square().mean().backward()
        found.append((sample, {name: parameter.grad for name, parameter in model.named_parameters()}))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)
