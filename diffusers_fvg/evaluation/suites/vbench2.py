"""VBench-2.0 (arXiv 2503.21755): 1,013 prompts in 18 dimensions, 3,209 videos.

Source: github.com/Vchitect/VBench at bc76d35, folder `VBench-2.0`: `prompts/README.md`, `vbench2/__init__.py`,
`scripts/cal_final_score.py` and `scripts/constant.py`.
"""

from __future__ import annotations

import math
from pathlib import Path

from . import vbench
from .scores import TOLERANCE, Scores, check_present, mean
from .suite import Suite, SuitePrompt, published_file, read_json


GROUPS = {
    "Creativity": ("Composition", "Diversity"),
    "Commonsense": ("Instance_Preservation", "Motion_Rationality"),
    "Controllability": (
        "Camera_Motion",
        "Complex_Landscape",
        "Complex_Plot",
        "Dynamic_Attribute",
        "Dynamic_Spatial_Relationship",
        "Human_Interaction",
        "Motion_Order_Understanding",
    ),
    "Human Fidelity": ("Human_Anatomy", "Human_Clothes", "Human_Identity"),
    "Physics": ("Material", "Mechanics", "Multi-View_Consistency", "Thermotics"),
}
# Number of prompts of each dimension in `VBench2_full_info.json`.
PROMPTS = {
    "Composition": 53,
    "Diversity": 10,
    "Instance_Preservation": 57,
    "Motion_Rationality": 58,
    "Camera_Motion": 108,
    "Complex_Landscape": 30,
    "Complex_Plot": 60,
    "Dynamic_Attribute": 91,
    "Dynamic_Spatial_Relationship": 69,
    "Human_Interaction": 100,
    "Motion_Order_Understanding": 99,
    "Human_Anatomy": 120,
    "Human_Clothes": 75,
    "Human_Identity": 46,
    "Material": 50,
    "Mechanics": 57,
    "Multi-View_Consistency": 97,
    "Thermotics": 50,
}
SAMPLES, DIVERSITY_SAMPLES = 3, 20
# Diversity has one result per prompt, for all its videos.
RESULTS = {name: count if name == "Diversity" else SAMPLES * count for name, count in PROMPTS.items()}
FULL_INFO = (
    "VBench-2.0/vbench2/VBench2_full_info.json",
    "vbench2/VBench2_full_info.json",
    "VBench2_full_info.json",
)
FULL_TEXT = ("VBench-2.0/prompts/VBench2_full_text.txt", "prompts/VBench2_full_text.txt")


def read_prompts(folder: Path, ratio: str | None = None) -> list[SuitePrompt]:
    """Reads the distinct prompts, in the order of `VBench2_full_text.txt`, which files of rewritten prompts share."""
    dimensions: dict[str, list[str]] = {}
    for item in read_json(published_file(folder, *FULL_INFO), list):
        dimensions.setdefault(item["prompt_en"], []).extend(item["dimension"])
    lines = published_file(folder, *FULL_TEXT).read_text(encoding="utf-8").splitlines()
    texts = [line.strip() for line in lines if line.strip()]
    if set(texts) != set(dimensions):
        odd = min(set(texts) ^ set(dimensions))
        raise ValueError(
            f"{folder}: VBench2_full_text.txt and VBench2_full_info.json differ, as in {odd!r}; use both from one commit."
        )
    return [
        SuitePrompt(
            text,
            "+".join(dimensions[text]),
            vbench.video_names(text, DIVERSITY_SAMPLES if "Diversity" in dimensions[text] else SAMPLES),
        )
        for text in texts
    ]


def places(category: str, name: str) -> list[str]:
    """Returns a video's place in the folder of each of its dimensions.

    Diversity has 20 videos per prompt; other dimensions with the same prompt take the first three.
    """
    sample = int(name.removesuffix(".mp4").rpartition("-")[2])
    return [f"{own}/{name}" for own in category.split("+") if own == "Diversity" or sample < SAMPLES]


def read_scores(folder: Path) -> Scores:
    """Reads the scores from `*_eval_results.json` below a folder.

    A group's score is the unweighted mean of its dimensions, the total that of the groups. If a dimension is missing, the
    official script counts it as 0; here there is no total.
    """
    scores = Scores("vbench-2.0")
    vbench.read_dimensions(folder, RESULTS, scores)
    for name, own in scores.categories.items():
        counted = [value for value in own.videos.values() if value != -1]
        # The evaluator sets this dimension to 0 if more than 90% of its videos could not be judged.
        says_zero = name == "Motion_Order_Understanding" and len(own.videos) - len(counted) > 0.9 * len(own.videos)
        left_out = len(own.videos) - len(counted)
        if left_out:
            scores.notes.append(
                f"{name}: {left_out} of {len(own.videos)} videos could not be judged and are left out."
            )
        computed = 0.0 if says_zero else mean(counted)
        if own.score is not None and not math.isclose(own.score, computed, abs_tol=TOLERANCE):
            scores.problems.append(f"{name}: the file says {own.score}, but its videos give {computed}.")
        own.videos = {video: value for video, value in own.videos.items() if value != -1}
    check_present(scores)
    if not scores.complete:
        return scores
    groups = {group: mean(scores.means[name] for name in names) for group, names in GROUPS.items()}
    return scores.aggregate(groups | {"total": mean(groups.values())})


def pack(folder: Path, output: Path, model: str) -> list[str]:
    """See [`vbench.pack`]."""
    return vbench.pack(folder, output, RESULTS)


VBENCH_2 = Suite(
    name="vbench-2.0",
    title="VBench-2.0",
    read_prompts=read_prompts,
    read_scores=read_scores,
    places=places,
    # Human_Identity compares 20 frames with the first. Instance_Preservation counts a video below two seconds as perfect
    # without looking at it.
    min_frames=21,
    weights={name: 1 / len(GROUPS) / len(names) for names in GROUPS.values() for name in names},
    source="github.com/Vchitect/VBench, 45e79ec, folder VBench-2.0",
    prompt_digest="916de125a743611ad0d9f430458a61db6960207cda2e58e76d723fe8556afa83",
    pack=pack,
)
