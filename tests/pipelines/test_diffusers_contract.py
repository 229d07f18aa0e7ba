"""What diffusers tests of each of its pipelines, for each of ours.

`CONTRACT` has the behaviours by the names of huggingface/diffusers 58eb52c, `tests/pipelines/testing_utils/` (`common.py`,
`memory.py`, `cache.py`, `lora.py`) and `tests/pipelines/test_pipelines_common.py`: where each is tested here, or why it does
not apply. Those without a file are in this one, for all four pipelines.
"""

import ast
import inspect
from functools import cache
from pathlib import Path

import pytest
import torch
from contract_pipelines import PIPELINES, call_of, expected, fresh, shared
from diffusers import DiffusionPipeline

from diffusers_fvg import FactorizedImageToVideoPipeline


TESTS = Path(__file__).parent.parent
# A reason begins with a capital; anything else is `file::test`, or `test` of this file.
CONTRACT = {
    # PipelineTesterMixin
    "test_save_load_local": "test_saved_and_loaded_it_gives_the_same",
    "test_output": "test_dict_and_tuple_are_the_same",
    "test_pipeline_call_signature": "test_arguments_of_the_call_have_the_names_of_diffusers",
    "test_inference_batch_consistent": "test_several_prompts_and_videos_of_each",
    "test_inference_batch_single_identical": "pipelines/test_determinism.py::test_a_video_is_the_same_at_any_place_of_a_batch_of_any_size",
    "test_dict_tuple_outputs_equivalent": "test_dict_and_tuple_are_the_same",
    "test_components_function": "test_a_pipeline_is_made_again_of_its_components",
    "test_float16_inference": "test_half_precision_is_finite_and_near",
    "test_half_precision_inference_no_nan": "test_half_precision_is_finite_and_near",
    "test_save_load_float16": "test_saved_and_loaded_it_gives_the_same",
    "test_save_load_optional_components": "test_components_that_are_left_out_stay_out",
    "test_to_device": "pipelines/test_placement.py::test_moving_reaches_every_tensor",
    "test_to_dtype": "test_half_precision_is_finite_and_near",
    "test_num_images_per_prompt": "test_several_prompts_and_videos_of_each",
    "test_cfg": "test_guidance_of_1_computes_no_negative_prompt",
    "test_callback_inputs": "test_a_callback_gets_what_it_asks_for_and_changes_it",
    "test_callback_cfg": "test_a_callback_gets_what_it_asks_for_and_changes_it",
    "test_serialization_with_variants": "test_variants_are_saved_and_loaded",
    "test_loading_with_variants": "test_variants_are_saved_and_loaded",
    "test_loading_with_incorrect_variants_raises_error": (
        "A part without the variant comes as it is, with a warning, as the parts of a light repository differ in what they "
        "have; a pipeline without any weights of it is refused: loading/test_safety.py"
    ),
    "test_encode_prompt_works_in_isolation": (
        "`transformer` is required, so no pipeline is made of the text encoder alone; embeddings stand in for texts: "
        "test_given_embeddings_make_as_many_videos_as_the_text, test_embeddings_instead_of_texts, "
        "test_embeddings_stand_in_for_texts"
    ),
    "test_torch_dtype_dict": "pipelines/test_placement.py::test_loading_gives_every_stage_its_dtype",
    "test_dtype_dict": "pipelines/test_placement.py::test_loading_gives_every_stage_its_dtype",
    "test_dtype_alias": "pipelines/test_placement.py::test_loading_gives_every_stage_its_dtype",
    "test_StableDiffusionMixin_component": "None of the pipelines has StableDiffusionMixin: the VAE's own methods are called",
    "test_attention_slicing_forward_pass": "No video transformer of diffusers slices its attention",
    "test_xformers_attention_forwardGenerator_pass": "Attention backends took its place: animate/test_attention.py",
    "test_karras_schedulers_shape": "Flow models take no Karras schedulers; other schedulers: test_other_schedulers_run_as_they_are",
    # PipelineLatentTesterMixin
    "test_pt_np_pil_outputs_equivalent": "test_output_types_are_the_same_frames",
    "test_pt_np_pil_inputs_equivalent": "test_pictures_of_every_type_are_the_same",
    "test_latents_input": "test_given_latents_are_the_start",
    "test_multi_vae": "A video pipeline has one VAE",
    # Memory
    "test_sequential_cpu_offload_forward_pass": "pipelines/test_placement.py::test_offload_reaches_every_model",
    "test_sequential_offload_forward_pass_twice": "pipelines/test_placement.py::test_offload_reaches_every_model",
    "test_model_cpu_offload_forward_pass": "pipelines/test_pipeline_factorized_video.py::test_model_offload_changes_nothing",
    "test_cpu_offload_forward_pass_twice": "pipelines/test_pipeline_factorized_video.py::test_model_offload_changes_nothing",
    "test_pipeline_with_accelerator_device_map": "Needs several accelerators; placement is that of memory profiles: pipelines/test_profiles.py",
    "test_layerwise_casting_inference": "pipelines/test_placement.py::test_offload_reaches_every_model",
    "test_group_offloading_inference": "animate/test_transformer_anchor.py::test_group_offload",
    "test_pipeline_level_group_offloading_sanity_checks": "pipelines/test_placement.py::test_offload_reaches_every_model",
    "test_pipeline_level_group_offloading_inference": "pipelines/test_placement.py::test_offload_reaches_every_model",
    # Caches
    "test_pyramid_attention_broadcast_layers": "animate/test_transformer_anchor.py::test_step_caches",
    "test_pyramid_attention_broadcast_inference": "animate/test_transformer_anchor.py::test_step_caches",
    "test_faster_cache_inference": "animate/test_transformer_anchor.py::test_step_caches",
    "test_faster_cache_state": "animate/test_transformer_anchor.py::test_step_caches",
    "test_faster_cache_basic_warning_or_errors_raised": "Arguments of FasterCache are checked by diffusers alone",
    "test_first_block_cache_inference": "animate/test_transformer_anchor.py::test_step_caches",
    "test_taylorseer_cache_inference": "animate/test_transformer_anchor.py::test_step_caches",
    "test_mag_cache_inference": "animate/test_transformer_anchor.py::test_step_caches",
    # From another pipeline
    "test_from_pipe_consistent_config": "pipelines/test_ways.py::test_a_way_gives_what_the_stock_pipeline_gives",
    "test_from_pipe_consistent_forward_pass": "pipelines/test_ways.py::test_a_way_gives_what_the_stock_pipeline_gives",
    "test_from_pipe_consistent_forward_pass_cpu_offload": "pipelines/test_ways.py::test_a_way_gives_what_the_stock_pipeline_gives",
    # SDFunctionTesterMixin, IPAdapterTesterMixin
    "test_vae_slicing": "Videos are decoded one latent frame after the other: animate/test_decoding.py",
    "test_vae_tiling": "pipelines/test_pipeline_factorized_video.py::test_tiles_are_used_when_the_decode_would_not_fit_and_only_then",
    "test_freeu": "FreeU is of the UNets of Stable Diffusion; video UNets of diffusers do not have it",
    "test_fused_qkv_projections": "animate/test_transformer_anchor.py::test_qkv_fusion",
    "test_pipeline_signature": "No pipeline takes an IP adapter: the anchor is the picture that it follows",
    "test_ip_adapter": "No pipeline takes an IP adapter",
    "test_ip_adapter_cfg": "No pipeline takes an IP adapter",
    "test_ip_adapter_masks": "No pipeline takes an IP adapter",
    "test_ip_adapter_faceid": "No pipeline takes an IP adapter",
    # LoraTesterMixin
    "test_lora_fuse_unfuse": "lora/test_cogvideox_lora.py::test_the_pipeline_loads_weighs_fuses_and_unloads",
    "test_get_adapters": "lora/test_cogvideox_lora.py::test_the_pipeline_loads_weighs_fuses_and_unloads",
    "test_get_list_adapters": "lora/test_cogvideox_lora.py::test_the_pipeline_loads_weighs_fuses_and_unloads",
    "test_simple_inference_with_text_denoiser_lora_save_load": "lora/test_cogvideox_lora.py::test_every_format_equals_merged_weights",
    "test_simple_inference_with_text_denoiser_multi_adapter": "lora/test_loader.py::test_a_second_adapter_leaves_the_first_active_at_its_strength",
    "test_lora_adapter_metadata_is_loaded_correctly": "lora/test_loader.py::test_alpha_from_the_header_that_diffusers_writes",
    "test_wrong_adapter_name_raises_error": "Names are checked by the stock `set_adapters`, which is not overridden",
    "test_lora_loading_model_cpu_offload": "lora/test_loader.py::test_load_before_and_after_offload",
    "test_simple_inference_with_text_lora": "No published LoRA of these models trains T5 or UMT5, and none is loaded into it; of the UNet with CLIP: test_a_lora_of_stable_diffusion_loads",
}


