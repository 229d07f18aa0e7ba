"""The stages of one video's call, run one by one: in processes of their own, each with the models of its stage alone.

[`write`], [`draw`] and [`animate`] one after the other give what the pipeline's call gives, pixels and record alike.
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


# Components of a pipeline that stage 2 is made of.
DRAWS = ("composer", "anchor_judge")
# Arguments of a call that stages 1 and 2 alone read, as its record tells them.
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
    """What stage 1 made of a prompt.

    Args:
        moments (`list[Moment]`): captions, of a video that is no storyboard one.
        motion_prompt (`str`, *optional*): of Factorized-Dreamer.
        record (`dict`): what a record tells of the rewriter.
    """

    moments: list[Moment]
    motion_prompt: str | None = None
    record: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Values of JSON; [`from_json`] reads them."""
        moments = [{"caption": moment.caption, "time": moment.time} for moment in self.moments]
        outcome = self.moments[0].rewrite
        # What was made is the caption.
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
    """What stage 2 made for a video.

    Args:
        pictures (`list[PIL.Image.Image]`): of the video's moments.
        seed (`int`): of the pictures.
        candidates (`list[AnchorCandidate]`, *optional*): among which a judge chose the first picture.
        record (`dict`): what a record tells of the composer.
    """

    pictures: list[PIL.Image.Image]
    seed: int
    candidates: list[AnchorCandidate] | None = None
    record: dict[str, Any] = field(default_factory=dict)


@torch.no_grad()
def write(pipe: FactorizedStages, call: Mapping[str, Any]) -> Writing:
    """Stage 1.

    Args:
        pipe ([`FactorizedStages`]): with its rewriter; its other models may be without weights.
        call (mapping): arguments of the pipeline's call for one prompt and one video, without a generator.

    Raises:
        `ValueError`: as in the pipeline's call.
    """
    # The judge need not be here.
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
    """Stage 2.

    Args:
        pipe ([`FactorizedStages`]): with its composer, and its judge where there is one; its other models may be without weights.
        call (mapping): as for [`write`].
        seed (`int`): of the video.
        writing ([`Writing`], *optional*): of [`write`]; `None` where the call has captions of its own.

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
    """Stage 3.

    Args:
        pipe ([`FactorizedStages`]): with the video model; rewriter and composer may be missing.
        call (mapping): as for [`write`].
        seed (`int`): of the video.
        writing ([`Writing`], *optional*): of [`write`], where that ran.
        drawing ([`Drawing`], *optional*): of [`draw`], where that ran.

    Returns:
        what the pipeline's call gives; of `records` those of the whole call.

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
    """Those that the caller wrote."""
    return call.get("storyboard") or [Moment(call["first_frame_prompt"], 0.0)]


def _complete(
    record: dict[str, Any],
    call: Mapping[str, Any],
    moments: list[Moment],
    writing: Writing | None,
    drawing: Drawing,
) -> None:
    """The record of stage 3 becomes that of all stages."""
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
    # In a record of one call these are the last.
    record |= {name: record.pop(name) for name in ("anchors", "seeds")}
