"""What pipelines that share parts see of each other, and what is refused by name; see `test_ways.py` for the ways."""

import copy

import numpy as np
import pytest
import tiny_composers
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils.logging import get_logger
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny import (
    tiny_composer,
    tiny_euler,
    tiny_rewriter,
    tiny_transformer,
    tiny_unipc,
    tiny_wan_components,
    tiny_wan_family,
)

from diffusers_fvg import (
    AnchorComposer,
    FactorizedVideoPipeline,
)


SIZE = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16, "output_type": "pt"}
CALL = {**SIZE, "num_inference_steps": 2, "guidance_scale": 5.0}
PROMPT = "a red circle moves to the right"
SDXL = tiny_composers.stable_diffusion_xl()


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


def test_a_pipeline_keeps_the_dtype_of_what_it_takes_over():
    stock = wan()
    stock.transformer.to(torch.bfloat16)
    pipe = FactorizedVideoPipeline.from_pipe(stock)
    assert pipe.transformer.dtype == stock.transformer.dtype == torch.bfloat16


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
        ({"transformer": "x"}, "`transformer` must be a WanTransformer3DModel, but is a str"),
        (
            {"transformer_2": torch.nn.Linear(1, 1), "boundary_ratio": 0.9},
            "`transformer_2` must be a Wan.* is a Linear",
        ),
        ({"vae": SDXL.vae}, "`vae` must be of the kind AutoencoderKLWan, but is a AutoencoderKL"),
        ({"vae": "x"}, "`vae` must be .* but is a str"),
        (
            {"rewriter": (tiny_wan_components()["text_encoder"], tiny_rewriter().tokenizer)},
            "a model that generates text.*UMT5",
        ),
        ({"rewriter": "HTTP://127.0.0.1:9/v1"}, "ChatEndpoint.*HTTP"),
        ({"composer": torch.nn.Linear(1, 1)}, "`composer` must be .* but is a Linear"),
        ({"composer": 3}, "`composer` must be .* but is a int"),
        ({"rewriter": tiny_rewriter().model}, "`rewriter` must be .* but is a LlamaForCausalLM"),
        ({"rewriter": (1, 2, 3)}, "`rewriter` must be .* but is a tuple"),
        (
            {"rewriter": (tiny_rewriter().tokenizer, tiny_rewriter().model)},
            "in this order, .* and LlamaForCausalLM",
        ),
        (
            {"composer": WanImageToVideoPipeline(**tiny_wan_components(), image_encoder=None, image_processor=None)},
            "WanImageToVideoPipeline draws from an image.*AutoPipelineForText2Image",
        ),
        (
            {"composer": StableDiffusionXLImg2ImgPipeline(**tiny_composers.stable_diffusion_xl().components)},
            "StableDiffusionXLImg2ImgPipeline draws from an image",
        ),
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


def test_a_text_to_video_pipeline_draws_one_frame_for_a_picture():
    composer = wan()
    pipe = quiet(FactorizedVideoPipeline.from_pipe(wan(), composer=composer))
    size = {"height": 32, "width": 32, "num_inference_steps": 1}
    (picture,) = pipe.compose("a red circle", generator=torch.Generator().manual_seed(0), **size)
    drawn = composer(
        "a red circle", num_frames=1, generator=torch.Generator().manual_seed(0), output_type="pil", **size
    )
    assert np.array_equal(picture, drawn.frames[0][0])


def test_a_pipeline_without_what_is_needed_is_refused():
    class Other(DiffusionPipeline):
        def __init__(self, vae, scheduler):
            super().__init__()
            self.register_modules(vae=vae, scheduler=scheduler)

    parts = tiny_wan_components()
    with pytest.raises(ValueError, match="Other has no text_encoder, tokenizer, transformer.*pass it"):
        FactorizedVideoPipeline.from_pipe(Other(parts["vae"], FlowMatchEulerDiscreteScheduler()))


def test_what_would_run_wrong_without_a_word_is_refused():
    experts = tiny_wan_family("Wan2.2-T2V-A14B")
    stock = WanPipeline(**experts, scheduler=tiny_euler())
    # The components alone do not say where the second expert takes over.
    with pytest.raises(ValueError, match="`transformer_2` is never used without `boundary_ratio`, which is 0.875"):
        FactorizedVideoPipeline(**stock.components)
    with pytest.raises(ValueError, match="`from_pipe` takes a pipeline, not 'org/name'.*`from_pretrained`"):
        FactorizedVideoPipeline.from_pipe("org/name")
    pipe = quiet(
        FactorizedVideoPipeline.from_pipe(wan(scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)))
    )
    with pytest.raises(ValueError, match="use_dynamic_shifting=True"):
        pipe(PROMPT, mode="direct", **CALL)
    # A preset has a scheduler of its own.
    assert (
        pipe(PROMPT, mode="direct", preset="anchored-15", **CALL | {"num_inference_steps": None})
        .frames.isfinite()
        .all()
    )


