"""The Triton kernels of the modulation against the definition in float64: output and every gradient."""

import contextlib
import copy

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from diffusers_fvg import kernels
from diffusers_fvg.kernels import reference


pytest.importorskip("triton")

EPS = 1e-6
# (B, L, D, R): one time per sample, per frame and per token; odd and prime sizes; runs longer than what one backward
# program sums; widths of several blocks of the elementwise kernel; the widest that the dispatcher takes.
SHAPES = [
    (2, 12, 8, 1),
    (2, 12, 8, 3),
    (1, 15, 7, 5),
    (2, 7, 33, 7),
    (2, 13, 33, 1),
    (1, 1, 5, 1),
    (2, 74, 40, 2),
    (1, 5, 1100, 1),
    (1, 2, 8192, 1),
]
# Rows of a shard that begins and ends inside a frame; in any order, with a row nobody has.
INDICES = {"shard": [0] * 3 + [1] * 35 + [2] * 2, "any_order": [3, 0, 1, 1, 3, 0, 0]}
TENSORS = ("hidden_states", "residual", "scale", "shift")


def make(shape, device, seed=0, dtype=torch.float32):
    """Tokens, residual, two tables, and the gradient of the output."""
    batch, length, dim, rows = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = [(batch, length, dim)] * 2 + [(batch, rows, dim)] * 2 + [(batch, length, dim)]
    # A mean that is not 0: it has to be taken off before the variance.
    tensors = [torch.randn(size, generator=generator) + 3 for size in sizes]
    return [tensor.to(device, dtype) for tensor in tensors]


def norm_and_gate(module, tensors, row_index):
    x, residual, scale, shift = tensors
    return {
        "modulated_layer_norm": (module.modulated_layer_norm(x, scale, shift, EPS, row_index), (x, scale, shift)),
        "gated_residual": (module.gated_residual(x, residual, scale, row_index), (x, residual, scale)),
    }


