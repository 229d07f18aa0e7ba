"""Trains the shapes world's VAE, an `AutoencoderKLWan` of 0.7 M parameters, from nothing.

Images first, then ever longer clips: a fresh causal video VAE otherwise stays at drawing the background. The mean of the
posterior is used (with a little fixed noise late in training) because the sampling noise of an untrained one drowns
the shapes. Gate: the scorer reads every object back from held-out reconstructions (`held_out_score`).
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import torch

from .prompts import CATEGORIES, make_scene
from .world import BACKGROUND, render


VAE_CONFIG = {
    "base_dim": 16,
    "z_dim": 16,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
    "latents_mean": [0.0] * 16,
    "latents_std": [1.0] * 16,
}
# (frames of a clip, clips in a batch, optimiser steps)
PHASES = ((1, 16, 2500), (5, 6, 1800), (9, 4, 1000), (17, 3, 900))
PEAK_LEARNING_RATE = 2e-3
WARMUP_STEPS = 100


def sample_clips(rng: np.random.Generator, batch_size: int, num_frames: int) -> torch.Tensor:
    """Random windows of training clips, `(B, 3, F, 64, 64)` in [-1, 1]. Never a held-out prompt."""
    clips = []
    for _ in range(batch_size):
        category = (*CATEGORIES, "placement")[rng.integers(8)]
        frames = render(make_scene(category, rng, held_out=False).objects)
        start = rng.integers(0, len(frames) - num_frames + 1)
        clips.append(frames[start : start + num_frames])
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def reconstruction_loss(reconstruction: torch.Tensor, clips: torch.Tensor) -> torch.Tensor:
    """L1 + 2 L2, with pixels that belong to a shape counted five times: the background is 90 % of a frame."""
    background = torch.tensor(BACKGROUND).view(1, 3, 1, 1, 1) / 127.5 - 1
    weight = 1 + 4 * ((clips - background).abs().amax(dim=1, keepdim=True) > 0.1).float()
    error = reconstruction - clips
    return (weight * (error.abs() + 2 * error.square())).mean()


def learning_rate(step: int, total: int) -> float:
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, total - WARMUP_STEPS)
    return PEAK_LEARNING_RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train_vae(folder: Path, phases=PHASES, seed: int = 0, log_every: int = 50) -> None:
    """Trains and writes `folder/vae` (diffusers format) and `folder/vae_log.jsonl`; continues from `folder/vae.ckpt`."""
    from diffusers import AutoencoderKLWan

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(**VAE_CONFIG)
    average = torch.optim.swa_utils.AveragedModel(vae, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    total = sum(steps for _, _, steps in phases)
    schedule = [(frames, batch) for frames, batch, steps in phases for _ in range(steps)]
    step, checkpoint = 0, folder / "vae.ckpt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["vae"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    recent, started = [], time.perf_counter()
    while step < total:
        num_frames, batch_size = schedule[step]
        rng = np.random.default_rng((seed, step))
        clips = sample_clips(rng, batch_size, num_frames)
        posterior = vae.encode(clips).latent_dist
        latents = posterior.mean
        # Fixed noise from the second phase on: neighbouring latents must decode alike, or diffusion errors show.
        if num_frames > 1:
            latents = latents + 0.1 * torch.randn_like(latents)
        loss = reconstruction_loss(vae.decode(latents).sample, clips)
        penalty = 1e-3 * (posterior.mean.square().mean() - 1).clamp(min=0) + 1e-4 * posterior.logvar.square().mean()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total)
        optimizer.zero_grad(set_to_none=True)
        (loss + penalty).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(vae)
        recent.append(loss.item())
        step += 1
        if step % log_every == 0:
            seconds = (time.perf_counter() - started) / len(recent)
            record = {"step": step, "frames": num_frames, "loss": float(np.mean(recent)), "seconds_per_step": seconds}
            with open(folder / "vae_log.jsonl", "a") as log:
                log.write(json.dumps(record) + "\n")
            recent, started = [], time.perf_counter()
        if step % 200 == 0 or step == total:
            state = {"vae": vae.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"step": step}, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    average.module.save_pretrained(folder / "vae")


if __name__ == "__main__":
    import sys

    train_vae(Path(sys.argv[1]))
