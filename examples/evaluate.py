"""Runs a complete benchmark: plan, videos, scores, report. Run it: python examples/evaluate.py

It compares the video model alone with all three stages, on a few prompts of the embedded model's world. So few prompts prove nothing;
a published benchmark takes hours on a GPU.
"""

import sys
from pathlib import Path

from diffusers_fvg.cli import main


folder = Path(sys.argv[1] if len(sys.argv) > 1 else "evaluate")
run, prompts, layout, results = (str(folder / name) for name in ("run", "prompts", "layout", "results"))
# A published benchmark: "t2v-compbench-v2", with a checkout of it as `prompts`, and a real model: ["--model", "wan2.2-5b"].
suite, model = "shapes", []


def fvg(*arguments: str) -> None:
    if main(list(arguments)):
        raise SystemExit(f"fvg {' '.join(arguments)} failed; see the messages above.")


fvg("shapes", "prompts", prompts, "--per-category", "1")
arms = ["--arms", "direct", "factorized", "--steps", "2", "--categories", "motion_binding"]
fvg("bench", "plan", run, "--suite", suite, "--prompts", prompts, *arms)
fvg("bench", "run", run, *model)
fvg("bench", "check", run, "--min-frames", "16")
fvg("bench", "layout", run, layout)
fvg("bench", "commands", layout, prompts, results)
# For a published benchmark, `bash results/environment.sh` and `bash results/evaluate.sh` run its own evaluator instead.
for arm in sorted(Path(layout).iterdir()):
    fvg("shapes", "score", str(arm / "video"), prompts, str(Path(results) / arm.name))
fvg("bench", "read", results)
fvg("bench", "report", run, str(folder / "report"), "--scores", str(Path(results) / "scores.json"))
