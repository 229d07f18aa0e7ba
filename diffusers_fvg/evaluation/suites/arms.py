"""Arms of a comparison: ways to make the videos, compared on the same prompts with the same seeds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..plan import PlannedVideo, derive_seed
from .suite import Suite, SuitePrompt, prompt_digest


# Arguments of the pipeline's call for each arm. The prompt is the same, except in `direct_upsampled`.
ARMS: dict[str, dict[str, Any]] = {
    "direct": {"mode": "direct"},
    "direct_upsampled": {"mode": "direct"},
    "factorized": {"mode": "factorized", "composer_num_candidates": 1},
    # The judge chooses among this many images. A pipeline without a judge raises an error.
    "factorized_judged": {"mode": "factorized", "composer_num_candidates": 4},
    "image": {"mode": "factorized"},
}
_ARM = re.compile(r"([^@]+)(?:@([\w.-]+))?")


@dataclass(frozen=True)
class Condition:
    """One entry of a comparison: an arm with a sampling preset and a number of steps. Its videos differ in prompt and seed.

    Args:
        arm (`str`): one of `ARMS`.
        preset (`str`, *optional*): sampling preset; left out, the model's default.
        num_inference_steps (`int`, *optional*): number of sampling steps; left out, that of the preset.
    """

    arm: str
    preset: str | None = None
    num_inference_steps: int | None = None

    @property
    def name(self) -> str:
        """Name of the condition's folder. Evaluators write it into the names of their files."""
        steps = self.num_inference_steps and f"{self.num_inference_steps}-steps"
        return "_".join(part for part in (self.arm, self.preset, steps) if part)

    def arguments(self) -> dict[str, Any]:
        own = {"preset": self.preset, "num_inference_steps": self.num_inference_steps}
        return ARMS[self.arm] | {name: value for name, value in own.items() if value is not None}


def parse_arm(text: str) -> tuple[str, str | None]:
    """Splits a text such as `factorized@anchored-15` into the arm and its preset.

    Raises:
        `ValueError`: the arm is unknown.
    """
    match = _ARM.fullmatch(text)
    if match is None or match[1] not in ARMS:
        raise ValueError(f"--arms {text}: give one of {', '.join(ARMS)}, optionally followed by @PRESET.")
    return match[1], match[2]


def conditions_of(suite: Suite, arms: Sequence[str], steps: Sequence[int] = ()) -> list[Condition]:
    """Returns the conditions of a plan without duplicates: each arm with each number of steps.

    Args:
        suite ([`Suite`]): the suite; one with images has only the arm `image`.
        arms (`Sequence[str]`): arms, optionally with a preset, such as `direct@full-50`.
        steps (`Sequence[int]`): numbers of sampling steps; if empty, those of the presets.

    Raises:
        `ValueError`: an arm is unknown or does not apply to the suite.
    """
    parsed = [parse_arm(text) for text in arms]
    for arm, _ in parsed:
        if (arm == "image") != suite.has_images:
            own = "image alone" if suite.has_images else ", ".join(name for name in ARMS if name != "image")
            raise ValueError(f"--arms {arm} is not for {suite.name}, which has {own}.")
    return list(dict.fromkeys(Condition(*pair, number) for pair in parsed for number in (*steps,) or (None,)))


def read_upsampled(path: Path, count: int) -> list[str]:
    """Reads the prompts of `direct_upsampled` from a text file with one prompt per line, in the suite's order.

    Raises:
        `ValueError`: the number of prompts is not `count`, or a line between them is empty.
    """
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    texts = lines[: max((number for number, line in enumerate(lines, 1) if line), default=0)]
    if len(texts) != count or not all(texts):
        written = sum(map(bool, texts))
        raise ValueError(
            f"--upsampled {path} has {written} prompts, and the suite has {count}: give one in each line."
        )
    return texts


