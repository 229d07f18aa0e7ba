"""Factorized Video Generation as Modular Diffusers blocks: one block per stage, which can be removed, replaced or added to.

`ModularPipeline.from_pretrained(repository)` loads these blocks for every repository of a [`FactorizedVideoPipeline`]. The
blocks only move values between the state and the stage functions: `FirstFrameRewriter.rewrite_outcomes`,
`AnchorComposer.compose` or with a judge [`~compose.candidates.draw_candidates`], and `animate` and `decode` of the pipeline.

```py
import torch, diffusers_fvg
from diffusers import ModularPipeline

pipe = ModularPipeline.from_pretrained("org/fvg")
pipe.load_components(dtype=torch.bfloat16)
videos = pipe(prompt="A red circle moves to the right", output="videos")
```
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, overload

import PIL.Image
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, ModularPipeline, SchedulerMixin
from diffusers.modular_pipelines import (
    ComponentSpec,
    ConditionalPipelineBlocks,
    ConfigSpec,
    InputParam,
    ModularPipelineBlocks,
    OutputParam,
    PipelineState,
    SequentialPipelineBlocks,
)
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from ..animate.anchor import Anchor
from ..animate.light_decoder import LightDecoder
from ..animate.stock_weights import configured_as
from ..animate.transformer_anchor import AnchorConditionedTransformer3D
from ..checks import as_generators, check_texts
from ..compose.candidates import best_candidate, draw_candidates
from ..compose.composer import AnchorComposer
from ..compose.judge import AnchorJudge
from ..loading.patches import add_modular
from ..lora.anchor_lora import AnchorLora
from ..rewrite.rewriter import FirstFrameRewriter
from ..schedules.presets import SchedulerPresets
from .candidates import NO_COMPOSER, candidate_count
from .pipeline_factorized_video import FactorizedVideoPipeline
from .request_checks import NO_REWRITER
from .seeds import anchor_seeds


MODEL_NAME = "factorized-video"
# The modes of `FactorizedVideoPipeline` that these blocks support.
MODES = ("factorized", "direct")
# For latents, remove the last block from the workflow.
OUTPUT_TYPES = ("np", "uint8", "pt", "pil")
# Components and settings of the pipeline, from its `__init__`.
COMPONENTS, SETTINGS = FactorizedVideoPipeline._get_signature_keys(FactorizedVideoPipeline)

INPUTS = {
    param.name: param
    for param in (
        InputParam("prompt", str | list[str], description="Descriptions of the videos."),
        InputParam("mode", str, "factorized", description='"factorized", or "direct" for plain text-to-video.'),
        InputParam("first_frame_prompt", str | list[str], description="Captions of the first frames: skips stage 1."),
        InputParam("image", PIL.Image.Image | list, description="Images of the first frames: skips stages 1 and 2."),
        InputParam("anchors", Anchor | list, description="Anchors at any frames: skips stages 1 and 2."),
        InputParam("negative_prompt", str | list[str], description="For the video model; its default when left out."),
        InputParam("height", int, description="Height in pixels; the model's default when left out."),
        InputParam("width", int, description="Width in pixels; the model's default when left out."),
        InputParam("num_frames", int, description="4k + 1; the model's default when left out."),
        InputParam("num_inference_steps", int, description="Steps of the video model; the preset's when left out."),
        InputParam("guidance_scale", float, description="Guidance scale; 1 is off; the preset's when left out."),
        InputParam("guidance_scale_2", float, description="Guidance scale of the low-noise expert."),
        InputParam("num_videos_per_prompt", int, 1, description="Videos per prompt, each with its own anchor."),
        InputParam("generator", torch.Generator | list | int, description="A generator, a seed, or one per video."),
        InputParam("latents", torch.Tensor, description="Unit Gaussian start of the videos, (B, C, f, h, w)."),
        InputParam("prompt_embeds", torch.Tensor, description="(B, L, D), instead of the prompt."),
        InputParam("negative_prompt_embeds", torch.Tensor, description="(B, L, D), instead of the negative prompt."),
        InputParam("attention_kwargs", dict, description="Arguments for the transformer's attention."),
        InputParam("max_sequence_length", int, description="Text tokens of the video model."),
        InputParam("preset", str, description="Name of a scheduler preset."),
        InputParam("rewriter_max_new_tokens", int, description="Largest number of tokens of stage 1's answer."),
        InputParam("composer_num_inference_steps", int, description="Steps of stage 2."),
        InputParam("composer_guidance_scale", float, description="Guidance of stage 2."),
        InputParam("composer_negative_prompt", str | list[str], description="Negative prompt of stage 2."),
        InputParam("composer_num_candidates", int, description="Largest number of images for the judge."),
        InputParam("rewrites", list, description="Outcomes of stage 1 for the captions, with its plans."),
        InputParam("output_type", str, "np", description='"np", "uint8", "pt" or "pil".'),
    )
}
# Arguments of `FactorizedVideoPipeline.animate` except prompts, anchors and output type.
VIDEO_INPUTS = (
    "negative_prompt",
    "height",
    "width",
    "num_frames",
    "num_inference_steps",
    "guidance_scale",
    "guidance_scale_2",
    "num_videos_per_prompt",
    "generator",
    "latents",
    "prompt_embeds",
    "negative_prompt_embeds",
    "attention_kwargs",
    "max_sequence_length",
    "preset",
)
# Arguments of `AnchorComposer.check_call`, in its order.
COMPOSER_INPUTS = ("composer_num_inference_steps", "composer_guidance_scale", "composer_negative_prompt")
# Arguments that decide which stages run, and arguments of stages 1 and 2.
CALL_INPUTS: tuple[str, ...]
CALL_INPUTS = ("prompt", "mode", "first_frame_prompt", "image", "anchors", "rewriter_max_new_tokens", *COMPOSER_INPUTS)
CALL_INPUTS += ("composer_num_candidates",)
CALL_DEFAULTS = ConfigSpec("call_defaults", None, "Defaults of the model for arguments that a call leaves out.")


def _inputs(*names: str, required: tuple[str, ...] = ()) -> list[InputParam]:
    """Returns new `InputParam`s, because blocks that combine others change theirs."""
    return [replace(INPUTS[name], required=name in required) for name in (*required, *names)]


@overload
def _as_list(texts: None) -> None: ...
@overload
def _as_list(texts: str | list[str]) -> list[str]: ...
def _as_list(texts: str | list[str] | None) -> list[str] | None:
    return [texts] if isinstance(texts, str) else texts


def _as_anchors(image: Any) -> list[Anchor] | list[list[Anchor]]:
    """Makes anchors from one image for all videos, or from a list with one for each prompt or each video."""
    return [[Anchor(picture)] for picture in image] if isinstance(image, (list, tuple)) else [Anchor(image)]


# -- blocks -----------------------------------------------------------------------------------------------------------


class _Step(ModularPipelineBlocks):
    model_name = MODEL_NAME

    def __call__(self, components: FactorizedVideoModularPipeline, state: PipelineState):
        block_state = self.get_block_state(state)
        self.run(components, block_state)
        self.set_block_state(state, block_state)
        return components, state


class _VideoStep(_Step):
    """A step that needs the video model."""

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [
            ComponentSpec("tokenizer", PreTrainedTokenizerBase),
            ComponentSpec("text_encoder", UMT5EncoderModel),
            ComponentSpec("transformer", AnchorConditionedTransformer3D),
            ComponentSpec("transformer_2", AnchorConditionedTransformer3D),
            ComponentSpec("vae", AutoencoderKLWan),
            ComponentSpec("scheduler", SchedulerMixin),
            ComponentSpec("anchor_lora", AnchorLora),
            ComponentSpec("schedulers", SchedulerPresets),
        ]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return [
            ConfigSpec("boundary_ratio", None, "Noise level in [0, 1] below which `transformer_2` is used."),
            ConfigSpec("expand_timesteps", False, "Whether the base was trained on clean first frames."),
            CALL_DEFAULTS,
        ]


class InputStep(_VideoStep):
    """Checks all inputs before a model runs, and sets size and generator."""

    description = (
        "Checks all inputs before a model runs, and sets the default size and the generator if they are not given."
    )

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs(*CALL_INPUTS, *VIDEO_INPUTS, "output_type")

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("height", int, "Height of the video in pixels."),
            OutputParam("width", int, "Width of the video in pixels."),
            OutputParam("generator", torch.Generator, "Draws all noise; its `initial_seed()` repeats the run."),
        ]

    def run(self, components: FactorizedVideoModularPipeline, block_state) -> None:
        if block_state.mode not in MODES:
            raise ValueError(f"Unknown mode {block_state.mode!r}; use one of {MODES}.")
        if block_state.output_type not in OUTPUT_TYPES:
            raise ValueError(f"Unknown `output_type` {block_state.output_type!r}; use one of {OUTPUT_TYPES}.")
        arguments = {name: block_state[name] for name in (*CALL_INPUTS, *VIDEO_INPUTS)} | {"output_type": "latent"}
        given = [name for name in ("first_frame_prompt", "image", "anchors") if block_state[name] is not None]
        if block_state.mode == "factorized" and not given:
            # The blocks of the workflow decide how the first frame is made.
            del arguments["mode"]
        pipeline = components.pipeline
        request = pipeline._request(arguments)
        composer = getattr(components, "composer", None)
        if request.mode is None and composer is not None:
            composer.check_call(request.num_videos, *(block_state[name] for name in COMPOSER_INPUTS))
            candidate_count(pipeline, block_state.composer_num_candidates, "composer_num_candidates")
        block_state.height, block_state.width = request.height, request.width
        block_state.generator = request.with_generator()[0].generator


class RewriteStep(_Step):
    """Stage 1, [`FirstFrameRewriter.rewrite_outcomes`]. It can run alone, without the other components."""

    description = "Stage 1: a language model writes a caption of the first frame for each prompt."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("rewriter", FirstFrameRewriter)]

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs("rewriter_max_new_tokens", required=("prompt",))

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("first_frame_prompt", list[str], "One caption per prompt."),
            OutputParam("rewrites", list, "Outcome of stage 1 for each caption, with its plan."),
        ]

    def run(self, components: FactorizedVideoModularPipeline, block_state) -> None:
        if components.rewriter is None:
            raise ValueError(NO_REWRITER)
        prompts = _as_list(block_state.prompt)
        check_texts("prompt", prompts)
        block_state.rewrites = components.rewriter.rewrite_outcomes(
            prompts, max_new_tokens=block_state.rewriter_max_new_tokens
        )
        block_state.first_frame_prompt = [outcome.made for outcome in block_state.rewrites]


class ComposeStep(_Step):
    """Stage 2, [`AnchorComposer.compose`], and the choice by a judge. It can run alone, without the other components."""

    description = (
        "Stage 2: a text-to-image pipeline draws the first frame of each video, or with a judge the best of several."
    )

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("composer", AnchorComposer), ComponentSpec("anchor_judge", AnchorJudge)]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return [CALL_DEFAULTS]

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs(
            "num_videos_per_prompt",
            "composer_num_inference_steps",
            "composer_guidance_scale",
            "composer_negative_prompt",
            "composer_num_candidates",
            "rewrites",
            required=("first_frame_prompt", "height", "width", "generator"),
        )

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("image", list[PIL.Image.Image], "One image of `height` x `width` per video."),
            OutputParam("candidates", list, "Images that the judge chose from, per video, or `None`."),
        ]

    def run(self, components: FactorizedVideoModularPipeline, block_state) -> None:
        if components.composer is None:
            raise ValueError(NO_COMPOSER)
        captions = _as_list(block_state.first_frame_prompt)
        plans = [outcome.plan for outcome in block_state.rewrites or ()] or [None] * len(captions)
        captions, plans = (
            [item for item in items for _ in range(block_state.num_videos_per_prompt)] for items in (captions, plans)
        )
        check_texts("first_frame_prompt", captions)
        count = candidate_count(components, block_state.composer_num_candidates, "composer_num_candidates")
        seeds = anchor_seeds(as_generators(block_state.generator), len(captions))
        negative = block_state.composer_negative_prompt

        def draw(numbers: list[int], seeds: list[int]) -> list[PIL.Image.Image]:
            return components.composer.compose(
                [captions[number] for number in numbers],
                height=block_state.height,
                width=block_state.width,
                num_inference_steps=block_state.composer_num_inference_steps,
                guidance_scale=block_state.composer_guidance_scale,
                negative_prompt=[negative[number] for number in numbers] if isinstance(negative, list) else negative,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            )

        if count == 1:
            block_state.image, block_state.candidates = draw(list(range(len(captions))), seeds), None
            return
        block_state.candidates = draw_candidates(draw, components.anchor_judge, captions, plans, seeds, count)
        block_state.image = [best_candidate(drawn).image for drawn in block_state.candidates]


class AnchorStep(_Step):
    """Makes [`Anchor`]s from images."""

    description = "Makes anchors (given frames of the video) from the images."

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs("image", "anchors")

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("anchors", list, "One list of anchors for all videos, or one per prompt or per video.")]

    def run(self, components: FactorizedVideoModularPipeline, block_state) -> None:
        if block_state.image is None and block_state.anchors is None:
            raise ValueError("There is no first frame: pass `image` or `anchors`, or add blocks of stages 1 and 2.")
        if block_state.image is not None:
            block_state.anchors = _as_anchors(block_state.image)


class DenoiseStep(_VideoStep):
    """Stage 3, [`FactorizedVideoPipeline.animate`], without decoding."""

    description = "Stage 3: the video model animates the anchors; without anchors, plain text-to-video."

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs("prompt", "anchors", *VIDEO_INPUTS)

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("latents", torch.Tensor, "Normalised latents of the videos, (B, C, f, h, w).")]

    def run(self, components: FactorizedVideoModularPipeline, block_state) -> None:
        inputs = {name: block_state[name] for name in VIDEO_INPUTS}
        block_state.latents = components.pipeline.animate(
            block_state.prompt, block_state.anchors, output_type="latent", **inputs
        )


class DecodeStep(_VideoStep):
    """Decodes latents with [`FactorizedVideoPipeline.decode`]."""

    description = "Decodes the latents to frames."

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs("output_type", required=("latents",))

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("videos", list, 'Frames as `output_type` says: (B, F, H, W, 3) in [0, 1] for "np".')]

    def run(self, components: FactorizedVideoModularPipeline, block_state) -> None:
        block_state.videos = components.pipeline.decode(block_state.latents, block_state.output_type)


class _Skippable(ConditionalPipelineBlocks):
    """Runs its one block unless the mode is direct or the caller passes the block's result."""

    def select_block(self, mode: str | None = None, **given: Any) -> str | None:
        brought = any(value is not None for value in given.values())
        return None if mode == "direct" or brought else self.block_names[0]


