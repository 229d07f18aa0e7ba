"""What diffusers tests of each of its models, for each video model of ours.

`CONTRACT` has the behaviours by the names of huggingface/diffusers 58eb52c, `tests/models/testing_utils/` (`common.py`,
`memory.py`, `training.py`, `compile.py`, `lora.py`, `attention.py`, `cache.py`): where each is tested here, or why it does not
apply. Those without a file are in this one, for all four models.
"""

from functools import cache
from pathlib import Path

import pytest
import torch
from test_diffusers_contract import named_tests
from tiny import TRANSFORMER_CONFIG, tiny_transformer
from tiny_cogvideox import tiny_cogvideox_transformer
from tiny_dreamer import tiny_unet

from diffusers_fvg import AnchorConditionedSkyReelsV2Transformer3D


WAN_TEST, COGVIDEOX_TEST = "animate/test_transformer_anchor.py", "animate/test_transformer_anchor_cogvideox.py"
LORA_TEST = "lora/test_loader.py"
CONTRACT = {
    # ModelTesterMixin
    "test_from_save_pretrained": "test_saved_and_loaded_it_gives_the_same",
    "test_from_save_pretrained_variant": "test_saved_and_loaded_it_gives_the_same",
    "test_from_save_pretrained_dtype": "test_it_is_loaded_in_the_dtype_that_is_asked_for",
    "test_from_pretrained_dtype_alias": "test_it_is_loaded_in_the_dtype_that_is_asked_for",
    "test_from_save_pretrained_dtype_inference": "test_it_is_loaded_in_the_dtype_that_is_asked_for",
    "test_determinism": "test_the_same_inputs_give_the_same_output_as_tuple_or_not",
    "test_output": "test_the_same_inputs_give_the_same_output_as_tuple_or_not",
    "test_outputs_equivalence": "test_the_same_inputs_give_the_same_output_as_tuple_or_not",
    "test_getattr_is_correct": "test_attributes_are_the_models_own",
    "test_keep_in_fp32_modules": f"{WAN_TEST}::test_bfloat16_loading_keeps_the_modulation_in_float32",
    "test_keep_in_fp32_modules_as_str": "Diffusers' own reading of `_keep_in_fp32_modules`; ours are lists",
    "test_keep_in_fp32_modules_layerwise_casting": "test_layers_may_be_stored_in_one_byte",
    "test_to_keep_in_fp32_modules_warns": "`to` is the stock class's",
    "test_sharded_checkpoints": "test_saved_and_loaded_it_gives_the_same",
    "test_sharded_checkpoints_with_variant": "test_saved_and_loaded_it_gives_the_same",
    "test_sharded_checkpoints_with_parallel_loading": "Reading shards side by side is the stock loader's",
    "test_model_parallelism": "Needs several accelerators; context parallelism: animate/test_transformer_anchor.py",
    # Memory
    "test_cpu_offload": f"{WAN_TEST}::test_sequential_offload",
    "test_disk_offload_without_safetensors": "Pickled weights are refused on purpose: loading/test_safety.py",
    "test_disk_offload_with_safetensors": f"{WAN_TEST}::test_sequential_offload",
    "test_group_offloading": f"{WAN_TEST}::test_group_offload",
    "test_group_offloading_with_layerwise_casting": "test_layers_may_be_stored_in_one_byte",
    "test_group_offloading_with_disk": "Files on the disk are the stock hook's; ours adds none: test_group_offload",
    "test_layerwise_casting_memory": "Needs an accelerator, whose memory is counted",
    "test_layerwise_casting_training": "training/test_low_memory.py::test_losses_are_near_those_of_the_full_base_and_a_stopped_run_is_bit_equal",
    # Training
    "test_training": "test_every_parameter_that_the_output_depends_on_is_trained",
    "test_training_with_ema": "training/test_trainer.py::test_the_average_follows_quickly_at_first",
    "test_gradient_checkpointing": f"{WAN_TEST}::test_gradients_with_checkpointing",
    "test_gradient_checkpointing_is_applied": "test_every_parameter_that_the_output_depends_on_is_trained",
    "test_gradient_checkpointing_equivalence": f"{COGVIDEOX_TEST}::test_gradients_with_checkpointing",
    "test_mixed_precision_training": f"{WAN_TEST}::test_autocast_keeps_the_modulation_in_float32",
    # Compilation
    "test_torch_compile_recompilation_and_graph_break": "pipelines/test_compile.py::test_one_graph_for_all_blocks_steps_prompts_and_anchors",
    "test_torch_compile_repeated_blocks": f"{WAN_TEST}::test_compile_repeated_blocks",
    "test_compile_on_different_shapes": "pipelines/test_compile.py::test_a_pipeline_makes_its_graphs_in_the_first_call_of_each_mode",
    "test_compile_with_group_offloading": "Diffusers' own test needs an accelerator; not run here",
    "test_compile_works_with_aot": "Ahead-of-time packages are of one machine; nothing here makes them",
    # LoRA
    "test_save_load_lora_adapter": f"{WAN_TEST}::test_lora_adapter",
    "test_lora_wrong_adapter_name_raises_error": "Names are checked by the stock `set_adapters`, which is not overridden",
    "test_lora_adapter_metadata_is_loaded_correctly": f"{LORA_TEST}::test_alpha_from_the_header_that_diffusers_writes",
    "test_lora_adapter_wrong_metadata_raises_error": "bad_inputs/test_bad_inputs.py::test_a_bad_input_is_refused_early_and_clearly",
    "test_lora_fuse_nan": "pipelines/test_running.py::test_a_lora_with_nan_is_refused",
    "test_lora_B_bias": f"{LORA_TEST}::test_bias_deltas_are_not_scaled_by_alpha_and_low_rank_biases_are",
    "test_correct_lora_configs_with_different_ranks": f"{LORA_TEST}::test_different_ranks_in_one_file",
    "test_lora_missing_keys_warning": f"{LORA_TEST}::test_half_dropped_file_is_reported",
    "test_lora_unexpected_keys_warning": f"{LORA_TEST}::test_half_dropped_file_is_reported",
    "test_logs_info_when_no_lora_keys_found": f"{LORA_TEST}::test_no_match_is_an_error",
    "test_hotswapping_model": f"{LORA_TEST}::test_hotswap_takes_the_new_alpha_deltas_and_strength",
    "test_hotswapping_compiled_model_linear": f"{LORA_TEST}::test_load_into_compiled_blocks_which_steps_and_hotswaps_do_not_compile_again",
    "test_hotswapping_compiled_model_conv2d": "The video transformers have no convolution that a LoRA changes",
    # Attention
    "test_fuse_unfuse_qkv_projections": f"{WAN_TEST}::test_qkv_fusion",
    "test_get_set_processor": "Processors are set by the stock mixin, which is not overridden",
    "test_set_attention_backend_matches_context_manager": f"{WAN_TEST}::test_attention_backend",
    "test_output_close_to_native": f"{WAN_TEST}::test_attention_backend",
    "test_context_manager_switches_and_restores_backend": f"{WAN_TEST}::test_automatic_attention_backend_is_this_models_alone",
    # Caches
    "test_pab_cache_inference": f"{WAN_TEST}::test_step_caches",
    "test_fbc_cache_inference": f"{WAN_TEST}::test_step_caches",
    "test_faster_cache_inference": f"{WAN_TEST}::test_step_caches",
    "test_mag_cache_inference": f"{WAN_TEST}::test_step_caches",
    "test_taylorseer_cache_inference": f"{WAN_TEST}::test_step_caches",
    # Elsewhere
    "test_context_parallel_inference": f"{WAN_TEST}::test_context_parallel",
    "test_tensor_parallel_inference": "Diffusers has no plan of tensor parallelism for these models",
    "test_single_file_model_config": "Single files are read by the stock class, from which ours is made: pipelines/test_ways.py",
    "test_gguf_quantization_inference": "pipelines/test_ways.py::test_a_form_of_a_transformer_gives_what_the_stock_pipeline_gives_with_it",
    "test_bnb_quantization_inference": "On an accelerator alone does bitsandbytes make 4 bits: not run here",
}


