"""Memory profiles: choose an offload for a pipeline by computing its memory before anything is moved.

A stage (one model) needs memory for its weights and for its activations while it runs. The first of these offloads whose
peak fits the budget of the profile is used:

* `"none"`: everything stays on the device. Peak: all weights, and the largest activations.
* `"model"`: one model at a time is on the device. Peak: the largest model with its activations. The VAE is counted with the
  others, because it encodes anchors while the text encoder is still on the device, and stays until the video is decoded.
* `"group"`: one layer at a time is on the device, while the next one is loaded. Peak: the largest layers and activations. The
  VAE stays on the device: it is the smallest model and runs once for each latent frame. Weights are copied in every forward;
  the computation hides this for a long video, but not for a short one.

Offloading does not change results. VAE tiling changes them a little, so it is tried last. With `"model"` and `"group"`, all
weights are also in CPU memory. A quantized pipeline (`from_pretrained(..., quantization_config=...)`) is planned with its
quantized bytes; a video model quantized by transformers' or diffusers' quantizers cannot be offloaded by layer. A pipeline on
the meta device, without weights, is planned like any other. All numbers are computed, not measured.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from diffusers.hooks import apply_group_offloading
from diffusers.models.modeling_utils import no_init_weights

from ..animate.memory import decode_bytes, free_bytes


if TYPE_CHECKING:
    from ..models import ModelFacts
    from .stages import FactorizedStages

GIB = 2**30
# GPU sizes that tables show; any other size can be planned, too.
CARDS = ("12GB", "24GB", "48GB", "80GB")
# Usable fraction of the memory. The rest is for the driver's context, libraries and fragmentation.
USABLE = 0.9
# Activation memory of text encoders, the LLM and the composer: an allowance, not computed.
ALLOWANCE = 2 * GIB
# The same for the video model and VAE of an animator: families differ too much to compute it.
ANIMATOR_ALLOWANCE = 8 * GIB
# Values per token at the peak of a block, in units of the feed-forward width and of the model width. Counting tensors by their
# shapes gives 2 and 4.2 for Wan2.2-TI2V-5B, 2 and 6.8 for A14B; the third of feed-forward width is for the output of a LoRA.
FFN_COPIES, WIDTH_COPIES = 3, 7
# The same for CogVideoX, in units of the model width: 13, and 4 for the output of a LoRA in the feed-forward.
COGVIDEOX_COPIES = 17
# Values per latent and channel of the first level in Factorized-Dreamer's UNet: 30 to 36 by size, and the output of a LoRA. Its
# image VAE decodes four frames at once, with 6 values per pixel and channel.
UNET_COPIES, IMAGE_VAE_COPIES, IMAGE_VAE_FRAMES = 40, 7, 4
# Videos that are generated at a time.
BATCH = 1
# Names of components that are video models.
VIDEO_MODELS = ("transformer", "transformer_2", "unet")


def memory_bytes(profile: str) -> int:
    """Returns the bytes of a size such as `"16GB"`, `"11.5 GB"` or `"8192MB"`; GB and MB mean GiB and MiB.

    Raises:
        `ValueError`: `profile` is not a size, or is not above zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([gm])(?:i?b)?\s*", profile, re.IGNORECASE)
    if match is None or not 0 < float(match[1]) < 1e6:
        raise ValueError(f'The memory {profile!r} is not a size: use one such as "16GB", "auto" or "cpu".')
    return int(float(match[1]) * (GIB if match[2].lower() == "g" else 2**20))