class AutoRewriteStep(_Skippable):
    block_classes, block_names = [RewriteStep], ["rewrite"]
    block_trigger_inputs = ["mode", "first_frame_prompt", "image", "anchors"]
    description = "Stage 1, skipped by `first_frame_prompt`, `image`, `anchors` and the direct mode."


class AutoComposeStep(_Skippable):
    block_classes, block_names = [ComposeStep], ["compose"]
    block_trigger_inputs = ["mode", "image", "anchors"]
    description = "Stage 2, skipped by `image`, `anchors` and the direct mode."


class AutoAnchorStep(_Skippable):
    block_classes, block_names = [AnchorStep], ["anchor"]
    block_trigger_inputs = ["mode"]
    description = "Makes anchors from images, skipped in the direct mode."


class FactorizedVideoBlocks(SequentialPipelineBlocks):
    """The blocks of all stages. `ModularPipeline.from_pretrained(repository, workflow=...)` leaves out the stages that the
    workflow skips, and their models.
    """

    model_name = MODEL_NAME
    block_classes = [InputStep, AutoRewriteStep, AutoComposeStep, AutoAnchorStep, DenoiseStep, DecodeStep]
    block_names = ["input", "rewrite", "compose", "anchor", "denoise", "decode"]
    description = (
        "Factorized Video Generation (arXiv 2512.16371): an LLM describes the first frame, a text-to-image model draws it, "
        "a video model animates it."
    )
    _workflow_map = {
        "text2video": {"prompt": True},
        "caption2video": {"first_frame_prompt": True},
        "image2video": ({"image": True}, {"anchors": True}),
        "direct": {"mode": "direct"},
    }

    @property
    def outputs(self) -> list[OutputParam]:
        return self.sub_blocks["decode"].intermediate_outputs


