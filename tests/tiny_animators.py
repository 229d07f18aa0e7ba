"""Real image-to-video pipelines of diffusers at tiny size, one for each family. Random weights, the same each time."""

from collections.abc import Callable

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    AutoencoderKLTemporalDecoder,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXVideoTransformer3DModel,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
    WanImageToVideoPipeline,
)
from tiny import tiny_text_encoder, tiny_tokenizer, tiny_transformer, tiny_unipc, tiny_vae, tiny_wan22_vae
from tiny_cogvideox import tiny_cogvideox_transformer, tiny_cogvideox_vae, tiny_t5
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection


WIDTH = 32


def _image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)


def _image_encoder(kind: type = CLIPVisionModel, size: int = 16) -> torch.nn.Module:
    """Five tokens of a picture."""
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
