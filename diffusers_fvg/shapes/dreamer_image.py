"""Trains the image half of the shapes world's Factorized-Dreamer from scratch: VAE, CLIP, image UNet.

They take the place of a Stable Diffusion repository and a CLIP for real images.

* `vae`, `decoder`: an `AutoencoderKL` with scale factor 8, on single frames; then its decoder alone.
* `clip`: text and vision encoder, with the contrastive loss of CLIP (arXiv 2103.00020).
* `clips`: encodes all frames of the clips once.
* `image`: the `UNet2DConditionModel` on single frames, together with CLIP's text encoder.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ..dreamer.conditions import embed_images, encode_pixels
from .flow import exact_flow
from .held_out import held_out_scenes
from .loop import train, training_device
from .prompts import CATEGORIES, brief_caption, motion_caption
from .scorer import score_video
from .train_models import MAX_SEQUENCE_LENGTH, count, optimizers, tokenize, training_scene
from .train_vae import reconstruction_loss
from .world import Scene, render


# Clips last two seconds like those of the other shapes model, at half of its frame rate.
NUM_FRAMES, FRAME_RATE = 8, 4
VAE_CONFIG = {
    "block_out_channels": (16, 32, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
    "sample_size": 64,
}
VAE_LEARNING_RATE = 2e-3


def training_frames(rng: np.random.Generator, num_scenes: int, per_scene: int) -> torch.Tensor:
    """Draws random frames of random training clips, `(N, 3, 64, 64)` in [-1, 1], never with a held-out prompt."""
    frames = []
    for _ in range(num_scenes):
        clip = render(training_scene(rng).objects)
        frames += [clip[k] for k in rng.integers(len(clip), size=per_scene)]
    return as_pixels(np.stack(frames))


def as_pixels(frames: np.ndarray) -> torch.Tensor:
    """Converts frames `(..., H, W, 3)`, uint8, to `(..., 3, H, W)` in [-1, 1]."""
    return torch.from_numpy(frames).movedim(-1, -3).float() / 127.5 - 1


def train_vae(folder: Path, steps: int = 1800, seed: int = 0) -> dict[str, int]:
    """Trains a VAE and writes it to `folder/vae`, with `scaling_factor` from the standard deviation of its latents."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(**VAE_CONFIG)

    def loss_of(step: int) -> tuple[str, torch.Tensor]:
        pixels = training_frames(np.random.default_rng((seed, step)), 6, 2).to(training_device())
        posterior = vae.encode(pixels).latent_dist
        latents = posterior.mean
        # Noise of fixed size in the later steps: similar latents must decode alike, or errors of the diffusion become visible.
        if step >= steps // 3:
            latents = latents + 0.1 * torch.randn_like(latents)
        loss = reconstruction_loss(vae.decode(latents).sample.unsqueeze(2), pixels.unsqueeze(2))
        penalty = 1e-3 * (posterior.mean.square().mean() - 1).clamp(min=0) + 1e-4 * posterior.logvar.square().mean()
        return "image", loss + penalty

    def make_optimizers() -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(vae.parameters(), lr=VAE_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)]

    train(folder, "vae", steps, {"vae": vae}, make_optimizers, loss_of, VAE_LEARNING_RATE, decay=0.995)
    with torch.no_grad():
        latents = vae.encode(training_frames(np.random.default_rng(seed), 64, 2)).latent_dist.mode()
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    vae.save_pretrained(folder / "vae")
    return {"samples": 12 * steps, **count(vae)}


def train_decoder(folder: Path, steps: int = 4000, seed: int = 8, peak: float = 1e-3) -> dict[str, int]:
    """Trains only the VAE's decoder further. The latents do not change, so models that use them stay valid."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder / "vae").requires_grad_(False)
    tuned = [vae.decoder.requires_grad_(True), vae.post_quant_conv.requires_grad_(True)]

    def loss_of(step: int) -> tuple[str, torch.Tensor]:
        pixels = training_frames(np.random.default_rng((seed, step)), 6, 2).to(training_device())
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.mode()
        latents = latents + 0.05 * torch.randn_like(latents)
        return "image", reconstruction_loss(vae.decode(latents).sample.unsqueeze(2), pixels.unsqueeze(2))

    def make_optimizers() -> list[torch.optim.Optimizer]:
        parameters = [p for module in tuned for p in module.parameters()]
        return [torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.99), weight_decay=0.0)]

    train(folder, "decoder", steps, {"vae": vae}, make_optimizers, loss_of, peak, decay=0.995)
    vae.save_pretrained(folder / "vae")
    return {"samples": 12 * steps}


@torch.no_grad()
def vae_score(folder: Path, per_category: int = 12) -> float:
    """Returns the mean `score_video` of held-out clips whose frames were encoded and decoded by the VAE."""
    from diffusers import AutoencoderKL

    vae, scores = AutoencoderKL.from_pretrained(folder / "vae"), []
    for scene in held_out_scenes(per_category, categories=CATEGORIES):
        decoded = vae.decode(vae.encode(as_pixels(render(scene.objects, NUM_FRAMES))).latent_dist.mode()).sample
        frames = ((decoded.clamp(-1, 1).movedim(1, -1) + 1) * 127.5).round().byte().numpy()
        scores.append(score_video(frames, scene.category, scene.meta))
    return float(np.mean(scores))


# -- CLIP -------------------------------------------------------------------------------------------------------------

CLIP_WIDTH = 64
CLIP_CONFIG = {
    "hidden_size": CLIP_WIDTH,
    "intermediate_size": 2 * CLIP_WIDTH,
    "projection_dim": CLIP_WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
# The initial inverse temperature of CLIP, kept fixed.
CLIP_LOGIT_SCALE = 14.3


def clip_modules() -> dict[str, torch.nn.Module]:
    """Returns untrained text and vision encoders and the projection of texts, which is used in training only."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    from .tokenizer import vocabulary

    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(vocabulary()),
        max_position_embeddings=MAX_SEQUENCE_LENGTH,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        **CLIP_CONFIG,
    )
    vision = CLIPVisionConfig(image_size=64, patch_size=8, **CLIP_CONFIG)
    return {
        "text_encoder": CLIPTextModel(text),
        "image_encoder": CLIPVisionModelWithProjection(vision),
        "projection": torch.nn.Linear(CLIP_WIDTH, CLIP_WIDTH, bias=False),
    }


