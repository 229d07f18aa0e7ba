"""A LoRA of a real run in the keys of other programs, each read back by a loader that is not ours."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file
from tiny import tiny_euler, tiny_pipeline, tiny_transformer, tiny_wan_components
from training_runs import save_config, save_lora, save_model, save_videos, tiny_config

from diffusers_fvg import FactorizedVideoPipeline
from diffusers_fvg.cli import main
from diffusers_fvg.embedded import EMBEDDED_FOLDER, load_embedded
from diffusers_fvg.lora.anchor_lora import WEIGHT_NAME, AnchorLora
from diffusers_fvg.lora.export import FORMATS, export_lora, merge_lora, read_lora
from diffusers_fvg.lora.loader import load_lora
from diffusers_fvg.training.trainer import main_train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Config and folder of a run of three steps, alpha twice the rank."""
    root = tmp_path_factory.mktemp("export")
    config = tiny_config(save_model(root / "model"), save_videos(root / "data"), root / "out", steps=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        main_train(save_config(config, root / "c.toml"))
    return config, root / "out"


def inputs() -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 16, 3, 4, 4, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 8, 32, generator=generator),
        "return_dict": False,
    }


@torch.no_grad()
def merged_by_hand(output: Path, kind: str) -> torch.Tensor:
    """`weight + alpha / rank * B @ A` of a checkpoint, run."""
    tensors, transformer = load_file(output / "checkpoints/transformer/step_00000003.safetensors"), tiny_transformer()
    for name, down in tensors.items():
        if name.startswith(kind) and ".lora_A." in name:
            up = tensors[name.replace(".lora_A.", ".lora_B.")]
            transformer.get_submodule(name.removeprefix(kind + ".").split(".lora_A.")[0]).weight += 2 * up @ down
    return transformer(**inputs())[0]


def wan_names(num_layers: int) -> set[str]:
    """Layers of Wan2.1's own code (`wan/modules/model.py`) that a text-to-video model has and that have two dimensions."""
    names = {
        "text_embedding.0",
        "text_embedding.2",
        "time_embedding.0",
        "time_embedding.2",
        "time_projection.1",
        "head.head",
    }
    for layer in range(num_layers):
        attention = [f"{kind}_attn.{part}" for kind in ("self", "cross") for part in "qkvo"]
        names |= {f"blocks.{layer}.{name}" for name in (*attention, "ffn.0", "ffn.2")}
    return names


def comfyui_map(num_layers: int) -> dict[str, str]:
    """What ComfyUI finds a LoRA's keys by: the name of every weight without its end, `diffusion_model.` before it
    (`model_lora_keys_unet`, `comfy/lora.py`)."""
    weights = [f"diffusion_model.{name}.weight" for name in wan_names(num_layers)]
    return {weight.removesuffix(".weight"): weight for weight in weights}


def test_the_names_are_wans_own():
    """Diffusers' own converter of Wan's checkpoints turns them into the layers that the model has."""
    own = {f"{name}.weight": torch.zeros(2, 2) for name in wan_names(2)}
    layers = {name for name, module in tiny_transformer().named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name.removesuffix(".weight") for name in convert_wan_transformer_to_diffusers(own)} == layers


@pytest.mark.parametrize("source", ["finished", "file", "average", "weights"])
def test_exports_do_in_other_programs_what_was_trained(trained, tmp_path, source):
    _, output = trained
    checkpoint = output / "checkpoints" / "transformer" / "step_00000003.safetensors"
    path = {"finished": output, "file": output / WEIGHT_NAME}.get(source, checkpoint)
    expected = merged_by_hand(output, "weights" if source == "weights" else "average")
    for format in ("diffusers", "comfyui"):
        (file,) = export_lora(path, tmp_path / f"{format}.safetensors", format, average=source != "weights")
        pipe = WanPipeline(**tiny_wan_components())
        pipe.load_lora_weights(tmp_path, weight_name=file.name)
        ours = tiny_transformer(anchored=True)
        load_lora([ours, None], file, strict=True)
        with torch.no_grad():
            for transformer in (pipe.transformer, ours):
                torch.testing.assert_close(transformer(**inputs())[0], expected, rtol=1e-5, atol=1e-5)
    # ComfyUI finds a layer for every key, and a pair for every layer that was trained.
    keys = load_file(tmp_path / "comfyui.safetensors")
    halves = [re.fullmatch(r"(.+)\.lora_([AB])\.weight", key).groups() for key in keys]
    assert {name for name, _ in halves} <= comfyui_map(2).keys() and len(halves) == 2 * 2 * 10
    assert {name for name, half in halves if half == "A"} == {name for name, half in halves if half == "B"}


