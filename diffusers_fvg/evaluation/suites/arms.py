"""The arms of a comparison: the same prompts, with the same seeds, made in several ways."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..plan import PlannedVideo, derive_seed
from .suite import Suite, SuitePrompt, prompt_digest


# Arguments of the pipeline's call. Stage 1 reads the prompt in each.
ARMS: dict[str, dict[str, Any]] = {
    "direct": {"mode": "direct"},
    "direct_upsampled": {"mode": "direct"},
    "factorized": {"mode": "factorized", "composer_num_candidates": 1},
    # Of so many pictures the judge chooses; a pipeline without a judge refuses it.
    "factorized_judged": {"mode": "factorized", "composer_num_candidates": 4},
    "image": {"mode": "factorized"},
}
_ARM = re.compile(r"([^@]+)(?:@([\w.-]+))?")


@dataclass(frozen=True)
class Condition:
    """What the videos of one mean have in common, but for the seed.

    Args:
        arm (`str`): one of `ARMS`.
        preset (`str`, *optional*): of sampling; the model's own when left out.
        num_inference_steps (`int`, *optional*): the preset's when left out.
    """

    arm: str
    preset: str | None = None
    num_inference_steps: int | None = None

    @property
    def name(self) -> str:
        """Of its folder; evaluators write it into the names of their files."""
        steps = self.num_inference_steps and f"{self.num_inference_steps}-steps"
        return "_".join(part for part in (self.arm, self.preset, steps) if part)

    def arguments(self) -> dict[str, Any]:
        own = {"preset": self.preset, "num_inference_steps": self.num_inference_steps}
        return ARMS[self.arm] | {name: value for name, value in own.items() if value is not None}


def parse_arm(text: str) -> tuple[str, str | None]:
    """`factorized@anchored-15` is an arm and its preset.

    Raises:
        `ValueError`: no such arm.
    """
    match = _ARM.fullmatch(text)
    if match is None or match[1] not in ARMS:
        raise ValueError(f"--arms {text}: give one of {', '.join(ARMS)}, with @PRESET behind it or not.")
    return match[1], match[2]


def conditions_of(suite: Suite, arms: Sequence[str], steps: Sequence[int] = ()) -> list[Condition]:
    """The conditions of a plan, each once.

    Args:
        suite ([`Suite`]): one with pictures has the arm `image` alone.
        arms (`Sequence[str]`): such as `direct@full-50`.
        steps (`Sequence[int]`): each arm at each number of steps; as the preset says when empty.
    """
    parsed = [parse_arm(text) for text in arms]
    for arm, _ in parsed:
        if (arm == "image") != suite.has_images:
            own = "image alone" if suite.has_images else ", ".join(name for name in ARMS if name != "image")
            raise ValueError(f"--arms {arm} is not for {suite.name}, which has {own}.")
    return list(dict.fromkeys(Condition(*pair, number) for pair in parsed for number in (*steps,) or (None,)))


def read_upsampled(path: Path, count: int) -> list[str]:
    """Prompts of `direct_upsampled`: a text file with one in each line, in the suite's order.

    Raises:
        `ValueError`: another number of lines.
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
    """Prompts with their place in the suite: of some categories, and the first of each, or all.

    Raises:
        `ValueError`: no such category.
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
    """The videos of a plan. Those of one prompt stand together in all conditions, so that a run that is stopped can be compared.

    Args:
        suite ([`Suite`]): of the prompts.
        prompts (`Sequence`): as [`chosen_prompts`] gives them.
        conditions (`Sequence[Condition]`): how to make each.
        seeds (`Sequence[int]`): each makes every video once more. A video has the same seed in every condition.
        call (`Mapping`, *optional*): arguments of all videos, such as `num_frames`.
        upsampled (`Sequence[str]`, *optional*): of the whole suite, for `direct_upsampled`.
        num_candidates (`int`, *optional*): pictures per video of `factorized_judged`; 4 when left out.
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
    """What `plan.json` says of a suite: its version and whether the prompts are those that were checked."""
    digest = prompt_digest(prompts)
    same = None if suite.prompt_digest is None else digest == suite.prompt_digest
    return {"suite": suite.name, "prompts": digest, "prompts_as_checked": same}
