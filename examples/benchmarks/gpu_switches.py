"""Steps of `gpu_run.py` for switches that are off by default, alone and together."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from benchmark_pipeline import random as random_pipelines
from harness import bar, build_transformer, relative_rms, transformer_inputs
from peft import LoraConfig

from diffusers_fvg import SchedulerPresets, kernels
from diffusers_fvg.animate.quantization import fp8_dynamic, fp8_problem
from diffusers_fvg.animate.transformer_anchor import AnchorConditionedTransformer3D
from diffusers_fvg.schedules.distilled import DISTILLED_PRESETS


if TYPE_CHECKING:
    from gpu_run import Run

# The trainer's default target modules.
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
NEEDS = "a GPU: gpu_run.py --only "
HAS_TORCHAO = importlib.util.find_spec("torchao") is not None


def add_lora(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Adds a LoRA of rank 128 that changes the weights by a few hundredths."""
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=128, target_modules=TARGETS, init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = (parameter * (0.05 if ".lora_B." in name else 1)).to(dtype)


def quantize(model: torch.nn.Module) -> None:
    """Quantizes a model in memory as loading with `quantization_config=fp8_dynamic()` does."""
    from diffusers.quantizers.torchao.torchao_quantizer import TorchAoHfQuantizer
    from torchao.quantization import quantize_

    config = fp8_dynamic()
    quantizer = TorchAoHfQuantizer(config, pre_quantized=False)
    quantizer.offload = False
    quantizer._process_model_before_weight_loading(model, None, list(model._keep_in_fp32_modules))

    def is_quantized(module: torch.nn.Module, name: str) -> bool:
        is_linear = isinstance(module, torch.nn.Linear)
        return is_linear and quantizer.check_if_quantized_param(model, module.weight, f"{name}.weight", {})

    quantize_(model, config.quant_type, is_quantized)


@torch.no_grad()
def lora(run: Run) -> None:
    """Times one forward without a LoRA, with an anchor LoRA of rank 128, and with the fused LoRA; eager and compiled."""
    rows: list[dict[str, Any]] = []
    for how in ("eager", "compiled"):
        torch.compiler.reset()
        model, inputs = run.transformer()
        if how == "compiled":
            run.compile(model)

        def add(kind: str, how: str = how, model: torch.nn.Module = model, inputs: dict = inputs) -> None:
            with kernels.use_kernels(run.kernels):
                seconds = run.seconds(lambda: model(**inputs, return_dict=False))
            rows.append({"LoRA": kind, "how": how, "seconds": seconds})

        add("none")
        add_lora(model, run.size.dtype)
        add("rank 128, layers of its own")
        weight = model.blocks[0].attn1.to_q.base_layer.weight
        before = weight.clone()
        model.fuse_lora()
        add("rank 128, fused")
        difference = relative_rms(weight, before)
        model.unfuse_lora()
        changed = (weight != before).float().mean().item()
    settings = {"difference of the weights, relative": difference, "share of weights that unfusing changed": changed}
    run.report("lora", "an anchor LoRA", rows, **settings)


