"""The step `decode` of `gpu_run.py`: variants of the VAE's decoder, and the light decoder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from benchmark_pipeline import TINY_VAE
from diffusers import AutoencoderKLWan

from diffusers_fvg import LightDecoder, kernels
from diffusers_fvg.animate import decoding
from diffusers_fvg.animate.light_decoder import fitting_file
from diffusers_fvg.pipelines.profiles import WAN_VAES


if TYPE_CHECKING:
    from gpu_run import Run


@torch.no_grad()
def decode(run: Run) -> None:
    """Times decoders on 5 latent frames, and extrapolates to the whole clip."""
    channels = run.size.config["in_channels"]
    vae = make_vae(run)
    # The light decoder is never tiny itself.
    sides = (2, 2) if run.name == "tiny" else (run.size.latent_height, run.size.latent_width)
    shape = (1, channels, 5, *sides)
    latents, rows = torch.randn(shape, device=run.device, dtype=run.size.dtype), []
    notes = "All weights are random. The light decoder is taew2_2 or taew2_1, a network of its own with less detail."

    def add(name: str, choice: str = "reference", chunks: Callable = decoding.decode_chunks, decoder=vae) -> None:
        def call(count: int) -> None:
            with kernels.use_kernels(choice):
                list(chunks(decoder, latents[:, :, :count], decoding.to_uint8))

        whole, first = (run.seconds(partial(call, count), 2) for count in (5, 1))
        each = (whole - first) / 4
        rows.append(
            {"decoder": name, "a latent frame": each, "whole clip": first + each * (run.size.latent_frames - 1)}
        )
        # After every decoder, so that an interruption loses no result.
        run.report("decode", "decoding", rows, notes=notes)

    add("light decoder", decoder=light_decoder(run))
    add("as it is")
    add("four latent frames at once", chunks=four_at_once)
    add("norm and SiLU in one pass", run.kernels)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        add("convolutions chosen by trying")
        add("both", run.kernels)
        lay_out(vae.decoder, torch.channels_last, torch.channels_last_3d)
        add("both, channels_last_3d", run.kernels)
        lay_out(vae.decoder, torch.contiguous_format, torch.contiguous_format)
    # The blocks share the code of their class. Each has a graph for the first latent frame, for the second, and for the rest.
    with torch._dynamo.config.patch(recompile_limit=64):
        for block in (vae.decoder.mid_block, *vae.decoder.up_blocks):
            block.compile(dynamic=False, backend=run.compiler)
        add("blocks compiled")


def make_vae(run: Run) -> AutoencoderKLWan:
    channels = run.size.config["in_channels"]
    config = WAN_VAES[channels] | (TINY_VAE if run.name == "tiny" else {})
    with torch.device(run.device):
        vae = AutoencoderKLWan(**config | {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels})
    return vae.eval().to(run.size.dtype)


def light_decoder(run: Run) -> LightDecoder:
    """Returns the light decoder of the size's latents with random weights."""
    with torch.device("meta"):
        name = fitting_file(AutoencoderKLWan(**WAN_VAES[run.size.config["in_channels"]]))
    with torch.device(run.device):
        return LightDecoder(name).eval().to(run.size.dtype)


def four_at_once(vae: AutoencoderKLWan, latents: torch.Tensor, convert: decoding.Convert):
    """Yields the frames of the first latent frame, then of four latent frames in one forward."""
    cache = [None] * sum(isinstance(module, decoding.WanCausalConv3d) for module in vae.decoder.modules())
    for index, frames in enumerate(vae.post_quant_conv(latents).split([1] + [4] * (latents.shape[2] // 4), dim=2)):
        decoded = vae.decoder(frames, feat_cache=cache, feat_idx=[0], first_chunk=index == 0)
        yield convert(decoding._pixels(vae, decoded))


def lay_out(model: torch.nn.Module, of_2d: torch.memory_format, of_3d: torch.memory_format) -> None:
    """Converts the weights of convolutions to these memory formats; their outputs then have the same formats."""
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
            memory_format = of_3d if isinstance(module, torch.nn.Conv3d) else of_2d
            module.weight.data = module.weight.data.contiguous(memory_format=memory_format)
