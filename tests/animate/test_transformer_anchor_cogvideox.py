"""AnchorConditionedCogVideoXTransformer3D against diffusers' CogVideoXTransformer3DModel on the same weights and inputs."""

import json

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.hooks import FirstBlockCacheConfig
from group_offload import skip_without_group_offload
from peft import LoraConfig
from tiny_cogvideox import CONFIG_1_0, TRANSFORMER_CONFIG, tiny_cogvideox_transformer, tiny_cogvideox_vae
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusers_fvg.animate.transformer_anchor_cogvideox import AnchorConditionedCogVideoXTransformer3D


BATCH, FRAMES, HEIGHT, WIDTH, TEXT = 2, 6, 4, 6, 5
TOKENS_PER_PATCH = (HEIGHT // 2) * (WIDTH // 2)
VARIANTS = {"1.5": {}, "1.0": CONFIG_1_0, "ofs": {"ofs_embed_dim": 8}}
TOLERANCE = {"rtol": 0, "atol": 1e-5}

# THUDM/CogVideoX1.5-5B, transformer/config.json; sizes also in diffusers' scripts/convert_cogvideox_to_diffusers.py
# (version 1.5, --num_layers 42 --num_attention_heads 48 --use_rotary_positional_embeddings).
PUBLISHED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 64,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 16,
    "max_text_seq_length": 226,
    "norm_elementwise_affine": True,
    "norm_eps": 1e-05,
    "num_attention_heads": 48,
    "num_layers": 42,
    "out_channels": 16,
    "patch_bias": False,
    "patch_size": 2,
    "patch_size_t": 2,
    "sample_frames": 81,
    "sample_height": 300,
    "sample_width": 300,
    "spatial_interpolation_scale": 1.875,
    "temporal_compression_ratio": 4,
    "temporal_interpolation_scale": 1.0,
    "text_embed_dim": 4096,
    "time_embed_dim": 512,
    "timestep_activation_fn": "silu",
    "use_learned_positional_embeddings": False,
    "use_rotary_positional_embeddings": True,
}


def make_pair(**config):
    stock, ours = tiny_cogvideox_transformer(**config), tiny_cogvideox_transformer(anchored=True, seed=1, **config)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def make_inputs(model, dtype=torch.float32):
    """Inputs but for the timestep; every sample has its own latents and text."""
    generator = torch.Generator().manual_seed(2)
    size = (BATCH, FRAMES, TRANSFORMER_CONFIG["in_channels"], HEIGHT, WIDTH)
    rotary = AnchorConditionedCogVideoXTransformer3D.from_stock(model).rotary_embedding(FRAMES, HEIGHT, WIDTH)
    inputs = {
        "hidden_states": torch.randn(size, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 32, generator=generator).to(dtype),
        "image_rotary_emb": rotary,
    }
    return inputs | ({"ofs": torch.full((1,), 2.0)} if model.config.ofs_embed_dim else {})


def frame_times():
    """Times of CogVideoX 1.5's frames, equal in pairs; sample 0 is anchored in its first patch, sample 1 in its last."""
    return torch.tensor([[0, 0, 700, 700, 700, 700], [300, 300, 900, 900, 0, 0]])


@torch.no_grad()
def run(model, inputs, timestep, **kwargs):
    return model(**inputs, timestep=timestep, **kwargs).sample


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_equals_the_stock_class(config):
    stock, ours = make_pair(**config)
    inputs, timestep = make_inputs(stock), torch.tensor([900, 250])
    expected = run(stock, inputs, timestep)
    torch.testing.assert_close(run(ours, inputs, timestep), expected, **TOLERANCE)
    # The same time for each frame is the same.
    rows = timestep[:, None].expand(-1, FRAMES)
    torch.testing.assert_close(run(ours, inputs, rows), expected, **TOLERANCE)
    assert (run(ours, inputs, rows.flip(0)) - expected).abs().max() > 1e-3


