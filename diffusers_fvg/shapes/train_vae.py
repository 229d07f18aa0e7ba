"""Trains the shapes world's VAE, an `AutoencoderKLWan` of 0.7 M parameters, from scratch.

Training starts with images and goes on to longer and longer clips; otherwise an untrained causal video VAE keeps drawing only the
background. The decoder gets the mean of the posterior (later with a little noise of fixed size), because the sampling noise of an
untrained posterior hides the shapes. The target is a `held_out_score` that shows that reconstructions keep their objects.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from .held_out import held_out_scenes
from .loop import train, training_device
from .prompts import CATEGORIES, make_scene
from .scorer import score_video
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
# Phases of training: (frames per clip, clips per batch, optimizer steps).
PHASES = ((1, 16, 2500), (5, 6, 1800), (9, 4, 1000), (17, 3, 900))
PEAK_LEARNING_RATE = 2e-3


def sample_clips(rng: np.random.Generator, batch_size: int, num_frames: int) -> torch.Tensor:
    """Draws random windows of training clips, `(B, 3, F, 64, 64)` in [-1, 1], never with a held-out prompt."""
    clips = []
    for _ in range(batch_size):
        category = (*CATEGORIES, "placement")[rng.integers(8)]
        frames = render(make_scene(category, rng, held_out=False).objects)
        start = rng.integers(0, len(frames) - num_frames + 1)
        clips.append(frames[start : start + num_frames])
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def reconstruction_loss(reconstruction: torch.Tensor, clips: torch.Tensor) -> torch.Tensor:
    """Returns L1 + 2 * L2, with five times the weight for pixels of shapes, since the background is 90 % of a frame."""
    background = torch.tensor(BACKGROUND).view(1, 3, 1, 1, 1) / 127.5 - 1
    weight = 1 + 4 * ((clips - background).abs().amax(dim=1, keepdim=True) > 0.1).float()
    error = reconstruction - clips
    return (weight * (error.abs() + 2 * error.square())).mean()


def train_vae(folder: Path, phases=PHASES, seed: int = 0) -> dict[str, int]:
    """Trains the VAE and writes it to `folder/vae` in diffusers' format."""
    from diffusers import AutoencoderKLWan

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(**VAE_CONFIG)
    schedule = [(frames, batch) for frames, batch, steps in phases for _ in range(steps)]

    def loss_of(step: int) -> tuple[str, torch.Tensor]:
        num_frames, batch_size = schedule[step]
        clips = sample_clips(np.random.default_rng((seed, step)), batch_size, num_frames).to(training_device())
        posterior = vae.encode(clips).latent_dist
        latents = posterior.mean
        # Noise of fixed size from the second phase on: similar latents must decode alike, or errors of the diffusion become
        # visible.
        if num_frames > 1:
            latents = latents + 0.1 * torch.randn_like(latents)
        loss = reconstruction_loss(vae.decode(latents).sample, clips)
        penalty = 1e-3 * (posterior.mean.square().mean() - 1).clamp(min=0) + 1e-4 * posterior.logvar.square().mean()
        return f"{num_frames}_frames", loss + penalty

    def make_optimizers() -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(vae.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)]

    train(folder, "vae", len(schedule), {"vae": vae}, make_optimizers, loss_of, PEAK_LEARNING_RATE, decay=0.995)
    vae.save_pretrained(folder / "vae")
    samples = sum(batch * steps for _, batch, steps in phases)
    return {"samples": samples, "parameters": sum(p.numel() for p in vae.parameters())}


@torch.no_grad()
def held_out_score(folder: Path, per_category: int = 12) -> float:
    """Returns the mean `score_video` of held-out clips that were encoded and decoded by the VAE."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(folder / "vae")
    scores = []
    for scene in held_out_scenes(per_category):
        clip = torch.from_numpy(render(scene.objects)).permute(3, 0, 1, 2).unsqueeze(0).float() / 127.5 - 1
        decoded = vae.decode(vae.encode(clip).latent_dist.mode()).sample.clamp(-1, 1)
        frames = ((decoded[0].permute(1, 2, 3, 0) + 1) * 127.5).round().byte().numpy()
        scores.append(score_video(frames, scene.category, scene.meta))
    return float(np.mean(scores))
