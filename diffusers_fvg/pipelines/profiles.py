"""Memory profiles: how much of a pipeline is on the device at once, planned by arithmetic before anything is moved.

A pipeline works stage by stage, and a stage needs its weights and room to work in. Three ways to place them, the first that
fits the profile's budget is taken:

* `"none"`: everything stays on the device. Peak: all weights, and the largest room.
* `"model"`: a stage comes when it starts and goes when the next one does. Peak: the largest stage, and the VAE, which
  encodes anchors while the text encoder is still there and stays until the video is decoded.
* `"group"`: a stage's layers come one after the other, the next while one works. Peak: the largest layers and room. The VAE,
  the smallest model and used once for each latent frame, stays. Weights cross the bus in every forward, which the work on a
  long clip hides and that on a short one does not.

No way changes a result. The VAE's tiles do, a little, so whole frames in any way come before tiles. With the last two ways all
weights are in the host's memory. A pipeline loaded in fewer bits, with `from_pretrained(..., quantization_config=...)`, is planned with
the bytes that it then has; layers of other packages' numbers do not come one after the other. A pipeline whose models are on the meta device,
without weights, is planned as any other. All figures are computed, none is measured.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from diffusers.hooks import apply_group_offloading

from ..animate.memory import decode_bytes, free_bytes


if TYPE_CHECKING:
    from ..models import ModelFacts
    from .stages import FactorizedStages

GIB = 2**30
# Cards that tables show; any other size is planned as well.
CARDS = ("12GB", "24GB", "48GB", "80GB")
# The rest is for the driver's context, for libraries and for memory that the allocator cannot use in pieces.
USABLE = 0.9
# Room that text models, the LLM and the composer's pipeline get to work in: an allowance, not computed.
ALLOWANCE = 2 * GIB
# The same for denoiser and VAE of an animator: families differ too much to count.
ANIMATOR_ALLOWANCE = 8 * GIB
# Numbers per token at the peak of a block, of feed-forward and of model width. Counting live tensors on shapes gives
# 2 and 4.2 at Wan2.2-TI2V-5B, 2 and 6.8 at A14B; the third of feed-forward width is for a LoRA's sum.
FFN_COPIES, WIDTH_COPIES = 3, 7
# The same of CogVideoX, of its width alone: 13, and 4 for a LoRA's sum in the feed-forward.
COGVIDEOX_COPIES = 17
# Numbers per latent and channel of the first level in Factorized-Dreamer's UNet: 30 to 36 by size, and a LoRA's sum. Its image
# VAE decodes four frames at once, with 6 numbers per pixel and channel.
UNET_COPIES, IMAGE_VAE_COPIES, IMAGE_VAE_FRAMES = 40, 7, 4
# One video is in the works.
BATCH = 1
# Of the video model, `"transformer"` to those who ask for it by this name.
VIDEO_MODELS = ("transformer", "transformer_2", "unet")


def memory_bytes(profile: str) -> int:
    """Bytes of a card, of its size: `"16GB"`, `"11.5 GB"`, `"8192MB"`.

    Raises:
        `ValueError`: no size, or none above zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([gm])(?:i?b)?\s*", profile, re.IGNORECASE)
    if match is None or not 0 < float(match[1]) < 1e6:
        raise ValueError(f'The memory {profile!r} is no size: use one such as "16GB", "auto" or "cpu".')
    return int(float(match[1]) * (GIB if match[2].lower() == "g" else 2**20))


