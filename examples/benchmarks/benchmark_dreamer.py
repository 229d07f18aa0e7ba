"""Compares one denoising step of Factorized-Dreamer's video UNet with that of the same UNet without its designs.

The designs are T2I adapter, PACA and motion text. They are timed together and one by one. The features of image and text are
computed before, as in sampling from the second step on; the first step, which computes them, has its own row. FLOPs are always
counted at 512 pixels and 16 frames for the UNet of Stable Diffusion 2.1.

    python examples/benchmarks/benchmark_dreamer.py --size cpu
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, bar, gate, interleaved_seconds, median_ratio, write_report
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusers_fvg.dreamer.unet import FactorizedDreamerUNet


# stabilityai/stable-diffusion-2-1-base, unet/config.json.
SD_2_1 = {
    "sample_size": 64,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
OFF = {"t2i_adapter": None, "paca": None, "motion_embed_dim": None}
# One design at a time; `all` are the defaults of the class.
VARIANTS = {
    "plain": OFF,
    "all": {},
    "t2i_adapter": {"paca": None, "motion_embed_dim": None},
    "paca": {"t2i_adapter": None, "motion_embed_dim": None},
    "motion text": {"t2i_adapter": None, "paca": None},
}


@dataclass(frozen=True)
class Size:
    """One size of the benchmark.

    Args:
        config (`dict`): configuration of the image UNet.
        num_frames, latent_side (`int`): number of frames and side of the square latents of the clip.
        image_embed_dim, motion_embed_dim (`int`): widths of CLIP's image embedding and of T5's tokens.
        motion_tokens (`int`): number of tokens of the motion text.
        dtype (`torch.dtype`): dtype of weights and activations.
    """

    config: dict[str, Any]
    num_frames: int
    latent_side: int
    image_embed_dim: int
    motion_embed_dim: int
    motion_tokens: int
    dtype: torch.dtype


SMALL = {"sample_size": 32, "attention_head_dim": 2, "cross_attention_dim": 64}
SIZES = {
    "tiny": Size(
        SMALL | {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1}, 4, 8, 32, 32, 8, torch.float32
    ),
    # A fifth of Stable Diffusion's width and 4 frames of 256 pixels take seconds per step on one core.
    "cpu": Size(
        SMALL | {"block_out_channels": (64, 128, 256, 256), "cross_attention_dim": 256, "attention_head_dim": 4},
        *(4, 32, 256, 512, 77),
        torch.float32,
    ),
    "sd2.1": Size(SD_2_1, 16, 64, 1024, 2048, 77, torch.bfloat16),
}


def build(size: Size, switches: dict[str, Any]) -> FactorizedDreamerUNet:
    """Builds a UNet with random weights; those of the image UNet are drawn first, so that all variants share them."""
    torch.manual_seed(0)
    widths = {"image_embed_dim": size.image_embed_dim, "motion_embed_dim": size.motion_embed_dim}
    return FactorizedDreamerUNet(**size.config, num_frames=size.num_frames, **widths | switches).eval()


def make_inputs(size: Size, unet: FactorizedDreamerUNet, device: str) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator, device=device).to(size.dtype)

    side, config = size.latent_side, unet.config
    inputs = {
        "sample": draw(4, size.num_frames, side, side),
        "timestep": torch.tensor(500, device=device),
        "encoder_hidden_states": draw(77, config.cross_attention_dim),
    }
    conditions = {
        "image_latents": (config.paca, (4, side, side)),
        "image_embeds": (config.t2i_adapter, (size.image_embed_dim,)),
        "motion_embeds": (config.motion_embed_dim, (size.motion_tokens, size.motion_embed_dim)),
    }
    return inputs | {name: draw(*shape) for name, (switch, shape) in conditions.items() if switch is not None}


def count_flops(size: Size, switches: dict[str, Any]) -> int:
    """Returns the FLOPs of the second or a later step, from tensor shapes without computing anything."""
    # The counter does not support the CPU's fused attention, but it does support the matrix products of the plain one.
    with FakeTensorMode(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        unet = build(size, switches)
        inputs = make_inputs(replace(size, dtype=torch.float32), unet, "cpu") | {"image_cache": {}, "motion_cache": {}}
        unet(**inputs)
        with FlopCounterMode(display=False) as counter:
            unet(**inputs)
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--size", choices=SIZES, default="sd2.1" if has_gpu else "cpu", help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if has_gpu else "cpu", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="calls of each variant, in turn (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "dreamer.json", help="default: %(default)s")
    args = parser.parse_args()
    size = SIZES[args.size]

    models, calls = {}, {}
    for name, switches in VARIANTS.items():
        models[name] = unet = torch.nn.Module.to(build(size, switches), args.device, size.dtype)
        inputs = make_inputs(size, unet, args.device)
        caches: dict[str, dict] = {"image_cache": {}, "motion_cache": {}}

        def step(unet=unet, inputs=inputs | caches) -> torch.Tensor:
            with torch.no_grad():
                return unet(**inputs).sample

        def first_step(unet=unet, inputs=inputs) -> torch.Tensor:
            with torch.no_grad():
                return unet(**inputs).sample

        calls[name] = step
        if name == "all":
            calls["all, first step"] = first_step
    # Untrained designs have no effect, so that all calls give the same result.
    differences = {name: gate(name, call(), calls["plain"](), 0.0) for name, call in calls.items()}
    seconds = interleaved_seconds(calls, args.device, args.repeats)
    ratios = {name: median_ratio(seconds, name, "plain") for name in calls}
    flops = {name: count_flops(SIZES["sd2.1"], switches) for name, switches in VARIANTS.items()}

    runs = [
        {
            "designs": name,
            "seconds": statistics.median(seconds[name]),
            "time / plain": ratios[name],
            "difference": differences[name],
            "parameters": sum(p.numel() for p in models[name].parameters()) if name in models else None,
            "TFLOP at 512 pixels": flops[name] / 1e12 if name in flops else None,
            "FLOPs / plain": flops[name] / flops["plain"] if name in flops else None,
        }
        for name in calls
    ]
    timed = ratios["all"] if args.size == "sd2.1" else None
    bars = [
        bar("FLOPs of a step at 512 pixels, all designs / plain UNet", 1.3, flops["all"] / flops["plain"]),
        bar(f"time of a step at size {args.size}, all designs / plain UNet", 1.3, ratios["all"]),
        bar(
            "time of a step at 512 pixels and 16 frames, all designs / plain UNet",
            1.3,
            timed,
            needs="a GPU: --size sd2.1",
        ),
    ]
    settings = {
        "size": args.size,
        "num_frames": size.num_frames,
        "latent_side": size.latent_side,
        "channels": size.config.get("block_out_channels", (320, 640, 1280, 1280)),
        "dtype": str(size.dtype).removeprefix("torch."),
        "repeats": args.repeats,
    }
    write_report(args.output, "Factorized-Dreamer: a denoising step", args.device, settings, runs, bars)


if __name__ == "__main__":
    main()