def test_videos_of_the_embedded_model_are_the_same_by_every_way(tmp_path):
    """Its anchor LoRA exported and loaded back through our loader and the stock pipeline's: frames that the stock pipeline
    makes with the products of its pairs added to the weights by hand."""
    parts = load_embedded().components
    call = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 2.0}

    def stock() -> WanPipeline:
        shared = {name: parts[name] for name in ("vae", "text_encoder", "tokenizer")}
        transformer = WanTransformer3DModel.from_pretrained(EMBEDDED_FOLDER / "transformer", torch_dtype=torch.float32)
        return WanPipeline(**shared, transformer=transformer, scheduler=tiny_euler())

    def frames(pipe) -> np.ndarray:
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        make = (
            pipe.animate if isinstance(pipe, FactorizedVideoPipeline) else lambda *args, **more: pipe(*args, **more)[0]
        )
        return make("a red circle moves to the right", generator=generator, max_sequence_length=28, **call)[0]

    merged, own = stock(), load_file(EMBEDDED_FOLDER / "anchor_lora" / WEIGHT_NAME)
    plain = frames(merged)
    for key, down in own.items():
        if ".lora_A." in key:
            layer = merged.transformer.get_submodule(key.removeprefix("transformer.").split(".lora_A.")[0])
            layer.weight.data += own[key.replace(".lora_A.", ".lora_B.")].float() @ down.float()
    expected = frames(merged)
    assert np.abs(expected - plain).max() > 0.1

    for format in FORMATS:
        (file,) = export_lora(EMBEDDED_FOLDER / "anchor_lora", tmp_path / f"{format}.safetensors", format)
        theirs, ours = stock(), FactorizedVideoPipeline.from_pipe(stock())
        theirs.load_lora_weights(tmp_path, weight_name=file.name)
        # Under another name than the anchor LoRA's, which is switched off without an anchor.
        ours.load_lora_weights(file, adapter_name="exported")
        for pipe in (theirs, ours):
            np.testing.assert_allclose(frames(pipe), expected, atol=1e-5)


def test_averages_and_weights_differ(trained):
    checkpoint = trained[1] / "checkpoints" / "transformer" / "step_00000003.safetensors"
    average, weights = (read_lora(checkpoint, average=kind)[0] for kind in (True, False))
    assert any(not torch.equal(average[key], weights[key]) for key in average)


def test_two_experts_are_two_files_for_comfyui(tmp_path):
    folder = save_lora(
        tmp_path / "lora", {"transformer": tiny_transformer(), "transformer_2": tiny_transformer(seed=1)}
    )
    files = export_lora(folder, tmp_path / "a.safetensors")
    assert [file.name for file in files] == ["a_high_noise.safetensors", "a_low_noise.safetensors"]
    state = load_file(Path(folder) / WEIGHT_NAME)
    key = "blocks.1.{}.lora_B.weight"
    for file, expert in zip(files, ("transformer", "transformer_2")):
        exported = load_file(file)["diffusion_model." + key.format("ffn.0")]
        assert torch.equal(exported, state[f"{expert}." + key.format("ffn.net.0.proj")])


