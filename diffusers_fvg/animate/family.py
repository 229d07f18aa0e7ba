"""The rules of a family of image-to-video pipelines of diffusers, and what is read from a pipeline itself."""

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


# `(pipeline, anchors, num_frames)` -> arguments of the call for one video. The anchors have PIL images of the video's size and
# a `frame_index` of at least 0.
AnchorArguments = Callable[[DiffusionPipeline, Sequence[Anchor], int], dict[str, Any]]


def first_frame(pipeline: DiffusionPipeline, anchors: Sequence[Anchor], num_frames: int) -> dict[str, Any]:
    return anchors_at(anchors, {0: "image"})


def anchors_at(anchors: Sequence[Anchor], names: Mapping[int, str]) -> dict[str, Any]:
    """Returns the images under the names of the arguments for their frames; `names` maps frame to argument."""
    return {names[anchor.frame_index]: anchor.image for anchor in anchors}


@dataclass(frozen=True)
class AnimatorFamily:
    """How to call the image-to-video pipelines of one family.

    Args:
        name (`str`): name for messages.
        pipelines (`tuple[str, ...]`): pipeline classes of diffusers.
        when (`Callable`): `when(pipeline)` says whether a pipeline of these classes has a checkpoint of this family.
        frames (`str`): frames that may be anchored: `"first"`, `"first or last"` (the first, and optionally the last),
            `"first and last"` (always both) or `"any"`.
        arguments (`Callable`): converts the anchors of a video to arguments of the call.
        strength (`bool`): whether anchors may have a strength below 1.
        runs (`bool`): whether the video may start with a run of frames.
        frame_step (`Callable`, *optional*): `frame_step(pipeline)` returns the step of lengths, which are `step * k + 1`. The
            VAE's temporal stride when left out.
        size_multiple (`int`): height and width must be multiples of this, and of the VAE's stride times the patch size.
        shortest (`int`): smallest number of frames of a video.
        problem (`Callable`, *optional*): `problem(call)` returns, as text, what is wrong with the arguments of a call under
            the pipeline's names, or `None`.
        requires (`tuple[str, ...]`): packages that the pipeline needs in addition to those that diffusers needs.
        fixed (`Mapping`): arguments of every call.
        call_defaults (`Mapping`): defaults of this package's arguments that the signature does not give.
        direct (`str`, *optional*): the text-to-video class for the same weights.
        own_schedule (`bool`): whether the pipeline sets its own noise levels, so that presets cannot be used.
        unguided (`Mapping`): arguments that switch off guidance other than `guidance_scale`, for presets of distilled
            weights.
        note (`str`): a note for users, logged once.
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
        """Checks the anchors of one video and returns the latent frames that each covers.

        Raises:
            `ValueError`: the family does not support an anchor or needs a further one, or as in [`resolve_anchors`].
        """
        pairs = resolve_anchors(anchors, num_frames, temporal)
        for _, anchor in pairs:
            frame = anchor.frame_index % num_frames
            if frame not in self.frames_of(num_frames):
                raise ValueError(
                    f"{self.name} takes {self._taken}, and no anchor at `frame_index={anchor.frame_index}` of {num_frames} "
                    "frames; leave it out, or use a family that takes anchors at any frame."
                )
            if anchor.strength != 1 and not self.strength:
                raise ValueError(
                    f"{self.name} always keeps anchors fixed and takes no `strength={anchor.strength}`; leave it out."
                )
            count = len(pictures_of(anchor.image))
            if count > 1 and (frame or not self.runs):
                raise ValueError(
                    f"{self.name} takes {'runs only at frame 0' if self.runs else 'single pictures'}, but the anchor at frame "
                    f"{frame} is a run of {count}; give one picture there."
                )
        given = {anchor.frame_index % num_frames for _, anchor in pairs}
        needed = {0} if self.frames in ("first", "first or last") else set()
        needed = {0, num_frames - 1} if self.frames == "first and last" else needed
        if pairs and not needed <= given:
            raise ValueError(
                f"{self.name} needs {self._taken}, but the anchors are at frames {sorted(given)} of {num_frames}; add an "
                f"`Anchor(image, frame_index={min(needed - given)})`."
            )
        return pairs

    def check_call(self, call: Mapping[str, Any], num_frames: int) -> None:
        """Checks the rules of the family that the signature of the call does not show.

        Raises:
            `ValueError`: too few frames, a problem that `problem` returns, or a missing package.
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
        """Returns the frames of a video that may be anchored."""
        return {"first": (0,), "any": range(num_frames)}.get(self.frames, (0, num_frames - 1))

    @property
    def _taken(self) -> str:
        return {
            "first": "a first frame",
            "first or last": "a first frame, and optionally a last frame",
            "first and last": "a first and a last frame",
            "any": "anchors at any frame",
        }[self.frames]


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# -- read from a pipeline ---------------------------------------------------------------------------------------------


