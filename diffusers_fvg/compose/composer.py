"""Stage 2: a text-to-image pipeline draws the anchor image."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor

from ..animate.anchor import picture_image
from ..animate.stock_call import finite_decoding, seeded_steps
from ..checks import (
    MAX_STEPS,
    Generators,
    as_generators,
    check_at_least_one,
    check_generators,
    check_negative_texts,
    check_texts,
    stop_unless_finite,
)
from ..loading.pipeline_component import PipelineComponent, call_arguments
from ..locks import exclusive, lockable
from .guidance import check_negative_prompt, guided_call, with_negative_prompt


CONFIG_NAME = "composer_config.json"
# Image-to-image strength of a derived image. A lower value keeps more of the source image, but fewer objects reach their new
# places: 100 % of the moved objects of the shapes world at 0.95, 83 % at 0.85, 75 % at 0.75 (synthetic).
DERIVE_STRENGTH = 0.95


class AnchorComposer(PipelineComponent):
    """Any diffusers text-to-image pipeline as the component for stage 2, which draws the anchor image.

    Only a component that is an `nn.Module` gets the requested dtype, moves with `.to()` and can be offloaded. So the models
    of the inner pipeline are children of this module, and run only within its `forward`. A text-to-video pipeline draws
    images with `call_defaults={"num_frames": 1}`.

    Args:
        pipeline (`DiffusionPipeline`): returns `images` or `frames` for a `prompt`. Its progress bar is switched off.
        call_defaults (`dict`, *optional*): arguments of each call of the pipeline, such as `num_inference_steps`,
            `guidance_scale` or `max_sequence_length`. With `height` and `width`, the pipeline draws at this size, and the
            image is then scaled and cropped to the requested size.
        batch_size (`int`, *optional*): images drawn at once. More need more memory, and are not faster with a large model.
        reference (`dict`, *optional*): the Hub `repository` of the pipeline and its `revision`. With it, `save_pretrained`
            writes the reference and no weights; set it to `None` to save the weights.
        derive_strength (`float`, *optional*): `strength`, in (0, 1], of the image-to-image pipeline in [`derive`]. `None`
            always derives by shared noise.

    Raises:
        `ValueError`: `pipeline` is not a text-to-image pipeline, or an argument or call default is not valid for it.
    """

    config_name = CONFIG_NAME
    settings = ("call_defaults", "batch_size", "derive_strength")
    # Arguments that `compose` itself passes to the pipeline.
    own_arguments = frozenset(
        (
            "self",
            "prompt",
            "generator",
            "output_type",
            "return_dict",
            "callback_on_step_end",
            "latents",
            "prompt_embeds",
        )
    )

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        call_defaults: dict[str, Any] | None = None,
        batch_size: int = 1,
        reference: dict[str, str] | None = None,
        derive_strength: float | None = DERIVE_STRENGTH,
    ):
        super().__init__(pipeline, call_defaults, reference)
        check_at_least_one("batch_size", batch_size)
        if derive_strength is not None and not 0 < derive_strength <= 1:
            raise ValueError(f"`derive_strength={derive_strength}` must lie in (0, 1], or be None for shared noise.")
        self.batch_size = batch_size
        self.derive_strength = derive_strength
        _check_draws_from_text(pipeline)
        self._arguments_of(pipeline, 1)

    # -- the stage ----------------------------------------------------------------------------------------------------

    def compose(
        self,
        prompts: list[str],
        height: int,
        width: int,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: Generators = None,
        negative_prompt: str | list[str] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[PIL.Image.Image]:
        """Draws one image per prompt.

        Args:
            prompts (`list[str]`): captions of first frames.
            height, width (`int`): size of the images in pixels. Unless `call_defaults` set a size, the pipeline draws at this
                size and must support it.
            num_inference_steps, guidance_scale, negative_prompt (*optional*): arguments of the pipeline. When left out,
                `call_defaults` apply, then the pipeline's defaults. `guidance_scale` is passed under the name that the
                pipeline uses for guidance ([`~compose.guidance`]).
            generator (`torch.Generator`, its seed, or a list with one per prompt, *optional*): for reproducible images.
            on_progress (`Callable`, *optional*): `on_progress(step, steps)`, counted over all prompts; called after each
                step, or after each image if the pipeline has no `callback_on_step_end`.
            should_stop (`Callable`, *optional*): called at the same times. Once it returns `True`, drawing stops.

        Returns:
            `list[PIL.Image.Image]`: RGB images of `height` x `width`, fewer than prompts if stopped.

        Raises:
            `ValueError`: the pipeline does not have an argument, an argument would have no effect, or the pipeline refuses
                its value.
            `FloatingPointError`: latents or images are not finite.
        """
        generator = as_generators(generator)
        arguments = self._call_of(
            self.pipeline, prompts, height, width, num_inference_steps, guidance_scale, generator, negative_prompt
        )
        pictures = self._draw(
            self.pipeline, prompts, None, arguments, self.batch_size, generator, on_progress, should_stop
        )
        return [_fit(picture, height, width) for picture in pictures]

    def derive(
        self,
        images: list[PIL.Image.Image],
        prompts: list[str],
        height: int,
        width: int,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: Generators = None,
        negative_prompt: str | list[str] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[PIL.Image.Image]:
        """Draws one image per prompt that shows a later moment of the scene in an existing image.

        If diffusers has an image-to-image or editing pipeline of the composer's family (`AutoPipelineForImage2Image`), that
        pipeline shares the composer's models and draws from `images` with `derive_strength`, one image at a time. Other
        families, including video models, draw from the caption alone. **Shared noise** then keeps the scene similar, which
        requires generators with the seeds that drew `images`.

        Args:
            images (`list[PIL.Image.Image]`): one source image per prompt.
            prompts (`list[str]`): captions of the later moments.
            height, width, num_inference_steps, guidance_scale, negative_prompt, on_progress, should_stop: as in [`compose`].
                Image-to-image pipelines run only the fraction `derive_strength` of the steps.
            generator (`torch.Generator`, its seed, or a list with one per prompt, *optional*): seeded as for `images`.

        Returns:
            `list[PIL.Image.Image]`: RGB images of `height` x `width`, fewer than prompts if stopped.

        Raises:
            `ValueError`: as in [`compose`], or `images` and `prompts` differ in number.
        """
        if len(images) != len(prompts):
            raise ValueError(f"`images` has {len(images)} images for {len(prompts)} prompts; give one for each.")
        generator = as_generators(generator)
        options = (num_inference_steps, guidance_scale, generator, negative_prompt)
        if self.image_to_image_class is None:
            return self.compose(prompts, height, width, *options, on_progress, should_stop)
        pipeline = self._image_to_image()
        arguments = self._call_of(pipeline, prompts, height, width, *options)
        size = [self.call_defaults.get(name, value) for name, value in (("height", height), ("width", width))]
        sources = [_fit(picture_image(image), *size) for image in images]
        if "strength" in call_arguments(pipeline):
            arguments["strength"] = self.derive_strength
        # One at a time: some pipelines take several images as several sources of one image.
        pictures = self._draw(pipeline, prompts, sources, arguments, 1, generator, on_progress, should_stop)
        return [_fit(picture, height, width) for picture in pictures]

    @property
    def image_to_image_class(self) -> type[DiffusionPipeline] | None:
        """The image-to-image pipeline of diffusers that [`derive`] uses; `None` if it uses shared noise."""
        tables, name = _auto_pipelines(), type(self.pipeline).__name__
        drawing = tables.AUTO_TEXT2IMAGE_PIPELINES_MAPPING
        families = (family for family, made in drawing.items() if made.__name__ == name)
        family = None if self.derive_strength is None else next(families, None)
        return tables.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING.get(family)

    def check_call(
        self,
        num_prompts: int,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        derive: bool = False,
    ) -> None:
        """Checks the arguments of a call of [`compose`] without running a model.

        Args:
            num_prompts (`int`): number of images to draw.
            num_inference_steps, guidance_scale, negative_prompt (*optional*): as in [`compose`].
            derive (`bool`): whether to check them for [`derive`] as well.

        Raises:
            `ValueError`: the pipeline does not have an argument, or an argument would have no effect.
        """
        pipelines = [self.pipeline]
        if derive and self.image_to_image_class is not None:
            pipelines.append(self._image_to_image())
        for pipeline in pipelines:
            self._arguments_of(pipeline, num_prompts, num_inference_steps, guidance_scale, negative_prompt)

    def _image_to_image(self) -> DiffusionPipeline:
        """Returns a new image-to-image pipeline with the current components and settings of the text-to-image pipeline."""
        pipeline = _auto_pipelines().AutoPipelineForImage2Image.from_pipe(self.pipeline)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _call_of(
        self,
        pipeline: DiffusionPipeline,
        prompts: list[str],
        height: int,
        width: int,
        num_inference_steps: int | None,
        guidance_scale: float | None,
        generator: torch.Generator | list[torch.Generator] | None,
        negative_prompt: str | list[str] | None,
    ) -> dict[str, Any]:
        """Checks the arguments and returns those of the pipeline's call that all prompts share."""
        check_texts("prompts", prompts)
        check_generators(generator, len(prompts), "prompts")
        size = {"height": height, "width": width}
        if pipeline is not self.pipeline:
            # An image-to-image pipeline may take its size from the image.
            size = {name: value for name, value in size.items() if name in call_arguments(pipeline)}
        return size | self._arguments_of(pipeline, len(prompts), num_inference_steps, guidance_scale, negative_prompt)

    def _arguments_of(
        self,
        pipeline: DiffusionPipeline,
        num_prompts: int,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
    ) -> dict[str, Any]:
        """Returns the checked arguments of a pipeline's call, with `call_defaults` for those that are `None`."""
        check_at_least_one("num_inference_steps", num_inference_steps, MAX_STEPS)
        check_negative_texts("negative_prompt", negative_prompt, num_prompts)
        asked = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "negative_prompt": negative_prompt,
        }
        asked = guided_call(pipeline, {name: value for name, value in asked.items() if value is not None})
        defaults = guided_call(pipeline, self.call_defaults)
        if pipeline is not self.pipeline:
            # An image-to-image pipeline does not have all arguments of the text-to-image pipeline.
            defaults = {name: value for name, value in defaults.items() if name in call_arguments(pipeline)}
        unknown = sorted((asked.keys() | defaults.keys()) - call_arguments(pipeline).keys())
        if unknown:
            raise ValueError(f"{type(pipeline).__name__} has no argument {', '.join(unknown)}; leave it out.")
        arguments = defaults | asked
        # A call may switch guidance off even if `call_defaults` have a negative prompt.
        if not asked or "negative_prompt" in asked:
            check_negative_prompt(pipeline, arguments)
        return with_negative_prompt(pipeline, arguments)

    def _draw(
        self,
        pipeline: DiffusionPipeline,
        prompts: list[str],
        images: list[PIL.Image.Image] | None,
        arguments: dict[str, Any],
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        on_progress: Callable[[int, int], None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> list[PIL.Image.Image]:
        """Calls a pipeline batch by batch; `images` and lists of generators or negative prompts have one item per prompt."""
        should_stop = should_stop or (lambda: False)
        has_callback = "callback_on_step_end" in call_arguments(pipeline)
        batches = range(0, len(prompts), batch_size)
        pictures: list[PIL.Image.Image] = []
        for number, begin in enumerate(batches):
            if should_stop():
                break
            chunk = slice(begin, begin + batch_size)
            call = arguments | {"prompt": list(prompts[chunk])}
            call["generator"] = generator[chunk] if isinstance(generator, list) else generator
            if images is not None:
                call["image"] = images[chunk]
            negative = call.get("negative_prompt")
            if negative is not None:
                call["negative_prompt"] = (
                    [negative] * len(call["prompt"]) if isinstance(negative, str) else negative[chunk]
                )
            stopped = False

            def after_step(pipeline, step: int, timestep, tensors: dict, done: int = number) -> dict:
                nonlocal stopped
                place = f"step {step + 1} of {pipeline.num_timesteps}"
                for latents in tensors.values():
                    stop_unless_finite("compose", latents, step=place)
                if on_progress is not None:
                    on_progress(done * pipeline.num_timesteps + step + 1, len(batches) * pipeline.num_timesteps)
                if should_stop():
                    # The pipeline skips the remaining steps. An image whose last step is done is kept.
                    pipeline._interrupt = True
                    stopped = step + 1 < pipeline.num_timesteps
                return tensors

            if has_callback:
                call["callback_on_step_end"] = after_step
            drawn = self(pipeline, **call)
            if stopped:
                break
            pictures += drawn
            if on_progress is not None and not has_callback:
                on_progress(number + 1, len(batches))
        return pictures

    @torch.no_grad()
    def forward(self, pipeline: DiffusionPipeline, **arguments) -> list[PIL.Image.Image]:
        """Calls a pipeline. Offloading moves a component when its `forward` is called, so its models run only in here.

        Args:
            pipeline (`DiffusionPipeline`): the composer's pipeline, or another one with the same models.
            arguments: arguments of the pipeline's call.

        Returns:
            `list[PIL.Image.Image]`: each image, or the first frame of each video.

        Raises:
            `FloatingPointError`: a result is not finite.
        """
        self._show_offload_hooks()
        generator = arguments.get("generator")
        parts = lockable(pipeline.components.values())
        with exclusive(*parts), seeded_steps(pipeline, generator), finite_decoding(pipeline, "compose"):
            # Arrays show values that are not finite, which would be black or white in a PIL image.
            output = pipeline(**arguments, output_type="np")
        frames = output.images if hasattr(output, "images") else [frames[0] for frames in output.frames]
        for picture in frames:
            stop_unless_finite("compose", torch.from_numpy(picture), self.dtype)
        return VaeImageProcessor.numpy_to_pil(np.stack(frames))


def _auto_pipelines() -> ModuleType:
    """Returns diffusers' module of auto pipelines. Importing it imports the pipelines of all families, which takes seconds."""
    # Silences warnings of transformers that image processors of families that are not used here lack torchvision.
    logger = logging.getLogger("transformers.utils.import_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return importlib.import_module("diffusers.pipelines.auto_pipeline")
    finally:
        logger.setLevel(level)


def _check_draws_from_text(pipeline: DiffusionPipeline) -> None:
    """Raises `ValueError` for a pipeline that takes no prompt, or that also needs an image."""
    declared, kind = call_arguments(pipeline), type(pipeline)
    if "prompt" not in declared:
        raise ValueError(f"{kind.__name__} takes no `prompt`: choose a text-to-image pipeline.")
    # Image-to-image and inpainting pipelines of diffusers have `strength`; in other libraries the name may mean anything.
    starts_from_a_picture = "strength" in declared and kind.__module__.startswith("diffusers.pipelines.")
    if starts_from_a_picture or ("image" in declared and declared["image"].default is declared["image"].empty):
        raise ValueError(
            f"{kind.__name__} draws from an image, but a composer has only a text: choose the text-to-image pipeline of its "
            "family, such as `AutoPipelineForText2Image.from_pipe(pipeline)`."
        )


def _fit(picture: PIL.Image.Image, height: int, width: int) -> PIL.Image.Image:
    """Scales an image until it covers `height` x `width`, and crops the centre."""
    return PIL.ImageOps.fit(picture.convert("RGB"), (width, height))
