"""The app as a Space: the embedded model on a CPU, or FVG_MODEL, a name as `fvg app --model` takes it."""

import os

from diffusers_fvg.cli import main


model = os.environ.get("FVG_MODEL")
named = ["--model", model] if model else []
# A Space is reached from outside through its own proxy, at port 7860.
raise SystemExit(main(["app", "--host", "0.0.0.0", "--port", "7860", *named]))
