"""Parts as people have them: each way to hand them over gives what the stock pipeline gives, or is refused by name."""

import copy
import importlib.util

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny import tiny_composer, tiny_euler, tiny_rewriter, tiny_transformer, tiny_wan_components, tiny_wan_family
from tiny_cogvideox import tiny_cogvideox_components
from tiny_dreamer import tiny_dreamer_pipeline

from diffusers_fvg import (
    AnchorComposer,
    AnchorConditionedTransformer3D,
    ChatEndpoint,
    FactorizedCogVideoXPipeline,
    FactorizedVideoPipeline,
    FirstFrameRewriter,
)
from diffusers_fvg.schedules.cogvideox import COGVIDEOX_1_5_SCHEDULE


SIZE = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16, "output_type": "pt"}
CALL = {**SIZE, "num_inference_steps": 2, "guidance_scale": 5.0}
PROMPT = "a red circle moves to the right"


def seeded():
    return torch.Generator().manual_seed(0)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan(**changes):
    """A stock pipeline as people have it, with a scheduler of their own."""
    return quiet(WanPipeline(**tiny_wan_components() | {"scheduler": tiny_euler()} | changes))


def frames_of(pipe):
    direct = {"mode": "direct"} if isinstance(pipe, FactorizedVideoPipeline) else {}
    # The stock pipeline rounds its text features to the transformer's dtype, float32 here.
    return pipe(PROMPT, negative_prompt="blue", generator=seeded(), **CALL, **direct).frames


def lora():
    donor = tiny_transformer()
    torch.manual_seed(9)
    donor.add_adapter(LoraConfig(r=4, target_modules=["to_q", "ffn.net.2"], init_lora_weights=False))
    return {f"transformer.{key}": value for key, value in get_peft_model_state_dict(donor).items()}


# How a stock transformer may come.
def plain(transformer):
    return transformer


def layerwise_cast(transformer):
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return transformer


def group_offloaded(transformer, **options):
    apply_group_offloading(
        transformer, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), **options
    )
    return transformer


def offloaded_by_leaf(transformer):
    return group_offloaded(transformer, offload_type="leaf_level")


def offloaded_by_block(transformer):
    return group_offloaded(transformer, offload_type="block_level", num_blocks_per_group=1)


def compiled(transformer):
    return torch.compile(transformer, backend="eager")


def gguf(transformer):
    """Linear layers of the blocks as GGUF has them, in Q8_0."""
    import gguf as library
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    for block in transformer.blocks:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, torch.nn.Linear) and layer.in_features % 32 == 0:
                quantized = library.quants.quantize(layer.weight.detach().numpy(), library.GGMLQuantizationType.Q8_0)
                made = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, torch.float32)
                made.weight = GGUFParameter(torch.from_numpy(quantized), quant_type=library.GGMLQuantizationType.Q8_0)
                made.bias = layer.bias
                block.set_submodule(name, made)
    return transformer


def torchao(transformer):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(transformer, Int8WeightOnlyConfig())
    return transformer


def bitsandbytes(transformer):
    """Linear layers of the blocks in 4 bits."""
    import bitsandbytes as library

    for block in transformer.blocks:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, torch.nn.Linear):
                made = library.nn.Linear4bit(
                    layer.in_features, layer.out_features, layer.bias is not None, torch.float32, quant_type="nf4"
                )
                made.load_state_dict(layer.state_dict())
                block.set_submodule(name, made.to("cpu"))
    return transformer


WAYS = [plain, layerwise_cast, offloaded_by_leaf, offloaded_by_block, compiled, gguf, torchao, bitsandbytes]


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def stock(request):
    way = request.param
    if way in (gguf, torchao, bitsandbytes) and importlib.util.find_spec(way.__name__) is None:
        pytest.skip(f"needs the package {way.__name__}")
    # Wide enough for blocks of 32 weights, which GGUF has.
    return wan(transformer=way(tiny_transformer(num_attention_heads=4, attention_head_dim=16, ffn_dim=64)))


# How it is handed over.
def from_pipe(pipe):
    return FactorizedVideoPipeline.from_pipe(pipe)


