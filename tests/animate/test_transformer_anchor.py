"""AnchorConditionedTransformer3D against diffusers' WanTransformer3DModel on the same weights and inputs."""

import inspect
import json

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers import WanTransformer3DModel, hooks
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks.context_parallel import apply_context_parallel
from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from forked import finish, start_processes
from group_offload import skip_without_group_offload
from peft import LoraConfig
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusers_fvg.animate import transformer_anchor
from diffusers_fvg.animate.transformer_anchor import AnchorConditionedTransformer3D


CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "freq_dim": 32,
    "rope_max_seq_len": 32,
}
BATCH, FRAMES, HEIGHT, WIDTH = 2, 5, 4, 6
TOKENS_PER_FRAME = (HEIGHT // 2) * (WIDTH // 2)
FORMS = ("sample", "frame", "token")
# A place in time of each sample, of one frame behind its clip.
APPENDED = torch.tensor([[1.125], [0.625]])
TOLERANCE = {"rtol": 0, "atol": 1e-5}


def make_model(cls, seed=0, **overrides):
    torch.manual_seed(seed)
    return cls(**{**CONFIG, **overrides}).eval()


def make_pair(**overrides):
    stock = make_model(WanTransformer3DModel, **overrides)
    ours = make_model(AnchorConditionedTransformer3D, seed=1, **overrides)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def make_inputs(form, frames=FRAMES):
    """Our timestep, and the one the stock class takes for the same times; every sample and frame has its own time."""
    generator = torch.Generator().manual_seed(2)
    inputs = {
        "hidden_states": torch.randn(BATCH, 16, frames, HEIGHT, WIDTH, generator=generator),
        "encoder_hidden_states": torch.randn(BATCH, 7, 32, generator=generator),
    }
    if form == "sample":
        timestep = stock_timestep = torch.tensor([900.0, 250.0])
    elif form == "frame":
        timestep = torch.rand(BATCH, frames, generator=generator) * 1000
        timestep[0, 0] = timestep[1, 2] = 0  # the anchors
        stock_timestep = timestep.repeat_interleave(TOKENS_PER_FRAME, dim=1)
    else:
        timestep = stock_timestep = torch.rand(BATCH, frames * TOKENS_PER_FRAME, generator=generator) * 1000
    return {**inputs, "timestep": timestep}, {**inputs, "timestep": stock_timestep}


@torch.no_grad()
def run(model, inputs, **kwargs):
    return model(**inputs, **kwargs).sample


@pytest.mark.parametrize("form", FORMS)
def test_equals_the_stock_class(form):
    stock, ours = make_pair()
    inputs, stock_inputs = make_inputs(form)
    torch.testing.assert_close(run(ours, inputs), run(stock, stock_inputs), **TOLERANCE)


def test_comparison_notices_times_on_the_wrong_frames():
    stock, ours = make_pair()
    inputs, stock_inputs = make_inputs("frame")
    expected = run(stock, stock_inputs)
    for wrong in (inputs["timestep"].roll(1, dims=1), inputs["timestep"].flip(0)):
        assert (run(ours, {**inputs, "timestep": wrong}) - expected).abs().max() > 1e-3


def test_equals_the_stock_class_with_image_embeddings():
    stock, ours = make_pair(image_dim=20, added_kv_proj_dim=24)
    inputs, stock_inputs = make_inputs("frame")
    # The stock attention takes the last 512 tokens for text.
    extra = {
        "encoder_hidden_states": torch.randn(BATCH, 512, 32),
        "encoder_hidden_states_image": torch.randn(2, 9, 20),
    }
    actual, expected = run(ours, {**inputs, **extra}), run(stock, {**stock_inputs, **extra})
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def test_tuple_output():
    ours = make_model(AnchorConditionedTransformer3D)
    inputs, _ = make_inputs("frame")
    (sample,) = ours(**inputs, return_dict=False)
    torch.testing.assert_close(sample.detach(), run(ours, inputs), rtol=0, atol=0)


class LargestOutput(TorchDispatchMode):
    """Number of elements of the largest tensor any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [
            leaf.untyped_storage().nbytes() // leaf.element_size()
            for leaf in tree_leaves(out)
            if torch.is_tensor(leaf)
        ]
        self.numel = max(self.numel, *sizes, 0)
        return out


def test_frame_times_build_no_table_the_size_of_the_tokens():
    ours = make_model(AnchorConditionedTransformer3D)
    table = BATCH * FRAMES * TOKENS_PER_FRAME * 6 * 24
    for form, builds_table in (("sample", False), ("frame", False), ("token", True)):
        with LargestOutput() as mode:
            run(ours, make_inputs(form)[0])
        assert (mode.numel >= table) == builds_table, form


@pytest.mark.parametrize("form", FORMS)
def test_gradients_with_checkpointing(form):
    stock, ours = make_pair()
    inputs, stock_inputs = make_inputs(form)
    calls = []
    ours.blocks[0].attn1.register_forward_hook(lambda *_: calls.append(None))
    ours.train().enable_gradient_checkpointing()
    target = torch.randn(BATCH, 16, FRAMES, HEIGHT, WIDTH)
    for model, kwargs in ((ours, inputs), (stock, stock_inputs)):
        (model(**kwargs).sample - target).square().mean().backward()
    assert len(calls) == 2  # computed again in the backward pass
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, **TOLERANCE, msg=lambda m, name=name: f"{name}: {m}"
        )
        assert parameter.grad.abs().max() > 1e-4, name


def test_lora_adapter(tmp_path):
    stock, ours = make_pair()
    inputs, stock_inputs = make_inputs("frame")
    base = run(ours, inputs)
    torch.manual_seed(3)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2", "time_proj"]
    stock.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False))
    stock.save_lora_adapter(tmp_path, weight_name="lora.safetensors")
    ours.load_lora_adapter(tmp_path, prefix=None, weight_name="lora.safetensors")
    for kwargs in ({}, {"attention_kwargs": {"scale": 0.5}}):
        actual = run(ours, inputs, **kwargs)
        torch.testing.assert_close(actual, run(stock, stock_inputs, **kwargs), **TOLERANCE)
        assert (actual - base).abs().max() > 1e-2
    torch.testing.assert_close(run(ours, inputs, attention_kwargs={"scale": 0.0}), base, **TOLERANCE)
    ours.disable_adapters()
    torch.testing.assert_close(run(ours, inputs), base, **TOLERANCE)

    ours.delete_adapters("default")
    ours.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    trainable = [name for name, p in ours.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 2 * CONFIG["num_layers"] and all("lora" in name for name in trainable)


# Every cache skips something from the second or third of four steps on. Pyramid and faster cache ask for the time of the
# step through a callback; faster cache computes everything until that time is below 681.
PROGRESS = {"timestep": None}
CACHES = {
    "first_block": lambda: FirstBlockCacheConfig(threshold=10.0),
    "mag": lambda: MagCacheConfig(
        threshold=10.0, retention_ratio=0.2, num_inference_steps=4, mag_ratios=torch.tensor([1.0, 0.9, 0.8, 0.7])
    ),
    "sea": lambda: hooks.SeaCacheConfig(threshold=100.0),
    "taylorseer": lambda: TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=1,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"blocks\.\d+\.attn1"],
    ),
    "pyramid": lambda: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: PROGRESS["timestep"],
    ),
    "faster": lambda: FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        current_timestep_callback=lambda: PROGRESS["timestep"],
        tensor_format="BCFHW",
        is_guidance_distilled=True,
    ),
}


@pytest.mark.parametrize("name", CACHES)
def test_step_caches(name):
    if name == "sea" and not hasattr(hooks, "SeaCacheConfig"):
        pytest.skip(f"diffusers {diffusers.__version__} has no SeaCacheConfig")
    stock, ours = make_pair()
    inputs, stock_inputs = make_inputs("frame")

    def where(model, i):
        # The stock class takes it from diffusers 0.41 on, ours always.
        takes = model is not stock or "kwargs" in inspect.signature(model.cache_context).parameters
        return {"step_index": i, "num_inference_steps": 4, "sigma": 1 - 0.25 * i} if takes else {}

    def steps(model, inputs):
        outputs = []
        for i in range(4):
            PROGRESS["timestep"] = 1000 - 250 * i
            step = {**inputs, "hidden_states": inputs["hidden_states"] * (1 - 0.1 * i)}
            with model.cache_context("cond", **where(model, i)):
                outputs.append(run(model, step))
        return torch.stack(outputs)

    # Of another model: diffusers 0.40 does not see a cache that is enabled after the first step.
    uncached = steps(make_pair()[1], inputs)
    for model in (stock, ours):
        model.enable_cache(CACHES[name]())
    cached = steps(ours, inputs)
    torch.testing.assert_close(cached, steps(stock, stock_inputs), **TOLERANCE)
    assert (cached - uncached).abs().max() > 1e-3  # the cache did act
    ours.disable_cache()
    torch.testing.assert_close(steps(ours, inputs), uncached, **TOLERANCE)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offload(offload_type, tmp_path):
    skip_without_group_offload()
    # With the disk as the store the weights really leave: on a CPU-only machine, CPU to CPU would move nothing.
    stock, ours = make_pair()
    inputs, stock_inputs = make_inputs("frame")
    expected = run(stock, stock_inputs)
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    ours.enable_group_offload(
        torch.device("cpu"),
        torch.device("cpu"),
        offload_type=offload_type,
        offload_to_disk_path=str(tmp_path),
        **blocks,
    )
    for _ in range(2):
        with torch.no_grad():
            ours.blocks[0].ffn.net[2].weight.zero_()  # offloaded: what stands in memory does not count
        torch.testing.assert_close(run(ours, inputs), expected, **TOLERANCE)


def test_sequential_offload():
    stock, ours = make_pair()
    inputs, stock_inputs = make_inputs("frame")
    cpu_offload(ours, execution_device=torch.device("cpu"))
    assert ours.blocks[0].attn1.norm_q.weight.device.type == "meta"
    torch.testing.assert_close(run(ours, inputs), run(stock, stock_inputs), **TOLERANCE)


def test_self_attention_takes_the_fused_norm_and_rotary_embedding(monkeypatch):
    stock, ours = make_pair()
    inputs, stock_inputs = make_inputs("frame")
    calls = []
    fused = transformer_anchor.rms_norm_rope
    monkeypatch.setattr(transformer_anchor, "rms_norm_rope", lambda *args: calls.append(args) or fused(*args))
    run(ours, inputs)
    assert len(calls) == CONFIG["num_layers"]
    # A hook on a norm sees its call, which the fused pass would go around.
    seen = []
    ours.blocks[1].attn1.norm_k.register_forward_hook(lambda *_: seen.append(None))
    torch.testing.assert_close(run(ours, inputs), run(stock, stock_inputs), **TOLERANCE)
    assert len(calls) == 2 * CONFIG["num_layers"] - 1 and len(seen) == 1


def test_qkv_fusion():
    stock, ours = make_pair()
    inputs, stock_inputs = make_inputs("frame")
    expected = run(stock, stock_inputs)
    ours.fuse_qkv_projections()
    assert ours.blocks[0].attn1.fused_projections
    with torch.no_grad():
        ours.blocks[0].attn1.to_q.weight.zero_()  # not read while fused
    torch.testing.assert_close(run(ours, inputs), expected, **TOLERANCE)
    ours.unfuse_qkv_projections()
    assert (run(ours, inputs) - expected).abs().max() > 1e-3


def test_attention_backend(monkeypatch):
    # diffusers sets that of the process with it: back to what it was afterwards.
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    stock, ours = make_pair()
    inputs, stock_inputs = make_inputs("frame")
    ours.set_attention_backend("_native_math")
    assert {block.attn1.processor._attention_backend for block in ours.blocks} == {"_native_math"}
    torch.testing.assert_close(run(ours, inputs), run(stock, stock_inputs), **TOLERANCE)


def test_automatic_attention_backend_is_this_models_alone():
    ours = make_model(AnchorConditionedTransformer3D)
    active = _AttentionBackendRegistry._active_backend
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName._NATIVE_MATH)
    try:
        ours.set_attention_backend("auto")
        assert _AttentionBackendRegistry._active_backend == AttentionBackendName._NATIVE_MATH
    finally:
        _AttentionBackendRegistry.set_active_backend(active)
    backends = {attn.processor._attention_backend for block in ours.blocks for attn in (block.attn1, block.attn2)}
    assert backends == {AttentionBackendName.NATIVE}


def test_compile_repeated_blocks():
    stock, ours = make_pair()
    inputs, stock_inputs = make_inputs("frame")
    torch._dynamo.reset()
    counter = CompileCounter()
    ours.compile_repeated_blocks(backend=counter, fullgraph=True)
    torch.testing.assert_close(run(ours, inputs), run(stock, stock_inputs), **TOLERANCE)
    assert counter.frame_count == 1  # both blocks share one graph
    run(ours, {**inputs, "timestep": inputs["timestep"] / 2})
    assert counter.frame_count == 1  # a new time is no new graph


def test_loads_a_stock_checkpoint_and_saves_one_the_stock_class_loads(tmp_path):
    stock = make_model(WanTransformer3DModel)
    stock.save_pretrained(tmp_path / "stock")
    assert json.loads((tmp_path / "stock" / "config.json").read_text())["_class_name"] == "WanTransformer3DModel"

    ours, report = AnchorConditionedTransformer3D.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not any(report.values()), report
    inputs, stock_inputs = make_inputs("frame")
    torch.testing.assert_close(run(ours, inputs), run(stock, stock_inputs), **TOLERANCE)

    ours.save_pretrained(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["_class_name"] == "AnchorConditionedTransformer3D"
    public = {key for key in stock.config if not key.startswith("_")}
    assert {key: config[key] for key in public} == {key: json.loads(json.dumps(stock.config[key])) for key in public}
    again = AnchorConditionedTransformer3D.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(run(again, inputs), run(ours, inputs), rtol=0, atol=0)
    back, report = WanTransformer3DModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    torch.testing.assert_close(run(back, stock_inputs), run(stock, stock_inputs), rtol=0, atol=0)


def modulation_seen_by_the_first_block(model, inputs):
    seen = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    run(model, inputs)
    handle.remove()
    return seen[0]


def test_bfloat16_loading_keeps_the_modulation_in_float32(tmp_path):
    stock = make_model(WanTransformer3DModel)
    stock.save_pretrained(tmp_path)
    ours = AnchorConditionedTransformer3D.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    for name, parameter in ours.named_parameters():
        kept = any(part in name.split(".") for part in AnchorConditionedTransformer3D._keep_in_fp32_modules)
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
    assert ours.condition_embedder.time_proj.weight.dtype == torch.float32
    assert ours.dtype == torch.bfloat16

    inputs, stock_inputs = make_inputs("frame")
    half = {k: v if k == "timestep" else v.bfloat16() for k, v in inputs.items()}
    actual = modulation_seen_by_the_first_block(ours, half)
    expected = modulation_seen_by_the_first_block(stock.double(), {k: v.double() for k, v in stock_inputs.items()})
    expected = expected[:, ::TOKENS_PER_FRAME]
    # bfloat16 would be off by its rounding, 1/256 of the value.
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)

    # The inputs and weights are rounded to 8 bits; the model as a whole stays within a few of those.
    sample = run(ours, half)
    assert sample.dtype == torch.bfloat16
    exact = run(stock.float(), stock_inputs)
    assert (sample.float() - exact).square().mean().sqrt() < 0.02 * exact.square().mean().sqrt()


def test_autocast_keeps_the_modulation_in_float32():
    _, ours = make_pair()
    inputs, _ = make_inputs("frame")
    expected = modulation_seen_by_the_first_block(ours, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual = modulation_seen_by_the_first_block(ours, inputs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_runs_when_cast_to_bfloat16_as_a_whole():
    stock, ours = make_pair()
    inputs, stock_inputs = make_inputs("frame")
    exact = run(stock, stock_inputs)
    ours.to(torch.bfloat16)
    sample = run(ours, {k: v if k == "timestep" else v.bfloat16() for k, v in inputs.items()})
    assert sample.dtype == torch.bfloat16
    assert (sample.float() - exact).square().mean().sqrt() < 0.05 * exact.square().mean().sqrt()


@pytest.mark.parametrize("shape", [(), (1,), (BATCH, 1), (BATCH, FRAMES - 1), (1, FRAMES), (BATCH, FRAMES, 1)])
def test_wrong_timestep_shape(shape):
    ours = make_model(AnchorConditionedTransformer3D)
    inputs, _ = make_inputs("frame")
    with pytest.raises(ValueError, match=r"pass \(2,\) .*, \(2, 5\) .*, or \(2, 30\) ") as error:
        ours(**{**inputs, "timestep": torch.zeros(shape)})
    assert str(shape) in str(error.value)


def test_latents_that_do_not_divide_into_patches():
    ours = make_model(AnchorConditionedTransformer3D)
    inputs, _ = make_inputs("frame")
    with pytest.raises(ValueError, match=r"\(5, 4, 5\).*multiples of the patch size \(1, 2, 2\)"):
        ours(**{**inputs, "hidden_states": inputs["hidden_states"][..., :5]})


class MaskedProcessor(WanAttnProcessor):
    """Stock self-attention under a mask of all pairs of tokens."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        mask = self.mask if encoder_hidden_states is None else None
        return super().__call__(attn, hidden_states, encoder_hidden_states, mask, rotary_emb)


def make_windowed_pair():
    """The stock class with the mask of window 1 written out, and ours: anchors at frame 0 and at frame 2."""
    stock, ours = make_pair()
    seen = torch.tensor([
        [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 0, 1, 1, 1], [1, 0, 0, 1, 1]],
        [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]],
    ]).bool()  # fmt: skip
    mask = seen.repeat_interleave(TOKENS_PER_FRAME, 1).repeat_interleave(TOKENS_PER_FRAME, 2).unsqueeze(1)
    for block in stock.blocks:
        block.attn1.set_processor(MaskedProcessor(mask))
    ours.set_anchor_window(1)
    inputs, _ = make_inputs("frame")
    times = torch.full((BATCH, FRAMES), 700.0)
    times[0, 0] = times[1, 2] = 0
    return stock, ours, {**inputs, "timestep": times}, {**inputs, "timestep": per_token(times)}


