"""Ways to make the forwards of a guided step fewer or cheaper, with what they save. Only the first is in the package.

* The anchor LoRA fused into the weights, `pipe.fuse_lora()`, instead of as layers of its own: measured, at `--size`.
* The conditional and the unconditional branch in one batch instead of one after the other: measured, at `--size`.
* The text's keys and values once per prompt, and the anchor's once per video (in a model whose anchor sees itself alone):
  counted for the whole models, as shares of the FLOPs of a forward. Only the forwards after the first would save them.

First, a batch of both branches is compared with the two alone, and the fused model with the other.

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
    "Of these the fused LoRA alone is in the package. A batch of both branches pays where a forward is too small to fill the device, as the "
    "shapes model's; at the tokens of a whole model it computes the same and holds twice the activations. The text's keys "
    "and values are a thousandth of a forward. The anchor's are one to two hundredths, for the memory in the table, once for "
    "each branch, and for a model that is trained not to let its anchor see the clip."
)
LAYERS, FUSED = "as layers", "fused"
# Of Wan2.2-TI2V-5B's config for the trainer, and of the shapes model.
RANK, SHAPES_RANK = 128, 16
APART, TOGETHER = "one after the other", "in one batch"


def width(size: Size) -> int:
    return size.config["num_attention_heads"] * size.config["attention_head_dim"]


def text_flops(size: Size) -> int:
    """Of the text's keys and values in all blocks: two products of tokens, width and width."""
    return size.config["num_layers"] * 2 * 2 * size.text_tokens * width(size) ** 2


def counted(name: str) -> list[dict]:
    size = SIZES[name]
    whole = count_flops(AnchorConditionedTransformer3D, size, per_token=False)
    # A clip of the anchor alone, but for what every forward does with the text.
    alone = count_flops(AnchorConditionedTransformer3D, replace(size, latent_frames=1), per_token=False)
    rows = {"text": (text_flops(size), size.text_tokens), "anchor": (alone - text_flops(size), size.frame_tokens)}
    return [
        {
            "what": f"{part}'s keys and values, counted",
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
    """Rows of two forms, the first being what the second is compared with."""
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
