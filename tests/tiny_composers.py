"""Real text-to-image pipelines of diffusers at tiny size, one for each kind of guidance. Random weights, the same each time."""

from collections.abc import Callable

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny import WORDS, tiny_tokenizer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from diffusers_fvg.compose.composer import AnchorComposer


WIDTH, VOCABULARY = 16, len(WORDS) + 3


def _tokenizer(length: int = 32) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = length
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return tokenizer


def _clip(kind: type = CLIPTextModelWithProjection) -> torch.nn.Module:
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    # The text's state is read at the first token of this number, that of `</s>`.
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 32}
    return kind(CLIPTextConfig(**sizes, **tokens, projection_dim=WIDTH))


def _t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2)
    )


def _qwen3(kind: type) -> torch.nn.Module:
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    return kind(Qwen3Config(**sizes, **heads, vocab_size=VOCABULARY, max_position_embeddings=512))


def _vae(channels: int, kind: type = AutoencoderKL, **config) -> torch.nn.Module:
    """Pixels are twice as many as latents each way."""
    return kind(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=1,
        **config,
    )


def _flux(guidance_embeds: bool) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )
    encoders = {"text_encoder": _clip(CLIPTextModel), "text_encoder_2": _t5()}
    tokenizers = {"tokenizer": _tokenizer(), "tokenizer_2": _tokenizer()}
    vae = _vae(4, shift_factor=0.1)
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae, transformer=transformer, **encoders, **tokenizers)


def flux() -> FluxPipeline:
    """FLUX.1-dev: distilled to take its guidance as an input."""
    return _flux(guidance_embeds=True)


def flux_schnell() -> FluxPipeline:
    return _flux(guidance_embeds=False)


def _flux2_klein(is_distilled: bool) -> Flux2KleinPipeline:
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        # Three layers of the text encoder side by side.
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = _vae(4, AutoencoderKLFlux2)
    return Flux2KleinPipeline(
        FlowMatchEulerDiscreteScheduler(), vae, _qwen3(Qwen3ForCausalLM), _tokenizer(), transformer, is_distilled
    )


def flux2_klein() -> Flux2KleinPipeline:
    return _flux2_klein(is_distilled=True)


def flux2_klein_base() -> Flux2KleinPipeline:
    return _flux2_klein(is_distilled=False)


def stable_diffusion_3() -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=WIDTH,
        # Two texts side by side.
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
        out_channels=4,
    )
    parts = {"text_encoder_3": None, "tokenizer_3": None}
    parts |= {
        "text_encoder": _clip(),
        "text_encoder_2": _clip(),
        "tokenizer": _tokenizer(),
        "tokenizer_2": _tokenizer(),
    }
    vae = _vae(4, shift_factor=0.1)
    return StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(), vae, **parts)


def _stable_diffusion_xl(time_cond_proj_dim: int | None) -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        # Six numbers of sizes, and a text.
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        cross_attention_dim=2 * WIDTH,
        norm_num_groups=1,
        time_cond_proj_dim=time_cond_proj_dim,
    )
    encoders = {"text_encoder": _clip(CLIPTextModel), "text_encoder_2": _clip()}
    tokenizers = {"tokenizer": _tokenizer(), "tokenizer_2": _tokenizer()}
    return StableDiffusionXLPipeline(
        _vae(4), unet=unet, scheduler=EulerDiscreteScheduler(), add_watermarker=False, **encoders, **tokenizers
    )


def stable_diffusion_xl() -> StableDiffusionXLPipeline:
    return _stable_diffusion_xl(None)


def stable_diffusion_xl_lcm() -> StableDiffusionXLPipeline:
    """Latent-consistency models of SDXL take their guidance as an input."""
    return _stable_diffusion_xl(8)


def qwen_image() -> QwenImagePipeline:
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 4, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    text = {**sizes, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "rope_scaling": rope}
    vision = {"depth": 1, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_heads": 2, "out_hidden_size": WIDTH}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    return QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), vae, encoder, _tokenizer(512), transformer)


def z_image() -> ZImagePipeline:
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():
        # These weights are uninitialized memory.
        transformer.x_pad_token.fill_(1.0)
        transformer.cap_pad_token.fill_(1.0)
    vae = _vae(4, shift_factor=0.1)
    return ZImagePipeline(FlowMatchEulerDiscreteScheduler(), vae, _qwen3(Qwen3Model), _tokenizer(), transformer)


def tiny_guided_composer(make: Callable[[], DiffusionPipeline]) -> AnchorComposer:
    """A composer of one of the pipelines above, with weights that do not depend on what ran before."""
    torch.manual_seed(0)
    pipeline = make()
    for model in pipeline.components.values():
        if isinstance(model, torch.nn.Module):
            model.eval().requires_grad_(False)
    defaults = {"num_inference_steps": 2}
    if isinstance(pipeline, Flux2KleinPipeline):
        # The pipeline's default names layers that the tiny text encoder does not have.
        defaults["text_encoder_out_layers"] = [0, 1, 2]
    if isinstance(pipeline, QwenImagePipeline):
        # Unscaled, this random decoder would change by one grey level only with another prompt.
        pipeline.vae.decoder.conv_out.weight.mul_(30)
    return AnchorComposer(pipeline, defaults)
