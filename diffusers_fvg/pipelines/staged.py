"""Runs the stages of a call for one video separately, for example in processes that each load the models of one stage.

[`write`], [`draw`] and [`animate`] in sequence give the same pixels and record as one call of the pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import PIL.Image
import torch

from ..compose.candidates import AnchorCandidate
from ..rewrite.outcome import RewriteOutcome
from ..rewrite.plan import plan_of
from ..rewrite.storyboard import Moment, moment_frames
from .output import FactorizedVideoPipelineOutput
from .record import composer_call, hub_revisions, rewriter_name
from .request import VideoRequest
from .stages import FactorizedStages


# Components of stage 2.
DRAWS = ("composer", "anchor_judge")
# Arguments that only stages 1 and 2 read and that are recorded.
_RECORDED = ("num_moments", "rewriter_max_new_tokens", "composer_num_inference_steps", "composer_guidance_scale")
_WRITTEN = (
    "first_frame_prompt",
    "storyboard",
    "composer_negative_prompt",
    "composer_num_candidates",
    "rewriter_motion",
)


@dataclass(frozen=True)
class Writing:
    """Result of stage 1 for a prompt.

    Args:
        moments (`list[Moment]`): captions; only one without a storyboard.
        motion_prompt (`str`, *optional*): motion caption.
        record (`dict`): entries of the record about the rewriter.
    """

    moments: list[Moment]
    motion_prompt: str | None = None
    record: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns the result as JSON values, for [`from_json`]."""
        moments = [{"caption": moment.caption, "time": moment.time} for moment in self.moments]
        outcome = self.moments[0].rewrite
        # `made` is the caption, which `moments` already has.
        rewrite = None if outcome is None else asdict(replace(outcome, made=None))
        return {
            "moments": moments,
            "rewrite": rewrite,
            "motion_prompt": self.motion_prompt,
            "record": self.record,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Writing:
        moments, rewrite = [Moment(**moment) for moment in values["moments"]], values["rewrite"]
        if rewrite is not None:
            plan = None if rewrite["plan"] is None else plan_of(rewrite["plan"])
            made = {"made": moments[0].caption, "reasons": tuple(rewrite["reasons"]), "plan": plan}
            moments[0] = replace(moments[0], rewrite=RewriteOutcome(**rewrite | made))
        return cls(moments, values["motion_prompt"], values["record"])


@dataclass(frozen=True)
class Drawing:
    """Result of stage 2 for a video.

    Args:
        pictures (`list[PIL.Image.Image]`): images of the video's moments.
        seed (`int`): seed of the images.
        candidates (`list[AnchorCandidate]`, *optional*): images from which a judge chose the first one.
        record (`dict`): entries of the record about the composer.
    """

    pictures: list[PIL.Image.Image]
    seed: int
    candidates: list[AnchorCandidate] | None = None
    record: dict[str, Any] = field(default_factory=dict)


@torch.no_grad()
def write(pipe: FactorizedStages, call: Mapping[str, Any]) -> Writing:
    """Runs stage 1.

    Args:
        pipe ([`FactorizedStages`]): a pipeline with its rewriter; the other models may have no weights.
        call (mapping): arguments of the pipeline's call for one prompt and one video, without a generator.

    Raises:
        `ValueError`: as in the pipeline's call.
    """
    # The judge, which this argument needs, may not be loaded.
    request = _request(pipe, {name: value for name, value in call.items() if name != "composer_num_candidates"})
    with pipe._running():
        moments = pipe._write_moments(request)
        told = {}
        if motion := pipe._write_motion(request, moments).motion_prompt:
            told = {"motion_prompt": motion[0]}
    record = {"rewriter": rewriter_name(pipe.rewriter), "hub_revisions": _revisions(pipe, ["rewriter"])}
    return Writing(moments[0], **told, record=record)


@torch.no_grad()
def draw(pipe: FactorizedStages, call: Mapping[str, Any], seed: int, writing: Writing | None) -> Drawing:
    """Runs stage 2.

    Args:
        pipe ([`FactorizedStages`]): a pipeline with its composer and, if any, its judge; the other models may have no weights.
        call (mapping): as in [`write`].
        seed (`int`): seed of the video.
        writing ([`Writing`], *optional*): result of [`write`]; `None` if the call has its own captions.

    Raises:
        `ValueError`: as in the pipeline's call.
    """
    request = replace(_request(pipe, call), generator=torch.Generator().manual_seed(seed))
    moments, seeds = pipe._write_moments(request)[0] if writing is None else writing.moments, [{"video": seed}]
    with pipe._running():
        pictures, candidates, _ = pipe._draw_moments(request, [moments], seeds)
    negative = request.composer_negative_prompt
    options = {name: getattr(request, name) for name in _RECORDED if name.startswith("composer_")}
    options["composer_negative_prompt"] = negative[0] if isinstance(negative, list) else negative
    dtypes = {name: getattr(getattr(pipe, name), "dtype", None) for name in DRAWS}
    record = {
        "composer": composer_call(pipe, options),
        "composer_negative_prompt": options["composer_negative_prompt"],
        "hub_revisions": _revisions(pipe, DRAWS),
        "dtypes": {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items() if dtype is not None},
    }
    assert pictures is not None  # Nothing interrupts it.
    return Drawing(pictures[0], seeds[0]["anchor"], candidates[0] if candidates else None, record)


def animate(
    pipe: FactorizedStages,
    call: Mapping[str, Any],
    seed: int,
    writing: Writing | None = None,
    drawing: Drawing | None = None,
) -> FactorizedVideoPipelineOutput:
    """Runs stage 3.

    Args:
        pipe ([`FactorizedStages`]): a pipeline with the video model; rewriter and composer may be missing.
        call (mapping): as in [`write`].
        seed (`int`): seed of the video.
        writing ([`Writing`], *optional*): result of [`write`], if stage 1 ran.
        drawing ([`Drawing`], *optional*): result of [`draw`], if stage 2 ran.

    Returns:
        [`FactorizedVideoPipelineOutput`]: output of the pipeline, whose `records` describe all stages.

    Raises:
        `ValueError`: as in the pipeline's call.
    """
    generator = torch.Generator().manual_seed(seed)
    if drawing is None:
        return pipe(**call, generator=generator)
    moments = _moments(call) if writing is None else writing.moments
    own = {name: value for name, value in call.items() if name not in (*_RECORDED, *_WRITTEN)}
    num_frames = call.get("num_frames") or pipe.call_defaults["num_frames"]
    places = moment_frames([moment.time for moment in moments], num_frames, pipe._frame_step())
    anchors = [pipe._moment_anchor(*pair) for pair in zip(drawing.pictures, places)]
    if writing is not None and writing.motion_prompt is not None:
        own["motion_prompt"] = writing.motion_prompt
    output = pipe(**own | {"mode": "factorized"}, anchors=[anchors], generator=generator)
    _complete(output.records[0], call, moments, writing, drawing)
    output.seeds[0]["anchor"] = drawing.seed
    return output


def _request(pipe: FactorizedStages, call: Mapping[str, Any]) -> VideoRequest:
    return pipe._request({"mode": "factorized", **call, "prompt": [call["prompt"]]})


def _revisions(pipe: FactorizedStages, names: Sequence[str]) -> dict[str, str]:
    return {name: value for name, value in hub_revisions(pipe).items() if name in names}


def _moments(call: Mapping[str, Any]) -> list[Moment]:
    """Returns the moments that the caller passed."""
    return call.get("storyboard") or [Moment(call["first_frame_prompt"], 0.0)]


def _complete(
    record: dict[str, Any],
    call: Mapping[str, Any],
    moments: list[Moment],
    writing: Writing | None,
    drawing: Drawing,
) -> None:
    """Adds stages 1 and 2 to the record of stage 3."""
    mode = call.get("mode", "factorized")
    record |= {"mode": mode, "first_frame_prompt": moments[0].caption}
    record |= {name: call[name] for name in _RECORDED if call.get(name) is not None}
    if mode == "storyboard":
        record["storyboard"] = [{"caption": moment.caption, "time": moment.time} for moment in moments]
    record["seeds"] = record["seeds"] | {"anchor": drawing.seed}
    for told in [drawing.record] if writing is None else [writing.record, drawing.record]:
        for name, value in told.items():
            record[name] = record[name] | value if isinstance(value, dict) and record.get(name) else value
    record["hub_revisions"] = dict(sorted(record["hub_revisions"].items()))
    # In the record of a single call, these keys come last.
    record |= {name: record.pop(name) for name in ("anchors", "seeds")}
