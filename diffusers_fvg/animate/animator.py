"""Stage 3 with any image-to-video pipeline of diffusers, which animates the anchor image."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging

from ..checks import stop_unless_finite
from ..loading.pipeline_component import PipelineComponent, call_arguments
from ..locks import exclusive, lockable
from ..schedules.distilled import DISTILLED_ANIMATOR_PRESETS
from ..schedules.pinned import pinned_scheduler
from ..schedules.presets import TIMESTEP_SCHEDULERS, SchedulerPreset, SchedulerPresets, timestep_preset, unipc_preset
from .anchor import Anchor, fit_picture, picture_image, pictures_of
from .families import family_of, with_pictures
from .family import AnimatorFamily, argument_names, guidance_argument, sibling_of
from .stock_call import finite_decoding, seeded_steps


logger = logging.get_logger(__name__)

CONFIG_NAME = "animator_config.json"
# Steps of the preset with fewer steps: Factorized Video Generation, arXiv 2512.16371.
REDUCED_STEPS = 15


class Stopped(Exception):
    """Raised to stop a pipeline that has no `interrupt`."""


@dataclass(frozen=True)
class Animation:
    """The videos of one call.

    Args:
        frames (`list`): frames of each video, in the format of the output type; fewer videos than prompts if stopped.
        audio (`list[torch.Tensor]`): sound track `(channels, samples)` of each video, if the family generates one.
    """

    frames: list[Any]
    audio: list[torch.Tensor]


class AnchorAnimator(PipelineComponent):
    """Any diffusers image-to-video pipeline as the component for stage 3, which animates the anchor image.

    The table in [`~animate.families`] says how pipelines of each family are called. Videos are generated one at a time: most
    families take one image per call, and a large model is not faster with more. So each video equals that of the pipeline
    called alone with the same image and generator.

    Args:
        pipeline (`DiffusionPipeline`): returns `frames` for an image. Its progress bar is switched off. A text-to-video
            pipeline whose weights also accept a first frame, such as `LTX2Pipeline`, is converted to the image-to-video
            pipeline of these weights.
        call_defaults (`dict`, *optional*): arguments of each call of the pipeline, under the pipeline's own names, such as
            `motion_bucket_id` or `decode_timestep`.
        reference (`dict`, *optional*): the Hub `repository` of the pipeline and its `revision`. With it, `save_pretrained`
            writes the reference and no weights; set it to `None` to save the weights.

    Raises:
        `ValueError`: `pipeline` is not an image-to-video pipeline, or it does not have an argument in `call_defaults`.
    """

    config_name = CONFIG_NAME
    # Arguments that each call sets.
    own_arguments = frozenset(
        "self image last_image video conditions prompt generator output_type return_dict callback_on_step_end latents "
        "callback_on_step_end_tensor_inputs num_videos_per_prompt prompt_embeds negative_prompt_embeds height width "
        "num_frames frames".split()
    )

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        call_defaults: dict[str, Any] | None = None,
        reference: dict[str, str] | None = None,
    ):
        super().__init__(with_pictures(pipeline), call_defaults, reference)
        pipeline = self.pipeline
        self.family: AnimatorFamily = family_of(pipeline)
        self._check_known(pipeline, self.call_defaults)

    @property
    def presets(self) -> SchedulerPresets:
        """Presets with 15 steps and with the pipeline's default number of steps, then those of the family's distilled weights.

        The first two have explicit sigmas at the flow shift of the pipeline's scheduler. They are missing for schedulers
        whose shift depends on the video's size, and for pipelines that set their own noise levels.
        """
        return SchedulerPresets.of(*_presets(self), *DISTILLED_ANIMATOR_PRESETS.get(self.family.name, ()))

    @property
    def num_inference_steps(self) -> int:
        """Default number of steps of a call."""
        default = call_arguments(self.pipeline)["num_inference_steps"].default
        return self.call_defaults.get("num_inference_steps", default)

    @property
    def guidance_scale(self) -> float | None:
        """Default guidance scale of a call; `None` for a pipeline without guidance."""
        argument = guidance_argument(self.pipeline)
        if argument == "guider":
            return float(self.pipeline.guider.guidance_scale)
        if argument is None:
            return None
        return self.call_defaults.get(argument, call_arguments(self.pipeline)[argument].default)

    @property
    def audio_sampling_rate(self) -> int | None:
        """Sampling rate of the sound track in samples per second; `None` for a family without sound."""
        vocoder = getattr(self.pipeline, "vocoder", None)
        rate = None if vocoder is None else vocoder.config.get("output_sampling_rate")
        return getattr(self.pipeline, "audio_sample_rate", None) if rate is None else rate

    def text_to_video(self) -> DiffusionPipeline:
        """Returns a text-to-video pipeline with the same components.

        Raises:
            `ValueError`: the family has no such pipeline.
        """
        if self.family.direct is None:
            raise ValueError(
                f"{self.family.name} makes no video without a first frame: its text-to-video models have other weights. Use "
                '`mode="factorized"`, or give `image`.'
            )
        return sibling_of(self.pipeline, self.family.direct)

    # -- a call -------------------------------------------------------------------------------------------------------

    def check_call(
        self,
        arguments: dict[str, Any],
        num_frames: int,
        preset: SchedulerPreset | None = None,
        direct: bool = False,
    ) -> None:
        """Checks the arguments of a call of [`animate`] without running a model.

        Args:
            arguments (`dict`): as in [`animate`], and `negative_prompt`.
            num_frames (`int`): frames of the videos.
            preset (*optional*): as in [`animate`].
            direct (`bool`): whether the videos have no anchors.

        Raises:
            `ValueError`: the pipeline does not have an argument, or cannot sample with the preset.
        """
        pipeline = self.text_to_video() if direct else copy.copy(self.pipeline)
        self.family.check_call(self._call_of(pipeline, arguments), num_frames)
        if preset is None:
            terminal = getattr(pipeline.scheduler, "config", {}).get("shift_terminal")
            if terminal and arguments.get("num_inference_steps") == 1:
                raise ValueError(
                    f"`num_inference_steps=1`: the scheduler of {self.family.name} ends at `shift_terminal={terminal}`, which "
                    "needs at least 2 steps."
                )
            return
        if self.family.own_schedule:
            raise ValueError(
                f"`preset={preset.name!r}`: {self.family.name} sets its own noise levels; leave it out and give "
                "`num_inference_steps`."
            )
        if preset.guidance_interval != (0.0, 1.0) or preset.anchor_window is not None:
            raise ValueError(
                f"`preset={preset.name!r}` has a guidance interval or an anchor window, which {self.family.name} does not "
                "support; use another preset."
            )

    def animate(
        self,
        prompts: Sequence[str],
        anchors: Sequence[Sequence[Anchor]],
        height: int,
        width: int,
        num_frames: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        negative_prompt: Sequence[str] | None = None,
        preset: SchedulerPreset | None = None,
        output_type: str = "np",
        arguments: dict[str, Any] | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        on_progress: Callable[[int, int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Animation:
        """Generates one video per prompt.

        Args:
            prompts (`list[str]`): descriptions of the videos.
            anchors (`list[list[Anchor]]`): anchors of each video, already checked by the family. A video without anchors is
                generated from text alone.
            height, width, num_frames (`int`): size of the videos in pixels, and their frames.
            generator (`torch.Generator` or one per prompt, *optional*): for reproducible videos.
            negative_prompt (`list[str]`, *optional*): one per prompt.
            preset (`SchedulerPreset`, *optional*): used instead of the pipeline's own scheduler.
            output_type (`str`): `"np"`, `"uint8"`, `"pt"`, `"pil"` or `"latent"`.
            arguments (`dict`, *optional*): arguments of the call: `num_inference_steps`, `guidance_scale`,
                `guidance_scale_2`, `fps`, `max_sequence_length`, `attention_kwargs`, and others under the pipeline's own
                names. For arguments that are `None`, `call_defaults` apply, then the pipeline's defaults.
            callback_on_step_end, callback_on_step_end_tensor_inputs (*optional*): as in the pipeline's call.
            on_progress (`Callable`, *optional*): `on_progress(step, steps)`, counted over all videos; called after each step.
            should_stop (`Callable`, *optional*): called at the same times. Once it returns `True`, generation stops.

        Returns:
            [`Animation`]: the videos, fewer than prompts if stopped.

        Raises:
            `ValueError`: the pipeline does not have an argument.
            `FloatingPointError`: a step or the decoder gave values that are not finite.
        """
        should_stop = should_stop or (lambda: False)
        frames, audio = [], []
        for video, prompt in enumerate(prompts):
            if should_stop():
                break
            pipeline = copy.copy(self.pipeline) if anchors[video] else self.text_to_video()
            negative = {"negative_prompt": None if negative_prompt is None else negative_prompt[video]}
            call = self._call_of(pipeline, self._sampling(pipeline, arguments or {}, preset) | negative)
            pictures = [_as_pictures(anchor, height, width, num_frames) for anchor in anchors[video]]
            call |= self.family.arguments(pipeline, pictures, num_frames) if pictures else {}
            call |= self._named(
                pipeline, {"prompt": prompt, "height": height, "width": width, "num_frames": num_frames}
            )
            call["generator"] = generator[video] if isinstance(generator, list) else generator
            call["output_type"] = "np" if output_type == "uint8" else output_type
            steps = _Steps(pipeline, video, len(prompts), callback_on_step_end, on_progress, should_stop)
            steps.listen(call, callback_on_step_end_tensor_inputs)
            try:
                output = self(pipeline, **call)
            except Stopped:
                break
            frames.append(_first(output.frames, output_type))
            if output_type != "latent" and len(frames[-1]) != num_frames:
                logger.warning(
                    f"{self.family.name} made {len(frames[-1])} frames instead of `num_frames={num_frames}`: this package does not "
                    "know which lengths it supports."
                )
            if getattr(output, "audio", None) is not None:
                audio.append(_as_sound(output.audio[0]))
        return Animation(frames, audio)

    @torch.no_grad()
    def forward(self, pipeline: DiffusionPipeline, **arguments) -> Any:
        """Calls a pipeline. Offloading moves a component when its `forward` is called, so its models run only in here.

        Args:
            pipeline (`DiffusionPipeline`): the animator's pipeline, or another one with the same models.
            arguments: arguments of the pipeline's call.
        """
        self._show_offload_hooks()
        parts = lockable(pipeline.components.values())
        with (
            exclusive(*parts),
            seeded_steps(pipeline, arguments.get("generator")),
            finite_decoding(pipeline, "animate"),
        ):
            return pipeline(**arguments)

    # -- arguments ----------------------------------------------------------------------------------------------------

    def _sampling(
        self, pipeline: DiffusionPipeline, arguments: dict[str, Any], preset: SchedulerPreset | None
    ) -> dict[str, Any]:
        """Sets the preset's scheduler in the pipeline, and returns the arguments with the preset's guidance and steps."""
        if preset is None:
            return arguments
        pipeline.scheduler = pinned_scheduler(preset, arguments.get("num_inference_steps"))
        given = {name: value for name, value in arguments.items() if value is not None}
        named = {"num_inference_steps": preset.num_inference_steps, "guidance_scale": preset.guidance_scale}
        if preset.guidance_scale_2 is not None or "guidance_scale_2" in self.call_defaults:
            second = preset.guidance_scale_2
            named["guidance_scale_2"] = preset.guidance_scale if second is None else second
        if preset.weights:
            declared = call_arguments(pipeline)
            named |= {name: value for name, value in self.family.unguided.items() if name in declared}
        return named | given

    def _call_of(self, pipeline: DiffusionPipeline, arguments: dict[str, Any]) -> dict[str, Any]:
        """Returns the arguments of the pipeline's call under its own names, with `call_defaults` and the family's arguments.

        Raises:
            `ValueError`: the pipeline does not have an argument, or this call sets it itself.
        """
        given = {name: value for name, value in arguments.items() if value is not None}
        taken = sorted(given.keys() & self.own_arguments)
        if taken:
            raise ValueError(f"`animator_kwargs` holds {taken}; pass them as arguments of the call instead.")
        if "guidance_scale" in given and guidance_argument(pipeline) is None:
            raise ValueError(
                f"`guidance_scale={given['guidance_scale']}`: {self.family.name} has no guidance; leave it out."
            )
        renamed = self._named(pipeline, given)
        scale = renamed.pop("guider", None)
        if scale is not None:
            pipeline.guider = pipeline.guider.new(guidance_scale=scale)
        self._check_known(pipeline, renamed)
        declared = call_arguments(pipeline)
        # A text-to-video pipeline does not have all of the arguments.
        defaults = {
            name: value for name, value in {**self.family.fixed, **self.call_defaults}.items() if name in declared
        }
        return defaults | renamed

    def _named(self, pipeline: DiffusionPipeline, arguments: dict[str, Any]) -> dict[str, Any]:
        """Renames arguments to the pipeline's own names. Prompt, size and length are omitted if the pipeline has none."""
        names, declared = argument_names(pipeline), call_arguments(pipeline)
        renamed = {names.get(name, name): value for name, value in arguments.items() if value is not None}
        always = ("prompt", "height", "width", "num_frames")
        return {name: value for name, value in renamed.items() if name in declared or name not in always}

    def _check_known(self, pipeline: DiffusionPipeline, arguments: dict[str, Any]) -> None:
        unknown = sorted(arguments.keys() - call_arguments(pipeline).keys())
        if unknown:
            raise ValueError(
                f"{self.family.name} ({type(pipeline).__name__}) has no argument {', '.join(unknown)}; leave it out."
            )


