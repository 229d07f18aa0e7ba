"""Makes a video between two pictures. Run it: python examples/first_and_last_frame.py

This script draws the pictures from two captions. To use your own, of any size, open them with `PIL.Image.open("first.jpg")` and
`PIL.Image.open("last.jpg")`.
"""

import sys
from pathlib import Path

import torch

from diffusers_fvg import Anchor, load_embedded
from diffusers_fvg.media import write_animation, write_strip, write_video


folder = Path(sys.argv[1] if len(sys.argv) > 1 else "first_and_last_frame")
# A real model: diffusers_fvg.load("wan2.2-5b").to("cuda")
pipe = load_embedded()
pipe.set_progress_bar_config(disable=True)
prompt = "A red circle moves to the right"
captions = ["A red circle on the left", "A red circle on the right"]

# Both pictures use the same seed and the second is derived from the first, so that their common parts look alike.
generator = torch.Generator().manual_seed(0)
(first,) = pipe.compose(captions[0], generator=generator)
(last,) = pipe.derive(first, captions[1], generator=torch.Generator().manual_seed(0))

# 0 is the first frame of the video, -1 the last. Below strength 1 the video may deviate from a picture.
anchors = [Anchor(first, 0), Anchor(last, -1, strength=1.0)]
(frames,) = pipe.animate(prompt, anchors, generator=generator)

folder.mkdir(parents=True, exist_ok=True)
frame_rate = pipe.call_defaults["frame_rate"]
write_video(folder / "video.mp4", frames, frame_rate, scale=6)
write_animation(folder / "video.gif", frames, frame_rate, scale=6)
write_strip(folder / "strip.png", prompt, captions, [first, last], frames)
print(f"{folder / 'video.mp4'}, {folder / 'video.gif'}, {folder / 'strip.png'}")
