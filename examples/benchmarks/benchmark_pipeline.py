"""Compares whole pipelines: preset `anchored-15` with stock text-to-video at 50 steps, on the same weights and device;
and the same 15 steps with one forward each, which a guidance-distilled LoRA allows.

`--model embedded` runs the shapes model that ships with the package, with all three stages from the prompt to the video.
`--model random` runs a video model of `--size` with random weights, from an anchor and text embeddings. It leaves out stages 1
and 2 and the text encoder, for which random weights have no meaning.

Before timing, our pipeline without an anchor is compared with stock `WanPipeline`, and our pipeline with the fused anchor LoRA,
which is timed, with the unfused one.

    python examples/benchmarks/benchmark_pipeline.py --model embedded
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from harness import (
    SIZES,
    Size,
    bar,
    build_transformer,
    count_flops,
    describe,
    gate,
    interleaved_seconds,
    make_clock,
    make_parser,
    median_ratio,
    peak_bytes,
    write_report,
)
from PIL import Image

import diffusers_fvg
from diffusers_fvg import FactorizedVideoPipeline
from diffusers_fvg.animate.transformer_anchor import AnchorConditionedTransformer3D
from diffusers_fvg.pipelines.profiles import WAN_VAES
from diffusers_fvg.schedules.presets import WAN_PRESETS


GATES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
NOTES = (
    "On the shapes model, stage 2 runs 40 forwards of its own model, which take over a third of the time of all "
    "stages, and a forward is so small that overhead dominates. The ratios of the times are therefore far above the "
    "ratios of the number of forwards."
)
PEAK_STEPS = 5
STOCK, ANCHORED, DISTILLED = "stock, 50 steps", "ours, anchored-15", "ours, anchored-15, one forward a step"
# A small VAE of the same class as the real one, which decodes in milliseconds.
TINY_VAE = {"base_dim": 4, "decoder_base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}


def seeded(device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def embedded(device: str) -> tuple[FactorizedVideoPipeline, WanPipeline, dict[str, Any], dict[str, Any]]:
    """Returns our pipeline, the stock pipeline with the same weights, and the call arguments of each."""
    ours = diffusers_fvg.load_embedded().to(device)
    bare = diffusers_fvg.load_embedded()
    transformer = WanTransformer3DModel.from_config(ours.transformer.config)
    # The base model has no anchor LoRA.
    states = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in bare.transformer.state_dict().items()
        if ".lora_" not in name
    }
    transformer.load_state_dict(states)
    stock = WanPipeline(
        tokenizer=ours.tokenizer,
        text_encoder=ours.text_encoder,
        vae=ours.vae,
        transformer=transformer.eval().to(device),
        scheduler=ours.presets["full-50"].make_scheduler(),
    )
    prompt = {"prompt": "A red circle moves to the right"}
    size = {name: ours.call_defaults[name] for name in ("height", "width", "num_frames", "max_sequence_length")}
    return ours, stock, prompt, prompt | size


def random(size: Size, device: str) -> tuple[FactorizedVideoPipeline, WanPipeline, dict[str, Any], dict[str, Any]]:
    channels = size.config["in_channels"]
    config = WAN_VAES[channels] | (TINY_VAE if size is SIZES["tiny"] else {})
    torch.manual_seed(0)
    # The values of the latent statistics do not affect the time.
    vae = AutoencoderKLWan(**config | {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels})
    vae = vae.to(device, size.dtype).eval()
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae}
    rest = dict.fromkeys(("transformer_2", "rewriter", "composer", "anchor_lora", "schedulers"))
    ours = FactorizedVideoPipeline(
        transformer=build_transformer(AnchorConditionedTransformer3D, size, device),
        scheduler=WAN_PRESETS["anchored-15"].make_scheduler(),
        **parts,
        **rest,
    )
    stock = WanPipeline(
        transformer=build_transformer(WanTransformer3DModel, size, device),
        scheduler=WAN_PRESETS["full-50"].make_scheduler(),
        expand_timesteps=channels == 48,
        **parts,
    )
    ratio = vae.config.scale_factor_spatial
    generator = seeded(device)
    embeds = [
        torch.randn(1, size.text_tokens, size.config["text_dim"], generator=generator, device=device).to(size.dtype)
        for _ in range(2)
    ]
    call = {
        "prompt_embeds": embeds[0],
        "negative_prompt_embeds": embeds[1],
        "height": size.latent_height * ratio,
        "width": size.latent_width * ratio,
        "num_frames": 4 * (size.latent_frames - 1) + 1,
    }
    return ours, stock, call | {"image": Image.new("RGB", (64, 64), "red")}, call


def main() -> None:
    parser = make_parser(__doc__, "pipeline.json")
    parser.add_argument("--model", choices=("embedded", "random"), help="default: embedded on a CPU, random on a GPU")
    args = parser.parse_args()
    device, on_gpu = args.device, args.device.startswith("cuda")
    model = args.model or ("random" if on_gpu else "embedded")
    ours, stock, our_call, stock_call = embedded(device) if model == "embedded" else random(SIZES[args.size], device)
    dtype = ours.transformer.dtype
    full = ours.presets["full-50"]
    size = SIZES["shapes" if model == "embedded" else args.size]
    flops, tokens = count_flops(AnchorConditionedTransformer3D, size, per_token=False), size.tokens
    for pipe in (ours, stock):
        pipe.set_progress_bar_config(disable=True)

    # Stock computes the sigmas from its scheduler's config; a preset has explicit sigmas.
    flow_shift = {"flow_shift": full.flow_shift}
    stock.scheduler = stock.scheduler.from_config(stock.scheduler.config, **flow_shift)

    def stock_video(steps: int = 50, output_type: str = "np") -> torch.Tensor:
        call = {"num_inference_steps": steps, "guidance_scale": full.guidance_scale, "output_type": output_type}
        return stock(generator=seeded("cpu"), **stock_call, **call).frames

    def our_video(**options: Any):
        return ours(generator=seeded("cpu"), output_type="np", **our_call, **options)

    def direct(steps: int) -> torch.Tensor:
        call = {name: value for name, value in our_call.items() if name != "image"}
        options = {"mode": "direct", "num_inference_steps": steps, "guidance_scale": full.guidance_scale}
        # Stock's scheduler, so that the steps have the same noise levels.
        previous, ours.scheduler = ours.scheduler, stock.scheduler.from_config(stock.scheduler.config)
        try:
            return ours(generator=seeded("cpu"), output_type="pt", **call, **options).frames
        finally:
            ours.scheduler = previous

    difference = gate("text to video", direct(3).float(), stock_video(3, "pt").float(), GATES[dtype])
    if model == "embedded":
        few = {"num_inference_steps": 3, "image": Image.new("RGB", (64, 64), "red")}
        before = torch.from_numpy(our_video(**few).frames)
        ours.fuse_lora()
        gate("fused LoRA", torch.from_numpy(our_video(**few).frames), before, GATES[dtype])

    timings: list[dict[str, float]] = []

    def anchored(**options: Any) -> None:
        timings.append(our_video(preset="anchored-15", **options).timings)

    calls: dict[str, Callable[[], object]] = {
        STOCK: stock_video,
        ANCHORED: anchored,
        # As with a guidance-distilled LoRA: the time depends on the number of forwards and not on the values of the weights.
        DISTILLED: partial(anchored, guidance_scale=1.0),
    }
    seconds = interleaved_seconds(calls, device, args.repeats)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {name: median_ratio(seconds, name, STOCK) for name in calls}
    # After the warm-up, guided and unguided calls alternate.
    guided = timings[2::2]
    whole = [sum(stages.values()) for stages in guided]
    share = statistics.median(stages["decode"] / total for stages, total in zip(guided, whole, strict=True))
    stages = {name: statistics.median(run[name] for run in guided) for name in guided[0]}

    modules = [
        part for pipe in (ours, stock) for part in pipe.components.values() if isinstance(part, torch.nn.Module)
    ]
    known = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    forwards = {STOCK: 100, ANCHORED: 30, DISTILLED: 15}
    # The peak is that of all steps: a solver keeps the predictions of the last two or three.
    short: dict[str, Callable[[], object]] = {
        STOCK: partial(stock_video, PEAK_STEPS),
        ANCHORED: partial(our_video, num_inference_steps=PEAK_STEPS),
        DISTILLED: partial(our_video, num_inference_steps=PEAK_STEPS, guidance_scale=1.0),
    }
    runs = [
        {
            "pipeline": name,
            "seconds": medians[name],
            "ratio": ratios[name],
            "forwards": forwards[name],
            "TFLOP of the forwards": forwards[name] * flops / 1e12,
            "peak MiB above weights": peak_bytes(call, device, known) / 2**20,
        }
        for name, call in short.items()
    ]
    settings = {"model": model, "repeats": args.repeats, "clock": make_clock(device)[1], "tokens": tokens}
    settings |= {"relative difference of 3 steps without an anchor": difference}
    settings["seconds of anchored-15's stages"] = ", ".join(f"{stage} {value:.2g}" for stage, value in stages.items())
    if model == "random":
        settings |= describe(args.size, device, args.repeats)
    at_full_size = on_gpu and args.size in ("5b", "a14b") and model == "random"
    shapes, wan = (model == "embedded" or None), (at_full_size or None)
    bars = []
    for title, here, needs in (
        ("shapes model", shapes, "--model embedded"),
        ("Wan2.2 size", wan, "a GPU: --model random --size 5b"),
    ):
        bars += [
            bar(
                f"{title}: time of a video, ours with 15 steps / stock with 50",
                0.25,
                here and ratios[ANCHORED],
                needs=needs,
            ),
            bar(
                f"{title}: time of a video, ours with 15 forwards / stock with 100",
                0.18,
                here and ratios[DISTILLED],
                needs=needs,
            ),
            bar(f"{title}: time of decoding / time of all stages", 0.15, here and share, needs=needs),
        ]
    bars.append(
        bar(
            "shapes model: seconds of a video on a CPU, all stages",
            20,
            None if on_gpu else shapes and medians[ANCHORED],
            needs="a CPU: --model embedded",
        )
    )
    write_report(args.output, "Whole pipeline", device, settings, runs, bars, NOTES)


if __name__ == "__main__":
    main()
