"""Trains video models on few distinct clips, to measure how many training clips an anchor replaces.

For each number of clips, the base and the anchor LoRA are trained again on the first clips of the cache, with the same steps
and the same images; likewise Factorized-Dreamer's video UNet. VAE, text encoder, rewriter and composer are those of the embedded
models. The protocol is in `examples/clips/README.md`.
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


# Numbers of clips, in the order of training. The last one is the whole cache.
NUM_CLIPS = (2000, 500, 8000, 20_000)
DREAMER_NUM_CLIPS = (2000, 500, 4000)
# Half of the embedded models' training steps.
BASE_STEPS, LORA_STEPS, DREAMER_STEPS = 6000, 1500, 1500
SHARED = ("vae", "text_encoder", "tokenizer")


def run_folder(folder: Path, num_clips: int) -> Path:
    """Returns the folder of the base and the LoRA for a number of clips, with the layout of [`train.train_all`]."""
    return folder / f"clips_{num_clips}"


def dreamer_part(num_clips: int) -> str:
    """Returns the name of the video UNet for a number of clips in `folder/dreamer`."""
    return f"video_{num_clips}"


def cached_scenes(num_clips: int) -> list[Scene]:
    """Returns the scenes of the first clips that [`train_models.build_cache`] encodes."""
    rng = np.random.default_rng(CACHE_SEED)
    return [training_scene(rng) for _ in range(num_clips)]


def build_shared_cache(folder: Path) -> None:
    """Encodes clips and images once for all runs, with the embedded model's VAE."""
    pipe = load_embedded()
    if not (folder / "latents.safetensors").exists():
        for name in SHARED:
            getattr(pipe, name).save_pretrained(folder / name)
        # The composer is not trained, but its list of images must not be empty.
        build_cache(folder, num_clips=max(NUM_CLIPS), num_composer_images=1)
    # Restores the latents' statistics with which the embedded model was trained.
    pipe.vae.save_pretrained(folder / "vae")


def train_run(folder: Path, num_clips: int) -> None:
    """Trains base and anchor LoRA on the first `num_clips` of the cache in `folder/cache`."""
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
    """Trains Factorized-Dreamer's video UNets in `folder`, all from one image UNet.

    Text encoder, tokenizer and VAE are those of the embedded models. Image UNet and CLIP are trained first, because the package
    does not ship the image UNet.
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
    """Trains all runs in `folder` in order. A further call skips finished runs and resumes an interrupted one."""
    (folder / "cache").mkdir(parents=True, exist_ok=True)
    build_shared_cache(folder / "cache")
    for number in NUM_CLIPS:
        train_run(folder, number)
        print(f"finished: base and LoRA on {number} clips", flush=True)
    train_dreamer_runs(folder / "dreamer")
