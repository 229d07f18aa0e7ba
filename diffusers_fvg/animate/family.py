"""A family of image-to-video pipelines of diffusers: its rules, and what one of its pipelines says of itself."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from ..loading.pipeline_component import call_arguments
from .anchor import Anchor, pictures_of, resolve_anchors


# Anchors of one video to arguments of its call. Their pictures are PIL images of the video's size, their frames counted from 0.
AnchorArguments = Callable[[DiffusionPipeline, Sequence[Anchor], int], dict[str, Any]]


def first_frame(pipeline: DiffusionPipeline, anchors: Sequence[Anchor], num_frames: int) -> dict[str, Any]:
    return anchors_at(anchors, {0: "image"})


def anchors_at(anchors: Sequence[Anchor], names: Mapping[int, str]) -> dict[str, Any]:
    """Pictures by the names of the arguments for their frames."""
    return {names[anchor.frame_index]: anchor.image for anchor in anchors}


@dataclass(frozen=True)
class AnimatorFamily:
    """How image-to-video pipelines of one kind are called.

    Args:
        name (`str`): for messages.
        pipelines (`tuple[str, ...]`): classes of diffusers.
        when (`Callable`): which checkpoints of these classes, told by the pipeline that holds one.
        frames (`str`): which frames may be anchored: `"first"`, `"first or last"` (a last one beside the first),
            `"first and last"` (both, always) or `"any"`.
        arguments (`Callable`): anchors of a video to arguments of its call.
        strength (`bool`): anchors may have a strength below 1.
        runs (`bool`): the video may begin with a run of frames.
        frame_step (`Callable`, *optional*): of a pipeline: lengths are this times k, plus 1. Left out: the VAE's temporal
            stride.
        size_multiple (`int`): height and width are multiples of it, as of the VAE's stride times the patch.
        shortest (`int`): frames that a video has at the least.
        problem (`Callable`, *optional*): of the arguments of a call, by the pipeline's names: what the pipeline would refuse or
            get wrong, as text.
        requires (`tuple[str, ...]`): packages that the pipeline imports and diffusers does without.
        fixed (`Mapping`): arguments of every call.
        call_defaults (`Mapping`): of this package's arguments, where the signature has none.
        direct (`str`, *optional*): the class that makes video of text alone with the same weights.
        own_schedule (`bool`): the pipeline sets noise levels of its own, which a preset would not fit.
        unguided (`Mapping`): arguments that switch off what guides beside `guidance_scale`, for a preset of distilled weights.
        note (`str`): what a user should know, said once.
    """

    name: str
    pipelines: tuple[str, ...]
    when: Callable[[DiffusionPipeline], bool] = lambda pipeline: True
    frames: str = "first"
    arguments: AnchorArguments = first_frame
    strength: bool = False
    runs: bool = False
    frame_step: Callable[[DiffusionPipeline], int] | None = None
    size_multiple: int = 1
    shortest: int = 1
    problem: Callable[[Mapping[str, Any]], str | None] = lambda call: None
    requires: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    call_defaults: Mapping[str, Any] = field(default_factory=dict)
    direct: str | None = None
    own_schedule: bool = False
    unguided: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    # -- rules --------------------------------------------------------------------------------------------------------

    def resolve(self, anchors: Sequence[Anchor], num_frames: int, temporal: int) -> list[tuple[range, Anchor]]:
        """Checks the anchors of one video and says which latents each stands for.

        Raises:
            `ValueError`: what the family does not take, or as in [`resolve_anchors`].
        """
        pairs = resolve_anchors(anchors, num_frames, temporal)
        for _, anchor in pairs:
            frame = anchor.frame_index % num_frames
            if frame not in self.frames_of(num_frames):
                raise ValueError(
                    f"{self.name} takes {self._taken}, and no anchor at `frame_index={anchor.frame_index}` of {num_frames} frames; "
                    "leave it out, or use a family that takes anchors at any frame."
                )
            if anchor.strength != 1 and not self.strength:
                raise ValueError(
                    f"{self.name} keeps its anchors as they are and takes no `strength={anchor.strength}`; leave it out."
                )
            count = len(pictures_of(anchor.image))
            if count > 1 and (frame or not self.runs):
                raise ValueError(
                    f"{self.name} takes {'runs at frame 0 alone' if self.runs else 'single pictures'}, and the anchor at frame "
                    f"{frame} is a run of {count}; give one picture there."
                )
        given = {anchor.frame_index % num_frames for _, anchor in pairs}
        needed = {0} if self.frames in ("first", "first or last") else set()
        needed = {0, num_frames - 1} if self.frames == "first and last" else needed
        if pairs and not needed <= given:
            raise ValueError(
                f"{self.name} needs {self._taken}, but of {num_frames} frames {sorted(given)} are given; add an "
                f"`Anchor(image, frame_index={min(needed - given)})`."
            )
        return pairs

    def check_call(self, call: Mapping[str, Any], num_frames: int) -> None:
        """Checks what the signature of the call does not say.

        Raises:
            `ValueError`: too few frames, a problem of the family's own, or a package that is not there.
        """
        if num_frames < self.shortest:
            raise ValueError(
                f"`num_frames={num_frames}`: {self.name} makes no video of fewer than {self.shortest} frames."
            )
        problem = self.problem({**call, "num_frames": num_frames})
        if problem:
            raise ValueError(f"{self.name}: {problem}.")
        absent = [name for name in self.requires if not is_installed(name)]
        if absent:
            raise ValueError(f"{self.name} needs {', '.join(absent)}: `pip install {' '.join(absent)}`.")

    def frames_of(self, num_frames: int) -> Sequence[int]:
        """Frames of a video that may be anchored."""
        return {"first": (0,), "any": range(num_frames)}.get(self.frames, (0, num_frames - 1))

    @property
    def _taken(self) -> str:
        return {
            "first": "a first frame",
            "first or last": "a first frame and a last one beside it",
            "first and last": "a first and a last frame",
            "any": "frames at any place",
        }[self.frames]


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# -- what a pipeline itself says --------------------------------------------------------------------------------------


def frame_step(pipeline: DiffusionPipeline, family: AnimatorFamily) -> int:
    """Lengths of a video are this times k, plus 1."""
    return temporal_stride(pipeline) if family.frame_step is None else family.frame_step(pipeline)


def temporal_stride(pipeline: DiffusionPipeline) -> int:
    """Frames of a latent.

    Raises:
        `ValueError`: the pipeline does not say.
    """
    return _stride(pipeline, "vae_scale_factor_temporal", "vae_temporal_compression_ratio")


def size_multiple(pipeline: DiffusionPipeline, family: AnimatorFamily) -> int:
    """Height and width of a video are multiples of this."""
    stride = _stride(pipeline, "vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor")
    config = getattr(getattr(pipeline, "transformer", None), "config", {})
    patch = config.get("patch_size") or 1
    return math.lcm(family.size_multiple, stride * int(patch if isinstance(patch, int) else patch[-1]))


def _stride(pipeline: DiffusionPipeline, *names: str) -> int:
    found = (getattr(pipeline, name, None) for name in names)
    stride = next((value for value in found if value is not None), None)
    if stride is None:
        raise ValueError(f"{type(pipeline).__name__} has none of {names}, which say the strides of its VAE.")
    return int(stride)


def guidance_argument(pipeline: DiffusionPipeline) -> str | None:
    """What `guidance_scale` becomes: an argument of the call, or `"guider"`, a component; `None` where nothing guides."""
    declared = call_arguments(pipeline)
    transformer = getattr(pipeline, "transformer", None)
    embeds = transformer is not None and transformer.config.get("guidance_embeds")
    if "true_cfg_scale" in declared and not embeds:
        return "true_cfg_scale"
    names = (name for name in ("guidance_scale", "max_guidance_scale") if name in declared)
    return next(names, "guider" if getattr(pipeline, "guider", None) is not None else None)


def argument_names(pipeline: DiffusionPipeline) -> dict[str, str]:
    """Argument of this package -> that of the pipeline's call, where the names differ."""
    declared, names = call_arguments(pipeline), {"guidance_scale": guidance_argument(pipeline) or "guidance_scale"}
    for ours, theirs in (("num_frames", "frames"), ("fps", "frame_rate")):
        if ours not in declared and theirs in declared:
            names[ours] = theirs
    return names


