"""Factorized Video Generation as Modular Diffusers blocks: the stages one by one, to leave out, replace and insert between.

`ModularPipeline.from_pretrained(repository)` finds them for every repository of a [`FactorizedVideoPipeline`]. The blocks
only move values between the state and the stage functions: `FirstFrameRewriter.rewrite_outcomes`, `AnchorComposer.compose`,
[`~compose.candidates.draw_candidates`] where there is a judge, and `animate` and `decode` of [`FactorizedVideoPipeline`].

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
# Of the plain pipeline's modes those that these blocks have.
MODES = ("factorized", "direct")
# Latents are those of the workflow without its last block.
OUTPUT_TYPES = ("np", "uint8", "pt", "pil")
# Components and settings of the pipeline, from its `__init__`.
COMPONENTS, SETTINGS = FactorizedVideoPipeline._get_signature_keys(FactorizedVideoPipeline)

INPUTS = {
    param.name: param
    for param in (
        InputParam("prompt", str | list[str], description="What should happen in the videos."),
        InputParam("mode", str, "factorized", description='"factorized", or "direct" for plain text-to-video.'),
        InputParam("first_frame_prompt", str | list[str], description="Captions of the first frames: skips stage 1."),
        InputParam("image", PIL.Image.Image | list, description="Pictures of the first frames: skips stages 1 and 2."),
        InputParam("anchors", Anchor | list, description="Anchors at any frames: skips stages 1 and 2."),
        InputParam("negative_prompt", str | list[str], description="For the video model; its own when left out."),
        InputParam("height", int, description="Pixels of the video; the model's own when left out."),
        InputParam("width", int, description="Pixels of the video; the model's own when left out."),
        InputParam("num_frames", int, description="4k + 1; the model's own when left out."),
        InputParam("num_inference_steps", int, description="Steps of the video model; the preset's when left out."),
        InputParam("guidance_scale", float, description="Of the video model, 1 is off; the preset's when left out."),
        InputParam("guidance_scale_2", float, description="Of the low-noise expert."),
        InputParam("num_videos_per_prompt", int, 1, description="Each video gets a picture of its own."),
        InputParam("generator", torch.Generator | list | int, description="One, its seed, or one per video."),
        InputParam("latents", torch.Tensor, description="Unit Gaussian start of the videos, (B, C, f, h, w)."),
        InputParam("prompt_embeds", torch.Tensor, description="(B, L, D), in place of the prompt."),
        InputParam("negative_prompt_embeds", torch.Tensor, description="(B, L, D), in place of the negative prompt."),
        InputParam("attention_kwargs", dict, description="Passed on to the transformer."),
        InputParam("max_sequence_length", int, description="Text tokens of the video model."),
        InputParam("preset", str, description="Name of a scheduler preset."),
        InputParam("rewriter_max_new_tokens", int, description="Limit of stage 1's answer."),
        InputParam("composer_num_inference_steps", int, description="Steps of stage 2."),
        InputParam("composer_guidance_scale", float, description="Guidance of stage 2."),
        InputParam("composer_negative_prompt", str | list[str], description="Negative prompt of stage 2."),
        InputParam("composer_num_candidates", int, description="The most pictures that the judge chooses from."),
        InputParam("rewrites", list, description="How stage 1 came to the captions, with its plans."),
        InputParam("output_type", str, "np", description='"np", "uint8", "pt" or "pil".'),
    )
}
# What `FactorizedVideoPipeline.animate` takes, beside the prompts, the anchors and the form of its result.
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
# Of `AnchorComposer.check_call`, in its order.
COMPOSER_INPUTS = ("composer_num_inference_steps", "composer_guidance_scale", "composer_negative_prompt")
# What says which stages run, and what those before the third take.
CALL_INPUTS: tuple[str, ...]
CALL_INPUTS = ("prompt", "mode", "first_frame_prompt", "image", "anchors", "rewriter_max_new_tokens", *COMPOSER_INPUTS)
CALL_INPUTS += ("composer_num_candidates",)
CALL_DEFAULTS = ConfigSpec("call_defaults", None, "The model's own values of a call, used where a call gives none.")


def _inputs(*names: str, required: tuple[str, ...] = ()) -> list[InputParam]:
    """New ones each time: the blocks that combine them change them."""
    return [replace(INPUTS[name], required=name in required) for name in (*required, *names)]


@overload
def _as_list(texts: None) -> None: ...
@overload
def _as_list(texts: str | list[str]) -> list[str]: ...
def _as_list(texts: str | list[str] | None) -> list[str] | None:
    return [texts] if isinstance(texts, str) else texts


def _as_anchors(image: Any) -> list[Anchor] | list[list[Anchor]]:
    """One picture for all videos, or a list with one for each prompt or each video."""
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
            ConfigSpec("boundary_ratio", None, "Share of the times below which `transformer_2` takes over."),
            ConfigSpec("expand_timesteps", False, "The base has a native first-frame mode."),
            CALL_DEFAULTS,
        ]


class InputStep(_VideoStep):
    """Checks everything before a model runs, and settles size and seeds."""

    description = (
        "Checks all inputs before a model runs, fills in the model's size and draws seeds where none are given."
    )

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs(*CALL_INPUTS, *VIDEO_INPUTS, "output_type")

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("height", int, "Pixels of the video."),
            OutputParam("width", int, "Pixels of the video."),
            OutputParam("generator", torch.Generator, "What draws all noise; its `initial_seed()` repeats the run."),
        ]

    def run(self, components: FactorizedVideoModularPipeline, block_state) -> None:
        if block_state.mode not in MODES:
            raise ValueError(f"Unknown mode {block_state.mode!r}; use one of {MODES}.")
        if block_state.output_type not in OUTPUT_TYPES:
            raise ValueError(f"Unknown `output_type` {block_state.output_type!r}; use one of {OUTPUT_TYPES}.")
        arguments = {name: block_state[name] for name in (*CALL_INPUTS, *VIDEO_INPUTS)} | {"output_type": "latent"}
        given = [name for name in ("first_frame_prompt", "image", "anchors") if block_state[name] is not None]
        if block_state.mode == "factorized" and not given:
            # Whether a picture will be there is for the blocks to say that a workflow consists of.
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
    """Stage 1, [`FirstFrameRewriter.rewrite_outcomes`]. Runs by itself: it needs no other component."""

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
            OutputParam("rewrites", list, "How stage 1 came to each caption, with its plan."),
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
    """Stage 2, [`AnchorComposer.compose`], and the choice of a judge. Runs by itself: it needs no other component."""

    description = (
        "Stage 2: a text-to-image pipeline draws the first frame of each video, the best of several with a judge."
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
            OutputParam("image", list[PIL.Image.Image], "One picture of `height` x `width` per video."),
            OutputParam("candidates", list, "Of each video the pictures among which the judge chose, or `None`."),
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
    """From pictures to [`Anchor`]s."""

    description = "Makes the pictures anchors: frames of the video that are given."

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs("image", "anchors")

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("anchors", list, "One list of anchors for all videos, or one per prompt or per video.")]

    def run(self, components: FactorizedVideoModularPipeline, block_state) -> None:
        if block_state.image is None and block_state.anchors is None:
            raise ValueError("There is no first frame: pass `image` or `anchors`, or let the stages before make it.")
        if block_state.image is not None:
            block_state.anchors = _as_anchors(block_state.image)


class DenoiseStep(_VideoStep):
    """Stage 3, [`FactorizedVideoPipeline.animate`] up to its latents."""

    description = "Stage 3: the video model animates the anchors; plain text-to-video without any."

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
    """[`FactorizedVideoPipeline.decode`]."""

    description = "Decodes the latents to frames."

    @property
    def inputs(self) -> list[InputParam]:
        return _inputs("output_type", required=("latents",))

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("videos", list, 'Frames, in the form of `output_type`: (B, F, H, W, 3) in [0, 1] for "np".')
        ]

    def run(self, components: FactorizedVideoModularPipeline, block_state) -> None:
        block_state.videos = components.pipeline.decode(block_state.latents, block_state.output_type)


class _Skippable(ConditionalPipelineBlocks):
    """Runs its one block unless the call is direct or brings what the block would make."""

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
    description = "Pictures to anchors, skipped in the direct mode."


class FactorizedVideoBlocks(SequentialPipelineBlocks):
    """All stages. `ModularPipeline.from_pretrained(repository, workflow=...)` leaves out those that a workflow skips, and
    their models.
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
    """Loads components as the pipeline does (from the Hub, by reference, each in its dtype), but any of them alone."""

    _optional_components = sorted(COMPONENTS)
    required_components = ()

    @configured_as(FactorizedVideoPipeline)
    def __init__(self, **parts: Any):
        DiffusionPipeline.__init__(self)
        self.register_modules(**{name: parts.pop(name) for name in COMPONENTS})
        self.register_to_config(**parts)


