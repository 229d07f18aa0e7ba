"""Real image-to-video pipelines of diffusers at tiny size, one for each family. Random weights, the same each time."""

from collections.abc import Callable
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTXVideo,
    AutoencoderKLTemporalDecoder,
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    Cosmos2_5_PredictBasePipeline,
    Cosmos2VideoToWorldPipeline,
    CosmosTransformer3DModel,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoTransformer3DModel,
    Kandinsky5I2VPipeline,
    Kandinsky5Transformer3DModel,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXVideoTransformer3DModel,
    SanaImageToVideoPipeline,
    SanaVideoTransformer3DModel,
    SkyReelsV2DiffusionForcingImageToVideoPipeline,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Transformer3DModel,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from diffusers.models.transformers import transformer_cosmos
from tiny import (
    TRANSFORMER_CONFIG,
    WORDS,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_transformer,
    tiny_unipc,
    tiny_vae,
    tiny_wan22_vae,
)
from tiny_cogvideox import tiny_cogvideox_transformer, tiny_cogvideox_vae, tiny_t5
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)


WIDTH, VOCABULARY = 32, len(WORDS) + 3


def _image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)


def _image_encoder(kind: type = CLIPVisionModel, size: int = 16) -> torch.nn.Module:
    """An image encoder with five tokens."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    return kind(CLIPVisionConfig(**sizes, image_size=size, patch_size=size // 2, projection_dim=WIDTH))


# -- Wan --------------------------------------------------------------------------------------------------------------


def _wan(vae: Callable = tiny_vae, in_channels: int = 36, settings: dict | None = None, **config) -> DiffusionPipeline:
    parts = {"image_encoder": None, "image_processor": None, "transformer_2": None}
    if "image_dim" in config:
        parts |= {"image_encoder": _image_encoder(), "image_processor": _image_processor()}
    if "boundary_ratio" in (settings or {}):
        parts["transformer_2"] = tiny_transformer(in_channels=in_channels, seed=5, **config)
    transformer = tiny_transformer(in_channels=in_channels, **config)
    texts = {"tokenizer": tiny_tokenizer(), "text_encoder": tiny_text_encoder()}
    return WanImageToVideoPipeline(
        **texts, vae=vae(), scheduler=tiny_unipc(), transformer=transformer, **parts, **settings or {}
    )


def wan21_i2v() -> WanImageToVideoPipeline:
    return _wan(image_dim=WIDTH, added_kv_proj_dim=24)


def wan21_flf2v() -> WanImageToVideoPipeline:
    return _wan(image_dim=WIDTH, added_kv_proj_dim=24, pos_embed_seq_len=10)


def wan22_i2v() -> WanImageToVideoPipeline:
    return _wan(settings={"boundary_ratio": 0.9})


def wan22_ti2v() -> WanImageToVideoPipeline:
    return _wan(tiny_wan22_vae, 48, {"expand_timesteps": True}, out_channels=48)


def wan_vace() -> WanVACEPipeline:
    transformer = WanVACETransformer3DModel(**TRANSFORMER_CONFIG, vace_layers=[0], vace_in_channels=96)
    return WanVACEPipeline(tiny_tokenizer(), tiny_text_encoder(), tiny_vae(), tiny_unipc(), transformer)


# -- CogVideoX --------------------------------------------------------------------------------------------------------


def _cogvideox(**config) -> CogVideoXImageToVideoPipeline:
    transformer = tiny_cogvideox_transformer(
        in_channels=8, ofs_embed_dim=8 if "patch_size_t" not in config else None, **config
    )
    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    return CogVideoXImageToVideoPipeline(tiny_tokenizer(), tiny_t5(), tiny_cogvideox_vae(), transformer, scheduler)


def cogvideox15_i2v() -> CogVideoXImageToVideoPipeline:
    return _cogvideox()


# -- LTX-Video --------------------------------------------------------------------------------------------------------


def _ltx(kind: type, **shift) -> DiffusionPipeline:
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    # 32 times smaller in space, 8 times in time.
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return kind(FlowMatchEulerDiscreteScheduler(**shift), vae, tiny_t5(), tiny_tokenizer(), transformer)


def ltx_i2v() -> LTXImageToVideoPipeline:
    return _ltx(LTXImageToVideoPipeline, use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05)


def ltx_condition() -> LTXConditionPipeline:
    return _ltx(LTXConditionPipeline)


# -- Stable Video Diffusion -------------------------------------------------------------------------------------------


def stable_video_diffusion() -> StableVideoDiffusionPipeline:
    unet = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32),
        layers_per_block=1,
        sample_size=4,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=WIDTH,
        num_attention_heads=2,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        num_frames=5,
    )
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
    )
    scheduler = EulerDiscreteScheduler(
        prediction_type="v_prediction",
        timestep_type="continuous",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )
    encoder = _image_encoder(CLIPVisionModelWithProjection, 224)
    return StableVideoDiffusionPipeline(vae, encoder, unet, scheduler, _image_processor())


# -- HunyuanVideo -----------------------------------------------------------------------------------------------------


def _hunyuan_vae() -> AutoencoderKLHunyuanVideo:
    """8 times smaller in space, 4 times in time."""
    blocks = (8, 8, 8, 8)
    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=blocks, layers_per_block=1, norm_num_groups=4
    )


def _clip_text() -> CLIPTextModel:
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1))


# One image of four tokens, then the text. The pipeline counts three ends of headers.
HUNYUAN_TEMPLATE = {
    "template": "<image> <|end_header_id|> {} </s> <|end_header_id|> a <|end_header_id|> a",
    "crop_start": 2,
    "image_emb_start": 0,
    "image_emb_end": 4,
    "image_emb_len": 4,
}


def hunyuan_video_i2v() -> HunyuanVideoImageToVideoPipeline:
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=(2, 4, 4),
        image_condition_type="token_replace",
    )
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<|end_header_id|>"]})
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2}
    llama = LlamaConfig(**sizes, vocab_size=len(tokenizer), pad_token_id=0, max_position_embeddings=512)
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    llava = LlavaConfig(
        vision_config=vision, text_config=llama, image_token_index=image_token, pad_token_id=0, vision_feature_layer=-1
    )
    parts = {"text_encoder": LlavaForConditionalGeneration(llava), "tokenizer": tokenizer}
    parts |= {"text_encoder_2": _clip_text(), "tokenizer_2": tiny_tokenizer(), "image_processor": _image_processor()}
    return HunyuanVideoImageToVideoPipeline(
        transformer=transformer, vae=_hunyuan_vae(), scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), **parts
    )


def _qwen(kind: type, layers: int = 2) -> torch.nn.Module:
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": layers, "num_attention_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
    text = {**sizes, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "rope_scaling": rope}
    if kind is Qwen2_5_VLTextModel:
        return kind(Qwen2_5_VLTextConfig(**text))
    vision = {"depth": 1, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_heads": 2, "out_hidden_size": WIDTH}
    return kind(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def _chat_tokenizer() -> PreTrainedTokenizerFast:
    """Returns the texts of a chat, whether strings or lists of parts."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{{ message['content'][0]['text'] }}{% endif %} {% endfor %}"
    )
    return tokenizer


