"""Every way to hand parts over, by the tables of `diffusers_fvg/pipelines/README.md`, which are checked against what is tested.

A transformer that is handed over gives what the stock pipeline gives, and the stock pipeline goes on giving it.
"""

import importlib.util
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tiny_composers
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, DiffusionPipeline, WanPipeline
from diffusers.hooks import apply_group_offloading
from group_offload import skip_without_group_offload
from peft import LoraConfig
from tiny import tiny_euler, tiny_rewriter, tiny_wan_family
from tiny_cogvideox import tiny_cogvideox_components
from tiny_dreamer import tiny_dreamer_pipeline

import diffusers_fvg
from diffusers_fvg import (
    AnchorComposer,
    ChatEndpoint,
    FactorizedCogVideoXPipeline,
    FactorizedDreamerPipeline,
    FactorizedVideoPipeline,
    FirstFrameRewriter,
    assemble,
)
from diffusers_fvg.pipelines.stages import FactorizedStages
from diffusers_fvg.schedules.cogvideox import COGVIDEOX_1_5_SCHEDULE


PROMPT = "a red circle moves to the right"
PICTURE = np.zeros((32, 32, 3), np.uint8)
# In latents: what follows is the stock VAE itself.
CALL = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16, "output_type": "latent"}
CALL |= {"num_inference_steps": 2, "guidance_scale": 5.0, "negative_prompt": "blue"}


def seeded():
    return torch.Generator().manual_seed(0)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(pipe, **options):
    """Of plain text-to-video, unless `options` anchor it."""
    if isinstance(pipe, FactorizedStages) and not options:
        options = {"mode": "direct"}
    if isinstance(pipe, FactorizedDreamerPipeline):
        options |= {"num_frames": 4, "max_sequence_length": 8, "num_inference_steps": 1}
    return pipe(PROMPT, generator=seeded(), **CALL | options).frames


# -- pipelines as people have them ------------------------------------------------------------------------------------


def wan(name):
    # Wide enough for blocks of 32 weights, which GGUF has.
    config = {"num_attention_heads": 4, "attention_head_dim": 16, "ffn_dim": 64}
    return WanPipeline(**tiny_wan_family(name, **config), scheduler=tiny_euler())


def cogvideox():
    return CogVideoXPipeline(**tiny_cogvideox_components(), scheduler=CogVideoXDDIMScheduler(**COGVIDEOX_1_5_SCHEDULE))


class Base(NamedTuple):
    make: Callable[[], DiffusionPipeline]
    ours: type[FactorizedStages]


BASES = {
    "Wan 2.1": Base(partial(wan, "Wan2.1-T2V-1.3B"), FactorizedVideoPipeline),
    "Wan 2.2, two experts": Base(partial(wan, "Wan2.2-T2V-A14B"), FactorizedVideoPipeline),
    "Wan 2.2 TI2V-5B": Base(partial(wan, "Wan2.2-TI2V-5B"), FactorizedVideoPipeline),
    "CogVideoX 1.5": Base(cogvideox, FactorizedCogVideoXPipeline),
    # It has no stock pipeline: what people have is one of ours.
    "Factorized-Dreamer": Base(
        partial(tiny_dreamer_pipeline, rewriter=None, composer=None), FactorizedDreamerPipeline
    ),
}
WITH_STOCK = [name for name, base in BASES.items() if base.ours is not FactorizedDreamerPipeline]


def experts_of(pipe):
    """Its video models, without the wrapper of `torch.compile`."""
    found = {name: pipe.components.get(name) for name in ("transformer", "transformer_2", "unet")}
    return {name: getattr(part, "_orig_mod", part) for name, part in found.items() if part is not None}


# -- what is handed over, and how: (base, stock pipeline, empty folder, Hub) -> our pipeline ---------------------------


def from_pipe(base, stock, folder, hub):
    return base.ours.from_pipe(stock)


def by_constructor(base, stock, folder, hub):
    settings = {name: stock.config[name] for name in ("boundary_ratio", "expand_timesteps") if name in stock.config}
    return base.ours(**stock.components, **settings)


def other_weights(base):
    """One of ours whose video models are not those of `base.make()`."""
    pipe = base.ours.from_pipe(base.make())
    with torch.no_grad():
        for expert in experts_of(pipe).values():
            for parameter in expert.parameters():
                parameter.mul_(0.5)
    return pipe


def by_assignment(base, stock, folder, hub):
    pipe = other_weights(base)
    for name, expert in experts_of(stock).items():
        setattr(pipe, name, expert)
    return pipe


def by_register_modules(base, stock, folder, hub):
    pipe = other_weights(base)
    pipe.register_modules(**experts_of(stock))
    return pipe


