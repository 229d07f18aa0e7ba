"""Table of the recipes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..model_facts import MODELS, ModelFacts


if TYPE_CHECKING:
    import os


@dataclass(frozen=True)
class PartFacts:
    """Published facts of a text-to-image pipeline or a chat model.

    Args:
        repository (`str`): repository on the Hub.
        license (`str`): licence of the weights, in the Hub's spelling.
        configs (`dict`): class in diffusers or transformers -> its arguments, for each model of the part.
        call_defaults (`dict`): call arguments of the composer that its authors recommend.
        sources (`dict[str, str]`): source of each of these values.
    """

    repository: str
    license: str
    configs: dict[str, dict[str, Any]]
    sources: dict[str, str]
    call_defaults: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AnimatorFacts:
    """Published facts of an image-to-video pipeline.

    Args:
        repository, license (`str`): as in [`PartFacts`].
        models (`dict`): component -> its class in diffusers or transformers and the arguments of the class, in the order of running.
        call_defaults (`dict`): call arguments that its authors recommend.
        sources (`dict[str, str]`): source of each of these values.
    """

    repository: str
    license: str
    models: dict[str, tuple[str, dict[str, Any]]]
    sources: dict[str, str]
    call_defaults: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A base, a composer and a rewriter under one name.

    Args:
        name (`str`): name without a slash.
        facts ([`ModelFacts`]): facts of the base.
        composer, rewriter ([`PartFacts`]): facts of the models of stages 2 and 1.
        training (`dict`): options of [`~training.config.TrainConfig`] for an anchor LoRA, in addition to those from `facts`.
        clip_lengths (`tuple[int, ...]`): numbers of frames of the training clips.
        lora (`str`, *optional*): repository of a published anchor LoRA, if there is one.
    """

    name: str
    facts: ModelFacts
    composer: PartFacts
    rewriter: PartFacts
    training: dict[str, Any]
    clip_lengths: tuple[int, ...]
    lora: str | None = None

    @property
    def keeps_first_frame(self) -> bool:
        """Whether the base was trained with clean first frames, so that it keeps an anchor there without a LoRA."""
        return self.facts.expand_timesteps

    @property
    def repositories(self) -> dict[str, str]:
        """Part -> its repository."""
        return {
            "base": self.facts.repository,
            "composer": self.composer.repository,
            "rewriter": self.rewriter.repository,
        }

    @property
    def licenses(self) -> dict[str, str]:
        """Part -> its licence."""
        base = self.facts.license
        return {
            "base": base.name or base.id,
            "composer": self.composer.license,
            "rewriter": self.rewriter.license,
        }


@dataclass(frozen=True)
class AnimatorRecipe:
    """Parts of a [`FactorizedImageToVideoPipeline`] under one name. The video model keeps a first frame without a LoRA.

    Args:
        name (`str`): name without a slash.
        animator ([`AnimatorFacts`]), composer, rewriter ([`PartFacts`]): facts of the models of stages 3, 2 and 1.
    """

    name: str
    animator: AnimatorFacts
    composer: PartFacts
    rewriter: PartFacts
    keeps_first_frame: ClassVar[bool] = True
    lora: ClassVar[None] = None

    @property
    def parts(self) -> dict[str, AnimatorFacts | PartFacts]:
        return {"animator": self.animator, "composer": self.composer, "rewriter": self.rewriter}

    @property
    def repositories(self) -> dict[str, str]:
        """Part -> its repository."""
        return {name: part.repository for name, part in self.parts.items()}

    @property
    def licenses(self) -> dict[str, str]:
        """Part -> its licence."""
        return {name: part.license for name, part in self.parts.items()}


QWEN3_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
QWEN3_4B_INSTRUCT = PartFacts(
    repository="Qwen/Qwen3-4B-Instruct-2507",
    license="apache-2.0",
    configs={"Qwen3ForCausalLM": QWEN3_4B},
    sources={
        "repository": "model card; a model without thinking mode",
        "license": "model card",
        "configs": "config.json of the repository",
    },
)
Z_IMAGE_TURBO = PartFacts(
    repository="Tongyi-MAI/Z-Image-Turbo",
    license="apache-2.0",
    # The VAE is left out, because it is small compared with the other models.
    configs={"ZImageTransformer2DModel": {}, "Qwen3Model": QWEN3_4B},
    # No size: the composer draws at the size of the video.
    call_defaults={"num_inference_steps": 9, "guidance_scale": 0.0},
    sources={
        "repository": "Tongyi-MAI/Z-Image 44314b8, README.md",
        "license": "model card",
        "configs": "huggingface/diffusers 0.42.1: defaults of ZImageTransformer2DModel, whose cap_feat_dim is Qwen3-4B's width; "
        "the documentation has the text encoder at the size of Qwen3-4B",
        "call_defaults": "Tongyi-MAI/Z-Image 44314b8, README.md: 9 steps, guidance 0",
    },
)

