"""A video of several clips, each of which goes on from the last frames of the one before. Run it:

    python examples/long_video.py
    python examples/long_video.py "A red circle moves to the right" "A red circle moves to the left" --output long.mp4

Each prompt is one clip. The frames that two clips have in common are shown once.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

from diffusers_fvg import Anchor, load_embedded
from diffusers_fvg.media import write_strip, write_video


PROMPTS = [
    "A red circle moves to the right",
    "A red circle moves to the left",
    "A circle gradually turns from red to magenta",
    "A magenta circle moves to the right",
]

parser = argparse.ArgumentParser(description="Chains clips into one video.")
parser.add_argument("prompts", nargs="*", default=PROMPTS, help="one for each clip")
parser.add_argument("--model", help="folder or Hub repository; the embedded shapes model when left out")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
parser.add_argument("--output", type=Path, default=Path("long_video.mp4"), help="mp4 to write, with a PNG beside it")
parser.add_argument(
    "--overlap",
    type=int,
    default=5,
    help="last frames that the next clip begins with: 4k + 1, for CogVideoX 1.5 8k + 1. More than one tell how things move; "
    "1 leaves the next prompt free to turn them round (default: %(default)s)",
)
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

if arguments.model is None:
    pipe = load_embedded()
else:
    pipe = DiffusionPipeline.from_pretrained(arguments.model, dtype=torch.bfloat16)
pipe.to(arguments.device)
pipe.set_progress_bar_config(disable=True)

# The first clip comes from all three stages.
first, *others = arguments.prompts
output = pipe(first, generator=torch.Generator().manual_seed(arguments.seed))
video = output.frames[0]
print(f"frames 0 to {len(video) - 1}: {first}")

for number, prompt in enumerate(others, start=1):
    (clip,) = pipe.animate(
        prompt,
        Anchor(video[-arguments.overlap :]),
        generator=torch.Generator().manual_seed(arguments.seed + number),
        # Every clip goes through the VAE again: its colours are held to those of the clip before.
        anchor_decode="match",
    )
    video = np.concatenate([video, clip[arguments.overlap :]])
    print(f"to {len(video) - 1}: {prompt}")

# Players show 64 pixels as a stamp.
scale = max(1, 384 // video.shape[1])
write_video(arguments.output, video, frame_rate=pipe.call_defaults["frame_rate"], scale=scale)
strip = arguments.output.with_suffix(".png")
prompts = " / ".join(arguments.prompts)
write_strip(strip, prompts, output.first_frame_prompts[0], output.anchor_images[0], video, num_frames_shown=16)
print(f"{arguments.output}, {strip}")