def hunyuan_video15_i2v() -> HunyuanVideo15ImageToVideoPipeline:
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        text_embed_2_dim=32,
        image_embed_dim=WIDTH,
        rope_axes_dim=(4, 6, 6),
        target_size=32,
    )
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(32, 32, 32, 32, 32),
        layers_per_block=1,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    siglip = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=27, patch_size=1))
    pipeline = HunyuanVideo15ImageToVideoPipeline(
        _qwen(Qwen2_5_VLTextModel, 3),
        _chat_tokenizer(),
        transformer,
        vae,
        FlowMatchEulerDiscreteScheduler(shift=7.0),
        tiny_t5(),
        tiny_tokenizer(),
        ClassifierFreeGuidance(guidance_scale=6.0),
        siglip,
        SiglipImageProcessor(size={"height": 27, "width": 27}),
    )
    return pipeline


# -- Kandinsky, SANA, SkyReels, Cosmos --------------------------------------------------------------------------------


def kandinsky5_i2v() -> Kandinsky5I2VPipeline:
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=WIDTH,
        in_text_dim2=WIDTH,
        time_dim=16,
        out_visual_dim=4,
        model_dim=24,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 4, 4),
        visual_cond=True,
    )
    text_encoder = _qwen(Qwen2_5_VLForConditionalGeneration)
    return Kandinsky5I2VPipeline(
        transformer,
        _hunyuan_vae(),
        text_encoder,
        tiny_tokenizer(),
        _clip_text(),
        tiny_tokenizer(),
        FlowMatchEulerDiscreteScheduler(shift=5.0),
    )


