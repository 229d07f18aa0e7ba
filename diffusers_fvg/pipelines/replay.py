"""Generates a video again from its record: see [`~pipelines.record`].

A record may come from an untrusted file, so it is only data: it loads no code, opens no file and contacts no server. Its values
are checked and unknown keys are refused; replaying it is the same as calling the pipeline with these arguments.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import logging
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..animate.anchor import Anchor, picture_tensor, pictures_of
from ..animate.fidelity import ANCHOR_DECODES
from ..checks import MAX_PROMPT_CHARACTERS, UNSHOWABLE
from ..media import read_video_metadata
from ..rewrite.storyboard import Moment, check_moments
from .output import FactorizedVideoPipelineOutput
from .record import (
    MODEL_KINDS,
    NOT_RECORDED,
    SETTINGS,
    VERSION,
    composer_call,
    picture_hash,
    scheduler_config,
    surroundings,
)
from .request import Image
from .request_checks import MODES
from .seeds import anchor_seed, restored_draws


if TYPE_CHECKING:
    from .stages import FactorizedStages

logger = logging.get_logger(__name__)

# Larger numbers in a record are a mistake or an attack.
MAX_SIDE, MAX_FRAMES, MAX_PIXELS, MAX_STEPS, MAX_TOKENS, MAX_NUMBER = 8192, 10_000, 2**32, 1000, 8192, 10_000
MAX_VIDEOS, MAX_ITEMS, MAX_DETAIL_CHARACTERS, MAX_GUIDANCE = 4096, 256, 100_000, 1000
# Larger videos than these are generated only if the user passes the size. Models were trained on up to 2.3 times the pixels of
# their default (Wan2.1-14B: 720p and 480p). Fewer pixels than OWN_PIXELS fit into any memory with a small model. The text encoders
# of stock pipelines were not trained on more than OWN_TOKENS tokens, unless the model's default is larger.
OWN_FACTOR, OWN_PIXELS, OWN_TOKENS = 4, 2**24, 512

_CAPTIONS = ("first_frame_prompt", "storyboard", "motion_prompt")
# If one of these changes, the recorded choice of the judge does not apply.
_CHOSEN_FOR = {"prompt", "mode", "first_frame_prompt", "storyboard", "num_moments", "generator"}


def read_record(path: str | Path) -> dict[str, Any]:
    """Reads the record in a video's file and checks it.

    Args:
        path (`str` or `Path`): an mp4 file that `fvg generate` wrote, or [`~media.write_video`] with
            `metadata=out.records[0]`.

    Returns:
        `dict`: the record, for [`replay`].

    Raises:
        `ValueError`: the file is not a video, has no record, or the record is not valid.
        `OSError`: the file does not exist.
    """
    record = read_video_metadata(path)
    if "record_version" not in record:
        raise ValueError(f"{path} holds no record from which the video can be generated again.")
    try:
        check_record(record)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return record


def replay(
    pipe: FactorizedStages,
    record: Mapping[str, Any],
    images: Image | Sequence[Image] | None = None,
    **changes: Any,
) -> FactorizedVideoPipelineOutput:
    """Generates a video again from its record.

    The result is bit-identical on the same device with the same packages if the video was the only one of its call. A video of
    a batch differs by rounding: by 3e-6 of the value range with the embedded model on a CPU, and by 2e-5 if rounding in the
    composer's batch changed a pixel of the anchor by one of 256 levels. A warning lists known differences. Captions come from
    the record, so no rewriter is needed.

    Args:
        pipe ([`FactorizedVideoPipeline`] or another of this package): a pipeline of the class in the record.
        record (`dict`): from [`read_record`], or one of the output's `records`.
        images (image or list of images, *optional*): images of the anchors that were passed to the call, in the order of the
            record.
        changes: arguments of the pipeline's call that replace the recorded ones, except `return_dict`. If `prompt` or `mode`
            changes, or `rewriter_motion` is passed, stage 1 runs again. A changed `preset` sets its own steps and guidance.

    Returns:
        [`FactorizedVideoPipelineOutput`]

    Raises:
        `ValueError`: the record is not valid or of another pipeline class, or asks for far more pixels or text tokens than
            the pipeline's defaults; an image is missing or differs from the recorded one; or as in the pipeline's call.
    """
    check_record(record)
    changes = {name: value for name, value in changes.items() if value is not None}
    if not changes.pop("return_dict", True):
        raise ValueError("`return_dict=False`: a replay returns its output as an object; leave it out.")
    if record["pipeline"] != type(pipe).__name__:
        raise ValueError(
            f"The record is of a {record['pipeline']}, but `pipe` is a {type(pipe).__name__}: load a pipeline of that class."
        )
    call = recorded_call(record, images, changes)
    check_own_limits(pipe, call, changes)
    draws = {}
    if "generator" not in changes:
        shape = pipe._latents_shape(1, call["num_frames"], call["height"], call["width"])
        draws = restored_draws(record["seeds"]["video"], shape, pipe._execution_device)
    told = differences(pipe, record)
    if told:
        logger.warning(f"The video may differ from the recorded one: {'; '.join(told)}.")
    before = draws["generator"].get_state() if "latents" in draws else None
    with anchor_seed(None if "generator" in changes else record["seeds"].get("anchor")):
        output = pipe(**draws | call, return_dict=True)
    if {"first_frame_prompt", "storyboard"} & (call.keys() - changes.keys()):
        _keep_writer(output.records, record)
    if before is not None and "latents" not in changes:
        if not torch.equal(before, draws["generator"].get_state()):
            logger.warning(
                "The video differs from the recorded one: its generator was shared with other videos and drew more than their "
                "initial noise."
            )
        # The latents came from the recorded seed, which is recorded instead of them.
        output.seeds[0]["video"] = output.records[0]["seeds"]["video"] = record["seeds"]["video"]
        output.records[0]["not_recorded"].remove("latents")
    if not changes and _is_drawn(record) and output.records[0]["anchors"] != record["anchors"]:
        logger.warning("The composer drew another image than the recorded one, so the video differs.")
    return output


def _keep_writer(records: list[dict[str, Any]], record: Mapping[str, Any]) -> None:
    """Copies the rewriter, which wrote the captions in the record, to the new records."""
    writer = (record.get("hub_revisions") or {}).get("rewriter")
    for made in records:
        made["rewriter"] = record.get("rewriter")
        if writer is not None:
            made["hub_revisions"] = dict(sorted({**made["hub_revisions"], "rewriter": writer}.items()))


def differences(pipe: FactorizedStages, record: Mapping[str, Any]) -> list[str]:
    """Returns the differences between a record and a pipeline (model, adapters, versions and so on), one line each."""
    there, here = dict(record), surroundings(pipe)
    there["scheduler"] = record.get("scheduler") or {}
    here["scheduler"] = scheduler_config(pipe.scheduler) if there["scheduler"] else {}
    there["composer"] = (record.get("composer") or {}) if _is_drawn(record) else {}
    here["composer"] = (composer_call(pipe, record) or {}) if there["composer"] else {}
    found = []
    for key in ("model", "model_kind", "revision", "frame_rate", "device", "vae_tiling", "light_decoder"):
        if there.get(key) != here[key]:
            found.append(f"{key} {there.get(key)!r}, here {here[key]!r}")
    for key in (
        "versions",
        "hub_revisions",
        "dtypes",
        "quantization",
        "adapters",
        "adapter_hashes",
        "scheduler",
        "composer",
    ):
        recorded, own = there.get(key) or {}, here[key]
        # Rewriter and judge do not run, as the record has their results; nor does the composer if anchors were given.
        skipped = {"rewriter", "anchor_judge"} | (set() if _is_drawn(record) else {"composer"})
        for name in sorted((recorded.keys() | own.keys()) - skipped):
            if recorded.get(name) != own.get(name):
                found.append(f"{key} {name} {recorded.get(name)!r}, here {own.get(name)!r}")
    return [line if len(line) < 200 else f"{line[:200]}..." for line in found]


def needs_images(record: Mapping[str, Any]) -> bool:
    """Returns whether anchors were passed to the recorded call, whose images a record does not hold."""
    return bool(record.get("anchors")) and not _is_drawn(record)


def given_anchors(record: Mapping[str, Any], images: Any) -> list[Anchor]:
    """Returns the anchors of a record with the given images.

    Raises:
        `ValueError`: an image is missing, or differs from the recorded one.
    """
    entries = record["anchors"]
    if images is None:
        raise ValueError(
            f"The video was made from {len(entries)} given picture(s), which a record does not hold: pass `images`, or "
            "`--image` to `fvg`."
        )
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    if len(images) != len(entries):
        raise ValueError(
            f"`images` has {len(images)} entries for a record of {len(entries)} anchors; give one for each."
        )
    anchors = []
    for number, (entry, image) in enumerate(zip(entries, images), start=1):
        hashes = [picture_hash(picture_tensor(picture)) for picture in pictures_of(image)]
        if hashes != entry["sha256"]:
            raise ValueError(
                f"Picture {number} is another one than the recorded picture: its sha256 is {hashes[0]}, not "
                f"{entry['sha256'][0]}. To use another picture, pass it as `image` or in `anchors`."
            )
        anchors.append(Anchor(image, entry["frame_index"], entry["strength"]))
    return anchors


def check_own_limits(pipe: FactorizedStages, call: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Checks that a record does not ask for far more than the pipeline's defaults; `changes` by the user are not checked.

    Raises:
        `ValueError`: names the arguments and the fix.
    """
    own, sides = pipe.call_defaults, ("height", "width", "num_frames")
    pixels, limit = math.prod(call[name] for name in sides), OWN_FACTOR * math.prod(own[name] for name in sides)
    if not changes.keys() & {*sides} and pixels > max(limit, OWN_PIXELS):
        asked = ", ".join(f"`{name}={call[name]}`" for name in sides)
        raise ValueError(
            f"The record asks for {asked}, {pixels} pixels in all, but at most {max(limit, OWN_PIXELS)} are accepted from a "
            "record for this model: pass one of the three yourself to allow it."
        )
    tokens, limit = call.get("max_sequence_length", 1), max(own.get("max_sequence_length") or 0, OWN_TOKENS)
    if "max_sequence_length" not in changes and tokens > limit:
        raise ValueError(
            f"The record asks for `max_sequence_length={tokens}`, but at most {limit} are accepted from a record for this "
            "model: pass it yourself to allow it."
        )