@dataclass(frozen=True)
class Stage:
    """What one component needs, in bytes.

    Args:
        name (`str`): of the component.
        weights (`int`): all of it.
        layers (`int`): the most of it that is there at once when it comes layer by layer, the next one ahead.
        working (`int`): beside the weights while it runs.
        tiled (`int`, *optional*): the same in tiles, for the VAE.
        whole (`bool`): it cannot come layer by layer.
    """

    name: str
    weights: int
    layers: int
    working: int
    tiled: int | None = None
    whole: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """How a pipeline is placed, and what that needs by computation.

    Args:
        profile (`str`): its name.
        budget (`int`): bytes it may take.
        offload (`str`): `"none"`, `"model"` or `"group"`.
        tile (`bool`): whether the VAE works in tiles.
        stages (`tuple[Stage, ...]`): in the order of running.
    """

    profile: str
    budget: int
    offload: str
    tile: bool
    stages: tuple[Stage, ...]

    def stage_bytes(self, stage: Stage) -> int:
        """What is on the device while a stage runs."""
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
        """Bytes on the device at the most, computed."""
        return self.stage_bytes(self.largest)

    def __str__(self) -> str:
        tiles = ", decode in tiles" if self.tile else ""
        lines = [f"{self.profile}: offload {self.offload}{tiles}, peak {self.peak / GIB:.1f} GiB (computed)"]
        lines += [f"  {stage.name}: {self.stage_bytes(stage) / GIB:.1f} GiB" for stage in self.stages]
        return "\n".join(lines)


def plan_memory(stages: Sequence[Stage], profile: str, budget: int | None = None) -> MemoryPlan:
    """The first way in which all stages fit, in the order of what a way costs in time.

    Args:
        stages (sequence of [`Stage`]): in the order of running.
        profile (`str`): the card's memory, as `"16GB"`; or a name for `budget`, such as `"auto"`. `"cpu"` offloads nothing.
        budget (`int`, *optional*): bytes, instead of the share of the profile that can be used.

    Raises:
        `ValueError`: a profile that is no size, without a budget, or nothing fits.
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
    """Stages of a pipeline as it is loaded.

    Args:
        pipe ([`FactorizedStages`]): on any device, or with models on the meta device.
        height, width, num_frames (`int`, *optional*): of the videos to come; the pipeline's own when left out.
        num_anchors (`int`, *optional*): pictures behind the first frame of a video. They are counted where the anchor LoRA
            appends them to the clip.
    """
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    # The order in which offloading lets them run.
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
    """Stages of a model at its own size and length. No weights are made.

    Args:
        facts ([`~models.ModelFacts`]): of the model.
        dtype (`torch.dtype`, *optional*): of all weights.
        make_parts (`Callable`, *optional*): makes what runs before the base's models: the rewriter and the composer.
    """
    with empty_weights(dtype):
        modules = {**make_parts(), **base_models(facts)}
    trained = facts.sizes[0]
    size = {"height": trained.height, "width": trained.width, "num_frames": facts.frame_counts[0]}
    return [_stage(name, module, modules["vae"], **size) for name, module in modules.items()]


@contextmanager
def empty_weights(dtype: torch.dtype) -> Iterator[None]:
    """Models that are made within it have their shapes and this dtype, and no weights."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(default)


def base_models(facts: ModelFacts) -> dict[str, torch.nn.Module]:
    """The models of a base, of published configs: text encoder, experts and VAE, in the order of running."""
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
# huggingface/diffusers, scripts/convert_cogvideox_to_diffusers.py: the class's own values but for these, which are those of 1.5.
COGVIDEOX_VAE = {
    "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    "block_out_channels": (128, 256, 256, 512),
    "latent_channels": 16,
    "layers_per_block": 3,
    "scaling_factor": 0.7,
    "invert_scale_latents": True,
}
# Latent channels -> arguments of the VAE's class: huggingface/diffusers, scripts/convert_wan_to_diffusers.py. Its statistics
# are left out: they are no weights.
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
    """Places a freshly loaded pipeline so that it fits a profile: offload, and tiles of the VAE where whole frames do not fit.

    Call it once, after LoRAs are loaded, instead of `pipe.to(...)`.

    Args:
        pipe ([`FactorizedStages`]): as loaded, on the CPU.
        profile (`str`): the card's memory, as `"16GB"`; `"auto"` for what is free on the device; or `"cpu"`: nothing to offload,
            as the weights are where they run.
        device (`torch.device` or `str`, *optional*): where models run; the accelerator there is when left out.
        height, width, num_frames (`int`, *optional*): of the largest videos to come; the pipeline's own when left out.
        num_anchors (`int`, *optional*): as in [`pipeline_stages`].

    Returns:
        [`MemoryPlan`]: print it for what each stage needs.

    Raises:
        `ValueError`: an unknown profile, one for which the pipeline is too large, or no accelerator for it.
    """
    device = find_device(profile, device)
    plan = plan_on(pipeline_stages(pipe, height, width, num_frames, num_anchors), profile, device)
    place(pipe, plan, device)
    return plan