def kandinsky6_ti2va() -> DiffusionPipeline:
    """A pipeline with an audio track of 8 kHz."""
    try:
        from diffusers import Kandinsky6TI2VAPipeline, Kandinsky6Transformer3DModel, MMAudioVAE, MMAudioVocoder
    except ImportError as error:
        # Not in diffusers 0.41.
        pytest.skip(f"Kandinsky 6 cannot be imported ({error})")
    transformer = Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=WIDTH,
        in_text_dim2=WIDTH,
        time_dim=16,
        model_dim=24,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 4, 4),
        in_audio_dim=4,
        out_audio_dim=4,
        visual_token_type_num_embeddings=2,
        # The values of the released checkpoints.
        text_token_padding=True,
        ca_rope=True,
        cross_gates=True,
        fix_modulation=True,
    )
    sizes = {"hidden_channels": 16, "channel_multipliers": (1, 2), "layers_per_block": 1, "latent_channels": 4}
    audio_vae = MMAudioVAE(mel_bins=8, sample_rate=8000, n_fft=64, hop_length=16, **sizes)
    rates = {"upsample_rates": (4, 4), "upsample_kernel_sizes": (8, 8)}
    blocks = {"resblock_kernel_sizes": (3,), "resblock_dilation_sizes": ((1,),)}
    vocoder = MMAudioVocoder(num_mels=8, upsample_initial_channel=16, **rates, **blocks)
    return Kandinsky6TI2VAPipeline(
        transformer,
        _hunyuan_vae(),
        _qwen(Qwen2_5_VLForConditionalGeneration),
        tiny_tokenizer(),
        _clip_text(),
        tiny_tokenizer(),
        FlowMatchEulerDiscreteScheduler(shift=5.0),
        audio_vae,
        vocoder,
    )


def motif_video_i2v() -> DiffusionPipeline:
    try:
        from diffusers import MotifVideoImage2VideoPipeline, MotifVideoTransformer3DModel
        from transformers import T5Gemma2Encoder, T5Gemma2EncoderConfig
    except ImportError as error:
        # Not in diffusers 0.40.
        pytest.skip(f"Motif-Video cannot be imported ({error})")
    transformer = MotifVideoTransformer3DModel(
        in_channels=33,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        text_embed_dim=WIDTH,
        image_embed_dim=WIDTH,
        rope_axes_dim=(2, 4, 4),
    )
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": VOCABULARY, "dropout_rate": 0.0}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    text_encoder = T5Gemma2Encoder(
        T5Gemma2EncoderConfig(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    )
    pictures = SiglipImageProcessor(size={"height": 16, "width": 16})
    guider, scheduler = ClassifierFreeGuidance(guidance_scale=6.0), FlowMatchEulerDiscreteScheduler(shift=3.0)
    return MotifVideoImage2VideoPipeline(
        scheduler, tiny_vae(), text_encoder, tiny_tokenizer(), transformer, guider, pictures
    )


def sana_video_i2v() -> SanaImageToVideoPipeline:
    transformer = SanaVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=WIDTH,
    )
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    gemma = Gemma2Config(**sizes, num_key_value_heads=2, head_dim=16, vocab_size=VOCABULARY, pad_token_id=0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=8.0)
    return SanaImageToVideoPipeline(tiny_tokenizer(), Gemma2Model(gemma), tiny_vae(), transformer, scheduler)


def _skyreels(**config) -> SkyReelsV2Transformer3DModel:
    return SkyReelsV2Transformer3DModel(**TRANSFORMER_CONFIG | config)


def skyreels_v2_i2v() -> SkyReelsV2ImageToVideoPipeline:
    transformer = _skyreels(in_channels=36, image_dim=WIDTH, added_kv_proj_dim=24)
    encoder = _image_encoder(CLIPVisionModelWithProjection)
    texts = {"tokenizer": tiny_tokenizer(), "text_encoder": tiny_text_encoder()}
    return SkyReelsV2ImageToVideoPipeline(
        **texts,
        image_encoder=encoder,
        image_processor=_image_processor(),
        transformer=transformer,
        vae=tiny_vae(),
        scheduler=tiny_unipc(),
    )


def skyreels_v2_df() -> SkyReelsV2DiffusionForcingImageToVideoPipeline:
    transformer = _skyreels(inject_sample_info=True)
    return SkyReelsV2DiffusionForcingImageToVideoPipeline(
        tiny_tokenizer(), tiny_text_encoder(), transformer, tiny_vae(), tiny_unipc()
    )


class SafetyChecker(torch.nn.Module):
    """Replaces one that needs a further package."""

    def __init__(self):
        super().__init__()
        self.register_buffer("nothing", torch.zeros(()))

    @property
    def device(self) -> torch.device:
        return self.nothing.device

    @property
    def dtype(self) -> torch.dtype:
        return self.nothing.dtype

    def check_text_safety(self, text: str) -> bool:
        return True

    def check_video_safety(self, video):
        return video