class _Steps:
    """Called after each step of one video: checks the latents, calls the user's callback, reports progress, and stops."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        video: int,
        num_videos: int,
        callback: Callable | None,
        on_progress: Callable[[int, int], None] | None,
        should_stop: Callable[[], bool],
    ):
        self.pipeline, self.callback, self.on_progress, self.should_stop = pipeline, callback, on_progress, should_stop
        self.video, self.num_videos, self.done = video, num_videos, 0

    def listen(self, call: dict[str, Any], tensor_inputs: Sequence[str]) -> None:
        """Adds itself to a call as the callback, or as the progress bar of a pipeline that has no callback."""
        if "callback_on_step_end" in call_arguments(self.pipeline):
            call["callback_on_step_end"] = self
            call["callback_on_step_end_tensor_inputs"] = list(tensor_inputs)
        else:
            # This pipeline object is a copy, so the original keeps its progress bar.
            self.pipeline.progress_bar = functools.partial(_Bar, self)

    def __call__(
        self, pipeline: DiffusionPipeline, step: int, timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        self.done += 1
        steps = max(self.done, len(getattr(pipeline.scheduler, "timesteps", ())))
        for name, values in tensors.items():
            if name == "latents":
                stop_unless_finite("animate", values, step=f"step {self.done} of {steps}")
        changed = tensors if self.callback is None else self.callback(pipeline, step, timestep, tensors) or {}
        if self.on_progress is not None:
            self.on_progress(self.video * steps + self.done, self.num_videos * steps)
        if self.should_stop():
            # The pipeline skips the remaining steps and decodes the current latents.
            pipeline._interrupt = True
            if not hasattr(type(pipeline), "interrupt") and self.done < steps:
                raise Stopped
        return changed


class _Bar:
    """A progress bar that shows nothing and reports each update as a step."""

    def __init__(self, steps: _Steps, iterable: Any = None, total: int | None = None):
        self.steps = steps

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: Any) -> None:
        return

    def update(self, count: int = 1) -> None:
        self.steps(self.steps.pipeline, self.steps.done, None, {})


def _as_pictures(anchor: Anchor, height: int, width: int, num_frames: int) -> Anchor:
    """Converts an anchor to PIL images of the video's size and a `frame_index` from 0. 8-bit images keep their values."""
    pictures = [picture_image(fit_picture(picture, height, width)) for picture in pictures_of(anchor.image)]
    image = pictures[0] if len(pictures) == 1 else pictures
    return replace(anchor, image=image, frame_index=anchor.frame_index % num_frames)