def per_token(times):
    return times.repeat_interleave(TOKENS_PER_FRAME, dim=1)


def test_anchor_window():
    stock, ours, inputs, stock_inputs = make_windowed_pair()
    expected = run(stock, stock_inputs)
    torch.testing.assert_close(run(ours, inputs), expected, **TOLERANCE)
    torch.testing.assert_close(run(ours, stock_inputs), expected, **TOLERANCE)  # one time per token
    # A clean token does not make its frame an anchor.
    tokens = {**stock_inputs, "timestep": stock_inputs["timestep"].clone()}
    tokens["timestep"][0, -1] = 0
    torch.testing.assert_close(run(ours, tokens), run(stock, tokens), **TOLERANCE)
    for window, differs in ((0, True), (2, True), (FRAMES, True), (None, True), (1, False)):
        ours.set_anchor_window(window)
        assert ((run(ours, inputs) - expected).abs().max() > 1e-4) == differs, window


def test_no_anchor_and_no_window_attend_to_all_frames():
    stock, ours = make_pair()
    for form, window in (("sample", 0), ("frame", FRAMES), ("frame", None)):
        inputs, stock_inputs = make_inputs(form)
        ours.set_anchor_window(window)
        torch.testing.assert_close(run(ours, inputs), run(stock, stock_inputs), **TOLERANCE)
    # One clip of a batch has an anchor, the other none.
    times = torch.full((BATCH, FRAMES), 700.0)
    times[1, 0] = 0
    inputs = {**make_inputs("frame")[0], "timestep": times}
    ours.set_anchor_window(0)
    actual, expected = run(ours, inputs), run(stock, {**inputs, "timestep": per_token(times)})
    torch.testing.assert_close(actual[0], expected[0], **TOLERANCE)
    assert (actual[1] - expected[1]).abs().max() > 1e-3