def test_a_merged_pipeline_is_the_base_with_the_lora(trained, tmp_path):
    config, output = trained
    merge_lora(output, config.model, tmp_path / "merged")
    transformer = WanPipeline.from_pretrained(tmp_path / "merged").transformer
    assert type(transformer).__name__ == "WanTransformer3DModel" and not getattr(transformer, "peft_config", None)
    with torch.no_grad():
        torch.testing.assert_close(transformer(**inputs())[0], merged_by_hand(output, "average"), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="is not empty: name a new folder"):
        merge_lora(output, config.model, tmp_path / "merged")


def test_what_cannot_be_exported_is_refused(trained, tmp_path):
    _, output = trained
    with pytest.raises(ValueError, match="holds no weights/pytorch_lora_weights.safetensors"):
        export_lora(tmp_path, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="must end in .safetensors"):
        export_lora(output, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="`format='kohya'` must be one of diffusers, comfyui"):
        export_lora(output, tmp_path / "a.safetensors", "kohya")
    state = load_file(output / WEIGHT_NAME)
    key = min(state)
    save_file(state | {key: state[key] * float("nan")}, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="not finite"):
        export_lora(tmp_path / "nan.safetensors", tmp_path / "a.safetensors")
    save_file(
        {"transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 4)}, tmp_path / "cog.safetensors"
    )
    with pytest.raises(ValueError, match="is not a LoRA of a Wan model"):
        export_lora(tmp_path / "cog.safetensors", tmp_path / "a.safetensors")
    save_file({"lora_unet_blocks_0.alpha": torch.zeros(1)}, tmp_path / "kohya.safetensors")
    with pytest.raises(ValueError, match="its keys are not diffusers'"):
        export_lora(tmp_path / "kohya.safetensors", tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_the_command_line_exports(trained, tmp_path, capsys):
    config, output = trained
    assert main(["lora", "export", str(output), str(tmp_path / "a.safetensors")]) == 0
    assert capsys.readouterr().out == f"LoRA: {tmp_path / 'a.safetensors'}\n"
    assert main(["lora", "merge", str(output), config.model, str(tmp_path / "m"), "--dtype", "bfloat16"]) == 0
    written = load_file(tmp_path / "m" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert written["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16
    assert main(["lora", "export", str(tmp_path), str(tmp_path / "b.safetensors")]) == 2


def test_the_form_of_anchors_goes_with_a_checkpoint_s_lora(tmp_path):
    name, folder = "weights.blocks.0.attn1.to_q.lora_{}.anchor.weight", tmp_path / "checkpoints" / "transformer"
    tensors = {name.format("A"): torch.ones(2, 24), name.format("B"): torch.ones(24, 2)}
    settings = {"alpha": 4, "rank": 2, "anchor_form": "appended"}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "step_1.safetensors", {"step": "1", "settings": json.dumps(settings)})
    (written,) = export_lora(folder / "step_1.safetensors", tmp_path / "anchor.safetensors", "diffusers")
    assert read_lora(written)[1]["anchor_form"] == "appended"
    with pytest.raises(ValueError, match="trained with `anchor_form='appended'`, which a merged model cannot record"):
        merge_lora(written, tmp_path / "base", tmp_path / "merged")


def test_a_base_with_an_anchor_lora_of_its_own_gets_this_one_in_its_place(tmp_path):
    key = "transformer.blocks.0.attn1.to_q.lora_{}.weight"
    own, other = ({key.format("A"): torch.full((1, 24), a), key.format("B"): torch.ones(24, 1)} for a in (3.0, 0.5))
    tiny_pipeline(rewriter=None, composer=None, anchor_lora=AnchorLora(own)).save_pretrained(tmp_path / "base")
    save_file(other, tmp_path / "anchor.safetensors")
    merge_lora(tmp_path / "anchor.safetensors", tmp_path / "base", tmp_path / "merged")
    pipe = FactorizedVideoPipeline.from_pretrained(tmp_path / "merged")
    weight = pipe.transformer.blocks[0].attn1.to_q.weight
    assert pipe.anchor_lora is None and torch.allclose(weight, tiny_transformer().blocks[0].attn1.to_q.weight + 0.5)