@cache
def functions_in(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def named_tests(contract: dict[str, str], here: Path) -> list[str]:
    """What a table names that is no test."""
    missing = []
    for behaviour, place in contract.items():
        if place[0].isupper() or place.startswith("`"):
            continue
        file, _, test = place.rpartition("::")
        path = TESTS / file if file else here
        if not path.is_file() or test not in functions_in(path):
            missing.append(f"{behaviour}: {place}")
    return missing


def test_every_behaviour_has_a_test_or_a_reason():
    assert named_tests(CONTRACT, Path(__file__)) == []
    assert named_tests({"a": "test_no_such", "b": "no/file.py::test_a"}, Path(__file__)) != []


each_pipeline = pytest.mark.parametrize("name", PIPELINES)


@each_pipeline
def test_arguments_of_the_call_have_the_names_of_diffusers(name):
    parameters = inspect.signature(type(shared(name)).__call__).parameters
    needed = {"prompt", "negative_prompt", "height", "width", "guidance_scale", "num_inference_steps", "generator"}
    needed |= {"num_videos_per_prompt", "output_type", "return_dict", "callback_on_step_end"}
    needed |= {"callback_on_step_end_tensor_inputs", "attention_kwargs", "max_sequence_length"}
    if name != "image_to_video":
        # Families of image-to-video pipelines have latents and embeddings of forms of their own: `animator_kwargs`.
        needed |= {"latents", "prompt_embeds", "negative_prompt_embeds"}
    assert needed <= parameters.keys()
    optional = {key for key, value in parameters.items() if value.default is not inspect.Parameter.empty}
    assert needed <= optional


@each_pipeline
def test_dict_and_tuple_are_the_same(name):
    made = shared(name)(**call_of(name, return_dict=False))
    assert isinstance(made, tuple) and torch.equal(made[0], expected(name))
    assert expected(name).isfinite().all() and 0 <= expected(name).min() <= expected(name).max() <= 1
    assert expected(name).shape == (1, call_of(name)["num_frames"], 3, 32, 32)


@each_pipeline
def test_output_types_are_the_same_frames(name):
    pipe, pixels = shared(name), expected(name).permute(0, 1, 3, 4, 2).float().numpy()
    assert abs(pipe(**call_of(name, output_type="np")).frames - pixels).max() < 1e-6
    for kind in ("uint8", "pil"):
        frames = pipe(**call_of(name, output_type=kind)).frames
        frames = torch.tensor(frames[0] if kind == "uint8" else [list(frame.getdata()) for frame in frames[0]])
        levels = torch.tensor((pixels[0] * 255).round()).reshape(frames.shape)
        assert (frames.float() - levels).abs().max() <= 1


@each_pipeline
def test_pictures_of_every_type_are_the_same(name):
    picture = call_of(name)["image"]
    array = torch.tensor(list(picture.getdata()), dtype=torch.uint8).reshape(32, 32, 3)
    for image in (array.numpy(), array.permute(2, 0, 1), array.permute(2, 0, 1) / 255, array.numpy() / 255):
        made = shared(name)(**call_of(name, image=image)).frames
        torch.testing.assert_close(made, expected(name), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "image_to_video"])