@dataclass(frozen=True)
class Stage:
    """Memory that one component needs, in bytes.

    Args:
        name (`str`): name of the component.
        weights (`int`): all weights.
        layers (`int`): the most weights on the device at once when it is offloaded by layer, including the next layer.
        working (`int`): activations while it runs.
        tiled (`int`, *optional*): activations with tiling, for the VAE.
        whole (`bool`): whether it cannot be offloaded by layer.
    """

    name: str
    weights: int
    layers: int
    working: int
    tiled: int | None = None
    whole: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """The offload of a pipeline, and the memory that it needs (computed).

    Args:
        profile (`str`): name of the profile.
        budget (`int`): bytes that the pipeline may use.
        offload (`str`): `"none"`, `"model"` or `"group"`.
        tile (`bool`): whether the VAE decodes in tiles.
        stages (`tuple[Stage, ...]`): memory of each component, in the order in which they run.
    """

    profile: str
    budget: int
    offload: str
    tile: bool
    stages: tuple[Stage, ...]

    def stage_bytes(self, stage: Stage) -> int:
        """Returns the bytes on the device while a stage runs."""
        working = stage.tiled if self.tile and stage.tiled is not None else stage.working
        weights = {other.name: other.weights for other in self.stages}
        if self.offload == "none":
            return sum(weights.values()) + working
        vae = weights.get("vae", 0)
        if self.offload == "group":
            return vae + working + (0 if stage.name == "vae" else stage.layers)
        if stage.name == "vae":
            vae = max([weights.get(name, 0) for name in ("text_encoder", "text_encoder_2", "image_encoder")])
        return stage.weights + working + vae

    @property
    def largest(self) -> Stage:
        return max(self.stages, key=self.stage_bytes)

    @property
    def peak(self) -> int:
        """Peak of bytes on the device (computed)."""
        return self.stage_bytes(self.largest)

    def __str__(self) -> str:
        tiles = ", decode in tiles" if self.tile else ""
        lines = [f"{self.profile}: offload {self.offload}{tiles}, peak {self.peak / GIB:.1f} GiB (computed)"]
        lines += [f"  {stage.name}: {self.stage_bytes(stage) / GIB:.1f} GiB" for stage in self.stages]
        return "\n".join(lines)


def plan_memory(stages: Sequence[Stage], profile: str, budget: int | None = None) -> MemoryPlan:
    """Returns the fastest plan in which all stages fit.

    Args:
        stages (sequence of [`Stage`]): memory of each component, in the order in which they run.
        profile (`str`): memory of the GPU, such as `"16GB"`; or a name for `budget`, such as `"auto"`. `"cpu"` does not
            offload.
        budget (`int`, *optional*): bytes that may be used; 90 % of the profile's size when left out.

    Raises:
        `ValueError`: `profile` is not a size and there is no budget, or no plan fits.
    """
    if budget is None:
        budget = int(USABLE * memory_bytes(profile))
    ways = ["none", "model", "group"]
    if profile == "cpu":
        ways = ["none"]
    elif any(stage.whole for stage in stages):
        ways.remove("group")
    plans = [MemoryPlan(profile, budget, offload, tile, tuple(stages)) for tile in (False, True) for offload in ways]
    for plan in plans:
        if plan.peak <= budget:
            return plan
    least = min(plans, key=lambda plan: plan.peak)
    raise ValueError(
        f"Memory {profile!r} may take {budget / GIB:.1f} GiB, but `{least.largest.name}` needs {least.peak / GIB:.1f} GiB "
        f"(computed) with offload {least.offload!r}: use more memory, or fewer pixels or frames."
    )


def pipeline_stages(
    pipe: FactorizedStages,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    num_anchors: int = 1,
) -> list[Stage]:
    """Returns the memory of each component of a loaded pipeline.

    Args:
        pipe ([`FactorizedStages`]): the pipeline, on any device, or with models on the meta device.
        height, width, num_frames (`int`, *optional*): size of the videos in pixels and their frames; the pipeline's defaults
            when left out.
        num_anchors (`int`, *optional*): anchors of a video other than its first frame. They are counted only if the anchor
            LoRA has the form `"appended"`.
    """
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    # In the order in which they run.
    modules = {name: modules[name] for name in pipe.model_cpu_offload_seq.split("->") if name in modules}
    animator = modules.pop("animator", None)
    if animator is not None:
        return [part_stage(name, module) for name, module in modules.items()] + _animator_stages(animator)
    asked = {"height": height, "width": width, "num_frames": num_frames}
    size = {name: pipe.call_defaults[name] if value is None else value for name, value in asked.items()}
    appended = num_anchors if pipe.anchor_form == "appended" else 0
    return [_stage(name, module, modules["vae"], appended=appended, **size) for name, module in modules.items()]