def fitting_size(pipeline: DiffusionPipeline, height: int, width: int) -> tuple[int, int]:
    """The size of a video that is asked for as `height` x `width`: another where the picture's shape alone decides."""
    if "height" in call_arguments(pipeline):
        return height, width
    return pipeline.video_processor.calculate_default_height_width(height, width, pipeline.target_size)


def signature_defaults(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Height, width, length and frame rate of a call that does not say."""
    declared, found = call_arguments(pipeline), {}
    for ours, theirs in (("height", ()), ("width", ()), ("num_frames", ("frames",)), ("frame_rate", ("fps",))):
        for name in (ours, *theirs):
            default = declared[name].default if name in declared else None
            if isinstance(default, (int, float)) and not isinstance(default, bool):
                found[ours] = default
    if "height" not in declared:
        found["height"], found["width"] = fitting_size(pipeline, 720, 1280)
    return found


def sibling_of(pipeline: DiffusionPipeline, class_name: str) -> DiffusionPipeline:
    """A pipeline of another class of diffusers and of the same components."""
    if type(pipeline).__name__ == class_name:
        return copy.copy(pipeline)
    kind, parts = getattr(diffusers, class_name), {**pipeline.config, **pipeline.components}
    made = kind(**{name: parts[name] for name in inspect.signature(kind.__init__).parameters if name in parts})
    made.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
    return made