def _as_sound(samples: torch.Tensor | np.ndarray) -> torch.Tensor:
    """Returns a sound track as `(channels, samples)`; some pipelines return mono without the channel axis."""
    sound = torch.as_tensor(samples)
    return sound[None] if sound.ndim == 1 else sound


def _first(frames: Any, output_type: str) -> Any:
    """Returns the only video of an output: `(F, H, W, 3)`, `(F, 3, H, W)` or a list of images; latents keep their batch."""
    if output_type == "latent":
        return frames
    video = frames[0]
    if output_type == "uint8":
        return (video * 255).round().astype(np.uint8)
    return video


def joined(videos: list[Any], output_type: str) -> Any:
    """Joins the videos of [`Animation.frames`] to the output format of diffusers' pipelines."""
    if output_type == "pil" or not videos:
        return videos
    if output_type == "latent":
        return torch.cat(videos)
    return torch.stack(videos) if output_type == "pt" else np.stack(videos)


def _presets(animator: AnchorAnimator) -> list[SchedulerPreset]:
    scheduler, family = animator.pipeline.scheduler, animator.family
    if family.own_schedule:
        return []
    scale = 1.0 if animator.guidance_scale is None else float(animator.guidance_scale)
    full = animator.num_inference_steps
    names = {REDUCED_STEPS: f"anchored-{REDUCED_STEPS}", full: f"full-{full}"}
    kind, config = type(scheduler).__name__, {key: value for key, value in scheduler.config.items() if key[0] != "_"}
    source = f"arXiv 2512.16371: 15 steps; scheduler and guidance of {family.name}'s pipeline"
    if kind in TIMESTEP_SCHEDULERS:
        return [timestep_preset(name, kind, config, steps, scale, source) for steps, name in names.items()]
    shift = config.get("flow_shift", config.get("shift"))
    is_flow = config.get("use_flow_sigmas") or kind == "FlowMatchEulerDiscreteScheduler"
    if not is_flow or shift is None or config.get("use_dynamic_shifting"):
        return []
    return [unipc_preset(name, steps, shift, scale, source) for steps, name in names.items()]
