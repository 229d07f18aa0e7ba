"""Measures ways to save forwards, or parts of them, in a guided step. Only the first one is in the package.

* Fusing the anchor LoRA into the weights (`pipe.fuse_lora()`): measured at `--size`.
* Running the conditional and the unconditional branch in one batch: measured at `--size`.
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

import torch
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
    transformer_inputs,
    write_report,
)
from peft import LoraConfig

from diffusers_fvg.animate.transformer_anchor import AnchorConditionedTransformer3D
from diffusers_fvg.training.config import WAN_TARGETS


# In bfloat16 a product of twice the rows may round in another order.
GATES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
NOTES = (
    "Only the fused LoRA is in the package. One batch of both branches is faster if a forward is too small to fill "
    "the device, as in the shapes model; with the tokens of a whole model it takes the same time and twice the "
    "memory of the activations. Computing the text's keys and values once saves a thousandth of a forward. "
    "Computing the anchor's once saves one to two hundredths, costs the memory in the table for each branch, and "
    "needs a model that is trained so that its anchor does not attend to the clip."
)
LAYERS, FUSED = "as layers", "fused"
# LoRA ranks of the training config for Wan2.2-TI2V-5B and of the shapes model.
RANK, SHAPES_RANK = 128, 16
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
    for name in ("5b", "a14b"):
        runs += counted(name)
    settings = describe(args.size, device, args.repeats)
    write_report(args.output, "Fewer and cheaper forwards", device, settings, runs, [], NOTES)


if __name__ == "__main__":
    main()
