"""Compares a training step of an anchor LoRA (forward and backward) of the anchored transformer, as the trainer runs it, with
diffusers' `WanTransformer3DModel` with the same weights, LoRA and loss, in the trainer's mixed precision.

There is one anchor. The stock class takes one timestep per token, ours one per latent frame. Two results are for the whole model:

* The stock class computes its modulation table once for every token, which is a smaller share of the time of a deeper model. On
  a CPU, where the whole model is too slow, its time is extrapolated from those of the step and of one block.
* Memory is computed from tensor shapes: the activations that the forward keeps for the backward, and the peak of both, above
  weights and inputs.

    python examples/benchmarks/benchmark_training_step.py --size cpu
"""

import argparse
import gc
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
from diffusers import WanTransformer3DModel
from harness import (
    SIZES,
    WHOLE,
    LiveBytes,
    Size,
    at_full_depth,
    bar,
    build_transformer,
    describe,
    gate,
    interleaved_seconds,
    make_parser,
    median_ratio,
    synchronize,
    transformer_inputs,
    write_report,
)
from peft import LoraConfig
from peft.helpers import disable_input_dtype_casting
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from diffusers_fvg.animate.transformer_anchor import AnchorConditionedTransformer3D
from diffusers_fvg.training.config import WAN_TARGETS
from diffusers_fvg.training.objectives import velocity_loss


CLASSES = {"stock": WanTransformer3DModel, "ours": AnchorConditionedTransformer3D}
RANK = 128
# Limits for loss and gradient. In bfloat16 the stock class also rounds its modulation, which ours keeps in float32.
GATES = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


class Step:
    """A model with a LoRA on the trainer's targets, and one clip whose first latent frame is an anchor."""

    def __init__(self, name: str, size: Size, device: str, checkpointing: bool):
        self.name, self.size, self.device = name, size, device
        self.model = build_transformer(CLASSES[name], size, device).requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(WAN_TARGETS)))
            self.tuned = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
            for parameter_name, parameter in self.tuned.items():
                # The trainer also keeps them in float32. `lora_B` starts at zero, which would make the gradient of `lora_A` zero.
                parameter.data = parameter.data.float()
                if ".lora_B." in parameter_name:
                    torch.nn.init.normal_(parameter, std=0.01)
        self.model.train()
        if checkpointing:
            self.model.enable_gradient_checkpointing()
        inputs = transformer_inputs(size, "cpu", per_token=name == "stock")
        counted = torch.ones(1, size.latent_frames)
        counted[:, 0] = 0
        target = torch.randn(inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(2))
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        embeds = inputs.pop("encoder_hidden_states")
        self.inputs = [inputs, embeds, target.to(device), counted.to(device)]

    def __call__(self, held: Callable[[], int] = lambda: 0) -> tuple[torch.Tensor, int]:
        """Runs forward and backward; returns the loss, and the result of `held` between the two."""
        self.model.zero_grad(set_to_none=True)
        narrow = self.size.dtype == torch.bfloat16
        # The trainer avoids PEFT's float32 copy of every LoRA layer's input.
        with disable_input_dtype_casting(self.model, active=self.name == "ours"):
            with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=narrow):
                loss = velocity_loss(self.model, *self.inputs)
            between = held()
            loss.backward()
        return loss.detach(), between

    def block_call(self) -> Callable[[], object]:
        """Returns a call of forward and backward of the first block with its inputs in the model."""
        given: list[tuple] = []
        block = self.model.blocks[0]
        hook = block.register_forward_pre_hook(lambda _, args: given.append(args))
        self()
        hook.remove()
        args = [x.detach() if isinstance(x, torch.Tensor) else x for x in given[0]]
        args[0].requires_grad_()
        learned = [args[0], *(parameter for parameter in block.parameters() if parameter.requires_grad)]

        def call() -> None:
            with (
                disable_input_dtype_casting(self.model, active=self.name == "ours"),
                torch.autocast(self.device.split(":")[0], torch.bfloat16),
            ):
                out = block(*args)
            torch.autograd.grad(out, learned, torch.ones_like(out))

        return call

    def gradient(self) -> torch.Tensor:
        return torch.cat([parameter.grad.flatten() for parameter in self.tuned.values()])

    def memory(self) -> tuple[int, int]:
        """Returns the bytes that the forward keeps for the backward, and the peak of both, above weights and inputs."""
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        if not self.device.startswith("cuda"):
            with LiveBytes(
                [*self.model.parameters(), *self.model.buffers(), *self.inputs[0].values(), *self.inputs[1:]]
            ) as counter:
                _, kept = self(lambda: counter.live)
            return kept, counter.peak
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        _, kept = self(lambda: torch.cuda.memory_allocated(self.device) - before)
        synchronize(self.device)
        return kept, torch.cuda.max_memory_allocated(self.device) - before