def test_anchor_window_gradients_with_checkpointing():
    stock, ours, inputs, stock_inputs = make_windowed_pair()
    ours.train().enable_gradient_checkpointing()
    target = torch.randn(BATCH, 16, FRAMES, HEIGHT, WIDTH)
    for model, kwargs in ((ours, inputs), (stock, stock_inputs)):
        (model(**kwargs).sample - target).square().mean().backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, **TOLERANCE, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("offload", ["group", "sequential"])
def test_anchor_window_with_offload(offload, tmp_path):
    stock, ours, inputs, stock_inputs = make_windowed_pair()
    cpu = torch.device("cpu")
    if offload == "group":
        skip_without_group_offload()
        ours.enable_group_offload(cpu, cpu, offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    else:
        cpu_offload(ours, execution_device=cpu)
    torch.testing.assert_close(run(ours, inputs), run(stock, stock_inputs), **TOLERANCE)


def test_anchor_window_in_one_graph():
    stock, ours, inputs, stock_inputs = make_windowed_pair()
    torch._dynamo.reset()
    counter = CompileCounter()
    ours.compile_repeated_blocks(backend=counter, fullgraph=True)
    torch.testing.assert_close(run(ours, inputs), run(stock, stock_inputs), **TOLERANCE)
    # Other times, anchors and windows are no new graph: the table of frames is data.
    run(ours, {**inputs, "timestep": inputs["timestep"].roll(1, dims=1) / 2})
    ours.set_anchor_window(0)
    run(ours, inputs)
    assert counter.frame_count == 1


def test_anchor_window_that_cannot_be():
    ours = make_model(AnchorConditionedTransformer3D)
    with pytest.raises(ValueError, match="`window=-1` must be at least 0, in latent frames"):
        ours.set_anchor_window(-1)
    ours.set_anchor_window(1)
    ours.blocks[0].attn1.processor._parallel_config = ParallelConfig()
    with pytest.raises(ValueError, match=r"set_anchor_window\(None\) for context parallelism"):
        run(ours, make_inputs("frame")[0])


def enable_context_parallel_on_cpu(model, rank):
    """`model.enable_parallelism`, which itself asks for an accelerator."""
    config = ContextParallelConfig(ulysses_degree=2)
    mesh = init_device_mesh("cpu", config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    config = ParallelConfig(context_parallel_config=config)
    config.setup(rank, 2, torch.device("cpu"), mesh=mesh)
    for block in model.blocks:
        block.attn1.processor._parallel_config = config
    apply_context_parallel(model, config.context_parallel_config, model._cp_plan)


def context_parallel_rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    _, ours = make_pair()
    enable_context_parallel_on_cpu(ours, rank)
    outputs = {form: run(ours, make_inputs(form, frames=3)[0]) for form in FORMS}
    outputs["appended"] = run(ours, make_inputs("frame", frames=4)[0], anchor_positions=APPENDED)
    if rank == 0:
        torch.save(outputs, f"{folder}/outputs.pt")
    torch.distributed.destroy_process_group()


def test_context_parallel(tmp_path):
    # 3 frames of 6 tokens on 2 ranks: the second shard begins in the middle of a frame.
    finish(start_processes(context_parallel_rank, [(rank, str(tmp_path)) for rank in range(2)]))
    outputs = torch.load(tmp_path / "outputs.pt")
    stock, _ = make_pair()
    for form in FORMS:
        expected = run(stock, make_inputs(form, frames=3)[1])
        torch.testing.assert_close(outputs[form], expected, **TOLERANCE, msg=lambda m, form=form: f"{form}: {m}")
    # A frame behind the clip makes 4 of 6 tokens.
    alone = run(make_pair()[1], make_inputs("frame", frames=4)[0], anchor_positions=APPENDED)
    torch.testing.assert_close(outputs["appended"], alone, **TOLERANCE)
