"""Anchors as frames of their own behind the clip: the transformer against Wan's arithmetic written out in float64."""

import math

import pytest
import torch
from diffusers.models._modeling_parallel import ParallelConfig
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from peft import LoraConfig
from tiny import TRANSFORMER_CONFIG, tiny_transformer
from torch._dynamo.testing import CompileCounter

from diffusers_fvg.animate.conditioning import frame_position
from diffusers_fvg.animate.transformer_anchor import AppendedRotaryEmbedding


HEADS, HEAD_DIM = TRANSFORMER_CONFIG["num_attention_heads"], TRANSFORMER_CONFIG["attention_head_dim"]
BATCH, FRAMES, HEIGHT, WIDTH = 2, 3, 4, 6
ROWS, COLUMNS = HEIGHT // 2, WIDTH // 2
# Frames 5 and 7 of the first clip, frame 8 of the second, which has one anchor less.
POSITIONS = torch.tensor([[1.625, 2.125], [2.375, -1.0]], dtype=torch.float64)
TIMES = torch.tensor([[0.0, 700.0, 700.0, 0.0, 140.0], [400.0, 400.0, 400.0, 0.0, 400.0]])
# Rows see columns, the appended frames last; nothing sees the one that stands in.
ALL = ("xxxxx",) * 5, ("xxxx.",) * 5
WINDOW_0 = (
    ("x..xx", "xx.xx", "x.xxx", "x.xxx", "x.xxx"),
    ("x..x.", ".x.x.", "..xx.", "..xx.", "...x."),
)


def layer_norm(x, eps=1e-6):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()