def counted_memory(size: Size, checkpointing: bool) -> dict[str, tuple[int, int]]:
    """Returns [`Step.memory`] of both classes from tensor shapes, without computing anything."""
    counted = {}
    for name in CLASSES:
        # PEFT cannot add an adapter to a model of fake tensors, but it can on the meta device.
        step = Step(name, size, "meta", checkpointing)
        with FakeTensorMode():
            for module in step.model.modules():
                for own in (module._parameters, module._buffers):
                    own |= {key: _shape_alone(tensor) for key, tensor in own.items() if tensor is not None}
            step.inputs, step.device = tree_map(_shape_alone, step.inputs), "cpu"
            counted[name] = step.memory()
    return counted


def _shape_alone(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor of the same shape and dtype on the CPU; call this in `FakeTensorMode`."""
    alone = torch.empty(tensor.shape, dtype=tensor.dtype)
    return torch.nn.Parameter(alone, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else alone


def compare(size: Size, device: str, checkpointing: bool) -> tuple[dict[str, Step], float]:
    """Returns the steps of both classes, and the larger relative difference of their losses and gradients."""
    steps = {name: Step(name, size, device, checkpointing) for name in CLASSES}
    loss = {name: step()[0] for name, step in steps.items()}
    difference = gate("loss", loss["ours"], loss["stock"], GATES[size.dtype])
    gradients = (steps["ours"].gradient(), steps["stock"].gradient())
    return steps, max(difference, gate("gradient", *gradients, GATES[size.dtype]))


def main() -> None:
    parser = make_parser(__doc__, "training_step.json")
    checkpointing = {"action": argparse.BooleanOptionalAction, "help": "default: at the sizes of whole models"}
    parser.add_argument("--gradient-checkpointing", **checkpointing)
    args = parser.parse_args()
    device, on_gpu = args.device, args.device.startswith("cuda")
    if args.gradient_checkpointing is None:
        args.gradient_checkpointing = args.size in ("5b", "a14b")
    # Checked in float32 first, because the rounding of bfloat16 hides small errors.
    compare(SIZES["tiny"], device, checkpointing=False)

    size = replace(SIZES[args.size], dtype=torch.bfloat16)
    layers, runs = size.config["num_layers"], []
    steps, difference = compare(size, device, args.gradient_checkpointing)
    blocks = {} if on_gpu else {f"{name}, a block": step.block_call() for name, step in steps.items()}
    seconds = interleaved_seconds(steps | blocks, device, args.repeats)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = median_ratio(seconds, "ours", "stock")
    for name, step in steps.items():
        shown = (medians[name], ratio if name == "ours" else 1.0)
        runs.append(_run("timed", layers, args.gradient_checkpointing, name, *shown))
        runs[-1] |= _memory(step.memory()) | {"relative difference": difference}
    if not on_gpu:
        whole = {name: at_full_depth(medians[name], medians[f"{name}, a block"], layers) for name in CLASSES}
        ratio = whole["ours"] / whole["stock"]
        for name, value in whole.items():
            depth = SIZES[WHOLE].config["num_layers"]
            timed = ("extrapolated", depth, args.gradient_checkpointing, name, value, value / whole["stock"])
            runs.append(_run(*timed))

    # The targets for memory are those of a whole model with its own video length.
    ratios = {}
    for checkpointing in (False, True):
        memory = counted_memory(SIZES[WHOLE], checkpointing)
        ratios[checkpointing] = [ours / stock for ours, stock in zip(memory["ours"], memory["stock"], strict=True)]
        for name in CLASSES:
            run = _run(f"computed, {WHOLE}", SIZES[WHOLE].config["num_layers"], checkpointing, name)
            runs.append(run | _memory(memory[name]))
    bars = [
        bar(
            "time of a step on a GPU, ours / stock",
            0.90,
            ratio if on_gpu else None,
            needs="an H200-class GPU: --size 5b",
        ),
        bar(
            "time of a step on a CPU, extrapolated to the whole model, ours / stock",
            0.90,
            None if on_gpu or args.size == "tiny" else ratio,
            needs="a CPU: --size cpu",
        ),
        bar(f"memory of kept activations, {WHOLE}, no checkpointing, ours / stock", 0.70, ratios[False][0]),
        bar(f"peak memory of forward and backward, {WHOLE}, no checkpointing, ours / stock", 0.70, ratios[False][1]),
        bar(
            f"peak memory of forward and backward, {WHOLE}, gradient checkpointing, ours / stock",
            0.70,
            ratios[True][1],
        ),
    ]
    settings = describe(args.size, device, args.repeats) | {"dtype": "bfloat16, LoRA float32", "LoRA rank": RANK}
    write_report(args.output, "Training step, anchor LoRA", device, settings, runs, bars)


def _run(
    how: str, layers: int, checkpointing: bool, name: str, seconds: float | None = None, ratio: float | None = None
):
    """A row of the table."""
    return {
        "how": how,
        "layers": layers,
        "gradient checkpointing": checkpointing,
        "class": name,
        "seconds": seconds,
        "ratio": ratio,
        "kept MiB": None,
        "peak MiB": None,
        "relative difference": None,
    }


def _memory(kept_and_peak: tuple[int, int]) -> dict[str, float]:
    return dict(zip(("kept MiB", "peak MiB"), (size / 2**20 for size in kept_and_peak)))


if __name__ == "__main__":
    main()
