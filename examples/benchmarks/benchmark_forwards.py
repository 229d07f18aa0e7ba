"""Measures ways to save forwards, or parts of them, in a guided step. Only the first one is in the package.

* Fusing the anchor LoRA into the weights (`pipe.fuse_lora()`): measured at `--size`.
* Running the conditional and the unconditional branch in one batch: measured at `--size`.
* Caching the blocks after the first one when its output hardly changes (diffusers' first-block cache): compared with fewer steps
  on the trained shapes model. The ratio is the share of blocks that are computed, and the difference is that of the frames.
* Computing the text's keys and values once per prompt, and the anchor's once per video, which needs a model whose anchor attends
  only to itself: computed for the whole models, as shares of the FLOPs of a forward. Only forwards after the first save them.

Before timing, the batch is compared with the separate branches, and the fused model with the unfused one.

    python examples/benchmarks/benchmark_forwards.py --size cpu
"""

import statistics
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from diffusers import FirstBlockCacheConfig
from harness import (
    SIZES,
    Size,
    build_transformer,
    count_flops,
    describe,
    gate,
    interleaved_seconds,
    make_parser,
    median_ratio,
    peak_bytes,
    relative_rms,
    transformer_inputs,
    write_report,
)
from peft import LoraConfig
from PIL import Image

from diffusers_fvg import load_embedded
from diffusers_fvg.animate.transformer_anchor import AnchorConditionedTransformer3D
from diffusers_fvg.shapes.prompts import CATEGORIES, make_scene
from diffusers_fvg.shapes.world import render
from diffusers_fvg.training.config import WAN_TARGETS


# In bfloat16 a product of twice the rows may round in another order.
GATES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
NOTES = (
    "Only the fused LoRA is in the package. One batch of both branches is faster if a forward is too small to fill "
    "the device, as in the shapes model; with the tokens of a whole model it takes the same time and twice the "
    "memory of the activations. Computing the text's keys and values once saves a thousandth of a forward. "
    "Computing the anchor's once saves one to two hundredths, costs the memory in the table for each branch, and "
    "needs a model that is trained so that its anchor does not attend to the clip. With 15 steps, a cache changes the "
    "video more than as many blocks left out by fewer steps do."
)
LAYERS, FUSED = "as layers", "fused"
# LoRA ranks of the training config for Wan2.2-TI2V-5B and of the shapes model.
RANK, SHAPES_RANK = 128, 16
# Thresholds of the first-block cache, and numbers of steps that compute about as many blocks.
THRESHOLDS, STEPS = (0.1, 0.2), (10, 8)
APART, TOGETHER = "one after the other", "in one batch"


def width(size: Size) -> int:
    return size.config["num_attention_heads"] * size.config["attention_head_dim"]


def text_flops(size: Size) -> int:
    """Returns the FLOPs of the text's keys and values in all blocks: two matrix products each."""
    return size.config["num_layers"] * 2 * 2 * size.text_tokens * width(size) ** 2


def counted(name: str) -> list[dict]:
    size = SIZES[name]
    whole = count_flops(AnchorConditionedTransformer3D, size, per_token=False)
    # A clip of the anchor alone, without the part of the text.
    alone = count_flops(AnchorConditionedTransformer3D, replace(size, latent_frames=1), per_token=False)
    rows = {"text": (text_flops(size), size.text_tokens), "anchor": (alone - text_flops(size), size.frame_tokens)}
    return [
        {
            "what": f"{part}'s keys and values, computed",
            "size": name,
            "form": "computed once",
            "seconds": None,
            "ratio": 1 - flops / whole,
            "relative difference": None,
            "MiB": size.config["num_layers"] * 2 * tokens * width(size) * size.dtype.itemsize / 2**20,
        }
        for part, (flops, tokens) in rows.items()
    ]


def with_lora(size: Size, fused: bool, device: str) -> torch.nn.Module:
    model = build_transformer(AnchorConditionedTransformer3D, size, device)
    rank = SHAPES_RANK if size is SIZES["shapes"] else RANK
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(WAN_TARGETS)))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.01)
    if fused:
        model.fuse_lora()
    return model