def stand_in_for_torchvision() -> None:
    """Replaces a function of torchvision with which Cosmos' transformer resizes a mask of zeros."""
    if not hasattr(transformer_cosmos, "transforms"):
        resize = SimpleNamespace(resize=lambda mask, size, interpolation: mask.new_zeros(*mask.shape[:2], *size))
        nearest = SimpleNamespace(NEAREST="nearest")
        transformer_cosmos.transforms = SimpleNamespace(functional=resize, InterpolationMode=nearest)


def _cosmos(**config) -> CosmosTransformer3DModel:
    stand_in_for_torchvision()
    return CosmosTransformer3DModel(
        in_channels=17,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        mlp_ratio=2,
        text_embed_dim=32,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        extra_pos_embed_type=None,
        **config,
    )


def cosmos2_video2world() -> Cosmos2VideoToWorldPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    return Cosmos2VideoToWorldPipeline(tiny_t5(), tiny_tokenizer(), _cosmos(), tiny_vae(), scheduler, SafetyChecker())


def cosmos25_predict() -> Cosmos2_5_PredictBasePipeline:
    transformer = _cosmos(
        use_crossattn_projection=True, crossattn_proj_in_channels=2 * WIDTH, encoder_hidden_states_channels=32
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        use_karras_sigmas=True,
        sigma_max=200.0,
        sigma_min=0.01,
    )
    text_encoder = _qwen(Qwen2_5_VLForConditionalGeneration)
    return Cosmos2_5_PredictBasePipeline(
        text_encoder, _chat_tokenizer(), transformer, tiny_vae(), scheduler, SafetyChecker()
    )


# -- LTX-2 ------------------------------------------------------------------------------------------------------------


def _ltx2(kind: str) -> DiffusionPipeline:
    """32 times smaller in space, 8 times in time, with a sound track of 24 kHz."""
    try:
        pipeline_class = getattr(diffusers, kind)
        from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video, LTX2VideoTransformer3DModel
        from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
        from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
    except (ImportError, RuntimeError) as error:
        # diffusers 0.40 imports names that older versions of transformers do not have.
        pytest.skip(f"LTX-2 cannot be imported ({error})")
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = Gemma3TextConfig(**sizes, num_key_value_heads=1, head_dim=16, vocab_size=VOCABULARY, pad_token_id=0)
    vision = SiglipVisionConfig(**sizes, image_size=8, patch_size=8)
    text_encoder = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    )
    connectors = LTX2TextConnectors(
        caption_channels=WIDTH,
        # The embeddings and one layer.
        text_proj_in_factor=2,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=16,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=16,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        rope_double_precision=False,
        connector_rope_base_seq_len=32,
    )
    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=8, ch_mult=(1, 1), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=16
    )
    vocoder = LTX2Vocoder(
        in_channels=32,
        hidden_channels=32,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
    )
    transformer = LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=8,
        audio_out_channels=8,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=1,
        caption_channels=WIDTH,
        rope_double_precision=False,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1
    )
    parts = {"vae": vae, "audio_vae": audio_vae, "text_encoder": text_encoder, "tokenizer": tiny_tokenizer()}
    return pipeline_class(
        scheduler=scheduler, connectors=connectors, transformer=transformer, vocoder=vocoder, **parts
    )


def ltx2_i2v() -> DiffusionPipeline:
    return _ltx2("LTX2ImageToVideoPipeline")


def ltx2_condition() -> DiffusionPipeline:
    return _ltx2("LTX2ConditionPipeline")


ANIMATORS: dict[str, Callable[[], DiffusionPipeline]] = {
    function.__name__: function
    for function in (
        wan21_i2v,
        wan21_flf2v,
        wan22_i2v,
        wan22_ti2v,
        cogvideox15_i2v,
        ltx_i2v,
        ltx_condition,
        stable_video_diffusion,
        hunyuan_video_i2v,
        hunyuan_video15_i2v,
        kandinsky5_i2v,
        kandinsky6_ti2va,
        motif_video_i2v,
        sana_video_i2v,
        skyreels_v2_i2v,
        skyreels_v2_df,
        cosmos2_video2world,
        cosmos25_predict,
        ltx2_i2v,
        ltx2_condition,
        wan_vace,
    )
}


def tiny_animator(name: str) -> DiffusionPipeline:
    torch.manual_seed(0)
    pipeline = ANIMATORS[name]()
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
