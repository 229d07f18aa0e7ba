"""Trains the shapes world's diffusion models on latents of its VAE: the base, the composer's transformer, the anchor LoRA.

Parts, each resumable and gated by what it is scored on afterwards (`python -m diffusers_fvg.shapes.report`):

* `cache`: encodes clips once; latent 0 of a clip is the latent of its first frame, which gives the images for nothing.
* `base`: text encoder and video transformer from nothing, on prompts with clips and on captions with first frames.
* `composer`: the base's transformer and text encoder tuned further on first frames alone, all categories alike.
* `lora`: the anchor LoRA on the frozen base (arXiv 2512.16371): a clean frame at a random position with time 0.

Two thirds of the clips hold a single object: motion is the slowest to be learnt.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ..anchor import AnchorLatents
from ..training.objectives import anchored_flow_loss, sample_sigmas
from .prompts import make_scene
from .world import render


MAX_SEQUENCE_LENGTH = 28
TRANSFORMER_CONFIG = {
    "num_attention_heads": 4,
    "attention_head_dim": 36,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 128,
    "freq_dim": 128,
    "ffn_dim": 432,
    "num_layers": 5,
    "rope_max_seq_len": 32,
}
TEXT_ENCODER_CONFIG = {
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
}
LORA_CONFIG = {"r": 16, "lora_alpha": 16, "init_lora_weights": True}
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
# Motion, colour change and placement of one object first: they are what a newcomer types, and the slowest to be learnt.
CATEGORY_WEIGHTS = {
    "motion_binding": 0.3,
    "dynamic_attr": 0.18,
    "placement": 0.12,
    "consistent_attr": 0.08,
    "spatial_relationships": 0.08,
    "action_binding": 0.08,
    "interaction": 0.08,
    "generative_numeracy": 0.08,
}
CLIP_SHIFT, IMAGE_SHIFT = 3.0, 1.5
TEXT_DROPOUT = 0.1


def training_scene(rng: np.random.Generator):
    """A scene of the training mix. Never a held-out prompt."""
    return make_scene(str(rng.choice(list(CATEGORY_WEIGHTS), p=list(CATEGORY_WEIGHTS.values()))), rng, held_out=False)


def build_cache(folder: Path, num_clips: int = 10_000, seed: int = 7, batch_size: int = 8) -> None:
    """Encodes clips to `folder/latents.safetensors` (fp16) with their texts, and writes the statistics into the VAE."""
    from diffusers import AutoencoderKLWan

    if (folder / "latents.safetensors").exists():
        return
    vae = AutoencoderKLWan.from_pretrained(folder / "vae")
    rng = np.random.default_rng(seed)
    scenes = [training_scene(rng) for _ in range(num_clips)]
    latents = []
    with torch.no_grad():
        for start in range(0, num_clips, batch_size):
            clips = np.stack([render(scene.objects) for scene in scenes[start : start + batch_size]])
            pixels = torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
            latents.append(vae.encode(pixels).latent_dist.mode().half())
    latents = torch.cat(latents)
    # The first latent stands for one frame and is spread less than the others: each counts for half of the statistics.
    first, later = latents[:, :, :1].float(), latents[:, :, 1:].float()
    mean = (first.mean((0, 2, 3, 4)) + later.mean((0, 2, 3, 4))) / 2
    centred = [part - mean.view(1, -1, 1, 1, 1) for part in (first, later)]
    std = (sum(part.square().mean((0, 2, 3, 4)) for part in centred) / 2).sqrt()
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    vae.save_pretrained(folder / "vae")
    texts = [(scene.prompt, scene.caption, scene.category) for scene in scenes]
    (folder / "texts.json").write_text(json.dumps(texts))
    save_file({"latents": latents}, folder / "latents.tmp")
    (folder / "latents.tmp").rename(folder / "latents.safetensors")


class LatentData:
    """The cache in memory: normalised latents and token ids of prompts and captions."""

    def __init__(self, folder: Path):
        from diffusers import AutoencoderKLWan
        from transformers import AutoTokenizer

        config = AutoencoderKLWan.load_config(folder / "vae")
        mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
        self.latents = (load_file(folder / "latents.safetensors")["latents"].float() - mean) / std
        texts = json.loads((folder / "texts.json").read_text())
        _, category, counts = np.unique([text[2] for text in texts], return_inverse=True, return_counts=True)
        self.balanced = (1 / counts)[category] / len(counts)
        # The saved one: parts that are trained later must read texts as the text encoder learnt them.
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        self.prompts, self.captions, self.empty = (
            tokenizer(lines, padding="max_length", max_length=MAX_SEQUENCE_LENGTH, return_tensors="pt").input_ids
            for lines in ([text[0] for text in texts], [text[1] for text in texts], [""])
        )

    def batch(
        self, rng: np.random.Generator, batch_size: int, images: bool, balanced: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean latents `(B, 16, f, 8, 8)` and token ids `(B, L)`, a tenth of them of the empty text.

        `balanced` draws all categories alike, where the mix would have most of one object.
        """
        weights = self.balanced if balanced else None
        index = torch.from_numpy(rng.choice(len(self.latents), batch_size, p=weights))
        latents = self.latents[index, :, :1] if images else self.latents[index]
        tokens = (self.captions if images else self.prompts)[index].clone()
        tokens[torch.from_numpy(rng.random(batch_size) < TEXT_DROPOUT)] = self.empty
        return latents, tokens