def find_device(profile: str, device: torch.device | str | None = None) -> torch.device:
    """Where models run under a profile: the device that is asked for, else the accelerator there is.

    Raises:
        `ValueError`: a profile that is no size, or that is for an accelerator where there is none.
    """
    if profile not in ("auto", "cpu"):
        memory_bytes(profile)
    if profile == "cpu":
        return torch.device("cpu")
    if device is None:
        if not torch.accelerator.is_available():
            raise ValueError(f'Memory {profile!r} is that of an accelerator, and there is none: use "cpu".')
        device = torch.accelerator.current_accelerator()
    return torch.device(device)


def plan_on(stages: Sequence[Stage], profile: str, device: torch.device) -> MemoryPlan:
    """[`plan_memory`] with what a device has, where the profile names no size."""
    if profile == "cpu":
        # All of them are there already, or come into what is free.
        return plan_memory(stages, profile, free_bytes(torch.device("cpu")) + sum(stage.weights for stage in stages))
    return plan_memory(stages, profile, int(USABLE * free_bytes(device)) if profile == "auto" else None)


def place(pipe: FactorizedStages, plan: MemoryPlan, device: torch.device | str) -> None:
    """Places a pipeline as planned. Call it once."""
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
    """Lets the layers of a model come to a device one after the other."""
    # Copying the next layer while one works is for devices with streams.
    options = {"onload_device": device, "offload_device": torch.device("cpu"), "use_stream": device.type == "cuda"}
    if _blocks(module):
        # By block: a block's layers are used past their modules (see `AnchorConditionedAttnProcessor`).
        module.enable_group_offload(offload_type="block_level", num_blocks_per_group=1, **options)
    else:
        apply_group_offloading(module, offload_type="leaf_level", **options)


def _blocks(module: torch.nn.Module) -> Sequence[torch.nn.Module]:
    """Blocks of a video transformer; of another model none."""
    if not hasattr(module, "enable_group_offload"):
        return ()
    return getattr(module, "blocks", None) or getattr(module, "transformer_blocks", None) or ()


def part_stage(name: str, module: torch.nn.Module) -> Stage:
    """What a model of stage 1 or 2, or a text encoder, needs."""
    weights, blocks = _bytes(module), _blocks(module)
    if blocks:
        sizes = [_bytes(block) for block in blocks]
        return Stage(name, weights, weights - sum(sizes) + 2 * max(sizes), ALLOWANCE)
    # A tensor that two layers share counts once.
    owned = {tensor: part for part in module.modules() for tensor in part.parameters(recurse=False)}
    own = sorted(_bytes(part, recurse=False) for part in set(owned.values()))
    return Stage(name, weights, sum(own[-2:]), ALLOWANCE)


def _animator_stages(animator: torch.nn.Module) -> list[Stage]:
    order = animator.pipeline.model_cpu_offload_seq.split("->")
    return animator_stages({name: animator.models[name] for name in order if name in animator.models})


def animator_stages(models: Mapping[str, torch.nn.Module]) -> list[Stage]:
    """Stages of an image-to-video pipeline: its weights, and an allowance for what it works in.

    Args:
        models (`Mapping`): component to its model, in the order of running.
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
        # It decodes pictures, and keeps those that it has as float32.
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
    """Latent frames, rows and columns."""
    config = vae.config
    temporal = config.get("scale_factor_temporal") or config.get("temporal_compression_ratio") or 1
    spatial = config.get("scale_factor_spatial") or 2 ** (len(config.block_out_channels) - 1)
    return (num_frames - 1) // int(temporal) + 1, height // spatial, width // spatial


def _video_working(model: torch.nn.Module, grid: tuple[int, int, int], appended: int) -> int:
    """Of a clip of `grid` and, of Wan, anchors that are latent frames behind it."""
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