def test_every_behaviour_has_a_test_or_a_reason():
    assert named_tests(CONTRACT, Path(__file__)) == []


def _skyreels():
    torch.manual_seed(0)
    return AnchorConditionedSkyReelsV2Transformer3D(**TRANSFORMER_CONFIG, inject_sample_info=False).eval()


MODELS = {
    "wan": lambda: tiny_transformer(anchored=True),
    "skyreels": _skyreels,
    "cogvideox": lambda: tiny_cogvideox_transformer(anchored=True),
    "dreamer": lambda: tiny_unet(trained=True),
}
each_model = pytest.mark.parametrize("name", MODELS)
shared = cache(lambda name: MODELS[name]())


@cache
def inputs_of(name):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    texts = {"encoder_hidden_states": draw(1, 5, 32)}
    if name == "cogvideox":
        rotary = shared(name).rotary_embedding(2, 4, 4)
        latents = {"hidden_states": draw(1, 2, 4, 4, 4), "image_rotary_emb": rotary}
        return texts | latents | {"timestep": torch.tensor([500])}
    if name == "dreamer":
        config = shared(name).config
        latents = {"sample": draw(1, 4, 3, 8, 8), "image_latents": draw(1, 4, 8, 8)}
        conditions = {
            "image_embeds": draw(1, config.image_embed_dim),
            "motion_embeds": draw(1, 5, config.motion_embed_dim),
        }
        if config.fps_conditioning:
            conditions["fps"] = torch.tensor([8.0])
        return texts | latents | conditions | {"timestep": torch.tensor([500])}
    return texts | {"hidden_states": draw(1, 16, 2, 4, 4), "timestep": torch.tensor([500.0])}