def encode_text(text_encoder, tokens: torch.Tensor) -> torch.Tensor:
    """Embeddings `(B, L, D)` with padding set to zero, as `WanPipeline` makes them."""
    mask = (tokens != 0).long()
    return text_encoder(tokens, mask).last_hidden_state * mask.unsqueeze(-1)


def optimizers(modules: list[torch.nn.Module], peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformer's blocks, AdamW for everything else."""
    parameters = [(name, p) for module in modules for name, p in module.named_parameters() if p.requires_grad]
    matrices = [p for name, p in parameters if p.ndim == 2 and "block" in name and "relative_attention" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for _, p in parameters if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=peak, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.98), weight_decay=0.0)]


def train(
    folder: Path,
    name: str,
    steps: int,
    modules: dict[str, torch.nn.Module],
    make_optimizers: Callable[[], list[torch.optim.Optimizer]],
    loss_of: Callable[[int], torch.Tensor],
    peak: float,
    warmup: int = 100,
    log_every: int = 50,
) -> dict[str, dict[str, torch.Tensor]]:
    """A plain training loop with a moving average, resumable from `folder/<name>.ckpt`. Returns the averaged weights."""
    tuned = {
        f"{key}.{n}": p for key, module in modules.items() for n, p in module.named_parameters() if p.requires_grad
    }
    average = {key: p.detach().clone() for key, p in tuned.items()}
    solvers, step, checkpoint = make_optimizers(), 0, folder / f"{name}.ckpt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for key, p in tuned.items():
            p.data.copy_(state["weights"][key])
        average, step = state["average"], state["step"]
        for solver, solver_state in zip(solvers, state["optimizers"]):
            solver.load_state_dict(solver_state)
    recent: dict[str, list[float]] = {}
    started, since = time.perf_counter(), step
    while step < steps:
        progress = max(0.0, (step - warmup) / max(1, steps - warmup))
        rate = peak * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        torch.manual_seed(1_000_003 * step + 17)
        kind, loss = loss_of(step)
        for solver in solvers:
            solver.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tuned.values(), 1.0)
        for solver in solvers:
            for group in solver.param_groups:
                group["lr"] = rate
            solver.step()
        step += 1
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in tuned.values()], 1 - decay)
        recent.setdefault(kind, []).append(loss.item())
        if step % log_every == 0:
            record = {"step": step, "seconds_per_step": (time.perf_counter() - started) / (step - since)}
            record |= {f"loss_{kind}": float(np.mean(values)) for kind, values in recent.items()}
            with open(folder / f"{name}_log.jsonl", "a") as log:
                log.write(json.dumps(record) + "\n")
            recent, started, since = {}, time.perf_counter(), step
        if step % 250 == 0 or step == steps:
            state = {"weights": {k: p.detach() for k, p in tuned.items()}, "average": average, "step": step}
            torch.save(state | {"optimizers": [s.state_dict() for s in solvers]}, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    return average


def _load_average(average: dict[str, torch.Tensor], modules: dict[str, torch.nn.Module]) -> None:
    for key, module in modules.items():
        for name, p in module.named_parameters():
            if f"{key}.{name}" in average:
                p.data.copy_(average[f"{key}.{name}"])


def train_base(
    folder: Path, steps: int = 6000, clip_batch: int = 24, image_batch: int = 48, peak: float = 2e-3
) -> None:
    """Text encoder and video transformer, on two clip batches for one image batch."""
    from transformers import UMT5Config, UMT5EncoderModel

    from ..transformer_anchor import AnchorConditionedTransformer3D
    from .tokenizer import text_tokenizer

    torch.manual_seed(0)
    tokenizer = text_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    text_encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **TEXT_ENCODER_CONFIG))
    transformer = AnchorConditionedTransformer3D(**TRANSFORMER_CONFIG)
    # A zero output layer: the first prediction is zero, not noise of the untrained network's own.
    torch.nn.init.zeros_(transformer.proj_out.weight)
    data = LatentData(folder)

    def loss_of(step: int) -> tuple[str, torch.Tensor]:
        images = step % 3 == 2
        batch_size = image_batch if images else clip_batch
        latents, tokens = data.batch(np.random.default_rng((1, step)), batch_size, images)
        sigmas = sample_sigmas(batch_size, IMAGE_SHIFT if images else CLIP_SHIFT, std=1.2)
        embeds = encode_text(text_encoder, tokens)
        loss = anchored_flow_loss(transformer, latents, torch.randn_like(latents), sigmas, embeds)
        return ("image" if images else "clip"), loss

    modules = {"text_encoder": text_encoder, "transformer": transformer}
    average = train(
        folder, "base", steps, modules, lambda: optimizers(list(modules.values()), peak), loss_of, peak=peak
    )
    _load_average(average, modules)
    text_encoder.save_pretrained(folder / "text_encoder")
    transformer.save_pretrained(folder / "transformer")