def by_keyword(base, stock, folder, hub):
    other_weights(base).save_pretrained(folder)
    return DiffusionPipeline.from_pretrained(folder, **experts_of(stock))


def stock_folder(base, stock, folder, hub):
    stock.save_pretrained(folder)
    return base.ours.from_pretrained(folder)


def our_folder(base, stock, folder, hub):
    base.ours.from_pipe(stock).save_pretrained(folder)
    return DiffusionPipeline.from_pretrained(folder)


def stock_repository(base, stock, folder, hub):
    stock.save_pretrained(folder)
    hub.add("org/base", folder)
    return base.ours.from_pretrained("org/base", cache_dir=folder / "cache")


def light_repository(base, stock, folder, hub):
    stock.save_pretrained(folder / "base")
    hub.add("org/base", folder / "base")
    assemble(folder / "light", "org/base", cache_dir=folder / "cache")
    hub.add("org/light", folder / "light")
    # An assembled repository has schedulers of its own.
    return DiffusionPipeline.from_pretrained("org/light", cache_dir=folder / "cache", scheduler=stock.scheduler)


HAND_OVERS = {
    "`from_pipe(pipe)`": (from_pipe, list(BASES)),
    "`FactorizedVideoPipeline(**pipe.components)`, with `boundary_ratio=` where there are two experts": (
        by_constructor,
        list(BASES),
    ),
    "`ours.transformer = transformer`": (by_assignment, WITH_STOCK),
    "`ours.register_modules(transformer=transformer)`": (by_register_modules, WITH_STOCK),
    "`DiffusionPipeline.from_pretrained(folder_of_ours, transformer=transformer)`": (by_keyword, WITH_STOCK),
    "`FactorizedVideoPipeline.from_pretrained(folder)` of the stock pipeline": (stock_folder, WITH_STOCK),
    "`DiffusionPipeline.from_pretrained(folder)` of ours, with all weights": (our_folder, list(BASES)),
    "`FactorizedVideoPipeline.from_pretrained(name)` of a stock repository on the Hub": (stock_repository, WITH_STOCK),
    "`DiffusionPipeline.from_pretrained(name)` of a light repository on the Hub": (light_repository, WITH_STOCK),
}
# These share the layers.
SHARING = (from_pipe, by_constructor, by_assignment, by_register_modules, by_keyword)


# -- forms of a transformer, in place: `from_pipe` takes them over ----------------------------------------------------


def layerwise_cast(transformer):
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def group_offloaded(transformer, **options):
    skip_without_group_offload()
    cpu = torch.device("cpu")
    apply_group_offloading(transformer, onload_device=cpu, offload_device=cpu, **options)


def offloaded_by_leaf(transformer):
    group_offloaded(transformer, offload_type="leaf_level")


def offloaded_by_block(transformer):
    group_offloaded(transformer, offload_type="block_level", num_blocks_per_group=1)


def sequentially_offloaded(transformer):
    cpu_offload(transformer, torch.device("cpu"))


def with_adapters(transformer):
    torch.manual_seed(0)
    layers = {"target_modules": ["to_q", "to_out.0"], "init_lora_weights": False}
    transformer.add_adapter(LoraConfig(r=2, **layers), "one")
    transformer.add_adapter(LoraConfig(r=3, lora_alpha=2, **layers), "two")
    transformer.set_adapters(["one", "two"], [0.5, 2.0])


def offloaded_as_a_whole(transformer):
    cpu_offload_with_hook(transformer, "cpu:0")


def compiled_blocks(transformer):
    transformer.compile_repeated_blocks(backend="eager")


def compiled(transformer):
    return torch.compile(transformer, backend="eager")


def linear_layers(transformer):
    """Of the blocks: (block, name within it, layer)."""
    for block in getattr(transformer, "blocks", None) or transformer.transformer_blocks:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, torch.nn.Linear) and layer.in_features % 32 == 0:
                yield block, name, layer


def gguf(transformer):
    import gguf as library
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = library.GGMLQuantizationType.Q8_0
    for block, name, layer in linear_layers(transformer):
        made = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, torch.float32)
        quantized = torch.from_numpy(library.quants.quantize(layer.weight.detach().numpy(), kind))
        made.weight, made.bias = GGUFParameter(quantized, quant_type=kind), layer.bias
        block.set_submodule(name, made)


def torchao(transformer):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(transformer, Int8WeightOnlyConfig())


def bitsandbytes(transformer):
    from bitsandbytes.nn import Linear4bit

    for block, name, layer in linear_layers(transformer):
        made = Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, torch.float32, quant_type="nf4"
        )
        made.load_state_dict(layer.state_dict())
        block.set_submodule(name, made.to("cpu"))