def constructor(pipe):
    return FactorizedVideoPipeline(**pipe.components)


def assignment(pipe):
    made = FactorizedVideoPipeline(**tiny_wan_components() | {"scheduler": pipe.scheduler})
    made.transformer = pipe.transformer
    return made


def register(pipe):
    made = FactorizedVideoPipeline(**tiny_wan_components() | {"scheduler": pipe.scheduler})
    made.register_modules(transformer=pipe.transformer)
    return made


@pytest.mark.parametrize("hand_over", [from_pipe, constructor, assignment, register])
def test_a_transformer_that_is_handed_over_gives_what_the_stock_pipeline_gives(stock, hand_over):
    before = frames_of(stock)
    pipe = quiet(hand_over(stock))
    assert type(pipe.transformer) is AnchorConditionedTransformer3D and pipe.transformer is not stock.transformer
    assert (frames_of(pipe) - before).abs().max() < 1e-4
    # Layers and weights are the very same.
    inner = getattr(stock.transformer, "_orig_mod", stock.transformer)
    ours, theirs = dict(pipe.transformer.named_parameters()), dict(inner.named_parameters())
    assert ours.keys() == theirs.keys() and all(ours[name] is theirs[name] for name in ours)
    ends = [name for name, module in inner.named_modules() if not module._modules]
    assert all(pipe.transformer.get_submodule(name) is inner.get_submodule(name) for name in ends)
    # An anchored call in between, and the stock pipeline as before.
    assert pipe(PROMPT, image=np.zeros((32, 32, 3), np.uint8), **CALL).frames.shape == (1, 9, 3, 32, 32)
    assert torch.equal(frames_of(stock), before)


def test_an_adapter_of_ours_is_not_the_stock_pipeline_s():
    stock = wan()
    before = frames_of(stock)
    pipe = quiet(FactorizedVideoPipeline.from_pipe(stock))
    pipe.load_lora_weights(lora(), "other")
    assert not torch.equal(frames_of(pipe), before)
    assert torch.equal(frames_of(stock), before) and not hasattr(stock.transformer, "peft_config")
    pipe.transformer.set_anchor_window(0)
    pipe.unload_lora_weights()
    assert torch.equal(frames_of(stock), before)
    assert (frames_of(pipe) - before).abs().max() < 1e-4


def test_two_experts_are_handed_over():
    parts = tiny_wan_family("Wan2.2-T2V-A14B")
    stock = quiet(WanPipeline(**parts, scheduler=tiny_euler()))
    before = frames_of(stock)
    pipe = quiet(FactorizedVideoPipeline.from_pipe(stock))
    assert pipe.config.boundary_ratio == 0.875 and type(pipe.transformer_2) is AnchorConditionedTransformer3D
    assert (frames_of(pipe) - before).abs().max() < 1e-4
    pipe.transformer_2 = tiny_transformer(num_attention_heads=3)
    assert type(pipe.transformer_2) is AnchorConditionedTransformer3D


def test_cogvideox_is_handed_over():
    stock = quiet(
        CogVideoXPipeline(**tiny_cogvideox_components(), scheduler=CogVideoXDDIMScheduler(**COGVIDEOX_1_5_SCHEDULE))
    )
    call = {"num_inference_steps": 2, "generator": seeded(), "output_type": "pt", "max_sequence_length": 16}
    call |= {"height": 32, "width": 32, "num_frames": 9, "guidance_scale": 3.0}
    before = stock(PROMPT, **call).frames
    for pipe in (
        FactorizedCogVideoXPipeline.from_pipe(stock),
        FactorizedCogVideoXPipeline(**stock.components),
    ):
        made = quiet(pipe)(PROMPT, mode="direct", **call | {"generator": seeded()}).frames
        assert (made - before).abs().max() < 1e-4
        assert torch.equal(stock(PROMPT, **call | {"generator": seeded()}).frames, before)


def test_a_pipeline_keeps_the_dtype_of_what_it_takes_over():
    stock = wan()
    stock.transformer.to(torch.bfloat16)
    pipe = FactorizedVideoPipeline.from_pipe(stock)
    assert pipe.transformer.dtype == stock.transformer.dtype == torch.bfloat16