def written_out(model, latents, times, text, places, seen):
    """One sample: latents `(C, N, H, W)`, a time and a place in time for each of the N frames, which see those of `seen`."""
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    latents, times, text = latents.double(), times.double(), text.double()

    def linear(x, name):
        return x @ weights[f"{name}.weight"].flatten(1).T + weights[f"{name}.bias"]

    def silu(x):
        return x / (1 + (-x).exp())

    def gelu(x):
        return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())

    cells = [(n, i, j) for n in range(len(times)) for i in range(ROWS) for j in range(COLUMNS)]
    patches = [latents[:, n, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten() for n, i, j in cells]
    tokens = linear(torch.stack(patches), "patch_embedding")

    half = TRANSFORMER_CONFIG["freq_dim"] // 2
    angles = times[:, None] * 10_000 ** (-torch.arange(half).double() / half)
    embedder = "condition_embedder"
    hidden = silu(linear(torch.cat([angles.cos(), angles.sin()], 1), f"{embedder}.time_embedder.linear_1"))
    temb = linear(hidden, f"{embedder}.time_embedder.linear_2")
    modulation = linear(silu(temb), f"{embedder}.time_proj").unflatten(1, (6, -1))
    text = gelu(linear(text, f"{embedder}.text_embedder.linear_1"))
    text = linear(text, f"{embedder}.text_embedder.linear_2")

    # Four channels each for time, row and column; a pair of channels is a complex number.
    angles = torch.tensor([
        [place * 10_000 ** (-pair / 2) for place in (places[n], i, j) for pair in range(2)] for n, i, j in cells
    ]).double()  # fmt: skip
    turn = torch.polar(torch.ones_like(angles), angles)
    frames = torch.tensor([n for n, _, _ in cells])
    mask = torch.tensor([[mark == "x" for mark in row] for row in seen])[frames][:, frames]

    def attention(name, x, context, is_self):
        query, key, value = (linear(y, f"{name}.to_{part}") for part, y in (("q", x), ("k", context), ("v", context)))
        query, key = (
            y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.norm_{part}.weight"]
            for part, y in (("q", query), ("k", key))
        )
        outs = []
        for q, k, v in zip(*(y.unflatten(1, (HEADS, -1)).unbind(1) for y in (query, key, value))):
            if is_self:
                q, k = (
                    torch.view_as_real(torch.view_as_complex(y.unflatten(1, (-1, 2)).contiguous()) * turn)
                    for y in (q, k)
                )
                q, k = q.flatten(1), k.flatten(1)
            scores = q @ k.T / math.sqrt(HEAD_DIM)
            outs.append((scores.masked_fill(~mask, -math.inf) if is_self else scores).softmax(-1) @ v)
        return linear(torch.cat(outs, 1), f"{name}.to_out.0")

    for number in range(TRANSFORMER_CONFIG["num_layers"]):
        block = f"blocks.{number}"
        shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = (
            row[frames] for row in (weights[f"{block}.scale_shift_table"] + modulation).unbind(1)
        )
        normed = layer_norm(tokens) * (1 + scale) + shift
        tokens = tokens + gate * attention(f"{block}.attn1", normed, normed, is_self=True)
        normed = layer_norm(tokens) * weights[f"{block}.norm2.weight"] + weights[f"{block}.norm2.bias"]
        tokens = tokens + attention(f"{block}.attn2", normed, text, is_self=False)
        normed = gelu(linear(layer_norm(tokens) * (1 + scale_ffn) + shift_ffn, f"{block}.ffn.net.0.proj"))
        tokens = tokens + gate_ffn * linear(normed, f"{block}.ffn.net.2")

    shift, scale = (row[frames] for row in (weights["scale_shift_table"] + temb[:, None]).unbind(1))
    made = linear(layer_norm(tokens) * (1 + scale) + shift, "proj_out")
    sample = torch.zeros_like(latents)
    for (n, i, j), patch in zip(cells, made):
        sample[:, n, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = patch.view(2, 2, -1).permute(2, 0, 1)
    return sample[:, :FRAMES]


@pytest.fixture(scope="module")
def model():
    return tiny_transformer(anchored=True)


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(2)
    return {
        "hidden_states": torch.randn(BATCH, 16, FRAMES + 2, HEIGHT, WIDTH, generator=generator),
        "encoder_hidden_states": torch.randn(BATCH, 7, 32, generator=generator),
        "timestep": TIMES,
        "anchor_positions": POSITIONS,
    }


@torch.no_grad()
def run(model, inputs, **changes):
    return model(**inputs | changes).sample


def expected(model, inputs, positions, tables=ALL):
    rows = zip(inputs["hidden_states"], inputs["timestep"], inputs["encoder_hidden_states"], positions, tables)
    return torch.stack([
        written_out(model, latents, times, text, [0, 1, 2, *own.tolist()], table)
        for latents, times, text, own, table in rows
    ])  # fmt: skip


def test_equals_the_arithmetic_written_out(model, inputs):
    truth = expected(model, inputs, POSITIONS)
    found = run(model, inputs)
    assert found.shape == (BATCH, 16, FRAMES, HEIGHT, WIDTH)
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-5)
    # The comparison would notice places of other frames, or on the latent frame.
    for wrong in (POSITIONS.flip(0).abs(), POSITIONS.round()):
        assert (run(model, inputs, anchor_positions=wrong) - found).abs().max() > 1e-3
    # What stands in for an anchor changes nothing.
    others = inputs["hidden_states"].clone()
    others[1, :, -1] = 100
    torch.testing.assert_close(run(model, inputs, hidden_states=others), found, rtol=0, atol=1e-6)
    # Times of tokens say the same.
    tokens = TIMES.repeat_interleave(ROWS * COLUMNS, dim=1)
    torch.testing.assert_close(run(model, inputs, timestep=tokens), found, rtol=0, atol=1e-5)


def test_in_a_window(model, inputs):
    truth = expected(model, inputs, POSITIONS, WINDOW_0)
    torch.testing.assert_close(run(model, inputs, anchor_window=0).double(), truth, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        run(model, inputs, anchor_window=9).double(), expected(model, inputs, POSITIONS), rtol=0, atol=1e-5
    )


def test_clips_of_a_batch_are_those_made_alone(model, inputs):
    found = run(model, inputs)
    for index, count in ((0, 2), (1, 1)):
        alone = {name: tensor[index : index + 1] for name, tensor in inputs.items()}
        frames = FRAMES + count
        alone = alone | {
            "hidden_states": alone["hidden_states"][:, :, :frames],
            "timestep": TIMES[index : index + 1, :frames],
        }
        alone["anchor_positions"] = POSITIONS[index : index + 1, :count]
        torch.testing.assert_close(run(model, alone), found[index : index + 1], rtol=0, atol=1e-6)


def test_places_in_time_by_closed_form():
    # 4k + 1 to 4k + 4 are the frames of a latent, whose middle is its own place; the stock table has whole numbers.
    assert [frame_position(frame) for frame in range(10)] == [
        0,
        0.625,
        0.875,
        1.125,
        1.375,
        1.625,
        1.875,
        2.125,
        2.375,
        2.625,
    ]
    for latent in range(1, 31):
        assert sum(frame_position(4 * latent - back) for back in range(4)) / 4 == latent
    assert [frame_position(frame, 2) for frame in range(4)] == [0, 0.75, 1.25, 1.75]


def test_angles():
    rotary, table = AppendedRotaryEmbedding(), get_1d_rotary_pos_embed(4, 8, use_real=True, freqs_dtype=torch.float64)
    clip = [torch.randn(1, 3 * 6, 1, 12), torch.randn(1, 3 * 6, 1, 12)]
    assert all(a is b for a, b in zip(rotary(*clip, 3, None), clip))
    # At whole numbers they are the stock table's, to the bit; the clip's own and those of rows and columns are as they were.
    for found, given, row in zip(rotary(*clip, 3, torch.tensor([[5.0, 0.0]])), clip, table):
        assert torch.equal(found[:, :18], given)
        assert torch.equal(found[0, 18:24, 0, :4], row[5].expand(6, -1))
        assert torch.equal(found[0, 24:, 0, :4], row[0].expand(6, -1))
        assert torch.equal(found[:, 18:24, :, 4:], given[:, :6, :, 4:])
    cos, sin = (found[1, -1, 0, :4].tolist() for found in rotary(*clip, 3, POSITIONS[:, :1].float()))
    turns = [2.375, 2.375, 0.02375, 0.02375]
    assert cos == pytest.approx([math.cos(turn) for turn in turns], abs=1e-7)
    assert sin == pytest.approx([math.sin(turn) for turn in turns], abs=1e-7)


def test_gradients_with_checkpointing_and_lora(inputs):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_transformer(anchored=True).train()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**inputs).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if "lora_A" in name})
    for name, plain in gradients[0].items():
        assert plain.abs().max() > 0
        torch.testing.assert_close(gradients[1][name], plain, msg=name)