# Published bytes of weights on disk, used when the Hub does not answer. The 5B's transformer (4,999,787,712 parameters) and
# VAE (704,688,668) are float32, its text encoder (5,680,910,336) is bfloat16: card of
# AbstractFramework/wan2.2-ti2v-5b-diffusers-8bit. Qwen3-4B (4,022,468,096) is bfloat16: its config.json.
STORED = {
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": 4 * (4_999_787_712 + 704_688_668) + 2 * 5_680_910_336,
    "Qwen/Qwen3-4B-Instruct-2507": 2 * 4_022_468_096,
}

# Options that do not follow from the facts, as in examples/training, which gives the reasons.
_TRAINING = {"anchor_position": "uniform", "batch_size": 1, "learning_rate": 1e-4}

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "wan2.2-5b",
            MODELS["Wan2.2-TI2V-5B"],
            Z_IMAGE_TURBO,
            QWEN3_4B_INSTRUCT,
            _TRAINING | {"rank": 128, "alpha": 64, "gradient_accumulation_steps": 2, "steps": 1500},
            clip_lengths=(121, 81),
        ),
        Recipe(
            "wan2.1-1.3b",
            MODELS["Wan2.1-T2V-1.3B"],
            Z_IMAGE_TURBO,
            QWEN3_4B_INSTRUCT,
            _TRAINING | {"rank": 64, "alpha": 32, "gradient_accumulation_steps": 8, "steps": 2000},
            clip_lengths=(81, 49),
        ),
        Recipe(
            "cogvideox1.5-5b",
            MODELS["CogVideoX1.5-5B"],
            Z_IMAGE_TURBO,
            QWEN3_4B_INSTRUCT,
            _TRAINING
            | {"rank": 128, "alpha": 64, "gradient_accumulation_steps": 2, "steps": 2000}
            | {"targets": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]}
            | {"timestep_density": "uniform", "max_sequence_length": 224},
            clip_lengths=(81, 49),
        ),
    )
}