def test_stages_1_and_2_come_as_people_have_them(tmp_path):
    stock, composer, rewriter = wan(), tiny_composer(), tiny_rewriter()
    composer.pipeline.save_pretrained(tmp_path / "image")
    rewriter.save_pretrained(tmp_path / "rewriter")
    for drawn in (composer, composer.pipeline, tmp_path / "image", str(tmp_path / "image")):
        pipe = FactorizedVideoPipeline.from_pipe(stock, composer=drawn)
        assert type(pipe.composer) is AnchorComposer
        assert pipe.config.composer == ("diffusers", "AnchorComposer")
    pair = rewriter.model, rewriter.tokenizer
    for written in (rewriter, pair, list(pair), tmp_path / "rewriter", str(tmp_path / "rewriter")):
        pipe = FactorizedVideoPipeline.from_pipe(stock, rewriter=written)
        assert type(pipe.rewriter) is FirstFrameRewriter and pipe.rewriter.model is not None
    pipe = FactorizedVideoPipeline.from_pipe(stock)
    assert pipe.rewriter is None and pipe.composer is None
    pipe.rewriter, pipe.composer = ChatEndpoint("http://127.0.0.1:9/v1", "m"), composer.pipeline
    assert pipe.rewriter.endpoint.model == "m" and pipe.composer.pipeline is composer.pipeline
    dreamer = tiny_dreamer_pipeline(composer=composer.pipeline, rewriter=pair)
    assert type(dreamer.composer) is AnchorComposer and type(dreamer.rewriter) is FirstFrameRewriter


def test_from_pretrained_takes_them_too(tmp_path):
    composer, rewriter = tiny_composer(), tiny_rewriter()
    FactorizedVideoPipeline.from_pipe(wan(), composer=composer, rewriter=rewriter).save_pretrained(tmp_path)
    composer.pipeline.save_pretrained(tmp_path / "image")
    for cls in (FactorizedVideoPipeline, DiffusionPipeline):
        for drawn in (composer.pipeline, str(tmp_path / "image")):
            pair = rewriter.model, rewriter.tokenizer
            stock = tiny_transformer(seed=3)
            pipe = cls.from_pretrained(tmp_path, composer=drawn, rewriter=pair, transformer=stock)
            assert type(pipe.composer) is AnchorComposer and pipe.rewriter.model is rewriter.model
            assert pipe.transformer.proj_out is stock.proj_out
        assert cls.from_pretrained(tmp_path, rewriter=None, composer=None).rewriter is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer": tiny_transformer(in_channels=36)}, "`transformer` takes 36 channels.*image-to-video"),
        (
            {"transformer": tiny_transformer(in_channels=36, image_dim=8, added_kv_proj_dim=24)},
            "36 channels and image embeddings.*image-to-video",
        ),
        ({"transformer_2": tiny_transformer(in_channels=36), "boundary_ratio": 0.9}, "`transformer_2` takes 36"),
        ({"transformer": torch.nn.Linear(1, 1)}, "must be a WanTransformer3DModel, but is a Linear"),
        ({"composer": torch.nn.Linear(1, 1)}, "`composer` must be .* but is a Linear"),
        ({"composer": 3}, "`composer` must be .* but is a int"),
        ({"rewriter": tiny_rewriter().model}, "`rewriter` must be .* but is a LlamaForCausalLM"),
        ({"rewriter": (1, 2, 3)}, "`rewriter` must be .* but is a tuple"),
    ],
)
def test_what_cannot_fit_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        FactorizedVideoPipeline.from_pipe(wan(), **changes)
    pipe = FactorizedVideoPipeline.from_pipe(wan())
    before = dict(pipe.components)
    for name in changes.keys() - {"boundary_ratio"}:
        with pytest.raises(ValueError, match=message):
            setattr(pipe, name, changes[name])
        with pytest.raises(ValueError, match=message):
            pipe.register_modules(**{name: changes[name]})
    assert pipe.components == before