TRANSFORMERS = ["Wan 2.1", "Wan 2.2, two experts", "CogVideoX 1.5"]
# What it is called: what makes it, and for which bases it is tested. The package that it needs has the function's name.
FORMS = {
    "GGUF": (gguf, TRANSFORMERS),
    "bitsandbytes, 4 bits": (bitsandbytes, TRANSFORMERS),
    "torchao": (torchao, TRANSFORMERS),
    "layerwise casting": (layerwise_cast, TRANSFORMERS),
    "group offload by leaf": (offloaded_by_leaf, TRANSFORMERS),
    "group offload by block": (offloaded_by_block, TRANSFORMERS),
    "sequential offload": (sequentially_offloaded, TRANSFORMERS),
    "model offload": (offloaded_as_a_whole, TRANSFORMERS),
    "two LoRA adapters": (with_adapters, TRANSFORMERS),
    # Taken over as it was before; ours may be compiled in turn.
    "`torch.compile(transformer)`": (compiled, ["Wan 2.1"]),
    "`compile_repeated_blocks`": (compiled_blocks, ["Wan 2.1"]),
}


# -- the tests --------------------------------------------------------------------------------------------------------

CELLS = [(way, base) for way, (_, bases) in HAND_OVERS.items() for base in bases]
FORM_CELLS = [(form, base) for form, (_, bases) in FORMS.items() for base in bases]


def ids(cells):
    return [f"{base}: {way.replace('`', '')}" for way, base in cells]


def assert_handed_over(base, stock, hand_over, folder=None, hub=None):
    """Ours gives what the stock pipeline gives, which goes on giving it after ours has run with and without an anchor."""
    before = latents_of(quiet(stock))
    pipe = quiet(hand_over(base, stock, folder, hub))
    assert type(pipe) is base.ours
    if hand_over in SHARING and base.ours is not FactorizedDreamerPipeline:
        for name, theirs in experts_of(stock).items():
            ours = experts_of(pipe)[name]
            assert type(ours) is not type(theirs) and isinstance(ours, type(theirs))
            assert hasattr(ours, "_hf_hook") == hasattr(theirs, "_hf_hook")
            shared, all_of_it = dict(ours.named_parameters()), dict(theirs.named_parameters())
            assert shared.keys() == all_of_it.keys() and all(shared[key] is all_of_it[key] for key in shared)
    assert (latents_of(pipe) - before).abs().max() < 1e-4
    anchored = latents_of(pipe, image=PICTURE)
    assert anchored.shape == before.shape and (anchored - before).abs().max() > 1e-3
    assert torch.equal(latents_of(stock), before)


@pytest.mark.parametrize(("way", "name"), CELLS, ids=ids(CELLS))
def test_a_way_gives_what_the_stock_pipeline_gives(way, name, request, tmp_path):
    hand_over, base = HAND_OVERS[way][0], BASES[name]
    hub = request.getfixturevalue("hub") if way.endswith("Hub") else None
    assert_handed_over(base, base.make(), hand_over, tmp_path, hub)


@pytest.mark.parametrize(("form", "name"), FORM_CELLS, ids=ids(FORM_CELLS))
def test_a_form_of_a_transformer_gives_what_the_stock_pipeline_gives_with_it(form, name):
    change = FORMS[form][0]
    if change in (gguf, torchao, bitsandbytes) and importlib.util.find_spec(change.__name__) is None:
        pytest.skip(f"needs the package {change.__name__}")
    base = BASES[name]
    stock = base.make()
    for key, expert in experts_of(stock).items():
        made = change(expert)
        if made is not None:
            setattr(stock, key, made)
    assert_handed_over(base, stock, from_pipe)


# -- stages 1 and 2: (what people have, its folder, Hub) -> what is passed ---------------------------------------------


def itself(part, folder, hub):
    return part


def folder_name(part, folder, hub):
    return str(folder)


def repository(part, folder, hub):
    hub.add("org/part", folder)
    return "org/part"


def composer_of(pipeline, folder, hub):
    return AnchorComposer(pipeline)


def rewriter_of(pair, folder, hub):
    return FirstFrameRewriter(*pair)


COMPOSERS = {
    "a text-to-image pipeline": itself,
    "an `AnchorComposer`": composer_of,
    "its folder": folder_name,
    "its name on the Hub": repository,
}
REWRITERS = {
    "`(model, tokenizer)`": itself,
    "a `FirstFrameRewriter`": rewriter_of,
    "the folder of a chat model": folder_name,
    "the name of a chat model on the Hub": repository,
    "a `ChatEndpoint`": lambda *_: ChatEndpoint("http://127.0.0.1:9/v1", "chat"),
}


