"""A step of `gpu_run.py`: times stages 1 and 2 with models of the size of a recipe's chat model and text-to-image model."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
from harness import bar

from diffusers_fvg import RECIPES
from diffusers_fvg.models import MODELS


if TYPE_CHECKING:
    from gpu_run import Run

# Assumed numbers of tokens: of a question to the chat model, of its answer, and of a caption.
QUESTION, ANSWER, CAPTION = 600, 120, 128
# Z-Image's VAE divides height and width by 8 and has 16 channels (huggingface/diffusers 0.42.1, ZImageTransformer2DModel).
STRIDE, CHANNELS = 8, 16
TINY_QWEN = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 16,
}
TINY_QWEN |= {"num_key_value_heads": 1, "vocab_size": 128}
TINY_Z_IMAGE = {"dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32}
TINY_Z_IMAGE |= {"axes_dims": [8, 4, 4], "axes_lens": [256, 32, 32]}


def made(run: Run, kind: str, config: dict[str, Any]) -> torch.nn.Module:
    """Returns a model of published size with random weights, or a tiny one at size tiny."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(run.size.dtype)
    try:
        with torch.device(run.device):
            if hasattr(diffusers, kind):
                return getattr(diffusers, kind)(**config | (TINY_Z_IMAGE if run.name == "tiny" else {})).eval()
            declared = getattr(transformers, kind)
            config = config | (TINY_QWEN if run.name == "tiny" else {})
            return declared(declared.config_class(**config)).eval().to(run.size.dtype)
    finally:
        torch.set_default_dtype(default)


@torch.no_grad()
def stages(run: Run) -> None:
    """Times a caption by the chat model and a picture by the text-to-image model without its VAE, and adds them to the videos that
    `pipeline` and `fast_pipeline` have timed."""
    recipe = RECIPES["wan2.2-5b"]
    steps, rows = recipe.composer.call_defaults["num_inference_steps"], []

    def add(stage: str, what: str, call: Callable[[], object], times: int = 1) -> None:
        rows.append({"stage": stage, "what": what, "seconds": times * run.seconds(call, 2)})

    model: Any = made(run, "Qwen3ForCausalLM", recipe.rewriter.configs["Qwen3ForCausalLM"])
    question = torch.randint(1, 100, (1, QUESTION), device=run.device)
    lengths = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False, "pad_token_id": 0}
    add("1", f"{QUESTION} tokens read, {ANSWER} written", lambda: model.generate(question, **lengths))
    # The text encoder is the same model without its output projection.
    add("2", f"caption of {CAPTION} tokens encoded", lambda: model.model(question[:, :CAPTION]))
    width = model.config.hidden_size
    # Both at a time would be 20 GiB.
    model = None
    model = made(run, "ZImageTransformer2DModel", recipe.composer.configs["ZImageTransformer2DModel"])
    for parameter in (model.x_pad_token, model.cap_pad_token):
        parameter.fill_(1.0)
    pixels = MODELS["Wan2.2-TI2V-5B"].vae_stride[1]
    side = [length * pixels // STRIDE for length in (run.size.latent_height, run.size.latent_width)]
    latents = torch.randn(CHANNELS, 1, *side, device=run.device).to(run.size.dtype)
    caption = torch.randn(CAPTION, width, device=run.device).to(run.size.dtype)
    time = torch.full((1,), 0.5, device=run.device)
    add("2", f"{steps} steps", lambda: model([latents], time, [caption], return_dict=False), steps)

    seconds = sum(row["seconds"] for row in rows)
    notes = f"{seconds:.3g} seconds in all. Random weights of the size of Qwen3-4B and Z-Image, without the VAE of Z-Image."
    run.report("stages", "stages 1 and 2", rows, [*whole_videos(run, seconds)], notes)


def whole_videos(run: Run, seconds: float) -> list[dict[str, Any]]:
    """Returns the measures of videos with all three stages, from the reports of other steps in the output folder."""
    found: dict[str, tuple[float, float]] = {}
    for name in ("pipeline", "fast_pipeline"):
        path = run.output / f"{name}.json"
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if run.on_gpu and path.is_file() else []
        for row in runs:
            share = row.get("of stock's 50 steps")
            stock = row["seconds"] / share if share else runs[-1]["seconds"]
            found[f"{name}: {row['video']}"] = row["seconds"], stock
    limits = {"pipeline: 15 steps, guided": 0.3, "fast_pipeline: 15 steps, guided": 0.25}
    limits |= {"fast_pipeline: 15 steps, one forward each": 0.15}
    limits |= {f"fast_pipeline: 15 steps, one forward each, window {run.window}, float8": 0.1}
    needs = "a GPU: gpu_run.py --only pipeline,fast_pipeline,stages"
    return [
        bar(
            f"time of a video with all three stages, {name} / stock with 50 steps",
            limit,
            (seconds + found[name][0]) / found[name][1] if name in found else None,
            needs=needs,
        )
        for name, limit in limits.items()
    ]
