r"""The published facts of each video model, in the table `MODELS`, which [`models`] reads. Does not import torch.

`sources` names the source of every value. The repositories named there were read at these commits: Wan-Video/Wan2.2 42bf4cf, Wan-Video/Wan2.1 9737cba, zai-org/CogVideo 7a1af71, huggingface/diffusers 58eb52c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class License:
    """A licence, in the terms of the Hub's metadata.

    Args:
        id (`str`): identifier in the Hub's list of licences; `"other"` for a licence that is not in the list.
        name, link (`str`, *optional*): name and URL of a licence that is not in the list.
    """

    id: str
    name: str = ""
    link: str = ""


@dataclass(frozen=True)
class TrainedSize:
    """A size that a model was trained at.

    Args:
        height, width (`int`): in pixels.
        flow_shift (`float`, *optional*): flow shift of the model at this size; `None` for a model without flow matching.
    """

    height: int
    width: int
    flow_shift: float | None


@dataclass(frozen=True)
class ModelFacts:
    """The published numbers of a text-to-video model.

    Args:
        name (`str`): name of the model.
        repository (`str`): Hub repository in diffusers' layout.
        pipeline_class, transformer_class (`str`): classes of diffusers for the model.
        anchored_class (`str`): this package's class for the same weights.
        transformer_config (`dict`): arguments of the transformer class, the same for both experts if there are two.
        parameters (`int`): number of parameters of one transformer.
        license (`License`): licence of the weights.
        languages (`tuple[str, ...]`): languages of prompts, as ISO 639-1 codes.
        sizes (`tuple[TrainedSize, ...]`): trained sizes, the default first.
        frame_counts (`tuple[int, ...]`): trained lengths in frames, the default first.
        frame_step (`int`): lengths are `frame_step * k + 1`.
        frame_rate (`int`): frames per second.
        vae_stride (`tuple[int, int, int]`): frames, rows and columns of pixels in one latent.
        latent_channels (`int`): latent channels of the VAE.
        patch_size (`tuple[int, int, int]`): frames, rows and columns of latents in one token.
        max_sequence_length (`int`): largest number of text tokens.
        prediction (`str`): `"flow"` for flow matching (velocity), or `"v"` for v-prediction.
        expand_timesteps (`bool`): whether the model was trained on clean first frames, with one timestep per token.
        num_inference_steps (`int`): the authors' default.
        guidance_scale (`float`): the authors' default; for the high-noise expert if there are two.
        guidance_scale_2 (`float`, *optional*): the authors' default for the low-noise expert.
        boundary_ratio (`float`, *optional*): noise level, in [0, 1], at and above which the high-noise expert is used.
        negative_prompt (`str`): the authors' default.
        memory (`str`): GPU memory that the authors state; empty if they do not.
        sources (`dict[str, str]`): source of each of these values.
    """

    name: str
    repository: str
    pipeline_class: str
    transformer_class: str
    anchored_class: str
    transformer_config: dict[str, Any]
    parameters: int
    license: License
    languages: tuple[str, ...]
    sizes: tuple[TrainedSize, ...]
    frame_counts: tuple[int, ...]
    frame_step: int
    frame_rate: int
    vae_stride: tuple[int, int, int]
    latent_channels: int
    patch_size: tuple[int, int, int]
    max_sequence_length: int
    prediction: str
    expand_timesteps: bool
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float | None
    boundary_ratio: float | None
    negative_prompt: str
    memory: str
    sources: dict[str, str]

    def size(self, height: int | None, width: int | None) -> TrainedSize | None:
        """Returns the trained size with this height and width; `None` if there is none."""
        return next((size for size in self.sizes if (size.height, size.width) == (height, width)), None)

    @property
    def call_defaults(self) -> dict[str, Any]:
        """Defaults of `height`, `width`, `num_frames`, `frame_rate`, `max_sequence_length` and `negative_prompt`."""
        return {
            "height": self.sizes[0].height,
            "width": self.sizes[0].width,
            "num_frames": self.frame_counts[0],
            "frame_rate": self.frame_rate,
            "max_sequence_length": self.max_sequence_length,
            "negative_prompt": self.negative_prompt,
        }


APACHE = License("apache-2.0")
COGVIDEOX_LICENSE = License(
    "other", "cogvideox-license", "https://huggingface.co/zai-org/CogVideoX1.5-5B/blob/main/LICENSE"
)

# In English, as the authors give it for diffusers (README of Wan2.1): Bright tones, overexposed, static, blurred details,
# subtitles, style, works, paintings, images, static, overall gray, worst quality, low quality, JPEG compression residue,
# ugly, incomplete, extra fingers, poorly drawn hands, poorly drawn faces, deformed, disfigured, misshapen limbs, fused
# fingers, still picture, messy background, three legs, many people in the background, walking backwards.
WAN_NEGATIVE_PROMPT = (
    "\u8272\u8c03\u8273\u4e3d\uff0c\u8fc7\u66dd\uff0c\u9759\u6001\uff0c\u7ec6\u8282\u6a21\u7cca\u4e0d\u6e05\uff0c"
    "\u5b57\u5e55\uff0c\u98ce\u683c\uff0c\u4f5c\u54c1\uff0c\u753b\u4f5c\uff0c\u753b\u9762\uff0c\u9759\u6b62\uff0c"
    "\u6574\u4f53\u53d1\u7070\uff0c\u6700\u5dee\u8d28\u91cf\uff0c\u4f4e\u8d28\u91cf\uff0cJPEG\u538b\u7f29\u6b8b\u7559\uff0c"
    "\u4e11\u964b\u7684\uff0c\u6b8b\u7f3a\u7684\uff0c\u591a\u4f59\u7684\u624b\u6307\uff0c"
    "\u753b\u5f97\u4e0d\u597d\u7684\u624b\u90e8\uff0c\u753b\u5f97\u4e0d\u597d\u7684\u8138\u90e8\uff0c"
    "\u7578\u5f62\u7684\uff0c\u6bc1\u5bb9\u7684\uff0c\u5f62\u6001\u7578\u5f62\u7684\u80a2\u4f53\uff0c"
    "\u624b\u6307\u878d\u5408\uff0c\u9759\u6b62\u4e0d\u52a8\u7684\u753b\u9762\uff0c\u6742\u4e71\u7684\u80cc\u666f\uff0c"
    "\u4e09\u6761\u817f\uff0c\u80cc\u666f\u4eba\u5f88\u591a\uff0c\u5012\u7740\u8d70"
)

WAN_TRANSFORMER = {
    "patch_size": (1, 2, 2),
    "attention_head_dim": 128,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "added_kv_proj_dim": None,
}
WAN_14B_TRANSFORMER = WAN_TRANSFORMER | {
    "num_layers": 40,
    "num_attention_heads": 40,
    "ffn_dim": 13824,
    "in_channels": 16,
    "out_channels": 16,
}
WAN_SOURCES = {
    "pipeline_class": "huggingface/diffusers, scripts/convert_wan_to_diffusers.py",
    "transformer_class": "huggingface/diffusers, scripts/convert_wan_to_diffusers.py",
    "transformer_config": "huggingface/diffusers, scripts/convert_wan_to_diffusers.py",
    "languages": "listing of the repository on the Hub: English, Chinese",
    "frame_step": "temporal stride of the VAE",
    "max_sequence_length": "wan/configs/shared_config.py, text_len",
    "prediction": "arXiv 2503.20314, section 4.2.2",
    "expand_timesteps": "huggingface/diffusers, scripts/convert_wan_to_diffusers.py",
    "negative_prompt": "wan/configs/shared_config.py, sample_neg_prompt",
}
WAN_21 = "Wan-Video/Wan2.1"
WAN_22 = "Wan-Video/Wan2.2"


def _wan_sources(repository: str, config: str, **more: str) -> dict[str, str]:
    """Returns the sources of a Wan model whose numbers are in `wan/configs/<config>` of `repository`."""
    shared = {
        name: f"{repository}, {source}" if source.startswith("wan/") else source
        for name, source in WAN_SOURCES.items()
    }
    numbers = f"{repository}, wan/configs/{config}"
    own = {
        "repository": f"{repository}, README.md, links to the models in diffusers' layout",
        "license": f"{repository}, README.md, License Agreement",
        "vae_stride": numbers,
        "patch_size": numbers,
    }
    return shared | own | more


MODELS: dict[str, ModelFacts] = {
    facts.name: facts
    for facts in (
        ModelFacts(
            name="Wan2.2-TI2V-5B",
            repository="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
            pipeline_class="WanPipeline",
            transformer_class="WanTransformer3DModel",
            anchored_class="AnchorConditionedTransformer3D",
            transformer_config=WAN_TRANSFORMER
            | {"num_layers": 30, "num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48},
            parameters=4_999_787_712,
            license=APACHE,
            languages=("en", "zh"),
            sizes=(TrainedSize(704, 1280, 5.0), TrainedSize(1280, 704, 5.0)),
            frame_counts=(121,),
            frame_step=4,
            frame_rate=24,
            vae_stride=(4, 16, 16),
            latent_channels=48,
            patch_size=(1, 2, 2),
            max_sequence_length=512,
            prediction="flow",
            expand_timesteps=True,
            num_inference_steps=50,
            guidance_scale=5.0,
            guidance_scale_2=None,
            boundary_ratio=None,
            negative_prompt=WAN_NEGATIVE_PROMPT,
            memory="24 GB with offload, bfloat16 and the text encoder on the CPU; 80 GB without",
            sources=_wan_sources(
                WAN_22,
                "wan_ti2v_5B.py",
                parameters="counted from transformer_config; README.md: 5B",
                sizes=f"{WAN_22}, wan/configs/__init__.py, SUPPORTED_SIZES; shift: wan_ti2v_5B.py, sample_shift",
                frame_counts=f"{WAN_22}, wan/configs/wan_ti2v_5B.py, frame_num",
                frame_rate=f"{WAN_22}, wan/configs/wan_ti2v_5B.py, sample_fps",
                latent_channels="huggingface/diffusers, scripts/convert_wan_to_diffusers.py, vae22_diffusers_config",
                num_inference_steps=f"{WAN_22}, wan/configs/wan_ti2v_5B.py, sample_steps",
                guidance_scale=f"{WAN_22}, wan/configs/wan_ti2v_5B.py, sample_guide_scale",
                memory=f"{WAN_22}, README.md, Run Text-Image-to-Video Generation",
            ),
        ),
        ModelFacts(
            name="Wan2.1-T2V-1.3B",
            repository="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            pipeline_class="WanPipeline",
            transformer_class="WanTransformer3DModel",
            anchored_class="AnchorConditionedTransformer3D",
            transformer_config=WAN_TRANSFORMER
            | {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960, "in_channels": 16, "out_channels": 16},
            parameters=1_418_996_800,
            license=APACHE,
            languages=("en", "zh"),
            sizes=(TrainedSize(480, 832, 3.0), TrainedSize(832, 480, 3.0)),
            frame_counts=(81,),
            frame_step=4,
            frame_rate=16,
            vae_stride=(4, 8, 8),
            latent_channels=16,
            patch_size=(1, 2, 2),
            max_sequence_length=512,
            prediction="flow",
            expand_timesteps=False,
            num_inference_steps=50,
            guidance_scale=6.0,
            guidance_scale_2=None,
            boundary_ratio=None,
            negative_prompt=WAN_NEGATIVE_PROMPT,
            memory="8.19 GB",
            sources=_wan_sources(
                WAN_21,
                "wan_t2v_1_3B.py",
                parameters="counted from transformer_config; listing on the Hub: 5.68 GB in float32",
                sizes=f"{WAN_21}, wan/configs/__init__.py, SUPPORTED_SIZES; shift: README.md, Diffusers example, 3.0 for "
                "480P (for its own code the README advises 8 to 12)",
                frame_counts=f"{WAN_21}, generate.py, frame_num",
                frame_rate=f"{WAN_21}, wan/configs/shared_config.py, sample_fps",
                latent_channels=f"{WAN_21}, README.md, table of the DiT, input dimension",
                num_inference_steps=f"{WAN_21}, generate.py, sample_steps",
                guidance_scale=f"{WAN_21}, README.md: recommended for T2V-1.3B",
                memory=f"{WAN_21}, README.md, introduction",
            ),
        ),
        ModelFacts(
            name="Wan2.1-T2V-14B",
            repository="Wan-AI/Wan2.1-T2V-14B-Diffusers",
            pipeline_class="WanPipeline",
            transformer_class="WanTransformer3DModel",
            anchored_class="AnchorConditionedTransformer3D",
            transformer_config=WAN_14B_TRANSFORMER,
            parameters=14_288_491_584,
            license=APACHE,
            languages=("en", "zh"),
            sizes=(
                TrainedSize(720, 1280, 5.0),
                TrainedSize(1280, 720, 5.0),
                TrainedSize(480, 832, 3.0),
                TrainedSize(832, 480, 3.0),
            ),
            frame_counts=(81,),
            frame_step=4,
            frame_rate=16,
            vae_stride=(4, 8, 8),
            latent_channels=16,
            patch_size=(1, 2, 2),
            max_sequence_length=512,
            prediction="flow",
            expand_timesteps=False,
            num_inference_steps=50,
            guidance_scale=5.0,
            guidance_scale_2=None,
            boundary_ratio=None,
            negative_prompt=WAN_NEGATIVE_PROMPT,
            memory="",
            sources=_wan_sources(
                WAN_21,
                "wan_t2v_14B.py",
                parameters="counted from transformer_config; Comfy-Org/Wan_2.1_ComfyUI_repackaged: 28.6 GB in bfloat16",
                sizes=f"{WAN_21}, wan/configs/__init__.py, SUPPORTED_SIZES; shift: README.md, Diffusers example, 5.0 for "
                "720P, 3.0 for 480P",
                frame_counts=f"{WAN_21}, generate.py, frame_num",
                frame_rate=f"{WAN_21}, wan/configs/shared_config.py, sample_fps",
                latent_channels=f"{WAN_21}, README.md, table of the DiT, input dimension",
                num_inference_steps=f"{WAN_21}, generate.py, sample_steps",
                guidance_scale=f"{WAN_21}, wan/text2video.py, guide_scale",
            ),
        ),
        ModelFacts(
            name="Wan2.2-T2V-A14B",
            repository="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            pipeline_class="WanPipeline",
            transformer_class="WanTransformer3DModel",
            anchored_class="AnchorConditionedTransformer3D",
            transformer_config=WAN_14B_TRANSFORMER,
            parameters=14_288_491_584,
            license=APACHE,
            languages=("en", "zh"),
            sizes=(
                TrainedSize(720, 1280, 12.0),
                TrainedSize(1280, 720, 12.0),
                TrainedSize(480, 832, 12.0),
                TrainedSize(832, 480, 12.0),
            ),
            frame_counts=(81,),
            frame_step=4,
            frame_rate=16,
            vae_stride=(4, 8, 8),
            latent_channels=16,
            patch_size=(1, 2, 2),
            max_sequence_length=512,
            prediction="flow",
            expand_timesteps=False,
            num_inference_steps=40,
            guidance_scale=4.0,
            guidance_scale_2=3.0,
            boundary_ratio=0.875,
            negative_prompt=WAN_NEGATIVE_PROMPT,
            memory="80 GB with offload and bfloat16",
            sources=_wan_sources(
                WAN_22,
                "wan_t2v_A14B.py",
                parameters="counted from transformer_config; Comfy-Org/Wan_2.2_ComfyUI_Repackaged: 28.6 GB an expert in "
                "float16",
                sizes=f"{WAN_22}, wan/configs/__init__.py, SUPPORTED_SIZES; shift: wan_t2v_A14B.py, sample_shift",
                frame_counts=f"{WAN_22}, wan/configs/shared_config.py, frame_num",
                frame_rate=f"{WAN_22}, wan/configs/shared_config.py, sample_fps",
                latent_channels="huggingface/diffusers, scripts/convert_wan_to_diffusers.py, in_channels",
                num_inference_steps=f"{WAN_22}, wan/configs/wan_t2v_A14B.py, sample_steps",
                guidance_scale=f"{WAN_22}, wan/configs/wan_t2v_A14B.py, sample_guide_scale, its second: high noise",
                guidance_scale_2=f"{WAN_22}, wan/configs/wan_t2v_A14B.py, sample_guide_scale, its first: low noise",
                boundary_ratio=f"{WAN_22}, wan/configs/wan_t2v_A14B.py, boundary",
                memory=f"{WAN_22}, README.md, Run Text-to-Video Generation",
            ),
        ),
        ModelFacts(
            name="CogVideoX1.5-5B",
            repository="zai-org/CogVideoX1.5-5B",
            pipeline_class="CogVideoXPipeline",
            transformer_class="CogVideoXTransformer3DModel",
            anchored_class="AnchorConditionedCogVideoXTransformer3D",
            transformer_config={
                "num_layers": 42,
                "num_attention_heads": 48,
                "attention_head_dim": 64,
                "in_channels": 16,
                "out_channels": 16,
                "time_embed_dim": 512,
                "text_embed_dim": 4096,
                "max_text_seq_length": 224,
                "patch_size": 2,
                "patch_size_t": 2,
                "patch_bias": False,
                "sample_height": 300,
                "sample_width": 300,
                "sample_frames": 81,
                "temporal_compression_ratio": 4,
                "use_rotary_positional_embeddings": True,
            },
            parameters=5_570_676_352,
            license=COGVIDEOX_LICENSE,
            languages=("en",),
            sizes=(TrainedSize(768, 1360, None),),
            frame_counts=(81, 161),
            frame_step=16,
            frame_rate=16,
            vae_stride=(4, 8, 8),
            latent_channels=16,
            patch_size=(2, 2, 2),
            max_sequence_length=224,
            prediction="v",
            expand_timesteps=False,
            num_inference_steps=50,
            guidance_scale=6.0,
            guidance_scale_2=None,
            boundary_ratio=None,
            negative_prompt="",
            memory="10 GB and up in bfloat16 with every optimization of diffusers on",
            sources={
                "repository": "zai-org/CogVideo, README.md, Download Link (Diffusers); THUDM is now zai-org",
                "pipeline_class": "zai-org/CogVideo, inference/cli_demo.py",
                "transformer_class": "huggingface/diffusers, scripts/convert_cogvideox_to_diffusers.py",
                "transformer_config": "huggingface/diffusers, scripts/convert_cogvideox_to_diffusers.py, version 1.5, with "
                "layers, heads and widths of zai-org/CogVideo, sat/configs/cogvideox1.5_5b.yaml",
                "parameters": "counted from transformer_config; Kijai/CogVideoX-5b-1.5, transformer_T2V: 11.15 GB in "
                "bfloat16",
                "license": "LICENSE in the repository; zai-org/CogVideo, README.md, Model-License, for the 5B models",
                "languages": "zai-org/CogVideo, README.md, Prompt Language",
                "sizes": "zai-org/CogVideo, README.md, Video Resolution",
                "frame_counts": "zai-org/CogVideo, README.md, Number of Frames; sat/configs/cogvideox1.5_5b.yaml: 81 for 5 "
                "seconds, 161 for 10",
                "frame_step": "zai-org/CogVideo, README.md, Number of Frames: 16N + 1",
                "frame_rate": "zai-org/CogVideo, README.md, Frame Rate",
                "vae_stride": "zai-org/CogVideo, sat/configs/cogvideox1.5_5b.yaml, time_compressed_rate and ch_mult",
                "latent_channels": "zai-org/CogVideo, sat/configs/cogvideox1.5_5b.yaml, z_channels",
                "patch_size": "zai-org/CogVideo, sat/configs/cogvideox1.5_5b.yaml",
                "max_sequence_length": "zai-org/CogVideo, README.md, Prompt Token Limit",
                "prediction": "huggingface/diffusers, scripts/convert_cogvideox_to_diffusers.py, prediction_type",
                "expand_timesteps": "zai-org/CogVideo, README.md: first frames are for the I2V model",
                "num_inference_steps": "zai-org/CogVideo, inference/cli_demo.py",
                "guidance_scale": "zai-org/CogVideo, inference/cli_demo.py",
                "negative_prompt": "zai-org/CogVideo, inference/cli_demo.py: none",
                "memory": "zai-org/CogVideo, README.md, Single GPU Memory Usage",
            },
        ),
    )
}
