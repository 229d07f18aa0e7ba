"""Named memory profiles: how much of a pipeline is on the device at once, planned by arithmetic before anything is moved.

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
the bytes that it then has. All figures are computed, none is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from diffusers.hooks import apply_group_offloading

from ..animate.memory import decode_bytes, free_bytes


if TYPE_CHECKING:
    from ..models import ModelFacts
    from .pipeline_factorized_video import FactorizedVideoPipeline

GIB = 2**30
# Memory of the card. `"cpu"` has what is free.
PROFILES = {"12GB": 12 * GIB, "24GB": 24 * GIB, "48GB": 48 * GIB, "80GB": 80 * GIB, "cpu": None}
# The rest is for the driver's context, for libraries and for memory that the allocator cannot use in pieces.
USABLE = 0.9
# Room that text models, the LLM and the composer's pipeline get to work in: an allowance, not computed.
ALLOWANCE = 2 * GIB
# Numbers per token at the peak of a block, of feed-forward and of model width. Counting live tensors on shapes gives
# 2 and 4.2 at Wan2.2-TI2V-5B, 2 and 6.8 at A14B; the third of feed-forward width is for a LoRA's sum.
FFN_COPIES, WIDTH_COPIES = 3, 7
# One video is in the works.
BATCH = 1


@dataclass(frozen=True)
class Stage:
    """What one component needs, in bytes.

    Args:
        name (`str`): of the component.
        weights (`int`): all of it.
        layers (`int`): the most of it that is there at once when it comes layer by layer, the next one ahead.
        working (`int`): beside the weights while it runs.
        tiled (`int`, *optional*): the same in tiles, for the VAE.
    """

    name: str
    weights: int
    layers: int
    working: int
    tiled: int | None = None


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
        if self.offload == "group":
            return weights["vae"] + working + (0 if stage.name == "vae" else stage.layers)
        return stage.weights + working + weights["text_encoder" if stage.name == "vae" else "vae"]

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


def plan_memory(stages: list[Stage], profile: str, budget: int | None = None) -> MemoryPlan:
    """The least offloading that fits a profile, with whole frames if any way lets them.

    Args:
        stages (`list[Stage]`): of [`pipeline_stages`] or [`model_stages`].
        profile (`str`): one of `PROFILES`.
        budget (`int`, *optional*): bytes, instead of the profile's; `"cpu"` has none of its own.

    Raises:
        `ValueError`: an unknown profile, or nothing fits.
    """
    if profile not in PROFILES:
        raise ValueError(f"Unknown memory profile {profile!r}; use one of {', '.join(PROFILES)}.")
    if budget is None:
        budget = int(USABLE * PROFILES[profile])
    ways = ("none",) if profile == "cpu" else ("none", "model", "group")
    plans = [MemoryPlan(profile, budget, offload, tile, tuple(stages)) for tile in (False, True) for offload in ways]
    for plan in plans:
        if plan.peak <= budget:
            return plan
    least = min(plans, key=lambda plan: plan.peak)
    raise ValueError(
        f"Profile {profile!r} may take {budget / GIB:.1f} GiB, but `{least.largest.name}` needs {least.peak / GIB:.1f} GiB "
        f"(computed) with offload {least.offload!r}: use a larger profile, or fewer pixels or frames."
    )


def pipeline_stages(
    pipe: FactorizedVideoPipeline, height: int | None = None, width: int | None = None, num_frames: int | None = None
) -> list[Stage]:
    """Stages of a pipeline as it is loaded.

    Args:
        pipe ([`FactorizedVideoPipeline`]): on any device.
        height, width, num_frames (`int`, *optional*): of the videos to come; the pipeline's own when left out.
    """
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    # The order in which offloading lets them run.
    modules = {name: modules[name] for name in pipe.model_cpu_offload_seq.split("->") if name in modules}
    size = {"height": height, "width": width, "num_frames": num_frames}
    size = {name: pipe.call_defaults[name] if value is None else value for name, value in size.items()}
    return _stages(modules, **size)


def model_stages(
    facts: ModelFacts,
    dtype: torch.dtype = torch.bfloat16,
    make_parts: Callable[[], Mapping[str, torch.nn.Module]] = dict,
) -> list[Stage]:
    """Stages of a Wan model at its own size and length. No weights are made.

    Args:
        facts ([`~models.ModelFacts`]): of the model.
        dtype (`torch.dtype`, *optional*): of all weights.
        make_parts (`Callable`, *optional*): makes what runs before the base's models: the rewriter and the composer.
    """
    from diffusers import AutoencoderKLWan
    from transformers import UMT5Config, UMT5EncoderModel

    from ..animate.transformer_anchor import AnchorConditionedTransformer3D

    experts = ("transformer", "transformer_2")[: 1 if facts.boundary_ratio is None else 2]
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            # google/umt5-xxl, config.json.
            umt5 = UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
            modules = {**make_parts(), "text_encoder": UMT5EncoderModel(umt5)}
            modules |= {name: AnchorConditionedTransformer3D(**facts.transformer_config) for name in experts}
            modules["vae"] = AutoencoderKLWan(**WAN_VAES[facts.latent_channels])
    finally:
        torch.set_default_dtype(default)
    size = facts.sizes[0]
    return _stages(modules, size.height, size.width, facts.frame_counts[0])


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
    pipe: FactorizedVideoPipeline,
    profile: str,
    device: torch.device | str | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
) -> MemoryPlan:
    """Places a freshly loaded pipeline so that it fits a profile: offload, and tiles of the VAE where whole frames do not fit.

    Call it once, after LoRAs are loaded, instead of `pipe.to(...)`.

    Args:
        pipe ([`FactorizedVideoPipeline`]): as loaded, on the CPU.
        profile (`str`): `"12GB"`, `"24GB"`, `"48GB"`, `"80GB"`, by the card's memory, or `"cpu"`: nothing to offload, as the
            weights are where they run.
        device (`torch.device` or `str`, *optional*): where models run; the accelerator there is when left out.
        height, width, num_frames (`int`, *optional*): of the largest videos to come; the pipeline's own when left out.

    Returns:
        [`MemoryPlan`]: print it for what each stage needs.

    Raises:
        `ValueError`: an unknown profile, one for which the pipeline is too large, or no accelerator for it.
    """
    stages, budget = pipeline_stages(pipe, height, width, num_frames), None
    if profile == "cpu":
        device = "cpu"
        budget = free_bytes(torch.device("cpu")) + sum(stage.weights for stage in stages)
    plan = plan_memory(stages, profile, budget)
    if device is None:
        if not torch.accelerator.is_available():
            raise ValueError(f'Profile {profile!r} is for an accelerator, and there is none: use "cpu".')
        device = torch.accelerator.current_accelerator()
    device = torch.device(device)
    if plan.tile:
        pipe.vae.enable_tiling()
    if plan.offload == "none":
        pipe.to(device)
    elif plan.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        _offload_groups(pipe, device)
    return plan


def _offload_groups(pipe: FactorizedVideoPipeline, device: torch.device) -> None:
    # Copying the next layer while one works is for devices with streams.
    options = {"onload_device": device, "offload_device": torch.device("cpu"), "use_stream": device.type == "cuda"}
    for name, module in pipe.components.items():
        if name == "vae":
            module.to(device)
        elif name in ("transformer", "transformer_2") and module is not None:
            # By block: a block's layers are used past their modules (see `AnchorConditionedAttnProcessor`).
            module.enable_group_offload(offload_type="block_level", num_blocks_per_group=1, **options)
        elif isinstance(module, torch.nn.Module):
            apply_group_offloading(module, offload_type="leaf_level", **options)


def _stages(modules: Mapping[str, torch.nn.Module], height: int, width: int, num_frames: int) -> list[Stage]:
    vae = modules["vae"]
    strides = vae.config.scale_factor_temporal, vae.config.scale_factor_spatial
    latents = (BATCH, vae.config.z_dim, (num_frames - 1) // strides[0] + 1, height // strides[1], width // strides[1])
    stages = []
    for name, module in modules.items():
        weights = _bytes(module)
        if name == "vae":
            size = next(vae.parameters()).element_size()
            tile = vae.tile_sample_min_height * vae.tile_sample_min_width
            whole, tiled = decode_bytes(vae.config, latents, size), decode_bytes(vae.config, latents, size, tile)
            stages.append(Stage(name, weights, weights, whole, tiled))
        elif name in ("transformer", "transformer_2"):
            blocks = [_bytes(block) for block in module.blocks]
            layers = weights - sum(blocks) + 2 * max(blocks)
            stages.append(Stage(name, weights, layers, _transformer_working(module, latents)))
        else:
            # A tensor that two layers share counts once.
            owned = {tensor: part for part in module.modules() for tensor in part.parameters(recurse=False)}
            own = sorted(_bytes(part, recurse=False) for part in set(owned.values()))
            stages.append(Stage(name, weights, sum(own[-2:]), ALLOWANCE))
    return stages


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
