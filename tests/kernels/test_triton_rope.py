"""The Triton kernels of query-key norm and rotary embedding against the definition in float64, and in the model."""

import pytest
import torch

from diffusers_fvg import kernels
from diffusers_fvg.kernels import reference


pytest.importorskip("triton")

EPS = 1e-6
NAMES = ("query", "key", "gradient of query", "gradient of key", "gradient of query_weight", "gradient of key_weight")
# (B, L, heads, head_dim): odd head counts and prime lengths, heads that are no power of two, more tokens than one backward
# program sums and a sample that ends inside its piece, the width of Wan's 14B models.
SHAPES = [(2, 7, 3, 6), (1, 13, 2, 12), (2, 1, 1, 2), (2, 11, 5, 10), (1, 2, 40, 128)]


def make(shape, device, dtype=torch.float32, samples=1):
    """Query, key, their weights; angles of one sample or of each; gradients of the outputs."""
    batch, length, heads, head_dim = shape
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randn(batch, length, heads * head_dim, generator=generator) for _ in range(2)]
    weights = [torch.randn(heads * head_dim, generator=generator) + 1 for _ in range(2)]
    angle = torch.rand(samples, length, 1, head_dim // 2, generator=generator) * 6
    angles = [turn.repeat_interleave(2, dim=-1).to(device) for turn in (angle.cos(), angle.sin())]
    grads = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2)]
    return [tensor.to(device, dtype) for tensor in (*tokens, *weights)], angles, grads


def results(module, tensors, angles, grads):
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    outs = module.rms_norm_rope(*tensors, *angles, EPS)
    return dict(zip(NAMES, (*outs, *torch.autograd.grad(outs, tensors, grads)), strict=True))


def assert_close(actual, expected, name, rounding=0.0):
    """Within one rounding of each value, and the error of float32 sums, which goes with the largest values."""
    atol = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(
        actual.double(), expected, rtol=rounding, atol=atol, msg=lambda message: f"{name}: {message}"
    )


def check(tensors, angles, grads, rounding=0.0):
    with kernels.use_kernels("triton"):
        actual = results(kernels, tensors, angles, grads)
    expected = results(reference, *([t.double().contiguous() for t in group] for group in (tensors, angles, grads)))
    for name, value in actual.items():
        assert_close(value, expected[name], name, rounding)
    return actual


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(shape, device, guarded):
    check(*make(shape, device))


def test_angles_of_each_sample(device, guarded, layouts):
    tensors, (cos, sin), grads = make((2, 7, 3, 6), device, samples=2)
    assert (cos[0] - cos[1]).abs().max() > 0.1
    check(tensors, (layouts.windowed(cos), layouts.transposed(sin)), grads)


def test_strided_tensors(device, guarded, layouts):
    (query, key, *weights), (cos, sin), grads = make((2, 5, 3, 6), device)
    # Chunks of one fused projection, then no two tensors alike.
    fused = layouts.windowed(torch.cat([query, key, key], dim=2)).chunk(3, dim=2)
    grads = [layouts.windowed(grads[0].transpose(1, 2)).transpose(1, 2), layouts.transposed(grads[1])]
    weights = [weight.repeat_interleave(2)[::2] for weight in weights]
    angles = (layouts.windowed(cos), layouts.transposed(sin))
    check((*fused[:2], *weights), angles, grads)
    check((fused[0], layouts.transposed(key), *weights), angles[::-1], grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_tokens_are_rounded_once(dtype, device, guarded, half_bound):
    found = check(*make((1, 7, 3, 6), device, dtype), rounding=half_bound[dtype])
    assert {value.dtype for value in found.values()} == {dtype}


def test_frozen_weights(device, guarded):
    tensors, angles, grads = make((2, 7, 3, 6), device)
    expected = results(reference, *([t.double() for t in group] for group in (tensors, angles, grads)))
    query, key, *weights = tensors
    query.requires_grad_()
    key.requires_grad_()
    with kernels.use_kernels("triton"):
        outs = kernels.rms_norm_rope(query, key, *weights, *angles, EPS)
    for name, value in zip(NAMES[2:4], torch.autograd.grad(outs, (query, key), grads), strict=True):
        assert_close(value, expected[name], name)


def test_gradient_of_one_output_alone(device, guarded):
    tensors, angles, (grad, _) = make((2, 7, 3, 6), device)
    expected = results(
        reference, *([t.double() for t in g] for g in (tensors, angles, (grad, torch.zeros_like(grad))))
    )
    tensors = [tensor.requires_grad_() for tensor in tensors]
    with kernels.use_kernels("triton"):
        query, _ = kernels.rms_norm_rope(*tensors, *angles, EPS)
    for name, value in zip(NAMES[2:], torch.autograd.grad(query, tensors, grad, materialize_grads=True), strict=True):
        assert_close(value, expected[name], name)


def test_operator_is_well_formed(device):
    from diffusers_fvg.kernels import triton_rope

    tensors, angles, _ = make((2, 3, 3, 6), device)
    torch.library.opcheck(triton_rope._rms_norm_rope_op, (*(t.requires_grad_() for t in tensors), *angles, EPS))


def test_the_model_on_these_kernels_equals_the_stock_class(device):
    """Output and gradients of a whole transformer with an anchor, all operations in Triton.

    `test_triton_attention.py` compiles such a model.
    """
    from diffusers import WanTransformer3DModel

    from diffusers_fvg.animate.transformer_anchor import AnchorConditionedTransformer3D

    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "text_dim": 32,
        "ffn_dim": 32,
        "num_layers": 1,
        "freq_dim": 32,
        "rope_max_seq_len": 32,
    }
    torch.manual_seed(0)
    stock = WanTransformer3DModel(**config)
    ours = AnchorConditionedTransformer3D.from_config(stock.config)
    ours.load_state_dict(stock.state_dict())
    inputs = {"hidden_states": torch.randn(1, 16, 3, 2, 4), "encoder_hidden_states": torch.randn(1, 5, 32)}
    timestep = torch.tensor([[0.0, 700.0, 700.0]])
    target = torch.randn(1, 16, 3, 2, 4)

    outputs = []
    for model, times, choice in (
        (stock, timestep.repeat_interleave(2, dim=1), "reference"),
        (ours, timestep, "triton"),
    ):
        model.to(device)
        with kernels.use_kernels(choice):
            moved = {name: value.to(device) for name, value in inputs.items()}
            sample = model(**moved, timestep=times.to(device)).sample
            (sample - target.to(device)).square().mean().backward()
        outputs.append(sample)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
