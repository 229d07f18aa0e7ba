"""Ways to make the forwards of a guided step fewer or cheaper that are not in the package, with what they would save.

* The conditional and the unconditional branch in one batch instead of one after the other: measured, at `--size`.
* The text's keys and values once per prompt, and the anchor's once per video (in a model whose anchor sees itself alone):
  counted for the whole models, as shares of the FLOPs of a forward. Only the forwards after the first would save them.

First, a batch of both branches is compared with the two alone.

    python examples/benchmarks/benchmark_forwards.py --size cpu
"""

import statistics
from dataclasses import replace

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

from diffusers_fvg.transformer_anchor import AnchorConditionedTransformer3D


# In bfloat16 a product of twice the rows may round in another order.
GATES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
NOTES = (
    "None of these is in the package. A batch of both branches pays where a forward is too small to fill the device, as the "
    "shapes model's; at the tokens of a whole model it computes the same and holds twice the activations. The text's keys "
    "and values are a thousandth of a forward. The anchor's are one to two hundredths, for the memory in the table, once for "
    "each branch, and for a model that is trained not to let its anchor see the clip."
)
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
            "MiB": size.config["num_layers"] * 2 * tokens * width(size) * size.dtype.itemsize / 2**20,
        }
        for part, (flops, tokens) in rows.items()
    ]


def main() -> None:
    args = make_parser(__doc__, "forwards.json").parse_args()
    device, runs, differences = args.device, [], []
    for name in dict.fromkeys(("shapes", args.size)):
        size = SIZES[name]
        model = build_transformer(AnchorConditionedTransformer3D, size, device)
        inputs = transformer_inputs(size, device, per_token=False, batch_size=2)
        # One clip with two texts.
        for key in ("hidden_states", "timestep"):
            inputs[key] = inputs[key][:1].repeat_interleave(2, dim=0)

        @torch.no_grad()
        def apart(model=model, inputs=inputs) -> torch.Tensor:
            branches = [{key: value[i : i + 1] for key, value in inputs.items()} for i in range(2)]
            return torch.cat([model(**branch, return_dict=False)[0] for branch in branches])

        @torch.no_grad()
        def together(model=model, inputs=inputs) -> torch.Tensor:
            return model(**inputs, return_dict=False)[0]

        calls = {APART: apart, TOGETHER: together}
        differences.append(gate(f"batch, {name}", together(), apart(), GATES[size.dtype]))
        seconds = interleaved_seconds(calls, device, args.repeats)
        known = [*model.parameters(), *model.buffers(), *inputs.values()]
        runs += [
            {
                "what": "both branches of guidance",
                "size": name,
                "form": form,
                "seconds": statistics.median(values),
                "ratio": median_ratio(seconds, form, APART),
                "MiB": peak_bytes(calls[form], device, known) / 2**20,
            }
            for form, values in seconds.items()
        ]
    for name in ("5b", "a14b"):
        runs += counted(name)
    settings = describe(args.size, device, args.repeats) | {"relative difference": max(differences)}
    write_report(args.output, "Fewer and cheaper forwards: what was left out", device, settings, runs, [], NOTES)


if __name__ == "__main__":
    main()
