"""Uses your own models in the three stages. Run it: python examples/own_models.py

Any chat model of transformers describes the first frame, any text-to-image pipeline of diffusers draws it, and the video model comes from
a pipeline that is already loaded. All keep their weights, dtypes, quantization and offloading.
"""

import sys
from pathlib import Path

import torch

from diffusers_fvg import FactorizedVideoPipeline, load_embedded
from diffusers_fvg.media import write_strip, write_video


folder = Path(sys.argv[1] if len(sys.argv) > 1 else "own_models")
embedded = load_embedded()
# With real models:
#     text_to_video = WanPipeline.from_pretrained("Wan-AI/Wan2.2-TI2V-5B-Diffusers", dtype=torch.bfloat16).to("cuda")
#     text_to_image = DiffusionPipeline.from_pretrained("black-forest-labs/FLUX.1-schnell", dtype=torch.bfloat16).to("cuda")
#     chat_model = (AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).to("cuda"), AutoTokenizer.from_pretrained(name))
# Instead of the last one, an endpoint with OpenAI's protocol: ChatEndpoint("http://localhost:8000/v1", "model").
text_to_video, text_to_image, chat_model = embedded, embedded.composer.pipeline, embedded.rewriter

pipe = FactorizedVideoPipeline.from_pipe(text_to_video, composer=text_to_image, rewriter=chat_model)
pipe.set_progress_bar_config(disable=True)
prompt = "A blue square moves upwards"
output = pipe(prompt, generator=torch.Generator().manual_seed(0))

caption, picture, frames = output.first_frame_prompts[0], output.anchor_images[0], output.frames[0]
print(f"{type(pipe.composer.pipeline).__name__} drew: {caption}")
folder.mkdir(parents=True, exist_ok=True)
write_video(
    folder / "video.mp4", frames, frame_rate=pipe.call_defaults["frame_rate"], metadata=output.records[0], scale=6
)
write_strip(folder / "strip.png", prompt, caption, picture, frames)
print(f"{folder / 'video.mp4'}, {folder / 'strip.png'}")