def test_given_latents_are_the_start(name):
    pipe, call = shared(name), call_of(name)
    shape = pipe._latents_shape(1, call["num_frames"], 32, 32)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pipe(**call_of(name, latents=noise, generator=5)).frames, expected(name))


@each_pipeline
def test_several_prompts_and_videos_of_each(name):
    pipe = shared(name)
    for prompts, videos in ((1, 2), (2, 1), (2, 2)):
        call = call_of(name, prompt=["a red circle"] * prompts, num_videos_per_prompt=videos)
        assert len(pipe(**call).frames) == prompts * videos


@each_pipeline
def test_a_pipeline_is_made_again_of_its_components(name):
    pipe = shared(name)
    again = type(pipe)(**pipe.components)
    assert again.components.keys() == pipe.components.keys()
    assert all(again.components[key] is value for key, value in pipe.components.items())
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(**call_of(name)).frames, expected(name))


@each_pipeline
def test_half_precision_is_finite_and_near(name):
    pipe = fresh(name).to(torch.bfloat16)
    modules = [value for value in pipe.components.values() if isinstance(value, torch.nn.Module)]
    assert all(module.dtype == torch.bfloat16 for module in modules)
    frames = pipe(**call_of(name)).frames.float()
    assert frames.isfinite().all() and (frames - expected(name)).abs().mean() < 0.1