def _is_drawn(record: Mapping[str, Any]) -> bool:
    return record.get("first_frame_prompt") is not None


def recorded_call(record: Mapping[str, Any], images: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of the call in [`replay`], without the generator; raises `ValueError` as [`replay`] does."""
    names = ["prompt", "motion_prompt", "negative_prompt", "first_frame_prompt", *SETTINGS, "composer_negative_prompt"]
    names += ["preset", "num_inference_steps", "guidance_scale", "guidance_scale_2"]
    call = {name: record[name] for name in names if record.get(name) is not None}
    if record.get("storyboard") is not None:
        call["storyboard"] = [Moment(**moment) for moment in record["storyboard"]]
        del call["first_frame_prompt"]
    if record.get("lora_scale") is not None:
        call["attention_kwargs"] = {"scale": record["lora_scale"]}
    plain = (str, int, float)
    changed = {name for name, value in changes.items() if not isinstance(value, plain) or value != record.get(name)}
    dropped: set[str] = set()
    if changed & {"prompt", "mode", "prompt_embeds", "rewriter_motion"}:
        dropped |= {*_CAPTIONS}
    if "num_moments" in changed and changes.get("mode", record["mode"]) == "storyboard":
        dropped |= {*_CAPTIONS}
    if changed & {"image", "anchors", "first_frame_prompt", "storyboard"}:
        dropped |= {"first_frame_prompt", "storyboard"}
    if "preset" in changed:
        dropped |= {"num_inference_steps", "guidance_scale", "guidance_scale_2"}
    if "prompt_embeds" in changed:
        dropped |= {"prompt"}
    call = {name: value for name, value in call.items() if name not in dropped}
    given = {"image", "anchors", "first_frame_prompt", "storyboard"}
    if given & {*call, *changes} or (call | changes)["mode"] == "direct":
        # Stage 1 does not run again.
        call.pop("rewriter_max_new_tokens", None)
    others = given | {"mode"}
    if needs_images(record) and not changed & others:
        call["anchors"] = given_anchors(record, images)
    elif images is not None:
        raise ValueError("`images` are for a record of pictures that were given; replace drawn pictures by `image`.")
    # A new text replaces recorded embeddings. A callback is not required again: its effect is not known.
    kinds = (
        "latents",
        "attention_kwargs",
        "animator_kwargs",
        *(() if "prompt" in changed else ("prompt_embeds", "prompt_embeds_2")),
    )
    kinds += () if "negative_prompt" in changed else ("negative_prompt_embeds", "negative_prompt_embeds_2")
    missing = [name for name in record.get("not_recorded") or () if name in kinds and name not in changes]
    if missing:
        raise ValueError(f"The video was made with `{missing[0]}`, which a record does not hold: pass it again.")
    call |= changes
    draws = call["mode"] != "direct" and not call.keys() & {"image", "anchors"}
    if draws and _is_drawn(record) and not changed & _CHOSEN_FOR:
        # The recorded seed is that of the image that the judge chose.
        call.setdefault("composer_num_candidates", 1)
    return call


# -- checks -----------------------------------------------------------------------------------------------------------


def check_record(record: Any) -> None:
    """Checks that a record is valid.

    Raises:
        `ValueError`: names the key and its value.
    """
    if not isinstance(record, Mapping) or "record_version" not in record:
        raise ValueError(
            f"`record` must be a dictionary from `read_record` or an output's `records`, but is a {type(record).__name__}."
        )
    if record["record_version"] != VERSION:
        version = record["record_version"]
        raise ValueError(
            f"its record has version {version!r:.40}, but this program reads version {VERSION}: update one of them."
        )
    unknown = sorted(record.keys() - _CHECKS.keys())
    if unknown:
        raise ValueError(
            f"its record has the unknown key {unknown[0]!r:.60}: it was changed, or made by a newer version."
        )
    for name, is_valid in _CHECKS.items():
        value = record.get(name)
        if value is None and name not in _REQUIRED:
            continue
        if not is_valid(value):
            raise ValueError(f"its record has `{name}={value!r:.80}`, which is not valid: it was damaged or changed.")
    seed = record["seeds"]["video"]
    sizes = [
        record["height"],
        record["width"],
        record["num_frames"],
        seed.get("of", 1) if isinstance(seed, dict) else 1,
    ]
    if math.prod(sizes) > MAX_PIXELS:
        size = " x ".join(map(str, sizes))
        raise ValueError(f"its record is of {size} pixels, more than {MAX_PIXELS}: it was damaged or changed.")
    if record.get("prompt") is None and "prompt_embeds" not in (record.get("not_recorded") or ()):
        raise ValueError("its record has no `prompt`: it was damaged or changed.")


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and abs(value) <= MAX_NUMBER


def _guidance(value: Any) -> bool:
    return _number(value) and 0 <= value <= MAX_GUIDANCE


def _text(longest: int = MAX_PROMPT_CHARACTERS) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and len(value) <= longest and not UNSHOWABLE.search(value)


def _matches(pattern: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _each(is_valid: Callable[[Any], bool], longest: int = MAX_ITEMS) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) <= longest and all(map(is_valid, value))


def _named(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict)
        and len(value) <= MAX_ITEMS
        and all(map(_NAME, value))
        and all(map(is_valid, value.values()))
    )


def _detail(value: Any) -> bool:
    """Checks an object that is only compared and printed."""
    return isinstance(value, dict) and _text(MAX_DETAIL_CHARACTERS)(json.dumps(value))


def _model(value: Any) -> bool:
    """Checks a Hub repository or a plain name."""
    if not _text(255)(value) or "\n" in value or "\r" in value:
        return False
    try:
        validate_repo_id(value)
    except HFValidationError:
        return value not in ("", ".", "..") and not re.search(r"[/\\:]", value)
    return value.count("/") <= 1


def _repository(value: Any) -> bool:
    """Checks a Hub repository with its commit."""
    if not _text(255)(value):
        return False
    name, _, revision = value.partition("@")
    return "/" in name and _model(name) and re.fullmatch(r"[\w./-]{0,100}", revision) is not None


def _storyboard(value: Any) -> bool:
    fields = {"caption", "time"}
    if not _each(lambda item: isinstance(item, dict) and item.keys() == fields and _text()(item["caption"]))(value):
        return False
    try:
        check_moments([Moment(**item) for item in value])
    except ValueError:
        return False
    return True


def _anchor(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"frame_index", "strength", "sha256"}:
        return False
    hashes = value["sha256"]
    is_placed = _whole(-MAX_FRAMES, MAX_FRAMES)(value["frame_index"]) and _number(value["strength"])
    return is_placed and _each(_matches("[0-9a-f]{64}"), MAX_FRAMES)(hashes) and len(hashes) > 0


def _seeds(value: Any) -> bool:
    if not isinstance(value, dict) or not {"video"} <= value.keys() <= {"video", "anchor"}:
        return False
    if not _SEED(value.get("anchor", 0)):
        return False
    video = value["video"]
    return _SEED(video) or isinstance(video, dict) and _is_seed_dict(video)


def _is_seed_dict(video: dict[str, Any]) -> bool:
    known = {"device": _WORD, "seed": _SEED, "state": _text(), "after": _whole(0, MAX_VIDEOS - 1)}
    known |= {"index": _whole(0, MAX_VIDEOS - 1), "of": _whole(2, MAX_VIDEOS)}
    if not video.keys() <= known.keys() or not all(known[name](value) for name, value in video.items()):
        return False
    has_one_source = ("seed" in video) != ("state" in video)
    is_placed = ("index" in video) == ("of" in video) and not {"of", "after"} <= video.keys()
    return has_one_source and is_placed and video.get("index", 0) < video.get("of", 1)


_NAME, _WORD, _SEED = _text(255), _matches("[a-z]{1,20}"), _whole(0, 2**64 - 1)
_REQUIRED = ("record_version", "pipeline", "mode", "height", "width", "num_frames", "seeds")
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "record_version": _whole(VERSION, VERSION),
    **dict.fromkeys(("prompt", "motion_prompt", "first_frame_prompt"), _text()),
    **dict.fromkeys(("negative_prompt", "composer_negative_prompt"), _text()),
    "storyboard": _storyboard,
    "mode": lambda value: value in MODES,
    **dict.fromkeys(("height", "width"), _whole(1, MAX_SIDE)),
    "num_frames": _whole(1, MAX_FRAMES),
    "max_sequence_length": _whole(1, MAX_TOKENS),
    "rewriter_max_new_tokens": _whole(1, MAX_TOKENS),
    "num_moments": _whole(1, MAX_ITEMS),
    **dict.fromkeys(("num_inference_steps", "composer_num_inference_steps"), _whole(1, MAX_STEPS)),
    **dict.fromkeys(("guidance_scale", "guidance_scale_2", "guidance_rescale", "composer_guidance_scale"), _guidance),
    "lora_scale": _number,
    **dict.fromkeys(("fps", "frame_rate"), lambda value: _number(value) and value > 0),
    "use_dynamic_cfg": lambda value: isinstance(value, bool),
    "anchor_decode": lambda value: value in ANCHOR_DECODES,
    "preset": _NAME,
    **dict.fromkeys(("scheduler", "composer"), _detail),
    "not_recorded": _each(lambda name: name in (*NOT_RECORDED, "attention_kwargs")),
    "anchors": _each(_anchor),
    "seeds": _seeds,
    "pipeline": _matches(r"[A-Za-z0-9]{1,100}"),
    **dict.fromkeys(("model", "rewriter"), _model),
    "model_kind": lambda value: value in MODEL_KINDS,
    "revision": _matches("[0-9a-f]{40}"),
    "hub_revisions": _named(_repository),
    "versions": _named(_matches(r"[\w.+!-]{1,100}")),
    "adapters": _named(_named(lambda value: _number(value) or _each(_number)(value))),
    "adapter_hashes": _named(_named(_matches("[0-9a-f]{16}"))),
    **dict.fromkeys(("dtypes", "quantization"), _named(_matches(r"[\w-]{1,40}"))),
    "vae_tiling": lambda value: isinstance(value, bool),
    "light_decoder": _matches(r"[\w.-]{1,40}"),
    "device": _WORD,
}
