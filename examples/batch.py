"""Makes a folder of videos from a table of prompts. Run it: python examples/batch.py

You can stop it at any time: the same command continues, and no finished video is computed twice.
"""

import json
import sys
from pathlib import Path

from diffusers_fvg.cli import main


folder = Path(sys.argv[1] if len(sys.argv) > 1 else "batch")
# A real model: ["--model", "wan2.2-5b"]; for several GPUs or machines add "--engine".
options = ["--steps", "4"]

folder.mkdir(parents=True, exist_ok=True)
(folder / "prompts.csv").write_text(
    "name,prompt,mode,seed\nred,A red circle moves to the right,,3\nsquare,A blue square moves upwards,direct,\n"
)
if main(["batch", str(folder / "prompts.csv"), str(folder / "out"), *options]):
    raise SystemExit("Some videos are missing; see the messages above.")

for file in sorted((folder / "out" / "manifest").glob("*.jsonl")):
    for line in file.read_text().splitlines():
        row = json.loads(line)
        print(row["path"], row["seed"], row["caption"])