@each_pipeline
def test_saved_and_loaded_it_gives_the_same(name, tmp_path):
    shared(name).save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is type(shared(name))
    loaded.set_progress_bar_config(disable=True)
    # Weights that were read lie elsewhere in memory, and are summed in another order.
    torch.testing.assert_close(loaded(**call_of(name)).frames, expected(name), rtol=0, atol=1e-5)
    # Pickles are refused, in saving as in loading.
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".ckpt")]


@each_pipeline
def test_components_that_are_left_out_stay_out(name, tmp_path):
    pipe = type(shared(name))(**shared(name).components | {"rewriter": None, "composer": None})
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert loaded.rewriter is None and loaded.composer is None
    loaded.set_progress_bar_config(disable=True)
    # Weights that were read lie elsewhere in memory, and are summed in another order.
    torch.testing.assert_close(loaded(**call_of(name)).frames, expected(name), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["wan", "dreamer"])
def test_variants_are_saved_and_loaded(name, tmp_path):
    shared(name).save_pretrained(tmp_path, variant="fp16")
    folder = "unet" if name == "dreamer" else "transformer"
    assert [path.name for path in (tmp_path / folder).glob("*.safetensors")] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]
    loaded = DiffusionPipeline.from_pretrained(tmp_path, variant="fp16")
    loaded.set_progress_bar_config(disable=True)
    # Weights that were read lie elsewhere in memory, and are summed in another order.
    torch.testing.assert_close(loaded(**call_of(name)).frames, expected(name), rtol=0, atol=1e-5)


@each_pipeline
def test_guidance_of_1_computes_no_negative_prompt(name):
    pipe = shared(name)
    video = (
        pipe.animator.pipeline.transformer if isinstance(pipe, FactorizedImageToVideoPipeline) else pipe.transformer
    )
    counts = []
    for scale in (1.0, 4.0):
        seen = []
        hook = video.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output[0].shape[0]))
        try:
            pipe(**call_of(name, guidance_scale=scale))
        finally:
            hook.remove()
        counts.append(sum(seen))
    # Two steps; guided ones compute two predictions, in one forward or in two.
    assert counts == [2, 4]


@each_pipeline
def test_a_callback_gets_what_it_asks_for_and_changes_it(name):
    pipe, seen = shared(name), []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, set(tensors), pipe.num_timesteps))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == pipe.num_timesteps - 1 else {}

    asked = list(pipe._callback_tensor_inputs)
    made = pipe(**call_of(name, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=asked)).frames
    assert [step for step, *_ in seen] == [0, 1] and all(count == 2 for *_, count in seen)
    assert all(names == set(asked) for _, names, _ in seen)
    assert not torch.equal(made, expected(name))
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        pipe(**call_of(name, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["none"]))
