"""EvalCrafter (arXiv 2310.11440): 700 prompts, one video each, 17 metrics in four groups.

Source: github.com/evalcrafter/EvalCrafter at 1275bda, `eval_from_metrics.py`, `start.sh` and the scripts in `metrics/`.
"""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

from .scores import CategoryScore, Scores, check_present
from .suite import Suite, SuitePrompt, published_file


NUM_PROMPTS = 700
# Number of videos whose prompt is relevant for a metric (`attributes` in `metadata.json`). The metric leaves out those of them
# in which it finds nothing. `None`: the metric counts pairs of video and word.
ASKED = {
    "action_score": 50,
    "motion_ac_score": 50,
    "color_score": 46,
    "count_score": 50,
    "ocr_score": 50,
    "celebrity_id_score": 54,
    "detection_score": None,
}
METRICS = (
    "VQA_A",
    "VQA_T",
    "IS",
    "clip_temp_score",
    "warping_error",
    "face_consistency_score",
    "action_score",
    "motion_ac_score",
    "flow_score",
    "clip_score",
    "blip_bleu",
    "sd_score",
    "detection_score",
    "color_score",
    "count_score",
    "ocr_score",
    "celebrity_id_score",
)
# Weights and intercept of each group in `eval_from_metrics.py`. Three of the four intercepts are multiplied by 5 like the
# weights; that of alignment is not.
GROUPS = {
    "Visual Quality": (
        {"VQA_A": 0.03004555, "VQA_T": 0.02887537, "IS": -0.01382558},
        0.08707462696457707 * 5,
    ),
    "Text-Video Alignment": (
        {
            "clip_score": -0.0701577,
            "blip_bleu": 0.02561424,
            "sd_score": 0.05566109,
            "detection_score": 0.0173974,
            "color_score": -0.020954,
            "count_score": 0.03069167,
            "ocr_score": 0.00372351,
            "celebrity_id_score": 0.22686202,
        },
        -0.30683181901390977,
    ),
    "Motion Quality": (
        {"action_score": -0.01641512, "motion_ac_score": -0.01340959, "flow_score": -0.10517075},
        0.1297562020899355 * 5,
    ),
    "Temporal Consistency": (
        {"clip_temp_score": 2.92492244, "warping_error": 0.45475678, "face_consistency_score": 0.17561504},
        -3.42274050899774 * 5,
    ),
}
PERCENT = ("VQA_A", "VQA_T", "IS", "flow_score")
LOWER_IS_BETTER = ("warping_error", "ocr_score", "celebrity_id_score")
_VIDEO = re.compile(r"Vid: (\d{4})\S*,\s+Current (\w+): ([^,\s]+),")
_FINAL = re.compile(r"Final average (\w+): ([^,\s]+),\s*Total videos: (\d+)")
_INCEPTION = re.compile(r"Inception score of [^\n]*?: ([^,\s]+), std")
_TOTALS = re.compile(r"Results: (.*?), Total (\S+)")


def read_prompts(folder: Path, ratio: str | None = None) -> list[SuitePrompt]:
    """Reads `prompt700.txt`. In a hundred of the files in `prompts/`, which the metrics read, words are exchanged."""
    lines = published_file(folder, "prompt700.txt").read_text(encoding="utf-8").splitlines()
    texts = [line.strip() for line in lines if line.strip()]
    return [SuitePrompt(text, "all", (f"{number:04d}.mp4",)) for number, text in enumerate(texts)]


def places(category: str, name: str) -> list[str]:
    return [f"videos/{name}"]


def read_scores(folder: Path) -> Scores:
    """Reads the scores from the files of `results/`; each metric is a category.

    If a metric is missing, the official script returns NaN for its group and the total; here there are no totals.
    """
    scores = Scores("evalcrafter")
    scores.categories = {name: CategoryScore(None, expected=ASKED.get(name, NUM_PROMPTS)) for name in METRICS}
    for path in sorted(folder.glob("*_record.txt")):
        _read_record(path.read_text(encoding="utf-8", errors="replace"), scores)
    _read_dover(folder / "dover.csv", scores)
    check_present(scores)
    if scores.complete:
        groups = group_scores(scores.means)
        scores.aggregate(groups | {"total": sum(groups.values())})
        _check_final(folder / "final_result.txt", scores)
    return scores


