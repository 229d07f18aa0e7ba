"""Trains an anchor LoRA and makes a video with it. Run it: python examples/train_lora.py

Four steps on six clips only show the procedure; the LoRA of the embedded model was trained for 3,000 steps.
"""

import sys
from pathlib import Path

import torch

from diffusers_fvg import load_embedded
from diffusers_fvg.cli import main
from diffusers_fvg.embedded import EMBEDDED_FOLDER
from diffusers_fvg.media import write_video
from diffusers_fvg.shapes.dataset import write_dataset


folder = Path(sys.argv[1] if len(sys.argv) > 1 else "train_lora")
data, lora = folder / "data", folder / "lora"

# For your own videos: a folder with metadata.jsonl, or with a .txt file beside each video that contains its prompt.
write_dataset(data, num_clips=6)

# For a real model: the config that `fvg train --recipe wan2.2-5b` prints, or one of examples/training.
config = f"""
model = "{EMBEDDED_FOLDER}"
data = "{data}"
cache_dir = "{folder / "cache"}"
output_dir = "{lora}"
buckets = [[17, 64, 64]]
frame_rate = 8
max_sequence_length = 28
rank = 4
alpha = 4
steps = 4
learning_rate = 1e-3
warmup_steps = 1
mixed_precision = "no"
"""
(folder / "train.toml").write_text(config)
if main(["train", str(folder / "train.toml")]):
    raise SystemExit("The training failed; see the messages above.")

pipe = load_embedded()
pipe.set_progress_bar_config(disable=True)
# The new LoRA replaces that of the embedded model.
pipe.unload_lora_weights()
print(pipe.load_lora_weights(lora / "weights"))
output = pipe("A red circle moves to the right", generator=torch.Generator().manual_seed(0))
write_video(folder / "video.mp4", output.frames[0], pipe.call_defaults["frame_rate"], output.records[0], scale=6)

# For ComfyUI, see examples/comfyui:
main(["lora", "export", str(lora), str(folder / "comfyui.safetensors")])
