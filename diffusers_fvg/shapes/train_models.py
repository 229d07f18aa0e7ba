"""Trains the shapes world's text encoder, its diffusion models and the anchor LoRA.

* `cache`: encodes clips and single first frames once.
* `text`: trains the text encoder on text alone; later parts use it frozen.
* `base`: trains the video transformer from scratch on clips with prompts and on first frames with captions.
* `composer`: trains the image transformer from scratch on first frames with captions.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ..training.objectives import anchored_flow_loss, sample_sigmas
from .held_out import held_out_scenes
from .loop import train, training_device
from .prompts import brief_caption, make_scene
from .world import Scene, render


# Tokens of a prompt or a brief caption, and of a caption that names the places of nine objects.
MAX_SEQUENCE_LENGTH, MAX_CAPTION_LENGTH = 28, 84
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
# An image costs a fifth of a clip, so the composer can be larger than the video model, like real image models.
COMPOSER_CONFIG = TRANSFORMER_CONFIG | {"num_attention_heads": 6, "ffn_dim": 648, "num_layers": 6}
TEXT_ENCODER_CONFIG = {
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
}
# Shares of the categories in the clips. Those with motion or change have more, because they are learnt more slowly.
CATEGORY_WEIGHTS = {
    "motion_binding": 0.2,
    "dynamic_attr": 0.16,
    "action_binding": 0.16,
    "interaction": 0.14,
    "consistent_attr": 0.1,
    "spatial_relationships": 0.08,
    "generative_numeracy": 0.08,
    "placement": 0.08,
}
# Shares of the categories in the composer's images. The hardest have more: one object in front of another, then many objects.
IMAGE_WEIGHTS = dict.fromkeys(CATEGORY_WEIGHTS, 0.07) | {"generative_numeracy": 0.24, "spatial_relationships": 0.34}
CLIP_SHIFT, IMAGE_SHIFT = 3.0, 1.5
TEXT_DROPOUT = 0.1
MAX_PHRASES = 24
CACHE_SEED = 7
# Batches in a part of the cache, which an interrupted run keeps.
PART_BATCHES = 100


def training_scene(rng: np.random.Generator, weights: dict[str, float] = CATEGORY_WEIGHTS) -> Scene:
    """Draws a training scene with the categories' shares `weights`, by default those of the clips. Never a held-out prompt."""
    return make_scene(str(rng.choice(list(weights), p=list(weights.values()))), rng, held_out=False)


def build_cache(
    folder: Path,
    num_clips: int = 20_000,
    num_images: int = 40_000,
    num_composer_images: int = 80_000,
    seed: int = CACHE_SEED,
    batch_size: int = 8,
) -> None:
    """Encodes clips and single first frames to `folder/latents.safetensors` (fp16), and writes their texts to `texts.json`.

    Also writes the latents' statistics into the VAE's config. Clips are drawn with `CATEGORY_WEIGHTS`, the base's images equally
    from all categories, and the composer's images with `IMAGE_WEIGHTS`.
    """
    from diffusers import AutoencoderKLWan

    if (folder / "latents.safetensors").exists():
        return
    vae = AutoencoderKLWan.from_pretrained(folder / "vae").to(training_device())
    rng = np.random.default_rng(seed)
    clips = [training_scene(rng) for _ in range(num_clips)]
    images = [make_scene(list(CATEGORY_WEIGHTS)[k % len(CATEGORY_WEIGHTS)], rng, False) for k in range(num_images)]
    composer_images = [training_scene(rng, IMAGE_WEIGHTS) for _ in range(num_composer_images)]
    scenes_of = {"clips": clips, "images": images, "composer_images": composer_images}

    latents = {
        name: _encode_parts(folder / "parts", name, vae, scenes, 17 if name == "clips" else 1, batch_size)
        for name, scenes in scenes_of.items()
    }
    # The first latent frame holds one frame and varies less than the others. Both groups have half of the weight.
    first, later = latents["clips"][:, :, :1].float(), latents["clips"][:, :, 1:].float()
    mean = (first.mean((0, 2, 3, 4)) + later.mean((0, 2, 3, 4))) / 2
    centred = [part - mean.view(1, -1, 1, 1, 1) for part in (first, later)]
    std = (sum(part.square().mean((0, 2, 3, 4)) for part in centred) / 2).sqrt()
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    vae.save_pretrained(folder / "vae")
    # The base reads prompts and brief captions. The composer reads captions as stage 1 writes them, and every fourth time brief
    # ones.
    texts = {name: [(scene.prompt, brief_caption(scene)) for scene in scenes_of[name]] for name in ("clips", "images")}
    texts["composer_images"] = [
        (scene.prompt, scene.caption if k % 4 else brief_caption(scene)) for k, scene in enumerate(composer_images)
    ]
    (folder / "texts.json").write_text(json.dumps(texts))
    save_file(latents, folder / "latents.tmp")
    (folder / "latents.tmp").rename(folder / "latents.safetensors")
    shutil.rmtree(folder / "parts")


