"""Runs the app as a Space, with the embedded model on a CPU or with the model named in FVG_MODEL (as in `fvg app --model`)."""

import os

from diffusers_fvg.cli import main


model = os.environ.get("FVG_MODEL")
named = ["--model", model] if model else []
# The proxy of a Space connects to port 7860.
raise SystemExit(main(["app", "--host", "0.0.0.0", "--port", "7860", *named]))
