"""What an anchor is worth in clips: video models of few distinct clips beside an image model of many pictures.

Base and anchor LoRA are trained again on the first clips of the cache, once for each number of them, for the same steps and
on the same pictures; Factorized-Dreamer's video UNet likewise. All else is that of the embedded models and is not trained
again: VAE, text encoder, rewriter, composer. `examples/clips/README.md` is the protocol.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from ..embedded import load_embedded, load_embedded_dreamer
from .dreamer import DESIGNS, DREAMER_PARTS, train_video
from .train import Part, train_lora, train_parts
from .train_models import CACHE_SEED, build_cache, train_base, training_scene
from .world import Scene


# In the order of training. The last is the whole cache.
NUM_CLIPS = (2000, 500, 8000, 20_000)
DREAMER_NUM_CLIPS = (2000, 500, 4000)
# Half of what the embedded models were trained for.
BASE_STEPS, LORA_STEPS, DREAMER_STEPS = 6000, 1500, 1500
SHARED = ("vae", "text_encoder", "tokenizer")


def run_folder(folder: Path, num_clips: int) -> Path:
    """Where base and LoRA of a number of clips are, in the form of [`train.train_all`]'s folder."""
    return folder / f"clips_{num_clips}"


def dreamer_part(num_clips: int) -> str:
    """Name of the video UNet of a number of clips in `folder/dreamer`."""
    return f"video_{num_clips}"


def cached_scenes(num_clips: int) -> list[Scene]:
    """The scenes of the first clips that [`train_models.build_cache`] encodes."""
    rng = np.random.default_rng(CACHE_SEED)
    return [training_scene(rng) for _ in range(num_clips)]


def build_shared_cache(folder: Path) -> None:
    """Encodes clips and pictures once for all runs, by the embedded model's VAE."""
    pipe = load_embedded()
    if not (folder / "latents.safetensors").exists():
        for name in SHARED:
            getattr(pipe, name).save_pretrained(folder / name)
        # The composer is not trained, and no list of pictures may be empty.
        build_cache(folder, num_clips=max(NUM_CLIPS), num_composer_images=1)
    # The statistics stay those that the embedded model was trained with.
    pipe.vae.save_pretrained(folder / "vae")


def train_run(folder: Path, num_clips: int) -> None:
    """Base and anchor LoRA on the first `num_clips` of the cache `folder/cache`."""
    run = run_folder(folder, num_clips)
    run.mkdir(exist_ok=True)
    for name in (*SHARED, "latents.safetensors", "texts.json"):
        if not (run / name).exists():
            (run / name).symlink_to(Path("..", "cache", name))
    parts = {
        "base": Part(partial(train_base, num_clips=num_clips, steps=BASE_STEPS)),
        "lora": Part(partial(train_lora, scenes=cached_scenes(num_clips), steps=LORA_STEPS, checkpoint_every=100)),
    }
    train_parts(run, parts)


def train_dreamer_runs(folder: Path) -> None:
    """Factorized-Dreamer's video UNets, all from one image UNet, in `folder`.

    The image half comes from the embedded model as far as it ships: its image UNet does not, and is trained with its CLIP.
    """
    folder.mkdir(exist_ok=True)
    embedded = load_embedded()
    for name in ("text_encoder", "tokenizer"):
        getattr(embedded, name).save_pretrained(folder / name)
    load_embedded_dreamer().vae.save_pretrained(folder / "vae")
    train_parts(folder, {name: DREAMER_PARTS[name] for name in ("clip", "clips", "image")})
    for number in DREAMER_NUM_CLIPS:
        name = dreamer_part(number)
        train = partial(train_video, name=name, designs=DESIGNS["all"], steps=DREAMER_STEPS, num_clips=number)
        train_parts(folder, {name: Part(train)})
        print(f"finished: Dreamer on {number} clips", flush=True)


def train_clips(folder: Path) -> None:
    """Trains all runs in `folder`, one after the other. What is done is not done again, what was interrupted continues."""
    (folder / "cache").mkdir(parents=True, exist_ok=True)
    build_shared_cache(folder / "cache")
    for number in NUM_CLIPS:
        train_run(folder, number)
        print(f"finished: base and LoRA on {number} clips", flush=True)
    train_dreamer_runs(folder / "dreamer")