@pytest.fixture(scope="module")
def wan_pipe():
    return wan("Wan2.1-T2V-1.3B")


@pytest.fixture(scope="module")
def ours_saved(wan_pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    FactorizedVideoPipeline.from_pipe(wan_pipe).save_pretrained(folder)
    return folder


def each_way(wan_pipe, saved, name, part):
    """Ours with a part of stage 1 or 2, passed to `from_pipe`, assigned and registered, and passed to `from_pretrained`."""
    yield FactorizedVideoPipeline.from_pipe(wan_pipe, **{name: part})
    pipe = FactorizedVideoPipeline.from_pipe(wan_pipe)
    setattr(pipe, name, part)
    yield pipe
    yield DiffusionPipeline.from_pretrained(saved, **{name: part})
    # The same for the other bases, by the same lines.
    yield tiny_dreamer_pipeline(**{name: part})


@pytest.fixture(scope="module")
def text_to_image(tmp_path_factory):
    torch.manual_seed(0)
    pipeline, folder = quiet(tiny_composers.stable_diffusion_xl()), tmp_path_factory.mktemp("image")
    pipeline.save_pretrained(folder)
    return pipeline, folder


@pytest.mark.parametrize("way", COMPOSERS)
def test_a_composer_draws_what_the_stock_pipeline_draws(way, wan_pipe, ours_saved, text_to_image, request):
    pipeline, folder = text_to_image
    call = {"height": 32, "width": 32, "num_inference_steps": 1}
    expected = np.asarray(pipeline(PROMPT, generator=seeded(), **call).images[0])
    part = COMPOSERS[way](pipeline, folder, request.getfixturevalue("hub") if way.endswith("Hub") else None)
    for pipe in each_way(wan_pipe, ours_saved, "composer", part):
        assert type(pipe.composer) is AnchorComposer and pipe.config.composer == ("diffusers", "AnchorComposer")
        (picture,) = quiet(pipe).compose(PROMPT, generator=seeded(), **call)
        assert np.array_equal(np.asarray(picture), expected)
    assert np.array_equal(np.asarray(pipeline(PROMPT, generator=seeded(), **call).images[0]), expected)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    rewriter, folder = tiny_rewriter(), tmp_path_factory.mktemp("chat")
    for part in (rewriter.model, rewriter.tokenizer):
        part.save_pretrained(folder)
    return (rewriter.model, rewriter.tokenizer), folder


@pytest.mark.parametrize("way", REWRITERS)
def test_a_rewriter_is_asked_as_one_of_ours_is(way, wan_pipe, ours_saved, chat_model, request):
    pair, folder = chat_model
    part = REWRITERS[way](pair, folder, request.getfixturevalue("hub") if way.endswith("Hub") else None)
    messages, weights = FirstFrameRewriter(*pair).messages(PROMPT), dict(pair[0].named_parameters())
    for pipe in each_way(wan_pipe, ours_saved, "rewriter", part):
        assert type(pipe.rewriter) is FirstFrameRewriter and pipe.rewriter.messages(PROMPT) == messages
        if way == "a `ChatEndpoint`":
            assert pipe.rewriter.endpoint is part and pipe.rewriter.model is None
            continue
        assert all(torch.equal(weights[name], value) for name, value in pipe.rewriter.model.named_parameters())
        assert pipe.rewriter.tokenizer.get_vocab() == pair[1].get_vocab()


# -- the tables -------------------------------------------------------------------------------------------------------


def table_of(title):
    """Rows of the table below a heading of the README beside the pipelines, the row of column names first."""
    text = (Path(diffusers_fvg.__file__).parent / "pipelines" / "README.md").read_text(encoding="utf-8")
    section = text.split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in re.findall(r"^\|.*\|$", section, re.M)]
    return [rows[0], *rows[2:]]


def cells_of(title):
    names, *rows = table_of(title)
    return [(row[0], name) for row in rows for name, cell in zip(names[1:], row[1:], strict=True) if cell == "same"]


def test_the_tables_for_readers_are_what_is_tested():
    assert cells_of("A pipeline that you have") == CELLS
    assert cells_of("A transformer as it is") == FORM_CELLS
    assert [row[0] for row in table_of("A text-to-image pipeline")[1:]] == list(COMPOSERS)
    assert [row[0] for row in table_of("A chat model")[1:]] == list(REWRITERS)
    assert len(CELLS) + len(FORM_CELLS) + len(COMPOSERS) + len(REWRITERS) >= 40