@torch.no_grad()
def fp8(run: Run) -> None:
    """Times a compiled forward with matrix products in bfloat16 and in float8, with a window, and with a LoRA."""
    if not HAS_TORCHAO:
        raise SystemExit("torchao is not installed")
    torch.compiler.reset()
    size = replace(run.size, dtype=torch.bfloat16)
    model = build_transformer(AnchorConditionedTransformer3D, size, run.device)
    inputs = transformer_inputs(size, run.device, per_token=False)
    run.compile(model)
    rows: list[dict[str, Any]] = []

    def add(products: str, what: str = "") -> torch.Tensor:
        with kernels.use_kernels(run.kernels):
            seconds = run.seconds(lambda: model(**inputs, return_dict=False))
            found = model(**inputs, return_dict=False)[0]
        rows.append({"products": products, "with": what, "seconds": seconds, "relative difference": None})
        return found

    window = f"window {run.window}"
    exact = add("bfloat16")
    model.set_anchor_window(run.window)
    exact_window = add("bfloat16", window)
    model.set_anchor_window(None)
    quantize(model)
    torch.compiler.reset()
    found = add("float8")
    rows[-1]["relative difference"] = relative_rms(found, exact)
    model.set_anchor_window(run.window)
    found = add("float8", window)
    rows[-1]["relative difference"] = relative_rms(found, exact_window)
    model.set_anchor_window(None)
    add_lora(model, size.dtype)
    add("float8", "LoRA of rank 128")
    ratio = rows[2]["seconds"] / rows[0]["seconds"] if run.on_gpu else None
    bars = [bar("time of a compiled forward, float8 / bfloat16 linear layers", 0.75, ratio, needs=f"{NEEDS}fp8")]
    run.report(
        "fp8",
        "products in float8",
        rows,
        bars,
        notes="The difference with random weights says little about real weights.",
    )


@torch.no_grad()
def fast_pipeline(run: Run) -> None:
    """Times videos with compiled blocks from picture to frames: guided, with one forward per step, with window and float8, and
    with 3 steps."""
    ours, stock, our_call, stock_call = random_pipelines(run.size, run.device)
    for pipe in (ours, stock):
        pipe.set_progress_bar_config(disable=True)
    guidance = ours.presets["full-50"].guidance_scale
    stock_denoise = run.stock_denoise(stock, stock_call, guidance)
    del stock
    ours.schedulers = SchedulerPresets.of(*ours.presets.values(), *_new(ours.presets))
    run.compile(ours.transformer)

    def video(**options: Any) -> dict[str, float]:
        with kernels.use_kernels(run.kernels):
            options = {"preset": "anchored-15", "generator": 0, "output_type": "uint8"} | options
            return ours(**our_call, **options).timings

    rows: list[dict[str, Any]] = []
    window = f"window {run.window}"

    def report() -> None:
        """Writes the report after every video, so that an interruption loses no result."""
        titles = {
            0: ("guided", 0.25),
            1: ("one forward a step", 0.15),
            4: (f"one forward a step, {window}, float8", 0.1),
        }
        bars = [
            bar(
                f"time of a video, ours compiled with 15 steps ({title}) / stock eager with 50",
                limit,
                rows[place]["of stock's 50 steps"] if run.on_gpu and place < len(rows) else None,
                needs=f"{NEEDS}fast_pipeline",
            )
            for place, (title, limit) in titles.items()
        ]
        run.report("fast_pipeline", "a video without stages 1 and 2, compiled", rows, bars)

    def add(name: str, **options: Any) -> None:
        # Compiles the model with its current window and quantization.
        video(**options | {"preset": "anchored-15", "num_inference_steps": 1, "output_type": "latent"})
        timings = video(**options)
        whole = sum(timings.values())
        row = {"video": name, "seconds": whole, "denoise": timings["denoise"], "decode": timings["decode"]}
        rows.append(row | {"of stock's 50 steps": whole / (stock_denoise + timings["decode"])})
        report()

    add("15 steps, guided")
    add("15 steps, one forward each", guidance_scale=1.0)
    add("3 steps of fastwan-3", preset="fastwan-3")
    ours.transformer.set_anchor_window(run.window)
    add(f"15 steps, one forward each, {window}", guidance_scale=1.0)
    if HAS_TORCHAO and fp8_problem(torch.device(run.device), run.size.dtype) is None:
        quantize(ours.transformer)
        torch.compiler.reset()
        add(f"15 steps, one forward each, {window}, float8", guidance_scale=1.0)


def _new(presets: SchedulerPresets) -> list[Any]:
    return [preset for preset in DISTILLED_PRESETS["Wan2.2-TI2V-5B"] if preset.name not in presets]