def favour_neighbours(text_encoder) -> None:
    """Lets some heads look at the word before, the word behind and both from the first step on.

    "red circle, blue square" is told from "blue circle, red square" by neighbours alone. Relative position biases that start
    at random take longer to find that than the rest of the training (bucket k is k words before, 16 + k behind).
    """
    for block in text_encoder.encoder.block:
        bias = block.layer[0].SelfAttention.relative_attention_bias.weight.data
        bias[1, 0] += 4
        bias[17, 1] += 4
        bias[[0, 1, 2, 17, 18], 2] += 2


def train_composer(folder: Path, steps: int = 3900, batch_size: int = 64, peak: float = 1.2e-3) -> None:
    """The base tuned on first frames with their captions. Its text encoder is a copy of the composer's own."""
    from transformers import UMT5EncoderModel

    from ..transformer_anchor import AnchorConditionedTransformer3D

    text_encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder")
    favour_neighbours(text_encoder)
    transformer = AnchorConditionedTransformer3D.from_pretrained(folder / "transformer")
    data = LatentData(folder)

    def loss_of(step: int) -> tuple[str, torch.Tensor]:
        latents, tokens = data.batch(np.random.default_rng((2, step)), batch_size, images=True, balanced=True)
        sigmas = sample_sigmas(batch_size, IMAGE_SHIFT, std=1.2)
        embeds = encode_text(text_encoder, tokens)
        return "image", anchored_flow_loss(transformer, latents, torch.randn_like(latents), sigmas, embeds)

    modules = {"text_encoder": text_encoder, "transformer": transformer}
    average = train(
        folder, "composer", steps, modules, lambda: optimizers(list(modules.values()), peak), loss_of, peak=peak
    )
    _load_average(average, modules)
    text_encoder.save_pretrained(folder / "composer_text_encoder")
    transformer.save_pretrained(folder / "composer_transformer")


def train_lora(
    folder: Path, steps: int = 5000, batch_size: int = 24, peak: float = 1e-3, first_share: float = 0.7
) -> None:
    """The anchor LoRA: a clean latent frame of the clip itself at a random position, time 0 there, no loss on it."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from transformers import UMT5EncoderModel

    from ..transformer_anchor import AnchorConditionedTransformer3D

    torch.manual_seed(3)
    text_encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder").requires_grad_(False)
    transformer = AnchorConditionedTransformer3D.from_pretrained(folder / "transformer").requires_grad_(False)
    transformer.add_adapter(LoraConfig(target_modules=LORA_TARGETS, **LORA_CONFIG), adapter_name="anchor")
    data = LatentData(folder)

    def loss_of(step: int) -> tuple[str, torch.Tensor]:
        rng = np.random.default_rng((3, step))
        latents, tokens = data.batch(rng, batch_size, images=False)
        num_frames = latents.shape[2]
        position = np.where(rng.random(batch_size) < first_share, 0, rng.integers(0, num_frames, batch_size))
        strength = torch.nn.functional.one_hot(torch.from_numpy(position), num_frames).float()
        anchors = AnchorLatents(latents, strength, torch.zeros_like(latents))
        sigmas = sample_sigmas(batch_size, CLIP_SHIFT, std=1.2)
        embeds = encode_text(text_encoder, tokens)
        return "clip", anchored_flow_loss(transformer, latents, torch.randn_like(latents), sigmas, embeds, anchors)

    modules = {"transformer": transformer}

    def make_optimizers() -> list[torch.optim.Optimizer]:
        tuned = [p for p in transformer.parameters() if p.requires_grad]
        return [torch.optim.AdamW(tuned, lr=peak, betas=(0.9, 0.98), weight_decay=0.0)]

    average = train(folder, "lora", steps, modules, make_optimizers, loss_of, peak=peak)
    _load_average(average, modules)
    state = get_peft_model_state_dict(transformer, adapter_name="anchor")
    (folder / "anchor_lora" / "weights").mkdir(parents=True, exist_ok=True)
    tensors = {f"transformer.{key}": value.half().contiguous() for key, value in state.items()}
    save_file(
        tensors, folder / "anchor_lora" / "weights" / "pytorch_lora_weights.safetensors", metadata={"format": "pt"}
    )


PARTS = {"cache": build_cache, "base": train_base, "composer": train_composer, "lora": train_lora}

if __name__ == "__main__":
    import sys

    for part in sys.argv[2:] or PARTS:
        PARTS[part](Path(sys.argv[1]))