def results(module, tensors, grad, row_index):
    """Outputs and gradients of both operations, by name."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    names = {id(tensor): name for tensor, name in zip(tensors, TENSORS, strict=True)}
    found = {}
    choice = kernels.use_kernels("triton") if module is kernels else contextlib.nullcontext()
    with choice:
        for operation, (out, inputs) in norm_and_gate(module, tensors, row_index).items():
            found[operation] = out
            for tensor, gradient in zip(inputs, torch.autograd.grad(out, inputs, grad), strict=True):
                found[f"{operation}, gradient of {names[id(tensor)]}"] = gradient
    return found


def assert_close(actual, expected, name, rounding=0.0):
    """Within one rounding of each value, and the error of float32 sums, which goes with the largest values."""
    atol = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(
        actual.double(), expected, rtol=rounding, atol=atol, msg=lambda message: f"{name}: {message}"
    )


def check(tensors, grad, row_index=None, rounding=0.0):
    actual = results(kernels, tensors, grad, row_index)
    wide = [tensor.double().contiguous() for tensor in tensors]
    expected = results(reference, wide, grad.double().contiguous(), row_index)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_close(value, expected[name], name, rounding)
    return actual


@pytest.mark.parametrize("dim", [40, 1100])
def test_a_norm_with_weights(dim, device, guarded):
    """Outputs and all gradients, against LayerNorm in float64."""
    x, *_, grad = make((2, 13, dim, 1), device)
    norm = torch.nn.LayerNorm(dim, eps=EPS, device=device)
    torch.nn.init.normal_(norm.weight, 1, 0.3)
    torch.nn.init.normal_(norm.bias)
    found = []
    for dtype in (torch.float32, torch.float64):
        module, tokens = copy.deepcopy(norm).to(dtype), x.to(dtype).requires_grad_()
        with kernels.use_kernels("triton" if dtype == torch.float32 else "auto"):
            out = kernels.layer_norm(tokens, module)
        found.append((out, *torch.autograd.grad(out, (tokens, module.weight, module.bias), grad.to(dtype))))
    for actual, expected, name in zip(*found, ("out", "tokens", "weight", "bias"), strict=True):
        assert_close(actual, expected, name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(shape, device, guarded):
    *tensors, grad = make(shape, device)
    check(tensors, grad)


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES.keys())
def test_row_index(index, index_dtype, device, guarded):
    *tensors, grad = make((2, len(index), 33, 4), device)
    # Every second entry of a longer tensor.
    row_index = torch.tensor(index, dtype=index_dtype, device=device).repeat_interleave(2)[::2]
    check(tensors, grad, row_index)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("indexed", [False, True])
def test_strided_tensors(first, indexed, device, guarded, layouts):
    # No two inputs of an operation lie in memory alike.
    order = (layouts.windowed, layouts.transposed, layouts.packed)
    tensors = make((2, 14, 33, 2), device)
    ranks = [0, 1, 1, 2, 2]
    *tensors, grad = (order[(first + rank) % 3](tensor) for rank, tensor in zip(ranks, tensors, strict=True))
    row_index = torch.tensor([0] * 5 + [1] * 9, device=device) if indexed else None
    check(tensors, grad, row_index)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("table_dtype", [torch.float32, None], ids=["float32_tables", "narrow_tables"])
def test_narrow_tokens_are_rounded_once(dtype, table_dtype, device, guarded, half_bound):
    x, residual, scale, shift, grad = make((1, 12, 65, 2), device, dtype=dtype)
    scale, shift = scale.to(table_dtype or dtype), shift.to(table_dtype or dtype)
    tensors = (x, residual, scale, shift)
    found = check(tensors, grad, rounding=half_bound[dtype])
    given = dict(zip(TENSORS, tensors, strict=True))
    for name, value in found.items():
        assert value.dtype == given[name.rpartition(" of ")[2] if " of " in name else "hidden_states"].dtype, name


def test_float32_tokens_with_a_bfloat16_branch(device, guarded, half_bound):
    # What autocast gives.
    x, residual, scale, shift, grad = make((1, 6, 9, 3), device)
    found = check((x, residual.bfloat16(), scale, shift), grad, rounding=half_bound[torch.bfloat16])
    assert found["gated_residual"].dtype == torch.float32
    assert found["gated_residual, gradient of residual"].dtype == torch.bfloat16


@pytest.mark.parametrize("indexed", [False, True])
def test_frozen_tables(indexed, device, guarded):
    """With an adapter on frozen weights the tables need no gradient; then the branch is not kept either."""
    x, residual, scale, shift, grad = make((2, 12, 8, 3), device)
    row_index = torch.tensor([0] * 5 + [1] * 4 + [2] * 3, device=device) if indexed else None
    expected = results(reference, [t.double() for t in (x, residual, scale, shift)], grad.double(), row_index)
    x.requires_grad_()
    residual.requires_grad_()
    kept = []
    with kernels.use_kernels("triton"), saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        normed, gated = (out for out, _ in norm_and_gate(kernels, (x, residual, scale, shift), row_index).values())
    assert not any(t is residual or t.data_ptr() == residual.data_ptr() for t in kept)
    (dx,) = torch.autograd.grad(normed, x, grad)
    dgated = torch.autograd.grad(gated, (x, residual), grad)
    names = ("modulated_layer_norm, gradient of hidden_states",)
    names += ("gated_residual, gradient of hidden_states", "gated_residual, gradient of residual")
    for name, value in zip(names, (dx, *dgated), strict=True):
        assert_close(value, expected[name], name)


def test_gradient_of_shift_alone(device, guarded):
    x, residual, scale, shift, grad = make((2, 12, 8, 3), device)
    shift.requires_grad_()
    with kernels.use_kernels("triton"):
        out = kernels.modulated_layer_norm(x, scale, shift, EPS)
    (dshift,) = torch.autograd.grad(out, shift, grad)
    torch.testing.assert_close(dshift, grad.unflatten(1, (3, 4)).sum(2))


@pytest.mark.parametrize("indexed", [False, True])
def test_operators_are_well_formed(indexed, device):
    """Schema, shapes without data, autograd registration, and tracing with symbolic sizes."""
    from diffusers_fvg.kernels import triton_modulation

    *tensors, _ = make((2, 6, 5, 3), device)
    x, residual, scale, shift = (tensor.requires_grad_() for tensor in tensors)
    row_index = torch.tensor([0, 0, 1, 2, 2, 2], device=device) if indexed else None
    torch.library.opcheck(triton_modulation._layer_norm_op, (x, scale, shift, EPS, row_index))
    torch.library.opcheck(triton_modulation._gated_residual_op, (x, residual, scale, row_index))


def test_compiles_as_one_graph(device):
    *tensors, grad = make((2, 12, 8, 3), device)

    def both(*tensors):
        return [out for out, _ in norm_and_gate(kernels, tensors, None).values()]

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    with kernels.use_kernels("triton"):
        actual, expected = compiled(*tensors), both(*tensors)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=0)
    sums = [sum((out * grad).sum() for out in outs) for outs in (actual, expected)]
    for a, e in zip(*(torch.autograd.grad(total, tensors) for total in sums), strict=True):
        torch.testing.assert_close(a, e)
    with kernels.use_kernels("reference"):  # the choice is not frozen into the graph
        for a, e in zip(compiled(*tensors), both(*tensors), strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=0)


def test_asking_for_the_impossible(device):
    x, residual, scale, shift, _ = make((1, 4, 6, 2), device)
    wide = make((1, 2, 8193, 1), device)
    with kernels.use_kernels("triton"):
        with pytest.raises(ValueError, match="a tensor is torch.float64, but the kernels support float32"):
            kernels.gated_residual(x, residual, scale.double())
        with pytest.raises(ValueError, match="8193 channels, but the kernels support up to 8192"):
            kernels.modulated_layer_norm(wide[0], wide[2], wide[3], EPS)
    with kernels.use_kernels("auto"):
        out = kernels.gated_residual(x.double(), residual.double(), scale.double())
    assert out.dtype == torch.float64