def chosen_prompts(
    prompts: Sequence[SuitePrompt], categories: Sequence[str] | None = None, per_category: int | None = None
) -> list[tuple[int, SuitePrompt]]:
    """Selects prompts of a suite and returns them with their index.

    Args:
        prompts (`Sequence[SuitePrompt]`): all prompts of the suite.
        categories (`Sequence[str]`, *optional*): categories to take prompts from; left out, all.
        per_category (`int`, *optional*): number of prompts to take from each category, starting with its first; left out,
            all.

    Raises:
        `ValueError`: a category is unknown.
    """
    known = list(dict.fromkeys(own for prompt in prompts for own in prompt.category.split("+")))
    unknown = [name for name in categories or () if name not in known]
    if unknown:
        raise ValueError(f"--categories {unknown[0]} must be of {', '.join(known)}.")
    chosen, counts = [], dict.fromkeys(known, 0)
    for index, prompt in enumerate(prompts):
        own = [name for name in prompt.category.split("+") if categories is None or name in categories]
        if any(per_category is None or counts[name] < per_category for name in own):
            chosen.append((index, prompt))
            counts |= {name: counts[name] + 1 for name in own}
    return chosen


def plan_videos(
    suite: Suite,
    prompts: Sequence[tuple[int, SuitePrompt]],
    conditions: Sequence[Condition],
    seeds: Sequence[int] = (0,),
    call: Mapping[str, Any] | None = None,
    upsampled: Sequence[str] | None = None,
    num_candidates: int | None = None,
) -> Iterator[PlannedVideo]:
    """Yields the videos of a plan.

    The videos of a prompt in all conditions follow each other, so that the conditions can be compared even after a run that
    was stopped.

    Args:
        suite ([`Suite`]): suite of the prompts.
        prompts (`Sequence`): output of [`chosen_prompts`].
        conditions (`Sequence[Condition]`): conditions in which to make each video.
        seeds (`Sequence[int]`): seeds; each adds one video per prompt, sample and condition. A video has the same seed in
            every condition.
        call (`Mapping`, *optional*): arguments of the call for all videos, such as `num_frames`.
        upsampled (`Sequence[str]`, *optional*): prompts of the whole suite for `direct_upsampled`.
        num_candidates (`int`, *optional*): number of candidate images per video of `factorized_judged`; left out, 4.

    Raises:
        `ValueError`: `num_frames` is below the evaluator's minimum, or `upsampled` is missing.
    """
    num_frames = (call or {}).get("num_frames")
    if num_frames is not None and num_frames < suite.min_frames:
        raise ValueError(
            f"--num-frames {num_frames}: the evaluator of {suite.name} needs {suite.min_frames} at least."
        )
    if upsampled is None and any(condition.arm == "direct_upsampled" for condition in conditions):
        raise ValueError("--arms direct_upsampled needs --upsampled FILE, with one prompt in each line.")
    for seed in seeds:
        for index, prompt in prompts:
            for sample, name in enumerate(prompt.names):
                for condition in conditions:
                    arguments = {**(call or {}), **condition.arguments()}
                    if prompt.image is not None:
                        arguments["image"] = prompt.image
                    if condition.arm == "factorized_judged" and num_candidates is not None:
                        arguments["composer_num_candidates"] = num_candidates
                    text = prompt.text
                    if condition.arm == "direct_upsampled" and upsampled is not None:
                        text = upsampled[index]
                    yield PlannedVideo(
                        path=f"{condition.name}/seed-{seed}/{name}",
                        prompt=text,
                        seed=derive_seed(seed, index, sample),
                        arguments=arguments,
                        labels=_labels(suite, condition, seed, index, prompt, sample, name),
                    )


def _labels(
    suite: Suite, condition: Condition, seed: int, index: int, prompt: SuitePrompt, sample: int, name: str
) -> dict[str, str]:
    labels = {
        "suite": suite.name,
        "category": prompt.category,
        "condition": condition.name,
        "arm": condition.arm,
        "seed": str(seed),
        "index": str(index),
        "sample": str(sample),
        "name": name,
    }
    own = {"preset": condition.preset, "steps": condition.num_inference_steps}
    return labels | {key: str(value) for key, value in own.items() if value is not None}


def suite_facts(suite: Suite, prompts: Sequence[SuitePrompt]) -> dict[str, Any]:
    """Returns what `plan.json` records of a suite: its name, and whether the prompts are those that this package was checked
    with (`None` if no digest of them is known)."""
    digest = prompt_digest(prompts)
    same = None if suite.prompt_digest is None else digest == suite.prompt_digest
    return {"suite": suite.name, "prompts": digest, "prompts_as_checked": same}
