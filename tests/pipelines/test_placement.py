"""dtype, device and offload reach every parameter and buffer of every stage, the models inside composer and rewriter too."""

import weakref
from collections.abc import Iterator

import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import AutoencoderKLWan, DiffusionPipeline, WanTransformer3DModel
from diffusers.hooks.group_offloading import ModuleGroup
from group_offload import skip_without_group_offload
from tiny import tiny_pipeline, tiny_transformer
from transformers import AutoModelForCausalLM, UMT5EncoderModel

from diffusers_fvg import AnchorLora


LORA = {
    f"{expert}.blocks.0.attn1.to_q.lora_{half}.weight": torch.ones(shape)
    for expert in ("transformer", "transformer_2")
    for half, shape in (("A", (2, 24)), ("B", (24, 2)))
}
# Every model of the pipeline -> its folder and stock class.
MODELS = {
    "transformer": ("transformer", WanTransformer3DModel),
    "transformer_2": ("transformer_2", WanTransformer3DModel),
    "vae": ("vae", AutoencoderKLWan),
    "text_encoder": ("text_encoder", UMT5EncoderModel),
    "rewriter.model": ("rewriter/model", AutoModelForCausalLM),
    "composer.pipeline.transformer": ("composer/transformer", WanTransformer3DModel),
    "composer.pipeline.vae": ("composer/vae", AutoencoderKLWan),
    "composer.pipeline.text_encoder": ("composer/text_encoder", UMT5EncoderModel),
}
# transformers keeps T5's `wo` in float32 for float16 alone, and Llama's rotary frequencies always.
KEPT_IN_FLOAT32 = {
    WanTransformer3DModel: (*WanTransformer3DModel._keep_in_fp32_modules, "time_proj"),
    UMT5EncoderModel: UMT5EncoderModel._keep_in_fp32_modules,
    AutoModelForCausalLM: ("inv_freq",),
}
SIZE = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16, "num_inference_steps": 2}


