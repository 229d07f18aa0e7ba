"""VBench-I2V (VBench++, arXiv 2411.13503): 1,118 pairs of image and prompt, five videos each. It measures stage 3 alone.

Source: github.com/Vchitect/VBench at bc76d35, `vbench2_beta_i2v/`, `scripts/cal_i2v_final_score.py`, `scripts/constant.py`.
"""

from __future__ import annotations

from pathlib import Path

from . import vbench
from .scores import Scores, check_present
from .suite import Suite, SuitePrompt, published_file, read_json


SAMPLES = 5
RATIOS = ("1-1", "8-5", "7-4", "16-9")
# Number of prompts of each dimension in `vbench2_beta_i2v/README.md`.
PROMPTS = {
    "camera_motion": 763,
    "i2v_subject": 246,
    "i2v_background": 109,
    "subject_consistency": 246,
    "background_consistency": 109,
    "motion_smoothness": 246,
    "dynamic_degree": 246,
    "aesthetic_quality": 355,
    "imaging_quality": 355,
}
RESULTS = {name: SAMPLES * count for name, count in PROMPTS.items()}
# `NORMALIZE_DIC_I2V` and `DIM_WEIGHT_I2V`: minimum and maximum unless they are 0 and 1, weight unless it is 1.
NORMALIZED = {
    "i2v_subject": (0.1462, 1.0),
    "i2v_background": (0.2615, 1.0),
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "motion_smoothness": (0.706, 0.9975),
}
WEIGHTS = {"camera_motion": 0.1, "dynamic_degree": 0.5}
GROUPS = {
    "I2V": ("camera_motion", "i2v_subject", "i2v_background"),
    "Quality": (
        "subject_consistency",
        "background_consistency",
        "motion_smoothness",
        "dynamic_degree",
        "aesthetic_quality",
        "imaging_quality",
    ),
}
FULL_INFO = ("vbench2_beta_i2v/vbench2_i2v_full_info.json", "vbench2_i2v_full_info.json")


def read_prompts(folder: Path, ratio: str | None = None) -> list[SuitePrompt]:
    """Reads the pairs of image and prompt in published order.

    Args:
        folder (`Path`): checkout of the repository, after `download_data.sh`.
        ratio (`str`, *optional*): aspect ratio of the cropped images, one of `RATIOS`; left out, 16-9.

    Raises:
        `ValueError`: the ratio is unknown, or an image is missing.
    """
    ratio = ratio or "16-9"
    if ratio not in RATIOS:
        raise ValueError(f"--ratio {ratio} must be one of {', '.join(RATIOS)}.")
    info = published_file(folder, *FULL_INFO)
    pictures = info.parent / "data" / "crop" / ratio
    prompts = []
    for item in read_json(info, list):
        picture = pictures / item["image_name"]
        if not picture.is_file():
            raise ValueError(
                f"{picture} does not exist; run vbench2_beta_i2v/download_data.sh, which fetches the images."
            )
        names = tuple(f"{item['prompt_en']}-{sample}.mp4" for sample in range(SAMPLES))
        category = next(own for own in PROMPTS if own in item["dimension"])
        prompts.append(SuitePrompt(item["prompt_en"], category, names, str(picture.resolve())))
    return prompts


def places(category: str, name: str) -> list[str]:
    return [f"videos/{name}"]


def read_scores(folder: Path) -> Scores:
    """Reads the scores from `*_eval_results.json` below a folder; the totals are computed from normalized dimensions."""
    scores = Scores("vbench-i2v")
    vbench.read_dimensions(folder, RESULTS, scores)
    # The evaluator writes this dimension's videos in percent, but not their mean.
    imaging = scores.categories["imaging_quality"]
    imaging.videos = {name: value / 100 for name, value in imaging.videos.items()}
    check_present(scores)
    if not scores.complete:
        return scores
    totals = {}
    for group, names in GROUPS.items():
        weights = {name: WEIGHTS.get(name, 1.0) for name in names}
        weighted = [weights[name] * normalized(name, scores.means[name]) for name in names]
        totals[group] = sum(weighted) / sum(weights.values())
    return scores.aggregate(totals | {"total": (totals["I2V"] + totals["Quality"]) / 2})


def total_weights() -> dict[str, float]:
    """Returns the weight of each dimension's score in the total."""
    weights = {}
    for names in GROUPS.values():
        whole = sum(WEIGHTS.get(name, 1.0) for name in names)
        for name in names:
            lowest, highest = NORMALIZED.get(name, (0.0, 1.0))
            weights[name] = WEIGHTS.get(name, 1.0) / whole / (highest - lowest) / len(GROUPS)
    return weights


def normalized(dimension: str, score: float) -> float:
    lowest, highest = NORMALIZED.get(dimension, (0.0, 1.0))
    return (score - lowest) / (highest - lowest)


def pack(folder: Path, output: Path, model: str) -> list[str]:
    """See [`vbench.pack`]."""
    return vbench.pack(folder, output, RESULTS)


VBENCH_I2V = Suite(
    name="vbench-i2v",
    title="VBench-I2V",
    read_prompts=read_prompts,
    read_scores=read_scores,
    places=places,
    weights=total_weights(),
    source="github.com/Vchitect/VBench, bc76d35, folder vbench2_beta_i2v",
    prompt_digest="3b92f15bd3a392c7541e713a22c47f7e0371eecb2e3e3c7129e7f32965e05b14",
    has_images=True,
    pack=pack,
)
