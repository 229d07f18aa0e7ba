"""Trains the anchor LoRA of the shapes model in one run. All CPU cores render the clips, which are encoded on the device and kept in
memory, so that only the result and its checkpoints are written.

    python examples/benchmarks/shapes_lora.py OUTPUT                    # anchors behind the clip, at their exact frame
    python examples/benchmarks/shapes_lora.py OUTPUT --form slot

The settings are those of the shipped LoRA (`shapes.train.LORA_SETTINGS`). The LoRA is written to `OUTPUT/weights`, and a line per
step to `OUTPUT/log_transformer.jsonl`. A stopped run continues from its last checkpoint. The data is synthetic. `fvg shapes report
FOLDER --appended OUTPUT/weights` scores the LoRA.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch


if importlib.util.find_spec("av") is None:
    # This script reads and writes no video file, but it imports modules that do; a machine with a GPU may lack the package.
    sys.modules |= {name: MagicMock() for name in ("av", "av.bitstream", "av.video", "av.video.reformatter")}

from diffusers_fvg.embedded import EMBEDDED_FOLDER, load_embedded  # noqa: E402
from diffusers_fvg.shapes.loop import training_device  # noqa: E402
from diffusers_fvg.shapes.train import LORA_CLIPS, LORA_SETTINGS, lora_config  # noqa: E402
from diffusers_fvg.shapes.train_models import training_scene  # noqa: E402
from diffusers_fvg.shapes.world import render  # noqa: E402
from diffusers_fvg.training.batches import Clips  # noqa: E402
from diffusers_fvg.training.config import TrainConfig  # noqa: E402
from diffusers_fvg.training.draws import Pictures, appended_frames  # noqa: E402
from diffusers_fvg.training.families import Wan  # noqa: E402
from diffusers_fvg.training.trainer import train  # noqa: E402


TEXTS_AT_ONCE, CLIPS_AT_ONCE = 250, 100


class InMemory(Clips):
    """Clips whose latents, pictures and texts are in memory; their file names refer to no file.

    Args:
        config (`TrainConfig`): configuration of the run.
        latents (`torch.Tensor` of shape `(N, C, f, h, w)`): latents of the clips.
        embeds (`torch.Tensor` of shape `(N + 1, L, D)`): embeddings of the captions; the last one is of the empty caption.
        pictures (`torch.Tensor` of shape `(N, C, n, h, w)`, *optional*): latents of the frames that may be appended.
        frames (`list[int]`): indices of these frames.
    """

    def __init__(
        self,
        config: TrainConfig,
        latents: torch.Tensor,
        embeds: torch.Tensor,
        pictures: torch.Tensor | None,
        frames: list[int],
    ):
        names = [Path(f"clip_{number}") for number in range(len(latents))]
        super().__init__(
            names, names, [tuple(latents.shape[1:])] * len(names), Path("empty"), config.max_sequence_length
        )
        self.tensors, self.frames = (latents, embeds, pictures), frames

    def load(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, Pictures | None]:
        latents, embeds, pictures = self.tensors
        own = torch.tensor(list(indices))
        given = None
        if pictures is not None:
            given = Pictures(pictures[own], torch.tensor([self.frames]).expand(len(own), -1))
        return latents[own], embeds[torch.cat([own, torch.tensor([len(latents)])])], given


def rendered(number: int) -> tuple[str, np.ndarray]:
    """Returns caption and frames of a clip, which depend only on its number."""
    scene = training_scene(np.random.default_rng((7, number)))
    return scene.prompt, render(scene.objects)


@torch.no_grad()
def encoded(config: TrainConfig, prompts: Sequence[str], clips: Sequence[np.ndarray]) -> InMemory:
    pipe = load_embedded().to(training_device())
    frames = appended_frames(config, "", clips[0].shape[0])
    latents, pictures, embeds = [], [], []
    for start in range(0, len(clips), CLIPS_AT_ONCE):
        pixels = torch.from_numpy(np.stack(clips[start : start + CLIPS_AT_ONCE])).permute(0, 4, 1, 2, 3)
        pixels = pixels.float() / 255 * 2 - 1
        latents.append(Wan.encode(pipe.vae, pixels))
        if frames:
            alone = pixels[:, :, frames].transpose(1, 2).flatten(0, 1)[:, :, None]
            alone = Wan.encode(pipe.vae, alone)[:, :, 0]
            pictures.append(alone.unflatten(0, (-1, len(frames))).transpose(1, 2))
    texts, length = [*prompts, ""], config.max_sequence_length
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        batch = texts[start : start + TEXTS_AT_ONCE]
        embeds.append(
            pipe.encode_prompt(batch, do_classifier_free_guidance=False, max_sequence_length=length)[0].cpu()
        )
    return InMemory(config, torch.cat(latents), torch.cat(embeds), torch.cat(pictures) if pictures else None, frames)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the run")
    parser.add_argument(
        "--form", choices=("appended", "slot"), default="appended", help="form of the anchors (default: %(default)s)"
    )
    parser.add_argument("--clips", type=int, default=LORA_CLIPS, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=LORA_SETTINGS["steps"], help="default: %(default)s")
    args = parser.parse_args()
    began, warmup = time.perf_counter(), min(LORA_SETTINGS["warmup_steps"], args.steps - 1)
    changes = {"anchor_form": args.form, "steps": args.steps, "warmup_steps": warmup, "checkpoint_every": 250}
    config = lora_config(args.output.parent, args.output.name, **changes)

    def tell(what: str) -> None:
        print(f"{time.perf_counter() - began:.0f} s: {what}", flush=True)

    with multiprocessing.get_context("fork").Pool() as pool:
        prompts, clips = zip(*pool.imap(rendered, range(args.clips), chunksize=50))
    tell(f"{args.clips} clips rendered")
    # The next lines are the first that touch the device.
    held = encoded(config, prompts, clips)
    tell("encoded")
    options = {"subfolder": "transformer", "torch_dtype": torch.float32}
    path = train(config, held, lambda name: Wan.transformer.from_pretrained(EMBEDDED_FOLDER, **options))
    tell(f"{args.steps} steps, {path}")


if __name__ == "__main__":
    main()