def clip_tokenizer():
    """Returns the tokenizer of the shapes world with the text encoder's `model_max_length`, which pipelines read."""
    from .tokenizer import text_tokenizer

    tokenizer = text_tokenizer()
    tokenizer.model_max_length = MAX_SEQUENCE_LENGTH
    return tokenizer


def likeness(modules: dict[str, torch.nn.Module], pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Returns the cosine similarities `(N, M)` of images `(N, 3, 64, 64)` and texts `(M, L)`."""
    pictures = embed_images(modules["image_encoder"], pixels)
    texts = modules["projection"](modules["text_encoder"](tokens).pooler_output)
    return torch.nn.functional.normalize(pictures, dim=-1) @ torch.nn.functional.normalize(texts, dim=-1).T


def train_clip(folder: Path, steps: int = 500, batch_size: int = 48, peak: float = 2e-3) -> dict[str, int]:
    """Trains CLIP on first frames with their captions or prompts.

    Writes `clip_text_encoder`, `image_encoder` and `clip_tokenizer`.
    """
    modules, tokenizer = clip_modules(), clip_tokenizer()

    def loss_of(step: int) -> tuple[str, torch.Tensor]:
        rng = np.random.default_rng((3, step))
        scenes = [training_scene(rng) for _ in range(batch_size)]
        texts = [
            brief_caption(scene) if captioned else scene.prompt
            for scene, captioned in zip(scenes, rng.random(batch_size) < 0.7)
        ]
        pixels = as_pixels(np.stack([render(scene.objects, 1)[0] for scene in scenes]))
        logits = CLIP_LOGIT_SCALE * likeness(
            modules, pixels.to(training_device()), tokenize(tokenizer, texts).to(training_device())
        )
        pairs = torch.arange(batch_size, device=logits.device)
        entropy = torch.nn.functional.cross_entropy
        return "pairs", (entropy(logits, pairs) + entropy(logits.T, pairs)) / 2

    def make_optimizers() -> list[torch.optim.Optimizer]:
        parameters = [p for module in modules.values() for p in module.parameters()]
        return [torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.0)]

    train(folder, "clip", steps, modules, make_optimizers, loss_of, peak, decay=0.99)
    modules["text_encoder"].save_pretrained(folder / "clip_text_encoder")
    modules["image_encoder"].save_pretrained(folder / "image_encoder")
    tokenizer.save_pretrained(folder / "clip_tokenizer")
    with torch.no_grad():
        scenes = held_out_scenes(6, categories=CATEGORIES)
        pixels = as_pixels(np.stack([render(scene.objects, 1)[0] for scene in scenes]))
        found = likeness(modules, pixels, tokenize(tokenizer, [brief_caption(scene) for scene in scenes])).argmax(1)
    right = (found == torch.arange(len(scenes))).float().mean().item()
    return {"samples": steps * batch_size, **count(*modules.values()), f"right_of_{len(scenes)}": round(right, 4)}


# -- clips, encoded once ----------------------------------------------------------------------------------------------


def encode_scenes(folder: Path, scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """Encodes clips: returns latents `(N, C, F, h, w)`, CLIP embeddings of first frames `(N, D)`, flow `(N, 2, F - 1, h, w)`."""
    from diffusers import AutoencoderKL
    from transformers import CLIPVisionModelWithProjection

    from ..dreamer.flow import latent_flow

    vae = AutoencoderKL.from_pretrained(folder / "vae")
    image_encoder = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder")
    encoded: dict[str, list[torch.Tensor]] = {"latents": [], "image_embeds": [], "flow": []}
    for scene in scenes:
        pixels = as_pixels(render(scene.objects, NUM_FRAMES))
        with torch.no_grad():
            latents = encode_pixels(vae, pixels).transpose(0, 1)
            encoded["image_embeds"].append(embed_images(image_encoder, pixels[:1])[0])
        flow = exact_flow(scene.objects, NUM_FRAMES, *pixels.shape[-2:])
        encoded["latents"].append(latents.half())
        encoded["flow"].append(latent_flow(flow, *latents.shape[-2:]).half())
    return {name: torch.stack(tensors) for name, tensors in encoded.items()}


def build_clips(folder: Path, num_clips: int = 4000, seed: int = 7) -> None:
    """Encodes random training clips to `folder/dreamer_clips.safetensors`, and writes their texts to `dreamer_texts.json`."""
    if (folder / "dreamer_clips.safetensors").exists():
        return
    rng = np.random.default_rng((seed, 1))
    scenes = [training_scene(rng) for _ in range(num_clips)]
    encoded = encode_scenes(folder, scenes)
    texts = [(scene.prompt, brief_caption(scene), motion_caption(scene)) for scene in scenes]
    (folder / "dreamer_texts.json").write_text(json.dumps(texts))
    save_file(encoded, folder / "dreamer_clips.tmp")
    (folder / "dreamer_clips.tmp").rename(folder / "dreamer_clips.safetensors")


def load_clips(folder: Path, num_clips: int | None = None) -> tuple[dict[str, torch.Tensor], list[list[str]]]:
    """Loads the output of [`build_clips`], of all clips or the first `num_clips`: tensors in float32, and for each clip the
    prompt, the first-frame caption and the motion caption."""
    tensors = load_file(folder / "dreamer_clips.safetensors")
    tensors = {name: tensor[:num_clips].float() for name, tensor in tensors.items()}
    return tensors, json.loads((folder / "dreamer_texts.json").read_text())[:num_clips]


# -- image UNet -------------------------------------------------------------------------------------------------------

UNET_CONFIG = {
    "sample_size": 8,
    "in_channels": 16,
    "out_channels": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (64, 96),
    "layers_per_block": 1,
    "cross_attention_dim": CLIP_WIDTH,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
TEXT_DROPOUT = 0.1


def image_sigmas() -> torch.Tensor:
    """Returns the noise levels of the image model, those of Stable Diffusion 2.1, which also predicts the velocity."""
    from diffusers import CogVideoXDDIMScheduler

    from ..dreamer.schedule import dreamer_schedule
    from ..schedules.cogvideox import training_sigmas

    return training_sigmas(CogVideoXDDIMScheduler(**dreamer_schedule(shift=1.0, zero_terminal_snr=False)))


def train_image(folder: Path, steps: int = 400, batch_size: int = 48, peak: float = 1.5e-3) -> dict[str, int]:
    """Trains the image UNet and CLIP's text encoder on frames of the clips. Writes `image_unet` and `image_text_encoder`.

    The text of a first frame is its caption, that of any other the clip's prompt or motion caption. Stable Diffusion, too, was
    trained on texts about states and about events.
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    from ..schedules.cogvideox import add_noise, velocity

    torch.manual_seed(1)
    unet = UNet2DConditionModel(**UNET_CONFIG)
    torch.nn.init.zeros_(unet.conv_out.weight)
    text_encoder = CLIPTextModel.from_pretrained(folder / "clip_text_encoder").train()
    tensors, texts = load_clips(folder)
    tokenizer = clip_tokenizer()
    # Kinds of text: prompt, caption, motion caption, empty.
    tokens = [tokenize(tokenizer, [row[kind] for row in texts]) for kind in range(3)]
    tokens = torch.stack([*tokens, tokenize(tokenizer, [""]).expand(len(texts), -1)])
    sigmas, device = image_sigmas(), training_device()

    def loss_of(step: int) -> tuple[str, torch.Tensor]:
        rng = np.random.default_rng((4, step))
        clip = rng.integers(len(texts), size=batch_size)
        frame = np.where(rng.random(batch_size) < 0.5, 0, rng.integers(NUM_FRAMES, size=batch_size))
        kind = np.where(frame == 0, 1, rng.choice((0, 2), size=batch_size))
        kind = np.where(rng.random(batch_size) < TEXT_DROPOUT, 3, kind)
        clean = tensors["latents"][clip, :, frame].to(device)
        times = torch.from_numpy(rng.integers(len(sigmas), size=batch_size))
        sigma, noise = sigmas[times].view(-1, 1, 1, 1).to(device), torch.randn_like(clean)
        embeds = text_encoder(tokens[kind, clip].to(device)).last_hidden_state
        prediction = unet(add_noise(clean, noise, sigma), times.to(device), embeds).sample
        return "image", torch.nn.functional.mse_loss(prediction, velocity(clean, noise, sigma))

    modules = {"unet": unet, "text_encoder": text_encoder}
    train(folder, "image", steps, modules, lambda: optimizers([unet, text_encoder], peak), loss_of, peak, decay=0.995)
    unet.save_pretrained(folder / "image_unet")
    text_encoder.save_pretrained(folder / "image_text_encoder")
    return {"samples": steps * batch_size, **count(unet, text_encoder)}
