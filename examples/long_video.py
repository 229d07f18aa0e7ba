"""Makes a video of several clips, each of which continues from the last frames of the one before. Run it:

    python examples/long_video.py
    python examples/long_video.py "A red circle moves to the right" "A red circle moves to the left" --output long.mp4

Each prompt gives one clip. Frames that two clips share appear once.
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
parser.add_argument("prompts", nargs="*", default=PROMPTS, help="one prompt per clip")
parser.add_argument("--model", help="folder or Hub repository (default: the embedded shapes model)")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
parser.add_argument("--output", type=Path, default=Path("long_video.mp4"), help="mp4 to write, with a PNG beside it")
parser.add_argument(
    "--overlap",
    type=int,
    default=5,
    help="number of last frames with which the next clip begins: 4k + 1, for CogVideoX 1.5 8k + 1. Several frames also pass on "
    "the motion; with 1 the next prompt can change the direction (default: %(default)s)",
)
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

if arguments.model is None:
    pipe = load_embedded()
else:
    pipe = DiffusionPipeline.from_pretrained(arguments.model, dtype=torch.bfloat16)
pipe.to(arguments.device)
pipe.set_progress_bar_config(disable=True)

# All three stages make the first clip.
first, *others = arguments.prompts
output = pipe(first, generator=torch.Generator().manual_seed(arguments.seed))
video = output.frames[0]
print(f"frames 0 to {len(video) - 1}: {first}")

for number, prompt in enumerate(others, start=1):
    (clip,) = pipe.animate(
        prompt,
        Anchor(video[-arguments.overlap :]),
        generator=torch.Generator().manual_seed(arguments.seed + number),
        # The shared frames are encoded and decoded again for every clip: "match" keeps their colours.
        anchor_decode="match",
    )
    video = np.concatenate([video, clip[arguments.overlap :]])
    print(f"to {len(video) - 1}: {prompt}")

# Players would show 64 pixels too small.
scale = max(1, 384 // video.shape[1])
write_video(arguments.output, video, frame_rate=pipe.call_defaults["frame_rate"], scale=scale)
strip = arguments.output.with_suffix(".png")
prompts = " / ".join(arguments.prompts)
write_strip(strip, prompts, output.first_frame_prompts[0], output.anchor_images[0], video, num_frames_shown=16)
print(f"{arguments.output}, {strip}")
