"""Families of image-to-video pipelines of diffusers: how each accepts anchors, and its rules for sizes, lengths and guidance.

Names of arguments, default sizes and lengths, and strides of the VAE are read from the signature of a pipeline's call and the
configs of its models. The table `FAMILIES` holds the other rules. A pipeline that is not in the table is handled by its
signature alone, as a pipeline that accepts a first frame.

Source of all rows: the classes' code in huggingface/diffusers 0.42.1, and the sources named beside values.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import diffusers
import PIL.Image
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict

from ..loading.pipeline_component import call_arguments
from .anchor import Anchor, pictures_of
from .conditioning import latent_index
from .family import AnimatorFamily, anchors_at, sibling_of, temporal_stride


# -- functions from the anchors of a video to arguments of the call: see `family.AnchorArguments` ------------------------


def first_and_last_frame(pipeline: DiffusionPipeline, anchors: Sequence[Anchor], num_frames: int) -> dict[str, Any]:
    return anchors_at(anchors, {0: "image", num_frames - 1: "last_image"})


def ltx_conditions(pipeline: DiffusionPipeline, anchors: Sequence[Anchor], num_frames: int) -> dict[str, Any]:
    condition = _beside(pipeline, "LTXVideoCondition")
    forms = ["video" if isinstance(anchor.image, list) else "image" for anchor in anchors]
    placed = [{"frame_index": anchor.frame_index, "strength": anchor.strength} for anchor in anchors]
    return {"conditions": [condition(**{form: a.image}, **at) for form, a, at in zip(forms, anchors, placed)]}


def ltx2_conditions(pipeline: DiffusionPipeline, anchors: Sequence[Anchor], num_frames: int) -> dict[str, Any]:
    """Returns `conditions`, whose index counts latent frames."""
    condition, stride = _beside(pipeline, "LTX2VideoCondition"), temporal_stride(pipeline)
    made = [condition(anchor.image, latent_index(anchor.frame_index, stride), anchor.strength) for anchor in anchors]
    return {"conditions": made}


def beginning(pipeline: DiffusionPipeline, anchors: Sequence[Anchor], num_frames: int) -> dict[str, Any]:
    """Returns a first frame as `image`, or a run as `video`."""
    return {"video" if isinstance(anchor.image, list) else "image": anchor.image for anchor in anchors}


def beginning_of_cosmos25(pipeline: DiffusionPipeline, anchors: Sequence[Anchor], num_frames: int) -> dict[str, Any]:
    """Returns first frames always as `video`: the pipeline converts `image` to the same, but needs torchvision for it."""
    pictures = [picture for anchor in anchors for picture in pictures_of(anchor.image)]
    if len(pictures) not in (1, 5):
        raise ValueError(
            f"Cosmos-Predict2.5 starts with 1 or 5 frames, but the anchor is a run of {len(pictures)}; give 1 or 5."
        )
    return {"video": pictures, "num_latent_conditional_frames": latent_index(len(pictures) - 1) + 1}


def clip_and_mask(pipeline: DiffusionPipeline, anchors: Sequence[Anchor], num_frames: int) -> dict[str, Any]:
    """Returns a video with grey frames and a mask with white frames where there is no anchor."""
    size: Any = pictures_of(anchors[0].image)[0].size
    clip: list[Any] = [PIL.Image.new("RGB", size, "#808080")] * num_frames
    mask = [PIL.Image.new("RGB", size, "white")] * num_frames
    for anchor in anchors:
        for frame, picture in enumerate(pictures_of(anchor.image), anchor.frame_index):
            clip[frame], mask[frame] = picture, PIL.Image.new("RGB", size, "black")
    return {"video": clip, "mask": mask}


def _beside(pipeline: DiffusionPipeline, name: str) -> Any:
    """Returns a class from the module of a pipeline."""
    found = next(base for base in type(pipeline).__mro__ if base.__module__.startswith("diffusers."))
    return getattr(importlib.import_module(found.__module__), name)


# -- the table --------------------------------------------------------------------------------------------------------


# By default, LTX-2's calls also apply guidance to the sound, to skipped layers and between the two modalities.
_LTX2_UNGUIDED = {"stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}
_LTX2_UNGUIDED |= {"audio_guidance_scale": 1.0} | {f"audio_{name}": value for name, value in _LTX2_UNGUIDED.items()}


def _transformer(pipeline: DiffusionPipeline) -> FrozenDict:
    return (getattr(pipeline, "transformer", None) or pipeline.transformer_2).config


FAMILIES: tuple[AnimatorFamily, ...] = (
    AnimatorFamily(
        # The pipeline would ignore `last_image` silently.
        "Wan2.2-TI2V",
        ("WanImageToVideoPipeline",),
        when=lambda pipeline: pipeline.config.expand_timesteps,
        size_multiple=16,
        # Wan-Video/Wan2.2 42bf4cf, wan/configs/wan_ti2v_5B.py.
        call_defaults={"height": 704, "width": 1280, "num_frames": 121, "frame_rate": 24},
        direct="WanPipeline",
    ),
    AnimatorFamily(
        # The image encoder's tokens of two images have position embeddings.
        "Wan2.1-FLF2V",
        ("WanImageToVideoPipeline",),
        when=lambda pipeline: _transformer(pipeline).pos_embed_seq_len is not None,
        frames="first and last",
        arguments=first_and_last_frame,
        size_multiple=16,
        call_defaults={"height": 720, "width": 1280, "frame_rate": 16},
    ),
    AnimatorFamily(
        "Wan2.1-I2V",
        ("WanImageToVideoPipeline",),
        when=lambda pipeline: _transformer(pipeline).image_dim is not None,
        size_multiple=16,
        call_defaults={"frame_rate": 16},
    ),
    AnimatorFamily(
        "Wan2.2-I2V",
        ("WanImageToVideoPipeline",),
        frames="first or last",
        arguments=first_and_last_frame,
        size_multiple=16,
        call_defaults={"frame_rate": 16},
    ),
    AnimatorFamily(
        # The VAE decodes two latent frames at a time, so an even number of them gives more frames than requested.
        "CogVideoX-I2V",
        ("CogVideoXImageToVideoPipeline",),
        frame_step=lambda pipeline: 2 * pipeline.vae_scale_factor_temporal,
        # zai-org/CogVideo a342972: size and frame rate of CogVideoX 1.0.
        call_defaults={"height": 480, "width": 720, "frame_rate": 8},
    ),
    AnimatorFamily(
        "LTX-Video image-to-video",
        ("LTXImageToVideoPipeline",),
        size_multiple=32,
        direct="LTXPipeline",
    ),
    AnimatorFamily(
        "LTX-Video conditions",
        ("LTXConditionPipeline",),
        frames="any",
        arguments=ltx_conditions,
        strength=True,
        runs=True,
        size_multiple=32,
        direct="LTXConditionPipeline",
        own_schedule=True,
    ),
    AnimatorFamily(
        "LTX-2 image-to-video",
        ("LTX2ImageToVideoPipeline",),
        size_multiple=32,
        call_defaults={"num_frames": 121},
        direct="LTX2Pipeline",
        unguided=_LTX2_UNGUIDED,
    ),
    AnimatorFamily(
        "LTX-2 conditions",
        ("LTX2ConditionPipeline",),
        frames="any",
        arguments=ltx2_conditions,
        strength=True,
        runs=True,
        size_multiple=32,
        call_defaults={"num_frames": 121},
        direct="LTX2ConditionPipeline",
        unguided=_LTX2_UNGUIDED,
    ),
    AnimatorFamily(
        "HunyuanVideo-I2V",
        ("HunyuanVideoImageToVideoPipeline", "HunyuanSkyreelsImageToVideoPipeline"),
        size_multiple=16,
        call_defaults={"frame_rate": 24},
    ),
    AnimatorFamily(
        "HunyuanVideo-1.5-I2V",
        ("HunyuanVideo15ImageToVideoPipeline",),
        call_defaults={"frame_rate": 24},
    ),
    AnimatorFamily(
        "Kandinsky 5 I2V",
        ("Kandinsky5I2VPipeline",),
        size_multiple=16,
        # The pipeline adjusts the colours of the first four latent frames to later ones; without later ones it gives NaN.
        shortest=17,
        call_defaults={"frame_rate": 24},
    ),
    AnimatorFamily(
        "Kandinsky 6",
        ("Kandinsky6TI2VAPipeline",),
        direct="Kandinsky6TI2VAPipeline",
    ),
    AnimatorFamily(
        # The pipeline would ignore the image for a video of one frame.
        "Motif-Video I2V",
        ("MotifVideoImage2VideoPipeline",),
        shortest=5,
        call_defaults={"frame_rate": 24},
        direct="MotifVideoPipeline",
    ),
    AnimatorFamily(
        # Without this argument, the pipeline would use the nearest size of a list instead of the requested one.
        "SANA-Video",
        ("SanaImageToVideoPipeline",),
        size_multiple=32,
        fixed={"use_resolution_binning": False},
        call_defaults={"frame_rate": 16},
        direct="SanaVideoPipeline",
    ),
    AnimatorFamily(
        "SkyReels-V2-I2V",
        ("SkyReelsV2ImageToVideoPipeline",),
        size_multiple=16,
        call_defaults={"frame_rate": 24},
    ),
    AnimatorFamily(
        "SkyReels-V2 diffusion forcing",
        ("SkyReelsV2DiffusionForcingImageToVideoPipeline",),
        frames="first or last",
        arguments=first_and_last_frame,
        size_multiple=16,
        problem=lambda call: (
            "`overlap_history` must be given in `animator_kwargs` for more than `base_num_frames` frames"
            if call["num_frames"] > call.get("base_num_frames", 97) and call.get("overlap_history") is None
            else None
        ),
        direct="SkyReelsV2DiffusionForcingPipeline",
    ),
    AnimatorFamily(
        "Cosmos-Predict2",
        ("Cosmos2VideoToWorldPipeline",),
        arguments=beginning,
        runs=True,
        size_multiple=16,
        requires=("torchvision",),
        own_schedule=True,
    ),
    AnimatorFamily(
        "Cosmos-Predict2.5",
        ("Cosmos2_5_PredictBasePipeline",),
        arguments=beginning_of_cosmos25,
        runs=True,
        size_multiple=16,
        requires=("torchvision",),
        call_defaults={"frame_rate": 16},
        direct="Cosmos2_5_PredictBasePipeline",
        own_schedule=True,
    ),
    AnimatorFamily(
        "Wan-VACE",
        ("WanVACEPipeline",),
        frames="any",
        arguments=clip_and_mask,
        runs=True,
        size_multiple=16,
        call_defaults={"frame_rate": 16},
        direct="WanVACEPipeline",
    ),
    AnimatorFamily(
        "Stable Video Diffusion",
        ("StableVideoDiffusionPipeline",),
        frame_step=lambda pipeline: 1,
        size_multiple=8,
        call_defaults={"num_frames": 14},
        own_schedule=True,
        note="takes no prompt: the prompt describes the first frame only, and the model chooses the motion",
    ),
)


def is_image_to_video(class_name: str, config: Mapping[str, Any] | None = None) -> bool:
    """Returns whether [`family_of`] accepts a pipeline class of diffusers, as far as its signature tells.

    Args:
        class_name (`str`): name of the class.
        config (`Mapping`, *optional*): the pipeline's `model_index.json`. With it, a text-to-video class is accepted only if
            its weights support a first frame.
    """
    kind = getattr(diffusers, class_name, None)
    if not isinstance(kind, type) or not issubclass(kind, DiffusionPipeline):
        return False
    declared = inspect.signature(kind.__call__).parameters
    stand_in = (
        None if config is None else SimpleNamespace(config=SimpleNamespace(**{"expand_timesteps": False, **config}))
    )
    is_known = any(
        class_name in family.pipelines or class_name == family.direct and (stand_in is None or family.when(stand_in))
        for family in FAMILIES
    )
    return is_known or ("image" in declared and bool({"num_frames", "frames"} & declared.keys()))


def with_pictures(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Converts a text-to-video pipeline to image-to-video if its weights support both; returns others unchanged."""
    name = type(pipeline).__name__
    for family in FAMILIES:
        if family.direct == name and name not in family.pipelines and family.when(pipeline):
            return sibling_of(pipeline, family.pipelines[0])
    return pipeline


def family_of(pipeline: DiffusionPipeline) -> AnimatorFamily:
    """Returns the family of a pipeline: a row of the table, or one made from its signature.

    Raises:
        `ValueError`: the pipeline accepts no `image`, or its signature does not say how to call it.
    """
    names = [base.__name__ for base in type(pipeline).__mro__]
    for family in FAMILIES:
        if any(name in names for name in family.pipelines) and family.when(pipeline):
            return family
    name, declared = names[0], call_arguments(pipeline)
    if "image" not in declared or not {"num_frames", "frames"} & declared.keys():
        raise ValueError(
            f"{name} is not an image-to-video pipeline: its call has no `image`, or no `num_frames`. Known families: "
            f"{', '.join(family.name for family in FAMILIES)}."
        )
    family = AnimatorFamily(name, (name,))
    temporal_stride(pipeline)
    return family