def model_stages(
    facts: ModelFacts,
    dtype: torch.dtype = torch.bfloat16,
    make_parts: Callable[[], Mapping[str, torch.nn.Module]] = dict,
) -> list[Stage]:
    """Returns the memory of each component of a model at its default size and length, without creating weights.

    Args:
        facts ([`~models.ModelFacts`]): facts of the model.
        dtype (`torch.dtype`, *optional*): dtype of all weights.
        make_parts (`Callable`, *optional*): makes the rewriter and the composer, which run before the base's models.
    """
    with empty_weights(dtype):
        modules = {**make_parts(), **base_models(facts)}
    trained = facts.sizes[0]
    size = {"height": trained.height, "width": trained.width, "num_frames": facts.frame_counts[0]}
    return [_stage(name, module, modules["vae"], **size) for name, module in modules.items()]


@contextmanager
def empty_weights(dtype: torch.dtype) -> Iterator[None]:
    """Makes models that are created within the block have this dtype and no weights (meta device)."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # Initialization would do nothing on this device, but takes half of the time.
        with no_init_weights(), torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(default)


def base_models(facts: ModelFacts) -> dict[str, torch.nn.Module]:
    """Makes the models of a base from published configs: text encoder, experts and VAE, in the order in which they run."""
    from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    from ..animate.transformer_anchor import AnchorConditionedTransformer3D
    from ..animate.transformer_anchor_cogvideox import AnchorConditionedCogVideoXTransformer3D

    if facts.prediction == "v":
        return {
            "text_encoder": T5EncoderModel(T5Config(vocab_size=32128, **T5_XXL)),
            "transformer": AnchorConditionedCogVideoXTransformer3D(**facts.transformer_config),
            "vae": AutoencoderKLCogVideoX(**COGVIDEOX_VAE),
        }
    experts = ("transformer", "transformer_2")[: 1 if facts.boundary_ratio is None else 2]
    return {
        "text_encoder": UMT5EncoderModel(UMT5Config(vocab_size=256384, **T5_XXL)),
        **{name: AnchorConditionedTransformer3D(**facts.transformer_config) for name in experts},
        "vae": AutoencoderKLWan(**WAN_VAES[facts.latent_channels]),
    }


# google/umt5-xxl and google/t5-v1_1-xxl, config.json.
T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
# Values of CogVideoX 1.5 that differ from the class's defaults: huggingface/diffusers,
# scripts/convert_cogvideox_to_diffusers.py.
COGVIDEOX_VAE = {
    "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    "block_out_channels": (128, 256, 256, 512),
    "latent_channels": 16,
    "layers_per_block": 3,
    "scaling_factor": 0.7,
    "invert_scale_latents": True,
}
# Latent channels -> arguments of the VAE class: huggingface/diffusers, scripts/convert_wan_to_diffusers.py, without the latent
# statistics, which are not weights.
WAN_VAES = {
    16: {},
    48: {
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "scale_factor_temporal": 4,
    },
}


def apply_memory_profile(
    pipe: FactorizedStages,
    profile: str,
    device: torch.device | str | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    num_anchors: int = 1,
) -> MemoryPlan:
    """Offloads a loaded pipeline so that it fits a memory profile, and enables VAE tiling if nothing else fits.

    Tried in this order: everything on the GPU; one model at a time; one layer at a time. VAE tiling comes last. Call it once,
    after LoRAs are loaded, instead of `pipe.to(...)`.

    Args:
        pipe ([`FactorizedStages`]): the loaded pipeline, on the CPU.
        profile (`str`): memory of the GPU, such as `"16GB"`; `"auto"` for the free memory of the device; or `"cpu"`, which
            does not offload.
        device (`torch.device` or `str`, *optional*): device that models run on; the accelerator when left out.
        height, width, num_frames (`int`, *optional*): size in pixels and frames of the largest video; the pipeline's defaults
            when left out.
        num_anchors (`int`, *optional*): as in [`pipeline_stages`].

    Returns:
        [`MemoryPlan`]: the plan; print it to see the memory of each stage.

    Raises:
        `ValueError`: the profile is unknown or too small for the pipeline, or there is no accelerator.
    """
    device = find_device(profile, device)
    plan = plan_on(pipeline_stages(pipe, height, width, num_frames, num_anchors), profile, device)
    place(pipe, plan, device)
    return plan


def find_device(profile: str, device: torch.device | str | None = None) -> torch.device:
    """Returns the device that models run on under a profile: the CPU, the given device, or the accelerator.

    Raises:
        `ValueError`: the profile is not a size, or needs an accelerator and there is none.
    """
    if profile not in ("auto", "cpu"):
        memory_bytes(profile)
    if profile == "cpu":
        return torch.device("cpu")
    if device is None:
        if not torch.accelerator.is_available():
            raise ValueError(f'Memory {profile!r} is for an accelerator, but there is none: use "cpu".')
        device = torch.accelerator.current_accelerator()
    return torch.device(device)


def plan_on(stages: Sequence[Stage], profile: str, device: torch.device) -> MemoryPlan:
    """Calls [`plan_memory`] with the free memory of a device if the profile is `"auto"` or `"cpu"`."""
    if profile == "cpu":
        # The weights are already in memory, or will be loaded into the free memory.
        return plan_memory(stages, profile, free_bytes(torch.device("cpu")) + sum(stage.weights for stage in stages))
    return plan_memory(stages, profile, int(USABLE * free_bytes(device)) if profile == "auto" else None)


def place(pipe: FactorizedStages, plan: MemoryPlan, device: torch.device | str) -> None:
    """Moves or offloads a pipeline as planned. Call it once."""
    device = torch.device(device)
    if plan.tile:
        pipe.vae.enable_tiling()
    if plan.offload == "none":
        pipe.to(device)
    elif plan.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        _offload_groups(pipe, device)


def _offload_groups(pipe: FactorizedStages, device: torch.device) -> None:
    for name, module in pipe.components.items():
        if name == "vae":
            module.to(device)
        elif isinstance(module, torch.nn.Module):
            offload_layers(module, device)


def offload_layers(module: torch.nn.Module, device: torch.device) -> None:
    """Offloads a model by layer: each layer is moved to the device when it runs."""
    # Loading the next layer while one runs needs CUDA streams.
    options = {"onload_device": device, "offload_device": torch.device("cpu"), "use_stream": device.type == "cuda"}
    if _blocks(module):
        # By block, because a block reads weights of its layers without calling them (see `AnchorConditionedAttnProcessor`).
        module.enable_group_offload(offload_type="block_level", num_blocks_per_group=1, **options)
    else:
        apply_group_offloading(module, offload_type="leaf_level", **options)


def _blocks(module: torch.nn.Module) -> Sequence[torch.nn.Module]:
    """Returns the blocks of a video transformer; an empty sequence for other models."""
    if not hasattr(module, "enable_group_offload"):
        return ()
    return getattr(module, "blocks", None) or getattr(module, "transformer_blocks", None) or ()


def part_stage(name: str, module: torch.nn.Module) -> Stage:
    """Returns the memory of a model of stage 1 or 2, or of a text encoder."""
    weights, blocks = _bytes(module), _blocks(module)
    if blocks:
        sizes = [_bytes(block) for block in blocks]
        return Stage(name, weights, weights - sum(sizes) + 2 * max(sizes), ALLOWANCE)
    # A tensor that two layers share is counted once.
    owned = {tensor: part for part in module.modules() for tensor in part.parameters(recurse=False)}
    own = sorted(_bytes(part, recurse=False) for part in set(owned.values()))
    return Stage(name, weights, sum(own[-2:]), ALLOWANCE)


def _animator_stages(animator: torch.nn.Module) -> list[Stage]:
    order = animator.pipeline.model_cpu_offload_seq.split("->")
    return animator_stages({name: animator.models[name] for name in order if name in animator.models})


def animator_stages(models: Mapping[str, torch.nn.Module]) -> list[Stage]:
    """Returns the memory of the models of an image-to-video pipeline, with an allowance for activations.

    Args:
        models (`Mapping`): component name -> model, in the order in which they run.
    """
    names = {name: f"animator.{name}" if name in VIDEO_MODELS else name for name in models}
    stages = [part_stage(names[name], model) for name, model in models.items()]
    works = {name for name in names.values() if name == "vae" or "." in name}
    return [replace(stage, working=ANIMATOR_ALLOWANCE) if stage.name in works else stage for stage in stages]


def _stage(
    name: str,
    module: torch.nn.Module,
    vae: torch.nn.Module,
    height: int,
    width: int,
    num_frames: int,
    appended: int = 0,
) -> Stage:
    stage = part_stage(name, module)
    if name in VIDEO_MODELS:
        is_whole = getattr(module, "hf_quantizer", None) is not None
        grid = _latent_grid(vae, height, width, num_frames)
        return replace(stage, working=_video_working(module, grid, appended), whole=is_whole)
    if name != "vae":
        return stage
    size = next(vae.parameters()).element_size()
    if "temporal_compression_ratio" not in vae.config and "scale_factor_temporal" not in vae.config:
        # An image VAE decodes frames in batches, and the decoded frames are kept as float32.
        channels, video = vae.config.block_out_channels[0], 2 * 3 * num_frames * height * width * 4
        whole = IMAGE_VAE_COPIES * channels * IMAGE_VAE_FRAMES * height * width * size + video
        tile = min(vae.tile_sample_min_size**2, height * width)
        tiled = IMAGE_VAE_COPIES * channels * IMAGE_VAE_FRAMES * tile * size + 2 * video
        return replace(stage, layers=stage.weights, working=whole, tiled=tiled)
    latents = BATCH, 0, *_latent_grid(vae, height, width, num_frames)
    tile = vae.tile_sample_min_height * vae.tile_sample_min_width
    whole, tiled = decode_bytes(vae.config, latents, size), decode_bytes(vae.config, latents, size, tile)
    return replace(stage, layers=stage.weights, working=whole, tiled=tiled)


def _latent_grid(vae: torch.nn.Module, height: int, width: int, num_frames: int) -> tuple[int, int, int]:
    """Returns the number of latent frames, rows and columns."""
    config = vae.config
    temporal = config.get("scale_factor_temporal") or config.get("temporal_compression_ratio") or 1
    spatial = config.get("scale_factor_spatial") or 2 ** (len(config.block_out_channels) - 1)
    return (num_frames - 1) // int(temporal) + 1, height // spatial, width // spatial


def _video_working(model: torch.nn.Module, grid: tuple[int, int, int], appended: int) -> int:
    """Returns the activation memory of a video model for latents of size `grid`, and for Wan `appended` latent frames."""
    config, element_size = model.config, model.dtype.itemsize
    if "block_out_channels" in config:
        frames = min(grid[0], config.num_frames)
        return BATCH * frames * grid[1] * grid[2] * config.block_out_channels[0] * UNET_COPIES * element_size
    width_of_model = config.num_attention_heads * config.attention_head_dim
    if "ffn_dim" in config:
        return _transformer_working(model, (BATCH, 0, grid[0] + appended, *grid[1:]))
    patch_frames = config.patch_size_t or 1
    tokens = -(-grid[0] // patch_frames) * (grid[1] // config.patch_size) * (grid[2] // config.patch_size)
    return BATCH * (tokens + config.max_text_seq_length) * COGVIDEOX_COPIES * width_of_model * element_size


def _transformer_working(transformer: torch.nn.Module, latents: tuple[int, ...]) -> int:
    config = transformer.config
    tokens = latents[2] * latents[3] * latents[4]
    for patch in config.patch_size:
        tokens //= patch
    width = config.num_attention_heads * config.attention_head_dim
    element_size = transformer.patch_embedding.weight.element_size()
    return BATCH * tokens * (FFN_COPIES * config.ffn_dim + WIDTH_COPIES * width) * element_size


def _bytes(module: torch.nn.Module, recurse: bool = True) -> int:
    return sum(
        tensor.numel() * tensor.element_size()
        for tensors in (module.parameters(recurse), module.buffers(recurse))
        for tensor in tensors
    )
