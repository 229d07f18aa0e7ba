"""Factorized Video Generation for diffusers: an LLM describes the first frame, a text-to-image model draws it, a video
model animates it. Importing the package makes `DiffusionPipeline.from_pretrained` know its classes.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from typing import Any


__version__ = "0.1.0"

# Public name -> module. Each module is imported on first use: torch, diffusers and transformers take seconds to import.
_MODULES = {
    "Anchor": "animate.anchor",
    "AnchorAnimator": "animate.animator",
    "AnchorComposer": "compose.composer",
    "AnchorConditionedCogVideoXTransformer3D": "animate.transformer_anchor_cogvideox",
    "AnchorConditionedSkyReelsV2Transformer3D": "animate.transformer_anchor_skyreels",
    "AnchorConditionedTransformer3D": "animate.transformer_anchor",
    "AnchorCandidate": "compose.candidates",
    "AnchorJudge": "compose.judge",
    "AnchorLora": "lora.anchor_lora",
    "ChatEndpoint": "rewrite.chat_endpoint",
    "FactorizedCogVideoXPipeline": "pipelines.pipeline_factorized_cogvideox",
    "FactorizedDreamerPipeline": "pipelines.pipeline_factorized_dreamer",
    "FactorizedDreamerUNet": "dreamer.unet",
    "FactorizedImageToVideoPipeline": "pipelines.pipeline_factorized_image_to_video",
    "FactorizedVideoBlocks": "pipelines.modular",
    "FactorizedVideoModularPipeline": "pipelines.modular",
    "FactorizedVideoPipeline": "pipelines.pipeline_factorized_video",
    "FactorizedVideoPipelineOutput": "pipelines.output",
    "FirstFrameRewriter": "rewrite.rewriter",
    "HubReference": "loading.references",
    "LightDecoder": "animate.light_decoder",
    "LoraReport": "lora.loader",
    "Moment": "rewrite.storyboard",
    "Plan": "rewrite.plan",
    "RewriteOutcome": "rewrite.outcome",
    "SchedulerPreset": "schedules.presets",
    "SchedulerPresets": "schedules.presets",
    "ShapesJudge": "shapes.judge",
    "Subject": "rewrite.plan",
    "RECIPES": "recipes",
    "apply_memory_profile": "pipelines.profiles",
    "assemble": "publishing.assembly",
    "caption_problem": "rewrite.caption_check",
    "decode_frames": "animate.decoding",
    "hub_revisions": "pipelines.record",
    "load": "recipes",
    "load_embedded": "embedded",
    "load_embedded_dreamer": "embedded",
    "load_lora": "lora.loader",
    "push": "publishing.push",
    "read_record": "pipelines.replay",
    "replay": "pipelines.replay",
}
__all__ = ["__version__", "register", *sorted(_MODULES)]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


def register() -> None:
    """Adds this package's classes to `diffusers`, so that its pipelines can load them. Runs once diffusers is imported."""
    from .loading.patches import patch

    patch()


class _RegisterAfterDiffusers(importlib.abc.MetaPathFinder):
    """Calls `register` once diffusers is imported, so that `import diffusers_fvg` alone does not import diffusers."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "diffusers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("diffusers")
        if spec is not None:
            loader: Any = spec.loader
            run = loader.exec_module

            def exec_module(module) -> None:
                run(module)
                register()

            loader.exec_module = exec_module
        return spec


if "diffusers" in sys.modules:
    register()
else:
    sys.meta_path.insert(0, _RegisterAfterDiffusers())