def test_a_scheduler_that_is_not_for_a_flow_is_told_of(caplog):
    pipe, logger = (
        quiet(FactorizedVideoPipeline.from_pipe(wan())),
        get_logger("diffusers_fvg.pipelines.pipeline_factorized_video"),
    )
    logger.addHandler(caplog.handler)
    try:
        for scheduler in (tiny_euler(), tiny_unipc(), UniPCMultistepScheduler()):
            assert "prediction_type" not in caplog.text
            pipe.scheduler = scheduler
            frames_of(pipe)
        assert (
            "a UniPCMultistepScheduler, has `prediction_type='epsilon'`, but the model predicts a flow" in caplog.text
        )
    finally:
        logger.removeHandler(caplog.handler)


def test_a_processor_of_somebody_s_own_is_not_dropped():
    transformer = WanTransformer3DModel.from_config(tiny_transformer().config)
    transformer.blocks[0].attn1.processor = AttnProcessor()
    with pytest.raises(ValueError, match="AttnProcessor.*only a WanAttnProcessor"):
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


def test_adapters_that_are_taken_over_are_each_pipeline_s_own():
    stock, plain = wan(), wan()
    before = frames_of(stock)
    stock.load_lora_weights(lora(), "style")
    styled = frames_of(stock)
    pipe = quiet(FactorizedVideoPipeline.from_pipe(stock))
    assert pipe.get_active_adapters() == ["style"] and (frames_of(pipe) - styled).abs().max() < 1e-4
    pipe.set_adapters("style", 0.0)
    assert (frames_of(pipe) - before).abs().max() < 1e-4 and torch.equal(frames_of(stock), styled)
    pipe.load_lora_weights(lora(), "more")
    pipe.delete_adapters("style")
    assert (frames_of(pipe) - styled).abs().max() < 1e-4 and torch.equal(frames_of(stock), styled)
    assert list(stock.transformer.peft_config) == ["style"] and list(pipe.transformer.peft_config) == ["more"]
    stock.set_adapters("style", 0.0)
    assert (frames_of(stock) - before).abs().max() < 1e-4 and (frames_of(pipe) - styled).abs().max() < 1e-4
    stock.unload_lora_weights()
    pipe.unload_lora_weights()
    for made in (stock, pipe):
        assert (frames_of(made) - before).abs().max() < 1e-4
    # Fused they are in the weights of both.
    plain.load_lora_weights(lora(), "style")
    plain.fuse_lora()
    with pytest.raises(ValueError, match=r"fused adapters \['style'\].*`unload_lora_weights\(\)`"):
        FactorizedVideoPipeline.from_pipe(plain)
    plain.unload_lora_weights()
    assert (frames_of(quiet(FactorizedVideoPipeline.from_pipe(plain))) - styled).abs().max() < 1e-4


def test_fused_projections_do_not_drop_adapters():
    pipe = quiet(FactorizedVideoPipeline.from_pipe(wan()))
    before = frames_of(pipe)
    pipe.transformer.fuse_qkv_projections()
    assert (frames_of(pipe) - before).abs().max() < 1e-4
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        pipe.load_lora_weights(lora(), "style")
    pipe.transformer.unfuse_qkv_projections()
    pipe.load_lora_weights(lora(), "style")
    styled = frames_of(pipe)
    with pytest.raises(ValueError, match=r"ignore the adapters \['style'\]"):
        pipe.transformer.fuse_qkv_projections()
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.transformer.fuse_qkv_projections()
    assert (frames_of(pipe) - styled).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("transformer", None),
        ("transformer_2", tiny_transformer()),
        ("vae", WanPipeline),
        ("vae", tiny_transformer()),
        ("text_encoder", SDXL.text_encoder),
        ("tokenizer", torch.nn.Linear(1, 1)),
        ("scheduler", torch.nn.Linear(1, 1)),
        ("schedulers", "x"),
        ("anchor_lora", "x"),
    ],
)
def test_what_is_no_such_component_is_refused_when_it_is_assigned(name, value):
    pipe = FactorizedVideoPipeline.from_pipe(wan())
    before = getattr(pipe, name)
    with pytest.raises(ValueError, match=f"`{name}` (must be|is None|is never used)"):
        setattr(pipe, name, value)
    with pytest.raises(ValueError, match=f"`{name}` "):
        pipe.register_modules(**{name: value})
    assert getattr(pipe, name) is before