def two_experts(**changes):
    pipe = tiny_pipeline(
        transformer_2=tiny_transformer(anchored=True, seed=1),
        boundary_ratio=0.9,
        anchor_lora=AnchorLora(LORA),
        **changes,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("placement")
    two_experts().save_pretrained(folder)
    return folder


def at(pipe, path: str) -> torch.nn.Module:
    for name in path.split("."):
        pipe = getattr(pipe, name)
    return pipe


def tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def walk(pipe: DiffusionPipeline) -> dict[str, torch.Tensor]:
    """Every tensor of every component."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": tensor for name, module in modules.items() for key, tensor in tensors(module)}


def dtypes(module: torch.nn.Module) -> dict[str, torch.dtype]:
    """Under the names of a model without adapters."""
    return {key.replace(".base_layer", ""): tensor.dtype for key, tensor in tensors(module) if ".lora_" not in key}


def test_the_walk_meets_every_model():
    pipe = two_experts()
    walked = {id(tensor) for tensor in walk(pipe).values()}
    for path in MODELS:
        assert {id(tensor) for _, tensor in tensors(at(pipe, path))} <= walked, path
    # And the table has every model: nothing is walked that belongs to none of them.
    assert walked == {id(tensor) for path in MODELS for _, tensor in tensors(at(pipe, path))}
    assert any(".lora_" in name for name in walk(pipe))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        torch.float16,
        {"default": torch.bfloat16, "vae": torch.float32, "rewriter": torch.float16, "transformer_2": torch.float64},
        {"composer": torch.bfloat16},
    ],
    ids=["bfloat16", "float16", "per component", "composer alone"],
)
def test_loading_gives_every_stage_its_dtype(saved, dtype):
    pipe = DiffusionPipeline.from_pretrained(saved, dtype=dtype)
    for path, (folder, stock) in MODELS.items():
        component, asked = path.split(".")[0], dtype
        if isinstance(dtype, dict):
            asked = dtype.get(component, dtype.get("default", torch.float32))
        # Which modules stay in float32 is for the stock class to say. Ours keeps one more, whose output is the modulation.
        expected = dtypes(stock.from_pretrained(saved / folder, dtype=asked))
        if path in ("transformer", "transformer_2") and asked != torch.float32:
            expected |= {key: torch.float32 for key in expected if ".time_proj." in key}
        assert dtypes(at(pipe, path)) == expected, path
        kept = {key for key, value in expected.items() if value != asked}
        names = KEPT_IN_FLOAT32.get(stock, ())
        assert all(any(name in key for name in names) for key in kept), (path, kept)
        assert asked in expected.values(), path


def test_adapters_have_the_dtype_of_their_model(saved):
    pipe = DiffusionPipeline.from_pretrained(saved, dtype=torch.bfloat16, rewriter=None, composer=None)
    lora = {name: tensor.dtype for name, tensor in walk(pipe).items() if ".lora_" in name}
    assert len(lora) == 4
    assert set(lora.values()) == {torch.bfloat16}, lora


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_moving_reaches_every_tensor(dtype):
    pipe = two_experts().to(dtype)
    wrong = {name: tensor.dtype for name, tensor in walk(pipe).items() if tensor.is_floating_point()}
    assert set(wrong.values()) == {dtype}, {name for name, value in wrong.items() if value != dtype}
    pipe.to("meta")
    assert {name for name, tensor in walk(pipe).items() if tensor.device.type != "meta"} == set()
    assert pipe.device == torch.device("meta")


# -- offload ----------------------------------------------------------------------------------------------------------


class Present(weakref.WeakValueDictionary):
    """Tensors by their id, as long as they live: moving a model makes new buffers. `peak` is the most bytes at once."""

    peak = 0

    def bring(self, moved: list[torch.Tensor]) -> None:
        self.update({id(tensor): tensor for tensor in moved})
        self.peak = max(self.peak, sum(tensor.nbytes for tensor in self.values()))

    def take(self, moved: list[torch.Tensor]) -> None:
        for tensor in moved:
            self.pop(id(tensor), None)


@pytest.fixture
def present(monkeypatch):
    """The tensors that the hooks of offloading have brought and not taken back.

    The hooks are real. "cpu:0" passes for an accelerator, and is where tensors are anyway, so it is noted what is moved.
    """
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.get_device", lambda: "cpu:0")
    here = Present()

    def note(cls, method, change, moved):
        call = getattr(cls, method)

        def noted(self, *args, **kwargs):
            if change == here.take:
                change(moved(self, *args))
            elif getattr(self, "prev_module_hook", None) is not None:
                # The model before goes first. accelerate does so too, but for one that "is on the CPU" already.
                self.prev_module_hook.offload()
            result = call(self, *args, **kwargs)
            if change == here.bring:
                change(moved(self, *args))
            return result

        monkeypatch.setattr(cls, method, noted)

    def of_module(hook, module, *args):
        return [tensor for _, tensor in tensors(module)]

    def of_group(group):
        return [*group.parameters, *group.buffers, *(tensor for part in group.modules for _, tensor in tensors(part))]

    note(CpuOffload, "pre_forward", here.bring, of_module)
    note(CpuOffload, "init_hook", here.take, of_module)
    note(ModuleGroup, "onload_", here.bring, of_group)
    note(ModuleGroup, "offload_", here.take, of_group)
    return here


def run(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe("a red circle", generator=generator, output_type="pt", **SIZE)


@pytest.fixture(scope="module")
def expected():
    return run(two_experts())


def watch(pipe, present) -> dict[str, set[bool]]:
    """Model -> whether its layers had their weights when they ran."""
    seen: dict[str, set[bool]] = {path: set() for path in MODELS}
    for path in MODELS:
        for layer in at(pipe, path).modules():
            if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.Embedding)):

                def forward(*args, layer=layer, path=path, inner=layer.forward, **kwargs):
                    seen[path].add(id(layer.weight) in present)
                    return inner(*args, **kwargs)

                layer.forward = forward
    return seen


@pytest.mark.parametrize("offload", ["model", "block_level", "leaf_level"])
def test_offload_reaches_every_model(present, expected, offload):
    pipe = two_experts()
    seen = watch(pipe, present)
    if offload == "model":
        pipe.enable_model_cpu_offload()
    else:
        skip_without_group_offload()
        pipe.enable_group_offload(torch.device("cpu:0"), offload_type=offload, num_blocks_per_group=1)
    for _ in range(2):
        output = run(pipe)
        assert output.first_frame_prompts == expected.first_frame_prompts
        torch.testing.assert_close(output.frames, expected.frames, rtol=0, atol=1e-5)
        assert seen == dict.fromkeys(MODELS, {True})
        assert {name for name, tensor in walk(pipe).items() if id(tensor) in present} == set()