@torch.no_grad()
def _encode_parts(
    folder: Path, name: str, vae: torch.nn.Module, scenes: Sequence[Scene], num_frames: int, batch_size: int
) -> torch.Tensor:
    """Encodes the first `num_frames` frames of scenes; a part that is in `folder` is not encoded again."""
    folder.mkdir(exist_ok=True)
    batch_size *= 1 if num_frames > 1 else 8
    parts = []
    for first in range(0, len(scenes), PART_BATCHES * batch_size):
        path = folder / f"{name}_{first}.safetensors"
        if not path.exists():
            latents = []
            for start in range(first, min(first + PART_BATCHES * batch_size, len(scenes)), batch_size):
                frames = [render(scene.objects, num_frames) for scene in scenes[start : start + batch_size]]
                pixels = torch.from_numpy(np.stack(frames)).to(vae.device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
                latents.append(vae.encode(pixels).latent_dist.mode().half().cpu())
            save_file({name: torch.cat(latents)}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)
        parts.append(load_file(path)[name])
    return torch.cat(parts)


class LatentData:
    """The cache in memory: normalised latents and token ids of clips with prompts and of first frames with captions.

    Args:
        folder (`Path`): folder with the cache, the VAE and the tokenizer.
        images (`Sequence[str]`): names of the cached latents from which first frames are taken; `"clips"` are the clips.
        text_length (`int`): number of tokens of every text.
        num_clips (`int`, *optional*): number of clips to use, the first of the cache; left out, all. The number of first frames
            does not depend on it.

    Raises:
        `ValueError`: the cache has fewer than `num_clips` clips.
    """

    def __init__(self, folder: Path, images: Sequence[str], text_length: int, num_clips: int | None = None):
        from diffusers import AutoencoderKLWan
        from transformers import AutoTokenizer

        config = AutoencoderKLWan.load_config(folder / "vae")
        mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
        cached = load_file(folder / "latents.safetensors")
        texts = json.loads((folder / "texts.json").read_text())
        # The saved tokenizer, because later parts must read texts as the text encoder did in its training.
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        self.empty = tokenize(tokenizer, [""], text_length)
        if num_clips is not None and not 1 <= num_clips <= len(cached["clips"]):
            raise ValueError(f"`num_clips={num_clips}` must be 1 to {len(cached['clips'])}, the clips of the cache.")
        prompts = [prompt for prompt, _ in texts["clips"][:num_clips]]
        self.clips = (cached["clips"][:num_clips].float() - mean) / std, tokenize(tokenizer, prompts, text_length)
        first_frames = torch.cat([cached[name][:, :, :1] for name in images]).float()
        captions = [caption for name in images for _, caption in texts[name]]
        self.images = (first_frames - mean) / std, tokenize(tokenizer, captions, text_length)

    def batch(self, rng: np.random.Generator, batch_size: int, images: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws clean latents `(B, 16, f, 8, 8)` and token ids `(B, L)`, a tenth of them those of the empty text."""
        latents, tokens = self.images if images else self.clips
        index = torch.from_numpy(rng.integers(len(latents), size=batch_size))
        tokens = tokens[index]
        tokens[torch.from_numpy(rng.random(batch_size) < TEXT_DROPOUT)] = self.empty
        return latents[index], tokens


def tokenize(tokenizer, texts: list[str], length: int = MAX_SEQUENCE_LENGTH) -> torch.Tensor:
    """Returns token ids `(B, length)`, padded with 0."""
    return tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt").input_ids


def encode_text(text_encoder, tokens: torch.Tensor) -> torch.Tensor:
    """Returns text embeddings `(B, L, D)` with padding set to zero, as in `WanPipeline`."""
    mask = (tokens != 0).long()
    return text_encoder(tokens, mask).last_hidden_state * mask.unsqueeze(-1)


def optimizers(modules: list[torch.nn.Module], peak: float) -> list[torch.optim.Optimizer]:
    """Returns Muon for the matrices inside the transformer's blocks, and AdamW for all other parameters."""
    parameters = [(name, p) for module in modules for name, p in module.named_parameters() if p.requires_grad]
    matrices = [p for name, p in parameters if p.ndim == 2 and "block" in name and "relative_attention" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for _, p in parameters if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=peak, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.98), weight_decay=0.0)]