# -- pipeline ---------------------------------------------------------------------------------------------------------


class _Components(FactorizedVideoPipeline):
    """Loads any subset of components as the pipeline does: from the Hub, by reference, each in its dtype."""

    _optional_components = sorted(COMPONENTS)
    required_components = ()

    @configured_as(FactorizedVideoPipeline)
    def __init__(self, **parts: Any):
        DiffusionPipeline.__init__(self)
        self.register_modules(**{name: parts.pop(name) for name in COMPONENTS})
        self.register_to_config(**parts)


class FactorizedVideoModularPipeline(ModularPipeline):
    """The modular pipeline that `ModularPipeline.from_pretrained` loads for a [`FactorizedVideoPipeline`]'s repository."""

    default_blocks_name = "FactorizedVideoBlocks"
    # As on `FactorizedVideoPipeline`: called with each anchor before its video is generated; decodes instead of the VAE.
    safety_checker: Callable[[PIL.Image.Image], bool | str | None] | None = FactorizedVideoPipeline.safety_checker
    light_decoder: LightDecoder | None = None
    _progress_bar_config: dict[str, Any] = {}

    @property
    def call_defaults(self) -> dict[str, Any]:
        """The `call_defaults` of the repository."""
        return self.config.get("call_defaults") or {}

    @property
    def pipeline(self) -> FactorizedVideoPipeline:
        """A [`FactorizedVideoPipeline`] with the same components, for its stage methods, LoRA loading and offloading."""
        pipeline = FactorizedVideoPipeline(
            **{name: getattr(self, name, None) for name in COMPONENTS},
            **{name: self.config[name] for name in SETTINGS if name in self.config},
        )
        # A stock video model is converted only once.
        self.transformer = pipeline.transformer
        if pipeline.transformer_2 is not None:
            self.transformer_2 = pipeline.transformer_2
        pipeline.safety_checker, pipeline.light_decoder = self.safety_checker, self.light_decoder
        pipeline.set_progress_bar_config(**self._progress_bar_config)
        return pipeline

    def load_components(self, names: list[str] | str | None = None, workflow: str | None = None, **kwargs) -> None:
        """Loads components as `DiffusionPipeline.from_pretrained` does.

        Args:
            names (`str` or `list[str]`, *optional*): components; all that are not yet loaded when left out.
            workflow (`str`, *optional*): loads the components of this workflow; used instead of `names`.
            kwargs (*optional*): arguments of `DiffusionPipeline.from_pretrained`, such as `dtype`, `token` or `revision`.

        Raises:
            `ValueError`: a name is not a component of these blocks, or both `names` and `workflow` are given.
        """
        if names is not None and workflow is not None:
            raise ValueError(f"Pass `names={names!r}` or `workflow={workflow!r}`, not both.")
        if workflow is not None:
            names = [spec.name for spec in self.blocks.get_workflow(workflow).expected_components]
        names = self.null_component_names if names is None else _as_list(names)
        unknown = sorted(set(names) - set(self.component_names))
        if unknown:
            raise ValueError(
                f"{unknown} are not among the components of these blocks: {sorted(self.component_names)}."
            )
        left_out = {name: None for name in COMPONENTS if name not in names}
        loaded = _Components.from_pretrained(self._pretrained_model_name_or_path, **left_out, **kwargs)
        self.register_components(**{name: getattr(loaded, name) for name in names})

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Saves a repository that both pipelines can load; see [`FactorizedVideoPipeline.save_pretrained`]."""
        self.pipeline.save_pretrained(save_directory, **kwargs)

    def set_progress_bar_config(self, **kwargs) -> None:
        self._progress_bar_config = kwargs
        super().set_progress_bar_config(**kwargs)


add_modular(MODEL_NAME, FactorizedVideoPipeline, FactorizedVideoModularPipeline)