# google/umt5-xxl, config.json.
_UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
# google/siglip-so400m-patch14-384 and the tower of google/gemma-3-12b-it, config.json.
_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
}
# google/gemma-3-12b-it, config.json.
_GEMMA3_12B = {
    "text_config": {
        "vocab_size": 262208,
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
    },
    "vision_config": _SO400M | {"image_size": 896, "vision_use_head": False},
}
# Qwen/Qwen2.5-VL-7B-Instruct, config.json.
_QWEN25_VL_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
# google/byt5-small, config.json, without the few hundred characters that Glyph-SDXL-v2 adds.
_BYT5_SMALL = {"vocab_size": 384, "d_model": 1472, "d_kv": 64, "d_ff": 3584, "num_layers": 12, "num_heads": 6}
_LTX2 = AnimatorFacts(
    repository="diffusers/LTX-2.3-Diffusers",
    license="ltx-2-community",
    models={
        "text_encoder": ("Gemma3ForConditionalGeneration", _GEMMA3_12B),
        "connectors": (
            "LTX2TextConnectors",
            {f"{kind}_connector_num_attention_heads": 32 for kind in ("video", "audio")}
            | {f"{kind}_connector_num_layers": 8 for kind in ("video", "audio")}
            | {"audio_connector_attention_head_dim": 64, "video_gated_attn": True, "audio_gated_attn": True}
            | {"rope_type": "split", "per_modality_projections": True, "proj_bias": True},
        ),
        "transformer": (
            "LTX2VideoTransformer3DModel",
            {"gated_attn": True, "cross_attn_mod": True, "audio_gated_attn": True, "audio_cross_attn_mod": True}
            | {"rope_type": "split", "use_prompt_embeddings": False, "perturbed_attn": True},
        ),
        "vae": (
            "AutoencoderKLLTX2Video",
            {"block_out_channels": (256, 512, 1024, 1024), "decoder_block_out_channels": (256, 512, 512, 1024)}
            | {"layers_per_block": (4, 6, 4, 2, 2), "decoder_layers_per_block": (4, 6, 4, 2, 2)}
            | {"decoder_spatio_temporal_scaling": (True,) * 4, "decoder_inject_noise": (False,) * 5}
            | {"upsample_type": ("spatiotemporal", "spatiotemporal", "temporal", "spatial")}
            | {"upsample_residual": (False,) * 4, "upsample_factor": (2, 2, 1, 2), "decoder_causal": False},
        ),
        "audio_vae": ("AutoencoderKLLTX2Audio", {}),
        "vocoder": ("LTX2VocoderWithBWE", {}),
    },
    sources={
        "repository": "Lightricks/LTX-2 400fd31, README.md",
        "license": "model card: LTX-2 Community License, 2026-01-05; paid at and above 10 million dollars of revenue",
        "models": "huggingface/diffusers 58eb52c, scripts/convert_ltx2_to_diffusers.py, version 2.3",
    },
)
_HUNYUAN = AnimatorFacts(
    repository="hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v",
    license="tencent-hunyuan-community",
    models={
        "image_encoder": ("SiglipVisionModel", _SO400M | {"image_size": 384}),
        "text_encoder": ("Qwen2_5_VLTextModel", _QWEN25_VL_7B),
        "text_encoder_2": ("T5EncoderModel", _BYT5_SMALL | {"feed_forward_proj": "gated-gelu"}),
        "transformer": ("HunyuanVideo15Transformer3DModel", {}),
        "vae": ("AutoencoderKLHunyuanVideo15", {}),
    },
    sources={
        "repository": "hao-ai-lab/FastVideo 2f3d407",
        "license": "model card; not for use in the European Union, the United Kingdom and South Korea",
        "models": "huggingface/diffusers 58eb52c, scripts/convert_hunyuan_video1_5_to_diffusers.py",
    },
)
_WAN22_I2V = AnimatorFacts(
    repository="Wan-AI/Wan2.2-I2V-A14B-Diffusers",
    license="apache-2.0",
    models={
        "text_encoder": ("UMT5EncoderModel", _UMT5_XXL),
        "transformer": ("WanTransformer3DModel", {"in_channels": 36}),
        "transformer_2": ("WanTransformer3DModel", {"in_channels": 36}),
        "vae": ("AutoencoderKLWan", {}),
    },
    call_defaults={"guidance_scale": 3.5, "guidance_scale_2": 3.5, "num_inference_steps": 40},
    sources={
        "repository": "Wan-Video/Wan2.2 42bf4cf, README.md",
        "license": "Wan-Video/Wan2.2 42bf4cf, README.md",
        "models": "huggingface/diffusers 58eb52c, scripts/convert_wan_to_diffusers.py",
        "call_defaults": "Wan-Video/Wan2.2 42bf4cf, wan/configs/wan_i2v_A14B.py",
    },
)
_SANA_VIDEO = AnimatorFacts(
    repository="Efficient-Large-Model/SANA-Video_2B_480p_diffusers",
    license="nvidia-open-model-license",
    models={
        # The values of gemma-2-2b-it are the defaults of the class.
        "text_encoder": ("Gemma2Model", {}),
        "transformer": ("SanaVideoTransformer3DModel", {}),
        "vae": ("AutoencoderKLWan", {}),
    },
    sources={
        "repository": "huggingface/diffusers 0.42.1, documentation of SANA-Video",
        "license": "model card of the 720p model",
        "models": "huggingface/diffusers 58eb52c, scripts/convert_sana_video_to_diffusers.py, 480p; defaults of the classes",
    },
)
ANIMATOR_RECIPES: dict[str, AnimatorRecipe] = {
    name: AnimatorRecipe(name, animator, Z_IMAGE_TURBO, QWEN3_4B_INSTRUCT)
    for name, animator in {
        "ltx-2.3": _LTX2,
        "hunyuanvideo-1.5-i2v": _HUNYUAN,
        "wan2.2-i2v-a14b": _WAN22_I2V,
        "sana-video-2b": _SANA_VIDEO,
    }.items()
}


def find_recipe(name: str | os.PathLike) -> Recipe | AnimatorRecipe | None:
    """Returns the recipe of a name; `None` for an existing folder, which takes precedence, and for a name with a slash.

    Raises:
        `ValueError`: the name has no slash and is neither a folder nor a recipe.
    """
    name = str(name)
    if Path(name).is_dir() or len(Path(name).parts) > 1:
        return None
    known = RECIPES | ANIMATOR_RECIPES
    if name not in known:
        hint = f" Did you mean {name.lower()!r}?" if name.lower() in known else ""
        raise ValueError(f"{name!r} is neither a folder nor a recipe; the recipes are {', '.join(known)}.{hint}")
    return known[name]