def favour_neighbours(text_encoder) -> None:
    """Initializes some heads to attend to the word before, to the word after, and to both.

    Only neighbours distinguish "red circle, blue square" from "blue circle, red square". With random relative position biases,
    learning this takes longer than the rest of the training. (Bucket k is k words before, 16 + k is k words after.)
    """
    for block in text_encoder.encoder.block:
        bias = block.layer[0].SelfAttention.relative_attention_bias.weight.data
        bias[1, 0] += 4
        bias[17, 1] += 4
        bias[[0, 1, 2, 17, 18], 2] += 2


def phrase_targets(tokens: torch.Tensor, words: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns for each word which words are in its phrase, `(B, L, V)` of 0 and 1, and the number of its phrase, `(B, L)`.

    A phrase begins at an article, a comma, a colon, "and" or "while": "a red circle moves upwards | while | a blue square".
    """
    starts = torch.isin(tokens, tokens.new_tensor([words[word] for word in ("a", ",", ":", "and", "while")]))
    phrase = starts.long().cumsum(1)
    member = torch.nn.functional.one_hot(tokens, len(words)).float() * (tokens > 2).unsqueeze(-1)
    together = (phrase[:, :, None] == phrase[:, None, :]).float()
    return (together @ member).clamp(max=1), phrase


def text_modules() -> dict[str, torch.nn.Module]:
    """Returns the untrained text encoder and the heads with which it is trained."""
    from transformers import UMT5Config, UMT5EncoderModel

    from .tokenizer import vocabulary

    torch.manual_seed(0)
    num_words, width = len(vocabulary()), TEXT_ENCODER_CONFIG["d_model"]
    text_encoder = UMT5EncoderModel(UMT5Config(vocab_size=num_words, **TEXT_ENCODER_CONFIG))
    favour_neighbours(text_encoder)
    heads = {"words": torch.nn.Linear(width, num_words), "order": torch.nn.Linear(width, MAX_PHRASES)}
    return {"text_encoder": text_encoder, "heads": torch.nn.ModuleDict(heads)}


def train_text(folder: Path, steps: int = 2500, batch_size: int = 64, peak: float = 3e-3) -> dict[str, int]:
    """Trains the text encoder from scratch on text alone: every word predicts which words are in its phrase.

    Real video and image models use a text encoder that knows which words belong together. Here, too, "a red circle above a
    blue square" must differ from "a blue circle above a red square". Base and composer use it frozen.
    """
    from .tokenizer import loose_wording, text_tokenizer

    tokenizer = text_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    words, modules = tokenizer.get_vocab(), text_modules()
    text_encoder, heads = modules.values()

    def loss_of(step: int) -> tuple[str, torch.Tensor]:
        rng = np.random.default_rng((1, step))
        names = list(CATEGORY_WEIGHTS)
        scenes = [make_scene(names[k], rng, held_out=False) for k in rng.integers(len(names), size=batch_size)]
        kinds = rng.integers(3, size=batch_size)
        texts = [
            (scene.caption, scene.prompt, loose_wording(scene.prompt, rng))[kind] for scene, kind in zip(scenes, kinds)
        ]
        tokens = tokenize(tokenizer, texts, MAX_CAPTION_LENGTH).to(training_device())
        together, phrase = phrase_targets(tokens, words)
        embeds = encode_text(text_encoder, tokens)
        counted = (tokens > 1).float()
        same = torch.nn.functional.binary_cross_entropy_with_logits(heads["words"](embeds), together, reduction="none")
        order = torch.nn.functional.cross_entropy(heads["order"](embeds).mT, phrase, reduction="none")
        return "text", ((same.sum(-1) + order) * counted).sum() / counted.sum()

    train(folder, "text", steps, modules, lambda: optimizers(list(modules.values()), peak), loss_of, peak=peak)
    text_encoder.save_pretrained(folder / "text_encoder")
    return {"samples": steps * batch_size, **count(text_encoder)}


@torch.no_grad()
def text_score(folder: Path, per_category: int = 40) -> float:
    """Returns the share of words in held-out prompts and captions for which all words of their phrase are predicted."""
    from .tokenizer import text_tokenizer

    tokenizer, modules = text_tokenizer(), text_modules()
    average = torch.load(folder / "text.ckpt", weights_only=True)["average"]
    for name, module in modules.items():
        for key, parameter in module.named_parameters():
            parameter.copy_(average[f"{name}.{key}"])
    scenes = held_out_scenes(per_category, seed=1)
    texts = [text for scene in scenes for text in (scene.prompt, scene.caption)]
    tokens = tokenize(tokenizer, texts, MAX_CAPTION_LENGTH)
    together, _ = phrase_targets(tokens, tokenizer.get_vocab())
    known = (modules["heads"]["words"](encode_text(modules["text_encoder"], tokens)) > 0) == (together > 0)
    return known.all(-1)[tokens > 1].float().mean().item()


def train_transformer(
    folder: Path,
    name: str,
    steps: int,
    clip_share: float,
    images: Sequence[str],
    text_length: int = MAX_SEQUENCE_LENGTH,
    config: dict[str, Any] = TRANSFORMER_CONFIG,
    peak: float = 2e-3,
    clip_batch: int = 24,
    image_batch: int = 64,
    num_clips: int | None = None,
) -> dict[str, int]:
    """Trains a transformer from scratch by flow matching on cached latents, with the text encoder frozen; writes
    `folder/<name>`.

    Args:
        folder (`Path`): folder with the parts trained before.
        name (`str`): name of the part.
        steps (`int`): training steps.
        clip_share (`float`): share of the steps that use clips with prompts. The others use first frames with captions.
        images (`Sequence[str]`), text_length (`int`), num_clips (`int`, *optional*): as in [`LatentData`].
        config (`dict`): config of the transformer.
        peak (`float`): highest learning rate.
        clip_batch, image_batch (`int`): clips or images per step.
    """
    from transformers import UMT5EncoderModel

    from ..animate.transformer_anchor import AnchorConditionedTransformer3D

    torch.manual_seed(0)
    text_encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder").requires_grad_(False)
    text_encoder.to(training_device())
    transformer = AnchorConditionedTransformer3D(**config)
    # With a zero output layer the first prediction is zero, and not random.
    torch.nn.init.zeros_(transformer.proj_out.weight)
    data = LatentData(folder, images, text_length, num_clips)

    def takes_clips(step: int) -> bool:
        # Steps with clips are spread evenly: those at which the integer part of step * share increases.
        return int((step + 1) * clip_share) > int(step * clip_share)

    def loss_of(step: int) -> tuple[str, torch.Tensor]:
        kind, batch_size = ("clip", clip_batch) if takes_clips(step) else ("image", image_batch)
        latents, tokens = data.batch(np.random.default_rng((*name.encode(), step)), batch_size, images=kind == "image")
        sigmas = sample_sigmas(batch_size, CLIP_SHIFT if kind == "clip" else IMAGE_SHIFT, std=1.2)
        inputs = (part.to(training_device()) for part in (latents, torch.randn_like(latents), sigmas))
        embeds = encode_text(text_encoder, tokens.to(training_device()))
        return kind, anchored_flow_loss(transformer, *inputs, embeds)

    modules = {"transformer": transformer}
    train(folder, name, steps, modules, lambda: optimizers([transformer], peak), loss_of, peak=peak)
    transformer.save_pretrained(folder / name)
    clips = sum(takes_clips(step) for step in range(steps))
    samples = {"clips": clips * clip_batch, "images": (steps - clips) * image_batch}
    return {"samples": sum(samples.values()), **samples, **count(transformer)}


def train_base(folder: Path, num_clips: int | None = None, steps: int = 12_000) -> dict[str, int]:
    """Trains the video transformer on 216,000 clips and 192,000 images; `num_clips` limits the number of distinct clips."""
    images = ("clips", "images")
    return train_transformer(folder, "base", steps, clip_share=3 / 4, images=images, num_clips=num_clips)


def train_composer(folder: Path) -> dict[str, int]:
    """Trains the image transformer on 403,200 images, fewer than the base's samples."""
    return train_transformer(
        folder,
        "composer",
        steps=6300,
        clip_share=0.0,
        images=("composer_images",),
        text_length=MAX_CAPTION_LENGTH,
        config=COMPOSER_CONFIG,
    )


def count(*modules: torch.nn.Module) -> dict[str, int]:
    return {"parameters": sum(p.numel() for module in modules for p in module.parameters())}