@torch.no_grad()
def compare(
    what: str, size: str, calls: dict[str, Callable], known: list[torch.Tensor], args: Namespace
) -> list[dict]:
    """Returns the rows of two calls; the second is compared with the first."""
    first, second = calls
    limit = GATES[SIZES[size].dtype]
    difference = gate(f"{what}, {size}", calls[second]()[0], calls[first]()[0], limit)
    seconds = interleaved_seconds(calls, args.device, args.repeats)
    return [
        {
            "what": what,
            "size": size,
            "form": form,
            "seconds": statistics.median(values),
            "ratio": median_ratio(seconds, form, first),
            "relative difference": None if form == first else difference,
            "MiB": peak_bytes(calls[form], args.device, known) / 2**20,
        }
        for form, values in seconds.items()
    ]


def cached_steps(device: str, scenes: int) -> list[dict]:
    """Rows of 15 steps of the embedded model, fewer steps, and 15 steps with a cache, from true first frames."""
    pipe = load_embedded().to(device)
    pipe.set_progress_bar_config(disable=True)
    random, computed = np.random.default_rng(0), []
    drawn = [make_scene(CATEGORIES[number % len(CATEGORIES)], random) for number in range(scenes)]
    for block in pipe.transformer.blocks:
        block.attn1.register_forward_hook(lambda *_: computed.append(1))

    def videos(steps: int, threshold: float | None = None) -> tuple[torch.Tensor, int]:
        computed.clear()
        if threshold is not None:
            pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        call = {"preset": "anchored-15", "num_inference_steps": steps, "output_type": "pt", "generator": 0}
        frames = [pipe(s.prompt, image=Image.fromarray(render(s.objects)[0]), **call).frames.cpu() for s in drawn]
        if threshold is not None:
            pipe.transformer.disable_cache()
        return torch.cat(frames), len(computed)

    forms = {"15 steps": (15,)} | {f"{steps} steps": (steps,) for steps in STEPS}
    forms |= {f"15 steps, cache with threshold {threshold}": (15, threshold) for threshold in THRESHOLDS}
    found = {form: videos(*options) for form, options in forms.items()}
    exact, whole = found["15 steps"]
    return [
        {
            "what": "blocks of a video, computed",
            "size": "shapes, trained",
            "form": form,
            "seconds": None,
            "ratio": count / whole,
            "relative difference": None if frames is exact else relative_rms(frames, exact),
            "MiB": None,
        }
        for form, (frames, count) in found.items()
    ]


def main() -> None:
    args = make_parser(__doc__, "forwards.json").parse_args()
    device, runs = args.device, []
    for name in dict.fromkeys(("shapes", args.size)):
        size = SIZES[name]
        model = build_transformer(AnchorConditionedTransformer3D, size, device)
        inputs = transformer_inputs(size, device, per_token=False, batch_size=2)
        # One clip with two texts.
        for key in ("hidden_states", "timestep"):
            inputs[key] = inputs[key][:1].repeat_interleave(2, dim=0)

        def apart(model=model, inputs=inputs) -> tuple[torch.Tensor]:
            branches = [{key: value[i : i + 1] for key, value in inputs.items()} for i in range(2)]
            return (torch.cat([model(**branch, return_dict=False)[0] for branch in branches]),)

        def together(model=model, inputs=inputs) -> tuple[torch.Tensor]:
            return model(**inputs, return_dict=False)

        known = [*model.parameters(), *model.buffers(), *inputs.values()]
        runs += compare("both branches of guidance", name, {APART: apart, TOGETHER: together}, known, args)
        del model, apart, together, known
        models = {form: with_lora(size, form == FUSED, device) for form in (LAYERS, FUSED)}
        inputs = {key: value[:1] for key, value in inputs.items()}
        calls = {form: partial(model, **inputs, return_dict=False) for form, model in models.items()}
        known = [t for model in models.values() for t in (*model.parameters(), *model.buffers())]
        runs += compare("anchor LoRA", name, calls, [*known, *inputs.values()], args)
    runs += cached_steps(device, args.repeats)
    for name in ("5b", "a14b"):
        runs += counted(name)
    settings = describe(args.size, device, args.repeats)
    write_report(args.output, "Fewer and cheaper forwards", device, settings, runs, [], NOTES)


if __name__ == "__main__":
    main()
