"""The definition of query-key norm and rotary embedding against complex numbers, token by token in float64."""

import math

import pytest
import torch

from diffusers_fvg import kernels


EPS = 1e-6
# (B, L, heads, head_dim)
SHAPES = [(2, 5, 3, 6), (1, 7, 2, 12), (3, 1, 1, 2)]


def make(shape):
    batch, length, heads, head_dim = shape
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randn(batch, length, heads * head_dim, generator=generator).double() for _ in range(2)]
    weights = [torch.randn(heads * head_dim, generator=generator).double() for _ in range(2)]
    angle = torch.rand(length, head_dim // 2, generator=generator).double() * 6
    cos, sin = (turn.repeat_interleave(2, dim=-1)[None, :, None] for turn in (angle.cos(), angle.sin()))
    return (*tokens, *weights, cos, sin), angle


def by_token(tokens, weight, angle, head_dim):
    """A pair of channels is a complex number; its turn is a product with `exp(i * angle)`."""
    out = torch.empty(*tokens.shape[:2], tokens.shape[2] // head_dim, head_dim, dtype=torch.float64)
    for b, l, n in torch.cartesian_prod(*map(torch.arange, out.shape[:3])).reshape(-1, 3).tolist():
        token = tokens[b, l].tolist()
        scale = 1 / math.sqrt(sum(value * value for value in token) / len(token) + EPS)
        for pair in range(head_dim // 2):
            real, imaginary = (
                token[i] * scale * weight[i].item() for i in (n * head_dim + 2 * pair + j for j in (0, 1))
            )
            phi = angle[l, pair].item()
            turned = complex(real, imaginary) * complex(math.cos(phi), math.sin(phi))
            out[b, l, n, 2 * pair], out[b, l, n, 2 * pair + 1] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_over_all_heads_then_a_turn_of_each_pair(shape):
    inputs, angle = make(shape)
    actual = kernels.rms_norm_rope(*inputs, EPS)
    for out, tokens, weight in zip(actual, inputs[:2], inputs[2:4], strict=True):
        torch.testing.assert_close(out, by_token(tokens, weight, angle, shape[3]), rtol=1e-12, atol=1e-12)


def test_gradients():
    inputs, _ = make((2, 3, 2, 4))
    tensors, angles = [tensor.requires_grad_() for tensor in inputs[:4]], inputs[4:]
    assert torch.autograd.gradcheck(lambda *tensors: kernels.rms_norm_rope(*tensors, *angles, EPS), tensors)


def test_bfloat16_tokens_are_rounded_once():
    inputs, angle = make((2, 5, 3, 6))
    inputs = [tensor.bfloat16() for tensor in inputs[:4]] + [tensor.float() for tensor in inputs[4:]]
    actual = kernels.rms_norm_rope(*inputs, EPS)
    for out, tokens, weight in zip(actual, inputs[:2], inputs[2:4], strict=True):
        assert out.dtype == torch.bfloat16
        expected = by_token(tokens.double(), weight.double(), angle, 6)
        torch.testing.assert_close(out.double(), expected, rtol=2**-8 + 1e-5, atol=1e-5)


def test_inputs_that_do_not_fit():
    (query, key, query_weight, key_weight, cos, sin), _ = make((2, 5, 3, 6))
    weights, angles = (query_weight, key_weight), (cos, sin)
    with pytest.raises(ValueError, match=r"key has shape \(2, 4, 18\); pass that of query, \(2, 5, 18\)"):
        kernels.rms_norm_rope(query, key[:, :4], *weights, *angles, EPS)
    with pytest.raises(ValueError, match=r"key_weight has shape \(6,\); pass \(18,\)"):
        kernels.rms_norm_rope(query, key, query_weight, key_weight[:6], *angles, EPS)
    with pytest.raises(ValueError, match=r"sin has shape \(1, 4, 1, 6\); pass \(1, 5, 1, head_dim\)"):
        kernels.rms_norm_rope(query, key, *weights, cos, sin[:, :4], EPS)
    for head_dim in (4, 3):  # 18 channels are no heads of 4; those of 3 have a channel without a partner
        with pytest.raises(ValueError, match=r"an even head_dim that divides 18"):
            kernels.rms_norm_rope(query, key, *weights, cos[..., :head_dim], sin[..., :head_dim], EPS)
    with pytest.raises(ValueError, match=r"cos requires a gradient"):
        kernels.rms_norm_rope(query, key, *weights, cos.requires_grad_(), sin, EPS)
