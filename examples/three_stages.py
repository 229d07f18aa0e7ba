"""Runs the three stages one by one with the model that ships with the package. Run it: python examples/three_stages.py

Each stage returns plain data, which you can look at, change and pass to the next stage.
"""

import sys
from pathlib import Path

import torch

from diffusers_fvg import Anchor, load_embedded
from diffusers_fvg.media import write_strip, write_video


folder = Path(sys.argv[1] if len(sys.argv) > 1 else "three_stages")
folder.mkdir(parents=True, exist_ok=True)
# A model of your own: DiffusionPipeline.from_pretrained("org/fvg", dtype=torch.bfloat16).to("cuda")
pipe = load_embedded()
pipe.set_progress_bar_config(disable=True)
prompt = "A red circle moves to the right"

# Stage 1, reasoning: a language model describes the first frame, before anything moves.
(caption,) = pipe.rewrite(prompt)
(folder / "1_caption.txt").write_text(caption + "\n")
print("1 caption:", caption)

# Stage 2, composition: a text-to-image model draws it.
(image,) = pipe.compose(caption, generator=torch.Generator().manual_seed(0))
image.save(folder / "2_anchor.png")
print("2 anchor: ", folder / "2_anchor.png")

# Stage 3, temporal synthesis: the video model animates the picture and keeps it as the first frame.
(frames,) = pipe.animate(prompt, Anchor(image), generator=torch.Generator().manual_seed(0))
# Enlarged sixfold, because players would show 64 pixels too small.
write_video(folder / "3_video.mp4", frames, frame_rate=pipe.call_defaults["frame_rate"], scale=6)
write_strip(folder / "strip.png", prompt, caption, image, frames)
print("3 video:  ", folder / "3_video.mp4")

# All stages in one call:
#     pipe(prompt, generator=torch.Generator().manual_seed(0)).frames