@torch.no_grad()
def output(model, name, **changes):
    return model(**inputs_of(name) | changes)[0]


@each_model
def test_the_same_inputs_give_the_same_output_as_tuple_or_not(name):
    model, first = shared(name), output(shared(name), name)
    latents = inputs_of(name)["sample" if name == "dreamer" else "hidden_states"]
    assert first.shape == latents.shape and first.isfinite().all()
    assert torch.equal(output(model, name), first)
    assert torch.equal(output(model, name, return_dict=False), first)
    with torch.no_grad():
        assert torch.equal(model(**inputs_of(name)).sample, first)
    assert not torch.equal(output(model, name, timestep=inputs_of(name)["timestep"] + 100), first)


@each_model
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shard_size", ["10GB", "60KB"])
def test_saved_and_loaded_it_gives_the_same(name, variant, shard_size, tmp_path):
    model = shared(name)
    model.save_pretrained(tmp_path, variant=variant, max_shard_size=shard_size)
    names = [path.name for path in tmp_path.glob("*.safetensors")]
    assert all(("fp16" in name) == (variant is not None) for name in names) and (len(names) > 1) == (
        shard_size == "60KB"
    )
    loaded = type(model).from_pretrained(tmp_path, variant=variant).eval()
    torch.testing.assert_close(output(loaded, name), output(model, name), rtol=0, atol=1e-5)


@each_model
def test_it_is_loaded_in_the_dtype_that_is_asked_for(name, tmp_path):
    model = shared(name)
    model.save_pretrained(tmp_path)
    kept = tuple(model._keep_in_fp32_modules or ())
    for dtype in (torch.float16, torch.bfloat16):
        for asked in ({"dtype": dtype}, {"torch_dtype": dtype}):
            loaded = type(model).from_pretrained(tmp_path, **asked)
            for key, parameter in loaded.named_parameters():
                wanted = torch.float32 if any(part in key.split(".") for part in kept) else dtype
                assert parameter.dtype == wanted, key


@each_model
def test_attributes_are_the_models_own(name):
    model = shared(name)
    assert model.dtype == torch.float32 and model.device.type == "cpu"
    with pytest.raises(AttributeError, match="no_such_attribute"):
        getattr(model, "no_such_" + "attribute")
    assert model.config.in_channels and not hasattr(model, "no_such_attribute")


@each_model
def test_layers_may_be_stored_in_one_byte(name):
    model = MODELS[name]()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert torch.float8_e4m3fn in {parameter.dtype for parameter in model.parameters()}
    stored, whole = output(model, name), output(shared(name), name)
    assert stored.isfinite().all() and (stored - whole).abs().mean() < 0.2 * whole.abs().mean()


@each_model
def test_every_parameter_that_the_output_depends_on_is_trained(name):
    found = []
    for checkpointing in (False, True):
        model = MODELS[name]().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        assert model.is_gradient_checkpointing == checkpointing
        model(**inputs_of(name))[0].square().mean().backward()
        found.append({key: parameter.grad for key, parameter in model.named_parameters()})
    without, with_checkpointing = found
    assert not [key for key, gradient in without.items() if gradient is None]
    for key, gradient in without.items():
        torch.testing.assert_close(with_checkpointing[key], gradient, rtol=1e-3, atol=1e-6, msg=key)
