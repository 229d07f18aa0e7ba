"""Which frames see which, and attention between them in plain torch, against softmax written out frame by frame."""

import pytest
import torch

from diffusers_fvg import kernels
from diffusers_fvg.kernels import attention


NAMES = ("out", "gradient of query", "gradient of key", "gradient of value")


def table(*rows):
    return torch.tensor([[mark == "x" for mark in row.split()] for row in rows])


def make(batch, frames, tokens, heads, head_dim, seed=0):
    """Query, key, value, and the gradient of the output, in float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, frames * tokens, heads, head_dim)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4)]


def written_out(query, key, value, seen):
    """Every frame of every sample against the keys of the frames it sees."""
    tokens = query.shape[1] // seen.shape[1]
    samples = []
    for q, k, v, rows in zip(query, key, value, seen, strict=True):
        q, k, v = (x.split(tokens) for x in (q, k, v))
        frames = []
        for frame, row in zip(q, rows, strict=True):
            keys, values = (torch.cat([x[i] for i in row.nonzero().flatten()]) for x in (k, v))
            weights = (torch.einsum("qnh,knh->nqk", frame, keys) / frame.shape[-1] ** 0.5).softmax(-1)
            frames.append(torch.einsum("nqk,knh->qnh", weights, values))
        samples.append(torch.cat(frames))
    return torch.stack(samples)


def with_gradients(function, inputs, seen, grad):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs, seen)
    return dict(zip(NAMES, (out, *torch.autograd.grad(out, inputs, grad)), strict=True))


def two_clips():
    """Anchors at frame 0 of one clip, and at frames 1 and 4 of the other, in any order of times."""
    return attention.anchor_window(torch.tensor([[0.0, 9, 9, 9, 9, 9], [9, 0, 9, 9, 3, 9]]), 1)


def test_anchor_window():
    first, second = two_clips()
    expected = table("x x . . . .", "x x x . . .", "x x x x . .", "x . x x x .", "x . . x x x", "x . . . x x")
    assert torch.equal(first, expected)
    expected = table("x x . . x .", "x x x . x .", ". x x x x .", ". x x x x .", ". x . x x x", ". x . . x x")
    assert torch.equal(second, expected)
    # The window alone is the frame itself and the anchors; a clip without anchors sees all of itself.
    tables = attention.anchor_window(torch.tensor([[700.0, 700, 0], [0, 0, 0], [5, 5, 5]]), 0)
    assert torch.equal(tables[0], table("x . x", ". x x", ". . x"))
    assert tables[1:].all()


def test_share_at_wan_length():
    # 31 frames, window 3, one anchor: 7 frames each, fewer at the ends, and the anchor where it is farther than 3.
    times = torch.full((1, 31), 500.0)
    times[0, 0] = 0
    assert attention.anchor_window(times, 3).sum() == 31 * 7 - 2 * (3 + 2 + 1) + 27


FORMS = [attention.frame_attention, attention.gathered_frame_attention]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("tokens", [1, 7])
def test_output_and_gradients(form, tokens):
    *inputs, grad = make(2, 6, tokens, 3, 10)
    for seen in (two_clips(), two_clips()[[0, 0]], torch.ones(2, 6, 6, dtype=torch.bool)):
        actual, expected = (with_gradients(f, inputs, seen, grad) for f in (form, written_out))
        for name, value in actual.items():
            torch.testing.assert_close(
                value, expected[name], rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_a_table_is_read_once_and_again_after_a_change():
    calls = []
    read = attention.once_for_tensor(lambda seen: calls.append(1) or seen.sum().item())
    seen = two_clips()
    assert read(seen) == read(seen) == seen.sum() and len(calls) == 1
    seen[0, 0, 5] = True
    assert read(seen) == seen.sum() and len(calls) == 2
    assert read(seen.clone()) == seen.sum() and len(calls) == 3
    with torch.inference_mode():
        assert read(torch.ones(1, 2, 2, dtype=torch.bool)) == 4


def test_frames_that_see_as_many_share_a_call(monkeypatch):
    """31 frames with a window of 3 and an anchor at 0: 24 frames see 8, two 7, two 6, two 5, one 4."""
    times = torch.full((1, 31), 500.0)
    times[0, 0] = 0
    calls, stock = [], attention.F.scaled_dot_product_attention
    monkeypatch.setattr(
        attention.F,
        "scaled_dot_product_attention",
        lambda q, k, v: calls.append((len(q), k.shape[2])) or stock(q, k, v),
    )
    *inputs, _ = make(1, 31, 2, 1, 4)
    attention.gathered_frame_attention(*inputs, attention.anchor_window(times, 3))
    assert sorted(calls) == [(1, 8), (2, 10), (2, 12), (2, 14), (24, 16)]


# Frames smaller than a block of FlexAttention, larger, and equal to it.
@pytest.mark.parametrize("tokens", [7, 50, 128, 200])
def test_flex_attention(tokens):
    *inputs, _ = make(2, 6, tokens, 1, 16)
    inputs = [x.float() for x in inputs]
    seen = two_clips()
    # On a CPU it has no backward pass.
    with torch.no_grad():
        actual = attention.flex_frame_attention(*inputs, seen)
    torch.testing.assert_close(actual, written_out(*inputs, seen), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [7, 50, 128, 200])
def test_flex_blocks_hold_what_the_table_says(tokens):
    """Blocks that are skipped hold no seen pair, and blocks taken as they are hold no other."""
    seen = two_clips()
    mask = attention._block_mask(seen, 6 * tokens)
    pairs = seen.repeat_interleave(tokens, 1).repeat_interleave(tokens, 2)
    blocks = [[block.split(128, dim=2) for block in sample.split(128, dim=1)] for sample in pairs.split(1)]
    kinds = torch.tensor([
        [[2 if b.all() else 1 if b.any() else 0 for b in row] for row in sample] for sample in blocks
    ])  # fmt: skip
    assert tokens == 7 or len(kinds.unique()) > 1
    for kind, counts, columns in (
        (1, mask.kv_num_blocks, mask.kv_indices),
        (2, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        found = torch.zeros_like(kinds, dtype=torch.bool)
        for sample, row in torch.cartesian_prod(*(torch.arange(n) for n in kinds.shape[:2])):
            found[sample, row, columns[sample, 0, row, : counts[sample, 0, row]]] = True
        assert torch.equal(found, kinds == kind)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_flex_attention_on_a_gpu():
    *inputs, grad = make(2, 6, 200, 2, 64)
    seen = two_clips()
    expected = with_gradients(written_out, inputs, seen, grad)
    inputs, grad, seen = [x.cuda().float() for x in inputs], grad.cuda().float(), seen.cuda()
    actual = with_gradients(torch.compile(attention.flex_frame_attention), inputs, seen, grad)
    for name, value in actual.items():
        error = (value.cpu().double() - expected[name]).square().mean() / expected[name].square().mean()
        assert error.sqrt() < 2e-3, name  # TF32 rounds to 10 bits


def test_dispatcher_in_a_graph_and_outside():
    *inputs, grad = make(2, 6, 5, 2, 8)
    seen = two_clips()
    expected = with_gradients(written_out, inputs, seen, grad)
    torch._dynamo.reset()
    with kernels.use_kernels("reference"):
        compiled = torch.compile(kernels.frame_attention, backend="aot_eager", fullgraph=True)
        for function in (kernels.frame_attention, compiled):
            for name, value in with_gradients(function, inputs, seen, grad).items():
                torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12)


def test_tables_that_do_not_fit():
    query, key, value, _ = make(2, 6, 5, 2, 8)
    seen = two_clips()
    for wrong in (seen[:1], seen[:, :5], seen[:, :4, :4], seen.float()):
        with pytest.raises(ValueError, match=r"seen has shape .*; pass \(2, frames, frames\) of bool.* divides 30"):
            kernels.frame_attention(query, key, value, wrong)
    with pytest.raises(ValueError, match=r"\(2, 29, 2, 8\).*pass that of query, \(2, 30, 2, 8\)"):
        kernels.frame_attention(query, key, value[:, :29], seen)