def test_a_pipeline_without_what_is_needed_is_refused():
    class Other(DiffusionPipeline):
        def __init__(self, vae, scheduler):
            super().__init__()
            self.register_modules(vae=vae, scheduler=scheduler)

    parts = tiny_wan_components()
    with pytest.raises(ValueError, match="Other has no text_encoder, tokenizer, transformer.*pass it"):
        FactorizedVideoPipeline.from_pipe(Other(parts["vae"], FlowMatchEulerDiscreteScheduler()))


def test_a_processor_of_somebody_s_own_is_not_dropped():
    transformer = WanTransformer3DModel.from_config(tiny_transformer().config)
    transformer.blocks[0].attn1.processor = AttnProcessor()
    with pytest.raises(ValueError, match="AttnProcessor.*only WanAttnProcessor"):
        FactorizedVideoPipeline(**tiny_wan_components() | {"transformer": transformer})


def deltas():
    """A LoRA of a bias, a norm and a modulation table, for which PEFT has no layers."""
    transformer = tiny_transformer()
    names = {"proj_out.bias": "diff_b", "blocks.0.attn1.norm_q.weight": "diff", "blocks.1.modulation": "diff_m"}
    shapes = {**dict(transformer.named_parameters()), "blocks.1.modulation": transformer.blocks[1].scale_shift_table}
    return {
        f"diffusion_model.{name.removesuffix('.bias').removesuffix('.weight').removesuffix('.modulation')}.{kind}": (
            torch.full_like(shapes[name], 0.3)
        )
        for name, kind in names.items()
    }


def test_deltas_of_ours_are_not_in_the_stock_pipeline_s_weights():
    stock = wan()
    before, weights = frames_of(stock), {k: v.clone() for k, v in stock.transformer.state_dict().items()}
    pipe, sibling = (quiet(FactorizedVideoPipeline.from_pipe(stock)) for _ in range(2))
    report = pipe.load_lora_weights(deltas(), "deltas")
    assert len(report.matched) >= 2 and not torch.equal(frames_of(pipe), before)
    assert torch.equal(frames_of(stock), before)
    assert (frames_of(sibling) - before).abs().max() < 1e-4
    assert all(torch.equal(weights[name], value) for name, value in stock.transformer.state_dict().items())
    pipe.unload_lora_weights()
    assert (frames_of(pipe) - before).abs().max() < 1e-4


def test_a_compiled_transformer_of_ours_stays_compiled():
    pipe = quiet(FactorizedVideoPipeline.from_pipe(wan()))
    before = frames_of(pipe)
    compiled = torch.compile(pipe.transformer, backend="eager")
    pipe.transformer = compiled
    assert pipe.transformer is compiled
    assert (frames_of(pipe) - before).abs().max() < 1e-5


def test_sequentially_offloaded_layers_are_taken_over():
    stock = wan()
    before = frames_of(stock)
    cpu_offload(stock.transformer, torch.device("cpu"))
    pipe = quiet(FactorizedVideoPipeline.from_pipe(stock))
    assert (frames_of(pipe) - before).abs().max() < 1e-4


def test_a_pipeline_of_ours_hands_on_its_checker_and_its_bar():
    pipe = quiet(FactorizedVideoPipeline.from_pipe(wan()))
    pipe.safety_checker = lambda image: "no"
    made = FactorizedVideoPipeline.from_pipe(pipe)
    assert made.safety_checker is pipe.safety_checker and made._progress_bar_config == {"disable": True}
    drawn = tiny_composer().pipeline
    drawn.set_progress_bar_config(desc="mine")
    assert AnchorComposer(drawn).pipeline._progress_bar_config == {"desc": "mine", "disable": True}


def test_a_copy_of_a_running_pipeline_does_not_run():
    pipe, copies = quiet(FactorizedVideoPipeline.from_pipe(wan())), []

    def copy_it(pipe, step, timestep, tensors):
        copies.append(copy.deepcopy(pipe))
        return tensors

    pipe(PROMPT, mode="direct", callback_on_step_end=copy_it, generator=seeded(), **CALL)
    assert torch.equal(frames_of(quiet(copies[0])), frames_of(pipe))
