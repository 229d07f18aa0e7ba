"""Compares anchored window attention with attention to all frames: alone (forward, and with backward) and in a step.

There is one anchor at frame 0. The window is 3 latent frames for a video of 31, and smaller for shorter videos. Attention alone
runs in every implementation that the device supports, against the fastest installed backend of diffusers that computes the
right result here (`auto`). Before timing, each implementation is compared with the masked definition in float32, and the
transformer with a window over all frames with the transformer without a window.

    python examples/benchmarks/benchmark_attention.py --size cpu
"""

from collections.abc import Callable
from functools import partial

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from harness import (
    SIZES,
    Size,
    bar,
    build_transformer,
    describe,
    gate,
    interleaved_seconds,
    make_parser,
    median_ratio,
    transformer_inputs,
    write_report,
)

from diffusers_fvg import kernels
from diffusers_fvg.animate.attention import choose_backend
from diffusers_fvg.animate.transformer_anchor import AnchorConditionedTransformer3D
from diffusers_fvg.kernels import attention


# Limits of the relative RMS difference. bfloat16 rounds to 8 bits, and the roundings of the blocks of a step add up.
GATES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
STEP_GATES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
BACKWARD = "forward and backward"


def with_triton(function: Callable, *args, **kwargs) -> torch.Tensor:
    with kernels.use_kernels("triton"):
        return function(*args, **kwargs)


def window_forms(device: str) -> dict[str, Callable[..., torch.Tensor]]:
    forms = {"gathered": attention.gathered_frame_attention}
    if device.startswith("cuda"):
        forms |= {
            "flex, compiled": torch.compile(attention.flex_frame_attention),
            "triton": partial(with_triton, kernels.frame_attention),
        }
    return forms


def draw(size: Size, device: str) -> list[torch.Tensor]:
    """Returns query, key, value and the gradient of the output."""
    generator = torch.Generator(device).manual_seed(0)
    heads, head_dim = size.config["num_attention_heads"], size.config["attention_head_dim"]
    shape = (1, size.tokens, heads, head_dim)
    return [torch.randn(shape, generator=generator, device=device).to(size.dtype) for _ in range(4)]


def attention_runs(size: Size, seen: torch.Tensor, backend: str, device: str, repeats: int) -> list[dict]:
    *inputs, grad = draw(size, device)
    inputs = [x.requires_grad_() for x in inputs]
    # One head is enough to compare: its scores alone have the size of the tokens squared.
    one_head = [x[:, :, :1].detach().float() for x in inputs]
    forms = {name: partial(form, seen=seen) for name, form in window_forms(device).items()}
    with torch.no_grad():
        expected = attention.frame_attention(*one_head, seen)
        differences = {
            name: gate(name, form(*inputs)[:, :, :1], expected, GATES[size.dtype]) for name, form in forms.items()
        }
    dense = f"dense, {backend}"
    forms = {dense: partial(dispatch_attention_fn, backend=backend), **forms}

    def forward(form: Callable) -> None:
        with torch.no_grad():
            form(*inputs)

    def forward_and_backward(form: Callable) -> None:
        torch.autograd.grad(form(*inputs), inputs, grad)

    runs = []
    for part, call in (("forward", forward), (BACKWARD, forward_and_backward)):
        # FlashAttention-3 has no backward pass in diffusers.
        chosen = choose_backend(torch.device(device), size.dtype, inputs[0].shape[3], training=part == BACKWARD)
        if part == BACKWARD and chosen != backend:
            forms = {f"dense, {chosen}": partial(dispatch_attention_fn, backend=chosen)} | {
                name: form for name, form in forms.items() if name != dense
            }
        base = next(iter(forms))
        timed = interleaved_seconds({name: partial(call, form) for name, form in forms.items()}, device, repeats)
        for name, values in timed.items():
            runs.append(
                {
                    "what": f"attention, {part}",
                    "form": name,
                    "seconds": sorted(values)[len(values) // 2],
                    "ratio": median_ratio(timed, name, base),
                    "relative difference": differences.get(name),
                }
            )
    return runs


def step_runs(size: Size, window: int, backend: str, device: str, repeats: int) -> list[dict]:
    model = build_transformer(AnchorConditionedTransformer3D, size, device)
    model.set_attention_backend("auto")
    inputs = transformer_inputs(size, device, per_token=False)

    @torch.no_grad()
    def step(window: int | None) -> torch.Tensor:
        model.set_anchor_window(window)
        return model(**inputs, return_dict=False)[0]

    calls = {"gathered": step}
    if device.startswith("cuda"):
        calls["triton"] = partial(with_triton, step)
    dense = step(None)
    differences = {
        name: gate(f"step, {name}", call(size.latent_frames), dense, STEP_GATES[size.dtype])
        for name, call in calls.items()
    }
    base = f"dense, {backend}"
    timed = interleaved_seconds(
        {base: partial(step, None)} | {name: partial(call, window) for name, call in calls.items()}, device, repeats
    )
    return [
        {
            "what": "step",
            "form": name,
            "seconds": sorted(values)[len(values) // 2],
            "ratio": median_ratio(timed, name, base),
            "relative difference": differences.get(name),
        }
        for name, values in timed.items()
    ]


def main() -> None:
    args = make_parser(__doc__, "attention.json").parse_args()
    size, device = SIZES[args.size], args.device
    window = min(3, (size.latent_frames - 1) // 4)
    times = torch.full((1, size.latent_frames), 900.0, device=device)
    times[:, 0] = 0
    seen = attention.anchor_window(times, window)
    backend = choose_backend(torch.device(device), size.dtype, size.config["attention_head_dim"])

    runs = attention_runs(size, seen, backend, device, args.repeats)
    runs += step_runs(size, window, backend, device, args.repeats)
    best = min(run["ratio"] for run in runs if run["what"] == "step" and not run["form"].startswith("dense"))
    at_length = size.latent_frames >= 31 and device.startswith("cuda")
    bars = [
        bar(
            "time of a step at 31 latent frames, window 3 / dense attention with the best backend",
            0.77,
            best if at_length else None,
            needs="an H200-class GPU: --size 5b",
        )
    ]
    settings = describe(args.size, device, args.repeats)
    settings |= {"window": window, "share of frame pairs": round(seen.float().mean().item(), 3), "dense": backend}
    write_report(args.output, "Anchored window attention", device, settings, runs, bars)


if __name__ == "__main__":
    main()