def frame_step(pipeline: DiffusionPipeline, family: AnimatorFamily) -> int:
    """Returns the step of lengths: videos have `step * k + 1` frames."""
    return temporal_stride(pipeline) if family.frame_step is None else family.frame_step(pipeline)


def temporal_stride(pipeline: DiffusionPipeline) -> int:
    """Returns the number of frames per latent frame.

    Raises:
        `ValueError`: the pipeline has no attribute for it.
    """
    return _stride(pipeline, "vae_scale_factor_temporal", "vae_temporal_compression_ratio")


def size_multiple(pipeline: DiffusionPipeline, family: AnimatorFamily) -> int:
    """Returns the number that height and width of a video must be multiples of."""
    stride = _stride(pipeline, "vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor")
    config = getattr(getattr(pipeline, "transformer", None), "config", {})
    patch = config.get("patch_size") or 1
    return math.lcm(family.size_multiple, stride * int(patch if isinstance(patch, int) else patch[-1]))


def _stride(pipeline: DiffusionPipeline, *names: str) -> int:
    found = (getattr(pipeline, name, None) for name in names)
    stride = next((value for value in found if value is not None), None)
    if stride is None:
        raise ValueError(
            f"{type(pipeline).__name__} has none of the attributes {names}, which give the stride of its VAE."
        )
    return int(stride)


def guidance_argument(pipeline: DiffusionPipeline) -> str | None:
    """Returns the argument that sets the guidance, or `"guider"` for the component; `None` without guidance."""
    declared = call_arguments(pipeline)
    transformer = getattr(pipeline, "transformer", None)
    embeds = transformer is not None and transformer.config.get("guidance_embeds")
    if "true_cfg_scale" in declared and not embeds:
        return "true_cfg_scale"
    names = (name for name in ("guidance_scale", "max_guidance_scale") if name in declared)
    return next(names, "guider" if getattr(pipeline, "guider", None) is not None else None)


def argument_names(pipeline: DiffusionPipeline) -> dict[str, str]:
    """Maps this package's names of arguments to those of the pipeline's call, where they differ."""
    declared, names = call_arguments(pipeline), {"guidance_scale": guidance_argument(pipeline) or "guidance_scale"}
    for ours, theirs in (("num_frames", "frames"), ("fps", "frame_rate")):
        if ours not in declared and theirs in declared:
            names[ours] = theirs
    return names


def fitting_size(pipeline: DiffusionPipeline, height: int, width: int) -> tuple[int, int]:
    """Returns the size of the video for a requested size; they differ if the pipeline derives its size from the ratio."""
    if "height" in call_arguments(pipeline):
        return height, width
    return pipeline.video_processor.calculate_default_height_width(height, width, pipeline.target_size)


def signature_defaults(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Returns the pipeline's defaults of height, width, number of frames and frame rate."""
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
    """Returns a pipeline of another class of diffusers with the same components."""
    if type(pipeline).__name__ == class_name:
        return copy.copy(pipeline)
    kind, parts = getattr(diffusers, class_name), {**pipeline.config, **pipeline.components}
    made = kind(**{name: parts[name] for name in inspect.signature(kind.__init__).parameters if name in parts})
    made.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
    return made
