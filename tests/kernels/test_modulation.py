"""The modulation operations against a float64 computation token by token."""

import pytest
import torch

from diffusers_fvg import kernels


EPS = 1e-6
# (B, L, D, R): one time per sample, per frame and per token; odd sizes.
SHAPES = [(2, 12, 8, 1), (2, 12, 8, 3), (1, 15, 7, 5), (3, 7, 33, 7), (1, 1, 5, 1)]


def make(shape, seed=0):
    batch, length, dim, rows = shape
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randn(batch, length, dim, generator=generator, dtype=torch.float64) for _ in range(2)]
    tables = [torch.randn(batch, rows, dim, generator=generator, dtype=torch.float64) for _ in range(2)]
    return (*tokens, *tables)


def norm_by_token(x, scale, shift, row_of_token):
    out = torch.empty_like(x)
    for b in range(x.shape[0]):
        for token, row in enumerate(row_of_token):
            centred = x[b, token] - x[b, token].mean()
            normed = centred / (centred.square().mean() + EPS).sqrt()
            out[b, token] = normed * (1 + scale[b, row]) + shift[b, row]
    return out


def gate_by_token(x, residual, gate, row_of_token):
    out = torch.empty_like(x)
    for b in range(x.shape[0]):
        for token, row in enumerate(row_of_token):
            out[b, token] = x[b, token] + residual[b, token] * gate[b, row]
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_apply_to_equal_runs_of_tokens(shape):
    x, residual, scale, shift = make(shape)
    row_of_token = [token * shape[3] // shape[1] for token in range(shape[1])]
    normed = kernels.modulated_layer_norm(x, scale, shift, EPS)
    torch.testing.assert_close(normed, norm_by_token(x, scale, shift, row_of_token), rtol=1e-12, atol=1e-12)
    gated = kernels.gated_residual(x, residual, scale)
    torch.testing.assert_close(gated, gate_by_token(x, residual, scale, row_of_token), rtol=1e-12, atol=1e-12)


def test_row_index_names_the_row_of_each_token():
    x, residual, scale, shift = make((2, 7, 6, 3))
    row_of_token = [0, 0, 1, 1, 1, 1, 2]  # a shard that begins and ends inside a frame
    index = torch.tensor(row_of_token)
    normed = kernels.modulated_layer_norm(x, scale, shift, EPS, index)
    torch.testing.assert_close(normed, norm_by_token(x, scale, shift, row_of_token), rtol=1e-12, atol=1e-12)
    gated = kernels.gated_residual(x, residual, scale, index)
    torch.testing.assert_close(gated, gate_by_token(x, residual, scale, row_of_token), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("row_index", [None, torch.tensor([0, 1, 1, 1, 2, 2])])
def test_gradients(row_index):
    x, residual, scale, shift = (t.requires_grad_() for t in make((2, 6, 5, 3)))
    assert torch.autograd.gradcheck(
        lambda *args: kernels.modulated_layer_norm(*args, EPS, row_index), (x, scale, shift)
    )
    assert torch.autograd.gradcheck(lambda *args: kernels.gated_residual(*args, row_index), (x, residual, scale))


def test_strided_tokens():
    x, residual, scale, shift = make((2, 12, 8, 3))
    # The same values with tokens and channels the other way round in memory, as the patch embedding leaves them.
    strided, strided_residual = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, residual))
    assert not strided.is_contiguous()
    actual = kernels.modulated_layer_norm(strided, scale, shift, EPS)
    torch.testing.assert_close(actual, kernels.modulated_layer_norm(x, scale, shift, EPS), rtol=1e-12, atol=1e-12)
    actual = kernels.gated_residual(strided, strided_residual, scale)
    torch.testing.assert_close(actual, kernels.gated_residual(x, residual, scale), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_tokens_are_rounded_once(table_dtype):
    x, residual, scale, shift = make((2, 30, 64, 5))
    x, residual = x.bfloat16(), residual.bfloat16()
    scale, shift = scale.to(table_dtype), shift.to(table_dtype)
    row_of_token = [token // 6 for token in range(30)]
    wide = [t.double() for t in (x, residual, scale, shift)]
    expected = norm_by_token(wide[0], wide[2], wide[3], row_of_token), gate_by_token(*wide[:3], row_of_token)
    actual = kernels.modulated_layer_norm(x, scale, shift, EPS), kernels.gated_residual(x, residual, scale)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.bfloat16
        # Half a unit in the last of 8 bits, plus the float32 error of the sum.
        torch.testing.assert_close(a.double(), e, rtol=2**-8 + 1e-5, atol=1e-6)


def test_rows_that_do_not_fit():
    x, residual, scale, shift = make((2, 12, 8, 3))
    with pytest.raises(ValueError, match=r"scale has 5 rows, which do not divide 12 tokens.*row_index"):
        kernels.modulated_layer_norm(x, torch.zeros(2, 5, 8), torch.zeros(2, 5, 8), EPS)
    with pytest.raises(ValueError, match=r"shift has shape \(1, 3, 8\); pass \(2, rows, 8\)"):
        kernels.modulated_layer_norm(x, scale, shift[:1], EPS)
    with pytest.raises(ValueError, match=r"gate has shape \(2, 8\); pass \(2, rows, 8\)"):
        kernels.gated_residual(x, residual, scale[:, 0])
    with pytest.raises(ValueError, match=r"row_index has shape \(11,\); pass \(12,\)"):
        kernels.gated_residual(x, residual, scale, torch.zeros(11, dtype=torch.long))
