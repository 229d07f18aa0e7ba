"""Factorized Video Generation for diffusers: an LLM describes the first frame, a text-to-image model draws it, a video
model animates it. Importing the package makes `DiffusionPipeline.from_pretrained` know its classes.
"""

import importlib
import importlib.abc
import importlib.util
import sys


__version__ = "0.1.0"

# Public name -> module. Loaded when first used: torch, diffusers and transformers take seconds to import.
_MODULES = {
    "Anchor": "anchor",
    "AnchorComposer": "composer",
    "AnchorConditionedCogVideoXTransformer3D": "transformer_anchor_cogvideox",
    "AnchorConditionedTransformer3D": "transformer_anchor",
    "AnchorLora": "anchor_lora",
    "ChatEndpoint": "rewriter",
    "FactorizedCogVideoXPipeline": "pipeline_factorized_cogvideox",
    "FactorizedDreamerPipeline": "pipeline_factorized_dreamer",
    "FactorizedDreamerUNet": "dreamer.unet",
    "FactorizedVideoBlocks": "modular",
    "FactorizedVideoModularPipeline": "modular",
    "FactorizedVideoPipeline": "pipeline_factorized_video",
    "FactorizedVideoPipelineOutput": "pipeline_output",
    "FirstFrameRewriter": "rewriter",
    "HubReference": "hub",
    "LoraReport": "lora",
    "Moment": "storyboard",
    "SchedulerPreset": "schedules",
    "SchedulerPresets": "schedules",
    "apply_memory_profile": "profiles",
    "assemble": "assembly",
    "decode_frames": "decoding",
    "load_embedded": "embedded",
    "load_embedded_dreamer": "embedded",
    "load_lora": "lora",
    "push": "hub",
}
__all__ = ["__version__", "register", *sorted(_MODULES)]

# What a `model_index.json` may name. The loader looks a class up in diffusers and, unless it is a `ModelMixin` or a
# pipeline, its save and load methods in a table.
_LOADABLE = ("AnchorComposer", "AnchorLora", "FirstFrameRewriter", "HubReference", "SchedulerPresets")
_REGISTERED = (
    "AnchorConditionedCogVideoXTransformer3D",
    "AnchorConditionedTransformer3D",
    "FactorizedCogVideoXPipeline",
    "FactorizedDreamerPipeline",
    "FactorizedDreamerUNet",
    "FactorizedVideoBlocks",
    "FactorizedVideoModularPipeline",
    "FactorizedVideoPipeline",
    *_LOADABLE,
)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


def register() -> None:
    """Makes our classes attributes of `diffusers` and loadable components. Runs by itself once diffusers is imported."""
    import diffusers
    from diffusers.pipelines import pipeline_loading_utils as loader

    from .loading import remember_arguments

    class DiffusersWithOurs(type(diffusers)):
        # Looked up when asked for: our modules import diffusers themselves and may be what is being imported now.
        def __getattr__(self, name: str):
            if name == "FactorizedVideoPipeline" and "diffusers.pipelines.auto_pipeline" in sys.modules:
                # `ModularPipeline.from_pretrained` looks it up in tables, which this module enters it in.
                importlib.import_module(".modular", __name__)
            if name in _REGISTERED:
                return __getattr__(name)
            return super().__getattr__(name)

    diffusers.__class__ = DiffusersWithOurs
    methods = {name: ["save_pretrained", "from_pretrained"] for name in _LOADABLE}
    loader.LOADABLE_CLASSES["diffusers"].update(methods)
    # In front: anything may be passed in place of a reference, so it must not be the last class that fits a component.
    importable = {"HubReference": methods["HubReference"], **loader.ALL_IMPORTABLE_CLASSES, **methods}
    loader.ALL_IMPORTABLE_CLASSES.clear()
    loader.ALL_IMPORTABLE_CLASSES.update(importable)
    remember_arguments()


class _RegisterAfterDiffusers(importlib.abc.MetaPathFinder):
    """Calls `register` as soon as somebody has imported diffusers, so that importing this package alone costs nothing."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "diffusers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("diffusers")
        if spec is not None:
            run = spec.loader.exec_module

            def exec_module(module) -> None:
                run(module)
                register()

            spec.loader.exec_module = exec_module
        return spec


if "diffusers" in sys.modules:
    register()
else:
    sys.meta_path.insert(0, _RegisterAfterDiffusers())