class FactorizedVideoModularPipeline(ModularPipeline):
    """What `ModularPipeline.from_pretrained` makes of a [`FactorizedVideoPipeline`]'s repository."""

    default_blocks_name = "FactorizedVideoBlocks"
    # As on the plain pipeline: shown each anchor before its video is computed.
    safety_checker: Callable[[PIL.Image.Image], bool | str | None] | None = FactorizedVideoPipeline.safety_checker
    _progress_bar_config: dict[str, Any] = {}

    @property
    def call_defaults(self) -> dict[str, Any]:
        """Those that the repository names."""
        return self.config.get("call_defaults") or {}

    @property
    def pipeline(self) -> FactorizedVideoPipeline:
        """The same components as a [`FactorizedVideoPipeline`], for its stage methods, LoRA loading and offloading."""
        pipeline = FactorizedVideoPipeline(
            **{name: getattr(self, name, None) for name in COMPONENTS},
            **{name: self.config[name] for name in SETTINGS if name in self.config},
        )
        # A stock video model is taken over once, not each time.
        self.transformer = pipeline.transformer
        if pipeline.transformer_2 is not None:
            self.transformer_2 = pipeline.transformer_2
        pipeline.safety_checker = self.safety_checker
        pipeline.set_progress_bar_config(**self._progress_bar_config)
        return pipeline

    def load_components(self, names: list[str] | str | None = None, workflow: str | None = None, **kwargs) -> None:
        """Loads components as `DiffusionPipeline.from_pretrained` does.

        Args:
            names (`str` or `list[str]`, *optional*): of components; all that the blocks use and that are not there yet.
            workflow (`str`, *optional*): in place of `names`, what the blocks of a workflow use.
            kwargs (*optional*): of `DiffusionPipeline.from_pretrained`, such as `dtype`, `token`, `cache_dir` or
                `revision`.

        Raises:
            `ValueError`: a name that is no component of these blocks, or both `names` and `workflow`.
        """
        if names is not None and workflow is not None:
            raise ValueError(f"Pass `names={names!r}` or `workflow={workflow!r}`, not both.")
        if workflow is not None:
            names = [spec.name for spec in self.blocks.get_workflow(workflow).expected_components]
        names = self.null_component_names if names is None else _as_list(names)
        unknown = sorted(set(names) - set(self.component_names))
        if unknown:
            raise ValueError(f"{unknown} are no components of these blocks, which use {sorted(self.component_names)}.")
        left_out = {name: None for name in COMPONENTS if name not in names}
        loaded = _Components.from_pretrained(self._pretrained_model_name_or_path, **left_out, **kwargs)
        self.register_components(**{name: getattr(loaded, name) for name in names})

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Writes the one kind of repository that both pipelines read; see [`FactorizedVideoPipeline.save_pretrained`]."""
        self.pipeline.save_pretrained(save_directory, **kwargs)

    def set_progress_bar_config(self, **kwargs) -> None:
        self._progress_bar_config = kwargs
        super().set_progress_bar_config(**kwargs)


add_modular(MODEL_NAME, FactorizedVideoPipeline, FactorizedVideoModularPipeline)