def per_token_definition(model, inputs, timestep):
    """The model with a time for each token, in float64, from the paper's equations and the state dict alone: adaptive layer
    norm over text and video, full attention over both (arXiv 2408.06072, section 2.2)."""
    w = {name: value.double() for name, value in model.state_dict().items()}
    hidden, text = inputs["hidden_states"].double(), inputs["encoder_hidden_states"].double()
    heads, head_dim = model.config.num_attention_heads, model.config.attention_head_dim
    width = heads * head_dim

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x, eps):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
        return (x - mean) / (var + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    # One time per token: text has that of the noisiest frame, a video token that of its frame.
    patches = timestep[:, ::2].double()
    times = torch.cat(
        [patches.amax(1, keepdim=True).expand(-1, TEXT), patches.repeat_interleave(TOKENS_PER_PATCH, 1)], 1
    )
    frequencies = torch.exp(
        -torch.arange(width // 2).double() / (width // 2) * torch.log(torch.tensor(10000.0).double())
    )
    angles = times[..., None] * frequencies
    temb = linear("time_embedding.linear_1", torch.cat([angles.cos(), angles.sin()], -1))
    temb = F.silu(linear("time_embedding.linear_2", F.silu(temb)))

    # Two frames, two rows and two columns to a token, channels outermost.
    blocks = hidden.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).unflatten(1, (-1, 2))  # B f 2 C h 2 w 2
    patched = blocks.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(1, 3)
    tokens = torch.cat([linear("patch_embed.text_proj", text), linear("patch_embed.proj", patched)], 1)

    cos, sin = (x.double() for x in inputs["image_rotary_emb"])

    def turn(x):
        pairs = x[:, :, TEXT:].unflatten(-1, (-1, 2))
        turned = torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)
        return torch.cat([x[:, :, :TEXT], x[:, :, TEXT:] * cos + turned * sin], 2)

    is_text = (torch.arange(tokens.shape[1]) < TEXT)[None, :, None]
    for i in range(model.config.num_layers):
        block = f"transformer_blocks.{i}"
        for name in ("norm1", "norm2"):
            rows = linear(f"{block}.{name}.linear", temb).chunk(6, -1)
            shift, scale, gate = (torch.where(is_text, rows[3 + k], rows[k]) for k in range(3))
            x = norm(f"{block}.{name}.norm", tokens, 1e-5) * (1 + scale) + shift
            if name == "norm1":
                q, k, v = (linear(f"{block}.attn1.to_{n}", x).unflatten(2, (heads, -1)).transpose(1, 2) for n in "qkv")
                q, k = turn(norm(f"{block}.attn1.norm_q", q, 1e-6)), turn(norm(f"{block}.attn1.norm_k", k, 1e-6))
                x = ((q @ k.transpose(-1, -2) / head_dim**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
                x = linear(f"{block}.attn1.to_out.0", x)
            else:
                x = linear(f"{block}.ff.net.2", F.gelu(linear(f"{block}.ff.net.0.proj", x), approximate="tanh"))
            tokens = tokens + gate * x

    shift, scale = linear("norm_out.linear", temb).chunk(2, -1)
    x = norm("norm_out.norm", norm("norm_final", tokens, 1e-5), 1e-5) * (1 + scale) + shift
    x = (
        linear("proj_out", x[:, TEXT:])
        .unflatten(1, (FRAMES // 2, HEIGHT // 2, WIDTH // 2))
        .unflatten(4, (-1, 2, 2, 2))
    )
    return x.permute(0, 1, 5, 4, 2, 6, 3, 7).reshape(hidden.shape)  # B f 2 C h 2 w 2


def test_frame_times_equal_a_time_for_each_token():
    stock, ours = make_pair()
    inputs = make_inputs(stock)
    expected = per_token_definition(stock, inputs, frame_times())
    torch.testing.assert_close(run(ours, inputs, frame_times()).double(), expected, **TOLERANCE)
    for wrong in (frame_times().roll(2, dims=1), frame_times().flip(0)):
        assert (per_token_definition(stock, inputs, wrong) - expected).abs().max() > 1e-3


def test_frame_times_without_a_temporal_patch():
    # A frame's time acts on no more than its own row: with one frame's worth of context the samples can be told apart.
    stock, ours = make_pair(**CONFIG_1_0)
    inputs, timestep = make_inputs(stock), torch.tensor([[0, 100, 200, 300, 400, 500], [900, 900, 900, 0, 900, 900]])
    with torch.no_grad():
        seen = []
        handle = ours.transformer_blocks[0].norm1.register_forward_hook(lambda module, args, out: seen.append(out))
        run(ours, inputs, timestep)
        handle.remove()
        gate, text_gate = seen[0][2:]
        stock.transformer_blocks[0].norm1.register_forward_hook(lambda module, args, out: seen.append(out))
        for time in (500, 900, 0, 300):
            run(stock, inputs, torch.full((BATCH,), time))
    at = {time: out[2:] for time, out in zip((500, 900, 0, 300), seen[1:])}
    torch.testing.assert_close(gate[0, [5, 0, 3]], torch.stack([at[t][0][0, 0] for t in (500, 0, 300)]), **TOLERANCE)
    torch.testing.assert_close(gate[1, [0, 3]], torch.stack([at[t][0][1, 0] for t in (900, 0)]), **TOLERANCE)
    torch.testing.assert_close(text_gate[:, 0], torch.stack([at[500][1][0, 0], at[900][1][1, 0]]), **TOLERANCE)


class LargestOutput(TorchDispatchMode):
    """Number of elements of the largest tensor any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, *(leaf.numel() for leaf in tree_leaves(out) if torch.is_tensor(leaf)), 0)
        return out


def test_frame_times_build_no_table_the_size_of_the_tokens():
    _, ours = make_pair()
    with LargestOutput() as mode:
        run(ours, make_inputs(ours), frame_times())
    # The widest tensor is the feed-forward's, 4 times the width; a table of modulation would be 6 times.
    assert mode.numel == BATCH * (TEXT + FRAMES // 2 * TOKENS_PER_PATCH) * 4 * 32


def test_gradients_with_checkpointing():
    stock, ours = make_pair()
    inputs, timestep = make_inputs(stock), torch.tensor([900, 250])
    calls = []
    ours.transformer_blocks[0].attn1.register_forward_hook(lambda *_: calls.append(None))
    ours.train().enable_gradient_checkpointing()
    target = torch.randn_like(inputs["hidden_states"])
    for model, times in ((ours, timestep[:, None].expand(-1, FRAMES)), (stock, timestep)):
        (model(**inputs, timestep=times).sample - target).square().mean().backward()
    assert len(calls) == 2  # computed again in the backward pass
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
        assert parameter.grad.abs().max() > 1e-5 or name.endswith("to_k.bias"), name


def test_lora_adapter(tmp_path):
    stock, ours = make_pair()
    inputs, timestep = make_inputs(stock), torch.tensor([900, 250])
    base = run(ours, inputs, timestep)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear", "norm_out.linear"]
    torch.manual_seed(3)
    stock.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False))
    stock.save_lora_adapter(tmp_path, weight_name="lora.safetensors")
    ours.load_lora_adapter(tmp_path, weight_name="lora.safetensors", prefix=None)
    adapted = run(ours, inputs, timestep)
    torch.testing.assert_close(adapted, run(stock, inputs, timestep), **TOLERANCE)
    assert (adapted - base).abs().max() > 1e-2
    torch.testing.assert_close(run(ours, inputs, timestep, attention_kwargs={"scale": 0.0}), base, **TOLERANCE)

    # The base is saved without the adapter, for the stock class too.
    ours.save_pretrained(tmp_path / "base")
    back, report = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not any(report.values()), report
    torch.testing.assert_close(run(back, inputs, timestep), base, **TOLERANCE)


def test_loads_a_stock_checkpoint(tmp_path):
    stock, _ = make_pair()
    inputs, timestep = make_inputs(stock), torch.tensor([900, 250])
    stock.save_pretrained(tmp_path)
    ours, report = AnchorConditionedCogVideoXTransformer3D.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    torch.testing.assert_close(run(ours, inputs, timestep), run(stock, inputs, timestep), **TOLERANCE)
    ours.save_pretrained(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config.pop("_class_name") == "AnchorConditionedCogVideoXTransformer3D"
    stock_config = json.loads((tmp_path / "config.json").read_text())
    assert {key: config[key] for key in stock_config if not key.startswith("_")} == {
        key: value for key, value in stock_config.items() if not key.startswith("_")
    }


def test_from_stock_shares_the_weights():
    stock, ours = make_pair()
    shared = AnchorConditionedCogVideoXTransformer3D.from_stock(stock)
    ours_by_name = dict(shared.named_parameters())
    assert all(ours_by_name[name].data_ptr() == p.data_ptr() for name, p in stock.named_parameters())
    assert AnchorConditionedCogVideoXTransformer3D.from_stock(ours) is ours
    with pytest.raises(ValueError, match="must be a CogVideoXTransformer3DModel, but is a Linear"):
        AnchorConditionedCogVideoXTransformer3D.from_stock(torch.nn.Linear(1, 1))
    stock.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    assert list(AnchorConditionedCogVideoXTransformer3D.from_stock(stock).peft_config) == ["default"]
    stock.fuse_lora()
    with pytest.raises(ValueError, match=r"fused adapters \['default'\]"):
        AnchorConditionedCogVideoXTransformer3D.from_stock(stock)


def test_a_pipelines_folder_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="`transformer` folder is missing"):
        AnchorConditionedCogVideoXTransformer3D.from_pretrained(tmp_path)


def test_published_config_on_the_meta_device():
    with torch.device("meta"):
        stock = CogVideoXTransformer3DModel(**PUBLISHED)
        ours = AnchorConditionedCogVideoXTransformer3D(**PUBLISHED)
    shapes = {name: tuple(value.shape) for name, value in stock.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in ours.state_dict().items()} == shapes
    assert dict(ours.config) == dict(stock.config)

    # Counted from the sizes: D = 48 * 64, times embedded in 512, text in 4096, a patch of 2 * 2 * 2 * 16 numbers.
    width, time, text, patch, layers = 48 * 64, 512, 4096, 2 * 2 * 2 * 16, 42
    attention = 4 * (width * width + width) + 2 * 2 * 64
    feed_forward = 2 * 4 * width * width + 4 * width + width
    norms = 2 * (time * 6 * width + 6 * width + 2 * width)
    embeddings = (patch * width + width) + (text * width + width) + (width * time + time) + (time * time + time)
    ends = 2 * width + (time * 2 * width + 2 * width + 2 * width) + (width * patch + patch)
    assert ours.num_parameters() == layers * (attention + feed_forward + norms) + embeddings + ends == 5_570_676_352

    # 81 frames of 768 x 1360: 21 latent frames and one of padding, 96 x 170 latents.
    latents = torch.empty(1, 22, 16, 96, 170, device="meta")
    rotary = ours.rotary_embedding(22, 96, 170, device="meta")
    assert rotary[0].shape == (11 * 48 * 85, 64)
    text = torch.empty(1, 226, 4096, device="meta")
    ours.transformer_blocks = ours.transformer_blocks[:2]
    out = run(ours, {"hidden_states": latents, "encoder_hidden_states": text}, torch.empty(1, device="meta"))
    assert out.shape == latents.shape


@pytest.mark.parametrize("config", [{}, CONFIG_1_0], ids=["1.5", "1.0"])
@pytest.mark.parametrize("size", [(8, 8), (4, 6)])
def test_rotary_embedding_is_the_stock_pipelines(config, size):
    ours = tiny_cogvideox_transformer(anchored=True, **config)
    pipe = CogVideoXPipeline(None, None, tiny_cogvideox_vae(), ours, None)
    expected = pipe._prepare_rotary_positional_embeddings(8 * size[0], 8 * size[1], FRAMES, torch.device("cpu"))
    for actual, table in zip(ours.rotary_embedding(FRAMES, *size), expected):
        torch.testing.assert_close(actual, table, rtol=0, atol=0)


def test_rotary_embedding_of_a_larger_video():
    ours = tiny_cogvideox_transformer(anchored=True)
    with pytest.raises(ValueError, match="10 x 8 are larger than the 8 x 8"):
        ours.rotary_embedding(FRAMES, 10, 8)
    assert (
        tiny_cogvideox_transformer(
            anchored=True, **CONFIG_1_0, use_rotary_positional_embeddings=False
        ).rotary_embedding(FRAMES, 8, 8)
        is None
    )


def test_step_cache():
    stock, ours = make_pair()
    inputs, timestep = make_inputs(stock), torch.tensor([900, 250])

    def steps(model):
        outputs = []
        for i in range(4):
            step = inputs | {"hidden_states": inputs["hidden_states"] * (1 - 0.1 * i)}
            with model.cache_context("cond"):
                outputs.append(run(model, step, timestep))
        return torch.stack(outputs)

    # Of another model: diffusers 0.40 does not see a cache that is enabled after the first step.
    uncached = steps(make_pair()[1])
    for model in (stock, ours):
        model.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    cached = steps(ours)
    torch.testing.assert_close(cached, steps(stock), **TOLERANCE)
    assert (cached - uncached).abs().max() > 1e-3  # the cache did act


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offload(offload_type, tmp_path):
    skip_without_group_offload()
    _, ours = make_pair()
    inputs = make_inputs(ours)
    expected = run(ours, inputs, frame_times())
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    ours.enable_group_offload(
        torch.device("cpu"),
        torch.device("cpu"),
        offload_type=offload_type,
        offload_to_disk_path=str(tmp_path),
        **blocks,
    )
    with torch.no_grad():
        ours.transformer_blocks[0].ff.net[2].weight.zero_()  # offloaded: what stands in memory does not count
    torch.testing.assert_close(run(ours, inputs, frame_times()), expected, **TOLERANCE)


def test_qkv_fusion():
    _, ours = make_pair()
    inputs = make_inputs(ours)
    expected = run(ours, inputs, frame_times())
    ours.fuse_qkv_projections()
    torch.testing.assert_close(run(ours, inputs, frame_times()), expected, **TOLERANCE)
    with torch.no_grad():
        ours.transformer_blocks[0].attn1.to_q.weight.zero_()  # not read while fused
    torch.testing.assert_close(run(ours, inputs, frame_times()), expected, **TOLERANCE)


def test_compile_repeated_blocks():
    _, ours = make_pair()
    inputs = make_inputs(ours)
    expected = run(ours, inputs, frame_times())
    torch._dynamo.reset()
    counter = CompileCounter()
    ours.compile_repeated_blocks(backend=counter, fullgraph=True)
    torch.testing.assert_close(run(ours, inputs, frame_times()), expected, **TOLERANCE)
    assert counter.frame_count == 1  # both blocks share one graph
    run(ours, inputs, frame_times() // 2)
    assert counter.frame_count == 1  # a new time is no new graph


def test_runs_in_bfloat16():
    stock, ours = make_pair()
    inputs = make_inputs(stock)
    exact = run(ours, inputs, frame_times())
    half = {name: value.bfloat16() if torch.is_tensor(value) else value for name, value in inputs.items()}
    sample = run(ours.bfloat16(), half, frame_times())
    assert sample.dtype == torch.bfloat16
    assert (sample.float() - exact).square().mean().sqrt() < 0.05 * exact.square().mean().sqrt()


def test_frames_of_a_patch_with_different_times():
    _, ours = make_pair()
    timestep = frame_times()
    timestep[1, 4] = 900
    with pytest.raises(
        ValueError, match=r"patch 2 of sample 1 have the timesteps \[900, 0\].*all of its frames or none"
    ):
        run(ours, make_inputs(ours), timestep)


@pytest.mark.parametrize("shape", [(), (1,), (BATCH, 1), (BATCH, FRAMES // 2), (1, FRAMES), (BATCH, FRAMES, 1)])
def test_wrong_timestep_shape(shape):
    _, ours = make_pair()
    with pytest.raises(ValueError, match=r"pass \(2,\) .*, or \(2, 6\) ") as error:
        run(ours, make_inputs(ours), torch.zeros(shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("size", [(5, 4, 6), (6, 3, 6), (6, 4, 5)])
def test_latents_that_do_not_divide_into_patches(size):
    _, ours = make_pair()
    inputs = make_inputs(ours)
    hidden_states = torch.zeros(BATCH, size[0], 4, *size[1:])
    with pytest.raises(ValueError, match=r"pass multiples of the patch size \(2, 2, 2\)"):
        run(ours, inputs | {"hidden_states": hidden_states}, torch.zeros(BATCH))


def test_missing_ofs():
    _, ours = make_pair(ofs_embed_dim=8)
    inputs = make_inputs(ours)
    del inputs["ofs"]
    with pytest.raises(ValueError, match="pass `ofs`"):
        run(ours, inputs, torch.zeros(BATCH))
