"""Real components of a Wan pipeline at tiny size, the same weights on every call."""

from collections.abc import Callable
from functools import partial

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from diffusers_fvg import AnchorComposer, FactorizedVideoPipeline, FirstFrameRewriter
from diffusers_fvg.animate.transformer_anchor import AnchorConditionedTransformer3D
from diffusers_fvg.schedules.presets import WAN_PRESETS


WORDS = """a an and the is are of in on to from with at it its one two three four five red green blue yellow purple orange
white black grey circle square triangle star leaf cat dog ball moves turns becomes grows shrinks slowly fast right left
top bottom up down centre above below behind appears stays still picture video shows high low quality . ,""".split()

TRANSFORMER_CONFIG = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that ends a text with `</s>`, as T5's does; a word outside `WORDS` is `<unk>`."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **special)


def tiny_text_encoder() -> UMT5EncoderModel:
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=len(WORDS) + 3, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    return UMT5EncoderModel(config).eval()


def tiny_vae() -> AutoencoderKLWan:
    """8 times smaller in space, 4 times in time, 16 channels: the shape of Wan 2.1's."""
    torch.manual_seed(0)
    downsample = [False, True, True]
    return AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=downsample
    ).eval()


def tiny_transformer(anchored: bool = False, seed: int = 0, **config) -> WanTransformer3DModel:
    """Builds the stock class or, with `anchored`, ours, both with the same weights."""
    torch.manual_seed(seed)
    cls = AnchorConditionedTransformer3D if anchored else WanTransformer3DModel
    return cls(**(TRANSFORMER_CONFIG | config)).eval()


def tiny_unipc() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)


def tiny_euler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=5.0)


def built(parts: dict[str, Callable], changes: dict) -> dict:
    """`changes`, and what each of the other `parts` returns: a part that is replaced is not built."""
    return {name: make() for name, make in parts.items() if name not in changes} | changes


def _wan_components(anchored: bool = False, **config) -> dict[str, Callable]:
    return {
        "tokenizer": tiny_tokenizer,
        "text_encoder": tiny_text_encoder,
        "transformer": partial(tiny_transformer, anchored, **config),
        "vae": tiny_vae,
        "scheduler": tiny_unipc,
    }


def tiny_wan_components(anchored: bool = False, **config) -> dict:
    """Returns the components of a `WanPipeline`; `config` changes the transformer, `anchored` its class."""
    return built(_wan_components(anchored, **config), {})


def tiny_rewriter() -> FirstFrameRewriter:
    """A Llama with random weights. Its answers are never valid, so the prompts' starts become the captions.

    Any word ends an answer, which would go on to the limit otherwise: hundreds of tokens for a plan.
    """
    torch.manual_seed(0)
    vocabulary = {
        word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", "<|user|>", "<|assistant|>", *WORDS])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **special)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=[1, *range(5, len(vocabulary))],
        bos_token_id=None,
    )
    return FirstFrameRewriter(
        LlamaForCausalLM(config).eval(), tokenizer, instruction="", examples=False, max_new_tokens=8
    )


def tiny_composer() -> AnchorComposer:
    """`WanPipeline` run for one frame."""
    pipeline = WanPipeline(**tiny_wan_components(seed=2))
    return AnchorComposer(pipeline, {"num_frames": 1, "num_inference_steps": 2, "max_sequence_length": 16})


def tiny_pipeline(**changes) -> FactorizedVideoPipeline:
    """All three stages at tiny size; `changes` replace components and settings."""
    parts = _wan_components(anchored=True) | {
        "scheduler": WAN_PRESETS["anchored-15"].make_scheduler,
        "rewriter": tiny_rewriter,
        "composer": tiny_composer,
    }
    settings = {"transformer_2": None, "anchor_lora": None, "schedulers": WAN_PRESETS}
    return FactorizedVideoPipeline(**built(parts, settings | changes))


# -- the topology of each real model, at tiny size --------------------------------------------------------------------


def tiny_wan22_vae() -> AutoencoderKLWan:
    """16 times smaller in space, 4 times in time, 48 channels, 2 x 2 pixels a patch: the shape of Wan2.2-TI2V-5B's."""
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=48,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1 * (channel % 7 - 3) for channel in range(48)],
        latents_std=[0.5 + 0.02 * channel for channel in range(48)],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    ).eval()


# Model of `models.MODELS` -> what its tiny pipeline has: channels, VAE, experts, and the settings in its model_index.json.
WAN_FAMILIES = {
    "Wan2.2-TI2V-5B": ({"in_channels": 48, "out_channels": 48}, tiny_wan22_vae, {"expand_timesteps": True}),
    "Wan2.1-T2V-1.3B": ({}, tiny_vae, {}),
    "Wan2.1-T2V-14B": ({"num_attention_heads": 3}, tiny_vae, {}),
    "Wan2.2-T2V-A14B": ({"num_attention_heads": 3}, tiny_vae, {"boundary_ratio": 0.875}),
}


def tiny_wan_family(name: str, anchored: bool = False, **changes) -> dict:
    """What a Wan pipeline of the model's topology takes, without scheduler: `transformer_2` where it has two experts.

    `changes` are of the transformer's configuration.
    """
    config, vae, settings = WAN_FAMILIES[name]
    config = config | changes
    parts = built(_wan_components(anchored, **config) | {"vae": vae}, settings)
    del parts["scheduler"]
    if "boundary_ratio" in settings:
        parts["transformer_2"] = tiny_transformer(anchored, seed=5, **config)
    with torch.no_grad():
        for expert in (part for key, part in parts.items() if key.startswith("transformer")):
            # With fresh weights frames hardly depend on each other; with these they do.
            for parameter in expert.parameters():
                parameter.mul_(2)
    return parts