def test_one_graph_for_blocks_with_other_places(inputs):
    model, counter = tiny_transformer(anchored=True), CompileCounter()
    found = run(model, inputs, anchor_positions=POSITIONS.abs())
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend=counter, fullgraph=True)
    torch.testing.assert_close(run(model, inputs, anchor_positions=POSITIONS.abs()), found)
    run(model, inputs, anchor_positions=POSITIONS.abs() / 2)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_positions_that_do_not_fit(model, inputs):
    for wrong in (POSITIONS[:1], POSITIONS[0], POSITIONS[:, :0], torch.ones(BATCH, FRAMES + 2)):
        with pytest.raises(
            ValueError,
            match=r"anchor_positions has shape .*; pass \(2, A\), the positions of the last A of the 5 frames",
        ):
            run(model, inputs, anchor_positions=wrong)
    sharded = tiny_transformer(anchored=True)
    sharded.blocks[0].attn1.processor._parallel_config = ParallelConfig()
    with pytest.raises(
        ValueError, match="fewer appended anchors than others in the batch need all tokens on one device"
    ):
        run(sharded, inputs)
    with pytest.raises(ValueError, match="patches are one latent frame long, not 2"):
        even = {"hidden_states": inputs["hidden_states"][:, :, :4], "anchor_positions": POSITIONS[:, :1]}
        run(tiny_transformer(anchored=True, patch_size=(2, 2, 2)), inputs | even, timestep=TIMES[:, 1])