def _read_record(text: str, scores: Scores) -> None:
    inception = _INCEPTION.search(text)
    if inception:
        scores.categories["IS"].score = _finite(inception[1])
    # The first match in the file, as in the official script.
    final = _FINAL.search(text)
    if final is None or final[1] not in scores.categories:
        return
    name, category = final[1], scores.categories[final[1]]
    category.score, count = _finite(final[2]), int(final[3])
    for number, metric, value in _VIDEO.findall(text):
        # Metrics that count pairs of video and word have several values per video and are left out.
        if metric == name and category.expected is not None and _finite(value) is not None:
            category.videos[f"{number}.mp4"] = float(value)
    if name not in ASKED and count != NUM_PROMPTS or category.expected is not None and count > category.expected:
        scores.problems.append(f"{name}: {count} of {category.expected} videos are in its record.")
    elif category.expected is not None and count < category.expected:
        scores.notes.append(f"{name}: {count} of the {category.expected} relevant videos have a score.")


def _read_dover(path: Path, scores: Scores) -> None:
    """Reads `dover.csv`: `name, aesthetic, technical,overall` for each video and the means in the last row, in percent."""
    if not path.is_file():
        return
    rows = [row for row in csv.reader(path.read_text(encoding="utf-8").splitlines()) if row]
    if not rows or not rows[-1][0].startswith("Avg. scores: ") or len(rows[-1]) < 2:
        scores.problems.append("VQA_A: dover.csv does not end with its means, so its script did not finish.")
        return
    means = (rows[-1][0].split(": ")[1], rows[-1][1])
    videos = [row for row in rows if re.fullmatch(r"\d{4}", row[0].strip()) and len(row) > 2]
    for column, (name, value) in enumerate(zip(("VQA_A", "VQA_T"), means), 1):
        category = scores.categories[name]
        category.score = _finite(value)
        category.videos = {f"{row[0].strip()}.mp4": float(row[column]) for row in videos}
        if len(videos) != NUM_PROMPTS:
            scores.problems.append(f"{name}: {len(videos)} of {NUM_PROMPTS} videos are in dover.csv.")


def group_scores(means: dict[str, float]) -> dict[str, float]:
    """Returns the scores of the four groups, in the official order.

    Args:
        means (`dict[str, float]`): mean of each metric in the unit of its file: DOVER in percent, the flow in pixels.
    """
    parts = {name: value / 100 if name in PERCENT else value for name, value in means.items()}
    parts |= {name: 1 - parts[name] for name in LOWER_IS_BETTER}
    return {
        group: 100 * (5 * math.fsum(weight * parts[name] for name, weight in weights.items()) + intercept)
        for group, (weights, intercept) in GROUPS.items()
    }


def total_weights() -> dict[str, float]:
    """Returns the weight of each metric's mean in the total."""
    weights = {name: 500 * weight for own, _ in GROUPS.values() for name, weight in own.items()}
    weights |= {name: weights[name] / 100 for name in PERCENT}
    return weights | {name: -weights[name] for name in LOWER_IS_BETTER}


def _check_final(path: Path, scores: Scores) -> None:
    """Compares the totals with `final_result.txt`, which rounds groups to two decimals and the total to none."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = _TOTALS.search(text)
    if found is None:
        scores.notes.append("There is no final_result.txt to compare the totals with.")
        return
    said = dict(part.rsplit(" ", 1) for part in found[1].split(", ")) | {"total": found[2]}
    for name, value in scores.totals.items():
        if said.get(name) != f"{value:.{0 if name == 'total' else 2}f}":
            scores.problems.append(f"{name}: final_result.txt says {said.get(name)}, but its metrics give {value}.")
    scores.aggregate(scores.totals)


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


EVALCRAFTER = Suite(
    name="evalcrafter",
    title="EvalCrafter",
    read_prompts=read_prompts,
    read_scores=read_scores,
    places=places,
    weights=total_weights(),
    source="github.com/evalcrafter/EvalCrafter, 1275bda",
    prompt_digest="6169a98e1327bb4fc85221e46b6ba410f1284961d436aaf7a5595fccde74502a",
    skips_missing=True,
)
